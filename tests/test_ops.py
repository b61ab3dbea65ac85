"""Every fast op beside its plain definition: values and gradients in float64 at odd shapes, and what bfloat16 costs."""

import math

import pytest
import torch
import torch.nn.functional as F

from nanomai import ops
from nanomai.ops import IGNORE

SHAPES = [(1, 1), (1, 7), (5, 123), (2, 3, 31), (127, 2)]


def randn(*shape, dtype=torch.float64, seed=0, grad=True) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype).requires_grad_(grad)


def same(fast, plain, inputs, atol=1e-12) -> None:
    """Equal values, and equal gradients of every input that takes one."""
    y, z = fast(*inputs), plain(*inputs)
    assert y.shape == z.shape and y.dtype == z.dtype
    torch.testing.assert_close(y, z, rtol=0, atol=atol * max(1, z.abs().max().item()))
    upstream = randn(*y.shape, seed=9, grad=False).to(y.dtype)
    wanting = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
    for got, expected in zip(*(torch.autograd.grad(out, wanting, upstream) for out in (y, z)), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=atol * max(1, expected.abs().max().item()))


def bf16_error(fast, inputs) -> float:
    """The largest error of the op in bfloat16, against float64 of the same rounded inputs, over the largest value."""
    inputs = [x.detach().bfloat16() if x.is_floating_point() else x for x in inputs]
    exact = fast(*(x.double() if x.is_floating_point() else x for x in inputs))
    return ((fast(*inputs).double() - exact).abs().max() / exact.abs().max()).item()


# --- embeddings, norms and rotations


@pytest.mark.parametrize("shape", [(1,), (5, 123)])
def test_embedding(shape):
    ids, weight = torch.randint(31, shape, generator=torch.Generator().manual_seed(0)), randn(31, 7)
    same(lambda w: ops.embedding(ids, w), lambda w: w[ids], (weight,))


def test_a_frequent_token_has_its_whole_gradient_in_bfloat16():
    """Added up in bfloat16, 4,096 ones are 256: one more is then too little to be seen."""
    weight = randn(2, 3, dtype=torch.bfloat16)
    ops.embedding(torch.zeros(4096, dtype=torch.long), weight).sum().backward()
    assert weight.grad.tolist() == [[4096.0] * 3, [0.0] * 3]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("eps", [1e-5, 0.5])
def test_norms(shape, eps):
    x, weight, bias = randn(*shape), randn(shape[-1], seed=1), randn(shape[-1], seed=2)
    same(lambda x, w: ops.rms_norm(x, w, eps), lambda x, w: ops.rms_norm_plain(x, w, eps), (x, weight))
    if shape[-1] > 2:  # fewer have next to no variance, and a gradient of 1 / eps
        same(lambda *a: ops.layer_norm(*a, eps), lambda *a: ops.layer_norm_plain(*a, eps), (x, weight, bias))


def test_norms_in_bfloat16():
    x, weight, bias = 30 * randn(64, 123), randn(123, seed=1), randn(123, seed=2)
    assert bf16_error(lambda x, w: ops.rms_norm(x, w, 1e-5), (x, weight)) < 2**-8
    assert bf16_error(lambda *a: ops.layer_norm(*a, 1e-5), (x, weight, bias)) < 2**-7
    small = torch.full((1, 64), 1e-3, dtype=torch.bfloat16)  # its squares and their mean need float32
    assert ops.rms_norm(small, torch.ones(64), 1e-12).float() == pytest.approx(1.0, rel=2**-7)


@pytest.mark.parametrize("shape", SHAPES)
def test_add_rms_norm(shape):
    x, residual, weight = randn(*shape), randn(*shape, seed=3), randn(shape[-1], seed=1)
    same(lambda x, r, w: torch.stack(ops.add_rms_norm(x, r, w, 1e-5)),
         lambda x, r, w: torch.stack((x + r, ops.rms_norm_plain(x + r, w, 1e-5))), (x, residual, weight))


@pytest.mark.parametrize("shape", SHAPES)
def test_swiglu(shape):
    same(ops.swiglu, ops.swiglu_plain, (3 * randn(*shape), randn(*shape, seed=1)))


@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 3, 5, 6), (1, 7, 13, 62)])
def test_rotary(shape):
    cos, sin = ops.rotary_table(torch.arange(shape[2]), shape[3], 10_000.0, torch.float64)
    same(lambda x: ops.rotary(x, cos, sin), lambda x: ops.rotary_plain(x, cos, sin), (randn(*shape),))
    rows = torch.stack([torch.arange(shape[2]) + 3 * i for i in range(shape[0])])  # every row begins elsewhere
    cos, sin = (table[:, None] for table in ops.rotary_table(rows, shape[3], 10_000.0, torch.float64))
    same(lambda x: ops.rotary(x, cos, sin), lambda x: ops.rotary_plain(x, cos, sin), (randn(*shape),))


def test_rotary_is_relative():
    """The score of two rotated vectors depends on the distance of their positions alone, and lengths stay."""
    q, k = randn(1, 1, 1, 16), randn(1, 1, 1, 16, seed=1)

    def at(x, position):
        return ops.rotary(x, *ops.rotary_table(torch.tensor([position]), 16, 100.0, torch.float64))

    scores = [(at(q, m + 5) * at(k, m)).sum() for m in (0, 3, 1000)]
    torch.testing.assert_close(scores[0].expand(3), torch.stack(scores))
    assert not torch.isclose(scores[0], (at(q, 6) * at(k, 0)).sum())
    torch.testing.assert_close(at(q, 77).norm(), q.norm())
    torch.testing.assert_close(at(q, 0), q)


def test_rotary_far_out_in_bfloat16():
    """Position 100,000 needs 17 bits, so the table is never computed in bfloat16."""
    cos, sin = ops.rotary_table(torch.tensor([100_000]), 64, 5e5, torch.bfloat16)
    exact, _ = ops.rotary_table(torch.tensor([100_000]), 64, 5e5, torch.float64)
    assert cos.dtype == sin.dtype == torch.float32
    torch.testing.assert_close(cos.double(), exact, rtol=0, atol=0.02)


# --- attention


def qkv(b=2, h=6, g=3, t=7, s=7, k=5, dtype=torch.float64):
    return (randn(b, h, t, k, dtype=dtype), *(randn(b, g, s, k, dtype=dtype, seed=i) for i in (1, 2)))


def definition(q, k, v, mask):
    """One query at a time, in plain loops over rows and heads."""
    out = []
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            g = h * k.shape[1] // q.shape[1]
            for t in range(q.shape[2]):
                seen = mask.expand(q.shape[0], q.shape[1], *mask.shape[-2:])[b, h, t]
                p = (k[b, g][seen] @ q[b, h, t] / math.sqrt(q.shape[-1])).softmax(0)
                out.append(p @ v[b, g][seen])
    return torch.stack(out).view(q.shape)


def masks(b, t, s) -> dict[str, torch.Tensor | None]:
    keys, documents = torch.arange(s), (torch.arange(s) * 3 // s).expand(b, s)
    queries = keys[s - t :]
    shifted = keys - torch.arange(b)[:, None]  # rows that began at different places
    return {"causal": None, "window": ops.attention_mask(queries, keys, 3), "all": torch.ones(t, s, dtype=torch.bool),
            "documents": ops.attention_mask(queries, keys, None, documents[:, s - t :], documents),
            "rows": ops.attention_mask(shifted[:, s - t :], shifted, 4)}


@pytest.mark.parametrize("limit", [0, 2**25], ids=["library", "explicit"])
@pytest.mark.parametrize("heads", [(6, 6), (6, 3), (5, 1)])
@pytest.mark.parametrize("t, s", [(7, 7), (1, 1), (1, 11), (3, 11)])
@pytest.mark.parametrize("mask", ["causal", "window", "all", "documents", "rows"])
def test_attention_is_its_definition(monkeypatch, limit, heads, t, s, mask):
    monkeypatch.setattr(ops, "EXPLICIT_SCORES_LIMIT", limit)
    q, k, v = qkv(2, *heads, t, s)
    mask = masks(2, t, s)[mask]
    full = ops.causal_mask(q, k) if mask is None else mask
    same(lambda *a: ops.attention(*a, mask), lambda *a: definition(*a, full), (q, k, v), atol=1e-11)
    same(lambda *a: ops.attention_plain(*a, mask), lambda *a: ops.attention(*a, mask), (q, k, v), atol=1e-11)


def test_the_library_s_attention_compiles_as_one_graph(monkeypatch):
    """The order of its kernels is set around each call."""
    monkeypatch.setattr(ops, "EXPLICIT_SCORES_LIMIT", 0)
    compiled = torch.compile(ops.attention, fullgraph=True, backend="aot_eager")
    for mask in (None, masks(2, 7, 7)["window"]):
        same(lambda *a, m=mask: compiled(*a, m), lambda *a, m=mask: ops.attention(*a, m), qkv(2, 6, 3, 7, 7))


@pytest.mark.parametrize("limit", [0, 2**25], ids=["library", "explicit"])
def test_which_branch_attention_takes(monkeypatch, limit):
    calls = []
    monkeypatch.setattr(ops, "EXPLICIT_SCORES_LIMIT", limit)
    monkeypatch.setattr(ops, "attention_plain", lambda *a: calls.append(a) or a[0])
    ops.attention(*qkv(2, 6, 3, 7, 7))
    assert bool(calls) == (limit > 0)


def test_attention_against_the_library():
    q, k, v = qkv(2, 8, 2, 33, 33, 16)
    same(ops.attention_plain, lambda *a: F.scaled_dot_product_attention(*a, is_causal=True, enable_gqa=True), (q, k, v))


@pytest.mark.parametrize("limit", [0, 2**25], ids=["library", "explicit"])
def test_attention_in_bfloat16(monkeypatch, limit):
    monkeypatch.setattr(ops, "EXPLICIT_SCORES_LIMIT", limit)
    assert bf16_error(ops.attention, qkv(2, 6, 3, 65, 65, 32)) < 2**-6


def test_attention_mask_by_hand():
    keys = torch.arange(5)
    window = ops.attention_mask(keys[2:], keys, 2)
    assert window.int().tolist() == [[0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]
    documents = torch.tensor([[0, 0, 1, 1, 1]])
    mask = ops.attention_mask(keys, keys, None, documents, documents)
    assert mask.shape == (1, 1, 5, 5)
    assert mask[0, 0].int().tolist() == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0],
                                         [0, 0, 1, 1, 1]]


# --- the loss


def loss_inputs(n=13, d=5, v=11, bias=True, ignored=(0, 4, 12), dtype=torch.float64):
    targets = torch.randint(v, (n,), generator=torch.Generator().manual_seed(n))
    targets[[i for i in ignored if i < n]] = IGNORE
    return randn(n, d, dtype=dtype), randn(v, d, dtype=dtype, seed=1), targets, randn(v, dtype=dtype) if bias else None


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 4, 5, 13, 1000], ids="chunks of {}".format)
@pytest.mark.parametrize("n, d, v", [(13, 5, 11), (1, 1, 1), (7, 123, 3)])
def test_linear_cross_entropy(monkeypatch, bias, rows, n, d, v):
    monkeypatch.setattr(ops, "LOGITS_BYTES", rows * 4 * v)
    same(ops.linear_cross_entropy, ops.linear_cross_entropy_plain, loss_inputs(n, d, v, bias))


def test_a_scaled_loss_scales_the_gradients():
    inputs = loss_inputs()
    same(lambda *a: ops.linear_cross_entropy(*a) / 7, lambda *a: ops.linear_cross_entropy_plain(*a) / 7, inputs)


@pytest.mark.parametrize("frozen", [(0,), (1,), (0, 3), (1, 3)], ids=str)
def test_only_some_inputs_take_a_gradient(frozen):
    inputs = [x.detach() if i in frozen else x for i, x in enumerate(loss_inputs())]
    same(ops.linear_cross_entropy, ops.linear_cross_entropy_plain, inputs)


def test_gradcheck():
    hidden, weight, targets, bias = loss_inputs(5, 3, 4)
    assert torch.autograd.gradcheck(lambda h, w, b: ops.linear_cross_entropy(h, w, targets, b), (hidden, weight, bias))


def test_nothing_but_ignored_targets():
    hidden, weight, targets, bias = loss_inputs(ignored=range(13))
    loss = ops.linear_cross_entropy(hidden, weight, targets, bias)
    loss.backward()
    assert loss == 0 and not any(x.grad.any() for x in (hidden, weight, bias))


def test_a_target_outside_the_vocabulary_is_an_error():
    hidden, weight, targets, _ = loss_inputs()
    for wrong in (11, -1):
        with pytest.raises((IndexError, RuntimeError)):
            ops.linear_cross_entropy(hidden, weight, torch.where(targets == IGNORE, IGNORE, wrong))


def test_the_loss_in_bfloat16_over_float32_weights():
    hidden, weight, targets, bias = loss_inputs(200, 64, 301, dtype=torch.float32)
    exact = ops.linear_cross_entropy_plain(hidden.double(), weight.double(), targets, bias.double())
    loss = ops.linear_cross_entropy(hidden.bfloat16(), weight, targets, bias)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=2**-8)
    got, expected = (torch.autograd.grad(x, (hidden, weight, bias)) for x in (loss, exact))
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() < 2**-6 * b.norm()


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """The most numbers that any one tensor made inside had, and how many products were computed."""

    numbers, products = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            self.numbers = max(self.numbers, x.numel() if isinstance(x, torch.Tensor) else 0)
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        return out


def test_logits_are_never_whole(monkeypatch):
    n, v, chunk = 64, 100, 8
    inputs = loss_inputs(n, 4, v)
    monkeypatch.setattr(ops, "LOGITS_BYTES", chunk * 4 * v)
    for function, most in [(ops.linear_cross_entropy, chunk * v), (ops.linear_cross_entropy_plain, n * v)]:
        with Largest() as largest:
            function(*inputs).backward()
        assert largest.numbers == most


def test_no_gradient_is_computed_where_none_is_wanted(monkeypatch):
    inputs = loss_inputs()
    with torch.no_grad(), Largest() as largest:
        loss = ops.linear_cross_entropy(*inputs)
    assert largest.products == 1 and not loss.requires_grad
    torch.testing.assert_close(loss, ops.linear_cross_entropy_plain(*inputs))
