"""Fused linear + cross-entropy: against float64 and its plain twin, chunk by chunk, within its memory, as an op."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from nanomai import ops
from triton_kernels import aot, cross_entropy
from triton_kernels import linear_cross_entropy as kernels
from triton_kernels.cross_entropy import IGNORE
from triton_kernels.lens import Trace

# Of gradients; measured at most 3.3e-7, 2.5e-4 and 3.1e-3, of losses 6.5e-8, 2.7e-5 and 5.9e-4: of one token, whose
# logits were rounded.
BOUND = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
LOSS_BOUND = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-3}
SHAPES = [(1, 1, 1), (1, 7, 64), (31, 8, 65), (5, 16, 127), (33, 33, 257)]  # (N, D, V)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of 8 tokens at V = 128 in float32, and rows of several blocks."""
    monkeypatch.setattr(kernels, "LOGITS_BYTES", 4096)
    monkeypatch.setattr(kernels, "ROWS", 4)
    monkeypatch.setattr(cross_entropy, "BLOCK", 64)


@pytest.fixture
def allocated(monkeypatch):
    """What a launcher allocates holds NaN, so that an element that no program writes shows; returns the shapes."""
    plain, shapes = torch.empty, []

    def empty(*shape, **kwargs):
        shapes.append(tuple(plain(*shape, **kwargs).shape))
        return plain(*shape, **kwargs).fill_(torch.nan)

    monkeypatch.setattr(torch, "empty", empty)
    return shapes


def inputs(shape, dtype=torch.float32, with_bias=True, seed=0):
    """hidden in `dtype`, weight and bias in float32, targets of which every fourth carries no loss."""
    N, D, V = shape
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, D, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(V, D, generator=generator) / D**0.5).to(dtype).float().requires_grad_()
    bias = torch.randn(V, generator=generator).requires_grad_() if with_bias else None
    targets = torch.randint(V, (N,), generator=generator)
    targets[3::4] = IGNORE
    return hidden, weight, targets, bias


def gradients(f, hidden, weight, targets, bias, scale=1.0):
    """The loss and the gradients of scale times it."""
    loss = f(hidden, weight, targets, bias)
    return loss, *torch.autograd.grad(loss * scale, [t for t in (hidden, weight, bias) if t is not None])


def in_float64(inputs):
    return [t.detach().double().requires_grad_() if t is not None and t.is_floating_point() else t for t in inputs]


def error(got, exact):
    """Relative Frobenius norm; where the exact answer is 0 (one class) the absolute one."""
    return ((got.double() - exact).norm() / (exact.norm().item() or 1)).item()


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_linear_cross_entropy(shape, with_bias, dtype, allocated):
    given = inputs(shape, dtype, with_bias)
    before = [t.detach().clone() for t in given if t is not None]
    with Trace(shuffle=shape[0]):
        loss, *got = gradients(kernels.linear_cross_entropy, *given, scale=0.25)
    loss64, *want = gradients(ops.linear_cross_entropy_plain, *in_float64(given), scale=0.25)
    assert loss.dtype == torch.float32 and error(loss, loss64) < LOSS_BOUND[dtype]
    assert [g.dtype for g in got] == [dtype, torch.float32, torch.float32][:len(got)]
    for name, a, b in zip("d_hidden d_weight d_bias".split(), got, want, strict=False):
        assert a.shape == b.shape and error(a, b) < BOUND[dtype], name
    assert not got[0][given[2] == IGNORE].any()
    assert all(torch.equal(a, b) for a, b in zip(before, [t for t in given if t is not None], strict=True))


def test_its_memory_is_one_buffer_and_the_gradients(allocated):
    given = inputs((61, 8, 65))
    gradients(kernels.linear_cross_entropy, *given)
    rows = kernels.chunk_rows(61, 65 * 4)
    assert rows * 65 * 4 <= kernels.LOGITS_BYTES < (rows + 4) * 65 * 4
    assert sorted(s for s in allocated if len(s) == 2) == sorted([(rows, 65), (61, 8), (65, 8)])
    assert all(s[0] <= 65 for s in allocated if len(s) == 1)


@pytest.mark.parametrize("dtype", BOUND)
def test_no_worse_than_the_twin(dtype):
    """d_weight is better: its parts are not rounded. d_bias is not compared: the twin sums before it rounds d_logits,
    this one after, as torch's linear layer does."""
    given = inputs((33, 16, 127), dtype)
    exact = gradients(ops.linear_cross_entropy_plain, *in_float64(given))
    ours, twin = (gradients(f, *given) for f in (kernels.linear_cross_entropy, ops.linear_cross_entropy))
    for a, b, c in zip(ours[:3], twin[:3], exact[:3], strict=True):
        assert a.dtype == b.dtype and error(a, c) <= 2 * error(b, c) + 1e-6
    if dtype != torch.float32:
        assert error(ours[2], exact[2]) < 0.9 * error(twin[2], exact[2])


def test_weight_in_bfloat16_too():
    hidden, weight, targets, bias = inputs((9, 8, 65), torch.bfloat16)
    given = hidden, weight.detach().bfloat16().requires_grad_(), targets, bias.detach().bfloat16().requires_grad_()
    _, *got = gradients(kernels.linear_cross_entropy, *given)
    _, *want = gradients(ops.linear_cross_entropy_plain, *in_float64(given))
    assert all(g.dtype == torch.bfloat16 and error(g, w) < 2e-2 for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("budget", [1, 1024, 4096, 2**20])
def test_the_answer_does_not_depend_on_the_chunks(budget, monkeypatch):
    given = inputs((21, 8, 65))
    want = gradients(ops.linear_cross_entropy_plain, *given)
    monkeypatch.setattr(kernels, "LOGITS_BYTES", budget)
    for a, b in zip(gradients(kernels.linear_cross_entropy, *given), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_chunks_are_even_and_within_the_budget(monkeypatch):
    monkeypatch.undo()
    assert kernels.chunk_rows(16384, 50304 * 2) == 4096
    assert kernels.chunk_rows(8192, 128256 * 2) == 2048
    assert kernels.chunk_rows(16384, 50304 * 4) == 2432  # 7 chunks; 6 would need 2731
    assert kernels.chunk_rows(0, 100) == kernels.chunk_rows(1, 100) == 128
    assert kernels.chunk_rows(5, 2**30) == 1
    for tokens in (1, 127, 5000, 5336, 5337, 21_300, 100_003):
        rows = kernels.chunk_rows(tokens, 50304 * 2)
        assert rows * 50304 * 2 <= kernels.LOGITS_BYTES
        assert -(-tokens // rows) == -(-tokens // (kernels.LOGITS_BYTES // (50304 * 2)))  # no more than are needed


def test_the_kernel_moves_three_times_the_logits():
    hidden, weight, targets, _ = inputs((24, 8, 64), torch.bfloat16, with_bias=False)
    targets[targets == IGNORE] = 0
    with Trace(targets=targets) as t:
        loss = kernels.linear_cross_entropy(hidden, weight, targets)
    logits = 24 * 64 * 2
    assert t.launches == 24 * 64 * 2 // 4096 + 1 and t.loads["targets"] == 24 * 8
    assert t.loads["logits_ptr"] == 2 * logits + 24 * 2 and t.stores["logits_ptr"] == logits
    with Trace() as t:
        loss.backward()
    assert t.launches == 0  # backward only scales
    with torch.no_grad(), Trace() as t:
        kernels.linear_cross_entropy(hidden, weight, targets)
    assert t.loads["logits_ptr"] == logits + 24 * 2 and t.stores["logits_ptr"] == 0


def test_without_gradients_none_are_made(allocated):
    given = inputs((9, 8, 65))
    with torch.no_grad():
        loss = kernels.linear_cross_entropy(*given)
    assert error(loss, ops.linear_cross_entropy_plain(*in_float64(given))) < 1e-5
    kernels.linear_cross_entropy(*[None if t is None else t.detach() for t in given])
    assert (65, 8) not in allocated and (9, 8) not in allocated


def test_nothing_counts_and_nothing_at_all():
    hidden, weight, targets, bias = inputs((5, 8, 65))
    for n, t in ((5, torch.full_like(targets, IGNORE)), (0, targets[:0])):
        loss, *got = gradients(kernels.linear_cross_entropy, hidden[:n].detach().requires_grad_(), weight, t, bias)
        assert loss.item() == 0 and got[0].shape == (n, 8) and not any(g.any() for g in got)


def test_backward_twice():
    hidden, weight, targets, bias = inputs((9, 8, 65))
    loss = kernels.linear_cross_entropy(hidden, weight, targets, bias)
    first = torch.autograd.grad(loss, (hidden, weight, bias), torch.tensor(2.0), retain_graph=True)
    second = torch.autograd.grad(loss, (hidden, weight, bias))
    assert all(torch.equal(a, 2 * b) for a, b in zip(first, second, strict=True))


def test_layouts():
    hidden, weight, targets, _ = inputs((9, 8, 65), with_bias=False)
    want = gradients(ops.linear_cross_entropy_plain, hidden, weight, targets, None)
    turned = hidden.detach().T.contiguous().T.requires_grad_(), weight.detach().T.contiguous().T.requires_grad_()
    for a, b in zip(gradients(kernels.linear_cross_entropy, *turned, targets, None), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_errors():
    hidden, weight, targets, bias = (None if t is None else t.detach() for t in inputs((3, 8, 10)))
    for wrong in ((hidden[0], weight, targets, bias), (hidden[:, 1:], weight, targets, bias),
                  (hidden, weight[0], targets, bias), (hidden, weight[:0], targets, None),
                  (hidden, weight, targets[1:], bias), (hidden, weight, targets, bias[1:])):
        with pytest.raises(ValueError, match=r"hidden \(N, D\), weight \(V, D\), targets \(N,\), .* these are \("):
            kernels.linear_cross_entropy(*wrong)
    with pytest.raises(TypeError, match=r"torch.float64 needs the plain definition"):
        kernels.linear_cross_entropy(hidden.double(), weight, targets)
    with pytest.raises(ValueError, match=r"int64 \(3,\) is needed"):
        kernels.linear_cross_entropy(hidden, weight, targets.int())
    assert kernels.linear_cross_entropy(hidden, weight, targets + 10).isnan()


def test_flops_are_counted():
    given = inputs((9, 8, 65))
    with FlopCounterMode(display=False) as counter:
        loss = kernels.linear_cross_entropy(*given)
        loss.backward()
    assert counter.get_total_flops() == 6 * 9 * 8 * 65
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        kernels.linear_cross_entropy(*given)
    assert counter.get_total_flops() == 2 * 9 * 8 * 65


def test_autocast_leaves_it_alone():
    given = inputs((9, 8, 65))
    want = gradients(kernels.linear_cross_entropy, *given)
    with torch.autocast("cpu", torch.bfloat16):
        got = gradients(kernels.linear_cross_entropy, *given)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("with_bias", [False, True])
def test_opcheck(with_bias):
    given = inputs((5, 8, 17), with_bias=with_bias)
    torch.library.opcheck(kernels.linear_cross_entropy_op, (*given, True))
    torch.library.opcheck(kernels.linear_cross_entropy_op, (*[None if t is None else t.detach() for t in given], False))


def test_compiled_and_checkpointed():
    hidden, weight, targets, _ = inputs((6, 8, 24), with_bias=False)

    def step(hidden, weight, targets, bias):
        return kernels.linear_cross_entropy(torch.tanh(hidden), weight, targets) / 4

    want = gradients(step, hidden, weight, targets, None)
    for f in (torch.compile(step, fullgraph=True), lambda *a: checkpoint(step, *a, use_reentrant=False)):
        for a, b in zip(gradients(f, hidden, weight, targets, None), want, strict=True):
            torch.testing.assert_close(a, b)


def test_sm_90_at_the_vocabulary_of_gpt_2(tmp_path, monkeypatch):
    """The launches that a GPU will see: one a chunk, in place, nothing spilled."""
    monkeypatch.undo()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    hidden, weight = (torch.empty(n, 768, dtype=torch.bfloat16, device="meta") for n in (16384, 50304))
    targets = torch.empty(16384, dtype=torch.int64, device="meta")
    binaries = aot.compile_launches("sm_90", kernels.forward, hidden, weight, targets, None, True)
    assert [b.kernel for b in binaries] == ["cross_entropy_forward"] * 4
    assert all(b.spilled == 0 and b.shared <= 1024 and b.loads - b.wide_loads <= 2 for b in binaries), binaries
