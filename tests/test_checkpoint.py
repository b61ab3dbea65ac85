"""Checkpoints: exact, atomic at every instant, and what is damaged or hostile is named and never believed."""

import dataclasses
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from nanomai import checkpoint
from nanomai.checkpoint import CheckpointError, Saver, load, newest, read_state, save, verify
from nanomai.parallel.launch import launch, process_group
from nanomai.parallel.mesh import RankFailed
from nanomai.parallel.watch import Watchdog


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {"model/a.weight": torch.randn(5, 7, generator=draw), "model/b": torch.randn(3, generator=draw).bfloat16(),
            "optimizer/a.weight/step": torch.tensor(float(seed)), "rng/cpu": draw.get_state()}


def empty() -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in tensors().items()}


def loaded(path: Path) -> dict[str, torch.Tensor]:
    found = empty()
    load(path, found)
    return found


def holds(path: Path, seed: int) -> bool:
    return all(torch.equal(a, b) for a, b in zip(loaded(path).values(), tensors(seed).values(), strict=True))


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def reseal(path: Path) -> None:
    """Makes the manifest true again after a file was changed: what an attacker would do."""
    files = {p.name: checkpoint._entry(p) for p in sorted(path.iterdir()) if p.name != "manifest.json"}
    (path / "manifest.json").write_text(json.dumps({"files": files}))


@pytest.fixture
def saved(tmp_path) -> Path:
    return save(tmp_path, 10, tensors(10), {"step": 10, "ratio": 0.1})


# --- what is saved comes back


def test_round_trip(tmp_path, saved):
    assert saved == tmp_path / "step-00000010" and holds(saved, 10)
    assert read_state(saved) == {"step": 10, "ratio": 0.1}
    assert names(tmp_path) == ["step-00000010"]
    assert newest(tmp_path) == (saved, [])
    only = {"model/b": torch.zeros(3, dtype=torch.bfloat16)}
    load(saved, only)  # the weights without the optimizer
    assert torch.equal(only["model/b"], tensors(10)["model/b"])


def test_keep(tmp_path):
    for step in (1, 2, 3, 10):
        save(tmp_path, step, tensors(step), {}, keep=2)
    assert names(tmp_path) == ["step-00000003", "step-00000010"]
    save(tmp_path, 11, tensors(11), {}, keep=1)
    assert names(tmp_path) == ["step-00000011"]


def test_a_damaged_newer_one_never_pushes_out_the_one_just_saved(tmp_path):
    for step in (1, 30):
        save(tmp_path, step, tensors(step), {})
    (tmp_path / "step-00000030" / "state.json").unlink()
    path = save(tmp_path, 25, tensors(25), {}, keep=1)
    assert newest(tmp_path) == (path, []) and names(tmp_path) == ["step-00000025"]


def test_a_good_one_of_the_same_step_stays_and_a_damaged_one_is_replaced(tmp_path, saved):
    before = saved.stat().st_ino
    save(tmp_path, 10, tensors(10), {})
    assert saved.stat().st_ino == before
    (saved / "state.json").write_text("{}")
    save(tmp_path, 10, tensors(10), {"new": 1})
    assert read_state(saved) == {"new": 1} and holds(saved, 10)


# --- killed at any instant


class Killed(BaseException):
    pass


def test_a_kill_at_any_instant_leaves_a_whole_checkpoint(tmp_path, monkeypatch):
    """Dies before the first, second, ... call that changes the disk, until a save lives to its end."""
    places = [(os, "rename"), (os, "replace"), (os, "fsync"), (os, "unlink"), (shutil, "rmtree"), (Path, "mkdir"),
              (checkpoint, "write_atomically"), (checkpoint, "_entry")]
    calls = 0

    def dying(real, deadly):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls > deadly:
                raise Killed
            return real(*args, **kwargs)
        return call

    for deadly in range(1000):
        folder, calls = tmp_path / str(deadly), 0
        for step in (1, 2):
            save(folder, step, tensors(step), {"step": step})
        with monkeypatch.context() as patch:
            for owner, name in places:
                patch.setattr(owner, name, dying(getattr(owner, name), deadly))
            try:
                save(folder, 3, tensors(3), {"step": 3})
                alive = True
            except (Killed, CheckpointError):
                alive = False
        path, complaints = newest(folder)
        assert not complaints and path.name in ("step-00000002", "step-00000003")
        step = read_state(path)["step"]
        assert path.name.endswith(str(step)) and holds(path, step)
        assert save(folder, 4, tensors(4), {"step": 4}) == newest(folder)[0], "and the next save works"
        assert len(names(folder)) == 2, "without leftovers"
        if alive:
            break
    assert deadly > 10


def test_a_full_disk(tmp_path):
    """One line says so, nothing is left lying about, and the checkpoint before is good."""
    code = """if True:
        import resource, sys, torch
        from pathlib import Path
        from nanomai.checkpoint import CheckpointError, newest, save
        folder = Path(sys.argv[1])
        small = {"a": torch.ones(10)}
        save(folder, 1, small, {})
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        for step, what, state in ((2, {"a": torch.ones(100_000)}, {}), (3, small, {"much": "x" * 30_000})):
            try:
                save(folder, step, what, state)
            except CheckpointError as error:
                print(error)
        print(*newest(folder), *sorted(p.name for p in folder.iterdir()))
    """
    environment = os.environ | {"PYTHONPATH": str(Path(checkpoint.__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", code, tmp_path], env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        f"{tmp_path}/step-00000002 cannot be written: File too large; what was saved before is good",
        f"{tmp_path}/step-00000003 cannot be written: File too large; what was saved before is good",
        f"{tmp_path}/step-00000001 [] step-00000001"], done.stderr
    assert "Traceback" not in done.stderr


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="step-00000001 cannot be written: Not a directory; what was saved"):
        save(tmp_path / "file", 1, tensors(), {})


# --- damage


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def rename_in_manifest(path: Path, name: str) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][name] = manifest["files"].pop("__0_0.distcp")
    (path / "manifest.json").write_text(json.dumps(manifest))


DAMAGES = {
    "flipped": (lambda p: flip(p / "__0_0.distcp"), "__0_0.distcp does not match its checksum: it is damaged"),
    "truncated": (lambda p: os.truncate(p / "__0_0.distcp", 100),
                  "__0_0.distcp has 100 bytes, not {}: it is truncated"),
    "state": (lambda p: flip(p / "state.json"), "state.json does not match its checksum: it is damaged"),
    "missing file": (lambda p: (p / ".metadata").unlink(), ".metadata is missing"),
    "missing manifest": (lambda p: (p / "manifest.json").unlink(),
                         "manifest.json is missing or unreadable; the checkpoint is incomplete"),
    "half a manifest": (lambda p: os.truncate(p / "manifest.json", 50),
                        "manifest.json is missing or unreadable; the checkpoint is incomplete"),
    "a list for a manifest": (lambda p: (p / "manifest.json").write_text('{"files": [1]}'),
                              "manifest.json is missing or unreadable; the checkpoint is incomplete"),
    "a manifest of nothing": (lambda p: (p / "manifest.json").write_text(
        '{"files": {"state.json": {"bytes": 0, "blake2b": ""}}}'),
        "manifest.json does not list .metadata; the checkpoint is incomplete"),
    "a path above": (lambda p: rename_in_manifest(p, "../secret"), "../secret is missing"),
    "a path from the root": (lambda p: rename_in_manifest(p, "/etc/passwd"), "/etc/passwd is missing"),
    "empty": (lambda p: (shutil.rmtree(p), p.mkdir()),
              "manifest.json is missing or unreadable; the checkpoint is incomplete"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named_and_the_one_before_is_used(tmp_path, name):
    damage, message = DAMAGES[name]
    good, bad = (save(tmp_path, step, tensors(step), {"step": step}) for step in (1, 2))
    (tmp_path / "secret").write_bytes((bad / "__0_0.distcp").read_bytes())
    line = f"{bad}: " + message.format((bad / "__0_0.distcp").stat().st_size)
    damage(bad)
    with pytest.raises(CheckpointError) as caught:
        verify(bad)
    assert str(caught.value) == line
    assert newest(tmp_path) == (good, [line]) and holds(good, 1)


def test_nothing_there(tmp_path):
    assert newest(tmp_path) == newest(tmp_path / "none") == (None, [])


@pytest.mark.parametrize("changes, message", [
    ({"model/new": torch.zeros(2)}, "no tensor 'model/new'; it was saved from another model or optimizer"),
    ({"model/a.weight": torch.zeros(5, 8)}, "model/a.weight has shape (5, 7) there and (5, 8) here"),
    ({"optimizer/a.weight/step": torch.zeros(1)}, "optimizer/a.weight/step has shape () there and (1,) here")])
def test_another_model(saved, changes, message):
    with pytest.raises(CheckpointError) as caught:
        load(saved, empty() | changes)
    assert str(caught.value) == f"{saved}: {message}"


def test_weights_that_are_not_finite(tmp_path):
    path = save(tmp_path, 1, tensors() | {"model/b": torch.full((3,), torch.nan).bfloat16()}, {})
    with pytest.raises(CheckpointError, match="model/b holds numbers that are not finite"):
        loaded(path)


# --- malice


class Bomb:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def refused(path: Path, tmp_path: Path, message: str) -> None:
    reseal(path)
    verify(path)
    with pytest.raises(CheckpointError, match=message) as caught:
        loaded(path)
    assert "\n" not in str(caught.value) and not (tmp_path / "bomb").exists()


def test_a_hostile_pickle_is_never_run(tmp_path, saved):
    (saved / ".metadata").write_bytes(pickle.dumps(Bomb(tmp_path / "bomb")))
    refused(saved, tmp_path, r"\.metadata is not a checkpoint's: it wants to run posix\.mkdir")


@pytest.mark.parametrize("field", ["planner_data", "storage_data", "state_dict_metadata", "storage_meta"])
def test_a_bomb_inside_true_metadata(tmp_path, saved, field):
    true = pickle.loads((saved / ".metadata").read_bytes())
    hostile = dataclasses.replace(true, **{field: {"x": Bomb(tmp_path / "bomb")}})
    (saved / ".metadata").write_bytes(pickle.dumps(hostile))
    refused(saved, tmp_path, "it wants to run posix.mkdir")


@pytest.mark.parametrize("module, name", [
    ("builtins", "eval"), ("os", "system"), ("torch.distributed.checkpoint.filesystem", "os.system"),
    ("torch.distributed.checkpoint.filesystem", "os"), ("torch.distributed.checkpoint.metadata", "field"),
    ("torch.distributed.checkpoint.format_utils", "torch_save_to_dcp"), ("torch", "load"),
    ("torch.serialization", "load"), ("nanomai.checkpoint", "save"), ("no_such_module", "x"),
    ("torch.distributed.checkpoint.state_dict", "StateDictOptions"), ("torch.distributed.fsdp.api", "StateDictType")])
def test_no_other_name_is_looked_up(saved, tmp_path, module, name):
    (saved / ".metadata").write_bytes(f"c{module}\n{name}\n.".encode())
    refused(saved, tmp_path, f"it wants to run {module}.{name}$")


def test_a_tensor_that_is_really_a_pickle(tmp_path, saved):
    """The library would read an entry of this kind with torch.load(weights_only=False)."""
    hostile, entry = pickle.loads((saved / ".metadata").read_bytes()), BytesStorageMetadata()
    entry.size = torch.Size([5, 7])
    hostile.state_dict_metadata["model/a.weight"] = entry
    torch.save(Bomb(tmp_path / "bomb"), saved / "bomb.pt")
    size = (saved / "bomb.pt").stat().st_size
    hostile.storage_data[MetadataIndex("model/a.weight")] = _StorageInfo("bomb.pt", 0, size)
    (saved / ".metadata").write_bytes(pickle.dumps(hostile))
    refused(saved, tmp_path, "no tensor 'model/a.weight'")


@pytest.mark.parametrize("data", [b"", b"garbage", b"\x80\x04]\x94.", b"\x80\x05N.", b"(lp0\nI1\na", b"\xff" * 64])
def test_bytes_that_are_no_metadata(saved, tmp_path, data):
    (saved / ".metadata").write_bytes(data)
    refused(saved, tmp_path, r"\.metadata is not a checkpoint's")


# --- shared by ranks


def saver(folder, mesh):
    return Saver(folder, 2, mesh, Watchdog(mesh, 0), torch.device("cpu"))


def summed(mesh, function):
    """The names of the files that each rank reads through for `function()`."""
    read, entry = [], checkpoint._entry
    checkpoint._entry = lambda path: read.append(path.name) or entry(path)
    try:
        function()
    finally:
        checkpoint._entry = entry
    return [sorted(names) for names in mesh.from_all(lambda: read)]


def share_the_work(rank, folder):
    with process_group() as mesh:
        with saver(folder, mesh) as ours:
            ours.save(1, tensors(1), {})
            ours.wait()
            read = summed(mesh, lambda: (ours.save(2, tensors(2), {}), ours.wait()))
            assert read == [[".metadata", "__0_0.distcp", "state.json"], ["__1_0.distcp"]], "each what it wrote"
            good, bad = folder / "step-00000001", folder / "step-00000002"
            read = summed(mesh, lambda: newest(folder, mesh))
            assert read == [[".metadata", "__0_0.distcp"], ["__1_0.distcp", "state.json"]], "all, and none twice"
            before = bad.stat().st_ino
            ours.save(2, tensors(2), {})
            assert ours.pending is None and bad.stat().st_ino == before, "a good one of the same step stays"
        found = {name: torch.zeros_like(tensor) for name, tensor in tensors().items()}
        load(bad, found, mesh)
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors(2).items())
        agree_on_damage(mesh, good, bad)
        fail_together(mesh, folder)


def agree_on_damage(mesh, good, bad):
    """What one rank finds, all say, whether the rank is this or the other."""
    for name in ("__0_0.distcp", "__1_0.distcp", ".metadata", "state.json"):
        whole = (bad / name).read_bytes()
        for damage, what in ((flip, "does not match its checksum: it is damaged"),
                             (lambda file: os.truncate(file, 5), f"has 5 bytes, not {len(whole)}: it is truncated"),
                             (Path.unlink, "is missing")):
            mesh.barrier()
            if mesh.is_main:
                damage(bad / name)
            mesh.barrier()
            assert newest(bad.parent, mesh) == (good, [f"{bad}: {name} {what}"])
            mesh.barrier()
            if mesh.is_main:
                (bad / name).write_bytes(whole)
    mesh.barrier()
    assert newest(bad.parent, mesh) == (bad, [])


def fail_together(mesh, folder):
    """A disk that fails one rank fails the save for all; a rank that looks elsewhere is named by all."""
    entry = checkpoint._entry

    def failing(path):
        if path.name == "__1_0.distcp":
            raise OSError(5, "Input/output error")
        return entry(path)

    checkpoint._entry = failing
    with saver(folder, mesh) as ours:
        final = ours.save(3, tensors(3), {})
        with pytest.raises(CheckpointError if mesh.is_main else RankFailed) as caught:
            ours.wait()
        said = f"{final} cannot be written: Input/output error; what was saved before is good"
        assert str(caught.value) == ("" if mesh.is_main else "rank 0 failed: ") + said
    checkpoint._entry = entry
    mesh.barrier()
    assert names(folder) == ["step-00000001", "step-00000002"]
    os.chdir(folder.parent if mesh.is_main else folder)  # as two machines would have different disks
    for attempt, path in ((saver, "shared"), (newest, "shared/step-00000002")):
        with pytest.raises(CheckpointError) as caught:
            attempt(Path("shared"), mesh)
        assert str(caught.value) == f"rank 1 does not see {path}; all machines of a run must share its folder"


def test_ranks_share_the_work_and_the_verdict(tmp_path):
    (tmp_path / "shared").mkdir()
    launch(share_the_work, 2, tmp_path / "shared")
