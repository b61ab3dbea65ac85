"""Ahead of time: kernels become binaries for absent GPUs, and the report tells what the compiler made of them."""

import importlib.util

import pytest
import torch
import triton
import triton.language as tl

from triton_kernels import aot
from triton_kernels.engine import Kernel


@Kernel
@triton.jit
def copy(x_ptr, y_ptr, n, stride, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at * stride, tl.load(x_ptr + at * stride, mask=at < n), mask=at < n)


@Kernel
@triton.jit
def matmul(a_ptr, b_ptr, c_ptr, K, SIZE: tl.constexpr):
    i, k = tl.arange(0, SIZE), tl.arange(0, 64)
    c = tl.zeros((SIZE, SIZE), tl.float32)
    for start in range(0, K, 64):
        a = tl.load(a_ptr + i[:, None] * K + start + k[None, :])
        b = tl.load(b_ptr + (start + k)[:, None] * SIZE + i[None, :])
        c = tl.dot(a, b, c)
    tl.store(c_ptr + i[:, None] * SIZE + i[None, :], c)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")


@pytest.mark.parametrize("target", aot.TARGETS)
def test_a_copy_on_every_target(target):
    binary = aot.compile_kernel(copy, target, meta(4096), meta(4096), 4096, 1, BLOCK=2048)
    assert 0 < binary.registers < 64 and binary.spilled == binary.shared == 0 and not binary.tensor_core
    threads = 4 * aot.TARGETS[target].warp_size
    assert binary.wide_loads == binary.loads == 2048 * 16 // (128 * threads)
    assert str(binary).startswith(f"copy {target}: {binary.registers} registers, 0 spilled, 0 B shared, 128-bit loads")


@pytest.mark.parametrize("target, unit", [("sm_80", "HMMA"), ("sm_90", "HGMMA"), ("gfx942", "v_mfma")])
def test_tensor_cores_are_seen(target, unit):
    binary = aot.compile_kernel(matmul, target, meta(64, 256), meta(256, 64), meta(64, 64, dtype=torch.float32), 256,
                                SIZE=64, num_stages=2)
    assert any(name.startswith(unit) for name in binary.tensor_core), binary
    assert binary.shared > 0 and not binary.faults()
    assert ("mma" in binary.ptx) == target.startswith("sm_")  # AMD has no PTX


def test_what_breaks_a_limit_is_named():
    a, b, c = meta(128, 256), meta(256, 128), meta(128, 128, dtype=torch.float32)
    spilled = aot.compile_kernel(matmul, "sm_80", a, b, c, 256, SIZE=128, num_warps=4, maxnreg=64)
    assert spilled.faults() == [
        f"matmul sm_80: {spilled.spilled} bytes of spilled registers a thread; 0 is the most that is allowed"]
    large = aot.compile_kernel(matmul, "gfx942", a, b, c, 256, SIZE=128, num_stages=4)
    assert any("bytes of shared memory a program; 65536 is the most" in fault for fault in large.faults()), large


def test_arguments_are_specialised_as_by_the_launcher():
    narrow = [aot.compile_kernel(copy, "sm_90", x, x, n, stride, BLOCK=1024)
              for x, n, stride in ((meta(4096), 4095, 1), (meta(4097)[1:], 4096, 1), (meta(4096), 4096, 2))]
    assert not any(binary.wide_loads for binary in narrow)
    assert all(binary.loads > 1 for binary in narrow)


@Kernel
@triton.jit(do_not_specialize=["stride", "n"])
def strided_copy(x_ptr, y_ptr, n, stride, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at * stride, tl.load(x_ptr + at * stride, mask=at < n), mask=at < n)


def test_what_the_kernel_says_not_to_specialise():
    x = meta(4096)
    narrow = aot.compile_kernel(strided_copy, "sm_90", x, x, 4096, 1, BLOCK=1024)
    assert narrow.loads > 1 and not narrow.wide_loads
    one, two = (aot.fingerprint(strided_copy, "sm_90", x, x, 4096, stride, BLOCK=1024) for stride in (1, 2))
    assert one == two, "a step that is counted up must not compile again"


def test_launches_of_a_launcher_are_compiled_in_order():
    def launcher(x):
        for block in (256, 512):
            copy[(4,)](x, torch.empty_like(x), x.numel(), 1, BLOCK=block)

    first, second = aot.compile_launches("sm_90", launcher, meta(4096))
    assert first.kernel == second.kernel == "copy" and first.assembly != second.assembly


def test_errors():
    with pytest.raises(ValueError, match="no target 'sm_7'; there are sm_80, sm_90, sm_100, gfx942"):
        aot.compile_kernel(copy, "sm_7", meta(1), meta(1), 1, 1, BLOCK=16)
    with pytest.raises(TypeError, match="stride: no type of Triton's for 'x'"):
        aot.compile_kernel(copy, "sm_90", meta(1), meta(1), 1, "x", BLOCK=16)
    with pytest.raises(RuntimeError, match=r"nvdisasm failed: .*no-such-file"):
        aot._tool("nvdisasm", "-c", "no-such-file")


# --- Fingerprints ----------------------------------------------------------------------------------------------------

MODULE = """
import triton
import triton.language as tl
from triton_kernels.engine import Kernel

FACTOR = tl.constexpr(2.0)

@triton.jit
def inner(x):
    return x * FACTOR

@triton.jit
def helper(x):
    return inner(x) + 1.0

@Kernel
@triton.jit
def kernel(x_ptr, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(x_ptr + at, helper(tl.load(x_ptr + at, mask=at < n)), mask=at < n)
"""


def print_of(tmp_path, old="", new="", target="sm_90", dtype=torch.float32, n=64, **meta_):
    """The fingerprint of the kernel of MODULE with `new` for `old`."""
    path = tmp_path / f"module_{len(list(tmp_path.iterdir()))}.py"
    path.write_text(MODULE.replace(old, new) if old else MODULE)
    spec = importlib.util.spec_from_file_location("module", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return aot.fingerprint(module.kernel, target, meta(64, dtype=dtype), n, **{"BLOCK": 64} | meta_)


@pytest.mark.parametrize("change", [
    {"old": "FACTOR = ", "new": "# a constant\nFACTOR = "},
    {"old": "    return inner(x)", "new": '    """A docstring."""\n    return inner(x)'},
    {"old": "+ 1.0", "new": "+ 1.0  # one"},
    {"n": 128},
])
def test_a_fingerprint_holds_where_the_binary_does(change, tmp_path):
    assert print_of(tmp_path) == print_of(tmp_path, **change)


@pytest.mark.parametrize("change", [
    {"old": "constexpr(2.0)", "new": "constexpr(3.0)"},
    {"old": "x * FACTOR", "new": "FACTOR * x"},
    {"old": "+ 1.0", "new": "- 1.0"},
    {"old": "at < n)), ", "new": "at < n, other=0.0)), "},
    {"target": "gfx942"}, {"dtype": torch.bfloat16}, {"n": 65}, {"n": 1}, {"BLOCK": 32}, {"num_warps": 8},
])
def test_a_fingerprint_changes_with_all_that_makes_a_binary(change, tmp_path):
    assert print_of(tmp_path) != print_of(tmp_path, **change)
