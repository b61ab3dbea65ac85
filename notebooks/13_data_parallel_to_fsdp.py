# %% [markdown]
# # 13 · How can many processes train one model, each holding only a share of it?
#
# **Goal.** Add up gradients around a ring, train copies of a model in step,
# then take the copies apart: optimizer, gradients, weights (ZeRO 1, 2, 3).
# Prove that all of them, two real processes of the package included, train
# the very same model.
#
# **Prerequisites.** `06_training`; generators (`yield`) for one exercise.
# **Time.** About 60 minutes; it runs in under a minute.
#
# **You will be able to**
# - say what an all-reduce sends, step by step, and why the ring is cheap;
# - split a batch of any kind so that the gradient stays the same;
# - write a sharded AdamW, and a backward pass that gathers one block at a
#   time;
# - read off what a rank holds and sends at each stage.

# %%
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch.func import functional_call
from torch.testing import assert_close

import nanomai
from nanomai import optim
from nanomai.config import ModelConfig, OptimConfig
from nanomai.exercises import data_parallel as exercises
from nanomai.ops import IGNORE
from nanomai.parallel.apply import clip_gradients
from nanomai.parallel.launch import launch
from nanomai.planner import counts
from nanomai.show import lesson

lesson()
generator = torch.Generator().manual_seed(13)

# %% [markdown]
# ## 1 All-reduce: a sum that everyone gets
#
# $W$ processes, called *ranks*, each hold a vector of $n$ numbers; all want
# the sum. One could send everything to rank 0, which adds and sends the
# result back. Then rank 0 receives $(W-1)\,n$ numbers, while the others wait.
#
# In a *ring* each rank talks to its right neighbour only. Cut every vector
# into $W$ chunks. At each step every rank sends one chunk, and all links
# work at once. In the first $W-1$ steps the receiver *adds* what
# arrives to its own copy, so a chunk grows into the sum of all ranks as it
# travels: a *reduce-scatter*, since rank $r$ ends up with the finished chunk
# $r$. In the next $W-1$ steps finished chunks travel on and *replace* what
# was there: an *all-gather*. Rank $r$ always sends chunk $r - 1 - \mathrm{step}$,
# modulo $W$.

# %%
def ring(held, steps):
    """held[r][c] is rank r's copy of chunk c; works in place."""
    W, log = len(held), []
    for step in steps:
        chunk = [(r - 1 - step) % W for r in range(W)]
        leaving = [held[r][chunk[r]] for r in range(W)]  # all at once
        for r in range(W):
            right, c, arriving = (r + 1) % W, chunk[r], leaving[r]
            adds = step < W - 1
            held[right][c] = held[right][c] + arriving if adds else arriving
            log.append((step, r, c, len(arriving)))
    return log


def reduce_scatter(vectors):
    """W vectors (n,) -> rank r's chunk of their sum, (n / W,)"""
    W = len(vectors)
    held = [list(v.tensor_split(W)) for v in vectors]
    log = ring(held, range(W - 1))
    return [held[r][r] for r in range(W)], log


def all_gather(chunks):
    """A chunk from each rank -> the whole vector (n,) on each rank"""
    W = len(chunks)
    held = [[c if r == i else None for i, c in enumerate(chunks)]
            for r in range(W)]
    log = ring(held, range(W - 1, 2 * W - 2))
    return [torch.cat(h) for h in held], log

# %% [markdown]
# > **Predict.** For $W = 4$ each rank sends 3 + 3 chunks of $n/4$ numbers.
# > How many does it send with 1,024 ranks, against the $1023\,n$ that
# > rank 0 would have to take in?

# %%
W, n = 4, 12
vectors = [torch.randn(n, generator=generator) for _ in range(W)]
chunks, first = reduce_scatter(vectors)
wholes, second = all_gather(chunks)
for whole in wholes:
    assert_close(whole, sum(vectors))
log = first + second
for r in range(W):
    sent = sum(size for _, rank, _, size in log if rank == r)
    assert sent == 2 * (W - 1) / W * n
print(f"{W} ranks, all have the sum; each sent {sent / n} n")
print(f"1,024 ranks: {2 * 1023 / 1024:.3f} n")

# %%
plt.figure(figsize=(7.0, 3.0))
for step, r, c, _ in log:
    done = min(step + 1, W)  # so many ranks' numbers are in the chunk
    plt.barh(r, 0.92, left=step + 0.04, height=0.8,
             color=plt.cm.Blues(0.15 + 0.18 * done))
    plt.text(step + 0.5, r, f"chunk {c}\n{done} of {W}", ha="center",
             va="center", color="white" if done > 2 else "black")
plt.axvline(W - 1, color="k", ls="--")
plt.text(1.5, -0.75, "reduce-scatter", ha="center")
plt.text(4.5, -0.75, "all-gather", ha="center")
plt.xlabel("step of the ring")
plt.xticks([s + 0.5 for s in range(2 * W - 2)], range(2 * W - 2))
plt.ylabel("rank that sends")
plt.yticks(range(W))
plt.ylim(W - 0.4, -1.1)  # rank 0 on top
plt.grid(False)
plt.show()
assert [c for step, r, c, _ in log if step == W - 1] == list(range(W))

# %% [markdown]
# Nearly $2n$, however many ranks there are: the work is shared out evenly, and
# every link is busy at every step. (There are more steps, though, and each of
# the $2(W-1)$ also costs a delay.) Follow chunk 0 in the plot: it leaves rank
# 1, arrives complete at rank 0, and goes round once more.
#
# ## 2 Data parallel: copies in step
#
# Every rank has the whole model and reads its own rows of the batch. If the
# gradients are added up before the optimizer steps, all ranks make the same
# step, and the copies stay copies.
#
# Our batches are 8 rows of 32 bytes, *unevenly* labelled: three rows have
# 4 labels each, the others all 32, as when only an answer is learned
# and not its question. Ranks get equal numbers of rows.

# %%
config = ModelConfig(n_layers=3, d_model=48, n_heads=4, n_kv_heads=2,
                     head_dim=12, d_ff=128, vocab_size=256,
                     context_length=32, position="learned",
                     tied_embeddings=False)
settings = OptimConfig(lr=0.01, grad_clip=0.5, eps=1e-5)
text = torch.tensor(list(Path("lesson.txt").read_bytes()))


def batch(step):
    """Bytes and targets, (8, 32) each"""
    g = torch.Generator().manual_seed(step)
    begin = torch.randint(len(text) - 33, (8,), generator=g)
    rows = torch.stack([text[i : i + 33] for i in begin])
    targets = rows[:, 1:].clone()
    targets[:3, 4:] = IGNORE
    return rows[:, :-1], targets


def parts(step, W):
    """What each rank reads: W pairs of (8 / W, 32)"""
    return list(zip(*(x.chunk(W) for x in batch(step)), strict=True))


valid = [(t != IGNORE).sum().item() for _, t in parts(0, 2)]
count = sum(valid)
print("labels of 2 ranks:", valid, "together", count)

# %% [markdown]
# The judge of everything below is one process with the package's model,
# clipping and AdamW. It takes three steps, each on a whole batch, and keeps
# its weights and its last gradient. (AdamW divides by $\sqrt v + \varepsilon$.
# Sums in another order round differently, and where a gradient is little more
# than rounding, that quotient would make a step of it; so our $\varepsilon$ is
# larger than usual.)

# %%
def one_process(steps=3):
    model = nanomai.build_model(config, seed=13)
    (adamw,) = optim.build_optimizers(model, settings)
    optim.set_learning_rate([adamw], settings.lr)
    norms = []
    for step in range(steps):
        adamw.zero_grad()
        model(*batch(step), reduction="sum").backward()
        norms.append(clip_gradients(model, settings.grad_clip, count).item())
        adamw.step()
    weights = {n: p.detach() for n, p in model.named_parameters()}
    return weights, {n: p.grad for n, p in model.named_parameters()}, norms


def assert_same_training(weights, gradients):
    for found, true in ((weights, true_weights), (gradients, true_gradients)):
        assert found.keys() == true.keys()
        for name in true:
            assert_close(found[name], true[name], rtol=1e-3, atol=1e-5)


true_weights, true_gradients, true_norms = one_process()
print(config.n_parameters, "parameters; every gradient is clipped:",
      min(true_norms) > settings.grad_clip)

# %% [markdown]
# For our ranks a model is one long vector, of which the parameters are slices.
# AdamW is that of `06_training`; it treats every number by itself, so it works
# on any piece of the vector. (Muon does not: it needs a matrix whole. So ranks of
# the package change parts of all matrices for some whole ones and back, by two
# all-to-alls of `nanomai/optim.py`.)

# %%
model = nanomai.build_model(config, seed=13)
shapes = {n: p.shape for n, p in model.named_parameters()}
start = torch.cat([p.detach().flatten() for p in model.parameters()])
decay = torch.cat([torch.full((p.numel(),), settings.weight_decay
                              * optim.is_decayed(n, p))
                   for n, p in model.named_parameters()])


def tensors(vector):
    pieces = vector.split([s.numel() for s in shapes.values()])
    return {n: v.view(shapes[n]) for n, v in zip(shapes, pieces, strict=True)}


def loss(vector, part, reduction="sum"):
    return functional_call(model, tensors(vector), part,
                           {"reduction": reduction})


def gradient(vector, part, reduction="sum"):
    leaf = vector.clone().requires_grad_()
    return torch.autograd.grad(loss(leaf, part, reduction), leaf)[0]

# %%
def adamw(p, g, state, decay):
    """The new p; `state` keeps m, v and the count of steps."""
    b1, b2 = settings.beta1, settings.beta2
    state["m"] = b1 * state.get("m", 0) + (1 - b1) * g
    state["v"] = b2 * state.get("v", 0) + (1 - b2) * g**2
    t = state["t"] = state.get("t", 0) + 1
    m, v = state["m"] / (1 - b1**t), state["v"] / (1 - b2**t)
    p = p * (1 - settings.lr * decay)
    return p - settings.lr * m / (v.sqrt() + settings.eps)

# %% [markdown]
# What must the sum be divided by? Many frameworks let each rank take the mean
# over its own tokens and then average over the ranks. `nanomai` adds up sums
# and divides once, by the number of labels of the whole batch.
#
# > **Predict.** Our two ranks have 44 and 128 labels. In a mean of means, how
# > many times as much does a label of the first rank weigh?

# %%
whole = gradient(start, batch(0), "mean")
each = [gradient(start, part) for part in parts(0, 2)]
wrong = sum(gradient(start, part, "mean") for part in parts(0, 2)) / 2
assert_close(sum(each) / count, whole, rtol=1e-4, atol=1e-6)
off = ((wrong - whole).norm() / whole.norm()).item()
print(f"sums, divided once: right; mean of means: off by {off:.0%}")
print(f"a label of rank 0 weighs {valid[1] / valid[0]:.1f} times as much")
assert off > 0.1

# %% [markdown]
# 2.9 times, and the gradient is another one. Widely used trainers have had
# this bug, between ranks and between micro-batches.
#
# Now three data-parallel steps. The clipping must see the norm of the
# *summed* gradient, which every rank can compute for itself.

# %%
def all_reduce(vectors):
    return all_gather(reduce_scatter(vectors)[0])[0]


def clip_scale(norm):
    return min(1.0, settings.grad_clip / (norm + 1e-6))


def data_parallel(W, reduce=all_reduce, steps=3):
    """The weights of each rank, and the gradient it last used."""
    weights = [start.clone() for _ in range(W)]
    states = [{} for _ in range(W)]
    for step in range(steps):
        g = [gradient(w, part) for w, part in
             zip(weights, parts(step, W), strict=True)]
        g = [x / count for x in reduce(g)]
        g = [x * clip_scale(x.norm()) for x in g]
        weights = [adamw(*x, decay) for x in zip(weights, g, states,
                                                 strict=True)]
    return weights, g


for W in (2, 4):
    weights, g = data_parallel(W)
    for r in range(W):
        assert_same_training(tensors(weights[r]), tensors(g[r]))
    print(W, "ranks, 3 steps: weights and gradients of all as one process")

# %% [markdown]
# Break it: forget the all-reduce. Nothing crashes.
#
# > **Predict.** Does each rank's loss fall nevertheless? After three steps,
# > how far apart are the copies, compared with the way that one has gone?

# %%
weights, g = data_parallel(2, reduce=lambda vectors: vectors)
with torch.no_grad():
    falls = [loss(w, part).item() < 0.95 * loss(start, part).item()
             for w, part in zip(weights, parts(2, 2), strict=True)]
print("the loss of each rank falls:", falls)
assert all(falls)
way = (weights[0] - start).norm().item()
apart = (weights[0] - weights[1]).norm().item()
print(f"apart by {apart / way:.1f} of the way")
assert apart > 0.5 * way
try:
    assert_close(weights[0], weights[1], rtol=1e-3, atol=1e-5)
except AssertionError as error:
    print("the copies differ:", type(error).__name__)

# %% [markdown]
# Both losses fall, and the copies are farther apart than the first has moved.
# Two models are being trained on half the data each, and rank 0 will save one
# of them. Only a comparison of the ranks shows it.
#
# ## 3 ZeRO 1: why should all do the same update?
#
# Data parallel stores $W$ copies of everything, and of float32 training
# everything is 16 bytes for a parameter: weight, gradient, and AdamW's two
# moments, 4 each. All ranks compute the very same update. Instead, let rank
# $r$ update slice $r$ alone: it needs only the moments of its slice (*ZeRO
# stage 1*) and only its slice of the summed gradient. That is what a
# reduce-scatter gives. Then an all-gather hands the new weights round. Both
# together send what one all-reduce did.
#
# > **Predict.** One quantity of the step still needs all of the gradient.
# > Which, and how much must be sent for it?

# %%
def zero_1(W, steps=3, clip_alone=False):
    weights = [start.clone() for _ in range(W)]
    states = [{} for _ in range(W)]
    for step in range(steps):
        g = [gradient(w, part) for w, part in
             zip(weights, parts(step, W), strict=True)]
        slices = [x / count for x in reduce_scatter(g)[0]]  # (N / W,)
        squares = [x.square().sum() for x in slices]
        for r in range(W):
            total = squares[r] if clip_alone else sum(squares)
            slices[r] = slices[r] * clip_scale(total.sqrt())
        mine = [adamw(w.tensor_split(W)[r], slices[r], states[r],
                      decay.tensor_split(W)[r])
                for r, w in enumerate(weights)]
        weights = all_gather(mine)[0]
    return weights, all_gather(slices)[0], states


for W in (2, 4):
    weights, g, states = zero_1(W)
    for r in range(W):
        assert_same_training(tensors(weights[r]), tensors(g[r]))
        assert len(states[r]["m"]) in (len(start) // W, len(start) // W + 1)
    print(W, "ranks: as one process, with 1 /", W, "of the moments each")
try:
    assert_same_training(*map(tensors, [x[0] for x in zero_1(
        2, clip_alone=True)[:2]]))
except AssertionError as error:
    print("clipped slice by slice:", type(error).__name__)

# %% [markdown]
# The norm: each rank squares and adds its slice, and one number per rank is
# summed. Where each clips by its own slice's norm, the gradient turns.
#
# ## 4 ZeRO 2 and 3: one block at a time
#
# The whole gradient need never exist either: as soon as the backward pass is
# through a block, its gradients are reduce-scattered and only a slice is kept
# (*stage 2*). And a block's weights are needed only while the block runs:
# keep slices, gather a block before it runs, and drop it after (*stage 3*,
# or FSDP, *fully sharded data parallel*).
#
# We now cut as PyTorch's FSDP2 does: every parameter by its rows, `chunk(W)`.
# The *units* that are gathered as one are the blocks and the *root*, which is
# all the rest and stays whole during the step, being first and last to run.

# %%
units = {"root": [n for n in shapes if not n.startswith("blocks.")]}
for i in model.blocks:
    units[i] = [n for n in shapes if n.startswith(f"blocks.{i}.")]


def rows(p, W):
    """FSDP2's cut: W chunks of rows, the last ones may be empty"""
    cut = list(p.chunk(W))
    return [c.clone() for c in cut + [p[:0]] * (W - len(cut))]


def enter(w, ids):  # (b, T) -> (b, T, D)
    return w["embed.weight"][ids] + w["positions.weight"][: ids.shape[1]]


def run(i, w, x):  # (b, T, D) -> (b, T, D)
    own = {n.removeprefix(f"blocks.{i}."): t for n, t in w.items()}
    return functional_call(model.blocks[i], own, (x, None, None))


def leave(w, x, targets):  # (b, T, D) -> ()
    x = F.rms_norm(x, x.shape[-1:], w["norm.weight"], config.norm_eps)
    logits = x @ w["head.weight"].T
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(),
                           ignore_index=IGNORE, reduction="sum")

# %% [markdown]
# A backward pass over one unit: given $\partial\ell/\partial y$, run it again
# from its input and ask autograd for the gradients of input and weights. (The
# forward pass keeps the inputs of blocks alone, so no weight is needed in
# between. Notebook 12 is about that trick; FSDP works with and without.)

# %%
def back(function, w, x, d_y):
    """d_x, and the gradients of all of w: zero where it is not used"""
    x = x.detach().requires_grad_()
    leaves = {n: t.detach().requires_grad_() for n, t in w.items()}
    d_x, *d_w = torch.autograd.grad(function(leaves, x), [
        x, *leaves.values()], d_y, materialize_grads=True)
    return d_x, dict(zip(w, d_w, strict=True))

# %%
class Ranks:
    """W ranks' rows of all parameters; what is gathered, and a log."""

    def __init__(self, W, keep):
        whole = tensors(start).items()
        self.rows = {n: rows(p, W) for n, p in whole}  # [name][rank]
        self.whole, self.keep, self.log = {}, keep, []

    def gather(self, unit):
        there = unit in self.whole
        if not there:
            self.whole[unit] = {n: torch.cat(self.rows[n])
                                for n in units[unit]}
        self.note("find" if there else "gather", unit)
        return self.whole[unit]

    def drop(self, unit):
        if not self.keep:
            del self.whole[unit]
        self.note("keep" if self.keep else "drop", unit)

    def note(self, what, unit):
        held = [t.nbytes for w in self.whole.values() for t in w.values()]
        self.log.append((what, unit, sum(held)))

# %% [markdown]
# The whole schedule, all ranks in step. `keep=True` drops nothing between
# forward and backward: stage 2, as the package's `keep_gathered` does it in a
# step of one micro-batch. The second half mirrors the first: what was gathered
# for all ranks gets the sum of their gradients, and each keeps its rows. An
# all-gather's gradient is a reduce-scatter.

# %%
def sharded_gradients(ranks, pieces):
    """[name][rank]: each rank's rows of the summed gradient"""
    W, blocks = len(pieces), list(model.blocks)
    root = ranks.gather("root")
    x = {blocks[0]: [enter(root, ids) for ids, _ in pieces]}
    for i, after in zip(blocks, [*blocks[1:], "top"], strict=True):
        w = ranks.gather(i)
        x[after] = [run(i, w, h).detach() for h in x[i]]
        ranks.drop(i)
    ones = torch.ones(())
    tops = [back(lambda w, h, t=t: leave(w, h, t), root, h, ones)
            for h, (_, t) in zip(x["top"], pieces, strict=True)]
    d, found = [d_x for d_x, _ in tops], {}
    for i in reversed(blocks):
        w = ranks.gather(i)
        pairs = [back(lambda w, h, i=i: run(i, w, h), w, x[i][r], d[r])
                 for r in range(W)]
        ranks.drop(i)
        d = [d_x for d_x, _ in pairs]
        found |= {n: rows(sum(d_w[n] for _, d_w in pairs), W) for n in w}
    ends = [back(lambda w, _, ids=ids: enter(w, ids), root, ones, d[r])[1]
            for r, (ids, _) in enumerate(pieces)]
    both = [d_w for _, d_w in tops] + ends  # the root ran twice
    return found | {n: rows(sum(d_w[n] for d_w in both), W) for n in root}

# %% [markdown]
# And the step: AdamW on rows. Note what is missing: no all-gather of new
# weights at the end. The next forward pass gathers them when it needs them.

# %%
def zero_3(W, keep=False, steps=3):
    ranks = Ranks(W, keep)
    states = {n: [{} for _ in range(W)] for n in shapes}
    for step in range(steps):
        ranks.whole, ranks.log = {}, []
        d = sharded_gradients(ranks, parts(step, W))
        norm = sum(g.square().sum() for n in d for g in d[n]).sqrt() / count
        scale = clip_scale(norm) / count
        d = {n: [g * scale for g in d[n]] for n in d}
        for n, p in model.named_parameters():
            lam = settings.weight_decay * optim.is_decayed(n, p)
            ranks.rows[n] = [
                adamw(w, g, state, lam) for w, g, state in
                zip(ranks.rows[n], d[n], states[n], strict=True)]
    return ranks, d


def joined(pieces):
    return {n: torch.cat(p) for n, p in pieces.items()}


for keep, W in ((True, 2), (False, 2), (False, 4)):
    ranks, d = zero_3(W, keep)
    assert_same_training(joined(ranks.rows), joined(d))
    print("stage", 2 if keep else 3, "on", W, "ranks: as one process;",
          sum(what == "gather" for what, *_ in ranks.log), "gathers a step")
print(*(f"{what} {unit}," for what, unit, _ in ranks.log[:7]), "...")

# %% [markdown]
# > **Predict.** Draw the bytes of gathered weights over a step, for both
# > stages: how high, and how many teeth?

# %%
unit_bytes = {u: 4 * sum(shapes[n].numel() for n in units[u]) for u in units}
for keep, style in ((True, "C0s-"), (False, "C1o-")):
    held = [size for *_, size in zero_3(2, keep, steps=1)[0].log]
    plt.step(range(len(held)), [x / 1024 for x in held], style,
             where="post", label=f"stage {2 if keep else 3}", ms=4)
    assert max(held) == (sum(unit_bytes.values()) if keep else
                         unit_bytes["root"] + unit_bytes["0"])
plt.axhline(unit_bytes["root"] / 1024, color="k", ls=":", label="the root")
plt.axhline(sum(unit_bytes.values()) / 1024, color="k", ls="--",
            label="the whole model")
plt.ylim(0)
plt.xlabel("before and after each block: forward, then backward")
plt.ylabel("gathered weights (KiB)")
plt.legend(loc="lower center", ncol=2)
plt.show()
print("bytes of a block:", unit_bytes["0"], "of the root:",
      unit_bytes["root"])

# %% [markdown]
# Stage 3 is a saw of one block's height with a tooth for each block and
# pass. Stage 2 spares the gathers of the backward pass and ends with the whole
# model. The floor is the root: here a quarter of everything, of 500 billion
# parameters less than a hundredth.
#
# ## 5 What a rank holds
#
# At the end of the backward pass, with 4 bytes for each number and $N$
# parameters, a rank of $W$ holds
#
# | stage | weights | gradients | moments | whole weights for a while |
# |---|---|---|---|---|
# | 0: data parallel | $4N$ | $4N$ | $8N$ | |
# | 1 | $4N$ | $4N$ | $8N/W$ | |
# | 2 | $4N/W$ | $4N/W$ | $8N/W$ | $4N$ |
# | 3 | $4N/W$ | $4N/W$ | $8N/W$ | root and one block |
#
# We count the bytes of the tensors that rank 0 of our own ranks holds. (The
# whole gradients of the block at work, there for a moment, are left out. In
# ZeRO's paper stage 2 keeps no shard beside the whole weights: $4N/W$ less.)
#
# > **Predict.** Does the counted line of stage 3 go on falling up to 128
# > ranks? The model's matrices have 48, 24, 128, 256 and 32 rows, its norms
# > 48 numbers.

# %%
N = len(start)
largest = unit_bytes["root"] + unit_bytes["0"]
theory = {0: lambda W: 16 * N, 1: lambda W: 8 * N + 8 * N / W,
          2: lambda W: 4 * N + 16 * N / W, 3: lambda W: largest + 16 * N / W}


def counted(stage, W):
    """Bytes of rank 0 at the end of its backward pass"""
    one = parts(0, 8)[7]  # a row for each rank
    if stage < 2:
        g, state = gradient(start, one), {}
        cut = [v.tensor_split(W if stage else 1)[0]
               for v in (start, g, decay)]
        adamw(*cut[:2], state, cut[2])
        return sum(t.nbytes for t in (start, g, state["m"], state["v"]))
    ranks = Ranks(W, keep=stage == 2)
    d = sharded_gradients(ranks, [one] * W)
    moments = 2 * sum(ranks.rows[n][0].nbytes for n in d)
    mine = sum(ranks.rows[n][0].nbytes + d[n][0].nbytes for n in d)
    return mine + moments + max(held for *_, held in ranks.log)

# %%
worlds = [1, 2, 4, 8, 16, 32, 64, 128]
for stage, color in zip(theory, ("C0", "C1", "C2", "C3"), strict=True):
    dots = [float(counted(stage, W)) for W in worlds]
    lines = [float(theory[stage](W)) for W in worlds]
    plt.loglog(worlds, [x / N for x in lines], color=color)
    plt.loglog(worlds, [x / N for x in dots], "o", color=color,
               label=f"stage {stage}")
    assert all(x >= line - 16 for x, line in zip(dots, lines, strict=True))
    assert_close(dots[:4], lines[:4], rtol=1e-3, atol=16)
plt.loglog(worlds, [16 / W for W in worlds], "k:", label="16 / W")
plt.xticks(worlds, worlds)
plt.xlabel("ranks W (log)")
plt.ylabel("bytes per parameter on rank 0 (log)")
plt.legend(title="lines: theory\ndots: counted", loc="lower left")
plt.show()
share = (dots[-1] - largest) / (16 * N / 128)
print(f"128 ranks: rank 0 has {share:.1f} times an even share of the state")
assert 1.5 < share < 4

# %% [markdown]
# It flattens out, at the gathered root and block, which no number of ranks
# makes smaller. And the share of rank 0 stops shrinking where ranks outnumber
# rows: 48 rows can be shared by 48 ranks at most, and the later ones hold none.
#
# ## 6 Two real processes
#
# So far our ranks took turns in one process. The package lays the same over
# real ones: `parallelize` calls PyTorch's `fully_shard` on each block and on
# the rest, and hooks gather, drop and scatter. `launch` starts two processes
# that talk over gloo (a library of collectives for CPUs, as NCCL is for GPUs),
# and kills them at a timeout. A new process knows nothing of a notebook's cells, so what it runs
# lives in the package:
# [`train_sharded`](../nanomai/exercises/data_parallel.py), 20 lines. Each
# rank leaves its rows in a file.
#
# Three ways to train, compared in values and gradients after three steps:
# one process of the package, our own sharded AdamW, and two processes of
# FSDP2. Ours must agree with FSDP2 rank by rank, row by row.

# %%
folder = Path(tempfile.mkdtemp())
torch.save([batch(step) for step in range(3)], folder / "batches.pt")
launch(exercises.train_sharded, 2, config, settings, 13, folder,
       timeout_s=110)
real = [torch.load(folder / f"rank-{r}.pt") for r in range(2)]

ranks, d = zero_3(2)
for kind, ours in (("weights", ranks.rows), ("gradients", d)):
    for name in shapes:
        for r in range(2):
            assert_close(real[r][kind][name], ours[name][r],
                         rtol=1e-3, atol=1e-5)
print("our sharded AdamW: FSDP2's rows, on each rank, such as",
      tuple(d["embed.weight"][0].shape), "of", tuple(shapes["embed.weight"]))
weights, gradients = ({n: torch.cat([r[kind][n] for r in real])
                       for n in shapes} for kind in ("weights", "gradients"))
assert_same_training(weights, gradients)
assert real[0]["norms"] == real[1]["norms"]
assert_close(real[0]["norms"], true_norms, rtol=1e-4, atol=0)
print("one process: the same weights, gradients and norms")

# %% [markdown]
# An observer in each process has counted what the last backward pass sent.
#
# > **Predict.** How many all-gathers and how many reduce-scatters are there
# > in a step, with three blocks and a root? Compare with our log of section 4.

# %%
gathers, scatters = (real[0]["collectives"][f"fsdp: {kind}"]
                     for kind in ("all-gather", "reduce-scatter"))
blocks = sum(unit_bytes.values()) - unit_bytes["root"]
print("all-gathers:", gathers["calls"], " reduce-scatters:",
      scatters["calls"])
assert gathers["calls"] == sum(w == "gather" for w, *_ in ranks.log) == 7
assert gathers["bytes"] == 2 * blocks + unit_bytes["root"]
assert scatters["bytes"] == 4 * N
sent = (gathers["bytes"] + scatters["bytes"]) / 2  # (W - 1) / W of them
print(f"a rank sends {sent / 4 / N:.2f} numbers for each parameter;",
      "data parallel: 1.00")

# %% [markdown]
# Stage 3 pays with traffic: an all-reduce is one gather and one scatter, here
# the blocks are gathered twice. For $W$ ranks and a root that is small it
# sends $3\,(W-1)/W$ numbers a parameter instead of $2\,(W-1)/W$. Much
# of it is hidden: while one block computes, the next is being gathered.
#
# A step of several micro-batches does all of this for each. Only with
# `keep_gathered` the package sums once, after the last; until then every rank
# holds all gradients whole, as in stage 1.
#
# ## 7 At 500B
#
# `mai-1-dense` is this project's own proposal of a dense model of the size
# that was reported for MAI-1, about 500 billion parameters; nothing of its
# architecture was. What would one of 1,024 ranks hold of it, without any other
# way of splitting? The planner says it for copies and for FSDP; the stages
# between follow from section 5, with gathered weights in bfloat16.

# %%
big = nanomai.load_config("mai-1-dense")
N_big, W_big = big.model.n_parameters, 1024
one = dict.fromkeys(("pipeline", "replicas", "fsdp", "context", "expert",
                     "tensor"), 1)
planned = {}
for name in ("replicas", "fsdp"):
    memory = counts.memory_of(big, one | {name: W_big}, 1, 1, 0)
    planned[name] = memory["weights"], memory["optimizer"]
assert_close(planned["replicas"], (4.0 * N_big, 8.0 * N_big))
assert_close(planned["fsdp"], (4 * N_big / W_big, 8 * N_big / W_big))
block = counts.block_part(big.model, False).all
root = counts.root_part(big.model, 1, 0, 1).all
assert 120 * block + root == N_big
print(f"{N_big / 1e9:.0f}B parameters, {block / 1e9:.1f}B in a block,",
      f"{root / 1e9:.1f}B in the root")

# %% [markdown]
# > **Predict.** 80 GB a GPU. Which stage is the first that fits? Which part
# > will be the largest then?

# %%
W, total = W_big, [0.0] * 4
bars = {"weights, whole or a shard": [4, 4, 4 / W, 4 / W],
        "gradients": [4, 4, 4 / W, 4 / W],
        "AdamW's moments": [8, 8 / W, 8 / W, 8 / W],
        "gathered, bfloat16": [0, 0, 2, 2 * (root + block) / N_big]}
for i, (name, each) in enumerate(bars.items()):
    sizes = [x * N_big / 1e9 for x in each]
    plt.bar([s + 0.2 * i - 0.3 for s in range(4)], sizes, 0.18, label=name)
    total = [a + b for a, b in zip(total, sizes, strict=True)]
plt.axhline(80, color="k", ls="--", label="80 GB")
plt.yscale("log")
plt.ylim(1, 1e5)
plt.xticks(range(4), [f"stage {s}\n{x:,.0f} GB in all"
                      for s, x in enumerate(total)])
plt.ylabel("GB on each of 1,024 ranks (log)")
plt.legend(ncol=2, loc="upper right")
plt.show()
print("GB by stage:", *(f"{x:,.0f}" for x in total))
assert total[2] > 80 > total[3]

# %% [markdown]
# Only stage 3 fits, and most of what it holds then is not the shard but what
# is gathered. (FSDP gathers one block ahead, to hide it: one more. Activations
# come on top: notebook 12.) Then there is the traffic.

# %%
sent = counts.traffic_of(big, one | {"fsdp": W_big}, 1, 1, 0)["fsdp"]
blocks = N_big - root
by_hand = 4 * N_big + 2 * (2 * blocks + root)  # scatter, then gathers
assert_close(sent, by_hand * (W_big - 1) / W_big)
network = sent / (8 * 50e9)  # eight adapters of 400 Gb/s in a machine
arithmetic = 6 * N_big * 8192 / 989e12  # one sequence on an H100
print(f"each rank sends {sent / 1e12:.1f} TB in every step: {network:.0f} s")
print(f"8,192 tokens on each rank: {arithmetic:.0f} s")

# %% [markdown]
# Both at the full rates of the hardware, which neither reaches. (A ring
# through machines of eight enters each machine once, so it has all of a
# machine's adapters for itself.) The traffic can hide behind the arithmetic,
# but it does not shrink: with four times as many ranks and the same batch,
# each has a quarter of the tokens and sends as much as before. And the
# proposal's first batches have 512 sequences only. So it cuts matrices and
# layers as well (notebook 14), and shares what is left of each over 16 ranks.
#
# ## Exercises
#
# **1. A ring from inside.** Section 1 saw all ranks from above. A real rank
# runs a program that knows only its own number. Write it as a generator:
# `received = yield tensor` sends `tensor` to the right neighbour and gives
# what came from the left. Return the sum of all vectors (n,), after
# $2(W-1)$ steps; $n$ need not divide by $W$.

# %%
def ring_program(rank, ranks, vector):
    raise NotImplementedError


exercises.check_ring_program(ring_program)

# %% [markdown]
# <details><summary>Hint</summary>
#
# You send chunk `rank - 1 - step`. Your left neighbour, by the same rule,
# sends chunk `rank - 2 - step`; all modulo `ranks`. `tensor_split` cuts into
# chunks that may differ by one number.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# def ring_program(rank, ranks, vector):
#     chunks = list(vector.tensor_split(ranks))
#     for step in range(2 * (ranks - 1)):
#         received = yield chunks[(rank - 1 - step) % ranks]
#         there = (rank - 2 - step) % ranks
#         if step < ranks - 1:
#             received = received + chunks[there]
#         chunks[there] = received
#     return torch.cat(chunks)
# ```
# It never names a rank other than itself: so it runs on any number of them.
# </details>
#
# **2. Why gradients are divided, and by what.** Each rank has taken the mean
# over its own `counts[r]` labels and hands in that mean's gradient. Return
# the gradient of the mean over *all* labels. A rank may have none: then the
# gradient that it hands in is `nan`.

# %%
def global_mean(gradients, counts):
    raise NotImplementedError


exercises.check_global_mean(global_mean)

# %% [markdown]
# <details><summary>Hint</summary>
#
# A mean times its count is a sum, and sums can be added. `0 * nan` is `nan`.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# def global_mean(gradients, counts):
#     pairs = zip(gradients, counts)
#     return sum(g * n for g, n in pairs if n > 0) / sum(counts)
# ```
# The package never makes the means: it adds up sums, on which a rank without
# labels has no effect, and `clip_gradients` divides once.
# </details>
#
# **3. Communication per step.** Return the bytes that one of `ranks` sends in
# a step of one micro-batch, at ZeRO `stage` 0 to 3. The model has `n_blocks`
# blocks of `block` parameters and a root of `root`. Gradients travel as
# float32; weights, where they travel, as bfloat16.

# %%
def bytes_sent(stage, ranks, block, n_blocks, root):
    raise NotImplementedError


exercises.check_bytes_sent(bytes_sent)

# %% [markdown]
# <details><summary>Hint</summary>
#
# A reduce-scatter or an all-gather of $n$ bytes sends $n\,(W-1)/W$. Stage 0
# all-reduces gradients. Which stages gather weights, and which units twice?
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# def bytes_sent(stage, ranks, block, n_blocks, root):
#     blocks = n_blocks * block
#     sent = 4 * (blocks + root)  # the reduce-scatter, at every stage
#     if stage == 0:
#         sent += 4 * (blocks + root)  # the other half of an all-reduce
#     elif stage < 3:
#         sent += 2 * (blocks + root)
#     else:
#         sent += 2 * (2 * blocks + root)
#     return sent * (ranks - 1) / ranks
# ```
# With bfloat16 weights stage 3 sends as much as plain data parallel does: 8
# bytes for a parameter of a block.
# </details>
#
# ## Recap
#
# - An all-reduce is a reduce-scatter and an all-gather; a rank sends at most
#   one vector for each, however many ranks there are.
# - ZeRO shares out first the moments, then gradients, then weights: 16 bytes
#   a parameter become $16/W$, and what is gathered remains.
# - All stages train the same model to rounding, if gradients are *sums*,
#   divided once by the number of all labels, and clipped by one norm.
#
# **What real systems do differently.** They gather the next block while this
# one computes, and send bfloat16 (so does the package, by FSDP2) or fp8; use
# trees, and switches that add up in the network; keep a copy in each machine
# and sum between machines (HSDP: `parallel.replicas`); shard only as far as the
# network is fast.
#
# **Read on.** [`nanomai/parallel/fsdp.py`](../nanomai/parallel/fsdp.py),
# [`nanomai/parallel/apply.py`](../nanomai/parallel/apply.py)
# (`clip_gradients`),
# [`nanomai/parallel/launch.py`](../nanomai/parallel/launch.py). ZeRO
# [1910.02054](https://arxiv.org/abs/1910.02054), FSDP
# [2304.11277](https://arxiv.org/abs/2304.11277), bandwidth-optimal
# all-reduce: Patarasuk and Yuan 2009, Horovod's ring
# [1802.05799](https://arxiv.org/abs/1802.05799).
#
# **Next:** `14_tensor_pipeline_expert_context` splits matrices, layers,
# experts and sequences.
