"""What many ranks build on, on one GPU: FSDP2 against none, float8 against bfloat16, and memory as it was foretold.

    python3 benchmarks/scale_gpu.py [--device cuda] [--seconds 130]

Each run is whole optimizer steps of a configuration in a process of its own, through `parallelize` as the trainer goes.
FSDP2 on one rank gathers from itself, so what it adds is its own cost (bar: 3 % of the step). Memory is CUDA's largest
sum of allocations, of blocks that are not compiled, beside what `nanomai plan` and `nanomai simulate` say of the same
settings (bar: 5 %). Results go to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a checkout needs no installation

from benchmarks.machines import machine_of, slug

MICRO_BATCHES = 2  # of a step: gradients are there while the second one runs
COMMON = {"train.dtype": "bfloat16", "train.kernels": "torch"}
MEMORY = {  # configuration: its settings, the largest last (`nanomai plan --largest --gpus 1`)
    "gpt2-124m": {"train.micro_batch": 16}, "gpt2-xl": {"train.micro_batch": 4},
    "phi-3.5-mini": {"train.micro_batch": 1, "train.sequence_length": 4096, "parallel.recompute": "full"}}
VARIANTS = {"plain": {}, "FSDP2": {"fsdp2": True}, "float8": {"float8": True},
            "FSDP2, float8": {"fsdp2": True, "float8": True}}
BARS = {"memory": 0.05, "FSDP2": 0.03}


def layout_of_one(device: str):
    """A grid of one rank, which `lay_out` would leave away."""
    from torch.distributed.device_mesh import init_device_mesh

    from nanomai.parallel.layout import Layout
    from nanomai.parallel.mesh import Mesh

    grid = init_device_mesh(device, (1, 1, 1, 1), mesh_dim_names=("pipeline", "replicas", "shard", "tensor"))
    return Layout(Mesh(), grid=grid, dense=grid)


def measure(name: str, settings: dict, device: str, compiled: bool, fsdp2: bool = False, float8: bool = False,
            seconds: float = 5.0) -> dict:
    """Seconds a step, and the most bytes allocated at once."""
    import torch
    import torch.distributed as dist

    from nanomai.config_file import load_config
    from nanomai.model import Transformer, init_weights
    from nanomai.optim import build_optimizers, set_learning_rate
    from nanomai.parallel import fsdp
    from nanomai.parallel.apply import allocate, clip_gradients, parallelize, share
    from nanomai.parallel.layout import Layout

    machine = machine_of(device)
    machine.filler = None
    config = load_config(name, **COMMON | settings)
    if fsdp2:
        dist.init_process_group("nccl" if device == "cuda" else "gloo", rank=0, world_size=1, store=dist.HashStore())
    machine.start_peak()
    with torch.device("meta"):
        model = Transformer(config.model)
    model.compute_dtype = torch.bfloat16
    model.set_kernels(config.train.kernels)
    if float8:
        model.use_float8()
    allocate(parallelize(model, layout_of_one(device) if fsdp2 else Layout(), config.parallel, compiled),
             torch.device(device))
    init_weights(model, 0, share)
    optimizers = build_optimizers(model, config.optim)
    set_learning_rate(optimizers, 1e-4)
    shape = MICRO_BATCHES, 2, config.train.micro_batch, config.sequence_length
    batches = torch.randint(0, config.model.vocab_size, shape).to(device)

    def step() -> float:
        start = time.perf_counter()
        for i, (ids, targets) in enumerate(batches, 1):
            fsdp.sum_after(model, last=i == MICRO_BATCHES)
            model(ids, targets, reduction="sum").backward()
        clip_gradients(model, 1.0, batches[:, 1].numel()).item()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        machine.synchronize()
        return time.perf_counter() - start

    step(), step()  # the first compiles
    times, began = [], time.perf_counter()
    while len(times) < 3 or (time.perf_counter() - began < seconds and len(times) < 30):
        times.append(step())
    if fsdp2:
        dist.destroy_process_group()
    return {"seconds": statistics.median(times), "tokens": batches[:, 1].numel(), "peak": machine.peak_bytes(),
            "facts": machine.facts()}


def foretold(name: str, settings: dict) -> dict:
    """What `nanomai plan` and `nanomai simulate` say of a step, in bytes."""
    flags = [text for key, value in (COMMON | settings).items() for text in (f"--{key}", str(value))]
    commands = {"plan": ["plan", name, "--gpus", "1", "--gpu", "h100"],
                "simulate": ["simulate", name, "--world-size", "1", "--micro-batches", str(MICRO_BATCHES)]}
    said = {}
    for command, words in commands.items():
        done = subprocess.run([sys.executable, "-m", "nanomai", *words, *flags, "--json"], cwd=ROOT, text=True,
                              stdout=subprocess.PIPE, check=True)
        said[command] = json.loads(done.stdout)
    return {"plan": said["plan"]["memory"]["peak"], "simulate": sum(said["simulate"]["memory"].values())}


def in_a_process(task: dict, seconds: float) -> dict:
    """`measure` where its memory is its own and what goes wrong stays; with its error if there is one."""
    if seconds <= 0:
        return {"error": "skipped: no time left"}
    try:
        done = subprocess.run([sys.executable, __file__, "--task", json.dumps(task)], text=True, timeout=seconds,
                              stdout=subprocess.PIPE)
    except subprocess.TimeoutExpired:
        return {"error": "stopped: no time left"}
    if done.returncode:
        return {"error": f"its process ended with status {done.returncode}; its last words stand above"}
    return json.loads(done.stdout.splitlines()[-1])


def memory_line(name: str, row: dict) -> str:
    """Measured, and what was foretold of it."""
    if "error" in row or row["peak"] is None:
        return f"| {name} | {row.get('error', 'only CUDA counts its allocations')} | | |"
    cells = [f"{row[way] / 2**30:.2f} ({row[way] / row['peak'] - 1:+.1%})" for way in ("plan", "simulate")]
    return f"| {name} | {row['peak'] / 2**30:.2f} | {' | '.join(cells)} |"


def speed_line(name: str, variant: str, row: dict, plain: dict | None) -> str:
    """Tokens a second, and the time of a step beside that of `plain`."""
    if "error" in row:
        return f"| {name} | {variant} | {row['error']} | |"
    ratio = f"{row['seconds'] / plain['seconds']:.3f}" if plain and "seconds" in plain else ""
    return f"| {name} | {variant} | {row['tokens'] / row['seconds']:,.0f} | {ratio} |"


def run(device: str, seconds: float, out: Path, memory: dict = MEMORY,
        speed: tuple[str, ...] = ("gpt2-124m", "gpt2-xl"), variants: dict = VARIANTS) -> int:
    """All runs that the time allows, and the page; 1 if something went wrong."""
    deadline, rows = time.monotonic() + seconds, {"memory": {}, "speed": {}}
    for name, settings in memory.items():
        task = {"name": name, "settings": settings, "device": device, "compiled": False, "seconds": 0.0}
        found = in_a_process(task, deadline - time.monotonic())
        rows["memory"][name] = found if "error" in found else found | foretold(name, settings)
        print(memory_line(name, rows["memory"][name]), flush=True)
    for name in speed:
        rows["speed"][name] = {}
        for variant, options in variants.items():
            task = {"name": name, "settings": memory[name], "device": device, "compiled": device == "cuda"} | options
            rows["speed"][name][variant] = in_a_process(task, deadline - time.monotonic())
            print(speed_line(name, variant, rows["speed"][name][variant], rows["speed"][name]["plain"]), flush=True)
    path = write(rows, out)
    failed = [text for text in (*(r.get("error") for r in rows["memory"].values()),
                                *(r.get("error") for of in rows["speed"].values() for r in of.values())) if text]
    print(f"wrote {path} and .json; {len(failed)} failed")
    return 1 if failed else 0


def write(rows: dict, out: Path) -> Path:
    """Markdown, and JSON beside it."""
    every = [*rows["memory"].values(), *(r for of in rows["speed"].values() for r in of.values())]
    facts = next((r["facts"] for r in every if "facts" in r), {"name": "gpu"})
    path = out / f"scale-{slug(facts['name'])}.md"
    memory = "\n".join(memory_line(name, row) for name, row in rows["memory"].items())
    speed = "\n".join(speed_line(name, variant, row, of["plain"])
                      for name, of in rows["speed"].items() for variant, row in of.items())
    path.write_text(f"# FSDP2, float8 and memory on one GPU\n\n{'; '.join(f'{k} {v}' for k, v in facts.items())}\n\n"
                    f"Most memory of a step of {MICRO_BATCHES} micro-batches, GiB, blocks not compiled; bar for both: "
                    f"{BARS['memory']:.0%}.\n\n"
                    f"| configuration | CUDA | plan | simulate |\n|---|--:|--:|--:|\n{memory}\n\n"
                    f"Speed, blocks compiled; bar for FSDP2: {1 + BARS['FSDP2']:.2f}.\n\n"
                    "| configuration | variant | tokens/s | step beside plain |\n|---|---|--:|--:|\n"
                    f"{speed}\n", encoding="utf-8")
    path.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return path


def main() -> int:
    """The flags, or one run for `in_a_process`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=130.0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--task", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        print(json.dumps(measure(**options.task)))
        return 0
    return run(options.device, options.seconds, options.out)


if __name__ == "__main__":
    sys.exit(main())
