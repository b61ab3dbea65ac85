"""Who runs: the ranks of a job and the few sums they must agree on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

Result = TypeVar("Result")


class RankFailed(RuntimeError):
    """Another rank cannot go on, and says why itself; this one only ends with it."""

    is_said_elsewhere = True


@dataclass(frozen=True)
class Mesh:
    """This process's place. One process is rank 0 of 1, and every call below is then free.

    What the ranks say to one another goes through `group`, so that a thread of each can have a conversation of its own.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    group: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        """The rank that prepares data, prints and writes."""
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor`, summed over all ranks in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def same(self, tensor: torch.Tensor) -> torch.Tensor:
        """Rank 0's `tensor`, on every rank in place."""
        if self.world_size > 1:
            dist.broadcast(tensor, 0, self.group)
        return tensor

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier(self.group)

    def from_main(self, function: Callable[[], Result]) -> Result:
        """What `function()` gives on rank 0, on every rank. Where it fails, the others raise RankFailed at once."""
        answer, failure = _tried(function) if self.is_main else (None, None)
        sent = [answer, failure and f"rank 0 failed: {failure}"]
        if self.world_size > 1:
            dist.broadcast_object_list(sent, group=self.group, device=torch.device("cpu"))
        if failure is not None:
            raise failure
        if sent[1] is not None:
            raise RankFailed(sent[1])
        return sent[0]

    def from_all(self, function: Callable[[], Result]) -> list[Result]:
        """What `function()` gives on each rank, on every rank. Where it fails on any, all raise the first failure."""
        found = [_tried(function)] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(found, found[0], self.group)
        for _, failure in found:
            if failure is not None:
                raise failure
        return [answer for answer, _ in found]


def _tried(function: Callable[[], Result]) -> tuple[Result | None, Exception | None]:
    try:
        return function(), None
    except Exception as failure:
        return None, failure
