"""Two first kernels for the lesson 11a: a sum of two tensors, and the softmax of rows. Nothing else calls them.

add: x, y, z (...), all alike; seen as one row of N numbers, since every number is on its own.

    z = x + y                    bytes moved  3 e N      (x + y + z; e bytes a number)

softmax: x, y (..., D), seen as N rows of D. With the maximum m of a row, no exponent is above zero:

    m = max_j x_j
    y_j = e^(x_j - m) / sum_i e^(x_i - m)
                                 bytes moved  2 e N D    (x + y)

A row stays in the registers of its program between the maximum, the sum and the division. As three kernels, one for
each of the three, a softmax moves 5 e N D: x twice, the exponentials there and back, and y.

All arithmetic is in float32 and each result is rounded once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_kernels.engine import Kernel

BLOCK = 2048  # numbers of a sum that one program takes: 16 a thread at 4 warps
MAX_WIDTH = 16_384  # of a row of softmax: 32 numbers a thread at 16 warps, and no spills on sm_90

# --- Kernels ----------------------------------------------------------------------------------------------------------


@Kernel
@triton.jit
def add_kernel(x_ptr, y_ptr, z_ptr, N, BLOCK: tl.constexpr):
    """z = x + y for BLOCK numbers."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,); N may pass 2^31
    inside = at < N
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(z_ptr + at, (x + y).to(z_ptr.dtype.element_ty), mask=inside)


@Kernel
@triton.jit
def softmax_kernel(x_ptr, y_ptr, D, BLOCK: tl.constexpr):
    """The softmax of one row, whole."""
    column = tl.arange(0, BLOCK)  # (BLOCK,)
    at = tl.program_id(0).to(tl.int64) * D + column  # N D may pass 2^31
    # minus infinity is never the maximum, and e^-inf = 0 adds nothing to the sum
    x = tl.load(x_ptr + at, mask=column < D, other=-float("inf")).to(tl.float32)
    e = tl.exp(x - tl.max(x, axis=0))
    y = e / tl.sum(e, axis=0)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=column < D)


# --- Launchers --------------------------------------------------------------------------------------------------------


def add(x: Tensor, y: Tensor) -> Tensor:
    """x + y, contiguous. Tensors that are not contiguous are copied first."""
    if x.shape != y.shape or x.dtype != y.dtype:
        raise ValueError(f"add: x is {tuple(x.shape)} {x.dtype}, y {tuple(y.shape)} {y.dtype}; they must be alike")
    _check_dtype("add", x)
    x, y = x.contiguous(), y.contiguous()
    z, count = torch.empty_like(x), x.numel()
    if count:
        add_kernel[(triton.cdiv(count, BLOCK),)](x, y, z, count, BLOCK=BLOCK, num_warps=4)
    return z


def softmax(x: Tensor) -> Tensor:
    """Softmax over the last dimension, contiguous: (..., D) -> (..., D)"""
    _check_dtype("softmax", x)
    if not 0 < x.shape[-1] <= MAX_WIDTH:
        raise ValueError(f"softmax: rows of {x.shape[-1]} numbers; 1 to {MAX_WIDTH} fit")
    x, block = x.contiguous(), triton.next_power_of_2(x.shape[-1])
    y, rows = torch.empty_like(x), x.numel() // x.shape[-1]
    if rows:
        softmax_kernel[(rows,)](x, y, x.shape[-1], BLOCK=block, num_warps=min(16, max(4, block // 512)))
    return y


def _check_dtype(name: str, x: Tensor) -> None:
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"{name}: the kernel computes in float32; {x.dtype} needs torch's own")
