# %% [markdown]
# # 14 · How can many machines compute one model together?
#
# **Goal.** Cut a model in four ways: every matrix (*tensor* parallel), the
# stack of layers (*pipeline*), the experts (*expert*), the sequence
# (*context*). Derive each with simulated ranks in plain tensors, then run the
# package's on two real processes and compare every gradient with one.
#
# **Prerequisites.** `05_block_and_model`; `09_moe` for section 5; what
# reduce-scatter and all-gather do (`13_data_parallel_to_fsdp`). **Time.**
# About 75 minutes; it runs in under a minute.
#
# **You will be able to**
# - say where a sum between ranks belongs, forward and backward;
# - draw a pipeline's schedule and predict how long its ranks wait;
# - send tokens to experts on other ranks, and share one long sequence in two
#   ways;
# - choose which axis goes inside a machine.

# %%
import math
import tempfile
from dataclasses import replace
from itertools import zip_longest

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from einops import rearrange
from torch.testing import assert_close

import nanomai
from nanomai import moe, ops
from nanomai.architecture import MoEConfig
from nanomai.config import ModelConfig, ParallelConfig
from nanomai.exercises import sharing, sharing_ranks
from nanomai.parallel.launch import launch
from nanomai.parallel.pipeline import share_layers
from nanomai.planner import DEVICES
from nanomai.show import lesson

lesson()
generator = torch.Generator().manual_seed(14)


def randn(*shape):
    return torch.randn(*shape, generator=generator).requires_grad_()

# %% [markdown]
# ## 1 Tensor parallel: two ranks, one product
#
# In $y = xW_1$ the columns of $W_1$ are independent: a rank with half of them
# computes half of the hidden units, and the activation works on each alone.
# In $y = hW_2$ a rank that has half of $h$ needs only the matching *rows* of
# $W_2$, and what comes out is a summand of the whole. So: cut the first
# matrix by columns, the second by rows, and sum once. (PyTorch stores $W$
# transposed, out by in, so columns are its dimension 0.)
#
# > **Predict.** Suppose we cut the *first* matrix by rows as well. Its results
# > are summands. May the sum still wait until the end?

# %%
N, D, width, R = 6, 8, 12, 2  # tokens, channels, hidden units, ranks
x, d_y = randn(N, D), torch.randn(N, D, generator=generator)
weights = randn(width, D), randn(width, D), randn(D, width)


def mlp(x, gate, up, down):
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


cuts = (w.chunk(R, dim) for w, dim in zip(weights, (0, 0, 1), strict=True))
shares = list(zip(*cuts, strict=True))  # of each rank: three matrices
parts = [mlp(x, *share) for share in shares]  # R of (N, D)
assert_close(sum(parts), mlp(x, *weights))
print("two ranks,", tuple(parts[0].shape), "each: their sum is the MLP")

summands = [x[:, half] @ weights[0][:, half].T
            for half in (slice(0, 4), slice(4, 8))]
gap = sum(map(F.silu, summands)) - F.silu(sum(summands))
print("summands may go through silu:", gap.abs().max().item() < 0.1)
assert gap.abs().max() > 0.1

# %% [markdown]
# No: $\mathrm{silu}(a) + \mathrm{silu}(b)$ is not $\mathrm{silu}(a + b)$. Each
# MLP would need two sums in place of one.
#
# Now backwards. Every rank has the same $x$ and the same gradient $d_y$.
#
# > **Predict.** Do both find the same gradient of $x$?

# %%
def gradient_of_x(*matrices):
    return torch.autograd.grad(mlp(x, *matrices), x, d_y)[0]


on_ranks = [gradient_of_x(*share) for share in shares]
print("equal on both ranks:", torch.allclose(*on_ranks))
assert not torch.allclose(*on_ranks)
assert_close(sum(on_ranks), gradient_of_x(*weights))
print("their sum is the gradient")

# %% [markdown]
# They do not: $x$ was used twice, so its gradient is a sum of two. Where the
# forward pass hands the same thing to all ranks, the backward pass sums, and
# the other way round. `nanomai/parallel/collectives.py` has both as pairs:
# `total` sums forwards, `to_all` sums backwards.
#
# **A whole block.** Attention fits the same pattern: a rank takes some heads,
# which are rows of our stored $W_q, W_k, W_v$ and columns of $W_o$. What is
# left, norms and residuals, each rank would do for all tokens. *Sequence
# parallel* gives each $T / R$ of them instead: all-gather before a layer, and
# in place of the sum a reduce-scatter. Together these two send as much as one
# all-reduce, and the stream is held once, not $R$ times.

# %%
def attention_part(h, w, r):
    """One rank's heads, for all tokens: a summand of (B, T, D)"""
    def own(name, dim=0):
        return w[f"attention.{name}.weight"].chunk(R, dim)[r]

    q, k, v = (rearrange(h @ own(name).T, "b t (h k) -> b h t k", k=8)
               for name in ("wq", "wk", "wv"))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True,
                                       enable_gqa=True)
    return rearrange(y, "b h t k -> b t (h k)") @ own("wo", 1).T


def mlp_part(h, w, r):
    """One rank's hidden units, for all tokens"""
    return mlp(h, *(w[f"mlp.{name}.weight"].chunk(R, dim)[r] for name, dim
                    in (("w_gate", 0), ("w_up", 0), ("w_down", 1))))

# %%
def gather(parts):
    """R of (B, T / R, D) -> (B, T, D), on every rank"""
    return torch.cat(parts, 1)


def scatter_sum(parts):
    """R of (B, T, D) -> of their sum (B, T / R, D) for each rank"""
    return sum(parts).chunk(R, 1)


def block(parts, w, scatter=scatter_sum, gain=lambda weight, r: weight):
    """parts: each rank's (B, T / R, D) of the stream"""
    for name, layer in (("attention", attention_part), ("mlp", mlp_part)):
        weight = w[f"{name}_norm.weight"]
        h = gather([F.rms_norm(x, x.shape[-1:], gain(weight, r), 1e-5)
                    for r, x in enumerate(parts)])
        y = scatter([layer(h, w, r) for r in range(R)])
        parts = [x + s for x, s in zip(parts, y, strict=True)]
    return gather(parts)

# %% [markdown]
# The package's block on one rank is the judge: its output, and the gradients
# of the input and of all nine parameters.
#
# Then two bugs on purpose. In the first, the reduce-scatter forgets to reduce:
# each rank keeps its own summand. In the second all values are right, but of
# a norm's gain, which every rank has whole and uses on its own tokens, only
# rank 0's share of the gradient is counted.
#
# > **Predict.** Does either crash?

# %%
config = ModelConfig(n_layers=4, d_model=16, n_heads=4, n_kv_heads=2,
                     head_dim=8, d_ff=24, vocab_size=130,
                     context_length=16, tied_embeddings=False, init_std=0.3)
theirs = nanomai.build_model(config).blocks["0"]
w, x = dict(theirs.named_parameters()), randn(3, 16, 16)
truth = theirs(x, None, None)  # no rotation, and causal
d_y = torch.linspace(-1, 1, truth.numel()).view_as(truth)


def check(y):
    assert_close(y, truth, rtol=1e-4, atol=1e-4)
    ours, true = (torch.autograd.grad(z, (x, *w.values()), d_y,
                                      retain_graph=True)
                  for z in (y, truth))
    for a, b in zip(ours, true, strict=True):
        assert_close(a, b, rtol=1e-4, atol=1e-4)
    return len(true)


shards = x.chunk(R, 1)
print("a rank's part of the stream:", tuple(shards[0].shape))
print("equal to the package, with", check(block(shards, w)), "gradients")

# %%
def keep_own(parts):
    return [part.chunk(R, 1)[r] for r, part in enumerate(parts)]


def gain_of_rank_0(weight, r):
    return weight if r == 0 else weight.detach()


bugs = {"no sum": block(shards, w, keep_own),
        "gains not summed": block(shards, w, gain=gain_of_rank_0)}
for name, y in bugs.items():
    try:
        check(y)
        print(name, "went unnoticed")
    except AssertionError as error:
        print(f"{name}: values right: {torch.allclose(y, truth, 1e-4)};",
              type(error).__name__)

# %% [markdown]
# Neither: all shapes fit. The second even leaves this step's loss as it is;
# only a comparison of gradients finds it.
#
# ## 2 The loss, with the vocabulary cut
#
# The head is the widest matrix. A rank with $V / R$ of its rows has as many of
# a token's logits. To gather them would send $V$ numbers a token. But
# $-\ln p_t = \ln\sum_j e^{z_j} - z_t$ needs only two: the logarithm of a
# rank's own part of that sum, and $z_t$ from whoever has it.

# %%
def shared_loss(hidden, head, targets):
    """hidden (N, D), head (V, D) -> the sum of the losses"""
    first, log_sums, at_target = 0, [], []
    for weight in head.chunk(R):
        logits = hidden @ weight.T  # (N, V / R)
        mine = targets - first
        here = (mine >= 0) & (mine < len(weight))
        picked = logits.gather(1, mine.where(here, 0)[:, None])[:, 0]
        log_sums.append(logits.logsumexp(1))  # (N,): one number to send
        at_target.append(picked * here)  # (N,): the other
        first += len(weight)
    return (torch.stack(log_sums).logsumexp(0) - sum(at_target)).sum()


hidden, head = randn(10, D), randn(130, D)
targets = torch.randint(130, (10,), generator=generator)
ours, package = (loss(hidden, head, targets) for loss in (
    shared_loss, ops.linear_cross_entropy))
assert_close(ours, package)
for a, b in zip(*(torch.autograd.grad(loss, (hidden, head))
                  for loss in (ours, package)), strict=True):
    assert_close(a, b)
print(f"equal, gradients too; a rank sends 2 numbers a token, not {130 // R}")

# %% [markdown]
# ## 3 Two real processes
#
# Now the package's own code, by `launch` from `nanomai/parallel/launch.py`: it
# spawns processes that meet over gloo, and ends them if they hang (here after
# 100 seconds). A fresh process cannot see the cells of a notebook, so what it
# runs is a function of a module, `nanomai/exercises/sharing_ranks.py`.
# Starting takes seconds; so the same two processes compute all layouts of this
# notebook, one step each, and later sections open their results.

# %%
experts = replace(config, moe=MoEConfig(n_experts=4, experts_per_token=2,
                                        d_expert=12))
jobs = {"tensor": (config, ParallelConfig(tensor=2)),
        "pipeline": (config, ParallelConfig(pipeline=2)),
        "interleaved": (config, ParallelConfig(pipeline=2,
                                               stages_per_rank=2)),
        "expert": (experts, ParallelConfig(expert=2)),
        "context": (config, ParallelConfig(context=2)),
        "heads": (config, ParallelConfig(context=2, context_by="heads"))}
rows = torch.randint(130, (4, 17), generator=generator)
ids, targets = rows[:, :-1], rows[:, 1:]  # (B, T)
with tempfile.TemporaryDirectory() as folder:
    launch(sharing_ranks.compute, 2, folder, jobs, rows.tolist(),
           timeout_s=100)
    found = {name: [torch.load(f"{folder}/{name}-{rank}.pt")
                    for rank in range(2)] for name in jobs}
print("two processes have computed", *found)

# %% [markdown]
# One process computes the same step. Loss and gradients must agree to one part
# in 100,000, on each of the two ranks. The processes have also counted their
# collectives.
#
# > **Predict.** How many collectives does one block need, forward and
# > backward? And how often are gradients of norms summed, in four blocks?

# %%
def compare(layout):
    model = nanomai.build_model(jobs[layout][0])
    loss = model(ids, targets, reduction="sum")
    loss.backward()
    there, names = dict(model.named_parameters()), set()
    for rank in found[layout]:
        assert_close(rank["loss"], loss.detach(), rtol=1e-5, atol=0)
        for name, gradient in rank["gradients"].items():
            true = there[name].grad
            assert (gradient - true).norm() < 1e-5 * true.norm(), name
            names.add(name)
    assert names == there.keys()
    print(f"{layout}: the loss and {len(names)} gradients are the same")


compare("tensor")
counts = found["tensor"][0]["collectives"]
for name, n in sorted(counts.items()):
    print(f"  {name:24}{n:3}")
moves = counts["all_gather_into_tensor"] + counts["reduce_scatter_tensor"]
assert moves == 4 * 8 + 5  # embedding 2, last norm 2, loss 1
assert counts["all_reduce"] == 2 * 4 + 1

# %% [markdown]
# Eight: attention and MLP each gather and scatter forwards, and each has its
# mirror image backwards. Nine gains, two a block and the last norm's, are
# summed, as the second bug above forgot. Eight times in each block all ranks
# wait for one another: that is why this axis stays inside a machine.
#
# ## 4 Pipeline: who waits for whom
#
# Give rank $r$ the $r$-th part of the layers, a *stage*. All it sends is the
# stream at its border. But rank 1 can begin only after rank 0, so a batch is
# cut into $m$ micro-batches that follow one another. What a rank does in which
# order is the *schedule*, and it is no more than a list:
#
# - **GPipe:** all forwards, then all backwards.
# - **1F1B:** as many forwards as there are stages after this one, then one
#   forward and one backward in turn.
# - **Interleaved:** $v$ smaller stages on each rank, $p$ micro-batches at a
#   time through each.

# %%
def order(rank, p, m, v=1, warm=None):
    """One rank's list of (forward or backward, stage, micro-batch)"""
    if warm is None:  # forwards before the first backward follows one
        warm = p - 1 - rank if v == 1 else (v - 1) * p + 2 * (p - 1 - rank)

    def at(i, kind):
        turn = i // p % v if kind == "F" else v - 1 - i // p % v
        return kind, rank + p * turn, i // (p * v) * p + i % p

    forwards, backwards = ([at(i, kind) for i in range(v * m)]
                           for kind in "FB")
    todo = forwards[:warm]
    for pair in zip_longest(forwards[warm:], backwards):
        todo += [step for step in pair if step]
    return todo


print("1F1B, rank 0 of 2, 3 micro-batches:",
      *(f"{kind}{i}" for kind, _, i in order(0, 2, 3)))

# %% [markdown]
# An event loop plays any schedule. A forward waits for the stage before it, a
# backward for the stage after it; we say that a rank's forward takes one unit
# of time and its backward two.

# %%
def simulate(orders, forward=1.0, backward=2.0):
    """-> (rank, step, begin, length) of everything that is done"""
    p, todo = len(orders), [list(steps) for steps in orders]
    last = max(stage for steps in orders for _, stage, _ in steps)
    length = {"F": forward * p / (last + 1), "B": backward * p / (last + 1)}
    ends, clock, done = {}, [0.0] * p, []
    while any(todo):
        waiting = True
        for rank in range(p):
            if not todo[rank]:
                continue
            kind, stage, i = step = todo[rank][0]
            before = stage - 1 if kind == "F" else stage + 1
            if 0 <= before <= last and (kind, before, i) not in ends:
                continue
            begin = max(clock[rank], ends.get((kind, before, i), 0.0))
            done.append((rank, todo[rank].pop(0), begin, length[kind]))
            clock[rank] = ends[step] = begin + length[kind]
            waiting = False
        assert not waiting, "each rank waits for another: a deadlock"
    return done


def waiting_share(done):
    work = sum(length for *_, length in done)
    end = max(begin + length for _, _, begin, length in done)
    return 1 - work / end / len({rank for rank, *_ in done})

# %% [markdown]
# > **Predict.** 1F1B begins its backwards earlier than GPipe. Is it done
# > earlier?

# %%
p, m = 4, 8
schedules = {"GPipe": [order(r, p, m, warm=m) for r in range(p)],
             "1F1B": [order(r, p, m) for r in range(p)],
             "interleaved, v = 2": [order(r, p, m, 2) for r in range(p)]}
figure, axes = plt.subplots(3, 1, figsize=(9.5, 6.3), sharex=True,
                            layout="constrained")
shades = {"F": ("#9ecae1", "#deebf7"), "B": ("#fdae6b", "#fee6ce")}
for ax, (name, orders) in zip(axes, schedules.items(), strict=True):
    done = simulate(orders)
    for rank, (kind, stage, i), begin, length in done:
        ax.barh(rank, length, left=begin, height=0.9, edgecolor="0.35",
                color=shades[kind][stage // p], linewidth=0.6)
        ax.text(begin + length / 2, rank, i, ha="center", va="center",
                fontsize=9 if length >= 1 else 7)
    ax.set(ylabel="rank", yticks=range(p), title=f"{name}: ranks wait "
           f"{waiting_share(done):.0%} of the time")
    ax.invert_yaxis()
    ax.grid(False)
axes[2].set_xlabel("time (forwards of one micro-batch on one rank); "
                   "blue forward, orange backward; pale: second stage")
plt.show()
waits = [waiting_share(simulate(orders)) for orders in schedules.values()]
assert_close(waits, [3 / 11, 3 / 11, 3 / 19])

# %% [markdown]
# It is not: GPipe and 1F1B wait equally long. The last rank cannot begin before
# $p - 1$ forwards of the others, and after its last backward $p - 1$ of theirs
# are to come. With $v$ stages on a rank each of these is $v$ times shorter. As
# a share of all time, and (as the package's docstrings have it) of the time
# worked:
#
# $$\frac{p - 1}{v m + p - 1}, \qquad \frac{p - 1}{v m}.$$
#
# What 1F1B saves is memory: a forward leaves activations until its backward.

# %%
def most_in_flight(steps, v=1):
    """Micro-batches whose activations a rank holds at most"""
    held, most = 0, 0
    for kind, _, _ in steps:
        held += 1 if kind == "F" else -1
        most = max(most, held)
    return most / v


flying = {name: [most_in_flight(steps, 1 + ("inter" in name))
                 for steps in orders] for name, orders in schedules.items()}
assert flying["GPipe"] == [8] * 4 and flying["1F1B"] == [4, 3, 2, 1]
assert flying["interleaved, v = 2"] == [5.5, 4.5, 3.5, 2.5]

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.7),
                                     layout="constrained")
batches = range(4, 33, 4)
for v, color in ((1, "C0"), (2, "C1"), (4, "C2")):
    shares = [waiting_share(simulate([order(r, p, m, v) for r in range(p)]))
              for m in batches]
    theory = [(p - 1) / (v * m + p - 1) for m in batches]
    left.plot(batches, [100 * s for s in shares], color + "o")
    left.plot(batches, [100 * s for s in theory], color + "--",
              label=f"v = {v}")
    assert_close(shares, theory)
left.set(xlabel="micro-batches m", ylabel="ranks wait (% of the time)")
left.legend(title="4 ranks; dots: simulated\ndashed: theory")
for i, (name, most) in enumerate(flying.items()):
    right.bar([r + 0.27 * (i - 1) for r in range(p)], most, 0.25,
              color=("C3", "C0", "C1")[i], label=name)
right.set(xlabel="rank", ylabel="micro-batches held at once", ylim=(0, 11),
          xticks=range(p))
right.legend(ncols=3, fontsize=8.5, columnspacing=1)
plt.show()

# %% [markdown]
# GPipe holds all $m$, 1F1B never more than there are stages from here to the
# end, and interleaving pays for its shorter waits with memory, and with about
# $v$ times as many messages.
#
# The package leaves the order to `torch.distributed.pipelining`. Our two
# processes wrote down when each of their stages went forward and back. Layers
# are dealt out evenly; what is left over does not go to the last stage, which
# has the head as well.

# %%
for layout, v in (("pipeline", 1), ("interleaved", 2)):
    compare(layout)
    for rank in range(2):
        planned = [(kind, stage // 2)
                   for kind, stage, _ in order(rank, 2, 4, v)]
        assert found[layout][rank]["order"] == planned
        print(f"  rank {rank} did as we planned:",
              "".join(kind for kind, _ in planned))
sizes = [len(layers) for layers in share_layers(10, 4)]
print("10 layers on 4 stages:", sizes)
assert sizes == [2, 3, 3, 2]

# %% [markdown]
# ## 5 Expert parallel: tokens travel
#
# In a mixture of experts most weights belong to experts, and a token meets
# few of them. So each rank keeps *some experts whole*, and tokens go to where
# their experts are: an *all-to-all*, in which every rank has something
# different for every other. Three steps, on the model's own router: sort
# pairs by expert, as in `09_moe`; tell each rank how many are to come; send.

# %%
one = nanomai.build_model(experts)
seen = []
one.blocks["0"].mlp.experts.register_forward_pre_hook(
    lambda layer, inputs: seen.extend(inputs))
one(ids)
tokens, gates, chosen = (each.detach() for each in seen)  # of 4 x 16
stacks = list(one.blocks["0"].mlp.experts.parameters())  # (E, ., .) each


def all_to_all(boxes):
    """boxes[r][s] is what rank r has for rank s -> what s has got"""
    return [[boxes[r][s] for r in range(R)] for s in range(R)]


def dispatch(x, chosen, k=2, E=4):
    """-> for each rank: rows to send, their counts, and their order"""
    sent, counts, orders = [], [], []
    for mine, experts in zip(x.chunk(R), chosen.chunk(R), strict=True):
        order = experts.flatten().argsort(stable=True)  # (N k / R,)
        count = experts.flatten().bincount(minlength=E).view(R, E // R)
        sent.append(mine[order // k].split(count.sum(1).tolist()))
        counts.append(count)
        orders.append(order)
    return sent, counts, orders

# %% [markdown]
# Each rank then has a box of rows from every rank, sorted by expert, and runs
# its experts on them. The results go back the way they came, a second
# all-to-all, into their places by the inverse permutation, and are weighed.

# %%
def on_experts(rows, count, gate, up, down):
    """rows (M, D), sorted by expert; the experts of this rank"""
    groups = rows.split(count.tolist())
    return torch.cat([mlp(group, gate[e], up[e], down[e])
                      for e, group in enumerate(groups)])


def expert_parallel(x, gates, chosen, *stacks):
    sent, counts, orders = dispatch(x, chosen)
    arrived, coming = all_to_all(sent), all_to_all(counts)
    own = list(zip(*(stack.chunk(R) for stack in stacks), strict=True))
    results = [[on_experts(rows, count, *own[s]) for rows, count
                in zip(arrived[s], coming[s], strict=True)]
               for s in range(R)]
    pairs = [torch.cat(boxes)[order.argsort()] for boxes, order
             in zip(all_to_all(results), orders, strict=True)]
    y = torch.cat(pairs).unflatten(0, (-1, 2))  # (N, k, D)
    return (y * gates[..., None]).sum(1)


tokens.requires_grad_()
outputs = [expert_parallel(tokens, gates, chosen, *stacks),
           moe.dispatch(tokens, gates, chosen, *stacks, "swiglu")]
d_y = torch.linspace(-1, 1, tokens.numel()).view_as(tokens)
assert_close(*outputs, rtol=1e-4, atol=1e-4)
for a, b in zip(*(torch.autograd.grad(y, (tokens, *stacks), d_y)
                  for y in outputs), strict=True):
    assert_close(a, b, rtol=1e-4, atol=1e-4)
print("two ranks equal one:", len(stacks) + 1, "gradients too")

# %% [markdown]
# The two processes kept the counts that they told each other. Ours, from one
# process, must be theirs.
#
# > **Predict.** 128 pairs, two ranks. Does each compute 64?

# %%
compare("expert")
coming = all_to_all(dispatch(tokens, chosen)[1])
for s in range(R):
    ours = [count.tolist() for count in coming[s]]
    assert ours == found["expert"][s]["coming"][0]  # of the first layer
    print(f"rank {s} gets", ours[0], "from rank 0 and", ours[1], "from 1:",
          sum(map(sum, ours)), "rows")
times = found["expert"][0]["collectives"]["all_to_all_single"]
print("all-to-alls in a layer:", times // 4)
assert times == 4 * 5

# %% [markdown]
# Only if the router is fair. All wait for the busiest rank: so in a dropless
# model imbalance (`09_moe`) costs time, not tokens. Of the five all-to-alls
# one is for the counts, two are for rows, and two for their gradients. FSDP
# would gather whole experts; this sends tokens instead, which is less once
# experts outweigh the tokens that meet them.
#
# ## 6 Context parallel: one sequence, many ranks
#
# Long texts fill memory with activations. All of a block works on single
# positions except attention, so each rank can keep $T / R$ positions if it
# gathers everyone's keys and values, which are few with grouped heads. But a
# causal mask makes late positions work harder.
#
# > **Predict.** Eight ranks, consecutive pieces. How many more pairs of query
# > and key does the last have than the first?

# %%
def zigzag(T, R, r):
    """Cut in 2 R pieces: rank r has the r-th and the r-th from the end"""
    pieces = torch.arange(T).chunk(2 * R)
    return torch.cat((pieces[r], pieces[-1 - r]))


def pairs_seen(positions):
    """How many keys these queries look at, all together"""
    return (positions + 1).sum().item()


# %%
T, ranks = 4096, range(8)
in_order = [pairs_seen(piece) for piece in torch.arange(T).chunk(8)]
mirrored = [pairs_seen(zigzag(T, 8, r)) for r in ranks]
mean = sum(in_order) / 8
plt.bar([r - 0.2 for r in ranks], [n / mean for n in in_order], 0.4,
        color="C1", label="consecutive pieces")
plt.bar([r + 0.2 for r in ranks], [n / mean for n in mirrored], 0.4,
        color="C0", label="zigzag")
plt.plot(ranks, [(2 * r + 1) / 8 for r in ranks], "k.--",
         label="(2 r + 1) / R")
plt.xlabel("rank r of 8")
plt.ylabel("pairs of query and key / mean")
plt.legend()
plt.show()
print(f"last over first: {in_order[-1] / in_order[0]:.1f} in order,",
      f"{max(mirrored) / min(mirrored):.1f} in zigzag")
assert in_order[-1] > 14 * in_order[0] and len(set(mirrored)) == 1
assert all(abs(n / mean - (2 * r + 1) / 8) < 0.01
           for r, n in enumerate(in_order))

# %% [markdown]
# About fifteen times as many. In zigzag, a piece and its mirror image, all have
# equally many. (A rank gains by it if its kernel skips what the mask forbids.
# One that is given the mask as a matrix, as the package's is here, computes
# every pair, wherever the pieces lie.) Now the attention: own queries, all keys in
# whatever order the ranks bring them, and a mask that compares *positions*, not
# places.

# %%
q, k, v = (randn(2, 4, 16, 8) for _ in range(3))  # (B, H, T, K)
own = [zigzag(16, R, r) for r in range(R)]
everyone = torch.cat(own)  # as the all-gather brings them
y = torch.empty_like(q)
for mine in own:
    mask = mine[:, None] >= everyone  # (T / R, T)
    y[:, :, mine] = F.scaled_dot_product_attention(
        q[:, :, mine], k[:, :, everyone], v[:, :, everyone], mask)


def check_attention(y):
    plain = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert_close(y, plain)
    for a, b in zip(*(torch.autograd.grad(out.pow(2).sum(), (q, k, v))
                      for out in (y, plain)), strict=True):
        assert_close(a, b)
    print("equal to plain attention, with the gradients of q, k and v")


print("order of the keys:", *everyone.tolist())
check_attention(y)

# %% [markdown]
# In `nanomai/parallel/context.py` the model learns nothing of this. It already
# knows a *cache* (`07_sampling_kv_cache`): something that is given new keys
# and values and returns these behind those of the past. Here something else
# plays that part: other ranks' keys stand where the past would, the last of
# its positions turn this rank's queries and keys (RoPE), and its mask says who
# may look at whom. The two processes kept what their first blocks were given.

# %%
for r in range(R):
    keys, mask = found["context"][r]["keys"]
    print(f"rank {r} sees keys of", *keys.tolist())
    assert torch.equal(keys[-8:], own[r])  # the last are its own
    assert torch.equal(keys.sort().values, torch.arange(16))
    assert torch.equal(mask, own[r][:, None] >= keys)
compare("context")
counts = found["context"][0]["collectives"]
print("gathers of keys and values in a layer:",
      counts["all_gather_into_tensor"] // 4)
assert counts["all_gather_into_tensor"] == 2 * 4

# %% [markdown]
# **Or by heads** (*Ulysses*). Heads do not look at one another. So a rank may
# give away its positions of the others' heads, for all positions of its own:
# an all-to-all. It attends as one process would, in order, with the plain causal
# mask that kernels know, and a second all-to-all changes back. Consecutive
# pieces do, since in attention every rank has every position.

# %%
def swap(parts, cut, join):
    """A part of dimension `cut` for the parts of `join`, on every rank"""
    boxes = all_to_all([x.chunk(R, cut) for x in parts])
    return [torch.cat(box, join) for box in boxes]


by_heads = [swap(x.chunk(R, 2), 1, 2) for x in (q, k, v)]
print("a rank's queries:", tuple(by_heads[0][0].shape))
ys = [F.scaled_dot_product_attention(*qkv, is_causal=True)
      for qkv in zip(*by_heads, strict=True)]  # R of (B, H / R, T, K)
check_attention(torch.cat(swap(ys, 2, 1), 2))

# %% [markdown]
# In the package `Heads` does so around the attention of each block. Queries,
# keys, values and results change places, and so do their gradients: eight
# all-to-alls a layer.

# %%
compare("heads")
counts = found["heads"][0]["collectives"]
print("all-to-alls in a layer:", counts["all_to_all_single"] // 4)
assert counts["all_to_all_single"] == 8 * 4

# %% [markdown]
# To gather keys and values a rank sends $2GTK\,(R-1)/R$ numbers. By heads it
# changes $(2H + 2G)\,TK/R$ of its own, queries, results, keys and values, and
# keeps one part in $R$ of them. (Where $R$ does not divide $G$, key heads are
# copied first until it does.)
#
# > **Predict.** From how many ranks on do heads send less: with a key head for
# > each query head? With one for eight, as in `mai-1-moe`?

# %%
def heads_over_keys(H, G, R):
    return (2 * H + 2 * math.lcm(G, R)) / R / (2 * G)


for G in (64, 8):
    ratios = {ranks: heads_over_keys(64, G, ranks) for ranks in (2, 4, 8, 16)}
    print(f"64 heads, {G:2} of keys:",
          *(f"{ranks} ranks {ratio:.2f} " for ranks, ratio in ratios.items()))
    assert ratios[2] == (64 + G) / (2 * G)
assert heads_over_keys(64, 8, 8) > 1 > heads_over_keys(64, 8, 16)

# %% [markdown]
# With a key head each, as soon as there are more than two ranks; with one for
# eight, from sixteen on: grouped heads make the gather cheap. What speaks for
# heads all the same is that no rank holds the keys of all of them, and that any
# kernel of one rank serves. What limits them is their number: ranks must divide
# it, or `parallel.context_by heads` is refused.
#
# ## 7 At 500B
#
# `mai-1-dense` is this project's own proposal; nothing of MAI-1's
# architecture was reported. Suppose tensor 8, pipeline 8 and fully sharded
# over 16, on 1,024 H100s: a GPU computes with a 64th of the model. What does
# one in a middle stage send while one sequence of 8,192 tokens passes,
# forward and back, in bfloat16? Tensor, pipeline and context follow from
# what we counted. (Recomputation, which the proposal needs, would repeat three
# of tensor's eight collectives.) FSDP gathers each weight once in a step (2
# bytes) and sums its gradient once (4 bytes), for all 128 sequences that a rank
# reads. Context is by keys: tensor 8 leaves a GPU 18 heads, which four ranks
# cannot share.
#
# > **Predict.** Order by bytes: tensor, pipeline, FSDP, and context 4 if we
# > had it too.

# %%
model = nanomai.load_config("mai-1-dense").model
T, t, layers = 8192, 8, model.n_layers // 8
row = 2 * T * model.d_model  # bytes of the stream of one sequence
keys = 2 * 2 * T * model.n_kv_heads * model.head_dim  # K and V, a layer
m = 2**24 // T // 16  # micro-batches: 16.8M tokens, 16 ranks that read
sent = {"tensor 8": 8 * layers * 7 / 8 * row,
        "FSDP 16, its share": 15 / 16 * 6 * model.n_parameters / 64 / m,
        "context 4": 2 * layers * 3 / 4 * keys / t,
        "pipeline 8": 2 * row / t}
plt.figure(figsize=(7, 2.7))
plt.barh(list(sent), [n / 1e9 for n in sent.values()], color="C0")
for name, n in sent.items():
    plt.text(n / 1e9 * 1.15, name, f"{n / 1e9:.2g} GB", va="center")
plt.gca().invert_yaxis()
plt.xscale("log")
plt.xlim(0.02, 200)
plt.xlabel("sent by one GPU for one sequence (GB, log)")
plt.show()
assert sent["tensor 8"] > 50 * max(list(sent.values())[1:])

# %% [markdown]
# Tensor parallel sends nearly a hundred times as much as any other and is waited
# for eight times a block; a pipeline sends next to nothing. What does that
# mean in seconds, by the makers' figures for an H100's links inside a machine
# and for the network between machines? For arithmetic we assume 40 % of the
# peak.

# %%
gpu = DEVICES["h100"]
flops = model.flops_per_token(T) * T / 64  # a 64th of the model
seconds = {"arithmetic": flops / (0.4 * gpu.peak),
           "tensor 8, inside a machine": sent["tensor 8"] / gpu.links,
           "tensor 8, between machines": sent["tensor 8"] / gpu.network,
           "pipeline, between machines": sent["pipeline 8"] / gpu.network}
for name, s in seconds.items():
    print(f"{name:28}{s:6.2f} s")
work, inside, outside, border = seconds.values()
assert border < inside < 0.1 * work and 0.5 * work < outside
print(f"p = 8, m = {m}: ranks wait {7 / (m + 7):.0%} of the time,",
      f"with v = 2 {7 / (2 * m + 7):.0%}")

# %% [markdown]
# So the grid's last axis, neighbours in one machine, is tensor, and its first
# is pipeline: see `AXES` in `nanomai/parallel/layout.py`. Real links reach a
# part of these figures; `15_planning_a_500b_run` says which, and puts memory
# beside time.
#
# ## Exercises
#
# **1. Where the all-reduce goes.** A chain of layers runs on several ranks:
# `"column"` and `"row"` (weights cut so), `"gelu"`, `"norm"` (over all
# channels). Everyone starts with the whole $x$ and must end with the whole
# result. Return what happens before each layer, and at the end: `""`,
# `"all-reduce"` (sum) or `"all-gather"` (join slices); as few as possible. A
# row-cut layer that meets a whole $x$ takes its slice by itself.

# %%
def collectives(layers):
    raise NotImplementedError


sharing.check_collectives(collectives)

# %% [markdown]
# <details><summary>Hint</summary>
#
# What a rank has is whole, a slice of the channels, or a summand. Which layer
# turns which into which? Which layer can bear what?
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# def collectives(layers):
#     plan, state = [], "whole"
#     for layer in [*layers, "end"]:
#         word = ""
#         if state == "summand":
#             word = "all-reduce"
#         elif state == "slice" and layer not in ("row", "gelu"):
#             word = "all-gather"
#         plan.append(word)
#         state = "whole" if word else state
#         state = {"column": "slice", "row": "summand"}.get(layer, state)
#     return plan
# ```
# A summand bears nothing, not even another matrix: the next one is cut.
# </details>
#
# **2. The interleaved bubble.** Return the fewest micro-batches, a multiple of
# `p`, with which the ranks of a pipeline with `v` stages each wait at most
# `1 / n` of all time.

# %%
def micro_batches(p, v, n):
    raise NotImplementedError


sharing.check_micro_batches(micro_batches)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Solve $(p-1)/(vm+p-1) \le 1/n$ for $m$ in whole numbers, then round up to a
# multiple of $p$.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# def micro_batches(p, v, n):
#     rounds = -(-(n - 1) * (p - 1) // (v * p))  # of p micro-batches
#     return p * max(1, rounds)
# ```
# Micro-batches come out of the global batch, so a wide data axis and a deep
# pipeline compete for the same sequences.
# </details>
#
# **3. Choose the mesh.** For `gpus` devices in machines of 8 and a batch of
# `sequences`, return `(pipeline, data, tensor)` with that product, or None.
# Tensor divides 8 and the key-value heads, pipeline divides the layers, data
# divides the sequences; micro-batches are single sequences, and by 1F1B's
# formula ranks wait at most a tenth of the time. Of what is left take the
# smallest tensor, then the smallest pipeline. (Memory is the planner's
# business.)

# %%
def choose_mesh(gpus, sequences, n_layers, n_kv_heads):
    raise NotImplementedError


sharing.check_choose_mesh(choose_mesh)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Two loops; data follows. A data rank has `sequences // data` micro-batches.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# def choose_mesh(gpus, sequences, n_layers, n_kv_heads):
#     for tensor in (1, 2, 4, 8):
#         for pipeline in range(1, n_layers + 1):
#             data, rest = divmod(gpus, tensor * pipeline)
#             fits = (rest == 0 and data > 0 and n_kv_heads % tensor == 0
#                     and n_layers % pipeline == 0
#                     and sequences % data == 0)
#             if fits and 9 * (pipeline - 1) <= sequences // data:
#                 return pipeline, data, tensor
#     return None
# ```
# 10,240 GPUs find no mesh for 512 sequences and 120 layers: the batch is too
# small to be shared so widely. Either it grows, or ranks share sequences.
# </details>
#
# ## Recap
#
# - Tensor parallel cuts products by columns, then rows, and sums once; each
#   block costs eight collectives, so it lives inside a machine.
# - A pipeline sends little and waits $(p-1)/(vm+p-1)$ of the time; expert
#   parallel sends tokens, context parallel keys and values, or positions in
#   exchange for heads.
# - A forgotten sum fits all shapes. Compare gradients with one process.
#
# **What real systems do differently.** They hide collectives behind products
# by cutting both in pieces, split the backward in two to fill the bubble
# (zero bubble, DualPipe), send tokens to few machines, pass keys around a ring
# when all of them do not fit, and share by heads and by keys at once.
#
# **Read on.** [`tensor.py`](../nanomai/parallel/tensor.py),
# [`pipeline.py`](../nanomai/parallel/pipeline.py),
# [`expert.py`](../nanomai/parallel/expert.py),
# [`context.py`](../nanomai/parallel/context.py),
# [`layout.py`](../nanomai/parallel/layout.py). Megatron-LM
# [1909.08053](https://arxiv.org/abs/1909.08053), sequence parallel
# [2205.05198](https://arxiv.org/abs/2205.05198), GPipe
# [1811.06965](https://arxiv.org/abs/1811.06965), 1F1B and interleaving
# [2104.04473](https://arxiv.org/abs/2104.04473), GShard
# [2006.16668](https://arxiv.org/abs/2006.16668), ring attention
# [2310.01889](https://arxiv.org/abs/2310.01889), Ulysses
# [2309.14509](https://arxiv.org/abs/2309.14509), Llama 3
# [2407.21783](https://arxiv.org/abs/2407.21783).
#
# **Next:** `15_planning_a_500b_run` puts all of this on a bill.
