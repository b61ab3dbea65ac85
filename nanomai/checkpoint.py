"""Checkpoints that survive: sharded by torch.distributed.checkpoint, atomic, verified before they are believed.

    checkpoints/step-00000200/
        __0_0.distcp .metadata     tensors, by torch.distributed.checkpoint: one layout for one rank or many
        state.json                 step, samples consumed, guard statistics, configuration
        manifest.json              size and checksum of every file above: written last

A checkpoint is written under a temporary name, flushed to the disk and renamed, so a kill at any instant leaves either
the whole of it or nothing; nothing is ever overwritten (half-old, half-new files load without an error and mix two
models). What does not verify is named, and the one before it is used.
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
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.tensor import DTensor

from nanomai.files import flush_folder, write_atomically
from nanomai.parallel.mesh import Mesh


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used: one line that names it and says what is wrong."""


def save(folder: Path, step: int, tensors: dict[str, Tensor], state: dict, keep: int = 2) -> Path:
    """Writes `folder/step-N` and then removes all but the newest `keep`.

    A good checkpoint of the same step stays as it is: the state of a run at a step is one. Raises CheckpointError
    where the disk is full or cannot be written; what was saved before is untouched.
    """
    final, temporary = _places(folder, step)
    with _explained(final, temporary):
        _begin(temporary)
        _write(tensors, temporary)
        _finish(temporary, final, state, keep)
    return final


class Saver:
    """Saves the checkpoints of a run as `save` does, on every rank together, while training goes on.

    Tensors are copied into memory of the CPU at once and written by a thread, whose collectives have a process group of
    their own: in the group of the training, its messages would meet those of the next steps. Leaving the `with` waits.
    """

    def __init__(self, folder: Path, keep: int, mesh: Mesh, device_type: str = "cpu"):
        self.folder, self.keep, self.mesh = folder, keep, mesh
        self.group = dist.new_group(backend="gloo") if mesh.world_size > 1 else None
        on_gpu = device_type == "cuda"
        self.stager = DefaultStager(StagingOptions(use_pinned_memory=on_gpu, use_non_blocking_copy=on_gpu,
                                                   use_shared_memory=False, use_async_staging=False))
        self.pool = ThreadPoolExecutor(1, "checkpoint")
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
        final, temporary = _places(self.folder, step)
        with _explained(final, temporary):
            self.mesh.from_main(lambda: _begin(temporary))
        staged = self.stager.stage(tensors)
        self.pending = self.pool.submit(self._write_staged, staged, state, temporary, final)
        return final

    def wait(self) -> None:
        """Until the last save lies on the disk. Collective; raises CheckpointError if any rank could not write."""
        pending, self.pending = self.pending, None
        if pending is not None:
            self.mesh.from_main(pending.result)  # rank 0 hears of every rank's trouble
            pending.exception()

    def _write_staged(self, tensors: dict[str, Tensor], state: dict, temporary: Path, final: Path) -> None:
        with _explained(final, temporary):
            _write(tensors, temporary, self.group)
            if self.mesh.is_main:
                _finish(temporary, final, state, self.keep)


def _places(folder: Path, step: int) -> tuple[Path, Path]:
    """Where a checkpoint will be, and where it is written."""
    return folder / f"step-{step:08d}", folder / f".writing-step-{step:08d}"


def _write(tensors: dict[str, Tensor], temporary: Path, group: dist.ProcessGroup | None = None) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # of one process, and fine
        dcp.save(tensors, storage_writer=FileSystemWriter(temporary), process_group=group, no_dist=group is None)


@contextlib.contextmanager
def _explained(final: Path, temporary: Path) -> Iterator[None]:
    """CheckpointError for what a disk may refuse."""
    try:
        yield
    except (OSError, CheckpointException) as error:
        shutil.rmtree(temporary, ignore_errors=True)  # what it holds of a full disk is given back
        raise CheckpointError(f"{final} cannot be written: {_cause(error)}; what was saved before is good") from None


def _begin(temporary: Path) -> None:
    for killed in temporary.parent.glob(".writing-*"):
        shutil.rmtree(killed, ignore_errors=True)
    temporary.mkdir(parents=True)


def _finish(temporary: Path, final: Path, state: dict, keep: int) -> None:
    """Seals what all ranks have written, moves it into place and removes what is superseded."""
    folder = final.parent
    write_atomically(temporary / "state.json", json.dumps(state).encode())
    checksums = _checksums(sorted(temporary.iterdir()))
    files = {name: {"bytes": (temporary / name).stat().st_size, "blake2b": found} for name, found in checksums.items()}
    write_atomically(temporary / "manifest.json", json.dumps({"files": files}, indent=1).encode())
    flush_folder(temporary)
    if _is_good(final):
        shutil.rmtree(temporary)
    else:
        if final.exists():  # damaged
            shutil.rmtree(final)
        os.rename(temporary, final)
    flush_folder(folder)
    older = [path for path in _all(folder) if path.name < final.name]
    newer = [path for path in _all(folder) if path.name > final.name]  # damaged, or this run would have begun there
    for path in newer + older[keep - 1 :]:
        shutil.rmtree(path)


def _is_good(path: Path) -> bool:
    try:
        verify(path)
    except CheckpointError:
        return False
    return True


def _cause(error: BaseException) -> str:
    """The operating system's words, which the library wraps with every rank's traceback and its own later trouble."""
    for failure in getattr(error, "failures", {}).values():
        error = failure[0]
    deeper = error
    while deeper is not None and not getattr(deeper, "strerror", None):
        deeper = deeper.__cause__ or deeper.__context__
    return deeper.strerror if deeper else (str(error) or type(error).__name__).splitlines()[0]


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint in `folder` that verifies, or None; and a line for each newer one that does not."""
    complaints = []
    for path in _all(folder):
        try:
            verify(path)
            return path, complaints
        except CheckpointError as error:
            complaints.append(str(error))
    return None, complaints


def verify(path: Path) -> None:
    """Raises CheckpointError unless every file of the manifest is there, whole and unchanged."""
    try:
        files = json.loads((path / "manifest.json").read_text())["files"]
        named = {name: (entry["bytes"], entry["blake2b"]) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{path}: manifest.json is missing or unreadable; the checkpoint is incomplete") from None
    for name in {".metadata", "state.json"} - named.keys():
        raise CheckpointError(f"{path}: manifest.json does not list {name}; the checkpoint is incomplete")
    for name, (size, _) in named.items():
        file = path / name
        if file.name != name or not file.is_file():
            raise CheckpointError(f"{path}: {name} is missing")
        if file.stat().st_size != size:
            raise CheckpointError(f"{path}: {name} has {file.stat().st_size} bytes, not {size}: it is truncated")
    for name, found in _checksums([path / name for name in named]).items():
        if found != named[name][1]:
            raise CheckpointError(f"{path}: {name} does not match its checksum: it is damaged")


def load(path: Path, tensors: dict[str, Tensor], mesh: Mesh | None = None) -> None:
    """Reads the checkpoint into `tensors`, in place; names and shapes must be those that were saved."""
    reader = _SafeReader(path)
    saved = reader.read_metadata().state_dict_metadata
    for name, tensor in tensors.items():
        entry = saved.get(name)
        if not isinstance(entry, TensorStorageMetadata):  # the library would unpickle any other kind blindly
            raise CheckpointError(f"{path}: no tensor {name!r}; it was saved from another model or optimizer")
        if tuple(entry.size) != tuple(tensor.shape):
            raise CheckpointError(f"{path}: {name} has shape {tuple(entry.size)} there and {tuple(tensor.shape)} here")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            dcp.load(tensors, storage_reader=reader, no_dist=mesh is None or mesh.world_size == 1)
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
            with open(Path(self.path) / ".metadata", "rb") as file:
                metadata = _MetadataUnpickler(io.BytesIO(file.read())).load()
        except Exception as error:  # bytes that are no pickle raise nearly anything
            raise CheckpointError(f"{self.path}: .metadata is not a checkpoint's: {error}") from None
        if not isinstance(metadata, Metadata) or not isinstance(metadata.state_dict_metadata, dict):
            raise CheckpointError(f"{self.path}: .metadata is not a checkpoint's: it holds something else")
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _MetadataUnpickler(pickle.Unpickler):
    """Builds plain containers, shapes, dtypes, and the data classes and enumerations of checkpoints; nothing else."""

    HOMES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")

    OTHERS = frozenset({("torch", "Size"), ("torch", "device"), ("torch.serialization", "_get_layout"),
                        ("pathlib", "PosixPath"), ("pathlib", "WindowsPath")})

    def find_class(self, module: str, name: str):
        if (module, name) in self.OTHERS:
            return super().find_class(module, name)
        if module in self.HOMES and "." not in name:
            found = super().find_class(module, name)
            if isinstance(found, type) and (dataclasses.is_dataclass(found) or issubclass(found, enum.Enum)):
                return found
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it wants to run {module}.{name}")


def _all(folder: Path) -> list[Path]:
    """Finished checkpoints, newest first. Folders of other names are not ours to use or remove."""
    ours = (p for p in folder.glob("step-*") if re.fullmatch(r"step-\d{8}", p.name) and p.is_dir())
    return sorted(ours, key=lambda p: p.name, reverse=True)


def _checksums(files: list[Path]) -> dict[str, str]:
    """By name. One core hashes about a gigabyte a second, and all ranks of a large run write terabytes."""
    with ThreadPoolExecutor() as pool:
        return dict(zip((file.name for file in files), pool.map(_checksum, files), strict=True))


def _checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
