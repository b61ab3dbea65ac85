"""Context parallel: ranks share every sequence, for texts whose activations one rank cannot hold.

All of a block works on single positions but attention, which sees the past. Each rank gathers the keys and values of
all, as Llama 3 does (arXiv 2407.21783, 3.3.2): with few key-value heads they are small beside the activations. To the
model this looks like a cache that holds what other ranks computed. Under a causal mask late positions see more, so of
2 R pieces rank r has the r-th and the r-th from the end. R is the number of ranks; other letters as in `model.py`.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from nanomai.masks import attention_mask
from nanomai.parallel.collectives import gather, total


def share_sequences(model: nn.Module, ranks: DeviceMesh) -> None:
    """From now on `model(ids, targets, ...)` computes a part of the sequence here, and gives the loss of all of it."""
    group = ranks.get_group()

    def begin(model, inputs, options):
        ids, targets, documents = (*inputs, None, None)[:3]
        if targets is None:
            return None  # sampling: each rank does all of it
        if options.get("reduction") != "sum":
            raise ValueError("under context parallel the loss is a sum: no rank knows the count of all tokens")
        sequence = SharedSequence(ids, documents, group)
        return (ids[:, sequence.own], targets[:, sequence.own]), options | {"cache": sequence}

    def end(model, inputs, options, loss):
        return total(loss, group) if isinstance(options.get("cache"), SharedSequence) and not loss.ndim else loss

    model.register_forward_pre_hook(begin, with_kwargs=True)
    model.register_forward_hook(end, with_kwargs=True)


def own_positions(length: int, rank: int, size: int) -> Tensor:
    """(length / size,) positions of one rank: a piece of the first half, and its mirror image of the second."""
    pieces = torch.arange(length).chunk(2 * size)
    return torch.cat((pieces[rank], pieces[-1 - rank]))


class SharedSequence:
    """What `model.forward` takes for a cache: keys of the other ranks stand where those of the past would."""

    length = 0  # positions that an earlier forward pass has left

    def __init__(self, ids: Tensor, documents: Tensor | None, group: dist.ProcessGroup):
        self.group, self.documents = group, documents
        size, rank = group.size(), group.rank()
        order = [own_positions(ids.shape[1], (rank + 1 + i) % size, size) for i in range(size)]  # this rank's come last
        self.order = torch.cat(order).to(ids.device)
        self.own = self.order[-len(order[-1]):]

    @property
    def layers(self) -> SharedSequence:
        return self

    def __getitem__(self, layer: int) -> SharedSequence:
        return self  # nothing is kept

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """(B, G, T / R, K) -> (B, G, T, K), in the order of `key_positions`."""
        shift = -(self.group.rank() + 1) * k.shape[2]
        return gather(k, 2, self.group).roll(shift, 2), gather(v, 2, self.group).roll(shift, 2)

    def key_positions(self, t: int) -> Tensor:
        """(T,): first those of the other ranks, then the `t` of this one."""
        return self.order

    def mask(self, queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
        """(T / R, T), or (B, 1, T / R, T) where there are documents."""
        if self.documents is None:
            return attention_mask(queries, keys, window)
        return attention_mask(queries, keys, window, self.documents[:, queries], self.documents[:, keys])
