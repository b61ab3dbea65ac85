"""Sampling speed at batch 1: tokens per CPU-second, with one thread, side by side in one run.

    python benchmarks/generate.py                     # 10M and 124M, fp32 and bf16 weights
    python benchmarks/generate.py --peer ../nanoGPT   # beside a nanoGPT checkout of yours (it has no cache)

CPU-seconds, not wall seconds: one thread is measured, and what else the machine does must not count. Decoding reads
every weight once a token, so bytes of weights over the copy bandwidth is the floor that each row is held against.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time

import torch

from nanomai.config import ModelConfig
from nanomai.machine import describe, prepare_process
from nanomai.model import build_model
from nanomai.sampling import generate

SHAPES = {
    "10M": {"n_layers": 6, "d_model": 384, "n_heads": 6, "n_kv_heads": 6, "head_dim": 64, "d_ff": 1024,
            "vocab_size": 65, "context_length": 256},
    "124M": {"n_layers": 12, "d_model": 768, "n_heads": 12, "n_kv_heads": 12, "head_dim": 64, "d_ff": 2048,
             "vocab_size": 50304, "context_length": 1024},
}
PROMPT = [1] * 8


def ours(shape: dict, dtype: torch.dtype):
    model = build_model(ModelConfig(**shape)).to(dtype)
    model.compute_dtype = dtype
    return lambda n: generate(model, PROMPT, max_tokens=n, temperature=0.8, top_k=50, seed=0)


def nanogpt(shape: dict):
    from model import GPT, GPTConfig

    with contextlib.redirect_stdout(sys.stderr):
        config = GPTConfig(block_size=shape["context_length"], vocab_size=shape["vocab_size"], dropout=0.0, bias=False,
                           n_layer=shape["n_layers"], n_head=shape["n_heads"], n_embd=shape["d_model"])
        model = GPT(config).eval()
    ids = torch.tensor([PROMPT])
    return lambda n: model.generate(ids, n, temperature=0.8, top_k=50)


def read_bandwidth() -> float:
    """Bytes read a second by one thread, from memory."""
    a = torch.ones(2**26)
    a.sum()
    start = time.process_time()
    a.sum()
    return 4 * a.numel() / (time.process_time() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="a checkout of nanoGPT to measure beside")
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--json", help="also write the rows here")
    arguments = parser.parse_args()
    prepare_process(threads=1)
    if arguments.peer:
        sys.path.insert(0, arguments.peer)
    machine = f"{describe(torch.device('cpu'))}; 1 thread"
    print(f"{machine}\n\n| shape | variant | tokens per CPU-second | share of the memory floor |\n|---|---|---|---|")
    rows = []
    for name, shape in SHAPES.items():
        variants = {"nanomai fp32": (ours(shape, torch.float32), 4), "nanomai bf16": (ours(shape, torch.bfloat16), 2)}
        if arguments.peer:
            variants["nanoGPT (no cache)"] = (nanogpt(shape), 4)
        speeds, bandwidths = {v: [] for v in variants}, []
        for _ in range(arguments.turns):
            bandwidths.append(read_bandwidth())
            for variant, (run, _) in variants.items():
                start = time.process_time()
                run(arguments.tokens)
                speeds[variant].append(arguments.tokens / (time.process_time() - start))
        for variant, (_, width) in variants.items():
            speed = statistics.median(speeds[variant])
            floor = statistics.median(bandwidths) / (width * ModelConfig(**shape).n_parameters)
            rows.append({"shape": name, "variant": variant, "tokens_per_cpu_second": speed,
                         "share_of_floor": speed / floor})
            print(f"| {name} | {variant} | {speed:.1f} | {speed / floor:.0%} |", flush=True)
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump({"machine": machine, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
