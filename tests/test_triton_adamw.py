"""AdamW with stochastic rounding: bit for bit against numpy, right on average, under the lens, as an op, compiled."""

import math

import numpy as np
import pytest
import torch

from triton_kernels import adamw as kernels
from triton_kernels import aot
from triton_kernels.lens import Trace

HYPER = {"lr": 3e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}


# --- The emulation: the same numbers with numpy -----------------------------------------------------------------------


def philox(counter, key):
    """Philox 4x32-10 (Salmon et al. 2011): four words of counter, two of key -> four words."""
    a, b, c, d = (np.asarray(word, np.uint64) for word in counter)
    low = np.uint64(0xFFFFFFFF)
    for i in range(10):
        k0, k1 = (np.uint64((k + i * step) % 2**32) for k, step in zip(key, (0x9E3779B9, 0xBB67AE85), strict=True))
        x, y = a * np.uint64(0xD2511F53), c * np.uint64(0xCD9E8D57)
        a, b, c, d = (y >> np.uint64(32)) ^ b ^ k0, y & low, (x >> np.uint64(32)) ^ d ^ k1, x & low
    return a, b, c, d


def bits_plain(count, seed, step):
    """Element i takes the (i % 8)-th 16 bits of the call with counter (i // 8, step)."""
    block = np.arange(-(-count // 8), dtype=np.uint64)
    words = philox((block & np.uint64(0xFFFFFFFF), block >> np.uint64(32), np.full_like(block, step), 0 * block),
                   (seed % 2**32, seed >> 32))
    halves = [half for w in words for half in (w & np.uint64(0xFFFF), w >> np.uint64(16))]
    return np.stack(halves, axis=1).ravel()[:count].astype(np.uint32)


def adamw_plain(p, g, m, v, step, lr, beta1, beta2, eps, weight_decay, seed):
    """(p, m, v) after the step: float32 numpy, one rounding an operation."""
    f = np.float32
    x, g, m, v = (t.detach().float().numpy().ravel() for t in (p, g, m, v))
    m = m + f(1 - beta1) * (g - m)
    v = v + f(1 - beta2) * (g * g - v)
    denominator = np.sqrt(v) * f(1 / math.sqrt(1 - beta2**step)) + f(eps)
    x = f(1 - lr * weight_decay) * x - f(lr / (1 - beta1**step)) * (m / denominator)
    if p.dtype == torch.bfloat16:
        x = ((x.view(np.uint32) + bits_plain(x.size, seed, step)) & np.uint32(0xFFFF0000)).view(np.float32)
    return (torch.from_numpy(x).to(p.dtype).view(p.shape), *(torch.from_numpy(t).view(p.shape) for t in (m, v)))


def inputs(shape, dtype, grad_dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    p, g = (torch.randn(shape, generator=generator) for _ in range(2))
    return p.to(dtype), g.to(grad_dtype), torch.zeros(shape), torch.zeros(shape)


def test_the_emulation_is_philox():
    """Known answers of the authors' library, Random123."""
    ones, pi = 2**32 - 1, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0)
    for word, want in (((0,) * 6, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
                       ((ones,) * 6, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
                       (pi, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1))):
        assert tuple(map(int, philox(word[:4], word[4:]))) == want


# --- The step ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(1,), (7,), (8,), (1023,), (1024,), (1025,), (3, 5, 149), ()])
def test_it_gives_the_bits_of_the_emulation(shape, dtype):
    p, _, m, v = inputs(shape, dtype)
    with Trace(p=p, m=m, v=v, shuffle=len(shape)):
        for step, seed in ((1, 0), (2, 1), (16, 2**32 + 5), (100_000, 2**63 - 1)):
            g = inputs(shape, dtype, (dtype, torch.float16, torch.float32)[step % 3], seed=step)[1]
            want = adamw_plain(p, g, m, v, step=step, seed=seed, **HYPER)
            kernels.adamw(p, g, m, v, step=step, seed=seed, **HYPER)
            assert all(torch.equal(a, b) for a, b in zip((p, m, v), want, strict=True)), step


def test_float32_is_the_adamw_of_torch():
    p, _, m, v = inputs((37, 11), torch.float32)
    exact = p.double().requires_grad_()
    optimizer = torch.optim.AdamW([exact], lr=HYPER["lr"], betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for step in range(1, 6):
        g = inputs((37, 11), torch.float32, seed=step)[1]
        exact.grad = g.double()
        optimizer.step()
        kernels.adamw(p, g, m, v, step=step, seed=0, **HYPER)
    state = optimizer.state[exact]
    for got, want in ((p, exact), (m, state["exp_avg"]), (v, state["exp_avg_sq"])):
        assert (got.double() - want).norm() / want.norm() < 1e-6


def test_it_moves_the_bytes_it_must():
    """The roofline as a unit test: 22 bytes an element."""
    n = 3001
    p, g, m, v = inputs((n,), torch.bfloat16, torch.bfloat16)
    with Trace(p=p, g=g, m=m, v=v) as t:
        kernels.adamw(p, g, m, v, step=1, seed=0, **HYPER)
    assert t.loads == {"p": 2 * n, "g": 2 * n, "m": 4 * n, "v": 4 * n}
    assert t.stores == {"p": 2 * n, "g": 0, "m": 4 * n, "v": 4 * n}


# --- The rounding -----------------------------------------------------------------------------------------------------


def rounded(x, count, seed=0, step=1):
    """`count` stochastic roundings of x: one step, as long as it must be, from the bfloat16 beside x."""
    base = torch.tensor(x).to(torch.bfloat16).float().item()
    p, moment = torch.full((count,), base, dtype=torch.bfloat16), torch.zeros(count)
    grads = torch.full((count,), math.copysign(1.0, base - x))
    kernels.adamw(p, grads, moment, moment.clone(), step=step, seed=seed, lr=abs(base - x), beta1=0.0, beta2=0.0,
                  eps=0.0, weight_decay=0.0)  # without betas and eps the update is lr times the gradient's sign
    return p.double()


@pytest.mark.parametrize("x", [1.0001, 0.9999, -3.3, 1e-3, -1.005, 250.3, 1e-30])
def test_rounding_is_right_on_average(x):
    """To one of the two neighbours, and in the mean to x: within 4 standard errors of a fixed draw."""
    count = 2**15
    got, exact = rounded(x, count), float(np.float32(x))
    neighbours = got.unique()
    assert neighbours.numel() == 2 and neighbours[0] < exact < neighbours[1]
    low, high = neighbours.tolist()
    share = (exact - low) / (high - low)
    assert abs((got == high).double().mean().item() - share) < 4 * math.sqrt(share * (1 - share) / count)


def test_what_bfloat16_can_hold_is_left_alone():
    p, g, m, v = inputs((1000,), torch.bfloat16)
    before = p.clone()
    kernels.adamw(p, 0 * g, m, v, step=1, seed=0, **{**HYPER, "weight_decay": 0.0})
    assert torch.equal(p, before) and not m.any() and not v.any()


def test_steps_too_small_to_see_add_up():
    """40 steps of 1e-4 down from 1, where the next bfloat16 is 1 - 1/256 = 0.9961: to nearest it would stay at 1."""
    p = torch.ones(4096, dtype=torch.bfloat16)
    m, v = torch.zeros(4096), torch.zeros(4096)
    for step in range(1, 41):
        kernels.adamw(p, torch.ones(4096), m, v, step=step, seed=9, **{**HYPER, "lr": 1e-4, "weight_decay": 0.0})
    assert abs(p.double().mean().item() - 0.996) < 4 / 256 / math.sqrt(4096)
    assert (torch.ones(1) - 1e-4).bfloat16().item() == 1


def test_bits_are_uniform_and_independent():
    n = 2**15
    draws = [bits_plain(n, seed, step) for seed, step in ((0, 1), (0, 2), (1, 1), (2**32, 1))]
    for bits in draws:
        for byte in (bits & 255, bits >> 8):
            counts = np.bincount(byte, minlength=256)
            chi2 = ((counts - n / 256) ** 2).sum() * 256 / n  # mean 255, standard deviation 22.6
            assert abs(chi2 - 255) < 4 * 22.6
    centred = np.stack(draws + [np.roll(draws[0], shift) for shift in (1, 4, 8, 1024)]) - 32767.5
    correlation = np.corrcoef(centred) - np.eye(8)
    assert np.abs(correlation).max() < 5 / math.sqrt(n)


def test_same_seed_same_bits_another_seed_others():
    first, again, other, later = (rounded(1.003, 999, *k) for k in ((7,), (7,), (8,), (7, 2)))
    assert torch.equal(first, again) and not torch.equal(first, other) and not torch.equal(first, later)


def test_nan_and_infinity_stay_what_they_are():
    """The GPU's NaN is 0x7FFFFFFF: adding to its bits would make it -0, a number."""
    p = torch.tensor([1.0, 1.0, float("inf"), float("-inf"), 1.0], dtype=torch.bfloat16)
    g = torch.tensor([0x7FFFFFFF, 0x7F800001, 0, 0, 0], dtype=torch.int32).view(torch.float32)
    kernels.adamw(p, g, torch.zeros(5), torch.zeros(5), step=1, seed=3, **HYPER)
    assert p.isnan().tolist() == [True, True, False, False, False]
    assert p[2:4].tolist() == [float("inf"), float("-inf")]


# --- The op -----------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused():
    p, g, m, v = inputs((4, 6), torch.bfloat16)

    def step(*tensors, step=1, seed=0):
        kernels.adamw(*tensors, step=step, seed=seed, **HYPER)

    for bad in (p.half(), p.double()):
        with pytest.raises(TypeError, match="bfloat16 or float32 parameters are updated"):
            step(bad, g, m, v)
    with pytest.raises(TypeError, match=r"gradient torch.int32"):
        step(p, g.int(), m, v)
    with pytest.raises(TypeError, match=r"moments torch.float32 and torch.bfloat16; they must be float32"):
        step(p, g, m, v.bfloat16())
    with pytest.raises(ValueError, match=r"shapes \(4, 6\), \(4, 6\), \(4, 5\), \(4, 6\) of p, g, m, v differ"):
        step(p, g, m[:, :5].contiguous(), v)
    with pytest.raises(ValueError, match="changed in place, so they must be contiguous"):
        step(p.T, g.T, m.T.contiguous(), v.T.contiguous())
    for wrong in ({"step": 0}, {"step": 2**31}, {"seed": -1}):
        with pytest.raises(ValueError, match="steps count from 1, seeds from 0"):
            step(p, g, m, v, **wrong)
    step(torch.zeros(0), torch.zeros(0), torch.zeros(0), torch.zeros(0))


def test_parameters_with_gradients_and_strided_gradients():
    p, g, m, v = inputs((6, 4), torch.bfloat16)
    want = adamw_plain(p, g, m, v, step=1, seed=0, **HYPER)
    leaf, version = p.requires_grad_(), p._version
    kernels.adamw(leaf, g.T.contiguous().T, m, v, step=1, seed=0, **HYPER)
    assert torch.equal(leaf, want[0]) and leaf.is_leaf and leaf._version > version


def test_opcheck():
    torch.library.opcheck(kernels.adamw_op, (*inputs((3, 7), torch.bfloat16), 1, *HYPER.values(), 5))


def test_compiled():
    """What is read before and after stays before and after; a later step needs no new compilation of its own."""

    def block(p, g, m, v, step):
        before = p * 2
        kernels.adamw(p, g, m, v, step=step, seed=11, **HYPER)
        return before, p * 2

    p, g, m, v = inputs((33,), torch.bfloat16)
    compiled = torch.compile(block, fullgraph=True)
    for step in (1, 2, 3):
        want = adamw_plain(p, g, m, v, step=step, seed=11, **HYPER)
        twice = p * 2
        before, after = compiled(p, g, m, v, step)
        assert torch.equal(before, twice) and torch.equal(after, want[0] * 2) and torch.equal(v, want[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sm_90_neither_spills_nor_moves_narrowly(dtype, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    p, m = (torch.empty(8192, 5632, dtype=kind, device="meta") for kind in (dtype, torch.float32))
    (binary,) = aot.compile_launches("sm_90", kernels.update, p, p, m, m, 7, *HYPER.values(), 3)
    assert binary.spilled == 0 and binary.loads == binary.wide_loads > 0, binary
    assert binary.assembly.count("STG.E") == binary.assembly.count("STG.E.128") > 0
