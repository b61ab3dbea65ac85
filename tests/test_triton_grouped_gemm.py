"""Grouped GEMM: against a loop over experts in float64, under the lens, byte for byte, as ops, compiled for sm_90."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from triton_kernels import aot, grouped_tiles
from triton_kernels import grouped_gemm as kernels
from triton_kernels.lens import Trace

BOUND = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}
SWIGLU_BACKWARD = {torch.float32: 1e-5, torch.float16: 1.5e-3, torch.bfloat16: 1e-2}  # gate, up, dgate, dup are rounded

# rows of each expert, rows of nobody, T, D, F, (BLOCK_M, BLOCK_N, BLOCK_K)
CASES = {
    "one of everything": ((1,), 0, 1, 1, 1, (16, 16, 16)),
    "one expert": ((37,), 0, 11, 19, 23, (16, 16, 16)),
    "whole tiles": ((32, 16, 48), 0, 24, 32, 48, (16, 16, 16)),
    "one over and one under": ((17, 15, 31, 1), 0, 31, 17, 33, (16, 32, 16)),
    "empty at the edges": ((0, 5, 0, 0, 20, 0), 0, 7, 31, 15, (16, 16, 16)),
    "rows of nobody": ((3, 0, 14), 20, 13, 16, 16, (16, 16, 16)),
    "rows of nobody alone": ((0, 0), 19, 5, 8, 8, (16, 16, 16)),
    "the worst case of tiles": ((1, 17, 1, 17, 33), 1, 9, 16, 16, (16, 16, 16)),
    "more experts than rows": ((0, 1, 0, 0, 1, 0, 0, 0, 1), 0, 2, 16, 16, (16, 16, 16)),
    "tiles wider than all": ((5, 2, 4), 2, 6, 7, 9, (32, 64, 32)),
    "more strips than a band": ((10, 9), 0, 5, 16, 65, (16, 16, 32)),
    "more tiles than a band": ((90, 70), 3, 40, 16, 33, (16, 32, 16)),
}


def linear_plain(x, weight, ends):
    """The definition of `grouped_linear`."""
    edges = [0, *ends.tolist()]
    rows = [x[a:b] @ w.T for a, b, w in zip(edges, edges[1:], weight, strict=False)]
    return torch.cat([*rows, x.new_zeros(len(x) - edges[-1], weight.shape[1])])


def swiglu_plain(x, w_gate, w_up, ends, index):
    """The definition of `grouped_swiglu`."""
    rows = x[index.clamp(0, len(x) - 1)]  # of nobody's rows the token may be anything
    return F.silu(linear_plain(rows, w_gate, ends)) * linear_plain(rows, w_up, ends)


def inputs(case, dtype=torch.float32, seed=0):
    """x (T, D), rows of pairs (N, D), two weights, ends, index; of nobody's rows all is NaN or no token."""
    counts, nobody, T, D, H, _ = CASES[case]
    generator = torch.Generator().manual_seed(seed)
    x, rows = (torch.randn(n, D, generator=generator).to(dtype) for n in (T, sum(counts) + nobody))
    weights = [(torch.randn(len(counts), H, D, generator=generator) / D**0.5).to(dtype) for _ in range(2)]
    index = torch.randint(T, (len(rows),), generator=generator)
    rows[sum(counts):] = torch.nan
    index[sum(counts):] = 10**9 * torch.tensor([1, -1]).repeat(nobody)[:nobody]
    return (*(t.requires_grad_() for t in (x, rows, *weights)),
            torch.tensor(counts).cumsum(0).int(), index)


def gradient(y, ends, seed=1):
    """dy, NaN in nobody's rows."""
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)).to(y.dtype)
    dy[int(ends[-1]):] = torch.nan
    return dy


def error(got, exact):
    """Relative Frobenius norm; absolute where the truth is zero."""
    return ((got.double() - exact).norm() / (exact.norm().item() or 1)).item()


def compare(f, plain, leaves, rest, bounds, **tracing):
    """Result and gradients of f within (forward, backward) bounds of plain's in float64."""
    with Trace(**tracing):
        y = f(*leaves, *rest)
        dy = gradient(y, rest[0])
        got = torch.autograd.grad(y, leaves, dy)
    exact = [t.detach().double().nan_to_num().requires_grad_() for t in leaves]
    y64 = plain(*exact, *rest)
    want = torch.autograd.grad(y64, exact, dy.double().nan_to_num())
    assert y.dtype == leaves[0].dtype and y.shape == y64.shape and error(y, y64) < bounds[0]
    for i, (a, b, leaf) in enumerate(zip(got, want, leaves, strict=True)):
        assert a.dtype == leaf.dtype and a.shape == b.shape and error(a, b) < bounds[1], f"gradient {i}"


@pytest.fixture
def tile(monkeypatch):
    return lambda *blocks: monkeypatch.setitem(grouped_tiles.TILES, "cpu", ((*blocks, 4, 1),) * 4)


USES = [(case, torch.float32) for case in CASES] + [
    (case, dtype) for case in ("one over and one under", "rows of nobody") for dtype in (torch.float16, torch.bfloat16)]


@pytest.mark.parametrize("case, dtype", USES)
def test_linear(case, dtype, tile, poisoned):
    tile(*CASES[case][-1])
    _, rows, weight, _, ends, _ = inputs(case, dtype)
    compare(kernels.grouped_linear, linear_plain, (rows, weight), (ends,), [BOUND[dtype]] * 2, shuffle=0)


@pytest.mark.parametrize("case, dtype", USES)
def test_swiglu(case, dtype, tile, poisoned):
    tile(*CASES[case][-1])
    x, _, w_gate, w_up, ends, index = inputs(case, dtype)
    bounds = BOUND[dtype], SWIGLU_BACKWARD[dtype]
    compare(kernels.grouped_swiglu, swiglu_plain, (x, w_gate, w_up), (ends, index), bounds, shuffle=1)


def test_nobodys_rows_and_experts_without_rows_are_zeros(tile):
    tile(16, 16, 16)
    x, rows, weight, w_up, ends, index = inputs("rows of nobody")
    y, h = kernels.grouped_linear(rows, weight, ends), kernels.grouped_swiglu(x, weight, w_up, ends, index)
    drows, dweight = torch.autograd.grad(y, (rows, weight), gradient(y, ends))
    _, dgate, dup = torch.autograd.grad(h, (x, weight, w_up), gradient(h, ends))
    assert all(torch.equal(t[17:], torch.zeros_like(t[17:])) and t[:17].any() for t in (y, h, drows))
    assert not any(t[1].any() for t in (dweight, dgate, dup))


def test_many_experts(tile):
    """The tiles of 60 experts, counted by each program at once, cover every row once."""
    tile(16, 16, 16)
    counts = torch.randint(4, (60,), generator=torch.Generator().manual_seed(0)) * torch.tensor([1, 0, 1]).repeat(20)
    ends, rows = counts.cumsum(0).int(), torch.randn(int(counts.sum()), 4)
    weight = torch.randn(60, 3, 4)
    assert error(kernels.grouped_linear(rows, weight, ends), linear_plain(rows, weight, ends).double()) < 1e-6


def test_numbers_do_not_depend_on_the_order_of_programs_nor_on_training(tile):
    tile(32, 16, 32)
    x, _, w_gate, w_up, ends, index = inputs("one over and one under", torch.bfloat16)
    runs = []
    for seed in range(2):
        with Trace(shuffle=seed):
            h = kernels.grouped_swiglu(x, w_gate, w_up, ends, index)
            runs.append((h, *torch.autograd.grad(h, (x, w_gate, w_up), torch.ones_like(h))))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    with torch.no_grad():
        assert torch.equal(kernels.grouped_swiglu(x, w_gate, w_up, ends, index), h)


def test_tokens_of_no_pair_and_of_many(tile):
    tile(32, 64, 32)
    x, _, w_gate, w_up, ends, _ = inputs("one expert")
    index = torch.zeros(37, dtype=torch.int32)
    index[30:] = 10
    compare(kernels.grouped_swiglu, swiglu_plain, (x, w_gate, w_up), (ends, index), (1e-5, 1e-5))
    h = kernels.grouped_swiglu(x, w_gate, w_up, ends, index)
    (dx,) = torch.autograd.grad(h.sum(), x)
    assert not dx[1:10].any() and dx[0].any() and dx[10].any()


def test_float32_weights_get_gradients_that_were_never_rounded(tile):
    tile(32, 64, 32)
    x, rows, *weights, ends, index = inputs("one over and one under", torch.bfloat16)
    weights = [w.detach().float().requires_grad_() for w in weights]
    compare(kernels.grouped_linear, linear_plain, (rows, weights[0]), (ends,), (5e-3, 5e-3))
    y = kernels.grouped_linear(rows, weights[0], ends)
    (dw,) = torch.autograd.grad(y, weights[0], dy := gradient(y, ends))
    exact = [rows.detach().double(), weights[0].detach().double().requires_grad_()]
    (want,) = torch.autograd.grad(linear_plain(*exact, ends), exact[1], dy.double())
    assert dw.dtype == torch.float32 and error(dw, want) < 1e-6
    compare(kernels.grouped_swiglu, swiglu_plain, (x, *weights), (ends, index), (5e-3, 1e-2))


@pytest.mark.parametrize("name", ["empty at the edges", "more tiles than a band"])
def test_against_torch(name, tile):
    """F.grouped_mm wants rows of a multiple of 16 bytes, and leaves nobody's rows as they were."""
    tile(16, 16, 16)
    D, H, ends = 24, 40, inputs(name)[4]
    rows, weight = torch.randn(int(ends[-1]), D), torch.randn(len(ends), H, D) / D**0.5
    rows, weight = (t.bfloat16().requires_grad_() for t in (rows, weight))
    exact = [t.detach().double().requires_grad_() for t in (rows, weight)]
    dy = gradient(rows.new_empty(len(rows), H), ends)
    results = []
    for f, leaves in ((kernels.grouped_linear, (rows, weight)), (linear_plain, exact),
                      (lambda x, w, offs: F.grouped_mm(x, w.transpose(1, 2), offs=offs), (rows, weight))):
        y = f(*leaves, ends)
        results.append((y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))))
    for ours, want, theirs in zip(*results, strict=True):
        assert error(ours, want) <= 1.05 * error(theirs, want) + 1e-6
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


def test_it_moves_the_bytes_it_must(tile):
    tile(16, 32, 16)
    counts, nobody, _, D, H, _ = CASES["rows of nobody"]
    x, rows, w, v, ends, index = inputs("rows of nobody", torch.bfloat16)
    N, of_experts, strips, tiles = sum(counts) + nobody, sum(counts), 1, 2  # H = D = 16; 3 and 14 rows: a tile each
    programs = (-(-N // 16) + len(counts)) * strips
    with Trace(rows=rows, w=w, ends=ends) as t:
        y = kernels.grouped_linear(rows, w, ends)
    assert t.launches == 1 and t.grid == (programs, 1, 1)
    assert t.loads["rows"] == 2 * D * of_experts * strips and t.loads["w"] == 2 * tiles * H * D
    assert t.loads["ends"] == 8 * len(counts) * programs and t.stores["y_ptr"] == y.nbytes
    with Trace(rows=rows, w=w, ends=ends) as t:
        torch.autograd.grad(y, (rows, w), dy := gradient(y, ends))
    assert t.launches == 2 and t.loads["a_ptr"] == 2 * 2 * H * of_experts  # dy: for dx, and for dw
    assert t.loads["rows"] == 2 * D * of_experts and t.stores["dw_ptr"] == w.nbytes
    assert t.stores["y_ptr"] == rows.nbytes  # dx
    with Trace(x=x, w=w, v=v, ends=ends, index=index) as t:
        h = kernels.grouped_swiglu(x, w, v, ends, index)
    assert t.loads["x"] == 2 * D * of_experts and t.loads["w"] == t.loads["v"] == 2 * tiles * H * D
    assert t.loads["index"] == 8 * N and all(t.stores[k] == h.nbytes for k in ("h_ptr", "gate_ptr", "up_ptr"))
    with Trace(x=x, w=w, v=v, index=index) as t:
        torch.autograd.grad(h, (x, w, v), dy)
    assert t.launches == 5 and t.loads["x"] == 2 * 2 * D * of_experts and t.loads["w"] == 2 * tiles * H * D
    assert t.loads["index"] == 2 * 8 * of_experts
    with torch.no_grad(), Trace() as t:
        kernels.grouped_swiglu(x, w, v, ends, index)
    assert sum(t.stores.values()) == h.nbytes  # no gate, no up


def test_a_band_of_tiles_shares_its_weights(tile):
    """Neighbours in time: GROUP tiles of rows take one strip of the weight before the next strip begins."""
    tile(16, 16, 16)
    rows, weight = torch.randn(16 * 10, 16), torch.randn(1, 48, 16)
    with Trace() as t:
        kernels.grouped_linear(rows, weight, torch.tensor([160], dtype=torch.int32))
    owners = t.owners("y_ptr")[::16, ::16]
    assert owners[:8].tolist() == [[i, 8 + i, 16 + i] for i in range(8)]
    assert owners[8:].tolist() == [[24 + i, 27 + i, 30 + i] for i in range(2)]  # 11 tiles at most: the last band has 3


def test_nothing(tile):
    weight = torch.randn(2, 3, 4, requires_grad=True)
    ends, index = torch.zeros(2, dtype=torch.int32), torch.zeros(0, dtype=torch.int64)
    for T in (0, 5):
        x, rows = torch.randn(T, 4, requires_grad=True), torch.randn(0, 4, requires_grad=True)
        y, h = kernels.grouped_linear(rows, weight, ends), kernels.grouped_swiglu(x, weight, weight, ends, index)
        assert y.shape == h.shape == (0, 3)
        got = *torch.autograd.grad(y.sum(), (rows, weight)), *torch.autograd.grad(h.sum(), (x, weight))
        assert [g.shape for g in got] == [(0, 4), (2, 3, 4), (T, 4), (2, 3, 4)] and not any(g.any() for g in got)
    y = kernels.grouped_linear(torch.zeros(5, 0), torch.zeros(2, 3, 0), ends + 5)
    assert torch.equal(y, torch.zeros(5, 3))


def test_layouts(tile):
    tile(32, 64, 32)
    x, rows, w_gate, w_up, ends, index = (
        t.detach() if t.is_floating_point() else t for t in inputs("one over and one under"))

    def turn(t):
        return t.transpose(-1, -2).contiguous().transpose(-1, -2).requires_grad_()

    compare(kernels.grouped_linear, linear_plain, (turn(rows), turn(w_gate)), (ends,), (1e-5, 1e-5))
    leaves = turn(x), turn(w_gate), w_up.clone().requires_grad_()
    compare(kernels.grouped_swiglu, swiglu_plain, leaves, (ends, torch.stack((index, index), 1)[:, 1]), (1e-5, 1e-5))


def test_errors():
    x, rows, w_gate, w_up, ends, index = inputs("one expert")
    for wrong in ((rows[0], w_gate, ends), (rows[:, 1:], w_gate, ends), (rows, w_gate[0], ends),
                  (rows, w_gate, ends[1:]), (rows, w_gate, ends.long()), (rows, w_gate[:0], ends[:0])):
        with pytest.raises(ValueError, match=r"grouped_linear: x \(rows, D\), .* are needed; these are \("):
            kernels.grouped_linear(*wrong)
    with pytest.raises(ValueError, match=r"these are \(11, 19\), \(1, 23, 19\), \(1, 22, 19\), \(1,\)"):
        kernels.grouped_swiglu(x, w_gate, w_up[:, 1:], ends, index)
    with pytest.raises(ValueError, match=r"index \(37,\) torch.float32; \(N,\) of int32 or int64 is needed"):
        kernels.grouped_swiglu(x, w_gate, w_up, ends, index.float())
    for f, args in ((kernels.grouped_linear, (rows.double(), w_gate, ends)),
                    (kernels.grouped_swiglu, (x.double(), w_gate, w_up, ends, index))):
        with pytest.raises(TypeError, match="float64 needs the plain definition"):
            f(*args)


def test_flops_are_counted():
    """Of all N rows: whose they are, the counter cannot know."""
    x, rows, w_gate, w_up, ends, index = inputs("rows of nobody")
    product = 2 * 37 * 16 * 16
    with FlopCounterMode(display=False) as counter:
        kernels.grouped_linear(rows, w_gate, ends).sum().backward()
    assert counter.get_total_flops() == 3 * product
    with FlopCounterMode(display=False) as counter:
        kernels.grouped_swiglu(x, w_gate, w_up, ends, index).sum().backward()
    assert counter.get_total_flops() == 6 * product


def test_opcheck(tile):
    tile(32, 64, 32)
    x, rows, w_gate, w_up, ends, index = inputs("empty at the edges")
    torch.library.opcheck(kernels.linear_op, (rows, w_gate, ends))
    torch.library.opcheck(kernels.swiglu_op, (x, w_gate, w_up, ends, index, True))
    x, rows, w_gate, w_up = (t.detach() for t in (x, rows, w_gate, w_up))
    torch.library.opcheck(kernels.swiglu_op, (x, w_gate, w_up, ends, index, False))
    h, gate, up = kernels.swiglu_forward(x, w_gate, w_up, ends, index, True)
    torch.library.opcheck(kernels.linear_backward_op, (h, rows, w_gate, ends))
    torch.library.opcheck(kernels.swiglu_backward_op, (h, x, w_gate, w_up, gate, up, ends, index))


def test_compiled_and_checkpointed(tile):
    tile(32, 64, 32)
    x, _, w_gate, w_up, ends, index = inputs("one over and one under")
    w_down = w_gate.detach().transpose(1, 2).contiguous().requires_grad_()

    def experts(x):
        h = kernels.grouped_swiglu(torch.tanh(x), w_gate, w_up, ends, index)
        return x.index_add(0, index, kernels.grouped_linear(h, w_down, ends))

    def gradients(f):
        return torch.autograd.grad(f(x).square().sum(), (x, w_gate, w_up, w_down))

    want = gradients(experts)
    for f in (torch.compile(experts, fullgraph=True), lambda x: checkpoint(experts, x, use_reentrant=False)):
        for a, b in zip(gradients(f), want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def binaries(arch, dtype=torch.bfloat16, T=8192, N=65536, D=2048, H=1024, E=64):
    """Of every kernel, in every use."""
    x, rows, y = (torch.empty(n, d, dtype=dtype, device="meta") for n, d in ((T, D), (N, D), (N, H)))
    w = torch.empty(E, H, D, dtype=dtype, device="meta")
    ends = torch.empty(E, dtype=torch.int32, device="meta")
    index = torch.empty(N, dtype=torch.int64, device="meta")
    yield from aot.compile_launches(arch, kernels.linear_forward, rows, w, ends, arch)
    yield from aot.compile_launches(arch, kernels.linear_backward, y, rows, w, ends, arch)
    for with_gradients in (True, False):
        yield from aot.compile_launches(arch, kernels.swiglu_forward, x, w, w, ends, index, with_gradients, arch)
    yield from aot.compile_launches(arch, kernels.swiglu_backward, y, x, w, w, y, y, ends, index, arch)


def test_sm_90_neither_spills_nor_loads_narrowly(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    found = list(binaries("sm_90"))
    assert [b.kernel for b in found] == [
        "grouped_product", "grouped_product", "grouped_dw", *["grouped_swiglu_forward"] * 2,
        "swiglu_backward", "grouped_product", "sum_of_pairs", "grouped_dw", "grouped_dw"]
    for binary in found:
        assert binary.spilled == 0 and binary.shared <= aot.SHARED_LIMIT["sm_90"], binary
        if binary.kernel.startswith("grouped"):
            assert binary.tensor_core.get("HGMMA", 0) and "HMMA" not in binary.tensor_core, binary
            assert binary.wide_loads >= 36, binary  # of x, dy and the weights; ends and index are one number a row


def test_sm_90_where_every_int_is_one(tmp_path, monkeypatch):
    """The launcher makes constants of them, which are no blocks; and in float32 the products take the registers."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert all(binary.spilled == 0 for binary in binaries("sm_90", torch.float32, 1, 1, 1, 1, 1))


def test_ends_may_lie_apart_in_memory():
    x, weight = torch.randn(9, 16), torch.randn(2, 8, 16)
    apart = torch.tensor([[4, 7], [9, 7]], dtype=torch.int32)[:, 0]
    assert torch.equal(kernels.grouped_linear(x, weight, apart),
                       kernels.grouped_linear(x, weight, apart.contiguous()))
