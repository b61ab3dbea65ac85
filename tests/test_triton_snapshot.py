"""Every kernel, compiled for GPUs that are not there, becomes what was committed.

sm_90 is compiled in every run, flash attention by test_triton_snapshot_flash.py. Of the other targets each line of the
snapshot carries the fingerprint of what was compiled: when a kernel changes these tests fail, and the command that
they name compiles it for all of them. On a version of Triton that has no snapshot only the limits hold.
"""

import importlib
import pkgutil

import aot_cases
import pytest
import triton
from aot_cases import FAMILIES, fingerprint, flash_attentions, launches

import triton_kernels
from triton_kernels.aot import SHARED_LIMIT, TARGETS
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
    for name, line in SNAPSHOT.items():
        assert line["spilled"] == 0 and line["shared"] <= SHARED_LIMIT[name.split()[0]], f"{name}: {line}"


@pytest.mark.parametrize("family", [family for family in FAMILIES if family is not flash_attentions],
                         ids=lambda family: family.__name__)
def test_sm_90_becomes_what_was_committed(family):
    found = aot_cases.differences("sm_90", family)
    assert not found, "\n".join(found)
