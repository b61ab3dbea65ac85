"""The kernels of lesson 11a: against float64, under the lens, byte for byte, and compiled for a GPU without spills."""

import pytest
import torch

from triton_kernels import aot
from triton_kernels import lessons as kernels
from triton_kernels.lens import Trace

BOUND = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}  # relative Frobenius: one rounding, doubled
SHAPES = [(1,), (1, 1), (5, 123), (2, 3, 64), (7, 127), (3, 2049), (16, 257)]


def normal(shape, dtype, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def error(got, exact):
    """Relative Frobenius norm."""
    return ((got.double() - exact).norm() / exact.norm().clamp(min=1e-30)).item()


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("shape", SHAPES)
def test_add(shape, dtype, poisoned):
    x, y = normal(shape, dtype), normal(shape, dtype, seed=1)
    with Trace(x=x, y=y, shuffle=len(shape)) as t:
        z = kernels.add(x, y)
    assert (z.shape, z.dtype) == (x.shape, dtype) and error(z, x.double() + y.double()) < BOUND[dtype]
    assert t.loads == {"x": x.nbytes, "y": x.nbytes, "z_ptr": 0}
    assert t.stores == {"x": 0, "y": 0, "z_ptr": x.nbytes}


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("shape", SHAPES)
def test_softmax(shape, dtype, poisoned):
    x = normal(shape, dtype) - 30  # all below zero: a lane that is absent but counts as zero would be the largest
    with Trace(x=x, shuffle=len(shape)) as t:
        y = kernels.softmax(x)
    assert (y.shape, y.dtype) == (x.shape, dtype) and error(y, x.double().softmax(-1)) < BOUND[dtype]
    assert (t.loads, t.stores) == ({"x": x.nbytes, "y_ptr": 0}, {"x": 0, "y_ptr": x.nbytes})


def test_softmax_of_large_and_of_forbidden_scores():
    x = torch.tensor([[1e4, 1e4 - 1, -1e4], [-torch.inf, 0.0, 1.0], [-torch.inf, -torch.inf, 5.0]])
    torch.testing.assert_close(kernels.softmax(x), x.softmax(-1))


def test_layouts_and_limits():
    x = normal((6, 10), torch.float32)
    turned = x.T.contiguous().T
    assert torch.equal(kernels.add(turned, x), x + x) and kernels.add(turned, x).is_contiguous()
    assert torch.equal(kernels.softmax(turned), kernels.softmax(x)) and kernels.softmax(turned).is_contiguous()
    assert kernels.add(x[:0], x[:0]).shape == kernels.softmax(x[:0]).shape == (0, 10)
    for y in (x.T, x.half()):
        with pytest.raises(ValueError, match="they must be alike"):
            kernels.add(x, y)
    for call in (lambda: kernels.add(x.double(), x.double()), lambda: kernels.softmax(x.long())):
        with pytest.raises(TypeError, match="needs torch's own"):
            call()
    for width in (0, 16_385):
        with pytest.raises(ValueError, match=f"rows of {width} numbers; 1 to 16384 fit"):
            kernels.softmax(torch.zeros(1, width))


@pytest.mark.parametrize("width", [64, 768, 16_384])
def test_sm_90_neither_spills_nor_loads_narrowly(width, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    x = torch.empty(8192, width, dtype=torch.bfloat16, device="meta")
    for binary in (*aot.compile_launches("sm_90", kernels.add, x, x),
                   *aot.compile_launches("sm_90", kernels.softmax, x)):
        assert binary.spilled == 0 and binary.shared <= aot.SHARED_LIMIT["sm_90"], binary
        # a row of 64 is shorter than one wide load of every thread
        assert binary.loads == binary.wide_loads or (width == 64 and binary.kernel == "softmax_kernel"), binary
