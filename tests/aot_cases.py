"""What is compiled ahead of time: the launchers of every kernel, at the shapes of three models.

A family is a function of the target that yields (name, launcher, arguments), the tensors on the meta device. A new
kernel gets its own below and a place in FAMILIES; `python tools/aot.py` then adds what it became to the snapshot.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import triton

from triton_kernels import (
    adamw,
    aot,
    cross_entropy,
    flash_attention,
    linear_cross_entropy,
    qk_norm_rope,
    rms_norm,
    swiglu,
)

TOKENS, LENGTH, EPS = 16_384, 1024, 1e-6
# name -> width, query heads, key heads, width of a head, width of the feed-forward block, size of the vocabulary
MODELS = {
    "124M": (768, 12, 12, 64, 3072, 50_304),
    "1.5B": (2048, 16, 16, 128, 5632, 50_304),
    "8B": (4096, 32, 8, 128, 14_336, 128_256),
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
Cases = Iterator[tuple[str, Callable, tuple]]


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Shape without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def rms_norms(_target: str) -> Cases:
    for name, dtype, with_residual in (("124M", "bf16", True), ("1.5B", "bf16", True), ("8B", "bf16", True),
                                       ("8B", "bf16", False), ("8B", "fp32", True)):
        width = MODELS[name][0]
        x, weight, rstd = meta(TOKENS, width, dtype=DTYPES[dtype]), meta(width, dtype=DTYPES[dtype]), meta(TOKENS)
        case, other = (f"{name} {dtype} residual", x) if with_residual else (f"{name} {dtype}", None)
        yield case, rms_norm.forward, (x, other, weight, EPS)
        yield case, rms_norm.backward, (x, other, x, weight, rstd)


def cross_entropies(_target: str) -> Cases:
    D, *_, V = MODELS["124M"]
    targets, lse, d_loss = meta(TOKENS, dtype=torch.int64), meta(TOKENS), meta()
    for dtype in DTYPES:
        logits = meta(TOKENS, V, dtype=DTYPES[dtype])
        yield dtype, cross_entropy.forward, (logits, targets)
        yield dtype, cross_entropy.backward, (logits, targets, lse, d_loss)
    chunk = 4096  # tokens; all chunks are one binary
    hidden, weight = (meta(n, D, dtype=torch.bfloat16) for n in (chunk, V))
    yield "linear bf16", linear_cross_entropy.forward, (hidden, weight, targets[:chunk], None, True)
    yield "linear bf16 bias", linear_cross_entropy.forward, (hidden, weight, targets[:chunk], meta(V), True)


def swiglus(_target: str) -> Cases:
    for dtype in DTYPES:
        x = meta(TOKENS, MODELS["1.5B"][4], dtype=DTYPES[dtype])
        yield dtype, swiglu.forward, (x, x)
        yield dtype, swiglu.backward, (x, x, x)


def qk_norm_ropes(_target: str) -> Cases:
    for name in ("124M", "8B"):
        _, H, G, K, *_ = MODELS[name]
        q, k = (meta(TOKENS // LENGTH, LENGTH, h, K, dtype=torch.bfloat16).transpose(1, 2) for h in (H, G))
        tables, weights = (meta(LENGTH, K // 2),) * 2, (meta(K, dtype=torch.bfloat16),) * 2
        yield f"{name} bf16", qk_norm_rope.forward, (q, k, *tables, *weights, EPS)
        yield f"{name} bf16", qk_norm_rope.backward, (q, k, q, k, *tables, *weights, EPS)
        yield f"{name} bf16 rope", qk_norm_rope.forward, (q, k, *tables, None, None, EPS)
        yield f"{name} bf16 rope", qk_norm_rope.backward, (q, k, None, None, *tables, None, None, EPS)


def flash_attentions(target: str) -> Cases:
    for name, dtype in (("124M", "bf16"), ("8B", "bf16"), ("124M", "fp32"), ("8B", "fp32")):
        _, H, G, K, *_ = MODELS[name]
        q, k, v = (meta(4, 4096, h, K, dtype=DTYPES[dtype]).transpose(1, 2) for h in (H, G, G))
        for mask, window, reach in (("", None, None), (" window", 1024, None),
                                    (" documents", None, meta(4, 2, 4096, dtype=torch.int32)),
                                    (" window documents", 1024, meta(4, 2, 4096, dtype=torch.int32))):
            if dtype == "bf16" or not mask:
                rest = reach, window, K ** -0.5, target
                yield f"{name} {dtype}{mask}", flash_attention.forward, (q, k, v, *rest)
                yield f"{name} {dtype}{mask}", flash_attention.backward, (q, q, k, v, q, meta(4, H, 4096), *rest)


def adamws(_target: str) -> Cases:
    for dtype in DTYPES:
        p, m = meta(50_304, 768, dtype=DTYPES[dtype]), meta(50_304, 768)
        yield dtype, adamw.update, (p, p, m, m, 1, 1e-3, 0.9, 0.95, 1e-8, 0.1, 0)


FAMILIES = [rms_norms, cross_entropies, swiglus, qk_norm_ropes, flash_attentions, adamws]

# --- The snapshot: a file for each version of Triton, a line for each binary -----------------------------------------


def launches(target: str, families: list[Callable[[str], Cases]] = FAMILIES) -> dict[str, tuple]:
    """Name of a line of the snapshot -> (kernel, arguments, meta)."""
    found = {}
    for family in families:
        for case, launcher, args in family(target):
            for kernel, *rest in aot.launches(launcher, *args):
                name = f"{target} {kernel.name} {case}"
                assert name not in found, f"{family.__name__}: two launches are called {name!r}"
                found[name] = kernel, *rest
    return found


def fingerprint(target: str, launch: tuple) -> str:
    kernel, args, meta = launch
    return aot.fingerprint(kernel, target, *args, **meta)


def line(target: str, launch: tuple) -> tuple[dict, list[str]]:
    """Compiles: (a line of the snapshot, the limits that are broken)."""
    kernel, args, meta = launch
    binary = aot.compile_kernel(kernel, target, *args, **meta)
    numbers = "registers", "spilled", "shared", "tensor_memory", "loads", "wide_loads"
    line = {"fingerprint": fingerprint(target, launch)} | {name: getattr(binary, name) for name in numbers}
    return line | binary.tensor_core, binary.faults()


def snapshot_file() -> Path:
    return Path(__file__).parent / "aot_snapshots" / f"triton-{triton.__version__}.json"


def read_snapshot() -> dict[str, dict]:
    """Name -> line; empty where this version of Triton has none."""
    return json.loads(snapshot_file().read_text()) if snapshot_file().exists() else {}


def write_snapshot(lines: dict[str, dict | None]) -> None:
    """Without what is None: not compiled yet."""
    snapshot_file().parent.mkdir(exist_ok=True)
    text = ",\n".join(f"{json.dumps(name)}: {json.dumps(line)}" for name, line in lines.items() if line)
    snapshot_file().write_text(f"{{\n{text}\n}}\n")
