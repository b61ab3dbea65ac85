"""Context parallel: ranks share every sequence, for texts whose activations one rank cannot hold.

All of a block works on single positions but attention, which sees the past. For that, ranks can gather the keys and
values of all (`keys`), as Llama 3 does (arXiv 2407.21783, 3.3.2): with few key-value heads they are small beside the
activations. Each attends from its pieces of the sequence to the keys up to their ends. Or each gets some heads of all
positions for its positions of all heads, and changes back afterwards (`heads`; Ulysses, arXiv 2309.14509): attention is
that of one rank, and there must be heads enough. To the model either looks like a cache. R is the number of ranks;
other letters as in `model.py`.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from nanomai import ops
from nanomai.masks import Mask, prefix
from nanomai.parallel.collectives import gather, swap, total


def share_sequences(model: nn.Module, ranks: DeviceMesh, by: str = "keys") -> None:
    """From now on `model(ids, targets, ...)` computes a part of the sequence here, and gives the loss of all of it."""
    sequence = (SharedHeads if by == "heads" else SharedKeys)(ranks.get_group())
    for block in model.blocks.values():
        block.attention.attend = sequence.attend
    model.register_forward_pre_hook(sequence.begin, with_kwargs=True)
    model.register_forward_hook(sequence.end, with_kwargs=True)


class SharedSequence:
    """What `model.forward` takes for a cache: keys of the other ranks stand beside those of this one.

    `shared` says whether ranks have parts of the sequence now, or each all of it: sampling has no targets.
    """

    length = 0  # positions that an earlier forward pass has left

    def __init__(self, group: dist.ProcessGroup):
        self.group, self.size, self.rank = group, group.size(), group.rank()
        self.shared = True

    def begin(self, model: nn.Module, inputs: tuple, options: dict) -> tuple[tuple, dict] | None:
        """Takes this rank's part of ids and targets (B, T), and the place of the cache."""
        ids, targets, documents = (*inputs, None, None)[:3]
        self.shared = targets is not None
        if not self.shared:
            return None
        if options.get("reduction") != "sum":
            raise ValueError("under context parallel the loss is a sum: no rank knows the count of all tokens")
        self.model, self.documents = model, documents
        self.layers = [self] * model.config.n_layers  # nothing is kept
        self.all = torch.arange(ids.shape[1], device=ids.device)
        self.own = self.part(self.all, self.rank, self.size)
        return (ids[:, self.own], targets[:, self.own]), options | {"cache": self}

    def end(self, model: nn.Module, inputs: tuple, options: dict, y: Tensor) -> Tensor:
        """The loss of all ranks; what is no loss, a stage of a pipeline hands on."""
        return total(y, self.group) if self.shared and not y.ndim else y

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, impl: str) -> Tensor:
        """As `ops.attention`, of q (B, H, T / R, K), and of k and v as `extend` gives them."""
        return (self.attend_in_parts if self.shared else ops.attention)(q, k, v, mask, impl)

    def positions(self, t: int) -> tuple[Tensor, Tensor]:
        """(T / R,) of this rank, and (T,) of all keys, in their order."""
        return self.own, self.all


class SharedKeys(SharedSequence):
    """Every rank has all keys and values. Under a causal mask late positions see more, so ranks have some of both."""

    @staticmethod
    def part(positions: Tensor, rank: int, size: int) -> Tensor:
        """(T,) -> (T / R,): a piece of the first half, and its mirror image of the second."""
        pieces = positions.chunk(2 * size)
        return torch.cat((pieces[rank], pieces[-1 - rank]))

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """(B, G, T / R, K) -> (B, G, T, K), in the order of positions."""
        return self._all(k), self._all(v)

    def _all(self, x: Tensor) -> Tensor:
        early, late = zip(*(part.chunk(2, 2) for part in gather(x, 0, self.group).chunk(self.size)), strict=True)
        return torch.cat((*early, *reversed(late)), 2)

    def mask(self, queries: Tensor, keys: Tensor, window: int | None) -> Mask:
        """Plainly causal, a FlashMask, or (T / R, T), or (B, 1, T / R, T) where there are documents."""
        return self.model.mask(keys, self.documents, queries)

    def attend_in_parts(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, impl: str) -> Tensor:
        """q (B, H, T / R, K) and k, v (B, G, T, K): each piece attends to the keys up to its end.

        With n = T / 2 R positions in a piece these are (2 R + 1) n^2 scores on every rank, and 2 R n^2 where the kernel
        skips what a causal mask hides.
        """
        n, ys = q.shape[2] // 2, []
        for i, piece in enumerate((self.rank, 2 * self.size - 1 - self.rank)):
            rows, end = slice(i * n, (i + 1) * n), (piece + 1) * n
            ys.append(ops.attention(q[:, :, rows], k[:, :, :end], v[:, :, :end], prefix(mask, rows, end), impl))
        return torch.cat(ys, 2)


class SharedHeads(SharedSequence):
    """Every rank has all positions, of some heads: attention finds them in their order, and so does the mask."""

    @staticmethod
    def part(positions: Tensor, rank: int, size: int) -> Tensor:
        """(T,) -> (T / R,): one piece."""
        return positions.chunk(size)[rank]

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """As they are: `attend` changes them, and queries with them."""
        return k, v

    def mask(self, queries: Tensor, keys: Tensor, window: int | None) -> Mask:
        """That of one rank."""
        return self.model.mask(keys, self.documents)

    def attend_in_parts(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, impl: str) -> Tensor:
        """q (B, H, T / R, K) and k, v (B, G, T / R, K); G is multiplied where R needs more."""
        copies = math.lcm(k.shape[1], self.size) // k.shape[1]
        k, v = (x.repeat_interleave(copies, 1) if copies > 1 else x for x in (k, v))
        y = ops.attention(*(swap(x, 1, 2, self.group) for x in (q, k, v)), mask, impl)
        return swap(y, 2, 1, self.group)
