"""The loader: it turns the number of a sample into the same sample every time.

A document is stored as `[end_of_text] + tokens`. The end-of-text token opens a document, so that counting these
tokens numbers the documents of a window; and as the last *target* of the document before, it is the signal to stop,
which must be trained. No other target belongs to another document than its input, so none has to be masked: -100,
the index that the loss ignores, only fills up the last windows of an evaluation.

Letters: T sequence length, B batch, S sources. A *window* is T + 1 tokens of one shard, the next begins T further; it
gives one *sample*: T inputs and T targets.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from nanomai.shards import DataError, open_shards, read_manifest

IGNORE = -100
BLOCK = 1024
"""Samples in a block, the unit in which a mixture's shares are exact."""


class Batch(NamedTuple):
    """What one step reads."""

    ids: torch.Tensor  # (B, T) int64
    targets: torch.Tensor  # (B, T) int64: the token after each of ids, or IGNORE
    document_ids: torch.Tensor  # (B, T) int32: it rises by one where a document begins


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64: each bit of the result depends on every bit of x, a uint64 array (Steele et al. 2014)."""
    x = (x + _GOLDEN).astype(np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def make_key(*numbers: int | np.ndarray) -> np.ndarray:
    """One uint64 key for each tuple of whole numbers; arrays are broadcast."""
    key = np.zeros(1, np.uint64)
    for number in numbers:
        key = _mix(key ^ np.atleast_1d(np.asarray(number)).astype(np.uint64))
    return key


def permute(index: np.ndarray, n: int, key: np.ndarray) -> np.ndarray:
    """The image of each index under the bijection of range(n) that `key` names, without ever listing it.

    A Feistel network on the smallest even number of bits that holds n; what falls outside goes round again
    (cycle walking, Black and Rogaway 2002). `key` is one uint64, or one for each index.
    """
    rounds = _mix(np.arange(4, dtype=np.uint64))
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)

    def network(x: np.ndarray, key: np.ndarray) -> np.ndarray:
        left, right = x >> half, x & mask
        for constant in rounds:
            left, right = right, left ^ (_mix(right ^ key ^ constant) & mask)
        return left << half | right

    key = np.broadcast_to(key, np.shape(index))
    x = network(np.asarray(index).astype(np.uint64), key)
    while (outside := np.flatnonzero(x >= n)).size:
        x[outside] = network(x[outside], key[outside])
    return x.astype(np.int64)


class Windows:
    """One split of one source as windows of T + 1 tokens; with `partial`, the rest of each shard is one more."""

    def __init__(self, shards: list[np.ndarray], sequence_length: int, partial: bool = False):
        self.shards, self.sequence_length = shards, sequence_length
        counts = [(len(shard) - 1 + partial * (sequence_length - 1)) // sequence_length for shard in shards]
        self.ends = np.cumsum(counts, dtype=np.int64)
        self.starts = self.ends - counts

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def rows(self, windows: np.ndarray) -> np.ndarray:
        """(B,) numbers of windows -> (B, T + 1) int64 tokens, filled up with IGNORE."""
        rows = np.full((len(windows), self.sequence_length + 1), IGNORE, np.int64)
        shards = np.searchsorted(self.ends, windows, "right")
        starts = (windows - self.starts[shards]) * self.sequence_length
        for row, shard, start in zip(rows, shards.tolist(), starts.tolist(), strict=True):
            tokens = self.shards[shard][start : start + len(row)]
            row[: len(tokens)] = tokens
        return rows


def make_batch(rows: np.ndarray, end_of_text: int) -> Batch:
    """(B, T + 1) tokens -> inputs, targets and document numbers. IGNORE is only ever a target."""
    # numpy, not torch: torch would give the loader's thread a second team of OpenMP threads, against the training's
    ids = np.where(rows[:, :-1] == IGNORE, end_of_text, rows[:, :-1])
    document_ids = np.cumsum(ids == end_of_text, axis=1, dtype=np.int32)
    return Batch(*map(torch.from_numpy, (ids, rows[:, 1:].copy(), document_ids)))


class Phase(NamedTuple):
    """A run of equal blocks: from sample `start` on, each block holds quotas[s] samples of source s."""

    start: int
    quotas: np.ndarray  # (S,) int64
    before: np.ndarray  # (S,) int64: samples of each source that came before `start`


def plan_mixture(weights: Iterable[float], available: Iterable[int | None]) -> tuple[list[Phase], int | None]:
    """The phases of a mixture and the number of samples in it, None if it never ends.

    A source gives no more than `available` samples (None: no limit); from the block in which it runs out, its share
    goes to the others in proportion to their weights.
    """
    weights = np.array(list(weights), float)
    left = np.array([np.inf if limit is None else limit for limit in available])
    phases, start, before = [], 0, np.zeros(len(weights), np.int64)
    while left.any():
        quotas = _block_quotas(weights, left)
        phases.append(Phase(start, quotas, before))
        blocks = np.floor(min(left[quotas > 0] / quotas[quotas > 0]))
        if np.isinf(blocks):
            return phases, None
        taken = int(blocks) * quotas
        start, before, left = start + int(taken.sum()), before + taken, left - taken
    return phases, start


def _block_quotas(weights: np.ndarray, left: np.ndarray) -> np.ndarray:
    """(S,) samples of each source in the next block: the largest remainders of its share, never more than are left."""
    quotas, settled = np.zeros(len(weights), np.int64), left == 0
    while True:
        size = int(min(BLOCK - quotas[settled].sum(), left[~settled].sum()))
        share = np.where(settled, 0, weights) / weights[~settled].sum() * size
        quotas = np.where(settled, quotas, share.astype(np.int64))
        largest = np.argsort(share.astype(np.int64) - share, kind="stable")
        quotas[largest[: size - quotas[~settled].sum()]] += 1
        short = quotas > left
        if not short.any():
            return quotas
        quotas[short] = left[short]  # and its missing part goes to the others
        settled |= short


def run_ahead(pool: Executor, function: Callable, jobs: Iterable[tuple], depth: int) -> Iterator:
    """`function(*job)` for each job, in order, while up to `depth` later ones are under way in the pool."""
    running = deque()
    for job in jobs:
        running.append(pool.submit(function, *job))
        if len(running) > depth:
            yield running.popleft().result()
    while running:
        yield running.popleft().result()


class Loader:
    """The training samples of a prepared corpus, numbered from 0.

    Sample i is a pure function of `identity` (the data, the mixture, the seed and T) and of i: it depends on no world
    size, batch size, worker or history, so the number of samples consumed is the whole state. In an epoch of a source
    each of its windows comes exactly once, and before any comes again. `weights` and `max_epochs` have one entry for
    each source of the manifest.
    """

    def __init__(self, folder: Path | str, sequence_length: int, seed: int = 0, weights: Sequence[float] | None = None,
                 max_epochs: Sequence[float | None] | None = None, verify: bool = True):
        manifest = read_manifest(folder)
        self.sources = [Windows(shards, sequence_length) for shards in open_shards(folder, "train", verify)]
        weights, max_epochs = weights or [1.0] * len(self.sources), max_epochs or [None] * len(self.sources)
        names = [source["name"] for source in manifest["sources"]]
        for name, windows in zip(names, self.sources, strict=True):
            if not len(windows):
                raise DataError(f"{name} has {sum(map(len, windows.shards))} training tokens, too few for a window of "
                                f"{sequence_length + 1}; give more text or a shorter train.sequence_length")
        limits = [share and int(share * len(part)) for share, part in zip(max_epochs, self.sources, strict=True)]
        self.phases, self.n_samples = plan_mixture(weights, limits)
        for name, quota in zip(names, self.phases[0].quotas if self.phases else [0], strict=False):
            if not quota:
                raise DataError(f"{name} gets none of the {BLOCK} samples of a block; raise its weight or max_epochs")
        self.seed, self.end_of_text = seed, manifest["end_of_text"]
        stream = [manifest["hash"], list(weights), list(max_epochs), seed, sequence_length]
        self.identity = blake2b(json.dumps(stream).encode(), digest_size=16).hexdigest()
        self._block = lru_cache(4)(self._locate)  # many batches share a block

    def require(self, n_samples: int) -> None:
        """Raise DataError, before a run begins, if max_epochs leaves fewer samples than it needs."""
        if self.n_samples is not None and n_samples > self.n_samples:
            raise DataError(f"the run needs {n_samples} samples and max_epochs allows {self.n_samples}; "
                            "raise max_epochs in data.corpus or lower train.steps")

    def samples(self, start: int, count: int) -> Batch:
        """Samples start .. start + count - 1, at least one. Raises DataError beyond `n_samples`."""
        self.require(start + count)
        blocks = range(start // BLOCK, (start + count - 1) // BLOCK + 1)
        here = slice(start % BLOCK, start % BLOCK + count)
        sources, windows = (np.concatenate(parts)[here] for parts in zip(*map(self._block, blocks), strict=True))
        rows = np.empty((count, self.sources[0].sequence_length + 1), np.int64)
        for s in np.unique(sources):
            rows[sources == s] = self.sources[s].rows(windows[sources == s])
        return make_batch(rows, self.end_of_text)

    def batches(self, start: int, counts: Iterable[int], rank: int = 0, world: int = 1,
                depth: int = 4) -> Iterator[Batch]:
        """One batch a step, prepared ahead by a thread: this rank's contiguous part of `count` samples.

        `counts` gives the samples of each step over all ranks, so that the batch size may change on the way.
        """
        with ThreadPoolExecutor(1, "loader") as pool:
            yield from run_ahead(pool, self.samples, rank_spans(start, counts, rank, world), depth)

    def _locate(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """(<= BLOCK,) sources and (<= BLOCK,) windows in them, of the samples of one block in order."""
        start, quotas, before = next(phase for phase in reversed(self.phases) if phase.start <= block * BLOCK)
        size = int(quotas.sum())
        order = permute(np.arange(size), size, make_key(self.seed, 0, block))
        sources, windows = np.searchsorted(np.cumsum(quotas), order, "right"), np.empty(size, np.int64)
        for s in np.flatnonzero(quotas):  # each source goes on where it was, so that no epoch overlaps the next
            n = len(self.sources[s])
            first = before[s] + (block - start // BLOCK) * quotas[s]
            epoch, index = np.divmod(np.arange(first, first + quotas[s]), n)
            windows[sources == s] = permute(index, n, make_key(self.seed, 1 + s, epoch))
        return sources, windows


def rank_spans(start: int, counts: Iterable[int], rank: int, world: int) -> Iterator[tuple[int, int]]:
    """(first sample, samples) of one rank for each step of `counts` samples over all ranks."""
    for count in counts:
        if count % world:
            raise DataError(f"a batch of {count} samples cannot be shared by {world} ranks; "
                            f"make train.batch_tokens a multiple of {world} sequences")
        yield start + rank * count // world, count // world
        start += count


class Validation:
    """The validation split in order: each token is predicted exactly once, but for the first of each shard."""

    def __init__(self, folder: Path | str, sequence_length: int, verify: bool = True):
        shards = [shard for source in open_shards(folder, "val", verify) for shard in source]
        self.windows = Windows(shards, sequence_length, partial=True)
        self.end_of_text = read_manifest(folder)["end_of_text"]
        if not len(self.windows):
            raise DataError(f"{folder} has no validation text; raise data.val_fraction")

    def batches(self, batch_size: int, n_windows: int | None = None, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """Batches of up to `batch_size` windows, of all windows or of `n_windows` spread evenly over them.

        With several ranks each gets its part of every step; all get batches of the same shape, the last filled up
        with rows that have no target, since sharded models must run in step.
        """
        total = len(self.windows)
        n_windows = min(n_windows or total, total)
        chosen = np.arange(n_windows) * total // n_windows
        for start in range(0, n_windows, batch_size * world):
            step = chosen[start : start + batch_size * world]
            share = -(-len(step) // world)
            mine = self.windows.rows(step[rank * share : (rank + 1) * share])
            rows = np.pad(mine, ((0, share - len(mine)), (0, 0)), constant_values=IGNORE)
            yield make_batch(rows, self.end_of_text)


def timed(batches: Iterator[Batch]) -> Iterator[tuple[float, Batch]]:
    """Each batch, and when it was asked for."""
    asked_at = time.perf_counter()
    for batch in batches:
        yield asked_at, batch
        asked_at = time.perf_counter()
