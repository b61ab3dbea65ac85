"""What is compiled ahead of time: the launchers of every kernel, at the shapes of three models.

A family is a function of the target that yields (name, launcher, arguments), the tensors on the meta device. A new
kernel gets its own below and a place in FAMILIES; `python tools/aot.py` then adds what it became to the snapshot.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import triton

from triton_kernels import (
    adamw,
    aot,
    cross_entropy,
    flash_attention,
    grouped_gemm,
    lessons,
    linear_cross_entropy,
    matmul,
    qk_norm_rope,
    rms_norm,
    swiglu,
    weight_only,
)

TOKENS, LENGTH, EPS = 16_384, 1024, 1e-6
# name -> width, query heads, key heads, width of a head, width of the feed-forward block, size of the vocabulary
MODELS = {
    "124M": (768, 12, 12, 64, 3072, 50_304),
    "1.5B": (2048, 16, 16, 128, 5632, 50_304),
    "8B": (4096, 32, 8, 128, 14_336, 128_256),
}
# name -> width, width of an expert, experts, how many of them a token goes to
MIXTURES = {"8 experts": (4096, 14_336, 8, 2), "64 experts": (2048, 1024, 64, 8)}
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
    yield "8B bf16 rope", qk_norm_rope.forward, (q, k, *tables, None, None, EPS)
    yield "8B bf16 rope", qk_norm_rope.backward, (q, k, None, None, *tables, None, None, EPS)


def flash_attentions(target: str) -> Cases:
    for name, dtype in (("124M", "bf16"), ("8B", "bf16"), ("124M", "fp32")):
        _, H, G, K, *_ = MODELS[name]
        q, k, v = (meta(4, 4096, h, K, dtype=DTYPES[dtype]).transpose(1, 2) for h in (H, G, G))
        documents = meta(4, 2, 4096, dtype=torch.int32)  # without a window: the same loop with a mask less, no case
        for mask, window, reach in (("", None, None), (" window", 1024, None), (" window documents", 1024, documents)):
            if dtype == "bf16" or not mask:
                rest = reach, window, K ** -0.5, target
                yield f"{name} {dtype}{mask}", flash_attention.forward, (q, k, v, *rest)
                yield f"{name} {dtype}{mask}", flash_attention.backward, (q, q, k, v, q, meta(4, H, 4096), *rest)


def adamws(_target: str) -> Cases:
    for dtype in DTYPES:
        p, m = meta(50_304, 768, dtype=DTYPES[dtype]), meta(50_304, 768)
        yield dtype, adamw.update, (p, p, m, m, 1, 1e-3, 0.9, 0.95, 1e-8, 0.1, 0)


def grouped_gemms(target: str) -> Cases:
    for name, (D, F, E, k) in MIXTURES.items():
        x, rows, inner = (meta(*shape, dtype=torch.bfloat16)
                          for shape in ((TOKENS, D), (TOKENS * k, D), (TOKENS * k, F)))
        w, down = meta(E, F, D, dtype=torch.bfloat16), meta(E, D, F, dtype=torch.bfloat16)
        ends, index = meta(E, dtype=torch.int32), meta(TOKENS * k, dtype=torch.int64)
        yield f"{name} swiglu", grouped_gemm.swiglu_forward, (x, w, w, ends, index, True, target)
        yield (f"{name} swiglu backward", grouped_gemm.swiglu_backward,
               (inner, x, w, w, inner, inner, ends, index, target))
        if name == "8 experts":  # how many there are hardly changes a plain product
            yield f"{name} linear", grouped_gemm.linear_forward, (inner, down, ends, target)
            yield f"{name} linear backward", grouped_gemm.linear_backward, (rows, inner, down, ends, target)


def weight_onlys(target: str) -> Cases:
    for rows in 1, 8, 16:
        D = F = MODELS["8B"][0]
        x, q = meta(rows, D, dtype=torch.bfloat16), meta(F, D, dtype=torch.int8)
        packed, scales = meta(F, D // 2, dtype=torch.uint8), meta(F, D // 128, dtype=torch.bfloat16)
        yield f"{rows} rows", weight_only.int8_launch, (x, q, meta(F), target)
        yield f"{rows} rows", weight_only.int4_launch, (x, packed, scales, target)


def the_lessons(target: str) -> Cases:
    x, w = (meta(*shape, dtype=torch.bfloat16) for shape in ((TOKENS, 4096), (4096, 4096)))
    yield "4096 bf16", lessons.add, (x, x)
    yield "4096 bf16", lessons.softmax, (x,)
    if target == "sm_90":  # the tile of the lesson is for this target alone
        yield "bf16", matmul.multiply, (x, w)
        yield "bf16 backward", matmul.multiply, (x, w.T)


FAMILIES = [rms_norms, cross_entropies, swiglus, qk_norm_ropes, flash_attentions, adamws, grouped_gemms, weight_onlys,
            the_lessons]

# --- The snapshot: a file for each version of Triton, a line for each binary -----------------------------------------


def snapshot_file() -> Path:
    return Path(__file__).parent / "aot_snapshots" / f"triton-{triton.__version__}.json"


RENEW = f"to renew {snapshot_file().name}: python tools/aot.py"


def launches(target: str, families: list[Callable[[str], Cases]] = FAMILIES) -> dict[str, tuple]:
    """Name of a line of the snapshot -> (kernel, arguments, meta). Of launches of one binary, the family's first."""
    found = {}
    for family in families:
        binaries = set()
        for case, launcher, args in family(target):
            for launch in aot.launches(launcher, *args):
                name, binary = f"{target} {launch[0].name} {case}", fingerprint(target, launch)
                if binary not in binaries:
                    assert name not in found, f"{family.__name__}: two binaries are called {name!r}"
                    binaries.add(binary)
                    found[name] = launch
    return found


def fingerprint(target: str, launch: tuple) -> str:
    kernel, args, meta = launch
    return aot.fingerprint(kernel, target, *args, **meta)


NUMBERS = "registers", "spilled", "shared", "tensor_memory", "loads", "wide_loads"


def line(target: str, launch: tuple) -> dict:
    """Compiles: a line of the snapshot."""
    kernel, args, meta = launch
    binary = aot.compile_kernel(kernel, target, *args, **meta)
    return ({"fingerprint": fingerprint(target, launch)} | {name: getattr(binary, name) for name in NUMBERS}
            | binary.tensor_core)


def faults(lines: dict[str, dict]) -> list[str]:
    """The limits that these lines of a snapshot break."""
    found = []
    for name, line in lines.items():
        target, kernel = name.split()[:2]
        binary = aot.Binary(kernel, target, tensor_core={}, assembly="", ptx="", **{n: line[n] for n in NUMBERS})
        found += [f"{name}: {fault}" for fault in binary.faults()]
    return found


def differences(target: str, family: Callable[[str], Cases]) -> list[str]:
    """Compiles the family: a line for each broken limit, and for each binary that is not as in the snapshot."""
    snapshot, found = read_snapshot(), []
    for name, launch in launches(target, [family]).items():
        now = line(target, launch)
        found += faults({name: now})
        if snapshot and now != snapshot.get(name):
            found.append(f"{name}: {now}, in the snapshot {snapshot.get(name)}; {RENEW}")
    return found


def read_snapshot() -> dict[str, dict]:
    """Name -> line; empty where this version of Triton has none."""
    return json.loads(snapshot_file().read_text()) if snapshot_file().exists() else {}


def write_snapshot(lines: dict[str, dict | None]) -> None:
    """Without what is None: not compiled yet. All of the file or nothing: whoever interrupts it keeps the old one."""
    snapshot_file().parent.mkdir(exist_ok=True)
    text = ",\n".join(f"{json.dumps(name)}: {json.dumps(line)}" for name, line in lines.items() if line)
    beside = snapshot_file().with_suffix(".new")
    beside.write_text(f"{{\n{text}\n}}\n")
    os.replace(beside, snapshot_file())
