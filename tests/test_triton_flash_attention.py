"""Flash attention: against float64 under every mask, under the lens, tile by tile, as ops, and compiled for sm_90."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from nanomai import ops
from triton_kernels import aot, flash_tiles
from triton_kernels import flash_attention as kernels
from triton_kernels.lens import Trace

FORWARD = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}
BACKWARD = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}

# (B, H, G, T, S, K), window, lengths of documents (negative: ids in no order), (BLOCK_Q, BLOCK_K)
CASES = {
    "causal": ((2, 2, 1, 37, 37, 16), None, None, (16, 16)),
    "one head key for all": ((1, 4, 1, 33, 33, 32), None, None, (32, 16)),
    "as many key heads": ((1, 3, 3, 31, 31, 16), None, None, (16, 32)),
    "one position": ((2, 2, 1, 1, 1, 16), None, None, (16, 16)),
    "a last query": ((1, 4, 2, 1, 67, 64), None, None, (16, 32)),
    "later queries": ((1, 2, 1, 17, 65, 16), None, None, (16, 16)),
    "a whole tile": ((1, 1, 1, 32, 32, 128), None, None, (32, 32)),
    "heads of 24": ((1, 2, 1, 19, 23, 24), 7, None, (16, 16)),
    "heads of 1": ((1, 1, 1, 5, 5, 1), None, None, (16, 16)),
    "window of 1": ((1, 2, 1, 17, 17, 16), 1, None, (16, 16)),
    "window under a tile": ((1, 2, 1, 65, 65, 16), 5, None, (32, 16)),
    "window of a tile": ((1, 1, 1, 63, 63, 16), 16, None, (16, 16)),
    "window over tiles": ((1, 1, 1, 50, 97, 16), 41, None, (16, 16)),
    "window one short of tiles": ((1, 1, 1, 64, 64, 16), 47, None, (16, 16)),
    "window one over tiles": ((1, 1, 1, 64, 66, 16), 33, None, (16, 16)),
    "window's first pair ends a tile": ((1, 1, 1, 49, 49, 16), 18, None, (16, 16)),
    "the last pair of a tile is ahead": ((1, 1, 1, 20, 34, 16), None, None, (16, 16)),
    "the last pair of a tile is seen": ((1, 1, 1, 20, 35, 16), None, None, (16, 16)),
    "window over all": ((1, 1, 1, 20, 20, 16), 2**40, None, (16, 16)),
    "documents inside a tile": ((2, 2, 1, 47, 47, 16), None, (5, 3, 1, 38), (16, 32)),
    "documents at the edges": ((1, 1, 1, 64, 64, 16), None, (16, 32, 16), (16, 16)),
    "documents in no order": ((2, 1, 1, 50, 50, 16), None, (-4,), (16, 16)),
    "all masks": ((1, 4, 2, 41, 73, 32), 9, (7, 20, 6, 40), (16, 16)),
    "all masks, wide tiles": ((1, 2, 1, 66, 66, 16), 21, (30, 2, 34), (32, 64)),
}


def documents(batch, length, lengths):
    """(B, S); each row of the batch one position further on, so that no two are alike."""
    if lengths is None:
        return None
    if lengths[0] < 0:
        return torch.randint(-lengths[0], (batch, length), generator=torch.Generator().manual_seed(3)) - 2
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return torch.stack([ids.roll(row).sort().values for row in range(batch)])


def inputs(shape, dtype, seed=0):
    """q, k, v and do."""
    batch, heads, groups, length, keys, width = shape
    generator = torch.Generator().manual_seed(seed)
    q, k, v, do = (torch.randn(batch, h, n, width, generator=generator).to(dtype)
                   for h, n in ((heads, length), (groups, keys), (groups, keys), (heads, length)))
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), do


def mask(shape, window, ids):
    positions, length = torch.arange(shape[4]), shape[3]
    queries = None if ids is None else ids[:, -length:]
    return ops.attention_mask(positions[-length:], positions, window, queries, ids)


def error(got, exact):
    """Relative Frobenius norm; absolute where the truth is zero (the softmax of one number has no gradient)."""
    norm = exact.norm()
    return ((got.double() - exact).norm() / (norm if norm > 1e-12 else 1.0)).item()


@pytest.fixture
def tile(monkeypatch):
    return lambda queries, keys: monkeypatch.setitem(flash_tiles.TILES, "cpu", ((queries, keys, 4, 1),) * 6)


def check(shape, window, ids, dtype, layout=lambda x: x):
    *leaves, do = inputs(shape, dtype)
    with Trace(shuffle=shape[3]):
        o = kernels.flash_attention(*map(layout, leaves), window, ids)
        got = torch.autograd.grad(o, leaves, do)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    o64 = ops.attention_plain(*map(layout, exact), mask(shape, window, ids))
    want = torch.autograd.grad(o64, exact, do.double())
    assert o.dtype == dtype and o.shape == o64.shape and error(o, o64) < FORWARD[dtype]
    for name, a, b in zip("q k v".split(), got, want, strict=True):
        assert a.dtype == dtype and a.shape == b.shape and error(a, b) < BACKWARD[dtype], f"d{name}"


@pytest.mark.parametrize("case", CASES)
def test_float32(case, tile, poisoned):
    shape, window, lengths, blocks = CASES[case]
    tile(*blocks)
    check(shape, window, documents(shape[0], shape[4], lengths), torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["all masks", "a whole tile", "window over tiles"])
def test_half_precision(case, dtype, tile, poisoned):
    shape, window, lengths, blocks = CASES[case]
    tile(*blocks)
    check(shape, window, documents(shape[0], shape[4], lengths), dtype)


def test_large_scores(tile):
    """exp of a score of 1,000 is infinite; and the largest of a row may be the last."""
    tile(16, 16)
    q, k, v, _ = (x.detach() for x in inputs((1, 1, 1, 40, 40, 16), torch.float32))
    k = k * 300 * torch.arange(40)[:, None]
    assert error(kernels.flash_attention(q, k, v), ops.attention_plain(q.double(), k.double(), v.double())) < 1e-4


def test_log_sum_exp(tile):
    tile(16, 32)
    q, k, v, _ = (x.detach() for x in inputs((1, 2, 1, 21, 21, 16), torch.float32))
    lse = kernels.forward(q, k, v, None, None, 0.25)[1]
    scores = q.double() @ k.double().transpose(-1, -2) / 4
    scores = scores.masked_fill(~mask((1, 2, 1, 21, 21, 16), None, None), -torch.inf)
    assert lse.dtype == torch.float32 and error(lse, scores.logsumexp(-1)) < 1e-6


@pytest.mark.parametrize("layout", ["heads beside positions", "slices of one", "expanded", "keys transposed"])
def test_layouts(layout, tile):
    """Strides are read as they are where the numbers of a head are contiguous; all else is copied first."""
    tile(16, 16)
    change = {
        "heads beside positions": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        "slices of one": lambda x: torch.cat((x, x), -1)[..., x.shape[-1]:],
        "expanded": lambda x: x[:1].expand_as(x),
        "keys transposed": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2) if x.shape[1] == 1 else x,
    }[layout]
    check((2, 2, 1, 20, 20, 16), 6, None, torch.float32, change)


def test_gradient_of_a_sum_is_expanded(tile):
    tile(16, 16)
    q, k, v, _ = inputs((1, 2, 1, 9, 9, 16), torch.float32)
    got = torch.autograd.grad(kernels.flash_attention(q, k, v).sum(), (q, k, v))
    want = torch.autograd.grad(ops.attention_plain(q, k, v).sum(), (q, k, v))
    assert all((a - b).abs().max() < 1e-5 for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("window, lengths", [(None, None), (20, None), (None, (3, 40, 5, 49)), (30, (3, 40, 5, 49))])
def test_only_tiles_that_meet_are_read(window, lengths, tile):
    """A tile of keys is read as often as there are tiles of queries with a pair that is visible; no byte more."""
    tile(BLOCK_Q := 16, BLOCK_K := 32)
    batch, heads, groups, length, keys, width = shape = 1, 2, 1, 70, 97, 16
    ids = documents(batch, keys, lengths)
    q, k, v, do = inputs(shape, torch.bfloat16)
    seen = mask(shape, window, ids).expand(1, 1, length, keys)[0, 0]
    seen = torch.nn.functional.pad(seen, (0, -keys % BLOCK_K, 0, -length % BLOCK_Q))
    meet = seen.view(-1, BLOCK_Q, seen.shape[1] // BLOCK_K, BLOCK_K).any(3).any(1)  # (tiles of queries, of keys)
    assert 0 < meet.sum() < meet.numel()
    key_reads = meet.sum(0).repeat_interleave(BLOCK_K)[:keys] * (heads // groups)
    with Trace(q=q, k=k, v=v) as t:
        o = kernels.flash_attention(q, k, v, window, ids)
    bytes_of_keys = int(key_reads.sum()) * groups * width * 2
    assert t.loads["q"] == q.nbytes and t.loads["k"] == t.loads["v"] == bytes_of_keys
    assert t.stores["o_ptr"] == q.nbytes and t.stores["lse_ptr"] == 4 * heads * length
    assert (t.reads("k") == key_reads[None, None, :, None].numpy()).all()
    with Trace(q=q, k=k, v=v, do=do) as t:
        torch.autograd.grad(o, (q, k, v), do)
    query_reads = meet.sum(1).repeat_interleave(BLOCK_Q)[:length]
    assert (t.reads("q") == 1 + query_reads[:, None].numpy()).all() and (t.reads("do") == t.reads("q")).all()
    assert t.loads["k"] == t.loads["v"] == bytes_of_keys + k.nbytes  # dq walks, dk dv holds
    assert t.loads["delta_ptr"] == int(query_reads.sum()) * heads * 4 and t.stores["delta_ptr"] == 4 * heads * length
    assert t.stores["dq_ptr"] == q.nbytes and t.stores["dk_ptr"] == t.stores["dv_ptr"] == k.nbytes


def test_causal_skips_half_of_the_keys(tile):
    tile(16, 16)
    q, k, v, _ = (x.detach() for x in inputs((1, 1, 1, 128, 128, 16), torch.float32))
    with Trace(k=k) as t:
        kernels.flash_attention(q, k, v)
    assert t.loads["k"] == k.nbytes * (8 + 1) / 2  # tiles 8 + 7 + ... + 1 of 8, for 8 tiles of queries
    with Trace(k=k) as t:
        kernels.flash_attention(q, k, v, document_ids=torch.arange(8).repeat_interleave(16)[None])
    assert t.loads["k"] == k.nbytes


def test_document_reach():
    reach = kernels.document_reach(torch.tensor([[7, 7, 2**40, 7, -1], [0, 1, 1, 2, 2]]))
    assert reach.dtype == torch.int32
    assert reach.tolist() == [[[0, 0, 2, 0, 4], [3, 3, 2, 3, 4]], [[0, 1, 1, 3, 3], [0, 2, 2, 4, 4]]]


def test_nothing():
    for shape in ((0, 2, 1, 5, 5, 16), (2, 2, 1, 0, 5, 16)):
        q, k, v, _ = inputs(shape, torch.float32)
        dk = torch.autograd.grad(kernels.flash_attention(q, k, v).sum(), k)[0]
        assert dk.shape == k.shape and not dk.any()


@pytest.mark.parametrize("change, kind, message", [
    ({"dtype": torch.float64}, TypeError, "torch.float64; one of float32, bfloat16, float16 for all"),
    ({"k": torch.bfloat16}, TypeError, "torch.float32, torch.bfloat16, torch.bfloat16; one of"),
    ({"shape": (1, 3, 2, 4, 4, 16)}, ValueError, r"q \(1, 3, 4, 16\), k \(1, 2, 4, 16\), v .* G dividing H"),
    ({"shape": (1, 2, 1, 5, 4, 16)}, ValueError, "T at most S"),
    ({"shape": (1, 2, 1, 4, 4, 160)}, ValueError, "K at most 128"),
    ({"window": 0}, ValueError, "a window of 0; a query sees one key at least, its own"),
    ({"document_ids": torch.zeros(1, 3)}, ValueError, r"document_ids \(1, 3\); must be \(1, 4\)"),
])
def test_errors(change, kind, message):
    q, k, v, _ = inputs(change.pop("shape", (1, 2, 1, 4, 4, 16)), change.pop("dtype", torch.float32))
    keys = change.pop("k", k.dtype)
    with pytest.raises(kind, match=message):
        kernels.flash_attention(q, k.to(keys), v.to(keys), **change)


def test_opcheck(tile):
    tile(16, 16)
    q, k, v, do = inputs((1, 2, 1, 9, 9, 16), torch.float32)
    reach = kernels.document_reach(torch.arange(9)[None] // 4)
    torch.library.opcheck(kernels.flash_attention_op, (q, k, v, reach, 5, 0.25))
    beside = q.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    torch.library.opcheck(kernels.flash_attention_op, (beside, k, v, None, None, 1.0))
    plain = [x.detach() for x in (do, q, k, v, do)]
    torch.library.opcheck(kernels.flash_attention_backward_op, (*plain, torch.ones(1, 2, 9), reach, None, 0.25))


def test_compiled_and_checkpointed(tile):
    tile(16, 16)
    x, _, _, _ = inputs((2, 2, 1, 12, 12, 16), torch.float32)
    ids = torch.arange(12).expand(2, 12) // 5

    def block(x):
        heads = x.transpose(1, 2).reshape(2, 12, 32)  # as a model: one product, three slices
        q, k, v = torch.cat((heads, heads), -1).split((32, 16, 16), dim=-1)
        q, k, v = (y.view(2, 12, -1, 16).transpose(1, 2) for y in (q, k, v))
        y = kernels.flash_attention(q, k, v, 7, ids)
        return x + y.transpose(1, 2).reshape(2, 12, 32).view(2, 12, 2, 16).transpose(1, 2).tanh()

    (want,) = torch.autograd.grad(block(x).square().sum(), x)
    for f in (torch.compile(block, fullgraph=True), lambda x: checkpoint(block, x, use_reentrant=False)):
        torch.testing.assert_close(torch.autograd.grad(f(x).square().sum(), x)[0], want)


def binaries(arch, width, window=None, with_documents=False, dtype=torch.bfloat16):
    """Those of the three kernels at (B, H, G, T) = (4, 16, 4, 4096), heads beside positions as a model has them."""
    q, k, v = (torch.empty(4, 4096, h, width, dtype=dtype, device="meta").transpose(1, 2) for h in (16, 4, 4))
    lse = torch.empty(4, 16, 4096, device="meta")
    reach = torch.empty(4, 2, 4096, dtype=torch.int32, device="meta") if with_documents else None
    rest = reach, window, width ** -0.5, arch
    yield from aot.compile_launches(arch, kernels.forward, q, k, v, *rest)
    yield from aot.compile_launches(arch, kernels.backward, q, q, k, v, q, lse, *rest)


@pytest.mark.parametrize("width, window, with_documents", [(128, None, False)])
def test_sm_90_neither_spills_nor_loads_narrowly(width, window, with_documents, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    found = list(binaries("sm_90", width, window, with_documents))
    assert tuple(b.kernel for b in found) == ("flash_forward", "flash_dq", "flash_dkdv")
    for binary in found:
        assert binary.spilled == 0 and binary.shared <= aot.SHARED_LIMIT["sm_90"], binary
        assert binary.tensor_core.get("HGMMA", 0) and "HMMA" not in binary.tensor_core, binary
        assert binary.wide_loads >= 16, binary  # of q, k, v, o and do; lse, delta and reach are one number a row


def test_documents_of_another_batch_are_refused():
    q, ids = torch.randn(3, 2, 20, 16), torch.zeros(1, 20, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"document_ids \(1, 20\); must be \(3, 20\)"):
        kernels.flash_attention(q, q, q, document_ids=ids)
    with pytest.raises(ValueError, match=r"reach \(1, 2, 20\); must be \(3, 2, 20\)"):
        kernels.flash_attention(q, q, q, reach=kernels.document_reach(ids))
