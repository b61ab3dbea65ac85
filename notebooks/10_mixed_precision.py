# %% [markdown]
# # 10 · How few bits does a number need?
#
# **Goal.** Take numbers of 16 and 8 bits apart, round to them by hand, and
# find where so few bits are enough, where they quietly stop a model from
# learning, and what it costs to prevent that.
#
# **Prerequisites.** `06_training`; binary numbers. **Time.** About 60
# minutes; it runs in under a minute.
#
# **You will be able to**
# - read any floating-point format, and round to it as hardware does;
# - predict which updates of a weight are lost, and keep them in three ways;
# - say which parts of a model stay in float32, and why;
# - count the bytes of a training recipe at 500 billion parameters.

# %%
import copy
import importlib.util
import math
from itertools import accumulate
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import nanomai
from nanomai import float8
from nanomai.config import ModelConfig, TrainConfig
from nanomai.exercises import mixed_precision as exercises
from nanomai.layers import Linear
from nanomai.show import lesson

lesson()
generator = torch.Generator().manual_seed(10)

# %% [markdown]
# ## 1 What the bits say
#
# A floating-point number has one bit of sign $s$, $e$ bits of exponent $E$
# and $m$ bits of mantissa $M$. With the bias $b = 2^{e-1} - 1$ its value is
#
# $$(-1)^s \; 2^{E-b} \; (1 + M / 2^m), \qquad \text{and} \qquad
#   (-1)^s \; 2^{1-b} \; M / 2^m \quad \text{if } E = 0 .$$
#
# The second kind, *subnormal*, fills the gap around zero with even steps.
# The exponent buys range, the mantissa precision. The largest exponent, all
# ones, is kept for infinity and NaN, except in e4m3 (its `fn`: *finite*),
# which gives up only its very last number for NaN.
#
# > **Predict.** `bfloat16` has float32's exponent; it is float32's upper
# > half. `float16` spends the same 16 bits otherwise. How large is the
# > largest number of each, and how far from 1 is the next one?

# %%
FORMATS = {"float32": (8, 23), "bfloat16": (8, 7), "float16": (5, 10),
           "float8_e4m3fn": (4, 3), "float8_e5m2": (5, 2)}  # e, m
INTEGERS = {32: torch.int32, 16: torch.int16, 8: torch.uint8}

for name, (e, m) in FORMATS.items():
    size = 1 + e + m
    x = torch.tensor(0.1).to(getattr(torch, name))
    raw = x.view(INTEGERS[size]).item() % 2**size
    bits = f"{raw:0{size}b}"
    E, M = int(bits[1 : 1 + e], 2), int(bits[1 + e :], 2)
    assert x.item() == 2.0 ** (E + 1 - 2 ** (e - 1)) * (1 + M / 2**m)
    print(f"{name:14}{bits[0]} {bits[1:1 + e]:8} {bits[1 + e:]:23}",
          f"= {x.item():.4f}")

# %%
def limits(name):
    """Largest, smallest normal and smallest positive number."""
    e, m = FORMATS[name]
    bias, finite = 2 ** (e - 1) - 1, name.endswith("fn")
    top = 2.0 ** (2**e - 1 - bias - (not finite))
    largest = top * (2 - 2.0**-m * (1 + finite))
    return largest, 2.0 ** (1 - bias), 2.0 ** (1 - bias - m)


for name, (_, m) in FORMATS.items():
    (largest, normal, first), known = limits(name), getattr(torch, name)
    assert largest == torch.finfo(known).max
    assert normal == torch.finfo(known).smallest_normal
    assert 2.0**-m == torch.finfo(known).eps
    print(f"{name:14}up to {largest:7.2g}, normal from {normal:.1e},",
          f"smallest {first:.1e}, 1+2^-{m}")

# %% [markdown]
# ## 2 Rounding is integer arithmetic
#
# Within one exponent the bits of a positive float, read as an integer, count
# up in even steps. So rounding float32 to bfloat16 means adding half a step,
# `0x8000`, and cutting the lower 16 bits off. Only a tie, a number exactly in
# the middle, needs care: it goes to the neighbour whose last bit is 0, or ties
# would drift away from zero.
#
# For any format: the exponent of $x$ gives the distance of its neighbours,
# $2^{k-m}$; round $x$ to a multiple of that. Below the smallest normal number
# the distance no longer shrinks.
#
# PyTorch's own casts are the judges, bit for bit: on 200,000 random patterns
# of 32 bits, on *every* number of each format and *every* middle between two,
# and a hair to both sides of those. (NaN is left out, and for e4m3 what lies
# beyond its range: versions of PyTorch differ there, so one clamps first.)

# %%
def to_bfloat16(x):
    raw = x.view(torch.int32)
    last = (raw >> 16) & 1  # the last bit that stays
    return ((raw + 0x7FFF + last) & ~0xFFFF).view(torch.float32)


def round_to(x, name):
    """float32 -> the nearest number of the format, as float32"""
    (e, m), (largest, *_) = FORMATS[name], limits(name)
    k = ((x.view(torch.int32) >> 23) & 0xFF) - 127  # 2^k <= |x| < 2^(k+1)
    k = k.clamp(min=2 - 2 ** (e - 1)) - m  # the distance is 2^k
    distance = ((k.long() + 1023) << 52).view(torch.float64)  # by its bits
    y = (x.double() / distance).round() * distance  # ties go to even
    beyond = largest if name.endswith("fn") else math.inf
    return y.where(y.abs() <= largest, beyond * x.sign()).float()

# %%
def hard_cases(name):
    dtype, size = getattr(torch, name), 1 + sum(FORMATS[name])
    raw = torch.randint(-(2**31), 2**31, (200_000,), generator=generator)
    every = torch.arange(2**size).to(INTEGERS[size]).view(dtype).float()
    every = every[every.isfinite()].sort().values
    middle = every[1:] / 2 + every[:-1] / 2
    near = [middle.nextafter(torch.tensor(to * math.inf)) for to in (-1, 1)]
    x = torch.cat([raw.int().view(torch.float32), every, middle, *near])
    return x[x.abs() <= (464 if name.endswith("fn") else math.inf)]


for name in list(FORMATS)[1:]:
    x = hard_cases(name)
    theirs = x.to(getattr(torch, name)).float().view(torch.int32)
    assert torch.equal(round_to(x, name).view(torch.int32), theirs), name
    print(f"{name:14} equal in {len(x):7,} cases, bit for bit")

# %% [markdown]
# Now the plausible bug: to cut the lower half off and be done. It errs by up
# to a whole step, where rounding to nearest errs by at most half a step:
# relative to $x$ by at most $2^{-m-1}$, wherever the format has normal
# numbers. The plot shows how far that holds.
#
# > **Predict.** What else is wrong with cutting off?

# %%
def cut_off(x):
    return (x.view(torch.int32) & ~0xFFFF).view(torch.float32)


x = hard_cases("bfloat16")
near_1 = 1 + torch.rand(100_000, generator=generator)
for way in (to_bfloat16, cut_off):
    bias = ((way(near_1) - near_1).mean() * 2**7).item()
    print(f"{way.__name__}: mean error {abs(bias):.1f} steps of 2^-7")
    assert -0.51 < bias < -0.49 or abs(bias) < 0.01
    try:
        assert torch.equal(way(x), x.bfloat16().float())
    except AssertionError as error:
        print("and not PyTorch's cast:", type(error).__name__)

# %%
COLOURS = {"float8_e5m2": "C3", "float8_e4m3fn": "C2", "bfloat16": "C0",
           "float16": "C1", "float32": "C4"}
x = torch.logspace(-10, 8, 4000)
for name, colour in list(COLOURS.items())[:4]:
    bound, (largest, normal, _) = 2.0 ** -(FORMATS[name][1] + 1), limits(name)
    off = ((round_to(x, name) - x) / x).abs()
    good = (x >= normal) & (x <= largest)
    assert 0.85 * bound < off[good].max() <= bound
    plt.loglog(x, off.where(x <= largest, math.nan), colour + ".", ms=1.5)
    plt.plot(x[good], 0 * x[good] + bound, colour, lw=3,
             label=f"{name}: 2^-{FORMATS[name][1] + 1}")
plt.ylim(1e-5, 2)
plt.xlabel("number (log)")
plt.ylabel("relative error of rounding (log)")
plt.legend(title="line: the bound, where numbers\nare normal; dots: measured",
           loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()

# %% [markdown]
# Cutting off always errs towards zero, by half a step on average, and such
# errors add up instead of cancelling. Rounding keeps its bound from the
# smallest normal number to the largest; below, everything fades into zero.
#
# ## 3 Lost updates
#
# Training adds a small step to a weight, again and again. If the step is less
# than half the distance to the weight's neighbour, the sum rounds back to the
# weight: nothing happened, and nothing will.
#
# Take weights from a normal distribution with deviation 0.02, and steps of
# the size of the learning rate, as Adam's first ones are. A weight with
# $2^k \le |w| < 2^{k+1}$ stays where it is if
# $\mathrm{lr} < 2^{k-m-1}$. So the lost share is the probability that $|w|$
# lies above a power of two, which the normal distribution knows.
#
# > **Predict.** What share of the updates is lost in bfloat16 at a learning
# > rate of 1e-4? At 1e-6? And in float32?

# %%
def lost_in_theory(lr, m, std=0.02):
    k = math.ceil(math.log2(lr)) + m + 1  # from 2^k on, all are lost
    return math.erfc(2.0**k / std / math.sqrt(2))


w = 0.02 * torch.randn(20_000, generator=generator)
step = torch.randint(2, w.shape, generator=generator) * 2 - 1.0
rates = torch.logspace(-8, -1, 281).tolist()
for name in ("bfloat16", "float16", "float32"):
    m, held = FORMATS[name][1], round_to(w, name)
    lost = [(round_to(held + lr * step, name) == held).float().mean().item()
            for lr in rates]
    theory = [lost_in_theory(lr, m) for lr in rates]
    assert_close(lost, theory, rtol=0, atol=0.015)
    plt.semilogx(rates[::5], lost[::5], COLOURS[name] + "o", ms=3)
    plt.semilogx(rates, theory, COLOURS[name], lw=1, label=name)
    print(f"{name:9} lost at 1e-4: {lost_in_theory(1e-4, m):4.0%},",
          f"at 1e-6: {lost_in_theory(1e-6, m):4.0%}")
plt.xlabel("learning rate (log)")
plt.ylabel("share of updates that change nothing")
plt.legend(title="dots: measured\nlines: theory", loc="center right")
plt.show()

# %% [markdown]
# An eighth is lost at 1e-4, nearly all at 1e-6, near which long runs end. And
# later, when gradients change their signs, Adam's steps are smaller than the
# rate. The stairs are powers of two; float16 has three more bits, which shifts
# the curve by a factor of eight.
#
# ## 4 Three ways to keep them
#
# **A float32 master.** Keep the weight in float32 and hand out rounded
# copies: 4 bytes, or 6 with the copy.
#
# **Kahan's compensation.** Keep a second bfloat16 number: what the last
# rounding cut off, to be added to the next step. It is the lower half of a
# master weight, nearly: 2 + 2 bytes.
#
# **Stochastic rounding.** Round up with the probability of the distance from
# below: then the *expected* result is exact, and no second number is needed.
# In bits: add a random 16-bit integer, and cut off.
#
# Each takes a weight, its update, and `memory`, what the weight lacks, and
# returns a new weight and a new memory.

# %%
def nearest(w, update, memory):
    return to_bfloat16(w + update), memory


def stochastic(w, update, memory):
    bits = torch.randint(2**16, w.shape, generator=generator).int()
    return cut_off(((w + update).view(torch.int32) + bits).view(w.dtype)), 0


def kahan(w, update, memory):  # each sum is rounded, as bfloat16's would be
    step = to_bfloat16(update + memory)
    new = to_bfloat16(w + step)
    return new, to_bfloat16(step - to_bfloat16(new - w))


def master(w, update, memory):  # w + memory is a float32 weight
    whole = w + memory + update
    return to_bfloat16(whole), whole - to_bfloat16(whole)

# %%
x = torch.tensor([1.002, -0.3, 1e-6, 1 + 2**-8])
many = stochastic(x.expand(100_000, 4), 0, 0)[0].double()
assert all(len(column.unique()) == 2 for column in many.T)
assert_close(many.mean(0), x.double(), rtol=5e-5, atol=0)
print("1 + 2^-8 to the nearest:", to_bfloat16(x)[3].item())
print(f"stochastically: 1 in {(many[:, 3] == 1).double().mean():.0%} of the",
      "cases, 1+2^-7 in the others")

if importlib.util.find_spec("triton"):  # wheels for Linux on x86-64 only
    from triton_kernels.adamw import adamw  # this kernel rounds so
    p = torch.ones(4096, dtype=torch.bfloat16)
    adamw(p, torch.ones(4096), torch.zeros(4096), torch.zeros(4096), step=1,
          lr=2**-9, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0, seed=1)
    assert abs(p.double().mean() - (1 - 2**-9)) < 2e-4  # right on average

# %% [markdown]
# Now in earnest. A model of 115 thousand parameters learns the lesson's text
# for 60 steps of AdamW at a high rate, with masters; then for 60 at 1e-4, as
# near the end of a run, with five ways to *store* the weights. All arithmetic
# stays in float32, so storage is the only difference.
#
# > **Predict.** Stochastic rounding errs by up to a whole step of bfloat16,
# > rounding to the nearest by half a step at most. Which learns more?

# %%
small = ModelConfig(n_layers=2, d_model=64, n_heads=2, n_kv_heads=1,
                    head_dim=32, d_ff=192, vocab_size=256,
                    context_length=64)
text = torch.tensor(list(Path("lesson.txt").read_bytes()))


def windows(starts):
    """Texts of 64 bytes and what follows each byte, (B, T) each"""
    rows = text[starts[:, None] + torch.arange(65)]
    return rows[:, :-1], rows[:, 1:]


def held_out(model):
    with torch.no_grad():
        return model(*windows(torch.arange(110_000, 114_096, 64))).item()

# %%
def train(model, store, lr, seed):
    """Held-out loss after 0, 20, 40 and 60 steps of AdamW."""
    g = torch.Generator().manual_seed(seed)
    parameters = list(model.parameters())
    adamw = torch.optim.AdamW(parameters, lr, (0.9, 0.95), weight_decay=0)
    memory = [torch.zeros_like(p) for p in parameters]
    losses = [held_out(model)]
    for t in range(1, 61):
        adamw.zero_grad()
        model(*windows(torch.randint(100_000, (8,), generator=g))).backward()
        old = [p.detach().clone() for p in parameters]
        adamw.step()  # in float32; how much of it can be kept?
        for i, p in enumerate(parameters):
            p.data, memory[i] = store(old[i], p.data - old[i], memory[i])
        losses += [held_out(model)] if t % 20 == 0 else []
    return losses

# %%
def wide(w, update, memory):
    return w + update, memory


models, gain = [nanomai.build_model(small, seed) for seed in range(3)], {}
for seed, model in enumerate(models):
    train(model, master, 1e-2, seed)
stores = (wide, master, kahan, stochastic, nearest)
for store, width in zip(stores, (10, 7, 4, 1.5, 1.5), strict=True):
    losses = torch.tensor([train(copy.deepcopy(model), store, 1e-4, 9 + seed)
                           for seed, model in enumerate(models)])  # (3, 4)
    gain[store] = losses[:, :1] - losses
    share = gain[store][:, -1] / gain[wide][:, -1]
    print(f"{store.__name__:10} learns {share.mean():.1f} of what wide does")
    bad = share > 0.5 if store == nearest else (share - 1).abs() > 0.03
    assert not bad.any()
    plt.plot(range(0, 61, 20), -gain[store].mean(0), lw=width,
             label=store.__name__)
plt.xlabel("step at a learning rate of 1e-4")
plt.ylabel("change of held-out loss (nats per byte)")
plt.legend(title="mean of three seeds")
plt.show()

# %% [markdown]
# The noisy one. All three cures learn what float32 (`wide`) learns; rounding
# to the nearest learns less than half of it, in every seed. A weight that
# refuses a step refuses the next one like it. Noise that is right on average
# cancels over many steps and many weights.
#
# ## 5 What the trainer does
#
# `nanomai` keeps float32 masters and nothing else. They are the model's
# parameters; each `Linear` casts its weight to the dtype of its *input* where
# it uses it. So a product has bfloat16 factors, and its gradient arrives at
# the master through the cast, as float32. First one layer by hand. Then a
# whole model, forward and backward, while PyTorch reports every operation
# with the dtype of its result.
#
# > **Predict.** Products, softmax, the squares in the norms, the loss: which
# > are bfloat16, which float32?

# %%
layer = Linear(48, 32, bias=False)
x = torch.randn(2, 7, 48, generator=generator).bfloat16()
dy = torch.randn(2, 7, 32, generator=generator).bfloat16()
layer(x).backward(dy)

narrow = layer.weight.detach().bfloat16().requires_grad_()  # by hand
y = x @ narrow.T
y.backward(dy)
assert torch.equal(layer(x), y) and y.dtype == torch.bfloat16
assert torch.equal(layer.weight.grad, narrow.grad.float())
assert layer.weight.grad.dtype == layer.weight.dtype == torch.float32
print("forward in", y.dtype, "| weight and gradient",
      layer.weight.grad.dtype)

# %%
NAMES = {"mm": "products", "bmm": "products of attention",
         "_softmax": "softmax", "pow": "squares in norms",
         "_log_softmax": "log-softmax of the loss"}
seen = {name: set() for name in NAMES}


class Watch(TorchDispatchMode):
    def __torch_dispatch__(self, op, types, inputs=(), options=None):
        y = op(*inputs, **(options or {}))
        if (name := op._overloadpacket.__name__) in NAMES:
            seen[name].add(y.dtype)
        return y


model = nanomai.build_model(small)
model.compute_dtype = torch.bfloat16
with Watch():
    model(*windows(torch.tensor([0, 64]))).backward()
for name, what in NAMES.items():
    print(f"{what:24}", *seen[name])
    narrow = name in ("mm", "bmm")
    assert seen[name] == {torch.bfloat16 if narrow else torch.float32}

# %% [markdown]
# ## 6 Why softmax, norms and the loss stay wide
#
# Products are where the time goes, and inside them the hardware sums in
# float32: only factors and result are narrow. Three things cannot bear even
# that, for three reasons.
#
# > **Predict.** Add 1,000 ones, one by one, in bfloat16. What comes out?

# %%
total, one = torch.zeros((), dtype=torch.bfloat16), torch.tensor(1.0)
for _ in range(1000):
    total = total + one.bfloat16()
print("softmax's sum: 1,000 ones are", int(total))
assert total == 256

square = torch.tensor(300.0).half().square()
print("the norm's square in float16: 300^2 is", square.item())
assert square.isinf()

p = torch.tensor(0.999)  # of the right token
print("the loss: the gradient p - 1 of a good guess is",
      f"{(p - 1).item():.3f}, in bfloat16 {(p.bfloat16() - 1).item():.3f}")
assert p.bfloat16() - 1 == 0

# %% [markdown]
# 256: next to it bfloat16 knows only 258, and a tie goes to even. A sum of
# thousands of small terms needs a wide total. A square doubles the exponent,
# which overflows float16, if not bfloat16. And a difference of nearly equal
# numbers consists of the very bits that were cut off: a model that is 99.9 %
# sure would stop learning.
#
# ## 7 float16: scale the loss
#
# float16 has the better mantissa and lacks range, and gradients of a *mean*
# over tokens are the smaller the larger the batch. The cure costs nothing:
# multiply the *loss* by a power of two, and by the chain rule all gradients
# grow alike; divide them again in float32. We take the gradients that come
# back through every `Linear` of our model, as of a mean over 1,024 tokens and
# over 4 million, and send them through float16.
#
# > **Predict.** What share becomes zero without a scale? How large may the
# > scale be?

# %%
def error(y, true):
    return ((y - true).norm() / true.norm()).item()


returned = []
for layer in models[0].modules():
    if isinstance(layer, Linear):
        layer.register_full_backward_hook(
            lambda _, d_x, d_y: returned.append(d_y[0].flatten()))
models[0](*windows(torch.arange(0, 1024, 64))).backward()  # 1,024 tokens
g = torch.cat(returned)
g = g[g != 0]
print("tokens in the mean   scale  become zero  error of all")
for n, k in ((10, 0), (10, 20), (22, 0), (22, 22), (22, 38)):
    mean = g * 2.0 ** (10 - n)
    y = (mean * 2.0**k).half().float() / 2.0**k
    lost, off = (y == 0).float().mean().item(), error(y, mean)
    print(f"{2**n:18,}    2^{k:<2} {lost:12.0%} {off:13.1g}")
    assert (off < 3e-4) == (k in (20, 22)) and (off == math.inf) == (k == 38)

# %%
for n in (22, 10):
    sizes = (g * 2.0 ** (10 - n)).abs().log2()
    share = torch.histc(sizes, 63, -46, 17) / len(g)
    assert 0.95 < share.sum() < 1.01  # the smallest few are not drawn
    plt.stairs(100 * share, torch.arange(-46, 18), fill=n == 10, color="C7",
               label=f"mean over 2^{n} tokens")
largest, normal, smallest = limits("float16")
for at, style, what in ((smallest / 2, "-", "zero, left of here"),
                        (normal, ":", "subnormal, left of here"),
                        (largest, "--", "infinite, right of here")):
    plt.axvline(math.log2(at), color="C1", ls=style, label=what)
plt.xlabel("size of a gradient, log2")
plt.ylabel("share of the numbers (%)")
plt.legend(title="in float16", loc=(0.52, 0.4))
plt.show()

# %% [markdown]
# Over 4 million tokens nearly all become zero. A scale moves the empty hill
# to the right, until its largest number meets 65,504. Who trains in float16
# finds the scale by trying (`torch.amp.GradScaler`): on an overflow, skip the
# step and halve it; after 2,000 good steps, double it. `nanomai` has a scale
# for free, as its loss is a *sum* over tokens, divided in float32 when
# gradients are clipped. But it trains in bfloat16, whose range makes all this
# unnecessary, and offers no float16.
#
# ## 8 Gradients are summed in float32
#
# With many GPUs each has its own gradient, and they are added up, in a ring:
# every rank adds its own to what comes from its neighbour and passes it on.
# If what travels is bfloat16, each of the $W - 1$ additions rounds. Errors of
# relative size $\varepsilon$, made on partial sums that grow like $\sqrt j$,
# add up to about $\varepsilon \sqrt{W/2}$ of the result.
#
# > **Predict.** bfloat16's $\varepsilon$ is 0.17 % on average. How large is the
# > error of a sum over 1,024 ranks?

# %%
parts = torch.randn(1024, 2000, generator=generator).bfloat16()
exact = parts.double().cumsum(0)  # (W, n): sums of the first ranks
narrow, wider = (torch.stack([*accumulate(parts.to(dtype))]).double()
                 for dtype in (torch.bfloat16, torch.float32))
x = torch.randn(100_000, generator=generator)
epsilon = error(to_bfloat16(x), x)
for W in (4, 16, 64, 256, 1024):
    off, theory = error(narrow[W - 1], exact[W - 1]), epsilon * (W / 2) ** 0.5
    print(f"{W:5,} ranks: off by {off:.2%}, in theory {theory:.2%}")
    assert 0.75 < off / theory < 1.33
    assert error(wider[W - 1], exact[W - 1]) < 1e-4  # summed in float32

# %% [markdown]
# Four per cent, each step anew, where a float32 sum is off by less than
# 0.01 %. So `parallel/fsdp.py` says
# `MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)`:
# weights travel as bfloat16, since their users would round them anyway, and
# gradients as float32. Section 10 counts the bytes.
#
# ## 9 Eight bits
#
# e4m3 ends at 448 and begins at 2^-9. So each tensor gets a *scale*, chosen
# anew at each step: its largest number becomes 448. The product is computed
# with the small numbers and multiplied by both scales afterwards. If the
# errors of the two factors are independent, their squares add up in the
# product: no better, no worse. int8 is here for comparison: also 8 bits, but
# even steps.
#
# `train.float8` (`nanomai/float8.py`) does so in the projections of each block:
# activations and weights become e4m3, gradients, which span more, e5m2. The
# second cell does it by hand.
#
# > **Predict.** Which of the three, int8, e4m3 and e5m2, has the smallest
# > error on normally distributed numbers?

# %%
def quantise(x, name):
    """x as the format sees it under one scale, in float32 again."""
    largest = 127 if name == "int8" else limits(name)[0]
    scale = x.abs().max() / largest
    y = (x / scale).clamp(-largest, largest)
    return scale * (y.round() if name == "int8" else round_to(y, name))


x = torch.randn(256, 512, generator=generator)  # tokens, channels
w = torch.randn(512, 384, generator=generator) / 512**0.5
for name in ("bfloat16", "int8", "float8_e4m3fn", "float8_e5m2"):
    a, b = quantise(x, name), quantise(w, name)
    off, theory = error(a @ b, x @ w), math.hypot(error(a, x), error(b, w))
    print(f"{name:14} error of the product {off:.1%}, in theory {theory:.1%}")
    assert 0.95 < off / theory < 1.05

# %%
a, b = x.bfloat16().requires_grad_(), w.T.contiguous().requires_grad_()
y = float8.linear(a, b)
d_y = torch.randn(y.shape, generator=generator).bfloat16()
y.backward(d_y)
x8 = quantise(a.detach().float(), "float8_e4m3fn")
w8 = quantise(b.detach(), "float8_e4m3fn")
d8 = quantise(d_y.float(), "float8_e5m2")
for name, package, ours in (("y", y, x8 @ w8.T), ("d x", a.grad, d8 @ w8),
                            ("d w", b.grad, d8.T @ x8)):
    off = error(package.detach().float(), ours)
    print(f"{name:3} equal, but for rounding to bfloat16: {off < 2**-8}")
    assert off < 2**-8

# %% [markdown]
# int8, if all is well behaved. But in a trained Transformer a few channels are
# many times as large as the others, and the scale has to fit *them*. We
# multiply one of the 512 channels by a factor and ask how well the other 511
# survive: under one scale, and under a scale for each block of 128 channels,
# so that an outlier can only spoil its own.
#
# > **Predict.** At which factor do int8, e4m3 and e5m2 break down?

# %%
def in_blocks(x, name):
    return torch.cat([quantise(b, name) for b in x.split(128, dim=1)], dim=1)


factors, others = [4.0**i for i in range(12)], torch.arange(512) != 7
true, found = x[:, others] @ w[others], []
for name, way in (("int8", quantise), ("float8_e4m3fn", quantise),
                  ("float8_e5m2", quantise), ("float8_e4m3fn", in_blocks)):
    rest = [way(torch.where(others, x, f * x), name)[:, others] @ w[others]
            for f in factors]
    found.append([error(y, true) for y in rest])
    plt.loglog(factors, found[-1], "o-" if way is quantise else "o--", ms=4,
               label=name + " in blocks" * (way is in_blocks))
int8, e4m3, e5m2, blocks = found
assert int8[2] > 2 * int8[0] and e5m2[-1] < 2 * e5m2[0]
assert e4m3[6] < 2 * e4m3[0] < e4m3[8]  # factors 4,096 and 65,536
assert abs(blocks[-1] - (127 / 511) ** 0.5) < 0.01
plt.axhline((127 / 511) ** 0.5, color="C3", ls=":")
plt.xlabel("the outlier channel is so many times as large (log)")
plt.ylabel("relative error of the rest (log)")
plt.legend(loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()

# %% [markdown]
# Even steps break at once. Floating steps are relative, and nothing happens
# until the ordinary numbers fall among the subnormals, thousands of times
# below the scale; e5m2 has range left, at twice the error. In blocks 127 of
# the 511 are spoilt: the dotted line. DeepSeek-V3 reports such blocks, and
# `nanomai import` reads its files of e4m3 (`hub/source.py`).
#
# ## 10 At 500B
#
# First what `nanomai` itself sends and holds: the simulator runs the real code
# on ranks that do not exist and counts. Blocks are gathered for the forward
# and again for the backward, everything else once.
#
# Then what each recipe holds for a parameter, and for all of `mai-1-dense`,
# our own proposal for a dense model of the size that the press reported for
# MAI-1; and how many updates would be lost in it without any of the cures.
#
# > **Predict.** Which recipe needs less memory: float32 for everything, or the
# > usual bfloat16 weights with float32 masters?

# %%
config = nanomai.Config(model=small, train=TrainConfig(batch_tokens=512))
found = nanomai.simulate(config, world_size=8)
n, rest = small.n_parameters, 256 * 64 + 64  # embedding and last norm
for name, numbers, size in (("all-gather", 2 * (n - rest) + rest, 2),
                            ("reduce-scatter", n, 4)):
    there = found.collectives[f"fsdp: {name}"]["bytes"] / numbers
    print(f"{name:15} {there:.1f} bytes a number")
    assert size <= there < 1.02 * size  # a little padding
state = sum(found.state.values()) / (n / 8)
print(f"weights, gradients, AdamW: {state:.0f} bytes a parameter")
assert 16 <= state < 16.5

# %%
recipes = {  # bytes: weight, master or lower half, gradient, two moments
    "all float32, as nanomai": (4, 0, 4, 8),
    "bf16 weights and gradients, masters": (2, 4, 2, 8),
    "bf16, Kahan": (2, 2, 2, 8),
    "DeepSeek-V3: fp8, masters, bf16 moments": (1, 4, 4, 4),
    "bf16, stochastic rounding": (2, 0, 2, 8),
    "the same, 8-bit moments": (2, 0, 2, 2)}
big = nanomai.load_config("mai-1-dense")
n, optimizer = big.model.n_parameters, big.optim
for name, total in zip(recipes, map(sum, recipes.values()), strict=True):
    print(f"{name:40}{total:3} B {n * total / 1e12:5.1f} TB",
          f"{math.ceil(n * total / 80e9):4} x 80 GB")
assert round(state) == sum(recipes["all float32, as nanomai"])
for when, lr in (("peak", optimizer.lr),
                 ("end", optimizer.lr * optimizer.min_lr_ratio)):
    lost = lost_in_theory(lr, 7, big.model.init_std)
    print(f"{when:4} of the schedule, lr {lr:.0e}: {lost:4.0%} lost")
    assert (lost > 0.9) == (when == "end")

# %% [markdown]
# The same. The bfloat16 of the usual recipe saves arithmetic and traffic, not
# memory: masters take back what weights and gradients save. What saves memory
# is to update without a master. But rounded to the nearest, hardly an update is
# lost at first and 95 % in the end: such a model would train well, and then
# stop without a sign. (These are initial weights; trained ones are larger, and
# lose more.)
#
# ## Exercises
#
# **1. Where 1 + eps == 1.** Return the smallest power of two (a float, such as
# `2.0**-7`) that changes `x` when it is added, and the sum rounded to `dtype`.
# `x` is a positive number which that dtype can hold.

# %%
def smallest_step(x, dtype):
    raise NotImplementedError


exercises.check_smallest_step(smallest_step)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `torch.finfo(dtype).eps` is the distance after 1, not after `x`. And a tie
# goes to even: half a distance changes every second number. Adding in float64
# and casting rounds once.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# def smallest_step(x, dtype):
#     def changes(step):
#         total = torch.tensor(x + step, dtype=torch.float64)
#         return total.to(dtype).double().item() != x
#
#     step = 2.0 ** math.floor(math.log2(x))
#     while changes(step / 2):
#         step /= 2
#     return step
# ```
# For odd mantissas it is half the distance, for even ones the whole: 1 + 2^-8
# is 1 in bfloat16, but 1 + 2^-7 + 2^-8 is not 1 + 2^-7.
# </details>
#
# **2. Kahan's sum, and one better.** Return the sum of `values`, a bfloat16
# vector, as a bfloat16 number, making no wider number on the way. A weight is
# larger than its updates; here the total may also be *smaller* than the next
# value, and cancel with it.

# %%
def compensated_sum(values):
    raise NotImplementedError


exercises.check_compensated_sum(compensated_sum)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `t = a + b` loses low bits of the *smaller* one, and `(larger - t) + smaller`
# is what was lost, exactly. Keep it, but it may grow until *it* loses bits. So
# after each value, add it to the total, and keep what is lost in that.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# def two_sum(a, b):
#     larger, smaller = (a, b) if a.abs() >= b.abs() else (b, a)
#     total = a + b
#     return total, (larger - total) + smaller
#
# def compensated_sum(values):
#     total = lost = torch.zeros_like(values[0])
#     for v in values:
#         total, left = two_sum(total, v)
#         total, lost = two_sum(total, lost + left)
#     return total
# ```
# Collected apart and added only at the end, what is lost of 1,000 ones would
# itself stop at 256.
# </details>
#
# **3. A softmax in bfloat16.** If you must: compute the softmax of `scores`,
# one bfloat16 row of up to 5,000 numbers, making no wider number, and calling
# no function that sums for you (those use float32 inside). Be within 3 % of
# each probability.

# %%
def narrow_softmax(scores):
    raise NotImplementedError


exercises.check_narrow_softmax(narrow_softmax)

# %% [markdown]
# <details><summary>Hint</summary>
#
# One by one, a sum of ones stops at 256. Add numbers of equal size instead:
# all even places to all odd ones, and so on, halving the row each time. Mind
# rows of odd length, and subtract the largest first.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# def narrow_softmax(scores):
#     e = (scores - scores.max()).exp()
#     total = e
#     while len(total) > 1:
#         if len(total) % 2:
#             total = torch.cat([total, torch.zeros_like(total[:1])])
#         total = total[0::2] + total[1::2]
#     return e / total
# ```
# 5,000 numbers take 13 roundings, one after another, where a loop takes
# 5,000. The package does not: its softmax is float32.
# </details>
#
# ## Recap
#
# - A format is a number of exponent bits, which give range, and of mantissa
#   bits, which give precision; rounding to it is integer arithmetic.
# - Updates below half a step are lost without a sign. A master, a
#   compensation or chance keeps them.
# - Products bear narrow factors. Long sums, differences of near equals and the
#   optimizer do not; outliers decide how coarse a scale may be.
#
# **What real systems do differently.** `autocast` decides casts by a list of
# operations. Scales of float8 may come from the steps before (*delayed*), so
# that a tensor is read once; the newest GPUs have scales for every 32 or 16
# numbers built in, with numbers of 8, 6 and 4 bits.
#
# **Read on.** [`nanomai/ops.py`](../nanomai/ops.py),
# [`nanomai/layers.py`](../nanomai/layers.py) (`Linear`),
# [`nanomai/float8.py`](../nanomai/float8.py),
# [`nanomai/parallel/fsdp.py`](../nanomai/parallel/fsdp.py),
# [`triton_kernels/adamw.py`](../triton_kernels/adamw.py). Mixed precision and
# loss scaling [1710.03740](https://arxiv.org/abs/1710.03740), bfloat16
# [1905.12322](https://arxiv.org/abs/1905.12322), training in bfloat16 alone
# [2010.06192](https://arxiv.org/abs/2010.06192), float8 formats
# [2209.05433](https://arxiv.org/abs/2209.05433), outliers
# [2208.07339](https://arxiv.org/abs/2208.07339), 8-bit optimizers
# [2110.02861](https://arxiv.org/abs/2110.02861), DeepSeek-V3
# [2412.19437](https://arxiv.org/abs/2412.19437).
#
# **Next:** `11a_first_kernels` looks at the programs that compute all this.
