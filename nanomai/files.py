"""Files that are whole or absent, whenever the machine stops, and as many as the machine lets a process open."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

try:
    import resource
except ImportError:  # Windows, which has no such limit
    resource = None


def write_atomically(path: Path, *parts: bytes | memoryview) -> None:
    """Writes `path` under another name, flushes it to the disk and renames it. Raises OSError, and leaves nothing."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def flush_folder(folder: Path) -> None:
    """Makes the names in `folder` survive a power cut, where the system can (Windows cannot open a folder)."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def allow_open_files() -> None:
    """As many as the system lets this process have.

    The usual limit of 1,024 ends at some 16 billion tokens, whose mapped shards are one each, and at as many ranks, to
    each of which there is a connection.
    """
    if resource is not None:
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        with contextlib.suppress(ValueError, OSError):  # macOS reports more than it grants
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
