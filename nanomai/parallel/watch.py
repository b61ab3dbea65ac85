"""Ranks that are late: one that hangs is named and the job ended; one that is slow is measured.

A collective waits for the last of its ranks, and for ever if that one never comes. So a thread of each rank sees when
nothing ends any more. It then tells the others where its rank is, through the store at which the ranks first met; one
of them names who is not where the rest wait, and all exit, for torchrun to start again from the last checkpoint.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, wait
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist

from nanomai.parallel.launch import meeting_point
from nanomai.parallel.mesh import Mesh

Item = TypeVar("Item")


class Watchdog:
    """Ends this process if its main thread says nothing for `timeout_s` (0: it may), or if whoever started it is gone.

    A rank that outlived torchrun would write into the folder of the run that comes after it.
    """

    GRACE = 5.0  # seconds in which all ranks that can still speak will

    def __init__(self, mesh: Mesh, timeout_s: float):
        self.mesh, self.timeout_s = mesh, timeout_s
        self.grace = min(self.GRACE, timeout_s)
        self.steps_done, self.heard, self.ended = 0, time.monotonic(), threading.Event()
        self.watched = threading.get_ident()

    def __enter__(self) -> Watchdog:
        if self.mesh.world_size > 1:
            start = self.mesh.from_main(uuid.uuid4)  # torchrun's store still holds what was said before a restart
            self.store = dist.PrefixStore(f"nanomai/{start}", meeting_point())
            self.parent, self.heard = os.getppid(), time.monotonic()
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.ended.set()

    def hear(self, steps_done: int) -> None:
        """The main thread goes on."""
        self.steps_done, self.heard = steps_done, time.monotonic()

    def each(self, items: Iterable[Item]) -> Iterator[Item]:
        """`items`, each of which is progress too."""
        for item in items:
            yield item
            self.hear(self.steps_done)

    def wait(self, pending: Future, thread: int) -> None:
        """Until `pending`, on which `thread` works, is done on every rank. Collective.

        Whatever such a thread of any rank computes is progress, since the others wait for it: one that hangs on a disk
        computes nothing, while one that writes to a slow disk does now and then. Where it is, is what this rank tells.
        """
        done, left, main = 0, 1, self.watched
        while left:
            wait([pending], timeout=1)
            self.watched = main if pending.done() else thread
            before, (done, left) = done, self.mesh.sum(torch.tensor([_spent_by(thread), not pending.done()])).tolist()
            if done > before:
                self.hear(self.steps_done)

    def _watch(self) -> None:
        while not self.ended.wait(1.0):
            if os.getppid() != self.parent:
                _exit("whoever started this rank has ended, and so does it")
            if self.timeout_s and time.monotonic() - self.heard > self.timeout_s:
                _exit(self._verdict())

    def _verdict(self) -> str | None:
        """One line that names the ranks for which the others wait; None where another rank says it."""
        mine = _where(self.watched, self.steps_done)
        reports = {}
        try:
            self.store.set(f"rank {self.mesh.rank}", mine)
            time.sleep(self.grace)
            if self.store.add("speakers", 1) > 1:
                time.sleep(self.grace)  # torchrun ends all as soon as one has: the one that speaks goes first
                return None
            for rank in range(self.mesh.world_size):
                there = self.store.check([f"rank {rank}"])
                reports[rank] = self.store.get(f"rank {rank}").decode() if there else SILENT
        except RuntimeError:  # the store is gone: the rank that keeps it has ended, and has said why
            return None
        return f"no step has ended for {self.timeout_s:.0f} s (train.hang_timeout): {_sorted_out(reports)}"


SILENT, WAITS = "gives no sign of life", "waits for other ranks"


def _spent_by(thread: int) -> int:
    """Nanoseconds in which it has computed; 0 where the system does not tell (macOS), and all waiting is silent."""
    return time.clock_gettime_ns(clock(thread)) if (clock := getattr(time, "pthread_getcpuclockid", None)) else 0


def _where(thread: int, steps_done: int) -> str:
    """What the thread is at: its innermost line in this package, and whether a collective was called there."""
    frame, waits, at_home = sys._current_frames()[thread], False, False
    while frame is not None and not at_home:
        module = frame.f_globals.get("__name__", "")
        collective = module.startswith(("torch.distributed", "nanomai.parallel")) and ".checkpoint" not in module
        waits, at_home = waits or collective, module.startswith("nanomai.") and not collective
        place = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} ({frame.f_code.co_name})"
        frame = frame.f_back
    return f"{WAITS if waits else 'is'} in {place} after step {steps_done}"


def _sorted_out(reports: dict[int, str]) -> str:
    """Ranks that say the same as one; first those that do not wait, and of these the fewest."""
    ranks = defaultdict(list)
    for rank, report in sorted(reports.items()):
        ranks[report].append(rank)
    order = sorted(ranks, key=lambda report: (report != SILENT, report.startswith(WAITS), len(ranks[report])))
    return "; ".join(f"{_listed(ranks[report])}: {report}" for report in order)


def _listed(ranks: list[int], most: int = 8) -> str:
    more = f" and {len(ranks) - most} more" if len(ranks) > most else ""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:most]))}{more}"


def _exit(message: str | None) -> None:
    with contextlib.suppress(Exception):
        sys.stderr.write(f"nanomai: {message}\n" if message else "")
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(1)  # the main thread hears nothing


class Slowest(NamedTuple):
    """The rank of which there is most, that much, and the median of all ranks."""

    rank: int
    value: float
    median: float


def slowest(mesh: Mesh, *mine: float) -> list[Slowest]:
    """Of each number that this rank has measured, the largest of all ranks. Collective; no device is waited for."""
    table = torch.tensor(mesh.from_all(lambda: mine), dtype=torch.float64)  # (rank, number)
    largest, medians = table.max(0), table.quantile(0.5, dim=0)
    return [*map(Slowest, largest.indices.tolist(), largest.values.tolist(), medians.tolist())]
