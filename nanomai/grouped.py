"""Products of groups of rows, each group with a weight of its own: what a layer of experts computes.

Rows are sorted by group; `ends` (E,) int32 says where each group ends. A group may be empty. Letters: T tokens, each in
k groups, N = T k pairs of a token and a group, E groups.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nanomai import ops
from nanomai.kernels import uses_triton


class Pairs(NamedTuple):
    """Where the pairs of a token and its group stand once they are sorted by group."""

    order: Tensor  # (N,) the pair at each place; pair i is the token i // k
    places: Tensor  # (N,) the place of each pair: the inverse
    ends: Tensor  # (E,) int32: where each group ends
    k: int

    @property
    def tokens(self) -> Tensor:
        """(N,) the token at each place."""
        return self.order // self.k


def sort_pairs(groups: Tensor, n_groups: int) -> Pairs:
    """The pairs of `groups` (T, k), which holds each token's groups. Nothing here waits for the device."""
    flat = groups.flatten()
    order = flat.argsort(stable=True)
    places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    counts = torch.zeros(n_groups, dtype=torch.int32, device=order.device).scatter_add_(
        0, flat, torch.ones_like(flat, dtype=torch.int32))
    return Pairs(order, places, counts.cumsum(0, dtype=torch.int32), groups.shape[1])


class _ToExperts(torch.autograd.Function):
    """Indexing alone would add up gradients row by row, in an order that threads decide; these k rows are known."""

    @staticmethod
    def forward(ctx, x, order, places, k):
        ctx.save_for_backward(places)
        ctx.k = k
        return x[order // k]

    @staticmethod
    def backward(ctx, d_rows):
        return d_rows[ctx.saved_tensors[0]].unflatten(0, (-1, ctx.k)).sum(1), None, None, None


class _ToTokens(torch.autograd.Function):
    """A permutation, whose backward pass is the inverse one."""

    @staticmethod
    def forward(ctx, rows, order, places):
        ctx.save_for_backward(order)
        return rows[places]

    @staticmethod
    def backward(ctx, d_pairs):
        return d_pairs[ctx.saved_tensors[0]], None, None


def to_experts(x: Tensor, pairs: Pairs) -> Tensor:
    """Each pair's row of x, sorted by group: (T, D) -> (N, D)"""
    return _ToExperts.apply(x, pairs.order, pairs.places, pairs.k)


def to_tokens(rows: Tensor, pairs: Pairs) -> Tensor:
    """The sorted rows, back at their tokens: (N, D) -> (T, k, D)"""
    return _ToTokens.apply(rows, pairs.order, pairs.places).unflatten(0, (-1, pairs.k))


def _groups(ends: Tensor) -> list[slice]:
    """The rows of each expert. On a GPU the host waits here for the router."""
    stops = ends.tolist()
    return [slice(start, stop) for start, stop in zip([0, *stops], stops, strict=False)]


def _has_grouped_mm(x: Tensor, *sizes: int) -> bool:
    """The library's grouped product takes bfloat16 rows of whole 16 bytes, and pays on a GPU alone."""
    return x.is_cuda and x.dtype == torch.bfloat16 and all(size % 8 == 0 for size in sizes)


@torch.library.custom_op("nanomai::grouped_products", mutates_args=())
def grouped_products(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x_e weight_e^T: rows (N, D) sorted by group, (E, F, D), ends (E,) -> (N, F)"""
    if _has_grouped_mm(x, *weight.shape[1:]):
        return F.grouped_mm(x, weight.mT, offs=ends)
    y = x.new_empty(len(x), weight.shape[1])
    for rows, w in zip(_groups(ends), weight, strict=True):
        torch.mm(x[rows], w.T, out=y[rows])
    return y


@torch.library.custom_op("nanomai::grouped_outer_products", mutates_args=())
def grouped_outer_products(dy: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """dy_e^T x_e, the gradient of each expert's weight: (N, F), (N, D), (E,) -> (E, F, D)"""
    if _has_grouped_mm(x, dy.shape[1], x.shape[1]):
        return F.grouped_mm(dy.T, x, offs=ends)
    dw = x.new_empty(len(ends), dy.shape[1], x.shape[1])
    for rows, out in zip(_groups(ends), dw, strict=True):
        torch.mm(dy[rows].T, x[rows], out=out)
    return dw


grouped_products.register_fake(lambda x, weight, ends: x.new_empty(x.shape[0], weight.shape[1]))
grouped_outer_products.register_fake(lambda dy, x, ends: x.new_empty(ends.shape[0], dy.shape[1], x.shape[1]))


def _gradients(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, ends = ctx.saved_tensors
    dy = dy.contiguous()
    return grouped_products(dy, weight.mT, ends), grouped_outer_products(dy, x, ends), None


grouped_products.register_autograd(_gradients,
                                   setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor, impl: str = "auto") -> Tensor:
    """x_e weight_e^T of each group of rows: (N, D), (E, F, D), ends (E,) int32 where each group ends -> (N, F)"""
    if uses_triton("grouped_gemm", x.is_cuda, impl):
        from triton_kernels.grouped_gemm import grouped_linear as kernel
        return kernel(x, weight, ends)
    return grouped_products(x, weight, ends)


def grouped_swiglu(x: Tensor, w_gate: Tensor, w_up: Tensor, pairs: Pairs, impl: str = "auto") -> Tensor:
    """swiglu(x w_gate_e^T, x w_up_e^T) of each pair's row of x: (T, D), two of (E, F, D) -> (N, F)"""
    if uses_triton("grouped_gemm", x.is_cuda, impl):
        from triton_kernels.grouped_gemm import grouped_swiglu as kernel
        return kernel(x, w_gate, w_up, pairs.ends, pairs.tokens)
    rows = to_experts(x, pairs)
    return ops.swiglu(grouped_linear(rows, w_gate, pairs.ends, "torch"),
                      grouped_linear(rows, w_up, pairs.ends, "torch"), "torch")
