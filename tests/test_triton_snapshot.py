"""Every kernel, compiled for GPUs that are not there, becomes what was committed.

sm_90 is compiled in every run, flash attention by test_triton_snapshot_flash.py. Of the other targets each line of the
snapshot carries the fingerprint of what was compiled: when a kernel changes these tests fail, and the command that
they name compiles it for all of them. On a version of Triton that has no snapshot only the limits hold.
"""

import importlib.util
import pkgutil
import sys
from pathlib import Path

import aot_cases
import pytest
import triton
from aot_cases import FAMILIES, fingerprint, flash_attentions, launches

import triton_kernels
from triton_kernels.aot import TARGETS
from triton_kernels.engine import Kernel

SNAPSHOT = aot_cases.read_snapshot()
needs_snapshot = pytest.mark.skipif(not SNAPSHOT, reason=f"no snapshot for Triton {triton.__version__}")


def test_every_kernel_is_a_case():
    names = [f"triton_kernels.{module.name}" for module in pkgutil.iter_modules(triton_kernels.__path__)]
    modules = [importlib.import_module(name) for name in names]
    kernels = {value.name for module in modules for value in vars(module).values() if isinstance(value, Kernel)}
    missing = kernels - {kernel.name for kernel, *_ in launches("sm_90").values()}
    assert not missing, f"add to tests/aot_cases.py: {', '.join(sorted(missing))}"


@needs_snapshot
@pytest.mark.parametrize("target", TARGETS)
def test_the_snapshot_is_of_this_code(target):
    now = {name: fingerprint(target, launch) for name, launch in launches(target).items()}
    then = {name: line["fingerprint"] for name, line in SNAPSHOT.items() if name.split()[0] == target}
    changed = sorted(name for name in now.keys() | then.keys() if now.get(name) != then.get(name))
    assert not changed, "\n".join([f"new, changed or gone since; {aot_cases.RENEW}", *changed])


def test_the_snapshot_keeps_the_limits():
    broken = aot_cases.faults(SNAPSHOT)
    assert not broken, "\n".join(broken)


LINE = dict.fromkeys(aot_cases.NUMBERS, 0) | {"fingerprint": "same"}


@pytest.mark.parametrize("what, value", [("spilled", 8), ("shared", 232_449), ("tensor_memory", 513)])
def test_each_limit_is_kept(what, value):
    assert not aot_cases.faults({"sm_100 kernel case": LINE})
    assert f"kernel sm_100: {value} " in " ".join(aot_cases.faults({"sm_100 kernel case": LINE | {what: value}}))


@pytest.fixture
def tool(monkeypatch, tmp_path):
    """tools/aot.py, with one case and a snapshot of its own."""
    path = Path(__file__).parent.parent / "tools" / "aot.py"
    monkeypatch.setattr(sys, "path", sys.path[:])  # it puts the checkout first
    spec = importlib.util.spec_from_file_location("aot_tool", path)
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    monkeypatch.setattr(module, "TARGETS", ["sm_90"])
    monkeypatch.setattr(aot_cases, "snapshot_file", lambda: tmp_path / "snapshot.json")
    monkeypatch.setattr(aot_cases, "launches", lambda target: {"sm_90 kernel case": None})
    monkeypatch.setattr(aot_cases, "fingerprint", lambda target, launch: "same")
    return module


def run(tool, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["aot.py", *arguments])
    return tool.main()


def test_a_kept_line_over_the_limit_is_still_a_fault(tool, monkeypatch, capsys, tmp_path):
    aot_cases.write_snapshot({"sm_90 kernel case": LINE | {"spilled": 8}, "gone": LINE})
    assert run(tool, monkeypatch) == 1
    assert "0 of 1 binaries compiled" in (text := capsys.readouterr().out) and "8 bytes of spilled registers" in text
    assert list(aot_cases.read_snapshot()) == ["sm_90 kernel case"]
    assert [path.name for path in tmp_path.iterdir()] == ["snapshot.json"]


@pytest.mark.parametrize("arguments", [["scna"], ["scan"], ["scan", "sm_91", "kernel", "B=1"],
                                       ["scan", "sm_90", "kernel", "B"]], ids=" ".join)
def test_what_the_tool_does_not_understand_it_refuses(tool, monkeypatch, arguments):
    with pytest.raises(SystemExit, match="2"):
        run(tool, monkeypatch, *arguments)
    assert not aot_cases.snapshot_file().exists()


def test_a_scan_of_no_case_names_the_cases(tool, monkeypatch, capsys):
    assert run(tool, monkeypatch, "scan", "sm_90", "nonsense", "BLOCK=64") == 1
    assert "no case of sm_90 begins with 'nonsense'" in (text := capsys.readouterr().err) and "kernel case" in text


@pytest.mark.parametrize("family", [family for family in FAMILIES if family is not flash_attentions],
                         ids=lambda family: family.__name__)
def test_sm_90_becomes_what_was_committed(family):
    found = aot_cases.differences("sm_90", family)
    assert not found, "\n".join(found)
