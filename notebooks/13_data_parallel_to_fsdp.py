# %% [markdown]
# # 13 · How can many processes train one model, each holding only a share of it?
#
# **Goal.** Add up gradients around a ring, train copies of a model in step,
# then take the copies apart: optimizer, gradients, weights (ZeRO 1, 2, 3).
# Prove that all of them, two real processes of the package included, train
# the very same model.
#
# **Prerequisites.** `06_training`; `checkpoint` from
# `12_memory_and_checkpointing`; generators (`yield`) for one exercise.
# **Time.** About 60 minutes; it runs in under a minute.
#
# **You will be able to**
# - say what an all-reduce sends, step by step, and why the ring is cheap;
# - split a batch of any kind so that the gradient stays the same;
# - write a sharded AdamW, and a model that gathers one block at a time;
# - read off what a rank holds and sends at each stage.

# %%
import tempfile
from collections import defaultdict
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch.func import functional_call
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import nanomai
from nanomai import ops, optim
from nanomai.config import ModelConfig, OptimConfig
from nanomai.exercises import data_parallel as exercises
from nanomai.parallel.launch import launch
from nanomai.planner import counts
from nanomai.show import lesson

lesson()

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
# was there: an *all-gather*.
#
# > **Predict.** For $W = 4$ each rank sends 3 + 3 chunks of $n/4$ numbers.
# > How many does it send with 1,024 ranks, against the $1023\,n$ that
# > rank 0 would have to take in?

# %%
messages = []  # (step, the rank that sends, chunk, how many numbers)


def ring(held, steps):
    """held[r][c] is rank r's copy of chunk c; works in place."""
    W = len(held)
    for step in steps:
        chunk = [(r - 1 - step) % W for r in range(W)]
        leaving = [held[r][chunk[r]] for r in range(W)]  # all at once
        for r, (c, x) in enumerate(zip(chunk, leaving, strict=True)):
            right = held[(r + 1) % W]
            right[c] = right[c] + x if step < W - 1 else x
            messages.append((step, r, c, len(x)))

# %%
def reduce_scatter(vectors):
    """W vectors (n,) -> rank r's chunk of their sum, (n / W,)"""
    W = len(vectors)
    held = [list(v.tensor_split(W)) for v in vectors]
    ring(held, range(W - 1))
    return [held[r][r] for r in range(W)]


def all_gather(chunks):
    """A chunk from each rank -> the whole vector (n,) on each rank"""
    W = len(chunks)
    held = [[c if r == i else None for i, c in enumerate(chunks)]
            for r in range(W)]
    ring(held, range(W - 1, 2 * W - 2))
    return [torch.cat(h) for h in held]

# %%
def all_reduce(vectors):
    return all_gather(reduce_scatter(vectors))


generator = torch.Generator().manual_seed(13)
W, n = 4, 12
vectors = [torch.randn(n, generator=generator) for _ in range(W)]
for whole in all_reduce(vectors):
    assert_close(whole, sum(vectors))
for r in range(W):
    sent = sum(size for _, rank, _, size in messages if rank == r)
    assert sent == 2 * (W - 1) / W * n
print(f"{W} ranks, all have the sum; each sent {sent / n} n")
print(f"1,024 ranks: {2 * 1023 / 1024:.3f} n")

# %%
plt.figure(figsize=(7.0, 3.0))
for step, r, c, _ in messages:
    done = min(step + 1, W)  # so many ranks' numbers are in the chunk
    plt.barh(r, 0.92, left=step + 0.04, color=plt.cm.Blues(0.18 * done))
    plt.text(step + 0.5, r, f"chunk {c}\n{done} of {W}", ha="center",
             va="center", color="white" if done > 2 else "black")
plt.axvline(W - 1, color="k", ls="--")
plt.title("reduce-scatter" + 30 * " " + "all-gather", size=10)
plt.xticks([s + 0.5 for s in range(6)], range(6))
plt.yticks(range(W))
plt.gca().set(xlabel="step of the ring", ylabel="rank that sends")
plt.gca().invert_yaxis()
plt.grid(False)
plt.show()
assert [c for step, _, c, _ in messages if step == W - 1] == [0, 1, 2, 3]

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
begin = torch.randint(len(text) - 33, (3, 8, 1), generator=generator)
rows = text[begin + torch.arange(33)]  # three batches: (3, 8, 33)
targets = rows[..., 1:].clone()
targets[:, :3, 4:] = ops.IGNORE
batches = list(zip(rows[..., :-1], targets, strict=True))


def parts(step, W):
    """What each rank reads: W pairs of (8 / W, 32)"""
    return list(zip(*(x.chunk(W) for x in batches[step]), strict=True))


labels = [(t != ops.IGNORE).sum().item() for _, t in parts(0, 2)]
count = sum(labels)
print("labels of 2 ranks:", labels, "together", count)

# %% [markdown]
# The judge of everything below is the package in one process:
# [`train_sharded`](../nanomai/exercises/data_parallel.py), two dozen lines,
# takes a step with each batch as the trainer would, with its clipping and its
# AdamW, and leaves weights and the last gradient in a file. (AdamW divides by
# $\sqrt v + \varepsilon$. Where a gradient is little more than rounding, that
# quotient would make a step of it; so our $\varepsilon$ is larger than usual.)
#
# For our own ranks a model is one long vector, of which the parameters are
# slices. AdamW is that of `06_training`; it treats every number by itself, so
# it works on any piece of the vector. (Muon needs a matrix whole: see
# `nanomai/optim.py`.)

# %%
folder = Path(tempfile.mkdtemp())
torch.save(batches, folder / "batches.pt")
exercises.train_sharded(0, config, settings, 13, folder)
judge = torch.load(folder / "rank-0.pt")


def assert_same_training(weights, gradients):
    for kind, found in (("weights", weights), ("gradients", gradients)):
        assert found.keys() == judge[kind].keys()
        for name, x in found.items():
            assert_close(x, judge[kind][name], rtol=1e-3, atol=1e-5)


print(config.n_parameters, "parameters; every gradient is clipped:",
      min(judge["norms"]) > settings.grad_clip)

# %%
model = nanomai.build_model(config, seed=13)
named = {n: p.detach() for n, p in model.named_parameters()}
start = torch.cat([p.flatten() for p in named.values()])


def tensors(vector):
    pieces = vector.split([p.numel() for p in named.values()])
    return {n: x.view_as(named[n])
            for n, x in zip(named, pieces, strict=True)}


def loss(vector, part, reduction="sum"):
    return functional_call(model, tensors(vector), part,
                           {"reduction": reduction})


def gradient(vector, part, reduction="sum"):
    leaf = vector.clone().requires_grad_()
    return torch.autograd.grad(loss(leaf, part, reduction), leaf)[0]

# %%
decays = {n: settings.weight_decay * optim.is_decayed(n, p)
          for n, p in named.items()}
decay = torch.cat([torch.full((p.numel(),), decays[n])
                   for n, p in named.items()])


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
# and divides once, by the number of labels of the whole batch. Clipping must
# see the norm of the *summed* gradient, which every rank can compute for
# itself.

# %%
def clipped(x, norm):
    return x * min(1.0, settings.grad_clip / (norm + 1e-6))


def data_parallel(weights, states, g, reduce=all_reduce):
    """A step of all ranks: new weights, and the gradients they used"""
    g = [x / count for x in reduce(g)]
    g = [clipped(x, x.norm()) for x in g]
    return list(map(adamw, weights, g, states, [decay] * len(g))), g


def train(make_step, W, steps=3):
    weights, states = [start] * W, [{} for _ in range(W)]
    for step in range(steps):
        g = list(map(gradient, weights, parts(step, W)))
        weights, g = make_step(weights, states, g)
    return weights, g, states

# %%
bytes_held = {}  # of rank 0, by stage and W: for section 5


def check(stage, make_step):
    for W in (2, 4):
        weights, g, states = train(make_step, W)
        for on_rank in zip(weights, g, strict=True):
            assert_same_training(*map(tensors, on_rank))
        of_rank_0 = (weights[0], g[0], states[0]["m"], states[0]["v"])
        bytes_held[stage, W] = sum(x.nbytes for x in of_rank_0)
        print(W, "ranks: weights and gradients of all as one process")


check(0, data_parallel)

# %% [markdown]
# Break it, in two ways that crash nothing. First, a mean of means. Second, no
# all-reduce at all.
#
# > **Predict.** Our two ranks have 44 and 128 labels. In a mean of means, how
# > many times as much does a label of the first rank weigh? And without the
# > all-reduce, does each rank's loss fall nevertheless? After three steps, how
# > far apart are the copies, compared with the way that one has gone?

# %%
whole = gradient(start, batches[0], "mean")
each = [gradient(start, part) for part in parts(0, 2)]
wrong = sum(gradient(start, part, "mean") for part in parts(0, 2)) / 2
assert_close(sum(each) / count, whole, rtol=1e-4, atol=1e-6)
off = ((wrong - whole).norm() / whole.norm()).item()
print(f"sums, divided once: right; mean of means: off by {off:.0%}")
print(f"a label of rank 0 weighs {labels[1] / labels[0]:.1f} times as much")
assert off > 0.1

# %%
(one, other), *_ = train(partial(data_parallel, reduce=list), 2)
falls = [(loss(w, part) < 0.95 * loss(start, part)).item()
         for w, part in zip((one, other), parts(2, 2), strict=True)]
print("the loss of each rank falls:", falls)
assert all(falls)
apart = ((one - other).norm() / (one - start).norm()).item()
print(f"apart by {apart:.1f} of the way")
assert apart > 0.5
try:
    assert_close(one, other, rtol=1e-3, atol=1e-5)
except AssertionError as error:
    print("the copies differ:", type(error).__name__)

# %% [markdown]
# 2.9 times, and the gradient is another one; widely used trainers have had this
# bug, between ranks and between micro-batches. In the second both losses
# fall, and the copies are farther apart than the first has moved: two models
# are being trained on half the data each, and rank 0 will save one of them.
# Only a comparison of the ranks shows it.
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
def zero_1(weights, states, g):
    W = len(weights)
    slices = [x / count for x in reduce_scatter(g)]  # (N / W,) each
    norm = sum(x.square().sum() for x in slices).sqrt()
    slices = [clipped(x, norm) for x in slices]
    mine = [w.tensor_split(W)[r] for r, w in enumerate(weights)]
    new = map(adamw, mine, slices, states, decay.tensor_split(W))
    return all_gather(list(new)), all_gather(slices)


check(1, zero_1)
print(f"4 ranks hold {bytes_held[1, 4] / bytes_held[0, 4]:.0%} as much each")

# %% [markdown]
# The norm: each rank squares and adds its slice, and one number per rank is
# summed. (Our ranks gathered the last gradient only to be compared.)
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
# all the rest, first and last to run. We note how many bytes of gathered
# weights are alive, by references that do not keep them so.

# %%
units = {"root": [n for n in named if not n.startswith("blocks.")]}
for i in model.blocks:
    units[i] = [n for n in named if n.startswith(f"blocks.{i}.")]
log, alive = [], []  # (what, unit, bytes), and (reference, bytes)


def note(what, unit):
    alive[:] = [(ref, size) for ref, size in alive if not ref.expired()]
    log.append((what, unit, sum(size for _, size in alive)))


def gather(shares, unit):
    """shares[name, rank] -> the whole parameters of a unit"""
    whole = {n: joined(shares, n) for n in units[unit]}
    for x in whole.values():
        alive.append((StorageWeakRef(x.untyped_storage()), x.nbytes))
    note("gather", unit)
    return whole


def joined(shares, name):
    return torch.cat([x for (n, _), x in shares.items() if n == name])

# %% [markdown]
# Our ranks run in step and share each gathered block. So its gradient is
# the *sum* over ranks, and the gradient of `cat` cuts this sum into every
# rank's rows: the gradient of an all-gather is a reduce-scatter.
#
# How does a block forget its weights and get them back? By notebook 12's
# `checkpoint`: nothing but its input is kept, and in the backward pass it runs
# again, so it gathers again. (FSDP frees weights alone, and keeps activations
# unless told otherwise.) Without it the weights stay until the block's backward
# is done: stage 2, as the package's `keep_gathered` does it.
#
# Then AdamW works on rows. No all-gather of new weights ends the step: the next
# forward pass gathers them when it needs them.

# %%
def run(i, shares, *xs):
    """xs: each rank's (b, T, D), through block i"""
    w = {n.removeprefix(f"blocks.{i}."): x
         for n, x in gather(shares, i).items()}
    return [functional_call(model.blocks[i], w, (x, None, None)) for x in xs]


def sharded_loss(shares, pieces, keep):
    """The sum over all ranks; pieces[r] is what rank r reads."""
    root = gather(shares, "root")
    xs = [root["embed.weight"][ids] + root["positions.weight"]
          for ids, _ in pieces]
    block = run if keep else partial(checkpoint, run, use_reentrant=False)
    for i in model.blocks:
        xs = block(i, shares, *xs)
        note("after", i)
        # the backward begins with the last rank
        xs[-1].register_hook(lambda d_x, i=i: note("back", i))
    top = F.rms_norm(torch.cat(xs).flatten(0, 1), (config.d_model,),
                     root["norm.weight"], config.norm_eps)
    targets = torch.cat([t for _, t in pieces]).flatten()
    return ops.linear_cross_entropy(top, root["head.weight"], targets)

# %%
def zero_3(W, keep=False, steps=3):
    shares, states = {}, defaultdict(dict)
    for n, p in named.items():
        cut = [*p.chunk(W), *[p[:0]] * W][:W]  # the last may be empty
        shares |= {(n, r): x.clone() for r, x in enumerate(cut)}
    for step in range(steps):
        log.clear()
        leaves = [x.requires_grad_() for x in shares.values()]
        total = sharded_loss(shares, parts(step, W), keep)
        g = torch.autograd.grad(total, leaves)
        g = dict(zip(shares, g, strict=True))
        note("end", "root")
        norm = sum(x.square().sum() for x in g.values()).sqrt() / count
        for (n, r), x in g.items():  # each by rank r alone
            g[n, r] = clipped(x / count, norm)
            shares[n, r] = adamw(shares[n, r].detach(), g[n, r],
                                 states[n, r], decays[n])
    return shares, g

# %%
logs = {}
for stage, W in ((2, 4), (2, 2), (3, 4), (3, 2)):
    shares, g = zero_3(W, keep=stage == 2)
    assert_same_training(*({n: joined(x, n) for n in named}
                           for x in (shares, g)))
    mine = sum(x.nbytes for (_, r), x in shares.items() if r == 0)
    gathered = max(size for _, _, size in log)
    bytes_held[stage, W] = 4 * mine + gathered  # 4: gradient, m, v too
    logs[stage] = log.copy()
    print("stage", stage, "on", W, "ranks: as one process; gathers",
          *(unit for what, unit, _ in log if what == "gather"))

# %% [markdown]
# > **Predict.** Draw the bytes of gathered weights over a step, for both
# > stages: how high, and how many teeth?

# %%
size = {u: sum(named[n].nbytes for n in units[u]) for u in units}
everything, largest = sum(size.values()), size["root"] + size["0"]
for stage, most, every in ((2, everything, 2), (3, largest, 1)):
    held = torch.tensor([x for *_, x in logs[stage]])
    at = [*range(7), *range(7, 14, every)]  # stage 2: no gathers here
    plt.step(at, held / 1024, "o-", where="post", ms=4,
             label=f"stage {stage}, {most / 1024:.0f} KiB at most")
    assert held.max() == most
ticks = [i for i, (what, *_) in enumerate(log) if what == "gather"]
plt.xticks(ticks, [log[i][1] for i in ticks])
plt.xlabel("unit that is gathered in stage 3: forward, then backward")
plt.ylabel("gathered weights (KiB)")
plt.legend()
plt.show()

# %% [markdown]
# Stage 3 is a saw of one block's height with a tooth for each block and
# pass. Stage 2 spares the gathers of the backward pass, and climbs to the whole
# model. The root is here a quarter of everything, of 500 billion parameters
# less than a hundredth. (Ours goes once the head's gradients are there. FSDP2
# lets go of it at the end, when the embedding has its gradient too.)
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
# > **Predict.** How low can the line of stage 3 go, with ever more ranks?

# %%
N = len(start)
theory = [lambda W: 16 * N, lambda W: 8 * N + 8 * N / W,
          lambda W: everything + 16 * N / W, lambda W: largest + 16 * N / W]
worlds = 2 ** torch.arange(8)
for stage, line in enumerate(theory):
    plt.plot(worlds, [line(W) / N for W in worlds], color=f"C{stage}")
    dots = [bytes_held[stage, W] / N for W in (2, 4)]
    plt.plot((2, 4), dots, "o", color=f"C{stage}", label=f"stage {stage}")
    assert_close(dots, [line(W) / N for W in (2, 4)], rtol=1e-3, atol=0)
plt.plot(worlds, 16 / worlds, "k:", label="16 / W")
plt.loglog()
plt.xticks(worlds, worlds.tolist())
plt.gca().set(xlabel="ranks W (log)",
              ylabel="bytes per parameter on rank 0 (log)")
plt.legend(title="lines: theory\ndots: counted", loc="lower left")
plt.show()

# %% [markdown]
# To the gathered root and block, which no number of ranks makes smaller. (And
# a matrix of 48 rows can be shared by 48 ranks at most: the others get none
# of it.)
#
# ## 6 Two real processes
#
# So far our ranks took turns in one process. The package lays the same over
# real ones: `parallelize` calls PyTorch's `fully_shard` on each block and on
# the rest, and hooks gather, drop and scatter. `launch` starts two processes
# that talk over gloo (a library of collectives for CPUs, as NCCL is for GPUs),
# and kills them at a timeout. They cannot see a notebook's cells; they run the
# judge's `train_sharded`, and leave their rows in files. Ours must agree with
# FSDP2 rank by rank, row by row, and both with one process. An observer in each
# has counted what its last forward and backward pass sent.
#
# > **Predict.** How many all-gathers and how many reduce-scatters are there
# > in a step, with three blocks and a root?

# %%
launch(exercises.train_sharded, 2, config, settings, 13, folder,
       timeout_s=110)
real = [torch.load(folder / f"rank-{r}.pt") for r in range(2)]
for kind, ours in (("weights", shares), ("gradients", g)):
    for (n, r), x in ours.items():
        assert_close(real[r][kind][n], x, rtol=1e-3, atol=1e-5)
print("our sharded AdamW: FSDP2's rows, on each rank, such as",
      tuple(x.shape), "of", tuple(named[n].shape))
assert_same_training(*({n: torch.cat([on[kind][n] for on in real])
                        for n in named} for kind in ("weights", "gradients")))
for on_rank in real:
    assert_close(on_rank["norms"], judge["norms"], rtol=1e-4, atol=0)
print("one process: the same weights, gradients and norms")

# %%
gathers, scatters = (real[0]["collectives"][f"fsdp: {kind}"]
                     for kind in ("all-gather", "reduce-scatter"))
print("all-gathers:", gathers["calls"], " reduce-scatters:",
      scatters["calls"])
assert gathers["calls"] == sum(what == "gather" for what, *_ in log) == 7
assert gathers["bytes"] == 2 * everything - size["root"]
assert scatters["bytes"] == everything and scatters["calls"] == len(units)
sent = (gathers["bytes"] + scatters["bytes"]) / 2  # (W - 1) / W of them
print(f"a rank sends {sent / 4 / N:.2f} numbers for each parameter;",
      "data parallel: 1.00")

# %% [markdown]
# Seven gathers, as in our log, and four scatters. Stage 3 pays with traffic: an
# all-reduce is one gather and one scatter, here the blocks are gathered twice.
# For $W$ ranks and a root that is small it sends $3\,(W-1)/W$ numbers a
# parameter instead of $2\,(W-1)/W$. Much of it is hidden: while one block
# computes, the next is being gathered.
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
# way of splitting? Section 5 says it, with gathered weights in bfloat16. The
# model has 120 blocks.
#
# > **Predict.** 80 GB a GPU. Which stage is the first that fits? Which part
# > will be the largest then?

# %%
big, W = nanomai.load_config("mai-1-dense"), 1024
N = big.model.n_parameters
block = counts.block_part(big.model, False).all
root = counts.root_part(big.model, 1, 0, 1).all
assert 120 * block + root == N
bars = {"weights, whole or a shard": [4, 4, 4 / W, 4 / W],
        "gradients": [4, 4, 4 / W, 4 / W],
        "AdamW's moments": [8, 8 / W, 8 / W, 8 / W],
        "gathered, bfloat16": [0, 0, 2, 2 * (root + block) / N]}
for i, (name, each) in enumerate(bars.items()):
    plt.bar([s + 0.2 * i - 0.3 for s in range(4)],
            [x * N / 1e9 for x in each], 0.18, label=name)
total = [sum(each) * N / 1e9 for each in zip(*bars.values(), strict=True)]
plt.axhline(80, color="k", ls="--", label="80 GB")
plt.gca().set(yscale="log", ylim=(1, 1e5),
              ylabel="GB on each of 1,024 ranks (log)")
plt.xticks(range(4), [f"stage {s}\n{x:,.0f} GB in all"
                      for s, x in enumerate(total)])
plt.legend(ncol=2, loc="upper right")
plt.show()
assert total[2] > 80 > total[3]

# %% [markdown]
# Only stage 3 fits, and most of what it holds then is not the shard but what
# is gathered. (FSDP gathers one block ahead, to hide it: one more. Activations
# come on top: notebook 12.) The package's planner counts the same. Then there
# is the traffic.

# %%
alone = dict.fromkeys(("pipeline", "replicas", "fsdp", "context", "expert",
                       "tensor"), 1)
for axis, held in ("replicas", 1), ("fsdp", W):
    found = counts.memory_of(big, alone | {axis: W}, 1, 1, 0)
    assert_close((found["weights"], found["optimizer"]),
                 (4 * N / held, 8 * N / held))
sent = counts.traffic_of(big, alone | {"fsdp": W}, 1, 1, 0)["fsdp"]
by_hand = 4 * N + 2 * (2 * (N - root) + root)  # scatter, then gathers
assert_close(sent, by_hand * (W - 1) / W)
network = sent / (8 * 50e9)  # eight adapters of 400 Gb/s in a machine
arithmetic = 6 * N * 8192 / 989e12  # one sequence on an H100
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
