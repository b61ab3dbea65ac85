"""The lesson's matrix product: against float64, under the lens in every order of programs, as an op, and on sm_90."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from triton_kernels import aot
from triton_kernels import matmul as kernels
from triton_kernels.lens import Trace

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}
SMALL = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 16}
SIZES = [(1, 1, 1), (17, 31, 37), (64, 64, 64), (63, 65, 33), (5, 1, 123), (33, 129, 16)]


def inputs(m, n, k, dtype=torch.float32):
    generator = torch.Generator().manual_seed(m + n + k)
    return (torch.randn(shape, generator=generator).to(dtype) for shape in ((m, k), (k, n), (m, n)))


def error(got, exact):
    return ((got.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("m, n, k", SIZES)
def test_against_float64(m, n, k, dtype, poisoned):
    a, b, dc = inputs(m, n, k, dtype)
    a, b = a.requires_grad_(), b.requires_grad_()
    with Trace(shuffle=k):
        c = kernels.matmul(a, b)
        da, db = torch.autograd.grad(c, (a, b), dc)
    a64, b64, dc64 = a.detach().double(), b.detach().double(), dc.double()
    for got, exact in ((c, a64 @ b64), (da, dc64 @ b64.T), (db, a64.T @ dc64)):
        assert got.dtype == dtype and got.shape == exact.shape and error(got, exact) < TOLERANCE[dtype]


@pytest.mark.parametrize("group", [1, 2, 3, 100])
@pytest.mark.parametrize("m, n, k", SIZES)
def test_small_tiles_and_exact_bytes(m, n, k, group, poisoned):
    a, b, _ = inputs(m, n, k)
    with Trace(a=a, b=b, shuffle=group) as t:
        c = kernels.multiply(a, b, **SMALL, GROUP=group)
    assert error(c, a.double() @ b.double()) < 1e-5
    rows, columns = -(-m // SMALL["BLOCK_M"]), -(-n // SMALL["BLOCK_N"])
    assert (t.loads["a"], t.loads["b"], t.stores["c_ptr"]) == (a.nbytes * columns, b.nbytes * rows, c.nbytes)


@pytest.mark.parametrize("group", [1, 2, 3, 5, 8])
def test_order_of_the_programs(group):
    """Column by column within GROUP rows of tiles; the last group is lower where GROUP does not divide them."""
    a, b, _ = inputs(5 * 16, 3 * 32, 16)
    with Trace() as t:
        kernels.multiply(a, b, **SMALL, GROUP=group)
    order = [(i, j) for first in range(0, 5, group) for j in range(3) for i in range(first, min(first + group, 5))]
    owners = t.owners("c_ptr")[::16, ::32]
    assert [owners[place] for place in order] == list(range(15))


def test_strides_are_read_as_they_are(poisoned):
    a, b, _ = inputs(37, 31, 17)
    wide = torch.cat((b.T, b.T), 1)  # its first half is b, transposed
    with Trace(wide=wide, shuffle=0) as t:
        c = kernels.multiply(a.T.contiguous().T, wide[:, :17].T, **SMALL)
    assert error(c, a.double() @ b.double()) < 1e-5
    assert t.loads["wide"] == b.nbytes * 3 and set(t.reads("wide")[:, 17:].flat) == {0}


def test_nothing():
    for m, n, k in ((0, 3, 4), (3, 0, 4), (3, 4, 0)):
        c = kernels.matmul(torch.ones(m, k), torch.ones(k, n))
        assert c.shape == (m, n) and not c.any()


def test_errors():
    a = torch.ones(3, 4)
    with pytest.raises(TypeError, match=r"torch\.float32 and torch\.bfloat16; one of float32, bfloat16"):
        kernels.matmul(a, a.T.bfloat16())
    with pytest.raises(TypeError, match=r"torch\.float64"):
        kernels.matmul(a.double(), a.T.double())
    for wrong in (a, a[0], a[None]):
        with pytest.raises(ValueError, match=r"\(3, 4\) and .*; must be \(M, K\) and \(K, N\)"):
            kernels.multiply(a, wrong)


def test_opcheck():
    a, b, _ = inputs(9, 5, 7)
    torch.library.opcheck(kernels.matmul_op, (a.requires_grad_(), b.requires_grad_()))
    torch.library.opcheck(kernels.matmul_op, (a.detach().T.contiguous().T, b.detach()))


def test_one_gradient_costs_one_product():
    a, b, dc = inputs(9, 5, 7)
    with Trace() as t:
        torch.autograd.grad(kernels.matmul(a.requires_grad_(), b), a, dc)
    assert t.launches == 2


def test_compiled_and_checkpointed():
    a, b, _ = inputs(9, 7, 9)
    a, b = a.requires_grad_(), b.requires_grad_()

    def block(a):
        return kernels.matmul(torch.tanh(kernels.matmul(a, a.T)), b).tanh()

    want = torch.autograd.grad(block(a).square().sum(), (a, b))
    for f in (torch.compile(block, fullgraph=True), lambda a: checkpoint(block, a, use_reentrant=False)):
        for x, y in zip(torch.autograd.grad(f(a).square().sum(), (a, b)), want, strict=True):
            torch.testing.assert_close(x, y)


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("transposed", ["neither", "a", "b"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sm_90_has_wgmma_and_neither_spills_nor_loads_narrowly(dtype, transposed, own_cache):
    """Forward, and backward: whose operands are views that lie transposed."""
    a, b = (torch.empty(4096, 4096, dtype=dtype, device="meta") for _ in "ab")
    a, b = a.T if transposed == "a" else a, b.T if transposed == "b" else b
    (binary,) = aot.compile_launches("sm_90", kernels.multiply, a, b)
    assert binary.spilled == 0 and binary.shared <= aot.SHARED_LIMIT["sm_90"], binary
    assert binary.tensor_core.get("HGMMA", 0) and "HMMA" not in binary.tensor_core, binary
    assert binary.wide_loads == binary.loads, binary


def test_sm_90_float32_keeps_its_precision(own_cache):
    a = torch.empty(4096, 4096, device="meta")
    (binary,) = aot.compile_launches("sm_90", kernels.multiply, a, a)
    assert binary.spilled == 0 and binary.tensor_core == {} and "FFMA" in binary.assembly, binary
