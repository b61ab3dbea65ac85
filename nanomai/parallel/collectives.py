"""Collectives with a gradient, along one dimension of a tensor and one line of ranks.

Each one's gradient is the other's forward: what was gathered is summed and cut up again. In a compiled block they are
part of its graph.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

ops = torch.ops._c10d_functional  # what a compiled graph can hold; `dist.all_gather` and the like write into buffers


def gather(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """All ranks' parts of `dim`, in the order of ranks; gradients of all ranks are summed."""
    return _Gather.apply(x, dim, group)


def scatter_sum(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """The sum of all ranks' tensors, of which this rank keeps its part of `dim`."""
    return _ScatterSum.apply(x, dim, group)


def total(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of all ranks' tensors, on all of them. What follows is the same everywhere, and so is its gradient."""
    return _Total.apply(x, group)


def to_all(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """x, which every rank has, for uses that differ between ranks: its gradient is the sum of theirs."""
    return _ToAll.apply(x, group)


def exchange(x: Tensor, received: list[int], sent: list[int], group: dist.ProcessGroup) -> Tensor:
    """All-to-all: the first `sent[0]` rows go to rank 0, and so on; `received[r]` rows come from rank r, in order."""
    return _Exchange.apply(x, received, sent, group)


def swap(x: Tensor, cut: int, join: int, group: dist.ProcessGroup) -> Tensor:
    """All of dimension `join`, of which each rank has a part, for a part of `cut`, of which each rank has all."""
    ones = [1] * group.size()
    parts = exchange(torch.stack(x.chunk(group.size(), cut)), ones, ones, group)  # (R, ...)
    return torch.cat(parts.unbind(), join)


def exchanged(x: Tensor, received: list[int], sent: list[int], group: dist.ProcessGroup) -> Tensor:
    """`exchange` without a gradient."""
    return ops.wait_tensor(ops.all_to_all_single(x.contiguous(), received, sent, group.group_name))


def gathered(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """`gather` without a gradient."""
    y = ops.wait_tensor(ops.all_gather_into_tensor(x.contiguous(), group.size(), group.group_name))
    return torch.cat(y.chunk(group.size()), dim) if dim else y


def _scattered(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    x = torch.cat(x.chunk(group.size(), dim)) if dim else x.contiguous()
    return ops.wait_tensor(ops.reduce_scatter_tensor(x, "sum", group.size(), group.group_name))


def _summed(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    return ops.wait_tensor(ops.all_reduce(x.contiguous(), "sum", group.group_name))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dim, group):
        ctx.dim, ctx.group = dim, group
        return gathered(x, dim, group)

    @staticmethod
    def backward(ctx, d_y):
        return _scattered(d_y, ctx.dim, ctx.group), None, None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dim, group):
        ctx.dim, ctx.group = dim, group
        return _scattered(x, dim, group)

    @staticmethod
    def backward(ctx, d_y):
        return gathered(d_y, ctx.dim, ctx.group), None, None


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        return _summed(x, group)

    @staticmethod
    def backward(ctx, d_y):
        return d_y, None


class _ToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, d_y):
        return _summed(d_y, ctx.group), None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, received, sent, group):
        ctx.back = sent, received, group
        return exchanged(x, received, sent, group)

    @staticmethod
    def backward(ctx, d_y):
        return exchanged(d_y, *ctx.back), None, None, None
