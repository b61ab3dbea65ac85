"""Every kernel beside what it has to beat: one table for tests/test_gpu.py and for kernels.py.

A case is an operation at one shape: its inputs, the plain definition (eager), what the library has for it, ours, and
the work that nobody can avoid, in bytes for what waits for memory and in operations for what waits for the matrix
units. Letters: B batch, T sequence, N tokens, D width, H query heads, G key heads, K head width, F hidden width of the
MLP, V vocabulary, E experts; e bytes of a number.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nanomai import ops
from triton_kernels import adamw as adamw_kernel
from triton_kernels import cross_entropy as cross_entropy_kernel
from triton_kernels import flash_attention, flash_tiles, grouped_gemm, grouped_tiles, qk_norm_rope
from triton_kernels import linear_cross_entropy as linear_cross_entropy_kernel
from triton_kernels import rms_norm as rms_norm_kernel
from triton_kernels import swiglu as swiglu_kernel
from triton_kernels import weight_only as weight_only_kernel

EPS = 1e-5
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Case:
    """One operation at one shape. `make(dtype)` gives the inputs on torch's default device; those with a gradient ask
    for it. `work`: bytes or operations of forward and of backward at 2 bytes a number; backward None has none."""

    kernel: str
    shape: str
    make: Callable[[torch.dtype], tuple]
    eager: Callable
    ours: Callable
    unit: str  # "bytes" or "operations"
    work: tuple[float, float | None]
    libraries: dict[str, Callable] = field(default_factory=dict)
    dtypes: tuple[torch.dtype, ...] = FLOATS  # those in which `eager` and `ours` should agree

    @property
    def name(self) -> str:
        """As the command line and the test ids have it."""
        return f"{self.kernel}@{self.shape}"


def values(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """Normal numbers that ask for a gradient."""
    return (torch.randn(shape) * scale).to(dtype).requires_grad_()


# --- Kernels that wait for memory -------------------------------------------------------------------------------------


def add_rms_norm(shape: str, N: int, D: int) -> Case:
    """The residual sum and its norm."""
    def eager(x, residual, weight):
        s = x + residual
        return s, ops.rms_norm(s, weight, EPS)

    def library(x, residual, weight):
        s = x + residual
        return s, F.rms_norm(s, weight.shape, weight.to(s.dtype), EPS)

    return Case("add_rms_norm", shape, lambda dtype: (values(N, D, dtype=dtype), values(N, D, dtype=dtype), values(D)),
                eager, lambda x, residual, weight: rms_norm_kernel.add_rms_norm(x, residual, weight, EPS),
                "bytes", (8 * N * D + 4 * N, 8 * N * D + 4 * N), {"F.rms_norm": library})


def swiglu(shape: str, N: int, F_: int) -> Case:
    """silu(gate) * up"""
    return Case("swiglu", shape, lambda dtype: (values(N, F_, dtype=dtype), values(N, F_, dtype=dtype)),
                lambda gate, up: F.silu(gate) * up, swiglu_kernel.swiglu, "bytes", (6 * N * F_, 10 * N * F_))


def qk_norm_rope_(shape: str, B: int, T: int, H: int, G: int, K: int) -> Case:
    """Norms and rotations of queries and keys, which lie in memory as a projection writes them."""
    def make(dtype):
        q, k = (values(B, T, heads, K, dtype=dtype).detach().transpose(1, 2).requires_grad_() for heads in (H, G))
        return q, k, *ops.rotary_table(torch.arange(T), K, 10_000.0), values(K), values(K)

    def eager(q, k, cos, sin, q_weight, k_weight):
        wide = torch.promote_types(q.dtype, torch.float32)  # tables in float64 where the truth is asked for
        turned = (ops.rotary(ops.rms_norm(x, w, EPS), cos.to(wide), sin.to(wide))
                  for x, w in ((q, q_weight), (k, k_weight)))
        return tuple(turned)

    X, N = B * T * (H + G) * K, B * T
    return Case("qk_norm_rope", shape, make, eager, lambda *inputs: qk_norm_rope.qk_norm_rope(*inputs, EPS),
                "bytes", (4 * X + 4 * N * K, 6 * X + 4 * N * K))


def targets_of(N: int, V: int) -> Tensor:
    """Classes, some of them without a loss."""
    targets = torch.randint(0, V, (N,))
    targets[::7] = ops.IGNORE
    return targets


def cross_entropy(shape: str, N: int, V: int) -> Case:
    """The loss of logits that are there."""
    def eager(logits, targets):
        wide = torch.promote_types(logits.dtype, torch.float32)
        return F.cross_entropy(logits.to(wide), targets, ignore_index=ops.IGNORE, reduction="sum")

    rows = N - len(range(0, N, 7))  # an ignored row is not read; its gradient is written
    return Case("cross_entropy", shape, lambda dtype: (values(N, V, dtype=dtype), targets_of(N, V)), eager,
                cross_entropy_kernel.cross_entropy, "bytes",
                (2 * rows * V + 16 * N, 2 * (rows + N) * V + 12 * N))


HYPER = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}


class FusedAdamW:
    """torch's fused AdamW on float32 parameters, as nanomai.optim has it: 28 bytes a parameter, not 22."""

    optimizer = None

    def __call__(self, p, g, m, v) -> None:
        if self.optimizer is None:
            parameter = torch.nn.Parameter(p.float())
            parameter.grad = g.float()
            self.optimizer = torch.optim.AdamW([parameter], lr=HYPER["lr"], fused=True, eps=HYPER["eps"],
                                               betas=(HYPER["beta1"], HYPER["beta2"]))
        self.optimizer.step()


def adamw(shape: str, N: int) -> Case:
    """A step in place. In bfloat16 ours rounds by chance, so eager and ours agree in float32 only."""
    def make(dtype):
        return tuple(values(N, dtype=d).detach().abs() for d in (dtype, dtype, torch.float32, torch.float32))

    def eager(p, g, m, v):
        wide = m.dtype
        g = g.to(wide)
        m.add_((1 - HYPER["beta1"]) * (g - m))
        v.add_((1 - HYPER["beta2"]) * (g * g - v))
        update = (m / (1 - HYPER["beta1"])) / (torch.sqrt(v / (1 - HYPER["beta2"])) + HYPER["eps"])
        p.copy_(p.to(wide) * (1 - HYPER["lr"] * HYPER["weight_decay"]) - HYPER["lr"] * update)
        return p, m, v

    def ours(p, g, m, v):
        adamw_kernel.adamw(p, g, m, v, step=1, seed=7, **HYPER)
        return p, m, v

    return Case("adamw", shape, make, eager, ours, "bytes", (22 * N, None), {"fused AdamW, fp32": FusedAdamW()},
                (torch.float32,))


# --- Kernels that wait for the matrix units ---------------------------------------------------------------------------


def linear_cross_entropy(shape: str, N: int, D: int, V: int) -> Case:
    """The head and the loss. Ours makes the gradients during forward: `both` is what to compare."""
    def eager(hidden, weight, targets):
        logits = F.linear(hidden, weight.to(hidden.dtype))
        wide = torch.promote_types(hidden.dtype, torch.float32)
        return F.cross_entropy(logits.to(wide), targets, ignore_index=ops.IGNORE, reduction="sum")

    def library(hidden, weight, targets):
        return F.linear_cross_entropy(hidden, weight.to(hidden.dtype), targets, reduction="sum",
                                      ignore_index=ops.IGNORE)

    def make(dtype):
        return values(N, D, dtype=dtype), values(V, D, scale=D ** -0.5), targets_of(N, V)

    return Case("linear_cross_entropy", shape, make, eager, linear_cross_entropy_kernel.linear_cross_entropy,
                "operations", (2 * N * V * D, 4 * N * V * D),
                {"F.linear_cross_entropy": library} if hasattr(F, "linear_cross_entropy") else {})


def sdpa(*backends: SDPBackend) -> Callable:
    """torch's attention, causal, by one of these backends."""
    def attention(q, k, v):
        with sdpa_kernel(list(backends) if q.is_cuda else [SDPBackend.MATH]):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])

    return attention


def varlen(ends: Tensor, longest: int) -> Callable:
    """torch's FlashAttention over documents of one row after another; `ends` (documents + 1,) int32, from 0 on."""
    on = functools.cache(ends.to)  # a copy to the GPU makes the host wait: once, not in every call that is timed

    def attention(q, k, v, _ids):
        from torch.nn.attention.varlen import varlen_attn

        grouped = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
        rows = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]  # (B T, heads, K)
        y = varlen_attn(*rows, *2 * (on(q.device),), *2 * (longest,), window_size=(-1, 0), **grouped)
        return y.unflatten(0, (q.shape[0], q.shape[2])).transpose(1, 2)

    return attention


def attention(shape: str, B: int, T: int, H: int, G: int, K: int, window: int | None = None,
              documents: tuple[int, ...] | None = None) -> Case:
    """Causal attention, plainly, in a window, or in documents of these lengths in each row."""
    def make(dtype):
        q, k, v = (values(B, T, heads, K, dtype=dtype).detach().transpose(1, 2).requires_grad_() for heads in (H, G, G))
        if documents is None:
            return q, k, v
        return q, k, v, torch.arange(len(documents)).repeat_interleave(torch.tensor(documents)).expand(B, T)

    def eager(q, k, v, ids=None):
        positions = torch.arange(T, device=q.device)
        return ops.attention_plain(q, k, v, ops.attention_mask(positions, positions, window, ids, ids))

    def ours(q, k, v, ids=None):
        return flash_attention.flash_attention(q, k, v, window, ids)

    lengths, reach = documents or (T,), window or T
    pairs = sum(n * (n + 1) // 2 - max(0, n - reach) * (n - reach + 1) // 2 for n in lengths)
    libraries = {"cuDNN": sdpa(SDPBackend.CUDNN_ATTENTION), "FlashAttention": sdpa(SDPBackend.FLASH_ATTENTION)}
    if documents:
        ends = torch.tensor((0, *lengths * B), device="cpu").cumsum(0).int()
        libraries = {"varlen_attn": varlen(ends, max(lengths))}
    kind = "attention_documents" if documents else "attention_window" if window else "attention"
    flops = 4 * B * H * K * pairs
    return Case(kind, shape, make, eager, ours, "operations", (flops, 2.5 * flops), {} if window else libraries)


def routing(N: int, E: int, k: int) -> tuple[Tensor, list[int]]:
    """k experts for each of N tokens, drawn alike each time: the tokens of the sorted pairs, and where experts end."""
    experts = torch.rand(N, E, generator=torch.Generator("cpu").manual_seed(0), device="cpu").topk(k).indices.flatten()
    ends = experts.bincount(minlength=E).cumsum(0)
    return experts.argsort(stable=True) // k, ends.tolist()


def by_expert(rows: Tensor, stops: list[int]) -> list[Tensor]:
    """The rows of each expert. `stops` is on the host: a loop that asked the GPU would wait for it."""
    return [rows[start:stop] for start, stop in zip([0, *stops], stops, strict=False)]


def grouped_linear(shape: str, N: int, D: int, F_: int, E: int, k: int) -> Case:
    """The product of each expert with its rows."""
    _, stops = routing(N, E, k)

    def make(dtype):
        ends = torch.tensor(stops, dtype=torch.int32)
        return values(N * k, D, dtype=dtype), values(E, F_, D, dtype=dtype, scale=D ** -0.5), ends

    def eager(x, weight, ends):
        return torch.cat([rows @ w.T for rows, w in zip(by_expert(x, stops), weight, strict=True)])

    flops = 2 * N * k * D * F_
    return Case("grouped_linear", shape, make, eager, grouped_gemm.grouped_linear, "operations", (flops, 2 * flops),
                {"F.grouped_mm": lambda x, weight, ends: F.grouped_mm(x, weight.mT, offs=ends)})


def grouped_swiglu(shape: str, N: int, D: int, F_: int, E: int, k: int) -> Case:
    """Gather, two products and SwiGLU of the experts that each token was sent to."""
    tokens, stops = routing(N, E, k)

    def make(dtype):
        ends = torch.tensor(stops, dtype=torch.int32)
        w_gate, w_up = (values(E, F_, D, dtype=dtype, scale=D ** -0.5) for _ in range(2))
        return values(N, D, dtype=dtype), w_gate, w_up, ends, tokens.to(ends.device)

    def eager(x, w_gate, w_up, ends, index):
        rows = by_expert(x[index], stops)
        return torch.cat([F.silu(r @ g.T) * (r @ u.T) for r, g, u in zip(rows, w_gate, w_up, strict=True)])

    def library(x, w_gate, w_up, ends, index):
        rows = x[index]
        return F.silu(F.grouped_mm(rows, w_gate.mT, offs=ends)) * F.grouped_mm(rows, w_up.mT, offs=ends)

    flops = 4 * N * k * D * F_
    return Case("grouped_swiglu", shape, make, eager, grouped_gemm.grouped_swiglu, "operations", (flops, 2 * flops),
                {"F.grouped_mm": library})


class RoundedLinear:
    """A linear layer in the dtype of its input, made once of what a quantised one holds."""

    weight = None

    def __init__(self, dequantize: Callable):
        self.dequantize = dequantize

    def __call__(self, x, quantized, scale) -> Tensor:
        if self.weight is None or self.weight.device != x.device:
            self.weight = self.dequantize(quantized, scale).to(x.dtype)
        return F.linear(x, self.weight)


def weight_only(bits: int, shape: str, M: int, D: int, F_: int) -> Case:
    """A linear layer of int8 or int4 weights for M rows. Its gradient is a product of the library's, not timed here."""
    quantize, dequantize = ((weight_only_kernel.quantize_int8, weight_only_kernel.dequantize_int8) if bits == 8 else
                            (weight_only_kernel.quantize_int4, weight_only_kernel.dequantize_int4))

    def make(dtype):
        return values(M, D, dtype=dtype), *quantize(torch.randn(F_, D))

    scales = 4 * F_ if bits == 8 else 2 * F_ * D // 128
    return Case(f"int{bits}_linear", shape, make, lambda x, q, scale: x @ dequantize(q, scale).to(x.dtype).T,
                weight_only_kernel.int8_linear if bits == 8 else weight_only_kernel.int4_linear,
                "bytes", (F_ * D * bits // 8 + scales + 2 * M * (D + F_), None),
                {"bfloat16 linear": RoundedLinear(dequantize)})


# --- The shapes -------------------------------------------------------------------------------------------------------

# tokens, T, D, H, G, K, F, V
MODELS = {
    "124M": (16_384, 1024, 768, 12, 12, 64, 2048, 50_304),
    "1.5B": (16_384, 4096, 2048, 16, 16, 128, 5632, 50_304),
    "Llama-3-8B": (8192, 4096, 4096, 32, 8, 128, 14_336, 128_256),
}
EXPERTS = {"Mixtral": (4096, 4096, 14_336, 8, 2), "fine-grained": (16_384, 2048, 1024, 64, 6)}  # N, D, F, E, k
MATRICES = ((4096, 4096), (4096, 14_336), (14_336, 4096))  # D and F of Llama-3-8B's
PARAMETERS = {"124M": 124_000_000, "1.5B": 1_500_000_000, "Llama-3-8B": 218_112_000}  # of the last: those of a block


def of_documents(T: int) -> tuple[int, ...]:
    """A row of T tokens in documents, long and short, whose ends lie anywhere."""
    lengths = [T // 2 + 5, T // 3 - 7, T // 30 + 1]
    return (*lengths, T - sum(lengths))


def of_a_model(shape: str, N: int, T: int, D: int, H: int, G: int, K: int, F_: int, V: int) -> list[Case]:
    """The operations of a Transformer at one shape."""
    B = N // T
    return [add_rms_norm(shape, N, D), swiglu(shape, N, F_), qk_norm_rope_(shape, B, T, H, G, K),
            cross_entropy(shape, N, V), linear_cross_entropy(shape, N, D, V), attention(shape, B, T, H, G, K),
            attention(shape, B, T, H, G, K, documents=of_documents(T)),
            attention(shape, B, T, H, G, K, window=T // 4 + 3)]


def measured() -> list[Case]:
    """What kernels.py measures, what matters most first."""
    models = [of_a_model(shape, *sizes) for shape, sizes in MODELS.items()]
    cases = [case for same in zip(*models, strict=True) for case in same if case.kernel != "attention_window"]
    cases += [case(shape, *sizes) for shape, sizes in EXPERTS.items() for case in (grouped_swiglu, grouped_linear)]
    cases += [weight_only(bits, f"M{M} {D}x{F_}", M, D, F_) for bits in (4, 8) for D, F_ in MATRICES
              for M in (1, 4, 8, 16)]
    return cases + [adamw(shape, n) for shape, n in PARAMETERS.items()]


def tiny() -> list[Case]:
    """Everything once at sizes for the interpreter; uneven on purpose."""
    experts, matrix = (19, 24, 40, 3, 2), (5, 256, 33)
    return [*of_a_model("tiny", 2 * 40, 40, 24, 4, 2, 16, 33, 97), adamw("tiny", 1000),
            grouped_linear("tiny", *experts), grouped_swiglu("tiny", *experts),
            weight_only(8, "tiny", *matrix), weight_only(4, "tiny", *matrix)]


def ragged() -> list[Case]:
    """For a GPU, tests only: 1, primes, powers of two plus and minus 1, and both widths of the tile tables."""
    cases = [*of_a_model("ones", 1, 1, 1, 1, 1, 2, 1, 1)[1:5], adamw("ones", 1)]
    for shape, N, wide in (("prime", 1009, 1021), ("minus", 255, 2047), ("plus", 257, 4097)):
        cases += [add_rms_norm(shape, N, wide), swiglu(shape, N, wide), cross_entropy(shape, N, 12 * wide),
                  linear_cross_entropy(shape, N, 129, wide), adamw(shape, N * wide)]
    for K in (24, 64, 96, 128):
        for T in (127, 513):
            masks = ({}, {"window": 100}, {"documents": of_documents(T)})
            cases += [attention(f"T{T} K{K}", 2, T, 4, 2, K, **mask) for mask in masks]
        cases.append(qk_norm_rope_(f"K{K}", 2, 131, 6, 3, K))
    for experts in ((257, 130, 67, 5, 3), (511, 256, 192, 16, 2), (3, 64, 48, 8, 1)):
        cases += [case("x".join(map(str, experts)), *experts) for case in (grouped_linear, grouped_swiglu)]
    cases += [weight_only(bits, f"M{M}", M, 1024, F_) for bits in (4, 8) for M, F_ in ((1, 511), (9, 64), (33, 129))]
    return cases


def real() -> list[Case]:
    """For a GPU, tests only: the widths of the measured shapes with fewer tokens, so that float64 fits beside them."""
    cases = []
    for shape, (_, _, *widths) in MODELS.items():
        cases += of_a_model(shape, 2048, 1024, *widths)
    experts = (1024, 2048, 1024, 16, 4)
    return [*cases, adamw("real", 2**22), grouped_linear("real", *experts), grouped_swiglu("real", *experts),
            *(weight_only(bits, f"M{M} real", M, 4096, 4096) for bits in (4, 8) for M in (1, 8, 16))]


# A table of tiles, and the cases that use all of it: every row of the table is tested on every GPU.
TABLES: dict[str, tuple[dict[str, tuple], list[Case]]] = {
    "flash_attention": (flash_tiles.TILES, [
        attention(f"K{K}", 2, 300, 2, 1, K, **mask)
        for K in (64, 128) for mask in ({}, {"window": 100}, {"documents": of_documents(300)})]),
    "grouped_gemm": (grouped_tiles.TILES, [
        case(name, *experts) for name, experts in (("even", (150, 128, 96, 5, 2)), ("odd", (150, 130, 71, 5, 2)))
        for case in (grouped_linear, grouped_swiglu)]),
    "weight_only": (weight_only_kernel.TILES, [
        weight_only(bits, f"M{M}", M, 512, 96) for bits in (4, 8) for M in (3, 16, 40)]),
}
