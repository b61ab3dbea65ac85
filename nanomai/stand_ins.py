"""What stands in a simulation for what it has not: a GPU's kernels, routers that choose, a network that delivers.

Each is a context, after which all is as before.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from types import SimpleNamespace
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from nanomai import ops
from nanomai.parallel import expert
from nanomai.parallel.collectives import exchanged


@contextlib.contextmanager
def kernels_of_a_gpu() -> Iterator[None]:
    """Attention and norms, which keep less there than on a CPU."""
    attention = functools.partial(_attention_of_a_gpu, F.scaled_dot_product_attention)
    with (mock.patch.object(ops, "EXPLICIT_SCORES_LIMIT", 0), mock.patch.object(ops, "causal_mask", _no_mask),
          mock.patch.object(F, "scaled_dot_product_attention", attention),
          mock.patch.object(F, "rms_norm", _NormOfAGpu.apply)):
        yield


def _no_mask(q: Tensor, k: Tensor) -> None:
    """Where queries are the last of the positions, our kernel needs no matrix to hide what is causally hidden.

    The library, told of a causal mask alone, does as much, if of the wrong numbers: it takes queries for the first.
    """


def _attention_of_a_gpu(library, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None,
                        is_causal: bool = False, **options) -> Tensor:
    """Of values narrower than keys (MLA) a CPU's library has all scores in memory; a GPU's has a kernel for them, which
    hides what is ahead in squares only. And a window is no matrix in our kernel: here it hides nothing, in FLOPs too.
    """
    if attn_mask is not None and attn_mask.ndim == 2:
        attn_mask, is_causal = None, True
    if q.shape[-1] == v.shape[-1]:
        return library(q, k, v, attn_mask=attn_mask, is_causal=is_causal, **options)
    bias, is_causal = None if attn_mask is None else attn_mask.to(q.dtype), is_causal and q.shape[2] == k.shape[2]
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, 0.0, is_causal)[0]


class _NormOfAGpu(torch.autograd.Function):
    """Holds what a GPU's kernel does: its input and a number for each row (a CPU, two inputs). Computes nothing."""

    @staticmethod
    def forward(ctx, x, shape, weight, eps):
        ctx.save_for_backward(x, weight, x.new_zeros(x.shape[:-1]))
        return x.clone()

    @staticmethod
    def backward(ctx, d_y):
        return d_y.clone(), None, torch.zeros_like(ctx.saved_tensors[1]), None


def even_routers(pairs: int, imbalance: float) -> contextlib.AbstractContextManager:
    """Every rank sends each the same number of its `pairs` of token and expert, and this one gets `imbalance` so."""
    return mock.patch.object(expert, "traffic", functools.partial(_even_traffic, pairs=pairs, imbalance=imbalance))


def _even_traffic(counts: Tensor, group: dist.ProcessGroup, pairs: int, imbalance: float):
    coming = exchanged(counts, [1] * group.size(), [1] * group.size(), group)
    sent = [pairs // group.size() + (rank < pairs % group.size()) for rank in range(group.size())]
    return coming, sent, [round(sent[0] * imbalance)] * group.size()


@contextlib.contextmanager
def messages() -> Iterator[None]:
    """Between stages: a network holds what it was given until someone waits for it.

    Before, stages vote whether all know the shapes that they exchange; here this is settled, as votes have values.
    """
    from torch.distributed.pipelining import schedules

    from nanomai.parallel.stage import Stage
    post, yes = schedules._batch_p2p, SimpleNamespace(item=lambda: 1)

    def hold(given: list[dist.P2POp], *rest, **options) -> list:
        return [*post(given, *rest, **options), SimpleNamespace(wait=lambda: None, holds=given)]

    with (mock.patch.object(schedules, "_batch_p2p", hold),
          mock.patch.object(Stage, "_warmup_forward_vote", create=True),
          mock.patch.object(Stage, "_warmup_backward_result", create=True, return_value=yes)):
        yield
