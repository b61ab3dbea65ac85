"""AdamW on bfloat16 parameters without a float32 copy, by stochastic rounding (arXiv 1412.6980; 1711.05101).

Shapes: parameter p (...) bfloat16 or float32, gradient g (...) of any float type, moments m and v (...) float32; all
seen as one row of N numbers. p, m and v are changed in place.

The step, number by number, with learning rate l, weight decay d and step t counted from 1:
    m <- m + (1 - b1) (g - m)           v <- v + (1 - b2) (g^2 - v)
    p <- p (1 - l d) - l / (1 - b1^t) * m / (sqrt(v / (1 - b2^t)) + eps)

Rounding. bfloat16 keeps 8 bits: next to 1 its steps are 2^-7 upwards and 2^-8 downwards, and l = 1e-4 moves nothing,
ever, if the sum is rounded to nearest. Hence the usual float32 copy of p, 4 bytes for each number. Stochastic rounding
needs none: between its two neighbours x goes up with the probability of its distance from the lower one, so that
E[round(x)] = x, and of many steps too small to see the right share is taken. A bfloat16 is the upper half of a
float32, so it is one addition: add a uniform 16-bit integer to the bits of x, and cut the lower half off.

Randomness. Philox (Salmon et al. 2011, Random123) turns a key and a counter into random bits, without any state: the
key is the seed; the counter is (element / 8, step), and its 128 bits serve eight elements. The same seed, step and
element give the same bits on any GPU, with any launch. Give each tensor its own seed, each shard of a tensor too.

Exact: every operation rounds to float32 as IEEE 754 says and none is fused (enable_fp_fusion=False, div_rn, sqrt_rn:
PTX has mul.rn, div.rn, sqrt.rn and no fma), so that an NVIDIA GPU computes the bits that numpy computes.

Memory traffic in bytes, bfloat16 parameters and gradients: 22 N (p 2 + 2, g 2, m 4 + 4, v 4 + 4); with a float32 copy
28 N. At 3 TB/s, 124M parameters take 0.9 ms at least. State: 10 bytes for each parameter instead of 14.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_kernels.engine import Kernel

BLOCK = 1024  # elements a program: 8 a thread at 4 warps, which one Philox call serves
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


# --- Kernel -----------------------------------------------------------------------------------------------------------


@triton.jit
def random_16_bits(seed, step, first, BLOCK: tl.constexpr):
    """Uniform in [0, 65536), for the elements `first` and on: (BLOCK,) uint32. `first` is a multiple of 8."""
    counter = first // 8 + tl.arange(0, BLOCK // 8)
    a, b, c, d = tl.philox(seed, counter.to(tl.uint32), (counter >> 32).to(tl.uint32), step, 0)
    words = tl.join(tl.join(a, c), tl.join(b, d)).reshape(BLOCK // 2)  # a b c d, a b c d, ...
    return tl.join(words & 0xFFFF, words >> 16).reshape(BLOCK)


@triton.jit
def round_stochastically(x, bits):
    """float32 -> bfloat16: up or down, by chance, right on average."""
    raw = x.to(tl.uint32, bitcast=True)
    raw = tl.where(x == x, raw + bits, 0x7FC00000)  # NaN stays NaN: the GPU's is 0x7FFFFFFF, and one more were -0
    return (raw & 0xFFFF0000).to(tl.float32, bitcast=True).to(tl.bfloat16)


@Kernel
@triton.jit(do_not_specialize=["seed", "step"])
def adamw_kernel(p_ptr, g_ptr, m_ptr, v_ptr, N, seed, step, decay, rate, rate1, rate2, correction2, eps,
                 BLOCK: tl.constexpr):
    """decay = 1 - l d, rate = l / (1 - b1^t), rate1 = 1 - b1, rate2 = 1 - b2, correction2 = (1 - b2^t)^(-1/2)."""
    first = tl.program_id(0).to(tl.int64) * BLOCK  # N may pass 2^31
    at = first + tl.arange(0, BLOCK)  # (BLOCK,)
    inside = at < N
    p = tl.load(p_ptr + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + at, mask=inside, other=0.0).to(tl.float32)
    m = tl.load(m_ptr + at, mask=inside, other=0.0)
    v = tl.load(v_ptr + at, mask=inside, other=0.0)
    m += rate1 * (g - m)
    v += rate2 * (g * g - v)
    p = decay * p - rate * tl.div_rn(m, tl.sqrt_rn(v) * correction2 + eps)
    if p_ptr.dtype.element_ty == tl.bfloat16:
        p = round_stochastically(p, random_16_bits(seed, step, first, BLOCK))
    tl.store(p_ptr + at, p, mask=inside)
    tl.store(m_ptr + at, m, mask=inside)
    tl.store(v_ptr + at, v, mask=inside)


# --- Launcher ---------------------------------------------------------------------------------------------------------


def check(p: Tensor, g: Tensor, m: Tensor, v: Tensor, step: int, seed: int) -> None:
    """Says what does not fit."""
    if p.dtype not in (torch.bfloat16, torch.float32) or g.dtype not in FLOATS:
        raise TypeError(f"adamw: parameter {p.dtype}, gradient {g.dtype}; bfloat16 or float32 parameters are updated")
    if m.dtype != torch.float32 or v.dtype != torch.float32:
        raise TypeError(f"adamw: moments {m.dtype} and {v.dtype}; they must be float32")
    if not p.shape == g.shape == m.shape == v.shape:
        raise ValueError(f"adamw: shapes {', '.join(str(tuple(t.shape)) for t in (p, g, m, v))} of p, g, m, v differ")
    if not all(t.is_contiguous() for t in (p, m, v)):
        raise ValueError("adamw: p, m and v are changed in place, so they must be contiguous")
    if not 1 <= step < 2**31 or not 0 <= seed < 2**63:
        raise ValueError(f"adamw: step {step}, seed {seed}; steps count from 1, seeds from 0 to 2^63 - 1")


def update(p: Tensor, g: Tensor, m: Tensor, v: Tensor, step: int, lr: float, beta1: float, beta2: float, eps: float,
           weight_decay: float, seed: int) -> None:
    """One step, in place. The factors are the same for all elements: computed here in float64, rounded once."""
    check(p, g, m, v, step, seed)
    if p.numel():
        adamw_kernel[(triton.cdiv(p.numel(), BLOCK),)](
            p, g.contiguous(), m, v, p.numel(), seed, step, 1 - lr * weight_decay, lr / (1 - beta1**step), 1 - beta1,
            1 - beta2, 1 / math.sqrt(1 - beta2**step), eps, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=False)


# --- Op: it says what it changes, so that torch.compile keeps the order of reads and writes --------------------------


@torch.library.custom_op("nanomai::adamw", mutates_args=("p", "m", "v"))
def adamw_op(p: Tensor, g: Tensor, m: Tensor, v: Tensor, step: int, lr: float, beta1: float, beta2: float, eps: float,
             weight_decay: float, seed: int) -> None:
    """One step, in place"""
    update(p, g, m, v, step, lr, beta1, beta2, eps, weight_decay, seed)


adamw_op.register_fake(lambda *args: None)


@torch.no_grad()
def adamw(p: Tensor, g: Tensor, m: Tensor, v: Tensor, *, step: int, lr: float, beta1: float, beta2: float, eps: float,
          weight_decay: float, seed: int) -> None:
    """One step of AdamW, the `step`-th from 1, on p and its moments m and v, in place; g is its gradient."""
    adamw_op(p, g, m, v, step, lr, beta1, beta2, eps, weight_decay, seed)
