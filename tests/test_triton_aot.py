"""Ahead of time: kernels become binaries for absent GPUs, and the report tells what the compiler made of them."""

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
    assert 0 < binary.shared <= aot.SHARED_LIMIT[target] and binary.spilled == 0


def test_spills_are_seen():
    big = meta(128, 256), meta(256, 128), meta(128, 128, dtype=torch.float32)
    assert aot.compile_kernel(matmul, "sm_80", *big, 256, SIZE=128, num_warps=4, maxnreg=64).spilled > 0


def test_arguments_are_specialised_as_by_the_launcher():
    narrow = [aot.compile_kernel(copy, "sm_90", x, x, n, stride, BLOCK=1024)
              for x, n, stride in ((meta(4096), 4095, 1), (meta(4097)[1:], 4096, 1), (meta(4096), 4096, 2))]
    assert not any(binary.wide_loads for binary in narrow)
    assert all(binary.loads > 1 for binary in narrow)


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
