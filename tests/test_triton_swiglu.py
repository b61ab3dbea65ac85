"""SwiGLU kernels: against float64, under the lens, byte for byte, as ops, and compiled for GPUs without spills."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from triton_kernels import aot
from triton_kernels import swiglu as kernels
from triton_kernels.lens import Trace

# A result is rounded once: by at most 2^-11 of itself in float16, 2^-8 in bfloat16.
BOUND = {torch.float32: 1e-5, torch.float16: 5e-4, torch.bfloat16: 4e-3}
SHAPES = [(1,), (5, 123), (2, 3, 64), (2047,), (2048,), (2049,), (7, 911)]


def swiglu_plain(gate, up):
    """The definition of `swiglu`."""
    return gate * torch.sigmoid(gate) * up


def inputs(shape, dtype, seed=0, count=3):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for _ in range(count)]


def error(got, exact):
    """Relative Frobenius norm."""
    return ((got.double() - exact).norm() / exact.norm().clamp(min=1e-30)).item()


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("shape", SHAPES)
def test_swiglu(shape, dtype, poisoned):
    gate, up, dy = inputs(shape, dtype)
    with Trace(gate=gate, up=up, shuffle=len(shape)):
        y = kernels.swiglu(gate, up)
        got = torch.autograd.grad(y, (gate, up), dy)
    exact = [t.detach().double().requires_grad_() for t in (gate, up)]
    y64 = swiglu_plain(*exact)
    want = torch.autograd.grad(y64, exact, dy.detach().double())
    for name, a, b in zip("y dgate dup".split(), (y, *got), (y64, *want), strict=True):
        assert a.dtype == dtype and a.shape == b.shape and error(a, b) < BOUND[dtype], name


def test_it_moves_the_bytes_it_must():
    """The roofline as a unit test: each element crosses once."""
    gate, up, dy = inputs((41, 129), torch.bfloat16)
    with Trace(gate=gate, up=up, dy=dy) as t:
        y = kernels.swiglu(gate, up)
    once, never = gate.nbytes, 0
    assert t.loads == {"gate": once, "up": once, "dy": never, "y_ptr": never}
    assert t.stores == {"gate": never, "up": never, "dy": never, "y_ptr": once}
    with Trace(gate=gate, up=up, dy=dy) as t:
        torch.autograd.grad(y, (gate, up), dy)
    assert t.loads == {"gate": once, "up": once, "dy": once, "dgate_ptr": never, "dup_ptr": never}
    assert t.stores == {"gate": never, "up": never, "dy": never, "dgate_ptr": once, "dup_ptr": once}


def test_nothing_but_gate_and_up_is_kept():
    gate, up, _ = inputs((3, 16), torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        kernels.swiglu(gate, up)
    assert [t.data_ptr() for t in kept] == [gate.data_ptr(), up.data_ptr()]


def test_large_gates_saturate():
    gate = torch.tensor([-3e38, -200.0, -90.0, 0.0, 90.0, 200.0, 3e38], requires_grad=True)
    y = kernels.swiglu(gate, torch.ones(7))
    y.sum().backward()
    torch.testing.assert_close(y, F.silu(gate), rtol=1e-6, atol=1e-30)
    assert gate.grad[3:].tolist() == [0.5, 1, 1, 1] and gate.grad[:3].abs().max() < 1e-30


def test_layouts_and_limits():
    gate, up, dy = inputs((6, 10), torch.float32)
    y = kernels.swiglu(gate.T, up.T)
    assert y.is_contiguous() and error(y, swiglu_plain(gate, up).T.double()) < 1e-6
    halves = torch.cat((gate, up), dim=1).detach().requires_grad_()  # of one fused projection
    kernels.swiglu(*halves.chunk(2, dim=1)).backward(dy[:, :1].expand(6, 10))
    want = torch.autograd.grad(swiglu_plain(gate, up), (gate, up), dy[:, :1].expand(6, 10))
    assert error(halves.grad, torch.cat(want, dim=1).double()) < 1e-6
    empty = torch.zeros(0, 10, requires_grad=True)
    kernels.swiglu(empty, empty).sum().backward()
    assert empty.grad.shape == (0, 10)
    with pytest.raises(TypeError, match=r"torch.float64 needs the plain definition"):
        kernels.swiglu(gate.double(), up.double())
    with pytest.raises(ValueError, match=r"gate is \(6, 10\) torch.float32, up \(6, 9\) torch.float32; they must"):
        kernels.swiglu(gate, up[:, :9])
    with pytest.raises(ValueError, match="they must be alike"):
        kernels.swiglu(gate, up.half())


def test_opcheck():
    gate, up, dy = inputs((3, 17), torch.float32)
    torch.library.opcheck(kernels.swiglu_op, (gate, up))
    torch.library.opcheck(kernels.swiglu_op, (gate.T, up.T))
    torch.library.opcheck(kernels.swiglu_backward_op, tuple(t.detach() for t in (dy, gate, up)))


def test_compiled_and_checkpointed():
    gate, up, _ = inputs((4, 24), torch.float32)

    def block(gate, up):
        return kernels.swiglu(torch.tanh(gate), up) + gate

    def gradients(f):
        return torch.autograd.grad(f(gate, up).square().sum(), (gate, up))

    want = gradients(block)
    for f in (torch.compile(block, fullgraph=True), lambda *a: checkpoint(block, *a, use_reentrant=False)):
        for a, b in zip(gradients(f), want, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sm_90_neither_spills_nor_loads_narrowly(dtype, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    x = torch.empty(8192, 5632, dtype=dtype, device="meta")
    for binary in (*aot.compile_launches("sm_90", kernels.forward, x, x),
                   *aot.compile_launches("sm_90", kernels.backward, x, x, x)):
        assert binary.spilled == binary.shared == 0 and binary.loads == binary.wide_loads > 0, binary
