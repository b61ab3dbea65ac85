"""Tensor parallel with sequence parallel: ranks share every matrix product, and between products every sequence.

A block's first matrices are cut by their rows and its second ones by their columns (Megatron-LM, arXiv 1909.08053), so
each rank computes some heads, some hidden units and some of the vocabulary, and the sum over ranks of what comes out is
the whole. Norms and residuals work on a T / R part of the sequence (arXiv 2205.05198): it is gathered before attention
or an MLP, and the sums that come out are scattered again. R is the number of ranks; other letters as in `model.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from nanomai.ops import IGNORE, embedding
from nanomai.parallel.collectives import gather, gathered, scatter_sum, to_all, total
from nanomai.parallel.shares import cut, see_own_parts

# Ends of parameter names, and the dimension along which each is cut. All others are whole on every rank.
CUT = {
    "embed.weight": 0, "head.weight": 0, "head.bias": 0,
    **{f"{layer}.{kind}": 0 for layer in ("wq", "wk", "wv", "wkv", "w_gate", "w_up") for kind in ("weight", "bias")},
    "wo.weight": 1, "w_down.weight": 1,
    "experts.w_gate": 1, "experts.w_up": 1, "experts.w_down": 2,
}
ADDED_TO_SUMS = ("wo.bias", "w_down.bias")  # by one rank alone


def share_products(model: nn.Module, ranks: DeviceMesh) -> None:
    """Cuts the parameters of `model` along `ranks` and lays the collectives around its layers.

    Experts that are shared out along another axis have been cut along this one as well (`expert.py`).
    """

    def by_first(bias: Tensor) -> Tensor:
        return bias * (ranks.get_local_rank() == 0)

    for prefix, module in list(model.named_modules()):
        names = [name for name, p in module.named_parameters(recurse=False) if not isinstance(p, DTensor)]
        if not names:
            continue
        for name in names:
            cut(module, name, ranks, placement(f"{prefix}.{name}"))
        alone = [name for name in names if f"{prefix}.{name}".endswith(ADDED_TO_SUMS)]
        see_own_parts(module, dict.fromkeys(alone, by_first))
    sequence = _Sequence(ranks.get_group())
    sequence.surround(model)
    for block in model.blocks.values():
        _count_own_heads(block.attention, ranks.size())


def placement(name: str) -> Placement:
    """How the parameter of this name is cut."""
    ends = [end for end in CUT if f".{name}".endswith(f".{end}")]
    return Shard(CUT[ends[0]]) if ends else Replicate()


def part_of(size: int, name: str, shape: Sequence[int]) -> list[int]:
    """The shape of what one of `size` ranks has of the parameter of this name and shape."""
    cut_here = placement(name)
    return [n // size if cut_here.is_shard(dim) else n for dim, n in enumerate(shape)]


def _count_own_heads(attention: nn.Module, size: int) -> None:
    if hasattr(attention, "wk"):
        attention.wk.out_features //= size  # what a cache asks for
    else:
        attention.n_heads //= size


class _Sequence:
    """The collectives of one model. `split` says whether ranks have parts of the sequence now, or all of it each."""

    def __init__(self, group: dist.ProcessGroup):
        self.group, self.size, self.rank = group, group.size(), group.rank()
        self.split = True

    def surround(self, model: nn.Module) -> None:
        model.register_forward_pre_hook(self.begin, with_kwargs=True)
        if model.embed is not None:
            model.embed.forward = functools.partial(self.embed, model.embed)
        if model.positions is not None:
            model.positions.register_forward_hook(lambda module, inputs, y: self.own(y))
        for block in model.blocks.values():
            for layer in (block.attention, block.mlp):
                layer.register_forward_pre_hook(self.enter)
                layer.register_forward_hook(self.leave)
        if model.norm is not None:
            model.norm.register_forward_hook(lambda module, inputs, x: self.all_of(x))
            model.loss.forward = functools.partial(vocabulary_parallel_loss, group=self.group)
            model.register_forward_hook(self.end, with_kwargs=True)

    def begin(self, model, inputs, options) -> None:
        """Sampling goes on by one position: there is nothing to split, and of a prompt it wants the last one."""
        t, is_training = inputs[0].shape[1], torch.is_grad_enabled() and len(inputs) > 1 and inputs[1] is not None
        self.split = not options.get("last_only") and t % self.size == 0
        if is_training and not self.split:  # norms would see all positions on every rank, and their gradients be summed
            raise ValueError(f"under tensor parallel {self.size} ranks train on equal parts of a sequence, and {t} "
                             "tokens cannot be cut so")

    def embed(self, embed: nn.Embedding, ids: Tensor) -> Tensor:
        """(B, T) -> (B, T / R, D). Each rank looks up what lies in its part of the vocabulary."""
        weight = embed.weight
        mine = ids - self.rank * len(weight)
        known = (mine >= 0) & (mine < len(weight))
        x = embedding(mine.masked_fill(~known, 0), weight) * known[..., None]
        return scatter_sum(x, 1, self.group) if self.split else total(x, self.group)

    def own(self, x: Tensor) -> Tensor:
        """This rank's positions, of (T, D)."""
        return x.chunk(self.size)[self.rank] if self.split else x

    def all_of(self, x: Tensor) -> Tensor:
        """(B, T / R, D) -> (B, T, D)"""
        return gather(x, 1, self.group) if self.split else to_all(x, self.group)

    def enter(self, layer: nn.Module, inputs: tuple) -> tuple:
        x, *others = inputs
        if others and isinstance(others[0], Tensor) and not others[0].ndim:
            others[0] = others[0] / self.size  # the losses of a router, which every rank adds
        return (self.all_of(x), *others)

    def leave(self, layer: nn.Module, inputs: tuple, y: Tensor) -> Tensor:
        return scatter_sum(y, 1, self.group) if self.split else total(y, self.group)

    def end(self, model, inputs, options, y: Tensor) -> Tensor:
        """Logits (B, T, V / R) -> (B, T, V); a loss is whole already."""
        return gather(y, -1, self.group) if y.ndim else y


# --- The loss ---------------------------------------------------------------------------------------------------------

LOGITS_BYTES = 2**28  # of float32 logits alive at once, as in `ops.py`


def vocabulary_parallel_loss(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, *,
                             group: dist.ProcessGroup) -> Tensor:
    """`ops.linear_cross_entropy` where every rank has V / R rows of the head: hidden (N, D), weight (V / R, D).

    A chunk of tokens goes through logits, loss and both gradients before the next begins. Ranks exchange two numbers a
    token: their part of the softmax's denominator, and the logit of the target.
    """
    return _VocabularyParallelLoss.apply(hidden, weight, targets, bias, group)


class _VocabularyParallelLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, bias, group):
        wide = torch.promote_types(hidden.dtype, torch.float32)
        w, first = weight.to(hidden.dtype), group.rank() * len(weight)
        loss = hidden.new_zeros((), dtype=wide)
        d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=wide)
        d_bias = None if bias is None else torch.zeros_like(bias, dtype=wide)
        chunk = max(1, LOGITS_BYTES // (4 * len(weight)))
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            logits = F.linear(hidden[rows], w).to(wide)  # (n, V / R)
            logits = logits if bias is None else logits + bias
            mine = targets[rows, None] - first  # (n, 1)
            valid, here = targets[rows, None] != IGNORE, (mine >= 0) & (mine < len(weight))
            mine = mine.masked_fill(~here, 0)
            parts = torch.stack((logits.logsumexp(-1), (logits.gather(1, mine) * here)[:, 0]))  # (2, n)
            log_sums, at_target = gathered(parts[None], 0, group).unbind(1)  # (R, n) each
            log_sum = log_sums.logsumexp(0)[:, None]  # (n, 1)
            loss = loss + ((log_sum - at_target.sum(0)[:, None]) * valid).sum()
            d_logits = (logits - log_sum).exp()
            d_logits = d_logits.scatter_add(1, mine, -here.to(wide)) * valid
            if d_bias is not None:
                d_bias += d_logits.sum(0)
            d_logits = d_logits.to(hidden.dtype)
            d_hidden[rows] = d_logits @ w
            d_weight += d_logits.T @ hidden[rows]
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        return loss

    @staticmethod
    def backward(ctx, d_loss):
        d_hidden, d_weight, d_bias = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        d_bias = None if d_bias is None else (d_bias * d_loss).to(bias_dtype)
        return (d_hidden * d_loss).to(d_hidden.dtype), (d_weight * d_loss).to(weight_dtype), None, d_bias, None
