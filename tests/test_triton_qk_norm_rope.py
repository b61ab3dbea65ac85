"""QK-norm + RoPE kernels: against float64, under the lens, byte for byte, as ops, and compiled without spills."""

import pytest
import torch
import triton
from torch.utils.checkpoint import checkpoint

from nanomai import ops
from triton_kernels import aot
from triton_kernels import qk_norm_rope as kernels
from triton_kernels.lens import Trace

EPS = 1e-5
# A result is rounded once: by at most 2^-11 of itself in float16, 2^-8 in bfloat16.
BOUND = {torch.float32: 1e-5, torch.float16: 5e-4, torch.bfloat16: 4e-3}
# B, H, G, T, K
SHAPES = [(1, 1, 1, 1, 2), (1, 3, 1, 127, 16), (2, 4, 2, 33, 30), (3, 2, 2, 5, 64), (1, 2, 1, 31, 130),
          (2, 1, 1, 1, 256)]


def plain(q, k, cos, sin, q_weight=None, k_weight=None, eps=EPS):
    """The definition of `qk_norm_rope`, of the pieces that ops.py defines."""
    if q_weight is not None:
        q, k = ops.rms_norm_plain(q, q_weight, eps), ops.rms_norm_plain(k, k_weight, eps)
    return ops.rotary_plain(q, cos, sin), ops.rotary_plain(k, cos, sin)


def inputs(shape, dtype, normed=True, by_row=False, seed=0):
    """q, k, cos, sin[, q_weight, k_weight], and gradients of both results."""
    batch, heads, groups, tokens, width = shape
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(size, generator=generator).requires_grad_()

    qs = [draw(batch, n, tokens, width).detach().to(dtype).requires_grad_() for n in (heads, groups) * 2]
    offset = torch.randint(50, (batch, 1), generator=generator) if by_row else 3
    cos, sin = ops.rotary_table(torch.arange(tokens) + offset, width, 1e4)
    tables = (cos[:, None], sin[:, None]) if by_row else (cos, sin)
    return [*qs[:2], *tables, *([draw(width), draw(width)] if normed else [])], qs[2:]


def error(got, exact):
    """Relative Frobenius norm."""
    return ((got.double() - exact).norm() / exact.norm().clamp(min=1e-30)).item()


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("normed", [True, False])
def test_qk_norm_rope(shape, dtype, normed, poisoned):
    eps = 0.5 if shape[-1] == 2 else EPS  # of two normed numbers hardly a gradient is left, and that by cancellation
    args, d_out = inputs(shape, dtype, normed, by_row=shape[0] > 1)
    learned = [t for t in args if t.requires_grad]
    with Trace(q=args[0], k=args[1], shuffle=shape[3]):
        out = kernels.qk_norm_rope(*args, eps=eps)
        got = torch.autograd.grad(out, learned, d_out)
    exact = [t.detach().double().requires_grad_(t.requires_grad) for t in args]
    out64 = plain(*exact, eps=eps)
    want = torch.autograd.grad(out64, [t for t in exact if t.requires_grad], [d.double() for d in d_out])
    assert [t.dtype for t in (*out, *got)] == [dtype] * 4 + [torch.float32] * (len(got) - 2)
    names = "q_out k_out dq dk dq_weight dk_weight".split()
    for name, a, b in zip(names, (*out, *got), (*out64, *want), strict=False):
        assert a.shape == b.shape and error(a, b) < BOUND[dtype], name


def test_it_agrees_with_the_operations_that_the_model_calls():
    args, _ = inputs((2, 4, 2, 9, 16), torch.float32)
    q, k, cos, sin, q_weight, k_weight = args
    got = kernels.qk_norm_rope(*args, eps=EPS)
    for x, weight, y in ((q, q_weight, got[0]), (k, k_weight, got[1])):
        torch.testing.assert_close(y, ops.rotary(ops.rms_norm(x, weight, EPS), cos, sin))


def by_token(*xs):
    """The same numbers, in memory (B, T, H, K)."""
    return [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in xs]


@pytest.mark.parametrize("normed", [True, False])
def test_it_moves_the_bytes_it_must(normed, monkeypatch):
    """The roofline as a unit test: q, k and their results cross once; cos and sin once for all the heads."""
    monkeypatch.setattr(kernels, "TILE", 256)
    (q, k, *rest), d_out = inputs((2, 4, 2, 20, 40), torch.bfloat16, normed)
    q, k, dq_out, dk_out = by_token(q, k, *d_out)
    programs = triton.cdiv(40, kernels.tiles(q)["TOKENS"])
    weights = [programs * w.nbytes for w in rest[2:]] or [0]
    names = dict(zip("cos sin q_weight k_weight".split(), rest, strict=False))
    with Trace(q=q, k=k, **names) as t:
        out = kernels.qk_norm_rope(q, k, *rest, eps=EPS)
    assert programs > 1 and (t.loads["q"], t.loads["k"]) == (q.nbytes, k.nbytes)
    assert (t.loads["cos"], t.loads["sin"]) == (2 * rest[0].nbytes, 2 * rest[1].nbytes)  # 2 batch rows, 6 heads
    assert sum(t.loads.values()) == q.nbytes + k.nbytes + 4 * rest[0].nbytes + sum(weights)
    assert {n: b for n, b in t.stores.items() if b} == {"q_out_ptr": q.nbytes, "k_out_ptr": k.nbytes}
    with Trace(q=q, k=k, dq_out=dq_out, dk_out=dk_out, **names) as t:
        torch.autograd.grad(out, q, (dq_out, dk_out))
    assert t.loads["dq_out"] == q.nbytes and t.loads["dk_out"] == k.nbytes
    assert (t.loads["q"], t.loads["k"]) == ((q.nbytes, k.nbytes) if normed else (0, 0))
    assert sum(t.loads.values()) == (1 + normed) * (q.nbytes + k.nbytes) + 4 * rest[0].nbytes + sum(weights)
    partial = 2 * programs * 40 * 4 if normed else 0
    assert sum(t.stores.values()) == q.nbytes + k.nbytes + partial


def test_layouts():
    """Results lie as a projection would have made them, wherever q and k lay; queries of a decoder too."""
    args, d_out = inputs((2, 3, 1, 7, 16), torch.float32)
    want = kernels.qk_norm_rope(*args, eps=EPS)
    for q, k in (by_token(*args[:2]), args[:2], [x.mT.contiguous().mT for x in args[:2]]):
        got = kernels.qk_norm_rope(q, k, *args[2:], eps=EPS)
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b) and a.transpose(1, 2).is_contiguous()
    got = torch.autograd.grad(want, args[:2], [d[..., :1].expand_as(d) for d in d_out])
    also = torch.autograd.grad(plain(*args), args[:2], [d[..., :1].expand_as(d) for d in d_out])
    assert all(error(a, b.double()) < 1e-5 for a, b in zip(got, also, strict=True))
    empty = [torch.zeros(1, 2, 0, 16, requires_grad=True) for _ in range(2)]
    sum(x.sum() for x in kernels.qk_norm_rope(*empty, *args[2][:0][None], *args[3][:0][None], *args[4:])).backward()
    assert empty[0].grad.shape == (1, 2, 0, 16) and not args[4].grad.any()


def test_a_rotation_alone_keeps_only_its_angles():
    (q, k, cos, sin), _ = inputs((1, 2, 1, 5, 8), torch.float32, normed=False)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        kernels.qk_norm_rope(q, k, cos, sin)
    assert [t.data_ptr() for t in kept] == [cos.data_ptr(), sin.data_ptr()]


def test_a_gradient_that_nobody_gives_is_zero():
    args, d_out = inputs((1, 2, 1, 5, 8), torch.float32)
    dq, dk, dk_weight = torch.autograd.grad(kernels.qk_norm_rope(*args, eps=EPS)[0], (*args[:2], args[5]), d_out[0])
    (want,) = torch.autograd.grad(plain(*args)[0], args[0], d_out[0])
    assert error(dq, want.double()) < 1e-5 and not dk.any() and not dk_weight.any()


def test_what_does_not_fit_is_refused():
    (q, k, cos, sin, weight, _), _ = inputs((2, 4, 2, 6, 8), torch.float32)
    with pytest.raises(TypeError, match=r"torch.float64 needs the plain definition"):
        kernels.qk_norm_rope(q.double(), k.double(), cos, sin)
    for other in (k[:, :, :5], k[..., :6], k[:1], k.half(), k[0]):
        with pytest.raises(ValueError, match=r"must be \(B, heads, T, K\) and differ in heads only"):
            kernels.qk_norm_rope(q, other, cos, sin)
    for width in (7, 1026):
        x = torch.zeros(1, 1, 1, width)
        with pytest.raises(ValueError, match=f"heads of {width} numbers; even widths from 2 to 1024 fit"):
            kernels.qk_norm_rope(x, x, cos, sin)
    for table in (cos[:5], cos[:, :3], cos[None], cos.repeat(1, 2)):
        with pytest.raises(ValueError, match=r"either \(6, 4\) or \(2, 1, 6, 4\) fits q \(2, 4, 6, 8\)"):
            kernels.qk_norm_rope(q, k, table, table)
    with pytest.raises(ValueError, match=r"cos \(6, 4\), sin \(5, 4\)"):
        kernels.qk_norm_rope(q, k, cos, sin[:5])
    for weights in ((weight, None), (None, weight), (weight, weight[:4])):
        with pytest.raises(ValueError, match=r"both weights must be \(8,\), or both None"):
            kernels.qk_norm_rope(q, k, cos, sin, *weights)


@pytest.mark.parametrize("normed", [True, False])
def test_opcheck(normed):
    (q, k, *rest), d_out = inputs((2, 2, 1, 3, 6), torch.float32, normed)
    weights = rest[2:] or [None, None]
    torch.library.opcheck(kernels.qk_norm_rope_op, (q, k, *rest[:2], *weights, EPS))
    saved = [t if t is None or not normed else t.detach() for t in ((q, k) if normed else (None, None))]
    weights = [w if w is None else w.detach() for w in weights]
    backward = (*(d.detach() for d in d_out), *saved, *rest[:2], *weights, EPS)
    torch.library.opcheck(kernels.qk_norm_rope_backward_op, backward)


def test_compiled_and_checkpointed():
    (q, k, *rest), _ = inputs((2, 2, 1, 5, 8), torch.float32)

    def block(q, k):
        q_out, k_out = kernels.qk_norm_rope(torch.tanh(q), k, *rest, eps=EPS)
        return q_out + kernels.qk_norm_rope(k_out, k, *rest[:2])[0]

    def gradients(f):
        return torch.autograd.grad(f(q, k).square().sum(), (q, k, *rest[2:]))

    want = gradients(block)
    for f in (torch.compile(block, fullgraph=True), lambda *a: checkpoint(block, *a, use_reentrant=False)):
        for a, b in zip(gradients(f), want, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("width", "normed"), [(64, False), (128, True)])
def test_sm_90_neither_spills_nor_loads_narrowly(width, normed, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    q, k = (torch.empty(4, 4096, n, width, dtype=torch.bfloat16, device="meta").transpose(1, 2) for n in (16, 4))
    cos, weight = torch.empty(4096, width // 2, device="meta"), torch.empty(width, device="meta") if normed else None
    saved = (q, k) if normed else (None, None)
    for binary in (*aot.compile_launches("sm_90", kernels.forward, q, k, cos, cos, weight, weight, EPS),
                   *aot.compile_launches("sm_90", kernels.backward, q, k, *saved, cos, cos, weight, weight, EPS)):
        assert binary.spilled == 0 and binary.shared <= aot.SHARED_LIMIT["sm_90"], binary
        assert binary.loads == binary.wide_loads > 0, binary


def test_a_weight_that_is_one_number_in_memory():
    q, (cos, sin) = torch.randn(1, 2, 5, 16), ops.rotary_table(torch.arange(5), 16, 1e4)
    ones = torch.ones(1)
    got = kernels.qk_norm_rope(q, q, cos, sin, ones.expand(16), ones.expand(16))
    want = kernels.qk_norm_rope(q, q, cos, sin, torch.ones(16), torch.ones(16))
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
