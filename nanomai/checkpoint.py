"""Checkpoints that survive: sharded by torch.distributed.checkpoint, atomic, verified before they are believed.

    checkpoints/step-00000200/
        __0_0.distcp .metadata     tensors, by torch.distributed.checkpoint: one layout for one rank or many
        state.json                 step, samples consumed, guard statistics, configuration
        manifest.json              size and checksum of every file above: written last

A checkpoint is written under a temporary name, flushed to the disk and renamed, so a kill at any instant leaves either
the whole of it or nothing; nothing is ever overwritten (half-old, half-new files load without an error and mix two
models). What does not verify is named, and the one before it is used. Each rank sums up the file that it wrote, and a
share of those to be verified: the terabytes of a large run are too much for one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.tensor import DTensor

from nanomai.files import flush_folder, write_atomically
from nanomai.parallel.mesh import Mesh
from nanomai.parallel.watch import Watchdog

ALONE = Mesh()
# what the library says of one process; for good, since a block's end would undo what other threads set meanwhile
warnings.filterwarnings("ignore", message="torch.distributed is disabled")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used: one line that names it and says what is wrong."""


def save(folder: Path, step: int, tensors: dict[str, Tensor], state: dict, keep: int = 2) -> Path:
    """Writes `folder/step-N` and then removes all but the newest `keep`.

    A good checkpoint of the same step stays as it is: the state of a run at a step is one. Raises CheckpointError
    where the disk is full or cannot be written; what was saved before is untouched.
    """
    final = folder / f"step-{step:08d}"
    if not _is_good(final):
        _begin(final)
        _write(tensors, state, final, keep)
    return final


class Saver:
    """Saves the checkpoints of a run as `save` does, on every rank together, while training goes on.

    Tensors are copied into memory of the CPU at once and written by a thread, whose collectives have a process group of
    their own: in the group of the training, its messages would meet those of the next steps. Leaving the `with` waits.
    """

    def __init__(self, folder: Path, keep: int, mesh: Mesh, watch: Watchdog, device: torch.device):
        _require_shared(folder, mesh)
        self.folder, self.keep, self.mesh, self.watch = folder, keep, mesh, watch
        self.writers = dataclasses.replace(mesh, group=dist.new_group(backend="gloo")) if mesh.world_size > 1 else mesh
        on_gpu = device.type == "cuda"
        self.stager = lambda: DefaultStager(StagingOptions(  # for each save a new one: that of torch 2.11 serves once
            use_pinned_memory=on_gpu, use_non_blocking_copy=on_gpu, use_shared_memory=False, use_async_staging=False))
        self.pool = ThreadPoolExecutor(1, "checkpoint")
        self.thread = self.pool.submit(threading.get_ident).result()
        self.pending: Future | None = None

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is None:
            self.wait()
        self.pool.shutdown()

    def save(self, step: int, tensors: dict[str, Tensor], state: dict) -> Path:
        """Returns as soon as the numbers are copied; the path is there after `wait`. Collective."""
        self.wait()
        final = self.folder / f"step-{step:08d}"
        if not _is_good(final, self.mesh):
            self.mesh.from_main(lambda: _begin(final))
            _require_shared(_temporary(final), self.mesh)
            self.pending = self.pool.submit(_write, self.stager().stage(tensors), state, final, self.keep, self.writers)
        return final

    def wait(self) -> None:
        """Until the last save lies on the disk. Collective; raises CheckpointError if any rank could not write."""
        pending, self.pending = self.pending, None
        if pending is not None:
            self.watch.wait(pending, self.thread)
            self.mesh.from_main(pending.result)  # rank 0 hears of every rank's trouble
            pending.exception()


def _is_good(final: Path, mesh: Mesh = ALONE) -> bool:
    try:
        if there := mesh.from_main(final.exists):
            verify(final, mesh)
    except CheckpointError:
        return False
    return there


def _temporary(final: Path) -> Path:
    return final.with_name(f".writing-{final.name}")


def _begin(final: Path) -> None:
    with _explained(final):
        for useless in (*final.parent.glob(".writing-*"), *final.parent.glob(final.name)):  # killed, and damaged
            shutil.rmtree(useless, ignore_errors=True)
        _temporary(final).mkdir(parents=True)


def _write(tensors: dict[str, Tensor], state: dict, final: Path, keep: int, mesh: Mesh = ALONE) -> None:
    """Each rank sums up the file that it wrote, which its machine has in memory still. Trouble on one is all ranks'."""
    temporary = _temporary(final)
    file = temporary / f"__{mesh.rank}_0.distcp"  # as the library names it
    with _explained(final):
        dcp.save(tensors, storage_writer=FileSystemWriter(temporary), process_group=mesh.group, no_dist=not mesh.group)
        files = dict(mesh.from_all(lambda: (file.name, _entry(file))))
        if mesh.is_main:
            _finish(temporary, final, files, state, keep)


@contextlib.contextmanager
def _explained(final: Path) -> Iterator[None]:
    """CheckpointError for what a disk may refuse."""
    try:
        yield
    except (OSError, CheckpointException) as error:
        shutil.rmtree(_temporary(final), ignore_errors=True)  # what it holds of a full disk is given back
        raise CheckpointError(f"{final} cannot be written: {_cause(error)}; what was saved before is good") from None


def _finish(temporary: Path, final: Path, files: dict[str, dict], state: dict, keep: int) -> None:
    """Seals what all ranks have written, moves it into place and removes what is superseded."""
    write_atomically(temporary / "state.json", json.dumps(state).encode())
    files |= {name: _entry(temporary / name) for name in (".metadata", "state.json")}
    write_atomically(temporary / "manifest.json", json.dumps({"files": files}, indent=1).encode())
    flush_folder(temporary)
    os.rename(temporary, final)
    flush_folder(final.parent)
    older = [path for path in _all(final.parent) if path.name < final.name]
    newer = [path for path in _all(final.parent) if path.name > final.name]  # damaged, or the run had begun there
    for path in newer + older[keep - 1 :]:
        shutil.rmtree(path)


def _cause(error: BaseException) -> str:
    """The operating system's words, which the library wraps with every rank's traceback and its own later trouble."""
    for failure in getattr(error, "failures", {}).values():
        error = failure[0]
    deeper = error
    while deeper is not None and not getattr(deeper, "strerror", None):
        deeper = deeper.__cause__ or deeper.__context__
    return deeper.strerror if deeper else (str(error) or type(error).__name__).splitlines()[0]


def newest(folder: Path, mesh: Mesh = ALONE) -> tuple[Path | None, list[str]]:
    """The newest checkpoint in `folder` that verifies, or None; and a line for each newer one that does not."""
    complaints = []
    for path in mesh.from_main(lambda: _all(folder)):
        _require_shared(path, mesh)
        try:
            verify(path, mesh)
            return path, complaints
        except CheckpointError as error:
            complaints.append(str(error))
    return None, complaints


def _require_shared(folder: Path, mesh: Mesh) -> None:
    def seen() -> bool:
        """At once, or as late as a file system of a network may be to tell of what another machine has made."""
        return any(folder.is_dir() or time.sleep(seconds) for seconds in (1, 2, 4)) or folder.is_dir()

    for rank, sees in enumerate(mesh.from_all(seen)):
        if not sees:
            raise CheckpointError(f"rank {rank} does not see {folder}; all machines of a run must share its folder")


def verify(path: Path, mesh: Mesh = ALONE) -> None:
    """Raises CheckpointError unless every file of the manifest is there, whole and unchanged.

    Collective: each rank reads its share of the files, and all come to the same verdict.
    """
    mesh.from_all(lambda: _verify_share(path, mesh.rank, mesh.world_size))


def _verify_share(path: Path, rank: int, world_size: int) -> None:
    try:
        files = json.loads((path / "manifest.json").read_text())["files"]
        named = {name: {"bytes": entry["bytes"], "blake2b": entry["blake2b"]} for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{path}: manifest.json is missing or unreadable; the checkpoint is incomplete") from None
    for name in {".metadata", "state.json"} - named.keys():
        raise CheckpointError(f"{path}: manifest.json does not list {name}; the checkpoint is incomplete")
    mine = [*named][rank::world_size]  # of as many ranks as wrote it, each the file that it wrote and is to load
    for name in mine:
        if Path(name).name != name or not (path / name).is_file():
            raise CheckpointError(f"{path}: {name} is missing")
    with ThreadPoolExecutor() as pool:  # one process may read what a thousand have written
        for name, found in zip(mine, pool.map(_entry, [path / name for name in mine]), strict=True):
            if (size := named[name]["bytes"]) != found["bytes"]:
                raise CheckpointError(f"{path}: {name} has {found['bytes']} bytes, not {size}: it is truncated")
            if found != named[name]:
                raise CheckpointError(f"{path}: {name} does not match its checksum: it is damaged")


def load(path: Path, tensors: dict[str, Tensor], mesh: Mesh = ALONE) -> None:
    """Reads the checkpoint into `tensors`, in place; names and shapes must be those that were saved."""
    reader = _SafeReader(path)
    saved = reader.read_metadata().state_dict_metadata
    for name, tensor in tensors.items():
        entry = saved.get(name)
        if not isinstance(entry, TensorStorageMetadata):  # the library would unpickle any other kind blindly
            raise CheckpointError(f"{path}: no tensor {name!r}; it was saved from another model or optimizer")
        if tuple(entry.size) != tuple(tensor.shape):
            raise CheckpointError(f"{path}: {name} has shape {tuple(entry.size)} there and {tuple(tensor.shape)} here")
    try:
        dcp.load(tensors, storage_reader=reader, no_dist=mesh.world_size == 1)
    except CheckpointException as error:
        raise CheckpointError(f"{path} cannot be read: {_cause(error)}") from None
    for name, tensor in tensors.items():
        mine = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if not torch.isfinite(mine).all():
            raise CheckpointError(f"{path}: {name} holds numbers that are not finite; delete this checkpoint to go "
                                  "back to the one before")


def read_state(path: Path) -> dict:
    """What was saved beside the tensors."""
    return json.loads((path / "state.json").read_text())


class _SafeReader(FileSystemReader):
    """The library's reader, except that its pickled metadata may name the library's own classes only."""

    def read_metadata(self, *args, **kwargs):
        try:
            metadata = _MetadataUnpickler(io.BytesIO((self.path / ".metadata").read_bytes())).load()
            if not isinstance(metadata, Metadata) or not isinstance(metadata.state_dict_metadata, dict):
                raise TypeError("it holds something else")
        except Exception as error:  # bytes that are no pickle raise nearly anything
            raise CheckpointError(f"{self.path}: .metadata is not a checkpoint's: {error}") from None
        return metadata


class _MetadataUnpickler(pickle.Unpickler):
    """Builds plain containers, shapes, dtypes, and the data classes and enumerations of checkpoints; nothing else."""

    HOMES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")

    OTHERS = frozenset({("torch", "Size"), ("torch", "device"), ("torch.serialization", "_get_layout"),
                        ("pathlib", "PosixPath"), ("pathlib", "WindowsPath")})

    def find_class(self, module: str, name: str):
        if (module, name) in self.OTHERS or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        if module in self.HOMES and "." not in name:
            found = super().find_class(module, name)
            if isinstance(found, type) and (dataclasses.is_dataclass(found) or issubclass(found, enum.Enum)):
                return found
        raise pickle.UnpicklingError(f"it wants to run {module}.{name}")


def _all(folder: Path) -> list[Path]:
    """Finished checkpoints, newest first. Folders of other names are not ours to use or remove."""
    ours = (p for p in folder.glob("step-*") if re.fullmatch(r"step-\d{8}", p.name) and p.is_dir())
    return sorted(ours, key=lambda p: p.name, reverse=True)


def _entry(path: Path) -> dict:
    """What the manifest says of a file."""
    with open(path, "rb") as file:
        checksum = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    return {"bytes": path.stat().st_size, "blake2b": checksum}
