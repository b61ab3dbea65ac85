"""Matrix products in float8 (arXiv 2209.05433): GPUs that have them promise twice the rate of bfloat16.

A float8 has 8 bits: e4m3 reaches 448 with 3 bits after the point, e5m2 reaches 57,344 with 2. So each tensor is divided
by a scale that its largest element gives, anew at each use: activations and weights become e4m3, gradients, which span
more, e5m2. Products are summed in float32 and come out in bfloat16; master weights, norms, softmax, head, router and
experts stay as they are. Of each input one byte is kept for the backward, and not two.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

STEP = 16  # what every dimension of a product must be a multiple of


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., K) in bfloat16, weight (M, K), bias (M,) -> (..., M), as `F.linear`; K and M are multiples of 16."""
    rows = x.flatten(0, -2)
    missing = -len(rows) % STEP
    y = _Linear.apply(F.pad(rows, (0, 0, 0, missing)) if missing else rows, weight)[: len(rows)]  # padding copies
    y = y if bias is None else y + bias.to(x.dtype)
    return y.view(*x.shape[:-1], len(weight))


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x over its scale, in float8, and the scale, a float32: the product of both is nearly x."""
    scale = x.abs().amax().float().clamp_min(1e-12) / torch.finfo(dtype).max
    return (x.float() / scale).to(dtype), scale


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        x8, x_scale = quantize(x, torch.float8_e4m3fn)
        w8, w_scale = quantize(weight, torch.float8_e4m3fn)
        ctx.save_for_backward(x8, x_scale, weight)  # the weight is there anyway, and under FSDP gathered again
        ctx.dtype = x.dtype
        return _product(x8, w8.T, x_scale, w_scale, x.dtype, fast=True)

    @staticmethod
    def backward(ctx, d_y):
        x8, x_scale, weight = ctx.saved_tensors
        d8, d_scale = quantize(d_y, torch.float8_e5m2)
        w8, w_scale = quantize(weight, torch.float8_e4m3fn)
        d_x = _product(d8, _by_columns(w8), d_scale, w_scale, ctx.dtype)
        d_weight = _product(d8.T.contiguous(), _by_columns(x8), d_scale, x_scale, ctx.dtype)
        return d_x, d_weight.to(weight.dtype)


def _by_columns(x: Tensor) -> Tensor:
    """In memory column after column, as the second factor has to be."""
    return x.T.contiguous().T


def _product(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, dtype: torch.dtype, fast: bool = False) -> Tensor:
    """`fast` sums in the tensor cores' own precision, which gradients are too small for."""
    return torch._scaled_mm(a, b, scale_a=a_scale, scale_b=b_scale, out_dtype=dtype, use_fast_accum=fast)
