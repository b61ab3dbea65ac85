"""What a mixture of experts costs: whole optimizer steps of micro-moe beside a dense model of the same active size.

    python benchmarks/moe.py                                # Muon, as micro-moe trains, and AdamW
    python benchmarks/moe.py --threads 1 --cpu-seconds      # on a machine that others use as well
    python benchmarks/moe.py --only AdamW --profile         # where a step's time goes instead

A dense MLP of width 1280 has the weights of the 4 routed experts and the shared one, 256 wide each, that a token meets;
the routers (0.3 % of the active parameters) come on top. What the mixture pays more is sorting rows, products that are
sixteen times smaller, casts of weights that a token does not meet, and their optimizer. Its price is to be at most that
of a dense model of 1 / 0.6 the size: the bar is 0.6 of the dense model's tokens/s.

As in train_step.py each variant lives in a process of its own and they take turns, so that a slow minute of the machine
slows all of them alike. The ratio is that of each turn's pair, and its median over the turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting variants must not spin on the cores of the one that runs

SHAPE = {"n_layers": 6, "d_model": 256, "n_heads": 4, "n_kv_heads": 2, "head_dim": 64, "vocab_size": 4096,
         "context_length": 256, "d_ff": 1280}
EXPERTS = {"n_experts": 16, "experts_per_token": 4, "d_expert": 256, "n_shared_experts": 1, "balance_loss": 0.01}
BAR = 0.6


def build_step(experts: bool, optimizer: str, batch: int, dtype: str, compiled: bool):
    """A step as `nanomai.train` makes it, on random tokens: the router sends them everywhere alike."""
    import torch

    from nanomai.architecture import ModelConfig, MoEConfig
    from nanomai.config import OptimConfig
    from nanomai.model import build_model
    from nanomai.moe import balance_experts
    from nanomai.optim import build_optimizers, set_learning_rate
    from nanomai.parallel.apply import clip_gradients, parallelize

    config = ModelConfig(**SHAPE, moe=MoEConfig(**EXPERTS if experts else {}))
    model = build_model(config)
    model.compute_dtype = getattr(torch, dtype)
    parallelize(model, compile_blocks=compiled)
    optimizers = build_optimizers(model, OptimConfig(name=optimizer), model.compute_dtype)
    set_learning_rate(optimizers, 1e-3)
    shape = (batch, config.context_length)
    ids, targets = torch.randint(0, config.vocab_size, (2, *shape), generator=torch.Generator().manual_seed(0))
    documents = torch.zeros(shape, dtype=torch.int32)

    def step() -> None:
        model(ids, targets, documents, reduction="sum").backward()
        clip_gradients(model, 1.0, targets.numel())
        for optimizer in optimizers:
            optimizer.step()
        balance_experts(model)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)

    return step, config


def work(task: dict, profile: bool) -> None:
    """A variant's process: builds its step, then answers each line on stdin with the seconds of one step."""
    from nanomai.machine import prepare_process

    prepare_process(task.pop("threads"))
    clock = time.process_time if task.pop("cpu_seconds") else time.perf_counter
    step, config = build_step(**task)
    for _ in range(3):
        step()
    if profile:
        import torch

        with torch.profiler.profile() as trace:
            for _ in range(3):
                step()
        print(trace.key_averages().table(sort_by="self_cpu_time_total", row_limit=30, max_name_column_width=60))
        return
    print(json.dumps([config.n_parameters, config.n_active_parameters]), flush=True)
    for _ in sys.stdin:
        start = clock()
        step()
        print(json.dumps(clock() - start), flush=True)


class Variant:
    """The parent's end of a variant's process."""

    def __init__(self, name: str, task: dict):
        self.name, self.seconds = name, []
        self.process = subprocess.Popen([sys.executable, __file__, "--worker", json.dumps(task)], text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.parameters, self.active = self._answer()

    def run(self) -> None:
        print(file=self.process.stdin, flush=True)
        self.seconds.append(self._answer())

    def _answer(self):
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.name}: its process died with status {self.process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def compare(optimizer: str, options: dict, turns: int) -> list[dict]:
    """The dense model and the mixture, taking turns: one row each."""
    dense, sparse = pair = [Variant(name, {"experts": name != "dense", "optimizer": optimizer.lower(), **options})
                            for name in ("dense", "experts")]
    for _ in range(turns):
        for variant in pair:
            variant.run()
    for variant in pair:
        variant.close()
    tokens = options["batch"] * SHAPE["context_length"]
    ratio = statistics.median(d / s for d, s in zip(dense.seconds, sparse.seconds, strict=True))
    return [{"optimizer": optimizer, "variant": v.name, "parameters": v.parameters, "active": v.active,
             "tokens_per_second": tokens / statistics.median(v.seconds), "ratio": r}
            for v, r in zip(pair, (1.0, ratio), strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["Muon", "AdamW"], help="this optimizer alone")
    parser.add_argument("--batch", type=int, default=16, help="sequences of 256 tokens in a step; micro-moe's 16")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu-seconds", action="store_true", help="of all threads, in place of seconds")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--json", help="also write the rows here")
    parser.add_argument("--profile", action="store_true", help="print where the mixture's time goes instead")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return work(json.loads(arguments.worker), profile=False)
    import torch

    from nanomai.machine import describe

    options = {"batch": arguments.batch, "dtype": arguments.dtype, "compiled": not arguments.eager,
               "threads": arguments.threads, "cpu_seconds": arguments.cpu_seconds}
    if arguments.profile:
        return work({"experts": True, "optimizer": (arguments.only or "AdamW").lower(), **options}, profile=True)
    machine = f"{describe(torch.device('cpu'))}; {arguments.threads} threads"
    unit = "tokens per CPU-second" if arguments.cpu_seconds else "tokens/s"
    print(f"{machine}\n\n| optimizer | model | parameters | active | {unit} | x dense |\n" + "|---" * 6 + "|")
    rows = [row for name in ("Muon", "AdamW") if arguments.only in (None, name)
            for row in compare(name, options, arguments.turns)]
    for row in rows:
        print(f"| {row['optimizer']} | {row['variant']} | {row['parameters'] / 1e6:.2f}M | {row['active'] / 1e6:.2f}M "
              f"| {row['tokens_per_second']:,.0f} | {row['ratio']:.2f} |")
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump({"machine": machine, "bar": BAR, "options": options, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
