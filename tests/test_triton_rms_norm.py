"""RMSNorm kernels: against float64, under the lens, byte for byte, as ops, and compiled for GPUs without spills."""

import pytest
import torch
import triton
from torch.utils.checkpoint import checkpoint

from triton_kernels import aot
from triton_kernels import rms_norm as kernels
from triton_kernels.lens import Trace

EPS = 1e-5
BOUND = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}  # twice what was measured, or more
SHAPES = [(1, 1), (5, 123), (2, 3, 64), (7, 127), (1, 4096), (33, 257), (3, 2049)]


def rms_norm_plain(x, weight, eps):
    """The definition of `rms_norm`."""
    return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def add_rms_norm_plain(x, residual, weight, eps):
    """The definition of `add_rms_norm`."""
    return x + residual, rms_norm_plain(x + residual, weight, eps)


def inputs(shape, dtype, seed=0, count=2):
    generator = torch.Generator().manual_seed(seed)
    xs = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for _ in range(count)]
    return *xs, torch.randn(shape[-1], generator=generator).requires_grad_()


def error(got, exact):
    """Relative Frobenius norm."""
    return ((got.double() - exact).norm() / exact.norm().clamp(min=1e-30)).item()


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("shape", SHAPES)
def test_add_rms_norm(shape, dtype, poisoned):
    x, residual, weight = inputs(shape, dtype)
    with Trace(x=x, residual=residual, weight=weight, shuffle=len(shape)):
        s, y = kernels.add_rms_norm(x, residual, weight, EPS)
        ds, dy = (g.detach() for g in inputs(shape, dtype, seed=1)[:2])
        got = torch.autograd.grad((s, y), (x, residual, weight), (ds, dy))
    exact = [t.detach().double().requires_grad_() for t in (x, residual, weight)]
    s64, y64 = add_rms_norm_plain(*exact, EPS)
    want = torch.autograd.grad((s64, y64), exact, (ds.double(), dy.double()))
    assert (s.dtype, y.dtype, got[2].dtype) == (dtype, dtype, torch.float32)
    for name, a, b in zip("s y dx dresidual dweight".split(), (s, y, *got), (s64, y64, *want), strict=True):
        assert a.shape == b.shape and error(a, b) < BOUND[dtype], name


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(shape, dtype, poisoned):
    x, weight = inputs(shape, dtype, count=1)
    eps = 0.5 if shape[-1] == 1 else EPS  # one number and no eps: y = w or -w, and dx is what cancellation leaves
    with Trace(x=x, weight=weight, shuffle=1):
        y = kernels.rms_norm(x, weight, eps)
        got = torch.autograd.grad(y.float().sum() + y.float().square().sum(), (x, weight))
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    y64 = rms_norm_plain(*exact, eps)
    want = torch.autograd.grad(y64, exact, (1 + 2 * y.detach().double()).to(dtype).double())
    assert all(error(a, b) < BOUND[dtype] for a, b in zip((y, *got), (y64, *want), strict=True))


@pytest.mark.parametrize("width", [64, 129])
def test_it_moves_the_bytes_it_must(width):
    """The roofline as a unit test: each element crosses once; the weight once for each program."""
    x, residual, weight = inputs((40, width), torch.bfloat16)
    programs = triton.cdiv(40, kernels.tiles(x)["ROWS"])
    with Trace(x=x, residual=residual, weight=weight) as t:
        s, y = kernels.add_rms_norm(x, residual, weight, EPS)
    assert t.loads == {"x": x.nbytes, "residual": x.nbytes, "weight": programs * weight.nbytes,
                       "s_ptr": 0, "y_ptr": 0, "rstd_ptr": 0}
    assert t.stores == {"x": 0, "residual": 0, "weight": 0, "s_ptr": x.nbytes, "y_ptr": x.nbytes, "rstd_ptr": 40 * 4}
    with Trace(weight=weight) as t:
        torch.autograd.grad((s, y), (x, weight), (torch.ones_like(s), torch.ones_like(y)))
    assert t.loads == {"dy_ptr": x.nbytes, "ds_ptr": x.nbytes, "s_ptr": x.nbytes, "rstd_ptr": 40 * 4,
                       "weight": programs * weight.nbytes, "dx_ptr": 0, "partial_ptr": 0}
    assert sum(t.stores.values()) == x.nbytes + programs * width * 4


def test_gradients_that_nobody_gives_are_not_read():
    x, residual, weight = inputs((3, 16), torch.float32)
    s, y = kernels.add_rms_norm(x, residual, weight, EPS)
    with Trace() as t:
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)
    assert "ds_ptr" not in t.loads
    (want,) = torch.autograd.grad(add_rms_norm_plain(x, residual, weight, EPS)[1], x, torch.ones_like(y))
    assert error(dx, want.double()) < 1e-5
    dx, dweight = torch.autograd.grad(s, (x, weight), torch.ones_like(s))
    assert torch.equal(dx, torch.ones_like(x)) and not dweight.any()


def test_many_steps_a_program(monkeypatch):
    monkeypatch.setattr(kernels, "BACKWARD_PROGRAMS", 3)
    monkeypatch.setattr(kernels, "TILE", 32)
    x, residual, weight = inputs((45, 16), torch.float32)
    with Trace(shuffle=3):
        got = torch.autograd.grad(kernels.add_rms_norm(x, residual, weight, EPS)[1].square().sum(), weight)
    want = torch.autograd.grad(add_rms_norm_plain(x, residual, weight, EPS)[1].square().sum(), weight)
    assert error(got[0], want[0].double()) < 1e-5


def test_layouts_and_limits():
    x, weight = inputs((6, 10), torch.float32, count=1)
    y = kernels.rms_norm(x.T.contiguous().T, weight, EPS)
    assert y.is_contiguous() and error(y, rms_norm_plain(x, weight, EPS).double()) < 1e-6
    empty = torch.zeros(0, 10, requires_grad=True)
    kernels.rms_norm(empty, weight, EPS).sum().backward()
    assert empty.grad.shape == (0, 10)
    with pytest.raises(TypeError, match="float64 needs the plain definition"):
        kernels.rms_norm(x.double(), weight, EPS)
    with pytest.raises(ValueError, match="rows of 8193 numbers; 1 to 8192 fit"):
        kernels.rms_norm(torch.zeros(1, 8193), torch.zeros(8193), EPS)


def test_opcheck():
    x, residual, weight = inputs((3, 17), torch.float32)
    torch.library.opcheck(kernels.rms_norm_op, (x, weight, EPS))
    torch.library.opcheck(kernels.add_rms_norm_op, (x, residual, weight, EPS))
    rows = [t.detach() for t in (x, residual, x)]
    torch.library.opcheck(kernels.rms_norm_backward_op, (*rows, weight.detach(), torch.ones(3)))


def test_compiled_and_checkpointed():
    x, residual, weight = inputs((4, 24), torch.float32)

    def block(x, residual):
        s, y = kernels.add_rms_norm(x, residual, weight, EPS)
        return s + kernels.rms_norm(torch.tanh(y), weight, EPS)

    def gradients(f):
        return torch.autograd.grad(f(x, residual).square().sum(), (x, residual, weight))

    want = gradients(block)
    for f in (torch.compile(block, fullgraph=True), lambda *a: checkpoint(block, *a, use_reentrant=False)):
        for a, b in zip(gradients(f), want, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("width", [64, 768, 4096, 8192])
def test_sm_90_neither_spills_nor_loads_narrowly(width, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    x = torch.empty(8192, width, dtype=torch.bfloat16, device="meta")
    weight, rstd = (torch.empty(n, device="meta") for n in (width, 8192))
    for binary in (*aot.compile_launches("sm_90", kernels.forward, x, x, weight, EPS),
                   *aot.compile_launches("sm_90", kernels.backward, x, x, x, weight, rstd)):
        assert binary.spilled == 0 and binary.shared <= aot.SHARED_LIMIT["sm_90"], binary
        narrow = binary.loads - binary.wide_loads  # of rstd: one number a row
        assert narrow <= 2 * binary.kernel.endswith("backward"), binary


def test_shapes_that_do_not_fit_are_refused():
    x, weight = torch.randn(3, 5, 16), torch.randn(16)
    with pytest.raises(ValueError, match=r"a weight of shape \(8,\) for rows of 16 numbers"):
        kernels.rms_norm(x, weight[:8], 1e-5)
    with pytest.raises(ValueError, match=r"residual \(5, 16\) torch.float32; they must be alike"):
        kernels.add_rms_norm(x, x[0], weight, 1e-5)
    with pytest.raises(ValueError, match="they must be alike"):
        kernels.add_rms_norm(x.bfloat16(), x, weight, 1e-5)
