"""Context parallel: ranks share every sequence, for texts whose activations one rank cannot hold.

All of a block works on single positions but attention, which sees the past. For that, ranks can gather the keys and
values of all (`keys`), as Llama 3 does (arXiv 2407.21783, 3.3.2): with few key-value heads they are small beside the
activations. Their mask is then a matrix, and what it hides is computed too. Or each gets some heads of all positions
for its positions of all heads, and changes back afterwards (`heads`; Ulysses, arXiv 2309.14509): attention is that of
one rank, kernels and all, and there must be heads enough. To the model either looks like a cache. R is the number of
ranks; other letters as in `model.py`.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from nanomai import ops
from nanomai.masks import Mask, attention_mask
from nanomai.parallel.collectives import gather, swap, total


def share_sequences(model: nn.Module, ranks: DeviceMesh, by: str = "keys") -> None:
    """From now on `model(ids, targets, ...)` computes a part of the sequence here, and gives the loss of all of it."""
    group = ranks.get_group()
    heads = Heads(group) if by == "heads" else None
    if heads:
        for block in model.blocks.values():
            block.attention.attend = heads.attend

    def begin(model, inputs, options):
        ids, targets, documents = (*inputs, None, None)[:3]
        if heads:
            heads.shared = targets is not None
        if targets is None:
            return None  # sampling: each rank does all of it
        if options.get("reduction") != "sum":
            raise ValueError("under context parallel the loss is a sum: no rank knows the count of all tokens")
        kind = SharedHeads if heads else SharedKeys
        sequence = kind(model, ids, documents, group)
        return (ids[:, sequence.own], targets[:, sequence.own]), options | {"cache": sequence}

    def end(model, inputs, options, loss):
        return total(loss, group) if isinstance(options.get("cache"), SharedSequence) and not loss.ndim else loss

    model.register_forward_pre_hook(begin, with_kwargs=True)
    model.register_forward_hook(end, with_kwargs=True)


class SharedSequence:
    """What `model.forward` takes for a cache: positions of the other ranks stand where those of the past would."""

    length = 0  # positions that an earlier forward pass has left

    def __init__(self, model: nn.Module, ids: Tensor, documents: Tensor | None, group: dist.ProcessGroup):
        self.model, self.documents, self.group = model, documents, group
        size, rank = group.size(), group.rank()
        order = [self.positions(ids.shape[1], (rank + 1 + i) % size, size) for i in range(size)]  # own ones last
        self.order = torch.cat(order).to(ids.device)
        self.own = self.order[-len(order[-1]):]

    @property
    def layers(self) -> SharedSequence:
        return self

    def __getitem__(self, layer: int) -> SharedSequence:
        return self  # nothing is kept

    def key_positions(self, t: int) -> Tensor:
        """(T,): first those of the other ranks, then the `t` of this one."""
        return self.order


class SharedKeys(SharedSequence):
    """Every rank has all keys and values. Under a causal mask late positions see more, so ranks have some of both."""

    @staticmethod
    def positions(length: int, rank: int, size: int) -> Tensor:
        """(length / size,) positions of one rank: a piece of the first half, and its mirror image of the second."""
        pieces = torch.arange(length).chunk(2 * size)
        return torch.cat((pieces[rank], pieces[-1 - rank]))

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """(B, G, T / R, K) -> (B, G, T, K), in the order of `key_positions`."""
        shift = -(self.group.rank() + 1) * k.shape[2]
        return gather(k, 2, self.group).roll(shift, 2), gather(v, 2, self.group).roll(shift, 2)

    def mask(self, queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
        """(T / R, T), or (B, 1, T / R, T) where there are documents."""
        if self.documents is None:
            return attention_mask(queries, keys, window)
        return attention_mask(queries, keys, window, self.documents[:, queries], self.documents[:, keys])


class SharedHeads(SharedSequence):
    """Every rank has all positions, of some heads: attention finds them in their order, and so does the mask."""

    @staticmethod
    def positions(length: int, rank: int, size: int) -> Tensor:
        """(length / size,) positions of one rank: one piece."""
        return torch.arange(length).chunk(size)[rank]

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """As they are: `Heads` changes them, and queries with them."""
        return k, v

    def mask(self, queries: Tensor, keys: Tensor, window: int | None) -> Mask:
        """That of one rank."""
        return self.model.mask(torch.arange(len(keys), device=keys.device), self.documents)


class Heads:
    """Attention between two all-to-alls. `shared` says whether ranks have parts of the sequence now, or all of it."""

    def __init__(self, group: dist.ProcessGroup):
        self.group = group
        self.shared = True

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, impl: str) -> Tensor:
        """As `ops.attention`, of q (B, H, T / R, K) and k, v (B, G, T / R, K); G is doubled where R needs more."""
        if not self.shared:
            return ops.attention(q, k, v, mask, impl)
        copies = math.lcm(k.shape[1], self.group.size()) // k.shape[1]
        k, v = (x.repeat_interleave(copies, 1) if copies > 1 else x for x in (k, v))
        y = ops.attention(*(swap(x, 1, 2, self.group) for x in (q, k, v)), mask, impl)
        return swap(y, 2, 1, self.group)
