"""Training speed: tokens/s, MFU and peak memory of a whole optimizer step, side by side in one run.

    python benchmarks/train_step.py                              # nano, micro and 10M; eager, compiled; fp32, bf16
    python benchmarks/train_step.py --peer ../nanoGPT            # beside a nanoGPT checkout of yours, with ratios
    python benchmarks/train_step.py --only 10M --json results.json
    python benchmarks/train_step.py --only 124M --variants bf16 "as shipped"   # fewer at once, for less memory
    python benchmarks/train_step.py --device cuda                # 124M, 350M, 1.5B on one GPU: see train_gpu.py

Each variant lives in a process of its own, so that its peak memory is its own; the processes take turns, a few steps
each, so that a slow minute of the machine slows all of them alike. Figures are medians over the turns. MFU is the share
of a large bfloat16 (or float32) matrix product, measured between the turns too, with `flops_per_token` as the count.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout needs no installation
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting variants must not spin on the cores of the one that runs

# name: layers, d_model, query heads, key-value heads, d_ff, vocabulary, sequence length, sequences in a batch
SHAPES = {
    "shakespeare-0.8M": (4, 128, 2, 2, 352, 65, 64, 12),
    "nano": (4, 128, 2, 1, 384, 4096, 256, 32),
    "micro": (6, 256, 4, 2, 768, 4096, 256, 32),
    "10M V65": (6, 384, 6, 6, 1024, 65, 256, 16),
    "10M V4096": (6, 384, 6, 6, 1024, 4096, 256, 16),
    "10M V50304": (6, 384, 6, 6, 1024, 50304, 256, 16),
    "124M": (12, 768, 12, 12, 2048, 50304, 1024, 1),
}
OURS = {
    "fp32 eager": {"dtype": "float32", "compiled": False}, "fp32 compiled": {"dtype": "float32", "compiled": True},
    "bf16 eager": {"dtype": "bfloat16", "compiled": False}, "bf16 compiled": {"dtype": "bfloat16", "compiled": True},
    "bf16 compiled, ReLU²": {"dtype": "bfloat16", "compiled": True, "activation": "relu2"},
}
PEER = {
    "nanoGPT as shipped (fp32)": {"dtype": "float32"}, "nanoGPT, bf16 autocast": {"dtype": "bfloat16"},
    "nanoGPT, bf16, compiled": {"dtype": "bfloat16", "compiled": True},
}


def build(config, device: str, kernels: str):
    """A model on `device`. This is where a variant says which kernels it uses: auto, torch, triton, or names."""
    import torch

    from nanomai.model import build_model

    with torch.device("meta" if device == "cuda" else "cpu"):
        model = build_model(config)
    if device == "cuda":  # any weights will do, and a GPU draws 1.5 billion at once
        model = model.to_empty(device=device)
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(1.0) if p.ndim == 1 else p.normal_(0.0, config.init_std)
    if kernels != "auto":
        model.set_kernels(kernels)
    return model


def our_step(shape: tuple, dtype: str, compiled: bool, activation: str = "swiglu", device: str = "cpu",
             kernels: str = "auto", documents: tuple[int, ...] | None = (), micro_batches: int = 1):
    """A step as `nanomai.train` makes it: document ids, summed loss, clipping, fused AdamW.

    `documents`: the lengths of each row's; () is one document a row, None gives no ids at all.
    """
    import torch

    from nanomai.config import ModelConfig, OptimConfig
    from nanomai.optim import build_optimizers, set_learning_rate
    from nanomai.parallel.apply import clip_gradients, parallelize

    layers, d, heads, kv_heads, d_ff, vocab, t, batch = shape
    d_ff = d_ff if activation == "swiglu" else 3 * d_ff // 2  # two matrices for three: the same parameters
    config = ModelConfig(n_layers=layers, d_model=d, n_heads=heads, n_kv_heads=kv_heads, head_dim=d // heads, d_ff=d_ff,
                         vocab_size=vocab, context_length=t, activation=activation)
    model = build(config, device, kernels)
    model.compute_dtype = getattr(torch, dtype)
    parallelize(model, compile_blocks=compiled)
    optimizers = build_optimizers(model, OptimConfig())
    set_learning_rate(optimizers, 1e-3)
    ids, targets = torch.randint(0, vocab, (2, batch, t))
    lengths = torch.tensor(documents or (t,))
    rows = torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(lengths).repeat(batch, 1)
    inputs = ids, targets, rows if documents is not None else None

    def step() -> None:
        for _ in range(micro_batches):
            on_device = (x if x is None else x.to(device, non_blocking=True) for x in inputs)
            model(*on_device, reduction="sum").backward()
        norm = clip_gradients(model, 1.0, targets.numel() * micro_batches)
        if device == "cuda":
            norm.item()  # the trainer looks before it steps: it skips what is not finite
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step, config.n_parameters, config.flops_per_token(t) * batch * t


def peer_step(shape: tuple, dtype: str, compiled: bool = False):
    """nanoGPT's model and optimizer as its train.py uses them on a CPU, from the checkout on sys.path."""
    import torch
    from model import GPT, GPTConfig

    layers, d, heads, _, _, vocab, t, batch = shape
    with contextlib.redirect_stdout(sys.stderr):
        model = GPT(GPTConfig(block_size=t, vocab_size=vocab, n_layer=layers, n_head=heads, n_embd=d, dropout=0.0,
                              bias=False))
        optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu")
    n_parameters = sum(p.numel() for p in model.parameters())
    run = torch.compile(model) if compiled else model
    ids, targets = torch.randint(0, vocab, (2, batch, t))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            _, loss = run(ids, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, n_parameters, None


def work(task: dict) -> None:
    """A variant's process: builds its step, then answers each number of steps on stdin with seconds and memory."""
    import torch

    from nanomai.machine import prepare_process

    if task["peer"]:
        sys.path.insert(0, task["peer"])
        torch.set_num_threads(task["threads"])  # as shipped: the allocator's settings are ours
        step, n_parameters, flops = peer_step(task["shape"], **task["options"])
    else:
        prepare_process(task["threads"])
        step, n_parameters, flops = our_step(task["shape"], **task["options"])
    for _ in range(3):
        step()
    print(json.dumps({"parameters": n_parameters, "flops": flops}), flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        for _ in range(int(line)):
            step()
        seconds = (time.perf_counter() - start) / int(line)
        print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]), flush=True)


class Variant:
    """The parent's end of a variant's process."""

    def __init__(self, name: str, task: dict):
        self.name, self.seconds, self.peak_mib, self.dtype = name, [], 0.0, task["options"]["dtype"]
        self.process = subprocess.Popen([sys.executable, __file__, "--worker", json.dumps(task)], text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.facts = self._answer()

    def run(self, steps: int) -> None:
        print(steps, file=self.process.stdin, flush=True)
        seconds, self.peak_mib = self._answer()
        self.seconds.append(seconds)

    def _answer(self):
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.name}: its process died with status {self.process.wait()}; where memory is short, measure "
                     "fewer at once with --variants")
        return json.loads(line)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def compare(name: str, peer: str | None, threads: int, turns: int, chosen: list[str]) -> list[dict]:
    """The variants of one shape whose names hold one of `chosen`, taking turns; one row each."""
    import torch

    from nanomai.machine import matmul_peak

    shape, peaks = SHAPES[name], {"float32": [], "bfloat16": []}
    ours = {n: o for n, o in OURS.items() if "ReLU" not in n or name.startswith("10M")}
    tasks = [(n, {"shape": shape, "threads": threads, "options": o, "peer": None}) for n, o in ours.items()]
    if peer:
        tasks += [(n, {"shape": shape, "threads": threads, "options": o, "peer": peer}) for n, o in PEER.items()]
    variants = [Variant(n, task) for n, task in tasks if any(part in n for part in chosen)]
    for variant in variants:
        variant.run(1)
        variant.steps = max(1, round(0.5 / variant.seconds.pop()))  # about half a second a turn
    for _ in range(turns):
        for variant in variants:
            variant.run(variant.steps)
        for dtype, seen in peaks.items():
            seen.append(matmul_peak(torch.device("cpu"), getattr(torch, dtype), 0.1))
    rows, shipped = [], next((v for v in variants if "shipped" in v.name), None)
    for v in variants:
        v.close()
        seconds, tokens = statistics.median(v.seconds), shape[6] * shape[7]
        mfu = v.facts["flops"] and v.facts["flops"] / seconds / statistics.median(peaks[v.dtype])
        ratio = shipped and statistics.median(shipped.seconds) / seconds
        rows.append({"shape": name, "variant": v.name, "parameters": v.facts["parameters"],
                     "tokens_per_second": tokens / seconds, "mfu": mfu, "peak_mib": v.peak_mib, "ratio": ratio})
    return rows


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="a checkout of nanoGPT to measure beside")
    parser.add_argument("--only", help="shapes whose name begins with this")
    parser.add_argument("--variants", nargs="+", default=[""], help="variants whose name holds one of these")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--json", help="also write the rows here")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--seconds", type=float, default=150, help="on a GPU: what is left after them is skipped")
    parser.add_argument("--out", default=Path(__file__).parent / "results", type=Path, help="on a GPU: the folder")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.shapes = [name for name in SHAPES if name.startswith(arguments.only or "")]
    if arguments.device == "cpu" and not arguments.shapes:
        parser.error(f"no shape begins with {arguments.only}; there are: {', '.join(SHAPES)}")
    return arguments


def main() -> int | None:
    arguments = parse()
    if arguments.worker:
        return work(json.loads(arguments.worker))
    if arguments.device == "cuda":
        from benchmarks import train_gpu

        return train_gpu.run(arguments.only or "", arguments.variants, arguments.seconds, arguments.out)
    import torch

    from nanomai.machine import describe

    torch.set_num_threads(arguments.threads)
    machine = f"{describe(torch.device('cpu'))}; {arguments.threads} threads"
    print(f"{machine}\n\n| shape | variant | parameters | tokens/s | MFU | peak MiB | x nanoGPT as shipped |")
    print("|---" * 7 + "|")
    rows = []
    for name in arguments.shapes:
        for row in compare(name, arguments.peer, arguments.threads, arguments.turns, arguments.variants):
            rows.append(row)
            mfu, ratio = (f"{row['mfu']:.0%}" if row["mfu"] else "", f"{row['ratio']:.2f}" if row["ratio"] else "")
            print(f"| {name} | {row['variant']} | {row['parameters'] / 1e6:.2f}M | {row['tokens_per_second']:,.0f} | "
                  f"{mfu} | {row['peak_mib']:,.0f} | {ratio} |", flush=True)
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump({"machine": machine, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    sys.exit(main())
