"""Cross-entropy kernels: against float64, in place, under the lens, byte for byte, as ops, and compiled for GPUs."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from triton_kernels import aot
from triton_kernels import cross_entropy as kernels
from triton_kernels.cross_entropy import IGNORE
from triton_kernels.lens import Trace

# Of gradients; measured at most 1.8e-7, 1.6e-4 and 1.2e-3. Losses are as exact at any dtype: 1.4e-7.
BOUND = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}
SHAPES = [(1, 1), (1, 2), (7, 31), (5, 64), (13, 65), (4, 127), (33, 257), (2, 1021)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """So that short rows take several blocks."""
    monkeypatch.setattr(kernels, "BLOCK", 64)


def inputs(shape, dtype, seed=0, ignored=3):
    """Logits, and targets of which every `ignored`th carries no loss."""
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(shape, generator=generator)).to(dtype).requires_grad_()
    targets = torch.randint(shape[1], shape[:1], generator=generator)
    targets[ignored::ignored] = IGNORE
    return logits, targets


def plain(logits, targets, scale=1.0, bias=None):
    """Loss and gradient in float64, by definition."""
    z = logits.detach().double().requires_grad_()
    loss = F.cross_entropy(z if bias is None else z + bias, targets, ignore_index=IGNORE, reduction="sum")
    return loss, torch.autograd.grad(loss, z, torch.tensor(scale).double())[0]


def error(got, exact):
    """Relative Frobenius norm; where the exact answer is 0 (one class) the absolute one."""
    size = exact.norm().item()
    return ((got.double() - exact).norm() / (size or 1)).item()


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("shape", SHAPES)
def test_cross_entropy(shape, dtype, poisoned):
    logits, targets = inputs(shape, dtype)
    before = logits.detach().clone()
    with Trace(logits=logits, targets=targets, shuffle=shape[1]):
        loss = kernels.cross_entropy(logits, targets)
        (got,) = torch.autograd.grad(loss * 0.5, logits)
    loss64, want = plain(logits, targets, 0.5)
    assert (loss.shape, loss.dtype, got.shape, got.dtype) == ((), torch.float32, shape, dtype)
    assert error(loss, loss64) < 1e-5 and error(got, want) < BOUND[dtype]
    assert not got[targets == IGNORE].any() and torch.equal(logits, before)


@pytest.mark.parametrize("dtype", BOUND)
def test_the_vocabulary_of_gpt_2(dtype, monkeypatch, poisoned):
    monkeypatch.undo()
    logits, targets = inputs((3, 50304), dtype)
    loss64, want = plain(logits, targets)
    loss = kernels.cross_entropy(logits, targets)
    (got,) = torch.autograd.grad(loss, logits)
    assert error(loss, loss64) < 1e-6 and error(got, want) < BOUND[dtype]


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (13, 65), (9, 257)])
def test_loss_and_gradient_in_one_launch_and_in_place(shape, with_bias, dtype, poisoned):
    logits, targets = inputs(shape, dtype, seed=1)
    bias = torch.randn(shape[1], generator=torch.Generator().manual_seed(2)) if with_bias else None
    loss64, want = plain(logits, targets, bias=bias)
    buffer = logits.detach().clone()
    with Trace(buffer=buffer, shuffle=3):
        losses, lse = kernels.forward(buffer, targets, bias, d_logits=buffer)
    assert error(losses.sum(), loss64) < 1e-5 and error(buffer, want) < BOUND[dtype]
    counts = targets != IGNORE
    lse64 = (logits.double() + (0 if bias is None else bias)).logsumexp(-1)
    assert error(lse[counts], lse64[counts]) < 1e-6 and not losses[~counts].any() and not lse[~counts].any()
    apart = torch.empty(shape, dtype=dtype)
    kernels.forward(logits.detach(), targets, bias, d_logits=apart)
    assert torch.equal(apart, buffer)


@pytest.mark.parametrize("V", [64, 129])
def test_it_moves_the_bytes_it_must(V):
    """The roofline as a unit test: e N V for the loss, twice that for its gradient, three times for both at once."""
    logits, targets = inputs((24, V), torch.bfloat16)
    read = int((targets != IGNORE).sum()) * V * 2  # rows that are ignored are not read
    picked = int((targets != IGNORE).sum()) * 2  # the target's logit, once more
    with Trace(logits=logits, targets=targets) as t:
        loss = kernels.cross_entropy(logits, targets)
    assert t.loads == {"logits": read + picked, "targets": 24 * 8, "losses_ptr": 0, "lse_ptr": 0}
    assert t.stores == {"logits": 0, "targets": 0, "losses_ptr": 24 * 4, "lse_ptr": 24 * 4}
    with Trace(logits=logits, targets=targets) as t:
        torch.autograd.grad(loss, logits)
    assert t.loads == {"logits": read, "targets": 24 * 8, "lse_ptr": 24 * 4, "d_loss_ptr": 24 * 4, "d_logits_ptr": 0}
    assert t.stores["d_logits_ptr"] == logits.nbytes and sum(t.stores.values()) == logits.nbytes
    with Trace(logits=logits, targets=targets) as t:
        kernels.forward(logits, targets, d_logits=logits.detach())
    assert t.loads["logits"] == 2 * read + picked and t.stores["logits"] == logits.nbytes


def test_rows_with_infinities():
    """Classes that are ruled out, a whole block of them first; a row without any class left is NaN as in torch."""
    logits, targets = inputs((4, 150), torch.float32, ignored=9)
    with torch.no_grad():
        logits[:, :70] = -torch.inf
        logits[1] = 80 * torch.sign(logits[1])  # exp(80) is 5e34
    targets.fill_(149)
    loss64, want = plain(logits, targets)
    loss = kernels.cross_entropy(logits, targets)
    (got,) = torch.autograd.grad(loss, logits)
    assert error(loss, loss64) < 1e-5 and error(got, want) < 1e-5
    with torch.no_grad():
        logits[2] = -torch.inf
    assert kernels.cross_entropy(logits, targets).isnan()


@pytest.mark.parametrize("bad", [-1, 10, 2**32, -2**40])
def test_a_target_outside_of_the_classes_is_nan_and_reads_nothing_outside(bad):
    logits, targets = inputs((3, 10), torch.float32)
    targets[1] = bad
    with Trace(logits=logits):
        loss = kernels.cross_entropy(logits, targets)
        (got,) = torch.autograd.grad(loss, logits)
    assert loss.isnan() and got[1].isnan().all() and not got[0].isnan().any()


def test_nothing_counts():
    """Rows that are ignored may hold anything."""
    logits = torch.full((3, 10), torch.nan, requires_grad=True)
    loss = kernels.cross_entropy(logits, torch.full((3,), IGNORE))
    loss.backward()
    assert loss.item() == 0 and torch.equal(logits.grad, torch.zeros(3, 10))
    empty = torch.zeros(0, 10, requires_grad=True)
    loss = kernels.cross_entropy(empty, torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0 and empty.grad.shape == (0, 10)


def test_layouts():
    """Columns of a wider tensor are read where they lie; a transposed one is copied."""
    wide = torch.randn(6, 100, requires_grad=True)
    targets = torch.tensor([0, 69, 5, IGNORE, 1, 2])
    for logits in (wide[:, :70], wide.T.contiguous().T[:, :70], wide[:1, :70].expand(6, 70)):
        loss = kernels.cross_entropy(logits, targets)
        loss64, want = plain(logits, targets)
        (got,) = torch.autograd.grad(loss, logits)
        assert error(loss, loss64) < 1e-6 and error(got, want) < 1e-6
    strided = torch.stack((targets, targets + 1), 1)[:, 0]
    assert error(kernels.cross_entropy(wide[:, :70], strided), plain(wide[:, :70], targets)[0]) < 1e-6


def test_errors():
    logits, targets = inputs((3, 10), torch.float32)
    with pytest.raises(TypeError, match=r"computes in float32; torch.float64 needs the plain definition"):
        kernels.cross_entropy(logits.double(), targets)
    for wrong in (logits[0], logits[None], logits[:, :0]):
        with pytest.raises(ValueError, match=r"logits of shape \(.*\); \(N, V\) with V > 0 is needed"):
            kernels.cross_entropy(wrong, targets)
    for wrong in (targets.int(), targets[:2], targets[:, None]):
        with pytest.raises(ValueError, match=r"targets torch.int\d\d \(.*\); int64 \(3,\) is needed"):
            kernels.cross_entropy(logits, wrong)


def test_opcheck():
    logits, targets = inputs((3, 17), torch.float32)
    torch.library.opcheck(kernels.cross_entropy_op, (logits, targets))
    lse, d_loss = logits.detach().logsumexp(-1), torch.tensor(2.0)
    torch.library.opcheck(kernels.cross_entropy_backward_op, (logits.detach(), targets, lse, d_loss))


def test_compiled_and_checkpointed():
    x, targets = inputs((4, 24), torch.float32)

    def step(x):
        return kernels.cross_entropy(torch.tanh(x) * 2, targets) / 4

    def gradient(f):
        return torch.autograd.grad(f(x), x)[0]

    want = gradient(step)
    torch.testing.assert_close(gradient(torch.compile(step, fullgraph=True)), want)
    torch.testing.assert_close(gradient(lambda x: checkpoint(step, x, use_reentrant=False)), want)


def test_sm_90_neither_spills_nor_moves_narrowly(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(kernels, "BLOCK", 8192)
    logits = torch.empty(4096, 50304, dtype=torch.bfloat16, device="meta")
    targets = torch.empty(4096, dtype=torch.int64, device="meta")
    lse, d_loss, bias = (torch.empty(s, device="meta") for s in ((4096,), (), (50304,)))
    for binary in (*aot.compile_launches("sm_90", kernels.forward, logits, targets),
                   *aot.compile_launches("sm_90", kernels.forward, logits, targets, bias, logits),
                   *aot.compile_launches("sm_90", kernels.backward, logits, targets, lse, d_loss)):
        assert binary.spilled == 0 and binary.shared <= 1024, binary
        # what is narrow: target, lse, d_loss, the target's logit and its bias; losses and lse where they are stored
        assert binary.loads - binary.wide_loads <= 3 and binary.wide_loads, binary
        assert sum(".128" not in s for s in re.findall(r"\bSTG\.[.\w]+", binary.assembly)) <= 2
    (one_class,) = aot.compile_launches("sm_90", kernels.forward, logits[:, :1], targets)  # V is a constant there
    assert one_class.spilled == 0
