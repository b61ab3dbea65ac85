"""Token shards on disk: how they are written, and everything that is checked before one is used.

A prepared corpus is a folder of shards (`*.bin`: a header of 256 bytes, then token ids) and a `manifest.json` that
lists them. Both are written by rename, so that a stopped machine leaves whole files or none.

A document is stored as `[end_of_text] + tokens`: the end-of-text token opens it. `data.py` says what follows from that.
(The tokens begin with the begin-of-text token of a published tokenizer that has one.)
"""

from __future__ import annotations

import json
import os
import signal
import struct
import threading
from collections.abc import Callable
from hashlib import blake2b
from multiprocessing import parent_process
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nanomai.files import allow_open_files, write_atomically
from nanomai.tokenizer import Tokenizer

_HEADER = struct.Struct("<8sIIQQQ64s64s32s")
_MAGIC, _VERSION, _HEADER_BYTES = b"nanomai\0", 1, 256
_REPAIR = "delete its folder and run `nanomai prepare` again"


class DataError(ValueError):
    """Prepared data that cannot be used: one line that names the file and what to do."""


class Header(NamedTuple):
    """The first 256 bytes of a shard, little-endian; the tokens follow, `item_bytes` (2 or 4) each."""

    magic: bytes
    version: int
    item_bytes: int
    vocab_size: int
    n_tokens: int
    n_bytes: int  # of the text inside, in UTF-8
    tokenizer_hash: str
    text_hash: str  # of the documents inside, so that an interrupted `prepare` knows what is finished
    checksum: str  # blake2b of the tokens


def write_file(path: Path, *parts: bytes | memoryview) -> None:
    """Write a file of prepared data, whole or not at all. Raises DataError."""
    try:
        write_atomically(path, *parts)
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror}") from None


def write_shard(path: Path, tokens: np.ndarray, tokenizer_hash: str, vocab_size: int, n_bytes: int = 0,
                text_hash: str = "") -> Header:
    """Write 1-d token ids as one shard, in 16 bits where the vocabulary allows it."""
    tokens = np.ascontiguousarray(tokens, dtype="<u2" if vocab_size <= 2**16 else "<u4")
    header = Header(_MAGIC, _VERSION, tokens.itemsize, vocab_size, len(tokens), n_bytes, tokenizer_hash, text_hash,
                    _digest(tokens))
    packed = _HEADER.pack(*(value.encode() if isinstance(value, str) else value for value in header))
    write_file(path, packed.ljust(_HEADER_BYTES, b"\0"), tokens.data)
    return header


def encode_shard(path: Path, texts: list[str], text_hash: str, tokenizer: Tokenizer,
                 map_: Callable = map) -> Header:
    """Tokenize documents and write them as one shard. `map_` may be a thread pool's: tiktoken frees the GIL."""
    opening = dict.fromkeys([tokenizer.end_of_text, *tokenizer.opening])  # "</s><s>", or one that is both

    def encode(text: str) -> np.ndarray:
        return np.array([*opening, *tokenizer.encode(text)], np.uint32)

    tokens = np.concatenate(list(map_(encode, texts)))
    n_bytes = sum(len(text.encode("utf-8")) for text in texts)
    return write_shard(path, tokens, tokenizer.hash, tokenizer.vocab_size, n_bytes, text_hash)


def start_worker(tokenizer: Tokenizer) -> None:
    """Make this process ready for `encode_in_worker`."""
    global _tokenizer
    _tokenizer = tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's: what is under way here is finished

    def end_with_parent() -> None:
        parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()  # a parent killed with -9 cannot end us


def encode_in_worker(path: Path, texts: list[str], text_hash: str) -> Header:
    """`encode_shard` with the tokenizer of this process."""
    return encode_shard(path, texts, text_hash, _tokenizer)


def read_header(path: Path) -> Header:
    """The header of a shard whose size is right. Raises DataError."""
    if not path.is_file():
        raise DataError(f"{path} is missing; {_REPAIR}")
    with path.open("rb") as file:
        packed = file.read(_HEADER_BYTES)
    if not packed.startswith(_MAGIC) and not _MAGIC.startswith(packed):
        raise DataError(f"{path} is not a token shard; {_REPAIR}")
    if len(packed) < _HEADER_BYTES:
        raise DataError(f"{path} is truncated; {_REPAIR}")
    fields = _HEADER.unpack_from(packed)
    header = Header(*fields[:6], *(text.rstrip(b"\0").decode("ascii", "replace") for text in fields[6:]))
    if header.version != _VERSION:
        raise DataError(f"{path} has shard version {header.version}, not {_VERSION}; {_REPAIR}")
    if path.stat().st_size != _HEADER_BYTES + header.n_tokens * header.item_bytes:
        raise DataError(f"{path} is truncated; {_REPAIR}")
    if header.n_tokens == 0:
        raise DataError(f"{path} is empty; {_REPAIR}")
    return header


def read_manifest(folder: Path | str) -> dict:
    """The manifest of a prepared corpus: what `prepare` writes last. Its "hash" is the identity of the data."""
    path = Path(folder) / "manifest.json"
    try:
        manifest = json.loads(path.read_bytes())
        intact = manifest["hash"] == manifest_hash(manifest)
    except FileNotFoundError:
        raise DataError(f"{path} is missing; run `nanomai prepare`") from None
    except (ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        raise DataError(f"{path} is corrupt; {_REPAIR}")
    return manifest


def manifest_hash(manifest: dict) -> str:
    """The hash of everything in a manifest but its own "hash"."""
    content = {key: value for key, value in manifest.items() if key != "hash"}
    return _digest(json.dumps(content, sort_keys=True).encode())


def open_shards(folder: Path | str, split: str, verify: bool = True) -> list[list[np.ndarray]]:
    """The tokens of each source's shards, memory-mapped. Everything is checked before anything is used.

    `verify` reads all of it once, about 1 GB/s, and compares checksums; sizes and headers are always checked.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    allow_open_files()  # each mapped shard is one for the length of the run
    return [[_open_shard(folder / entry["file"], entry, manifest["tokenizer_hash"], verify)
             for entry in source["splits"][split]["shards"]] for source in manifest["sources"]]


def _open_shard(path: Path, entry: dict, tokenizer_hash: str, verify: bool) -> np.ndarray:
    header = read_header(path)
    if header.tokenizer_hash != tokenizer_hash:
        raise DataError(f"{path} was made with another tokenizer; {_REPAIR}")
    if (header.n_tokens, header.checksum) != (entry["tokens"], entry["checksum"]):
        raise DataError(f"{path} is not the shard that manifest.json lists; {_REPAIR}")
    tokens = np.memmap(path, f"<u{header.item_bytes}", "r", _HEADER_BYTES, (header.n_tokens,))
    if verify and _digest(tokens) != header.checksum:
        raise DataError(f"{path} is corrupt (its checksum is wrong); {_REPAIR}")
    return np.asarray(tokens)  # a plain array: np.memmap is ten times slower to slice


def _digest(data: bytes | np.ndarray) -> str:
    return blake2b(data, digest_size=16).hexdigest()
