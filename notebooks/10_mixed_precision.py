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
# - read any floating-point format, and round to it as the hardware does;
# - predict which updates of a weight are lost, and keep them in three ways;
# - say which parts of a model stay in float32, and why;
# - count the bytes of a training recipe at 500 billion parameters.

# %%
import copy
import importlib.util
import math
import tempfile
from collections import defaultdict

import matplotlib.pyplot as plt
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import nanomai
from nanomai import float8, ops, optim
from nanomai.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from nanomai.evaluation import evaluate
from nanomai.exercises import mixed_precision as exercises
from nanomai.hub.source import BLOCK
from nanomai.layers import Linear
from nanomai.parallel.apply import clip_gradients
from nanomai.show import lesson
from nanomai.simulator import simulate

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
# The exponent buys range, the mantissa precision. `bfloat16` has float32's
# exponent and so its range; it is float32's upper half. `float16` spends the
# same 16 bits otherwise. Of the two with 8 bits e4m3 is the precise one and
# e5m2 the wide one. Here is 0.1 in each.

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
    value = 2.0 ** (E - (2 ** (e - 1) - 1)) * (1 + M / 2**m)
    assert value == x.float().item()
    print(f"{name:14}{bits[0]} {bits[1:1 + e]:8} {bits[1 + e:]:23}",
          f"= {value:.4f}")

# %% [markdown]
# > **Predict.** The largest exponent, all ones, is kept for infinity and NaN,
# > except in e4m3 (its `fn`: *finite*), which gives up only its very last
# > number for NaN. How large is the largest number of each format? And how
# > far is the next number after 1?

# %%
def limits(name):
    """Largest, smallest normal and smallest positive number."""
    e, m = FORMATS[name]
    bias, finite = 2 ** (e - 1) - 1, name.endswith("fn")
    top = 2.0 ** (2**e - 1 - bias - (not finite))
    largest = top * (2 - 2.0**-m * (1 + finite))
    return largest, 2.0 ** (1 - bias), 2.0 ** (1 - bias - m)


print(f"{'':14}{'largest':>9}{'smallest normal':>17}{'smallest':>10}",
      f"{'after 1':>9}")
for name, (_, m) in FORMATS.items():
    largest, normal, smallest = limits(name)
    known = torch.finfo(getattr(torch, name))
    assert (largest, normal, 2.0**-m) == (
        known.max, known.smallest_normal, known.eps)
    print(f"{name:14}{largest:9.2g}{normal:17.1e}{smallest:10.1e}",
          f"  1+2^-{m}")

# %% [markdown]
# ## 2 Rounding is integer arithmetic
#
# Within one exponent the bits of a positive float, read as an integer, count
# up in even steps. So rounding float32 to bfloat16 means adding half a step,
# `0x8000`, and cutting the lower 16 bits off. Only a tie, a number exactly in
# the middle, needs care: it goes to the neighbour whose last bit is 0, or ties
# would drift away from zero.
#
# For the other formats we use the same idea in plainer words. The exponent
# of $x$, read from its bits, gives the distance of its neighbours, $2^{k-m}$;
# round $x$ to a multiple of that. Below the smallest normal number the
# distance no longer shrinks.

# %%
def to_bfloat16(x):
    raw = x.view(torch.int32)
    last = (raw >> 16) & 1  # the last bit that stays
    return ((raw + 0x7FFF + last) & ~0xFFFF).view(torch.float32)


def power_of_two(k):
    return ((k.long() + 1023) << 52).view(torch.float64)  # by its exponent


def round_to(x, name):
    """float32 -> the nearest number of the format, as float32"""
    (e, m), (largest, *_) = FORMATS[name], limits(name)
    k = ((x.view(torch.int32) >> 23) & 0xFF) - 127  # 2^k <= |x| < 2^(k+1)
    distance = power_of_two(k.clamp(min=2 - 2 ** (e - 1)) - m)
    y = (x.double() / distance).round() * distance  # ties go to even
    beyond = largest if name.endswith("fn") else math.inf
    return y.where(y.abs() <= largest, beyond * x.sign()).float()

# %% [markdown]
# PyTorch's own casts are the judges, bit for bit: on 200,000 random patterns
# of 32 bits, on *every* number of each format and *every* middle between two,
# and a hair to both sides of those. (NaN is left out. e4m3 has no infinity,
# and what lies beyond its range is cast differently by different versions
# of PyTorch, to NaN or to 448: so one always clamps first.) Then the
# plausible bug: to cut the lower half off and be done.
#
# > **Predict.** Cutting off errs by up to twice as much. What else is wrong
# > with it?

# %%
def hard_cases(name):
    """Patterns of bits, and around every number of a 16- or 8-bit format."""
    kind = INTEGERS[1 + sum(FORMATS[name])]
    raw = torch.randint(-(2**31), 2**31, (200_000,), generator=generator)
    x = raw.to(torch.int32).view(torch.float32)
    if kind != torch.int32:
        every = torch.arange(2 ** (1 + sum(FORMATS[name]))).to(kind)
        every = every.view(getattr(torch, name)).float()
        every = every[every.isfinite()].sort().values
        middle = (every[1:] / 2 + every[:-1] / 2)
        away = [middle.nextafter(middle * 0 + to)
                for to in (math.inf, -math.inf)]
        x = torch.cat([x, every, middle, *away])
    most = 464 if name.endswith("fn") else math.inf
    return x[x.abs() <= most]


def same_bits(a, b):
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


for name in FORMATS:
    x = hard_cases(name)
    theirs = x.to(getattr(torch, name)).float()
    assert same_bits(round_to(x, name), theirs), name
    print(f"{name:14} equal in {len(x):7,} cases, bit for bit")

# %%
x = hard_cases("bfloat16")
assert same_bits(to_bfloat16(x), x.bfloat16().float())
cut = (x.view(torch.int32) & ~0xFFFF).view(torch.float32)
try:
    assert same_bits(cut, x.bfloat16().float())
except AssertionError as error:
    print("cut off:", type(error).__name__)

x = 1 + torch.rand(100_000, generator=generator)
for name, y in (("rounded", to_bfloat16(x)),
                ("cut off", (x.view(torch.int32) & ~0xFFFF).view(
                    torch.float32))):
    bias = round((y - x).mean().item() * 2**7, 2) + 0.0  # no -0.0
    print(f"{name}: mean error {bias} steps of 2^-7")
    assert bias == (-0.5 if name == "cut off" else 0)

# %% [markdown]
# It always errs towards zero, by half a step on average, and such errors add
# up instead of cancelling.
#
# Rounding to nearest errs by at most half a step: relative to $x$ by at most
# $2^{-m-1}$, wherever the format has normal numbers. Below them the error
# grows until everything is zero, and above there is infinity.

# %%
x = torch.logspace(-10, 8, 4000)
for name, color in (("float8_e5m2", "C3"), ("float8_e4m3fn", "C2"),
                    ("bfloat16", "C0"), ("float16", "C1")):
    m, (largest, normal, _) = FORMATS[name][1], limits(name)
    error = ((round_to(x, name) - x) / x).abs()
    inside = x <= largest
    plt.loglog(x[inside], error[inside], ".", ms=1.5, color=color)
    plt.plot([max(normal, 1e-10), min(largest, 1e8)], [2.0 ** (-m - 1)] * 2,
             color=color, lw=3, label=f"{name}: 2^-{m + 1}")
    good = inside & (x >= normal)
    assert 0.85 * 2.0 ** (-m - 1) < error[good].max() <= 2.0 ** (-m - 1)
    assert (x < normal).sum() == 0 or error[x < normal].max() > 0.9
plt.ylim(1e-5, 2)
plt.xlabel("number (log)")
plt.ylabel("relative error of rounding (log)")
plt.legend(title="line: the bound, where numbers\nare normal; dots: measured",
           loc="center left", bbox_to_anchor=(1, 0.5), markerscale=4)
plt.show()

# %% [markdown]
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
def lost_in_theory(lr, std, m):
    k = math.ceil(math.log2(lr)) + m + 1  # from 2^k on, all are lost
    return math.erfc(2.0**k / std / math.sqrt(2))


w, rates = 0.02 * torch.randn(20_000, generator=generator), {}
sign = torch.randint(0, 2, w.shape, generator=generator) * 2 - 1
grid = torch.logspace(-8, -1, 57).tolist()
for name, color in (("bfloat16", "C0"), ("float16", "C1"),
                    ("float32", "C4")):
    held = round_to(w, name)
    lost = [(round_to(held + lr * sign, name) == held).float().mean().item()
            for lr in grid]
    theory = [lost_in_theory(lr, 0.02, FORMATS[name][1]) for lr in grid]
    fine = torch.logspace(-8, -1, 1000).tolist()
    plt.semilogx(grid, lost, color + "o", ms=3, label=name)
    plt.semilogx(fine, [lost_in_theory(lr, 0.02, FORMATS[name][1])
                        for lr in fine], color, lw=1)
    assert_close(lost, theory, rtol=0, atol=0.015)
    rates[name] = [lost_in_theory(lr, 0.02, FORMATS[name][1])
                   for lr in (1e-4, 1e-6)]
    print(f"{name:9} lost at 1e-4: {rates[name][0]:4.0%},",
          f"at 1e-6: {rates[name][1]:4.0%}")
plt.xlabel("learning rate (log)")
plt.ylabel("share of updates that change nothing")
plt.legend(title="dots: measured\nlines: theory", loc="center right")
plt.show()

# %% [markdown]
# An eighth is lost at 1e-4, nearly all at 1e-6, near which long runs end. The
# stairs are powers of two. float16 has three more bits, which shifts the curve
# by a factor of eight. And later, when gradients change their signs, Adam's
# steps are smaller than the rate: below half of it in the runs to come.
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

# %%
def round_stochastically(x, generator):
    bits = torch.randint(0, 2**16, x.shape, generator=generator)
    return ((x.view(torch.int32) + bits.int()) & ~0xFFFF).view(torch.float32)


x = torch.tensor([1.002, -0.3, 1e-6, 1 + 2**-8])
many = round_stochastically(x.expand(100_000, 4), generator)
assert all(len(many[:, i].unique()) == 2 for i in range(4))
assert_close(many.double().mean(0), x.double(), rtol=5e-5, atol=0)
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
# for 60 steps at a high rate, in float32. Then 60 steps of AdamW at a rate of
# 1e-4, as near the end of a run, with five ways to *store* the weights. All
# other arithmetic stays in float32, so storage is the only difference.
#
# `memory` is what a weight lacks: for the master in float32, so that the sum
# of both *is* a float32 weight; for Kahan in bfloat16, and each of his sums
# is rounded as well.

# %%
def master(w, update, memory, _):
    whole = w + memory + update
    return to_bfloat16(whole), whole - to_bfloat16(whole)


def kahan(w, update, memory, _):
    step = to_bfloat16(update + memory)
    new = to_bfloat16(w + step)
    return new, to_bfloat16(step - to_bfloat16(new - w))


STORES = {
    "bfloat16": lambda w, update, memory, _: (
        to_bfloat16(w + update), memory),
    "stochastic": lambda w, update, memory, draw: (
        round_stochastically(w + update, draw), memory),
    "Kahan": kahan,
    "master": master,
    "float32": lambda w, update, memory, _: (w + update, memory)}

# %%
small = ModelConfig(n_layers=2, d_model=64, n_heads=2, n_kv_heads=1,
                    head_dim=32, d_ff=192, vocab_size=257,
                    context_length=64)
folder = tempfile.TemporaryDirectory()
prepared = nanomai.prepare(
    DataConfig(corpus="lesson.txt", tokenizer="bytes", workers=1,
               folder=folder.name), 257, show=False)


def held_out(model):
    windows = prepared.validation(64).batches(16)
    return evaluate(model, prepared.tokenizer, windows).loss


def begun(seed):
    """A model after 60 steps of Muon."""
    model = nanomai.build_model(small, seed)
    optimizers = optim.build_optimizers(model, OptimConfig(name="muon"))
    for t, batch in enumerate(prepared.loader(64, seed).batches(
            0, [8] * 60)):
        model(*batch).backward()
        clip_gradients(model, 1.0)
        optim.set_learning_rate(optimizers, 0.02 * min(1, (t + 1) / 10))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return model

# %%
@torch.no_grad()
def store_steps(model, updates, store, memories, draw):
    for p, memory, update in zip(model.parameters(), memories, updates,
                                 strict=True):
        new, left = store(p, update, memory, draw)
        p.copy_(new), memory.copy_(left)
        p.grad = None


def finish(model, name, seed, steps=60, lr=1e-4):
    """Held-out loss after 0, 20, 40 and 60 steps of AdamW."""
    model, draw = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    m, v, memories = ([torch.zeros_like(p) for p in model.parameters()]
                      for _ in range(3))
    losses = [held_out(model)]
    for t, batch in enumerate(prepared.loader(64, seed).batches(
            60 * 8, [8] * steps), 1):
        model(*batch).backward()
        clip_gradients(model, 1.0)
        for m_i, v_i, p in zip(m, v, model.parameters(), strict=True):
            m_i.lerp_(p.grad, 0.1)
            v_i.lerp_(p.grad**2, 0.05)
        updates = [-lr * (a / (1 - 0.9**t))
                   / ((b / (1 - 0.95**t)).sqrt() + 1e-8)
                   for a, b in zip(m, v, strict=True)]
        store_steps(model, updates, STORES[name], memories, draw)
        if t % 20 == 0:
            losses.append(held_out(model))
    return losses

# %% [markdown]
# > **Predict.** Stochastic rounding adds noise to every weight at every step:
# > up to a whole distance to the next bfloat16, where the update itself is a
# > fraction of that. Is it better or worse than rounding to the nearest?

# %%
models = [begun(seed) for seed in range(3)]
for model in models:  # all begin with weights that bfloat16 can hold
    for p in model.parameters():
        p.data = to_bfloat16(p.data)
curves = {name: torch.tensor([finish(model, name, seed)
                              for seed, model in enumerate(models)])
          for name in STORES}  # (3 seeds, 4 evaluations)
gain = {name: c[:, :1] - c for name, c in curves.items()}
for name, style in zip(STORES, ("C0o-", "C1s-", "C2^-", "C3v-", "k--"),
                       strict=True):
    plt.plot(range(0, 61, 20), -gain[name].mean(0), style, ms=4, label=name)
    share = gain[name][:, -1] / gain["float32"][:, -1]
    print(f"{name:10} learns {share.min():4.0%} to {share.max():4.0%} of",
          "what float32 learns")
    assert (share < 0.6).all() if name == "bfloat16" else \
        ((share - 1).abs() < 0.03).all()
plt.xlabel("step at a learning rate of 1e-4")
plt.ylabel("change of held-out loss (nats per byte)")
plt.legend(title="mean of three seeds")
plt.show()

# %% [markdown]
# Better by far. All three cures learn what float32 learns; rounding to the
# nearest learns less than half of it, in every seed. Its errors are small, but
# they do not cancel: a weight that refuses a step refuses the next one like it.
# Noise that is right on average cancels over many steps and many weights.
#
# ## 5 What the trainer does
#
# `nanomai` keeps float32 masters and nothing else. They are the model's
# parameters; each `Linear` casts its weight to the dtype of its *input* where
# it uses it. (PyTorch's `autocast` decides such casts by a list of
# operations; here they stand in the code.) So a product has bfloat16 factors,
# and its gradient arrives at the master through the cast, as float32.

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

# %% [markdown]
# Which operations of a whole model are narrow? We let PyTorch report every
# one that runs, forward and backward, with the dtype of its result.
#
# > **Predict.** Products, softmax, the squares in the norms, the loss: which
# > are bfloat16, which float32?

# %%
NAMES = {"mm": "products", "bmm": "products of attention",
         "_softmax": "softmax", "_softmax_backward_data": "softmax, back",
         "pow": "squares in norms", "_log_softmax": "log-softmax of the loss",
         "embedding_dense_backward": "embedding, back"}


class Watch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = defaultdict(set)

    def __torch_dispatch__(self, op, types, inputs=(), options=None):
        y = op(*inputs, **(options or {}))
        name = op._overloadpacket.__name__
        if name in NAMES:
            self.seen[NAMES[name]].add(str(y.dtype).removeprefix("torch."))
        return y


def watch(dtype):
    model = nanomai.build_model(small)
    model.compute_dtype = dtype
    ids = torch.randint(257, (2, 4, 64), generator=generator)
    with Watch() as found:
        model(*ids, reduction="sum").backward()
    return model, dict(found.seen)

# %%
model, seen = watch(torch.bfloat16)
for what in dict.fromkeys(NAMES.values()):
    print(f"{what:24} {', '.join(sorted(seen[what]))}")
    narrow = "products" in what
    assert seen[what] == {"bfloat16" if narrow else "float32"}, what
for optimizer in optim.build_optimizers(model, OptimConfig(name="muon")):
    for p, state in optimizer.state.items():
        assert {p.dtype, p.grad.dtype, *(t.dtype for t in state.values())} \
            == {torch.float32}
_, seen = watch(torch.float32)
assert set.union(*seen.values()) == {"float32"}
print("weights, gradients, optimizer: float32")

# %% [markdown]
# ## 6 Why softmax, norms and the loss stay wide
#
# Products are where the time goes, and inside a product the hardware sums in
# float32 anyway: only the factors and the result are narrow. Three things
# cannot bear even that, for three reasons.
#
# > **Predict.** Add 1,000 ones, one by one, in bfloat16. What comes out?

# %%
total, one = torch.zeros((), dtype=torch.bfloat16), torch.tensor(1.0)
for _ in range(1000):
    total = total + one.bfloat16()
print("softmax's sum: 1,000 ones are", int(total))
assert total == 256

activation = torch.tensor([300.0])
print("the norm's square in float16: 300^2 is",
      activation.half().square().item())
assert activation.half().square().isinf()

p = torch.tensor(0.999)  # of the right token
for dtype in (torch.float32, torch.bfloat16):
    push = (p.to(dtype) - 1).item()
    print(f"the loss: gradient p - 1 of a good guess in {dtype}: {push:.4f}")
assert (p.bfloat16() - 1) == 0

# %% [markdown]
# 256: next to it bfloat16 knows only 258, and a tie goes to even. A sum of
# thousands of small terms needs a wide total. A square doubles the exponent,
# which overflows float16, if not bfloat16. And a difference of nearly equal
# numbers consists of the very bits that were cut off: a model that is 99.9 %
# sure would stop learning. One narrow place is left: logits leave their product
# in bfloat16, before the loss widens them. `ops.linear_cross_entropy` shows
# what that alone costs.

# %%
N, D, V = 64, 64, 1000
hidden = torch.randn(N, D, generator=generator)
table = torch.randn(V, D, generator=generator) / 4
targets = torch.randint(V, (N,), generator=generator)
truth, package = (torch.stack([
    ops.linear_cross_entropy(h[None], table, t[None])
    for h, t in zip(some, targets, strict=True)])
    for some in (hidden, hidden.bfloat16()))  # (N,) each
assert package.dtype == torch.float32  # and so is all after the product

z = hidden.bfloat16() @ table.bfloat16().T  # (N, V), by hand, all narrow
e = (z - z.amax(1, keepdim=True)).exp()
total = torch.zeros(N, dtype=torch.bfloat16)
for column in e.T:
    total = total + column
narrow = total.log() + z.amax(1) - z[range(N), targets]
off = [((loss - truth).norm() / truth.norm()).item()
       for loss in (package, narrow.float())]
print(f"a token's loss is off by {off[0]:.1%} if wide after the product,")
print(f"and by {off[1]:.0%} if narrow throughout")
assert off[0] < 2e-3 and off[1] > 5 * off[0]

# %% [markdown]
# ## 7 float16: scale the loss
#
# float16 has the better mantissa and lacks range. Gradients of a *mean* over
# tokens are small, the smaller the larger the batch. Here are those that come
# back through every `Linear` of our trained model, for the mean over 1,024
# tokens.
#
# > **Predict.** What share falls below float16's smallest normal number,
# > 2^-14? What happens to it for the mean over 4 million tokens?

# %%
returned, model = [], models[0]


def listen(module, x, y):
    y.register_hook(lambda gradient: returned.append(gradient.flatten()))


hooks = [module.register_forward_hook(listen) for module in model.modules()
         if isinstance(module, Linear)]
batch = next(iter(prepared.loader(64, 0).batches(960, [16])))
model(*batch, reduction="sum").backward()
for hook in hooks:
    hook.remove()
tokens = batch.targets.numel()
g = torch.cat(returned) / tokens
g = g[g != 0]
subnormal = (g.abs() < 2**-14).float().mean().item()
print(f"below 2^-14, and so imprecise in float16: {subnormal:.0%}")
assert subnormal > 0.8

# %%
levels = torch.arange(-46, 1)
share = torch.histc(g.abs().log2(), 46, -46, 0) / len(g)
plt.bar(levels[:-1] + 0.5, 100 * share, 0.9, color="C7")
for name, color in (("float16", "C1"), ("float8_e5m2", "C3"),
                    ("float8_e4m3fn", "C2")):
    _, normal, smallest = limits(name)
    plt.axvline(math.log2(smallest) - 1, color=color, label=f"{name}: zero")
    plt.axvline(math.log2(normal), color=color, ls=":",
                lw=4 if name == "float16" else 1.5,
                label=f"{name}: subnormal")
plt.xlim(-40, -4)
plt.xlabel("size of a gradient, log2")
plt.ylabel("share of the numbers (%)")
plt.legend(title="left of its line a number\nbecomes", loc="center left",
           bbox_to_anchor=(1, 0.5))
plt.show()
assert abs(share.sum() - 1) < 0.01

# %% [markdown]
# Nine of ten. The cure costs nothing: multiply the *loss* by a power of two,
# and by the chain rule all gradients grow alike; divide them again in
# float32. It moves the grey hill to the right, until its largest number
# meets 65,504.

# %%
def seen_through_float16(g, scale):
    return (g * scale).half().float() / scale


print(f"{'tokens in the mean':>20}  scale  become zero   error of all")
for tokens_log2, scale_log2 in ((10, 0), (10, 10), (10, 22), (10, 26),
                                (22, 0), (22, 22)):
    some = g * 2.0 ** (10 - tokens_log2)
    through = seen_through_float16(some, 2.0**scale_log2)
    zero = (through == 0).float().mean().item()
    error = ((through - some).norm() / some.norm()).item()
    said = "overflow" if not math.isfinite(error) else f"{error:.1e}"
    print(f"{2**tokens_log2:20,}   2^{scale_log2:<4}{zero:9.2%}   {said:>12}")
    assert math.isfinite(error) == (scale_log2 < 26)
    assert (error < 3e-4) == (scale_log2 in (10, 22)) or tokens_log2 == 10

# %% [markdown]
# Over 4 million tokens nearly all of them become zero without a scale, and
# what is left is a quarter off. `nanomai` would hardly need a scale: its loss
# is a *sum* over tokens, divided in float32 when the gradients are clipped.
# That is a scale equal to the number of tokens. Anyway it trains in bfloat16,
# whose range makes all this unnecessary; `train.dtype` offers no float16.
#
# Who does use float16 finds the scale by trying: on an overflow, skip the
# step and halve it; after a number of good steps, double it. PyTorch's
# `GradScaler` is the judge.

# %%
def next_scale(scale, good, overflow, patience):
    """The scale and the number of good steps in a row, after a step."""
    if overflow:
        return scale / 2, 0
    return (scale * 2, 0) if good + 1 == patience else (scale, good + 1)


judge = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=3)
p = torch.zeros(1, requires_grad=True)
sgd = torch.optim.SGD([p], lr=1.0)
scale, good, history = 2.0**16, 0, []
for step in range(16):
    overflow = step in (1, 2, 9, 13)
    judge.scale(p.sum() * (math.inf if overflow else 1)).backward()
    judge.step(sgd)  # leaves p alone on an overflow
    judge.update()
    sgd.zero_grad()
    scale, good = next_scale(scale, good, overflow, patience=3)
    history.append(int(math.log2(scale)))
    assert judge.get_scale() == scale, step
print("log2 of the scale:", *history)
assert p.item() == -12  # 16 steps, 4 of them skipped

# %% [markdown]
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
worlds = [2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
parts = torch.randn(1024, 2000, generator=generator).bfloat16()
exact = parts.double().cumsum(0)  # (W, n)
rms = ((to_bfloat16(x := torch.randn(100_000, generator=generator)) - x)
       .norm() / x.norm()).item()
for dtype, style in ((torch.bfloat16, "C0o-"), (torch.float32, "C4s-")):
    total, errors = parts[0].to(dtype), []
    for rank in range(1, 1024):
        total = total + parts[rank].to(dtype)
        if rank + 1 in worlds:
            off = total.double() - exact[rank]
            errors.append((off.norm() / exact[rank].norm()).item())
    some = [(w, e) for w, e in zip(worlds, errors, strict=True) if e > 0]
    plt.loglog(*zip(*some, strict=True), style, ms=4,
               label=str(dtype).removeprefix("torch."))
    if dtype == torch.bfloat16:
        theory = [rms * (w / 2) ** 0.5 for w in worlds]
        assert all(0.75 < a / b < 1.33 for a, b in zip(
            errors, theory, strict=True))
plt.loglog(worlds, theory, "k:", label="0.17 % x sqrt(W / 2)")
plt.xlabel("ranks W (log)")
plt.ylabel("relative error of the sum (log)")
plt.legend(title="summed in", loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()
print(f"1,024 ranks: theory {theory[-1]:.1%};",
      f"float32 below 0.01 %: {errors[-1] < 1e-4}")

# %% [markdown]
# Four per cent, each step anew. So `parallel/fsdp.py` says
# `MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)`: weights
# travel as bfloat16, since their users would round them anyway, and gradients
# as float32. The simulator runs the real code on ranks that do not exist and
# counts what they send: blocks are gathered for the forward and again for
# the backward, everything else once.

# %%
config = Config(model=small, train=TrainConfig(batch_tokens=8 * 64))
found = simulate(config, world_size=8)
n, rest = small.n_parameters, 257 * 64 + 64  # embedding and last norm
gathered = found.collectives["fsdp: all-gather"]["bytes"]
reduced = found.collectives["fsdp: reduce-scatter"]["bytes"]
for name, there, numbers, size in (
        ("gathered", gathered, 2 * (n - rest) + rest, 2),
        ("summed", reduced, n, 4)):
    print(f"{name:9} {there / numbers:.1f} bytes a number")
    assert size <= there / numbers < 1.02 * size  # a little padding
state = sum(found.state.values()) / (n / 8)
print(f"weights, gradients, AdamW: {state:.0f} bytes a parameter")
assert 16 <= state < 16.5

# %% [markdown]
# ## 9 Eight bits
#
# e4m3 ends at 448 and begins at 2^-9. So each tensor gets a *scale*, chosen
# anew at each step: its largest number becomes 448. The product is computed
# with the small numbers and multiplied by both scales afterwards. If the
# errors of the two factors are independent, their squares add up in the
# product: no better, no worse.
#
# int8 is here for comparison: also 8 bits, but even steps.
#
# > **Predict.** Which of the three has the smallest error on normally
# > distributed numbers?

# %%
def quantise(x, name, scale=None):
    """x as the format sees it under one scale, in float32 again."""
    largest = 127 if name == "int8" else limits(name)[0]
    scale = x.abs().max() / largest if scale is None else scale
    y = (x / scale).clamp(-largest, largest)
    return scale * (y.round() if name == "int8" else round_to(y, name))


def error(a, b):
    return ((a - b).norm() / b.norm()).item()


x = torch.randn(256, 512, generator=generator)  # tokens, channels
w = torch.randn(512, 384, generator=generator) / 512**0.5
for name in ("bfloat16", "int8", "float8_e4m3fn", "float8_e5m2"):
    a, b = quantise(x, name), quantise(w, name)
    theory = math.hypot(error(a, x), error(b, w))
    print(f"{name:14} error of the product {error(a @ b, x @ w):.2%},",
          f"from its factors' {theory:.2%}")
    assert 0.95 < error(a @ b, x @ w) / theory < 1.05

# %% [markdown]
# int8, if all is well behaved. But in a trained Transformer a few channels are
# many times as large as the others, and the scale has to fit *them*. We
# multiply one of the 512 channels by a factor and ask how well the other 511
# survive.
#
# > **Predict.** At which factor do int8, e4m3 and e5m2 break down?

# %%
def in_blocks(x, name):
    """A scale for each block of 128 channels."""
    return torch.cat([quantise(part, name)
                      for part in x.split(BLOCK, dim=1)], dim=1)


ways = {"int8": ("C4s-", quantise), "float8_e4m3fn": ("C2o-", quantise),
        "float8_e5m2": ("C3^-", quantise),
        "float8_e4m3fn ": ("C0v--", in_blocks)}
factors, others = [4.0**i for i in range(12)], torch.arange(512) != 7
found = {}
for name, (style, way) in ways.items():
    found[name] = []
    for factor in factors:
        y = x.clone()
        y[:, 7] *= factor
        y = way(y, name.strip())[:, others] @ w[others]
        found[name].append(error(y, x[:, others] @ w[others]))
    label = name + ("in blocks of 128" if way is in_blocks else "")
    plt.loglog(factors, found[name], style, ms=4, label=label)
plt.axhline(1, color="k", ls=":")
plt.axhline((127 / 511) ** 0.5, color="C0", ls=":")
plt.xlabel("the outlier channel is so many times as large (log)")
plt.ylabel("relative error of the rest (log)")
plt.legend(loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()

# %%
first = {name: next((f for f, e in zip(factors, errors, strict=True)
                     if e > 2 * errors[0]), None)
         for name, errors in found.items()}
for name, factor in list(first.items())[:3]:
    print(f"{name:14} twice the error:",
          "never, so far" if factor is None else f"from {factor:,.0f} on")
assert first["int8"] <= 16 and first["float8_e5m2"] is None
assert 4096 < first["float8_e4m3fn"] <= 65536
assert_close(found["float8_e4m3fn "][-1], (127 / 511) ** 0.5, rtol=0.02,
             atol=0)

# %% [markdown]
# Even steps break at once. Floating steps are relative, and nothing happens
# until the ordinary numbers fall among the subnormals, thousands of times
# below the scale; e5m2 has range left, at twice the error. With a scale for
# each block of 128 channels an outlier can only spoil its own block: the lower
# dotted line. DeepSeek-V3 reports such blocks, and `nanomai import` reads its
# files of e4m3 (`hub/source.py`). Its report also promotes the sums inside a
# product to float32 every 128 terms, as the hardware's own were too narrow.
#
# `train.float8` (`nanomai/float8.py`) is the simple way, one scale for each
# tensor: activations and weights of a block's projections become e4m3,
# gradients, which span more, e5m2. Masters stay float32. By hand:

# %%
a, b = x.bfloat16().requires_grad_(), w.T.contiguous().requires_grad_()
y = float8.linear(a, b)
d_y = torch.randn(y.shape, generator=generator).bfloat16()
y.backward(d_y)
x8 = quantise(a.detach().float(), "float8_e4m3fn")
w8 = quantise(b.detach(), "float8_e4m3fn")
d8 = quantise(d_y.float(), "float8_e5m2")
for name, packages, ours in (("y", y, x8 @ w8.T), ("d x", a.grad, d8 @ w8),
                             ("d w", b.grad, d8.T @ x8)):
    off = error(packages.detach().float(), ours)
    print(f"{name:3} equal, but for rounding to bfloat16: {off < 2**-8}")
    assert off < 2**-8
assert error(y.float(), x @ w) > 0.01  # which is the price

# %% [markdown]
# ## 10 At 500B
#
# `mai-1-dense` is our own proposal for a dense model of the size that the
# press reported for MAI-1. What does each recipe hold for each parameter:
# weights, what keeps lost updates, gradients, AdamW's two moments?
#
# > **Predict.** Which recipe needs less memory: float32 for everything, or the
# > usual bfloat16 weights with float32 masters?

# %%
recipes = {  # bytes: weight, master or lower half, gradient, two moments
    "all float32": (4, 0, 4, 8),
    "nanomai: masters, cast where used": (4, 0, 4, 8),
    "bf16 weights and gradients, masters": (2, 4, 2, 8),
    "bf16, Kahan": (2, 2, 2, 8),
    "DeepSeek-V3: fp8, masters, bf16 moments": (1, 4, 4, 4),
    "bf16, stochastic rounding": (2, 0, 2, 8),
    "the same, 8-bit moments": (2, 0, 2, 2)}
big = nanomai.load_config("mai-1-dense")
n = big.model.n_parameters
for name, parts in recipes.items():
    total = sum(parts)
    print(f"{name:40}{total:3} B {n * total / 1e12:5.1f} TB",
          f"{math.ceil(n * total / 80e9):4} x 80 GB")
assert round(state) == sum(recipes["nanomai: masters, cast where used"])

# %% [markdown]
# The same. The bfloat16 of the usual recipe saves arithmetic and traffic, not
# memory: masters take back what weights and gradients save. `nanomai` keeps no
# copy between steps; a cast weight lives until its backward, and under FSDP
# only while its block is gathered. What saves memory is to update without a
# master. What would become of such updates here, rounded to the nearest?

# %%
std, peak, low = big.model.init_std, big.optim.lr, big.optim.min_lr_ratio
for when, lr in (("peak", peak), ("end", peak * low)):
    lost = lost_in_theory(lr, std, m=7)
    print(f"{when:4} of the schedule, lr {lr:.0e}: {lost:4.0%} lost")
    assert (lost > 0.9) == (when == "end")
T = big.sequence_length
products = 6 * big.model.layer_parameters(active=True)
share = products / big.model.flops_per_token(T)
print(f"blocks' products: {share:.0%} of the FLOPs; twice as fast,",
      f"a step takes {1 - share / 2:.0%}")
assert 0.9 < share < 1
folder.cleanup()

# %% [markdown]
# None at first and 95 % in the end: a model stored in bfloat16 alone would
# train well, and then stop without a sign. (These are initial weights; trained
# ones are larger, and lose more.) The last line is what float8 could buy, were
# its products really twice as fast, as an H100's data sheet says, and its
# scales free.
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
# is what was lost, exactly. Keep a pair: the total, and what it lacks. But what
# it lacks may grow until *it* loses bits. So after each value, add it to the
# total, and keep what is lost in that.
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
# Two bfloat16 numbers thus hold 16 bits and more. Collected apart and added only
# at the end, what is lost of 1,000 ones would itself stop at 256.
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
# **What real systems do differently.** Hardware rounds, sums and scales inside
# one instruction; scales of float8 may come from the steps before (*delayed*)
# so that a tensor is read once; the newest GPUs have scales for every 32 or 16
# numbers built in, with numbers of 8, 6 and 4 bits.
#
# **Read on.** [`nanomai/ops.py`](../nanomai/ops.py),
# [`nanomai/layers.py`](../nanomai/layers.py) (`Linear`),
# [`nanomai/parallel/fsdp.py`](../nanomai/parallel/fsdp.py),
# [`triton_kernels/adamw.py`](../triton_kernels/adamw.py). Mixed precision and
# loss scaling [1710.03740](https://arxiv.org/abs/1710.03740), bfloat16
# [1905.12322](https://arxiv.org/abs/1905.12322), training in bfloat16 alone
# [2010.06192](https://arxiv.org/abs/2010.06192), float8 formats
# [2209.05433](https://arxiv.org/abs/2209.05433), outliers
# [2208.07339](https://arxiv.org/abs/2208.07339), 8-bit optimizers
# [2110.02861](https://arxiv.org/abs/2110.02861), ZeRO
# [1910.02054](https://arxiv.org/abs/1910.02054), DeepSeek-V3
# [2412.19437](https://arxiv.org/abs/2412.19437).
#
# **Next:** `11a_first_kernels` looks at the programs that compute all this.
