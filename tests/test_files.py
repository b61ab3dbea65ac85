"""Writing files: whole or absent, whatever fails."""

import os
import threading

import pytest

from nanomai.files import flush_folder, write_atomically


def test_parts_make_one_file(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, b"one ", memoryview(b"two"))
    assert path.read_bytes() == b"one two"
    write_atomically(path)
    assert path.read_bytes() == b"" and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("broken", ["fsync", "rename"])
def test_a_failure_leaves_the_old_file(tmp_path, monkeypatch, broken):
    def fail(*_):
        raise OSError("the disk is gone")

    path = tmp_path / "file"
    path.write_bytes(b"old")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="the disk is gone"):
        patch.setattr(*((os, "fsync") if broken == "fsync" else (type(path), "replace")), fail)
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_a_reader_never_sees_half(tmp_path):
    path, seen, done = tmp_path / "file", set(), threading.Event()

    def read():
        while not done.is_set():
            seen.add(path.read_bytes())

    write_atomically(path, b"a" * 100_000)
    reader = threading.Thread(target=read)
    reader.start()
    for letter in (b"b", b"c", b"d"):
        write_atomically(path, letter * 100_000)
    done.set()
    reader.join()
    assert all(len(data) == 100_000 and len(set(data)) == 1 for data in seen)


def test_flush_folder(tmp_path):
    flush_folder(tmp_path)
    with pytest.raises(FileNotFoundError):
        flush_folder(tmp_path / "none")
