"""Training speed on one GPU: whole optimizer steps in bfloat16 at T = 1024, each variant in a process of its own.

`train_step.py --device cuda` runs it. A step has 8 micro-batches, whose gradients add up, then clipping and fused
AdamW. `causal` is the model without document ids, as published figures are; `documents` is the model with them, as
`nanomai.train` always gives them. The micro-batch is what should fit 80 GB; where it does not, it is halved, and the
table says so. The 1.5B is GPT-2 XL's 48 layers of 1600, for which others have published figures.

MFU counts 6 N + 12 L d T operations a token, N all parameters, as those publications do: over 989 TFLOP/s, the
dense bfloat16 rate of an H100 SXM, and over the product of 8192^3 that the same process measured first.
"""

from __future__ import annotations

import gc
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout needs no installation

from benchmarks.kernel_cases import of_documents
from benchmarks.machines import machine_of, slug

# name: layers, d_model, query heads, key-value heads, d_ff, vocabulary, sequence length, sequences in a micro-batch
SHAPES = {
    "124M": (12, 768, 12, 12, 2048, 50304, 1024, 16),
    "350M": (24, 1024, 16, 16, 2816, 50304, 1024, 16),
    "1.5B": (48, 1600, 25, 25, 4288, 50304, 1024, 8),
    "tiny": (1, 32, 2, 2, 64, 97, 64, 2),  # for the test of this file
}
VARIANTS = {
    "causal": {"documents": None},
    "documents": {"documents": of_documents(1024)},
    "causal, kernels torch": {"documents": None, "kernels": "torch"},
    "causal, kernels triton": {"documents": None, "kernels": "triton"},
}
# What matters most comes first: time may run out.
RUNS = [("124M", "causal"), ("124M", "documents"),
        *((s, v) for v in ("causal", "documents") for s in ("350M", "1.5B")),
        ("124M", "causal, kernels torch"), ("124M", "causal, kernels triton")]
NOTE = ("`causal` is the model without document ids, as published figures are. `nanomai.train` always gives them: its "
        "own speed is that of `documents`.")
MICRO_BATCHES = 8
H100_PEAK = 989e12
BARS = {"124M": 0.50, "350M": 0.52, "1.5B": 0.59}  # MFU of plain causal attention on an H100


def measure(shape: tuple, options: dict, device: str, seconds: float = 4.0) -> dict:
    """Builds the variant, warms it up, and times steps; halves the micro-batch as long as memory does not hold it."""
    import torch

    from benchmarks.train_step import our_step

    machine = machine_of(device)
    peak, facts = machine.matmul_ceiling(), machine.facts()
    if device == "cuda":
        machine.filler = None
        torch.cuda.empty_cache()
    while True:
        machine.start_peak()
        try:
            step, parameters, _ = our_step(shape, "bfloat16", device == "cuda", device=device,
                                           micro_batches=MICRO_BATCHES, **options)
            for _ in range(2):
                step()
            machine.synchronize()
            break
        except torch.OutOfMemoryError:
            if shape[7] == 1:
                raise
        step = None
        torch._dynamo.reset()  # compiled code holds the model, and the model's hooks hold it in cycles
        gc.collect()
        torch.cuda.empty_cache()
        shape = (*shape[:7], shape[7] // 2)
    times, began = [], time.perf_counter()
    while len(times) < 3 or (time.perf_counter() - began < seconds and len(times) < 20):
        start = time.perf_counter()
        step()
        machine.synchronize()
        times.append(time.perf_counter() - start)
    layers, d, t, batch = shape[0], shape[1], shape[6], shape[7]
    tokens = t * batch * MICRO_BATCHES / statistics.median(times)
    flops, memory = 6 * parameters + 12 * layers * d * t, machine.peak_bytes()
    return {"parameters": parameters, "micro_batch": batch, "steps": len(times), "tokens_per_second": tokens,
            "mfu": tokens * flops / H100_PEAK, "mfu_measured": tokens * flops / peak, "matmul_peak": peak,
            "peak_mib": None if memory is None else memory / 2**20, "facts": facts}


def in_a_process(shape: str, variant: str, seconds: float, device: str = "cuda") -> dict:
    """`measure` where its memory is its own and what goes wrong stays; a row, with its error if there is one."""
    row = {"shape": shape, "variant": variant}
    if seconds <= 0:
        return row | {"error": "skipped: no time left"}
    try:
        done = subprocess.run([sys.executable, __file__, shape, variant, device], text=True, stdout=subprocess.PIPE,
                              timeout=seconds)
    except subprocess.TimeoutExpired:
        return row | {"error": "stopped: no time left"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        return row | {"error": f"its process ended with status {done.returncode}; its last words stand above"}
    return row | json.loads(lines[-1])


def line(row: dict) -> str:
    """A row of the table."""
    if "error" in row:
        return f"| {row['shape']} | {row['variant']} | {row['error']} |" + " |" * 6
    h100 = any(name in row["facts"]["name"] for name in ("H100", "H200"))  # the same rate of products
    bar = BARS.get(row["shape"]) if h100 and row["variant"] == "causal" else None
    verdict = "" if bar is None else "met" if row["mfu"] >= bar else f"missed by {1 - row['mfu'] / bar:.0%}"
    cells = [row["shape"], row["variant"], f"{row['parameters'] / 1e6:.0f}M", str(row["micro_batch"]),
             f"{row['tokens_per_second']:,.0f}", f"{row['mfu']:.1%}" if h100 else "", f"{row['mfu_measured']:.1%}",
             "" if row["peak_mib"] is None else f"{row['peak_mib']:,.0f}",
             "" if bar is None else f"{bar:.0%}: {verdict}"]
    return "| " + " | ".join(cells) + " |"


def write(rows: list[dict], out: Path, partial: bool) -> Path:
    """Markdown, and JSON beside it; part of the runs must not replace the file of all."""
    facts = next((r["facts"] for r in rows if "facts" in r), {"name": "gpu"})
    path = out / f"train_step-{slug(facts['name'])}{'-partial' * partial}.md"
    table = "\n".join(["| shape | variant | parameters | micro-batch | tokens/s | MFU of 989 TFLOP/s | MFU of the "
                       "measured product | peak MiB | bar |", "|---" * 9 + "|", *map(line, rows)])
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(f"# Training steps on one GPU\n\n{'; '.join(f'{k} {v}' for k, v in facts.items())}\n\n{NOTE}\n\n"
                    f"{table}\n", encoding="utf-8")
    path.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return path


def run(only: str, variants: list[str], seconds: float, out: Path, device: str = "cuda") -> int:
    """All of RUNS that are asked for; 1 if something went wrong."""
    import torch

    chosen = [(s, v) for s, v in RUNS if s.startswith(only) and any(part in v for part in variants)]
    if not chosen:
        print("no run is asked for; there are: " + "; ".join(map(" ".join, RUNS)), file=sys.stderr)
        return 1
    if device == "cuda" and not torch.cuda.is_available():
        print("no CUDA GPU here", file=sys.stderr)
        return 1
    deadline, rows = time.monotonic() + seconds, []
    for shape, variant in chosen:
        rows.append(in_a_process(shape, variant, deadline - time.monotonic(), device))
        path = write(rows, out, chosen != RUNS)
        print(line(rows[-1]), flush=True)
    failed = [f"{r['shape']} {r['variant']}: {r['error']}" for r in rows if "error" in r]
    print(f"wrote {path} and .json; {len(failed)} failed" + "".join(f"\n  {text}" for text in failed))
    return 1 if failed else 0


if __name__ == "__main__":
    name, of, where = sys.argv[1:]
    print(json.dumps(measure(SHAPES[name], VARIANTS[of], where)))
