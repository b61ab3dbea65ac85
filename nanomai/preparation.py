"""Prepare a corpus: documents to tokens to shards, once. The next run with the same text and tokenizer finds them.

    data/NAME-HASH/             HASH of the sources' files (names, sizes, times), the split and the tokenizer
        tokenizer.json          trained here, or a copy of the one that was asked for
        train-0-00000.bin       split, source of the mixture, number; at most `shard_bytes` of text each
        manifest.json           written last: what is here, how much, from where, and the hash that is its identity

Weights and epoch caps of a mixture are not part of it: another mixture of the same sources is ready at once.
"""

from __future__ import annotations

import contextlib
import json
import platform
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from hashlib import blake2b
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from nanomai.config import ConfigError, DataConfig
from nanomai.corpus import Document, Source, documents, fingerprint, parse_mixture, source_bytes
from nanomai.data import Loader, Validation, run_ahead
from nanomai.machine import usable_cores
from nanomai.pretrained import load_tokenizer
from nanomai.shards import (
    DataError,
    Header,
    encode_in_worker,
    encode_shard,
    manifest_hash,
    read_header,
    read_manifest,
    start_worker,
    write_file,
)
from nanomai.tokenizer import Tokenizer, train_bpe

SHARD_BYTES = 64 * 2**20
"""Of text: some 16 million tokens, 32 MB on disk."""
SAMPLE_BYTES = 16 * 2**20
"""Of training text that a tokenizer is trained on, in equal parts from each source."""
THREADS_BELOW = 100 * 10**6
"""Bytes of text up to which threads are quicker: new processes need seconds to start, and a thread encodes 10 to 30
megabytes a second. Beyond it processes are, since threads wait for each other where lists of ids become arrays."""


@dataclass(frozen=True)
class Prepared:
    """A corpus ready for training. `manifest` is described in `_write_manifest`."""

    folder: Path
    tokenizer: Tokenizer
    manifest: dict
    sources: tuple[Source, ...]

    def loader(self, sequence_length: int, seed: int = 0, verify: bool = True) -> Loader:
        """The training samples, in the mixture that the configuration asked for."""
        weights, max_epochs = [s.weight for s in self.sources], [s.max_epochs for s in self.sources]
        return Loader(self.folder, sequence_length, seed, weights, max_epochs, verify)

    def validation(self, sequence_length: int, verify: bool = True) -> Validation:
        """The validation windows of all sources together."""
        return Validation(self.folder, sequence_length, verify)


def prepare(config: DataConfig, vocab_size: int, shard_bytes: int = SHARD_BYTES, show: bool = True) -> Prepared:
    """Find the prepared corpus in `config.folder`, or make it; `vocab_size` is the model's.

    A call that was stopped, even by kill -9, is continued by the next one: finished shards stay. Raises ConfigError,
    CorpusError, TokenizerError or DataError, each with one line that says what to do.
    """
    sources = parse_mixture(config.corpus)
    folder = Path(config.folder) / _folder_name(sources, config, vocab_size, shard_bytes)
    saved = folder / "tokenizer.json"
    tokenizer = load_tokenizer(saved) if saved.exists() else _make_tokenizer(sources, config, vocab_size, show)
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(f"tokenizer {config.tokenizer!r} has {tokenizer.vocab_size} tokens and the model only "
                          f"{vocab_size}; set model.vocab_size to {tokenizer.vocab_size} or more", "model.vocab_size")
    if not (folder / "manifest.json").exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tokenizer.save(saved)
        except OSError as error:
            raise ConfigError(f"{folder} cannot be written: {error.strerror}; set data.folder", "data.folder") from None
        _write_everything(sources, config, folder, tokenizer, shard_bytes, show)
    manifest = read_manifest(folder)
    if manifest["tokenizer_hash"] != tokenizer.hash:
        raise DataError(f"{saved} is not the tokenizer of {folder}; delete the folder and run `nanomai prepare` again")
    return Prepared(folder, tokenizer, manifest, sources)


def _folder_name(sources: tuple[Source, ...], config: DataConfig, vocab_size: int, shard_bytes: int) -> str:
    tokenizer: Any = config.tokenizer
    if tokenizer == "bpe":
        tokenizer = ["bpe", vocab_size]
    elif Path(tokenizer).is_file():
        tokenizer = load_tokenizer(tokenizer).hash
    key = [[fingerprint(source) for source in sources], config.text_field, config.val_fraction, tokenizer, shard_bytes]
    label = re.sub(r"[^\w.-]+", "-", Path(sources[0].name).stem)[:40] + f"-and-{len(sources) - 1}" * (len(sources) > 1)
    return f"{label}-{blake2b(json.dumps(key).encode(), digest_size=6).hexdigest()}"


def _make_tokenizer(sources: tuple[Source, ...], config: DataConfig, vocab_size: int, show: bool) -> Tokenizer:
    if config.tokenizer != "bpe":
        return load_tokenizer(config.tokenizer)
    with Progress(disable=not show) as progress:
        task = progress.add_task(f"training a tokenizer of {vocab_size} tokens", total=None)
        return train_bpe(_training_sample(sources, config), vocab_size,
                         progress=lambda done, total: progress.update(task, completed=done, total=total))


def _training_sample(sources: tuple[Source, ...], config: DataConfig) -> Iterator[str]:
    for source in sources:
        left = SAMPLE_BYTES // len(sources)
        for document in documents(source, config):
            if document.split == "train" and left > 0:
                yield document.text[:left]
                left -= len(document.text)
            if left <= 0:
                break


@dataclass
class _Part:
    """The documents of one shard, while they are gathered."""

    path: Path
    texts: list[str] = field(default_factory=list)
    size: int = 0  # bytes of text
    digest: Any = field(default_factory=lambda: blake2b(digest_size=16))

    def add(self, text: str, data: bytes) -> None:
        self.texts.append(text)
        self.size += len(data)
        self.digest.update(b"%d\0" % len(data) + data)

    def is_finished(self, tokenizer: Tokenizer) -> bool:
        try:
            header = read_header(self.path)
        except DataError:
            return False
        return (header.text_hash, header.tokenizer_hash) == (self.digest.hexdigest(), tokenizer.hash)


@dataclass
class _Facts:
    """What is recorded of one source while its documents pass."""

    shards: dict[str, list[Path]] = field(default_factory=lambda: {"train": [], "val": []})
    documents: Counter = field(default_factory=Counter)
    bytes: Counter = field(default_factory=Counter)
    licences: set = field(default_factory=set)
    digest: Any = field(default_factory=lambda: blake2b(digest_size=16))

    def add(self, document: Document, data: bytes) -> None:
        self.documents[document.split] += 1
        self.bytes[document.split] += len(data)
        self.licences.add(document.licence)
        name = document.name.encode("utf-8", "surrogateescape")
        self.digest.update(b"%d %d\0" % (len(name), len(data)) + name + data)


def _parts(stream: Iterable[Document], number: int, folder: Path, facts: _Facts, shard_bytes: int) -> Iterator[_Part]:
    """Gather the documents of source `number` into parts of at most `shard_bytes`, always the same ones."""
    parts: dict[str, _Part] = {}
    for document in stream:
        data, split = document.text.encode("utf-8"), document.split
        facts.add(document, data)
        if split in parts and parts[split].size + len(data) > shard_bytes:
            yield parts.pop(split)
        if split not in parts:
            facts.shards[split].append(folder / f"{split}-{number}-{len(facts.shards[split]):05d}.bin")
            parts[split] = _Part(facts.shards[split][-1])
        parts[split].add(document.text, data)
    yield from parts.values()


def _write_everything(sources: tuple[Source, ...], config: DataConfig, folder: Path, tokenizer: Tokenizer,
                      shard_bytes: int, show: bool) -> None:
    sizes = [source_bytes(source) for source in sources]
    total = None if None in sizes else sum(sizes)
    began, facts = time.time(), [_Facts() for _ in sources]
    parts = (part for number, source in enumerate(sources)
             for part in _parts(documents(source, config), number, folder, facts[number], shard_bytes))
    workers = config.workers or usable_cores()
    in_process = workers == 1 or (total is not None and total < THREADS_BELOW)
    columns = "{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    with Progress(*columns, disable=not show) as progress:
        task = progress.add_task(f"tokenizing {config.corpus}", total=total)
        started, written = time.perf_counter(), 0
        for header in _write_parts(_unfinished(parts, tokenizer, progress), tokenizer, workers, in_process):
            progress.advance(task, header.n_bytes)
            written += header.n_bytes
        if show and written > 10**6:
            speed = written / (time.perf_counter() - started)
            progress.console.print(f"{speed / 1e6:.1f} MB/s with {workers} {'threads' if in_process else 'processes'}; "
                                   f"a terabyte would take this machine {_duration(1e12 / speed)}")
    _check_splits(sources, config, facts)
    _write_manifest(sources, folder, tokenizer, facts)
    for leftover in folder.glob("*.tmp"):  # of a killed call; one that is alive holds a file for less than a second
        with contextlib.suppress(FileNotFoundError):
            if leftover.stat().st_mtime < began - 1:
                leftover.unlink()


def _unfinished(parts: Iterable[_Part], tokenizer: Tokenizer, progress: Progress) -> Iterator[_Part]:
    for part in parts:
        if part.is_finished(tokenizer):
            progress.advance(progress.task_ids[0], part.size)
        else:
            yield part


def _write_parts(parts: Iterable[_Part], tokenizer: Tokenizer, workers: int, in_process: bool) -> Iterator[Header]:
    jobs = ((part.path, part.texts, part.digest.hexdigest()) for part in parts)
    if in_process:
        with ThreadPoolExecutor(workers) as pool:
            for job in jobs:
                yield encode_shard(*job, tokenizer, pool.map)
        return
    # spawn, not fork: torch has threads by now, and a fork may inherit a lock that nobody will release
    with ProcessPoolExecutor(workers, get_context("spawn"), start_worker, (tokenizer,)) as pool:
        try:
            yield from run_ahead(pool, encode_in_worker, jobs, workers + 2)
        except BrokenProcessPool:
            raise DataError("a tokenizing process died: it had no memory, or the script that called this has no "
                            "`if __name__ == '__main__':`; data.workers 1 does without processes") from None
        finally:
            pool.shutdown(cancel_futures=True)  # after Ctrl-C wait for what is under way, not for what is queued


def _check_splits(sources: tuple[Source, ...], config: DataConfig, facts: list[_Facts]) -> None:
    for source, fact in zip(sources, facts, strict=True):
        if not fact.documents:
            raise ConfigError(f"corpus {source.path!r} holds no text", "data.corpus")
        if not fact.documents["train"]:
            raise ConfigError(f"corpus {source.path!r} has no document left to train on: lower data.val_fraction "
                              "or add documents", "data.val_fraction")
    if not any(fact.documents["val"] for fact in facts):
        raise ConfigError(f"corpus {config.corpus!r} has no document in validation: raise data.val_fraction "
                          "or add documents", "data.val_fraction")


def _write_manifest(sources: tuple[Source, ...], folder: Path, tokenizer: Tokenizer, facts: list[_Facts]) -> None:
    """Tokenizer, interpreter, and for each source its licences, hash, and splits with their counts and shards."""
    manifest = {"version": 1, "tokenizer_hash": tokenizer.hash, "vocab_size": tokenizer.vocab_size,
                "end_of_text": tokenizer.end_of_text, "sources": []}
    for source, fact in zip(sources, facts, strict=True):
        splits = {}
        for split, paths in fact.shards.items():
            headers = [read_header(path) for path in paths]
            shards = [{"file": path.name, "tokens": header.n_tokens, "checksum": header.checksum}
                      for path, header in zip(paths, headers, strict=True)]
            splits[split] = {"documents": fact.documents[split], "bytes": fact.bytes[split],
                             "tokens": sum(header.n_tokens for header in headers), "shards": shards}
        interpreter = f"Python {platform.python_version()}" if source.path == "stdlib" else None
        manifest["sources"].append({"name": source.name, "licences": sorted(fact.licences),
                                    "interpreter": interpreter, "hash": fact.digest.hexdigest(), "splits": splits})
    manifest["hash"] = manifest_hash(manifest)
    write_file(folder / "manifest.json", json.dumps(manifest, indent=1).encode())


def _duration(seconds: float) -> str:
    hours = seconds / 3600
    return f"{hours / 24:.1f} days" if hours > 48 else f"{hours:.1f} hours"
