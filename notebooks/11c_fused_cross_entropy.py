# %% [markdown]
# # 11c · Why does the last layer need more memory than all the others, and how can it need almost none?
#
# **Goal.** Weigh the logits of a language model byte by byte, then take the
# loss apart until only one small buffer of them is left: the gradient derived
# and written in place, the softmax read in tiles, the tokens taken in chunks.
#
# **Prerequisites.** `05_block_and_model`, `06_training`; the online softmax
# of `04_rope_gqa_flash`; `11a` for what a Triton kernel is. **Time.** About
# 60 minutes; it runs in a quarter of one. The kernels run in Triton's
# interpreter, which needs Linux on x86-64 and no GPU.
#
# **You will be able to**
# - predict the peak memory of a loss to the byte, and measure it;
# - derive the gradient of cross-entropy and write it over the logits;
# - choose a chunk of tokens, knowing what it costs in time and in accuracy;
# - say how a vocabulary that is split over many GPUs shares one loss.

# %%
import math
import weakref
from unittest.mock import patch

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import nanomai
from nanomai import ops
from nanomai.exercises import fused_cross_entropy as exercises
from nanomai.show import lesson
from triton_kernels import cross_entropy as kernel
from triton_kernels import linear_cross_entropy as fused_kernel
from triton_kernels.engine import recording
from triton_kernels.lens import Trace

lesson()
generator = torch.Generator().manual_seed(11)

# %% [markdown]
# ## 1 The bill
#
# The last layer turns a vector of $D$ numbers for each token into $V$
# *logits*, one for each entry of the vocabulary. With $N$ tokens in flight
# that makes $N V$ numbers; the loss takes their log-softmax in float32, and
# the backward pass makes their gradient. How many such tensors live at once?
#
# What the operating system reports is full of noise: caches, libraries, freed
# pages. We want the bytes of *live tensors*, exactly. PyTorch lets us stand
# between a program and its operations: a *dispatch mode* sees each one and
# its result, in the backward pass too. A result in new storage adds its
# bytes; when that storage dies, they go. The highest reading is the peak.
# Weights and inputs, which were there before, are not counted, nor what one
# operation allocates and frees inside itself.

# %%
class Meter(TorchDispatchMode):
    """Bytes of the tensors that were made inside: now, and at the peak."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, weakref.WeakSet()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        for old in storages((args, kwargs)):
            self.known.add(old)
        result = op(*args, **(kwargs or {}))
        for new in storages(result):
            if new not in self.known:  # neither a view nor in place
                self.known.add(new)
                self.add(new.nbytes())
                weakref.finalize(new, self.add, -new.nbytes())
        return result

    def add(self, count):
        self.now += count
        self.peak = max(self.peak, self.now)


def storages(tree):
    return [leaf.untyped_storage() for leaf in tree_leaves(tree)
            if isinstance(leaf, torch.Tensor)]

# %% [markdown]
# Now the loss as one writes it first: all logits at once, in float32.
# A tensor on the `meta` device has a shape and a storage with a size, but no
# numbers in it. So the same scale also weighs a step that this machine could
# not hold; a small case shows that both give the same reading.
#
# > **Predict.** The peak is a multiple of $N V$ numbers of four bytes. Which
# > one? Think of what the backward pass of $z \to \log\mathrm{softmax}(z)
# > \to$ loss must have at hand when it makes the gradient of $z$.

# %%
def inputs(N, V, D, device="cpu", dtype=torch.float32):
    """hidden (N, D), weight (V, D), targets (N,)"""
    like = {"device": device, "dtype": dtype, "requires_grad": True}
    targets = torch.zeros(N, device=device, dtype=torch.long)
    return torch.ones(N, D, **like), torch.ones(V, D, **like), targets


def eager(hidden, weight, targets):
    logits = F.linear(hidden, weight).float()  # (N, V)
    return F.cross_entropy(logits, targets, reduction="sum")


def peak(loss, *given):
    """Bytes at the worst moment of forward and backward."""
    with Meter() as meter:
        loss(*given).backward()
    return meter.peak


for dtype in (torch.float32, torch.bfloat16):
    here = peak(eager, *inputs(48, 5000, 16, dtype=dtype))
    meta = peak(eager, *inputs(48, 5000, 16, "meta", dtype))
    print(str(dtype).removeprefix("torch."), "peak:",
          round(here / (48 * 5000), 2), "bytes a logit")
    assert here == meta == 12 * 48 * 5000 + 8

# %% [markdown]
# Three tensors of float32: the log-softmax that was saved, the gradient that
# arrives at it, which is zero except at the targets, and the gradient of the
# logits that is being made. (The eight bytes are the loss and its gradient.)
# A model in bfloat16 pays the same, since its logits are widened first.
#
# Is that much? A block of the network must also keep what its backward pass
# will need. We weigh one block of GPT-2's shape, in bfloat16: what is still
# there when its forward pass is over. At the moment of the head's peak, all
# twelve blocks hold their share. Three vocabularies: GPT-2's, padded to a
# multiple of 128; that of `mai-1-dense`; Llama 3's.
#
# > **Predict.** How many of these blocks does the head outweigh, at GPT-2's
# > own vocabulary? And how many gigabytes are the logits of 8,192 tokens at
# > Llama 3's?

# %%
gpt2 = nanomai.load_config("gpt2-124m").model
T, D = gpt2.context_length, gpt2.d_model
block = nanomai.build_model(gpt2).blocks["0"].bfloat16()
x = torch.randn(1, T, D, generator=generator).bfloat16().requires_grad_()
with Meter() as meter:
    y = block(x, None, None)  # GPT-2 has no RoPE, one row needs no mask
kept = meter.now / T
vocabularies = (50_304, 100_352, 128_256)
for i, V in enumerate(vocabularies):
    head = peak(eager, *inputs(T, V, D, "meta", torch.bfloat16)) / T
    plt.barh(i, head / 1e3, color="C1",
             label=None if i else "head and loss, measured")
    print(f"V = {V:7,}: logits of 8,192 tokens {4 * 8192 * V / 1e9:.2f} GB,",
          f"peak {8192 * head / 1e9:5.2f} GB, {head / kept:.0f} blocks")
    assert round(head) == 12 * V and head > gpt2.n_layers * kept
plt.plot([12 * V / 1e3 for V in vocabularies], range(3), "kx",
         label="12 V bytes")
plt.axvline(gpt2.n_layers * kept / 1e3, color="C0", ls="--",
            label=f"{gpt2.n_layers} blocks together, measured")
plt.yticks(range(3), [f"{V:,}" for V in vocabularies])
plt.xlabel("memory (kB a token)")
plt.ylabel("vocabulary V")
plt.legend(loc="lower right")
plt.show()

# %% [markdown]
# Twice as much as all twelve together, and the other vocabularies are worse.
# Deeper and wider models shift the balance back, until they recompute their
# activations in the backward pass: then a block keeps only its input, and the
# head stands out again.
#
# ## 2 The gradient needs no room of its own
#
# For one token with target $t$ the loss is $\mathrm{lse}(z) - z_t$ with
# $\mathrm{lse}(z) = \ln\sum_j e^{z_j}$. Its derivatives are
#
# $$\frac{\partial\,\mathrm{lse}}{\partial z_j}
#   = \frac{e^{z_j}}{\sum_k e^{z_k}} = e^{z_j - \mathrm{lse}} = p_j,
# \qquad \frac{\partial\,\mathrm{loss}}{\partial z_j} = p_j - [j = t].$$
#
# Two things follow. The gradient at $j$ needs the logit at $j$ and *one*
# number of the row, lse; once it is known, each gradient can be written over
# its logit. And it needs nothing from the backward pass: the loss of the
# batch is a *sum* over tokens, so whatever is made of it later multiplies all
# gradients by the same number. A token whose target is -100 carries no loss,
# and so no gradient.
#
# First lse. Reading the row in *tiles*, keep the largest logit $m$ so far,
# and $s = \sum e^{z_j - m}$ over those seen. If a tile raises the maximum to
# $m'$, the old sum becomes $s\,e^{m - m'}$. In the end
# $\mathrm{lse} = m + \ln s$, and no exponential was ever above one.

# %%
def online_lse(z, tile):
    """z (n, V) -> lse (n,), and lse of what was seen after each tile."""
    m = z.new_full(z.shape[:1], -math.inf)
    s, so_far = torch.zeros_like(m), []
    for part in z.split(tile, dim=-1):  # (n, tile), the last one shorter
        m_new = torch.maximum(m, part.amax(-1))
        s = s * (m - m_new).exp() + (part - m_new[:, None]).exp().sum(-1)
        m = m_new
        so_far.append(m + s.log())
    return so_far[-1], torch.stack(so_far)


z = torch.randn(3, 1000, generator=generator)
for size in (1.0, 1e4):
    for tile in (1, 7, 64, 1000):
        assert_close(online_lse(size * z, tile)[0],
                     (size * z).logsumexp(-1))
naive = (1e4 * z).exp().sum(-1).log()
print("without the maximum:", naive.tolist())
assert naive.isinf().all()

# %% [markdown]
# The picture shows the reading of four rows of random logits with standard
# deviation 2. Random numbers let us predict it: the mean of $e^z$ is
# $e^{\sigma^2/2}$, so $n$ of them give about $\ln n + \sigma^2/2$.

# %%
V, tile, sigma = 50_304, 1024, 2.0
rows = sigma * torch.randn(4, V, generator=generator)
lse, so_far = online_lse(rows, tile)  # (4,), (tiles, 4)
seen = torch.arange(tile, V + tile, tile).clamp(max=V)  # (tiles,)
theory = seen.log() + sigma**2 / 2
for i, values in enumerate(so_far.T):
    plt.plot(seen, values, "o", ms=3, alpha=0.6,
             label=None if i else "four rows, after each tile")
plt.plot(seen, theory, "k--", label=r"$\ln n + \sigma^2/2$")
plt.xlabel("logits seen, n")
plt.ylabel("lse so far (nats)")
plt.legend(loc="lower right")
plt.show()
assert_close(lse, rows.logsumexp(-1))
assert (so_far - theory[:, None]).abs().max() < 0.5

# %% [markdown]
# Once lse is known, one buffer will do. The order matters: the
# target's logit must be read before anything is written.

# %%
def to_gradient(z, targets, tile=1024):
    """Makes of logits z (n, V) their gradient, in place; returns the loss."""
    rows = (targets != ops.IGNORE).nonzero()[:, 0]
    t = targets[rows]
    z_t, lse = z[rows, t], online_lse(z, tile)[0]
    z.sub_(lse[:, None]).exp_()  # softmax, where the logits were
    z[rows, t] -= 1
    z[targets == ops.IGNORE] = 0
    return (lse[rows] - z_t).sum()


wide = {"generator": generator, "dtype": torch.float64}
logits = (3 * torch.randn(5, 37, **wide)).requires_grad_()
targets = torch.tensor([4, 36, ops.IGNORE, 0, 4])
loss = F.cross_entropy(logits, targets, reduction="sum")  # skips -100 too
(true,) = torch.autograd.grad(loss, logits)
z = logits.detach().clone()
assert_close(to_gradient(z, targets, tile=8), loss.detach())
assert_close(z, true)
print("loss and gradient equal; ignored row is zero:", not z[2].any())

# %% [markdown]
# ## 3 Break it: round at the wrong moment
#
# In training, the buffer holds bfloat16, 8 bits of precision. Our function
# runs on it without complaint. Take a token that the model knows well, with
# $p_t = 0.9985$, among 512 classes.
#
# > **Predict.** The gradients of a row sum to zero. What will the sum be, and
# > which of the 512 numbers is to blame?

# %%
def sure():
    z = torch.zeros(1, 512, dtype=torch.bfloat16)
    z[0, 3] = 12.75
    return z, torch.tensor([3])


def check_row_sum(z):
    total, size = z.double().sum().item(), z.double().abs().sum().item()
    assert abs(total) < 0.01 * size, "the pushes up and down do not balance"


z, t = sure()
to_gradient(z, t)
print(f"target {z[0, 3]:.4f}, all others together {z.float().sum():.4f}")
try:
    check_row_sum(z)
except AssertionError as error:
    print(f"{type(error).__name__}: {error}")

z, t = sure()
kernel.forward(z, t, None, z)  # the package's kernel, in place
check_row_sum(z)
print(f"kernel: target {z[0, 3]:.4f}")

# %% [markdown]
# bfloat16 has no number between 0.9961 and 1, and those around 12.75 stand
# 0.06 apart. So lse became the logit itself, $p_t$ became 1, and $p_t - 1$
# became 0: the wrong tokens are pushed down, the right one is never pushed
# up. The kernel computes in float32 and rounds once, at the end: 0.0015 fits
# into bfloat16, 0.9985 does not.
#
# ## 4 Chunks of tokens
#
# One buffer of $N V$ numbers is still one too many. But tokens do not meet in
# the loss: $n$ of them can pass through logits, loss and both products
# before the next $n$ begin, in the same buffer. With $G$, the gradient of a
# chunk's logits, $\partial h = G W$ belongs to the chunk alone, and
# $\partial W = G^\top h$ adds up over the chunks.

# %%
def fused(hidden, weight, targets, chunk):
    """The summed loss, d_hidden and d_weight, chunk tokens at a time."""
    loss = hidden.new_zeros(())
    d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight)
    for start in range(0, len(hidden), chunk):
        rows = slice(start, start + chunk)
        z = hidden[rows] @ weight.T  # (n, V)
        loss += to_gradient(z, targets[rows])  # now z is the gradient
        d_hidden[rows] = z @ weight  # (n, D)
        d_weight += z.T @ hidden[rows]  # (V, D)
    return loss, d_hidden, d_weight

# %% [markdown]
# The definition, ours, and the package's, which a small budget forces into
# the same chunks: in float64 all three must agree to ten digits, values and
# gradients.

# %%
hidden = torch.randn(37, 16, **wide).requires_grad_()
weight = torch.randn(101, 16, **wide).requires_grad_()
targets = torch.randint(101, (37,), generator=generator)
targets[[1, 2, 3, 4, 5, 6, 20, 21, 22, 23, 24, 36]] = ops.IGNORE


def with_gradients(loss, scale=1.0):
    return loss, *torch.autograd.grad(scale * loss, (hidden, weight))


true = with_gradients(
    ops.linear_cross_entropy_plain(hidden, weight, targets))
for chunk in (1, 5, 8, 37, 100):
    ours = fused(hidden.detach(), weight.detach(), targets, chunk)
    assert_close(ours, true, rtol=1e-10, atol=1e-10)
    with patch.object(ops, "LOGITS_BYTES", chunk * 4 * 101):
        theirs = with_gradients(
            ops.linear_cross_entropy(hidden, weight, targets))
    assert_close(theirs, true, rtol=1e-10, atol=1e-10)
print("ours and the package's equal the definition in float64, at any chunk")

# %% [markdown]
# Why a sum, if training reports the mean? A chunk cannot know how many
# targets of the other chunks, or of the other GPUs, count. Here is the
# tempting alternative: each chunk takes its mean, and the chunks are
# averaged.
#
# > **Predict.** For which of the five chunk sizes is that the true mean?

# %%
def mean_of_means(chunk):
    means = []
    for h, t in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        valid = (t != ops.IGNORE).sum()
        means.append(ops.linear_cross_entropy_plain(h, weight, t) / valid)
    return torch.stack(means).mean()


mean = true[0] / (targets != ops.IGNORE).sum()
for chunk in (1, 5, 8, 37, 100):
    try:
        assert_close(mean_of_means(chunk), mean)
        print(f"chunks of {chunk:3}: right")
    except AssertionError as error:
        print(f"chunks of {chunk:3}: {type(error).__name__},",
              f"{mean_of_means(chunk).item():.3f} for {mean.item():.3f}")

# %% [markdown]
# Only for a single chunk. With several, a token in an emptier chunk counts
# for more, and a chunk without targets divides zero by zero. So: sums, and
# one division at the very end.
#
# ## 5 What it weighs now
#
# Counting again, with $e$ bytes for each number of the buffer: $e\,nV$ for
# the chunk, $4VD$ for $\partial W$, which stays in float32, and $e\,ND$ for
# $\partial h$. Nothing grows with $N V$. `LOGITS_BYTES` is the launcher's
# budget for $e\,nV$; we weigh it on `meta`, where `recording` takes the
# launches and runs none. All in float32, $e = 4$, with 16,384
# tokens of GPT-2's width.

# %%
N, V, D = 16_384, 50_304, 768
given = [t.detach() for t in inputs(N, V, D, "meta")]


def launcher_peak(budget):
    with (patch.object(fused_kernel, "LOGITS_BYTES", budget),
          recording(lambda *launch: None), Meter() as meter):
        fused_kernel.forward(*given, None, True)
    return meter.peak


chunks = [128 * 2**i for i in range(8)]
measured = [launcher_peak(4 * n * V) for n in chunks]
formula = [4 * n * V + 4 * V * D + 4 * N * D for n in chunks]
assert_close(measured, formula, rtol=1e-3, atol=0)
whole = peak(eager, *inputs(N, V, D, "meta"))
ours = peak(ops.linear_cross_entropy, *inputs(N, V, D, "meta"))
kernels = launcher_peak(fused_kernel.LOGITS_BYTES)
for name, weighed in (("all logits at once", whole),
                      ("ops.linear_cross_entropy", ours),
                      ("triton_kernels.linear_cross_entropy", kernels)):
    print(f"{name:36} {weighed / 1e9:5.2f} GB")
assert ours < whole / 7 and kernels < whole / 10

# %% [markdown]
# The package has the same idea twice: `ops` out of PyTorch's operations,
# which need two or three tensors for each chunk, and with the kernel, which
# needs one. Both could be smaller still. What does a small chunk cost?
#
# Every chunk adds its part to $\partial W$: it reads and writes $4VD$ bytes
# each, $8VD$ in all. The product that makes the part takes $2nVD$ operations.
# One H100 was measured at 3.0 TB/s for a copy and 798 TFLOP/s for a large
# product in bfloat16. If nothing overlaps, adding takes
#
# $$\frac{8VD / 3.0\cdot10^{12}}{2nVD / 798\cdot10^{12}}
#   = \frac{1064}{n}$$
#
# of the time of that product; $V$ and $D$ cancel.
#
# > **Predict.** The package's budget is half a gigabyte of logits. Is its
# > chunk, in bfloat16, at the left or at the right of 1,064 tokens?

# %%
chosen = fused_kernel.chunk_rows(N, 2 * V)
share = [8 * V * D / 3.0e12 / (2 * n * V * D / 798e12) for n in chunks]
left, right = plt.subplots(1, 2, figsize=(9.0, 3.8),
                           layout="constrained")[1]
left.loglog(chunks, [b / 1e9 for b in measured], "o", label="measured")
left.loglog(chunks, [b / 1e9 for b in formula], "k--",
            label="4nV + 4VD + 4ND")
left.axhline(whole / 1e9, color="C1", label="all logits at once")
left.set(xlabel="tokens in a chunk, n (log)", ylabel="peak memory (GB, log)")
left.legend(loc="center left", bbox_to_anchor=(0, 0.72))
right.loglog(chunks, share, "C2", label="1064 / n")
right.axvline(chosen, color="k", ls=":", label=f"package: {chosen:,} tokens")
right.set(xlabel="tokens in a chunk, n (log)",
          ylabel="adding / product of dW (time, log)")
right.legend(loc="lower left")
plt.show()
assert chosen == 4096 and 0.25 < share[chunks.index(chosen)] < 0.27
assert_close(share, [1064 / n for n in chunks])

# %% [markdown]
# At the right: a quarter of one of three products. A chunk of 128 tokens
# would add eight times that product to save 0.4 GB. So: chunks as large as
# the budget allows, and all of one size.
#
# ## 6 The sum must be wider than its parts
#
# $\partial W$ is a sum of $k$ chunks. bfloat16 rounds a number by a relative
# $\delta$ of about $1.7 \cdot 10^{-3}$ (root mean square). A running sum of
# independent parts grows like $\sqrt j$, and its $j$-th rounding is
# $\delta \sqrt j$. All of them together are $\delta\sqrt{k(k+1)/2}$, of a
# result of size $\sqrt k$. So the relative error grows as
#
# $$\delta \sqrt{(k+1)/2}.$$
#
# If the parts are rounded, but summed in float32, their errors
# average out and $\delta$ remains. We round nothing else: parts come from
# float64, 16 tokens each.

# %%
K, n, V, D = 256, 16, 211, 32
h = torch.randn(K * n, D, **wide)
w = 0.02 * torch.randn(V, D, **wide)  # as in a fresh model
t = torch.randint(V, (K * n,), generator=generator)
bf16, f32 = torch.bfloat16, torch.float32
kinds = {"bfloat16": (bf16, bf16), "parts bfloat16, sum float32": (bf16, f32),
         "float32": (f32, f32)}
exact = torch.zeros(V, D, dtype=torch.float64)
sums = {name: torch.zeros(V, D, dtype=s) for name, (_, s) in kinds.items()}
errors = {name: [] for name in kinds}
for start in range(0, K * n, n):
    rows = slice(start, start + n)
    part = fused(h[rows], w, t[rows], n)[2]
    exact += part
    for name, (part_type, _) in kinds.items():
        sums[name] += part.to(part_type)
        off = (sums[name].double() - exact).norm() / exact.norm()
        errors[name].append(off.item())

# %% [markdown]
# > **Predict.** After 256 chunks, how large is the error of the bfloat16 sum,
# > in percent of the gradient?

# %%
k = torch.arange(1.0, K + 1)
number = torch.randn(10**5, **wide)
delta = ((number.bfloat16() - number).norm() / number.norm()).item()
assert 1.6e-3 < delta < 1.75e-3
# each part is rounded too, and the first sum is not: 1 - 1 / k
growing = delta * (1 + (k + 1) / 2 - 1 / k).sqrt()
theory = {"bfloat16": growing, "float32": growing / 2**16,
          "parts bfloat16, sum float32": torch.full((K,), delta)}
for i, (name, values) in enumerate(errors.items()):
    plt.loglog(k, values, f"C{i}", lw=3, alpha=0.5, label=name)
    plt.loglog(k, theory[name], "k--", lw=1,
               label="theory" if name == "float32" else None)
    assert_close(torch.tensor(values[8:]), theory[name][8:], rtol=0.1,
                 atol=0.0)
    print(f"{name:28} {values[-1]:8.1e} after {K} chunks")
plt.xlabel("chunks added (log)")
plt.ylabel("relative error of dW (log)")
plt.legend(loc="center right", bbox_to_anchor=(1, 0.4))
plt.show()

# %% [markdown]
# About two percent, and it grows with every chunk. The package keeps its sum
# in float32 whatever the dtype of weights and activations is. With all
# inputs in bfloat16 and 256 chunks, it must therefore stay far below that
# curve. What is left comes from logits, gradients and parts, each rounded
# once.

# %%
given = [x.bfloat16().requires_grad_() for x in (h, w)]
wide_given = [x.detach().double().requires_grad_() for x in given]
(true_dw,) = torch.autograd.grad(
    ops.linear_cross_entropy_plain(*wide_given, t), wide_given[1])
with patch.object(ops, "LOGITS_BYTES", n * 4 * V):
    loss = ops.linear_cross_entropy(*given, t)
(dw,) = torch.autograd.grad(loss, given[1])
off = ((dw.double() - true_dw).norm() / true_dw.norm()).item()
print(f"the package, {K} chunks in bfloat16: {off:.1e}")
assert off < errors["bfloat16"][-1] / 3

# %% [markdown]
# ## 7 The kernel, under the lens
#
# One program of `cross_entropy_forward` owns one row of logits. It loads the
# target's logit, reads the row once in blocks for the lse, reads it again,
# and writes the gradient in its place. The lens counts how often each element
# is read. Ten tokens of sixteen classes, tokens 2 and 7 ignored.
#
# > **Predict.** Which numbers will stand in the picture?

# %%
logits = torch.randn(10, 16, generator=generator)
targets = torch.arange(10) * 5 % 16
targets[[2, 7]] = ops.IGNORE
expected = logits.clone()
expected_loss = to_gradient(expected, targets)
with Trace(shuffle=0, logits=logits) as trace:
    losses, lse = kernel.forward(logits, targets, None, logits)
trace.draw("logits", "reads")
plt.show()
reads = torch.full((10, 16), 2)
rows = (targets != ops.IGNORE).nonzero()[:, 0]
reads[rows, targets[rows]] = 3
reads[targets == ops.IGNORE] = 0
assert_close(torch.from_numpy(trace.reads("logits").copy()).long(), reads)
assert_close(losses.sum(), expected_loss)
assert_close(logits, expected)

# %% [markdown]
# Two readings; a third for the target; none of an ignored row, which only
# gets its zeros. The file's docstring promises $3\,e\,NV$ bytes (read, read,
# write) and 16 a token (target 8, loss 4, lse 4), less the rows that are not
# read. Last, the whole fused loss with the kernel, in float32, at the
# real vocabulary, where a row takes seven blocks, and cut into three chunks.
# It must move these bytes, equal the plain definition in float64, and its
# gradient must scale with whatever is made of the loss.

# %%
N, V, D = 10, 50_304, 16
hidden = torch.randn(N, D, generator=generator).requires_grad_()
weight = torch.randn(V, D, generator=generator).requires_grad_()
targets = torch.randint(V, (N,), generator=generator)
targets[::4] = ops.IGNORE
with (patch.object(fused_kernel, "LOGITS_BYTES", 4 * 4 * V),
      Trace(shuffle=1) as trace):
    got = with_gradients(
        fused_kernel.linear_cross_entropy(hidden, weight, targets), 0.5)
counted = (targets != ops.IGNORE).sum().item()
docstring = 4 * V * (2 * counted + N) + 16 * N
moved = sum(trace.loads.values()) + sum(trace.stores.values())
print(f"{trace.launches} launches; {moved:,} bytes,",
      f"{moved - docstring} more than {docstring:,}")
assert trace.launches == 3 and moved == docstring + 4 * counted
hidden, weight = (x.detach().double().requires_grad_()
                  for x in (hidden, weight))
exact = with_gradients(
    ops.linear_cross_entropy_plain(hidden, weight, targets), 0.5)
for ours, true in zip(got, exact, strict=True):
    assert (ours - true).norm() < 1e-5 * true.norm()
print("loss, d_hidden and d_weight equal the definition in float64")

# %% [markdown]
# The odd 28 bytes are the seven target logits, read once more: right to the
# byte.
#
# **What others do.** Chunks of the loss on a GPU are Liger-Kernel's idea. Its
# own table (A100, 2024; 32,768 tokens, V = 128,256) has 5.8 GB instead of
# 27.6, in 511 ms instead of 452: memory, not speed. A PyTorch issue (124480,
# GPU and shape not known to us) has 36.0 ms and 25.7 GB for eager; compiled,
# 38.5 ms and 5.2 GB in 4 chunks, 56.7 ms and 1.36 GB in 64. PyTorch 2.13 has
# a chunked `F.linear_cross_entropy` of its own. These numbers are *quoted*;
# none was measured here.
#
# ## 8 At 500B
#
# `mai-1-dense` is our own proposal for a dense model of the size that the
# press reported for MAI-1. Its last layer has $V = 100{,}352$ and
# $D = 18{,}432$. One row of its context is 8,192 tokens.
#
# > **Predict.** Order by size, for such a row: the peak of all logits at
# > once, the fused loss's buffer, the gradient of the head's weight.

# %%
config = nanomai.load_config("mai-1-dense")
V, D = config.model.vocab_size, config.model.d_model
N = config.sequence_length
batch = config.train.batch_tokens[max(config.train.batch_tokens)]
n = fused_kernel.chunk_rows(N, 2 * V)
at_once = peak(eager, *inputs(N, V, D, "meta", torch.bfloat16))
sizes = {"all logits at once": at_once, f"buffer of {n:,} tokens": 2 * n * V,
         "dW in float32": 4 * V * D, "dh in bfloat16": 2 * N * D}
for name, size in sizes.items():
    print(f"{name:22} {size / 1e9:5.2f} GB")
print(f"float32 logits of a batch of {batch:,} tokens:",
      f"{4 * batch * V / 1e12:.1f} TB")
saved = at_once / (2 * n * V + 2 * N * D)
print(f"besides dW, the fused loss needs {saved:.0f} times less")
assert round(at_once / (12 * N * V), 2) == 1 and saved > 10
ranks = 8
exchange, gather = 3 * 4 * N, 4 * N * (V - V // ranks)
print(f"on each of {ranks} GPUs: dW {4 * V // ranks * D / 1e9:.2f} GB;",
      f"to send {exchange / 1e3:.0f} kB,")
print(f"or to receive all the others' logits, {gather / 1e9:.1f} GB")
assert V % ranks == 0 and gather > 10_000 * exchange

# %% [markdown]
# Far ahead of the buffer comes $\partial W$: in a model this wide the
# weight's gradient is the next problem, and while the backward pass scales it
# there are two. It shrinks if the vocabulary is split over eight GPUs, 12,544
# rows each (*vocabulary parallel*). Then no GPU sees a whole row of logits,
# but section 2 needs only $m$, $s$ and $z_t$ of each shard: three numbers a
# token to exchange, kilobytes instead of gigabytes of logits.
#
# ## Exercises
#
# **1. One loss from many shards.** The vocabulary lies on $R$ GPUs. For each
# of $N$ tokens shard $r$ sends its largest logit, its
# $\sum_j e^{z_j - \text{largest}}$, and the target's logit, which is 0 where
# the target lies on another shard. All three arguments are (R, N). Return
# the loss of each token, (N,). An empty shard has the largest logit $-\infty$
# and the sum 0.

# %%
def merge_shards(maxima, sums, target_logits):
    raise NotImplementedError


exercises.check_merge_shards(merge_shards)

# %% [markdown]
# <details><summary>Hint</summary>
#
# It is the online step, for $R$ parts at once: take the largest of the
# maxima, and shrink each sum by how far its own maximum lies below.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# def merge_shards(maxima, sums, target_logits):
#     largest = maxima.amax(0)  # (N,)
#     total = (sums * (maxima - largest).exp()).sum(0)
#     return largest + total.log() - target_logits.sum(0)
# ```
# On real GPUs the maximum and the two sums over shards are all-reduces.
# </details>
#
# **2. In place, and in bfloat16.** Put the gradient of the summed loss where
# the logits (n, V) are, in their own dtype, and return the loss. Section 3
# shows what must not happen. Ignored targets are -100; logits may be as large
# as 10,000. You may use float32 copies (the kernel has its registers).

# %%
def gradient_in_place(logits, targets):
    raise NotImplementedError


exercises.check_gradient_in_place(gradient_in_place)

# %% [markdown]
# <details><summary>Hint</summary>
#
# One row at a time keeps the float32 copy small. Subtract the one while the
# probabilities are still float32, then `copy_` them over the row.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# def gradient_in_place(logits, targets):
#     loss = 0.0
#     for row, target in zip(logits, targets.tolist()):
#         if target == -100:
#             row.zero_()
#             continue
#         z = row.float()
#         lse = z.logsumexp(-1)
#         loss += (lse - z[target]).item()
#         d = (z - lse).exp()
#         d[target] -= 1
#         row.copy_(d)  # rounded here, once
#     return loss
# ```
# </details>
#
# **3. The largest chunk.** Return the most tokens of a chunk so that
# $e\,nV + 4VD + e\,ND$ bytes stay within `budget`: never more than the `N`
# tokens there are, and 0 if not even one fits.

# %%
def largest_chunk(budget, N, V, D, e):
    raise NotImplementedError


exercises.check_largest_chunk(largest_chunk)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Two of the three terms do not depend on the chunk: take them off first. What
# is left may be negative.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# def largest_chunk(budget, N, V, D, e):
#     left = budget - 4 * V * D - e * N * D
#     return max(0, min(N, left // (e * V)))
# ```
# </details>
#
# ## Recap
#
# - All logits at once cost 12 bytes each at the peak; with a large vocabulary
#   that is twice what all twelve blocks of GPT-2 keep.
# - Softmax minus one-hot needs a logit and one number of its row: so it is
#   written in place, row by row, chunk by chunk, as soon as lse is known.
# - A sum of chunks wants float32, one division at the very end, and chunks as
#   large as the memory allows.
#
# **What real systems do differently.** They split the vocabulary over GPUs
# and merge as in exercise 1, add a small penalty on lse² (z-loss) in the same
# pass, and tune the chunk to the machine.
#
# **Read on.**
# [`triton_kernels/cross_entropy.py`](../triton_kernels/cross_entropy.py),
# [`triton_kernels/linear_cross_entropy.py`](../triton_kernels/linear_cross_entropy.py)
# and [`nanomai/ops.py`](../nanomai/ops.py). Online softmax
# [1805.02867](https://arxiv.org/abs/1805.02867), Liger-Kernel
# [2410.10989](https://arxiv.org/abs/2410.10989), the vocabulary split in
# Megatron-LM [1909.08053](https://arxiv.org/abs/1909.08053), Llama 3's
# vocabulary [2407.21783](https://arxiv.org/abs/2407.21783).
#
# **Next:** `12_memory_and_checkpointing` weighs everything else.
