"""The engine: a kernel runs where its tensors are; the interpreter is right about bfloat16, threads and errors."""

import contextlib
import subprocess
import sys
import threading

import pytest
import torch
import triton
import triton.language as tl

from triton_kernels import aot
from triton_kernels.engine import Kernel, KernelError
from triton_kernels.lens import Trace


@triton.jit
def twice(x):
    return x * 2.0


@Kernel
@triton.jit
def counted(x_ptr, skip_ptr, y_ptr, n, BLOCK: tl.constexpr):
    """y = x, unless skip is 1: one mask of a block and a number."""
    at = tl.arange(0, BLOCK)
    inside = (at < n) & (tl.load(skip_ptr) != 1)
    tl.store(y_ptr + at, tl.load(x_ptr + at, mask=inside), mask=inside)


@Kernel
@triton.jit
def scaled(x_ptr, y_ptr, n, scale, BLOCK: tl.constexpr):
    """y = 2 x * scale + sum of the block"""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n, other=0.0).to(tl.float32)
    y = twice(x) * scale + x.sum(0)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=at < n)


@Kernel
@triton.jit
def arithmetic(x_ptr, y_ptr, out_ptr, BLOCK: tl.constexpr):
    """Each row of `out` is one operation in the dtype of the inputs."""
    at = tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + at), tl.load(y_ptr + at)
    tl.store(out_ptr + at, x + y)
    tl.store(out_ptr + BLOCK + at, x * y)
    tl.store(out_ptr + 2 * BLOCK + at, x - 0.3)
    tl.store(out_ptr + 3 * BLOCK + at, tl.where(x < y, x, y))
    tl.store(out_ptr + 4 * BLOCK + at, tl.maximum(x, y))
    tl.store(out_ptr + 5 * BLOCK + at, -tl.abs(x))
    tl.store(out_ptr + 6 * BLOCK + at, tl.zeros_like(x) + tl.sum(x, 0))
    tl.store(out_ptr + 7 * BLOCK + at, tl.cumsum(x, 0))


@Kernel
@triton.jit
def cast(x_ptr, y_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at).to(y_ptr.dtype.element_ty))


@Kernel
@triton.jit
def product(a_ptr, b_ptr, c_ptr, K, SIZE: tl.constexpr):
    """c (SIZE, SIZE) = a (SIZE, K) b (K, SIZE), in steps of SIZE, with a loop bound known at run time alone."""
    i = tl.arange(0, SIZE)
    c = tl.zeros((SIZE, SIZE), tl.float32)
    for k in range(0, K, SIZE):
        a = tl.load(a_ptr + i[:, None] * K + k + i[None, :])
        b = tl.load(b_ptr + (k + i)[:, None] * SIZE + i[None, :])
        c = tl.dot(a, b, c, input_precision="ieee")
    tl.store(c_ptr + i[:, None] * SIZE + i[None, :], c.to(c_ptr.dtype.element_ty))


@triton.jit
def plus(a, b):
    return a + b


@Kernel
@triton.jit
def language(x_ptr, out_ptr, count_ptr, n, BLOCK: tl.constexpr):
    """Each row of `out` uses another part of the language that is itself written in Triton."""
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at)
    tl.store(out_ptr + at, tl.sort(x))
    out_ptr += BLOCK
    tl.store(out_ptr + at, tl.argmax(x, 0) + tl.zeros_like(x))
    out_ptr += BLOCK
    tl.store(out_ptr + at, tl.reduce(x, 0, plus) + tl.zeros_like(x))
    out_ptr += BLOCK
    k = 0
    while k < n:
        k += 1
    tl.store(out_ptr + at, tl.sigmoid(x) + tl.softmax(x) + k + tl.cdiv(n, 4))
    for _ in tl.range(0, n, 2):
        tl.atomic_add(count_ptr, 1)
    tl.atomic_cas(count_ptr, 3, 9)
    source = tl.make_tensor_descriptor(x_ptr, shape=[1, BLOCK], strides=[BLOCK, 1], block_shape=[1, BLOCK])
    target = tl.make_tensor_descriptor(out_ptr, shape=[2, BLOCK], strides=[BLOCK, 1], block_shape=[1, BLOCK])
    target.store([1, 0], source.load([0, 0]))


def run_scaled(n=300, dtype=torch.float32):
    x = torch.randn(n, generator=torch.Generator().manual_seed(n)).to(dtype)
    y = torch.full_like(x, torch.nan)
    scaled[(triton.cdiv(n, 128),)](x, y, n, 0.5, BLOCK=128, num_warps=4)
    sums = torch.cat([b.sum().expand(len(b)) for b in x.double().split(128)])
    return y, x.double() + sums


def error(got, exact):
    return ((got.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.float16, 4e-4), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize("n", [1, 127, 128, 129, 300])
def test_it_computes_on_the_cpu(n, dtype, bound):
    assert error(*run_scaled(n, dtype)) < bound


def test_bfloat16_arithmetic_is_torchs():
    """torch too computes in float32 and rounds to nearest even, so every bit must be the same."""
    x, y = torch.randn(2, 64).bfloat16()
    out = torch.full((8, 64), torch.nan, dtype=torch.bfloat16)
    arithmetic[(1,)](x, y, out, BLOCK=64)
    exact = torch.stack([x + y, x * y, x - 0.3, torch.minimum(x, y), torch.maximum(x, y), -x.abs()])
    # the constant, like the tensor, is bfloat16 inside a kernel
    exact[2] = x - torch.tensor(0.3, dtype=torch.bfloat16)
    assert torch.equal(out[:6], exact)
    torch.testing.assert_close(out[6].float(), x.float().sum().expand(64), rtol=2**-8, atol=0)
    torch.testing.assert_close(out[7].float(), x.float().cumsum(0), rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int32])
def test_bfloat16_casts_are_torchs(dtype):
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 1 + 2**-8, 1 + 3 * 2**-8, 3.39e38, 2**-130])
    x = torch.cat([torch.randn(248) * 100, special]).clamp(-6e4, 6e4) if dtype != torch.float32 else torch.cat(
        [torch.randn(247) * 100, special, torch.tensor([torch.nan])])
    x = x.nan_to_num(0.0).to(dtype) if dtype == torch.int32 else x.to(dtype)
    y = torch.empty(256, dtype=torch.bfloat16)
    cast[(1,)](x, y, BLOCK=256)
    assert torch.equal(y.nan_to_num(7.0), x.bfloat16().nan_to_num(7.0))
    back = torch.empty(256, dtype=dtype)
    finite = y.nan_to_num(0.0, 1.0, -1.0) if dtype != torch.float32 else y
    cast[(1,)](finite, back, BLOCK=256)
    assert torch.equal(back.nan_to_num(7.0), finite.to(dtype).nan_to_num(7.0))


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.float16, 5e-4), (torch.bfloat16, 4e-3)])
def test_products_sum_in_float32(dtype, bound):
    a, b = torch.randn(16, 64).to(dtype), torch.randn(64, 16).to(dtype)
    c = torch.full((16, 16), torch.nan, dtype=dtype)
    product[(1,)](a, b, c, 64, SIZE=16)
    assert error(c, a.double() @ b.double()) < bound


def test_the_language_around_a_kernel():
    x, out, count = torch.randn(16), torch.full((5, 16), torch.nan), torch.zeros(1, dtype=torch.int32)
    with Trace(x=x, out=out, count=count) as t:
        language[(1,)](x, out, count, 6, BLOCK=16)
    exact = [x.sort().values, x.argmax().expand(16), x.sum().expand(16), x.sigmoid() + x.softmax(0) + 8, x]
    torch.testing.assert_close(out, torch.stack([row.float() for row in exact]))
    assert count.item() == 9 and t.loads["x"] == 2 * x.nbytes and t.stores["out"] == out.nbytes


@pytest.mark.parametrize("skip", [0, 1])
def test_a_number_compared_may_be_part_of_a_mask(skip):
    x, y = torch.arange(1.0, 6.0), torch.zeros(5)
    with Trace(x=x, y=y) as t:
        counted[(1,)](x, torch.tensor([skip]), y, 5, BLOCK=8)
    assert torch.equal(y, torch.zeros(5) if skip else x)
    assert t.stores["y"] == (0 if skip else y.nbytes)


def test_interpret_compile_interpret():
    before = run_scaled()
    meta = torch.empty(300, device="meta")
    assert aot.compile_kernel(scaled, "sm_90", meta, meta, 300, 0.5, BLOCK=128).registers > 0
    assert error(*before) < 1e-6 and error(*run_scaled()) < 1e-6
    with pytest.raises(RuntimeError, match="outside"):  # the language is as it was before
        tl.sum(1, 0)


def test_a_kernel_may_be_plain_and_use_names_around_it():
    shift = tl.constexpr(3)

    @Kernel
    def moved(x_ptr, BLOCK: tl.constexpr):
        at = tl.arange(0, BLOCK)
        tl.store(x_ptr + at, twice(at) + shift)

    x = torch.empty(8)
    moved[lambda arguments: (8 // arguments["BLOCK"],)](x, BLOCK=8)
    assert x.tolist() == [2 * i + 3 for i in range(8)]


def test_threads_wait_for_one_another():
    results, failures = [], []

    def work():
        try:
            for _ in range(5):
                results.append(error(*run_scaled()))
        except Exception as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and len(results) == 20 and max(results) < 1e-6


@Kernel
@triton.jit
def failing(x_ptr, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK), tl.load(x_ptr).no_such_method())


def test_errors_say_what_and_where():
    x, meta = torch.zeros(4), torch.zeros(4, device="meta")
    with pytest.raises(KernelError, match=r"failing, program \(0, 0, 0\): AttributeError: .*no_such_method"):
        failing[(2,)](x, BLOCK=4)
    with pytest.raises(ValueError, match="scaled: x_ptr is on cpu and y_ptr on meta; move one of them"):
        scaled[(1,)](x, meta, 4, 1.0, BLOCK=4)
    with pytest.raises(ValueError, match="scaled: tensors on 'meta' run on no engine"):
        scaled[(1,)](meta, meta, 4, 1.0, BLOCK=4)
    with pytest.raises(ValueError, match="scaled: no tensor among the arguments"):
        scaled[(1,)](None, None, 4, 1.0, BLOCK=4)
    with pytest.raises(TypeError, match="scaled: got an unexpected keyword argument 'BLOK'"):
        scaled[(1,)](x, x, 4, 1.0, BLOK=4, BLOCK=4)
    with pytest.raises(TypeError, match=r"say over which programs it runs, scaled\[grid\]"):
        scaled(x, x, 4, 1.0)
    run_scaled()  # an error leaves everything as it was


def imports(code: str, **environment: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env={"PYTHONPATH": ":".join(p for p in sys.path if p), **environment})
    return done.stderr.strip().splitlines()[-1]


def test_what_cannot_run_says_why():
    absent = "import sys; sys.modules['triton'] = None; import triton_kernels"
    assert imports(absent) == "ImportError: triton_kernels needs Triton (Linux only): pip install 'triton>=3.6,<4'"
    assert "unset TRITON_INTERPRET" in imports("import triton_kernels", TRITON_INTERPRET="1")


def test_cuda_tensors_are_compiled(monkeypatch):
    """Which engine follows from the device alone; here no GPU is needed to see it."""
    launched, current = [], []
    gpu = torch.device("cuda", 1)
    monkeypatch.setattr("triton_kernels.engine._place", lambda name, arguments: gpu)
    monkeypatch.setattr(torch.cuda, "device", lambda device: current.append(device) or contextlib.nullcontext())
    monkeypatch.setattr(triton.JITFunction, "__getitem__", lambda self, grid: (
        lambda *args, **meta: launched.append((grid, args, meta))))
    scaled[(3,)](1, 2, 3, 4.0, BLOCK=4, num_warps=8)
    assert launched == [((3,), (1, 2, 3, 4.0), {"BLOCK": 4, "num_warps": 8})] and current == [gpu]
