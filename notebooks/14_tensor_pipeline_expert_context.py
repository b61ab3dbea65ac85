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
import functools
import tempfile
from dataclasses import replace
from itertools import accumulate, chain, zip_longest

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch.func import functional_call
from torch.testing import assert_close

import nanomai
from nanomai import moe, ops
from nanomai.architecture import MoEConfig
from nanomai.config import ModelConfig, ParallelConfig
from nanomai.exercises import sharing, sharing_ranks
from nanomai.parallel.launch import launch
from nanomai.planner import DEVICES
from nanomai.show import lesson

lesson()

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
# > are summands. May the sum still wait until the end? And backwards: every
# > rank has the same $x$ and the same gradient of $y$. Do both find the same
# > gradient of $x$?

# %%
generator = torch.Generator().manual_seed(14)
randn = functools.partial(torch.randn, generator=generator,
                          requires_grad=True)
N, D, width, R = 6, 8, 12, 2  # tokens, channels, hidden units, ranks
x, weights = randn(N, D), [randn(width, D), randn(width, D), randn(D, width)]


def mlp(x, gate, up, down):
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


cuts = [w.chunk(R, dim) for w, dim in zip(weights, (0, 0, 1), strict=True)]
whole, parts = mlp(x, *weights), list(map(mlp, [x] * R, *cuts))
assert_close(sum(parts), whole)
print("two ranks,", tuple(parts[0].shape), "each: their sum is the MLP")

# %%
a, b = (x_half @ w_half.T for x_half, w_half in
        zip(x.chunk(R, 1), weights[0].chunk(R, 1), strict=True))
gap = (F.silu(a) + F.silu(b) - F.silu(a + b)).abs().max()
print("summands may go through silu:", gap.item() < 0.1)
assert gap > 0.1

d_y = torch.randn(N, D, generator=generator)
d_whole, d_0, d_1 = (torch.autograd.grad(y, x, d_y)[0]
                     for y in (whole, *parts))
print("gradient of x equal on both ranks:", torch.allclose(d_0, d_1))
assert not torch.allclose(d_0, d_1)
assert_close(d_0 + d_1, d_whole)
print("their sum is the gradient")

# %% [markdown]
# No, and no. $\mathrm{silu}(a) + \mathrm{silu}(b)$ is not
# $\mathrm{silu}(a + b)$: each MLP would need two sums. And $x$ was used twice,
# so its gradient is a sum of two. Where the forward pass hands the same thing
# to all ranks, the backward pass sums, and the other way round: see the pairs
# in `nanomai/parallel/collectives.py`.
#
# **A whole block.** Attention fits the same pattern: a rank takes some heads,
# which are rows of our stored $W_q, W_k, W_v$ and columns of $W_o$. What is
# left, norms and residuals, each rank would do for all tokens. *Sequence
# parallel* gives each $T / R$ of them instead: all-gather before a layer, and
# in place of the sum a reduce-scatter. Together these two send as much as one
# all-reduce, and the stream is held once, not $R$ times.

# %%
CUT = {"wq": 0, "wk": 0, "wv": 0, "wo": 1,
       "w_gate": 0, "w_up": 0, "w_down": 1}


def on_rank(r, layer, *inputs):
    """The package's layer, with rank r's part of each weight"""
    own = {name: w.chunk(R, CUT[name.removesuffix(".weight")])[r]
           for name, w in layer.named_parameters()}
    return functional_call(layer, own, inputs)


def reduce_scatter(parts):
    """R of (B, T, D) -> of their sum (B, T / R, D) for each rank"""
    return sum(parts).chunk(R, 1)

# %%
def tensor_parallel(block, parts, scatter=reduce_scatter,
                    gain=lambda weight, r: weight):
    """parts: each rank's (B, T / R, D) of the stream"""
    for norm, layer, others in (
            (block.attention_norm, block.attention, (None, None)),
            (block.mlp_norm, block.mlp, ())):
        h = [F.rms_norm(x, x.shape[-1:], gain(norm.weight, r), 1e-5)
             for r, x in enumerate(parts)]
        h = torch.cat(h, 1)  # the all-gather: (B, T, D)
        y = scatter([on_rank(r, layer, h, *others) for r in range(R)])
        parts = [x + s for x, s in zip(parts, y, strict=True)]
    return torch.cat(parts, 1)

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
def assert_same(ours, theirs, inputs):
    """Values, and the gradients of `inputs`"""
    d_y = torch.linspace(-1, 1, theirs.numel()).view_as(theirs)
    a, b = ((y, *torch.autograd.grad(y, inputs, d_y, retain_graph=True))
            for y in (ours, theirs))
    assert_close(a, b, rtol=1e-4, atol=1e-4)


config = ModelConfig(n_layers=4, d_model=16, n_heads=4, n_kv_heads=2,
                     head_dim=8, d_ff=24, vocab_size=130,
                     context_length=16, tied_embeddings=False, init_std=0.3)
block, x = nanomai.build_model(config).blocks["0"], randn(3, 16, 16)
inputs, truth = (x, *block.parameters()), block(x, None, None)  # causal
shards = x.chunk(R, 1)
assert_same(tensor_parallel(block, shards), truth, inputs)
print("stream on a rank:", tuple(shards[0].shape))
print("equal to the package, with", len(inputs), "gradients")

# %%
def keep_own(parts):
    return [part.chunk(R, 1)[r] for r, part in enumerate(parts)]


def gain_of_rank_0(weight, r):
    return weight if r == 0 else weight.detach()


for bug in ({"scatter": keep_own}, {"gain": gain_of_rank_0}):
    y = tensor_parallel(block, shards, **bug)
    try:
        assert_same(y, truth, inputs)
    except AssertionError as error:
        print(*bug, "with a bug: values right:",
              torch.allclose(y, truth, 1e-4), "but", type(error).__name__)

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
    log_sums, at_target = [], 0
    for r, weight in enumerate(head.chunk(R)):
        logits = hidden @ weight.T  # (N, V / R)
        mine = targets - r * len(weight)
        here = (mine >= 0) & (mine < len(weight))
        picked = logits.gather(1, mine.where(here, 0)[:, None])[:, 0]
        log_sums.append(logits.logsumexp(1))  # (N,): one number to send
        at_target += picked * here  # (N,): the other
    return (torch.stack(log_sums).logsumexp(0) - at_target).sum()


hidden, head = randn(10, D), randn(130, D)
targets = torch.randint(130, (10,), generator=generator)
assert_same(shared_loss(hidden, head, targets),
            ops.linear_cross_entropy(hidden, head, targets), (hidden, head))
print(f"equal, gradients too; a rank sends 2 numbers a token, not {130 // R}")

# %% [markdown]
# ## 3 Two real processes
#
# Now the package's own code, by `launch` from `nanomai/parallel/launch.py`: it
# spawns processes that meet over gloo, and ends them if they hang (here after
# 100 seconds). They cannot see the cells of a notebook, so what they run is in
# `nanomai/exercises/sharing_ranks.py`. Starting takes seconds; so the same two
# compute all layouts of this notebook, one step each, and later sections open
# their results. Loss and gradients must agree with one process to one part in
# 100,000. The processes have also counted their collectives.
#
# > **Predict.** How many does one block need, forward and backward? And how
# > often are gradients of norms summed, in four blocks?

# %%
experts = replace(config, moe=MoEConfig(n_experts=4, experts_per_token=2,
                                        d_expert=12))
layouts = {"tensor": {"tensor": 2}, "pipeline": {"pipeline": 2},
           "interleaved": {"pipeline": 2, "stages_per_rank": 2},
           "expert": {"expert": 2}, "context": {"context": 2},
           "heads": {"context": 2, "context_by": "heads"}}
jobs = {name: (experts if name == "expert" else config,
               ParallelConfig(**axes)) for name, axes in layouts.items()}
rows = torch.randint(130, (4, 17), generator=generator)
ids, targets = rows[:, :-1], rows[:, 1:]  # (B, T)
with tempfile.TemporaryDirectory() as folder:
    launch(sharing_ranks.compute, 2, folder, jobs, rows.tolist(),
           timeout_s=100)
    found = {name: [torch.load(f"{folder}/{name}-{rank}.pt")
                    for rank in range(2)] for name in jobs}
print("two processes have computed", *found)

# %%
def compare(layout):
    """With one process; returns the collectives of rank 0"""
    model = nanomai.build_model(jobs[layout][0])
    loss = model(ids, targets, reduction="sum")
    loss.backward()
    missing = dict(model.named_parameters())
    for rank in found[layout]:
        assert_close(rank["loss"], loss.detach(), rtol=1e-5, atol=0)
        for name, gradient in rank["gradients"].items():
            true = model.get_parameter(name).grad
            assert (gradient - true).norm() < 1e-5 * true.norm(), name
            missing.pop(name, None)
    assert not missing
    print(f"{layout}: the loss and all gradients are the same")
    return found[layout][0]["collectives"]


times = compare("tensor")
print(times)
moves = times["all_gather_into_tensor"] + times["reduce_scatter_tensor"]
assert moves == 4 * 8 + 5 and times["all_reduce"] == 2 * 4 + 1

# %% [markdown]
# Eight: attention and MLP each gather and scatter forwards, and each has its
# mirror image backwards. (Five more belong to embedding, last norm and loss.)
# Nine gains, two a block and the last norm's, are summed, as the second bug
# above forgot. Eight times in each block all ranks wait for one another: that
# is why this axis stays inside a machine.
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
#
# To play a schedule: a step begins when the one before it on its rank has
# ended and, a forward, when the stage before has sent; a backward, when the
# stage after has. We say that a rank's forward takes one unit of time, and its
# backward two.
#
# > **Predict.** 1F1B begins its backwards earlier than GPipe. Is it done
# > earlier?

# %%
def order(rank, p, m, v=1, warm=None):
    """One rank's list of (forward or backward, stage, micro-batch)"""
    if warm is None:  # forwards before the first backward follows one
        warm = p - 1 - rank if v == 1 else (v - 1) * p + 2 * (p - 1 - rank)
    turns = {"F": range(v), "B": range(v)[::-1]}
    forwards, backwards = ([(kind, rank + p * turn, first + i)
                            for first in range(0, m, p)
                            for turn in turns[kind] for i in range(p)]
                           for kind in turns)
    todo = forwards[:warm]
    for pair in zip_longest(forwards[warm:], backwards):
        todo += filter(None, pair)
    return todo


print("1F1B, rank 0 of 2, 4 micro-batches:",
      *(f"{kind}{i}" for kind, _, i in order(0, 2, 4)))

# %%
def simulate(orders):
    """-> {step: (when it ends, how long it takes)}, and the wait"""
    before = {b: a for steps in orders
              for a, b in zip([None, *steps], steps, strict=False)}
    v = (1 + max(stage for _, stage, _ in before)) // len(orders)
    length = {"F": 1 / v, "B": 2 / v}

    @functools.cache
    def end(step):
        kind, stage, i = step
        sender = (kind, stage + (1 if kind == "B" else -1), i)
        ends = [end(s) for s in (before[step], sender) if s in before]
        return max(ends, default=0) + length[kind]

    work = sum(length[kind] for kind, _, _ in before) / len(orders)
    times = {step: (end(step), length[step[0]]) for step in before}
    return times, 1 - work / max(map(end, before))

# %%
p, m = 4, 8
schedules = {"GPipe": [order(r, p, m, warm=m) for r in range(p)],
             "1F1B": [order(r, p, m) for r in range(p)],
             "interleaved, v = 2": [order(r, p, m, 2) for r in range(p)]}
figure, axes = plt.subplots(3, 1, figsize=(9.5, 6.3), sharex=True,
                            layout="constrained")
shades = {"F": ("#9ecae1", "#deebf7"), "B": ("#fdae6b", "#fee6ce")}
for ax, (name, orders) in zip(axes, schedules.items(), strict=True):
    times, wait = simulate(orders)
    for (kind, stage, i), (end, length) in times.items():
        ax.barh(stage % p, length, left=end - length, height=0.9, lw=0.6,
                edgecolor="0.35", color=shades[kind][stage // p])
        ax.text(end - length / 2, stage % p, i, ha="center", va="center",
                fontsize=9 if length >= 1 else 7)
    ax.set(ylabel="rank", yticks=range(p), ylim=(p - 0.5, -0.5),
           title=f"{name}: ranks wait {wait:.0%} of the time")
    ax.grid(False)
axes[2].set_xlabel("time (forwards of one micro-batch on one rank); "
                   "blue forward, orange backward; pale: second stage")
plt.show()

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
# GPipe holds those of all $m$ micro-batches, 1F1B never more than there are
# stages from here to the end, and interleaving pays for its shorter waits with
# memory, and with about $v$ times as many messages.
#
# The package leaves the order to `torch.distributed.pipelining`. Our two
# processes wrote down when each of their stages went forward and back.

# %%
assert_close([simulate(orders)[1] for orders in schedules.values()],
             [3 / 11, 3 / 11, 3 / 19])
for v, color in ((1, "C0"), (2, "C1"), (4, "C2")):
    batches = range(4, 33, 4)
    theory = [(p - 1) / (v * m + p - 1) for m in batches]
    waits = [simulate([order(r, p, m, v) for r in range(p)])[1]
             for m in batches]
    assert_close(waits, theory)
    plt.plot(batches, [100 * w for w in waits], color + "o")
    plt.plot(batches, [100 * w for w in theory], color + "--",
             label=f"v = {v}")
plt.xlabel("micro-batches m")
plt.ylabel("ranks wait (% of the time)")
plt.legend(title="4 ranks; dots: simulated\ndashed: theory")
plt.show()

# %%
for (name, orders), v in zip(schedules.items(), (1, 1, 2), strict=True):
    most = [max(accumulate(1 if kind == "F" else -1 for kind, _, _ in steps))
            for steps in orders]  # stages of micro-batches in flight
    print(f"{name}: ranks hold at most", *(f"{n / v:g}" for n in most),
          "micro-batches")
    assert name != "1F1B" or most == [4, 3, 2, 1]

for layout, v in (("pipeline", 1), ("interleaved", 2)):
    compare(layout)
    for rank in range(2):
        planned = [(kind, s // 2) for kind, s, _ in order(rank, 2, 4, v)]
        assert found[layout][rank]["order"] == planned
        print(f"  rank {rank} did as we planned:",
              "".join(kind for kind, _ in planned))

# %% [markdown]
# ## 5 Expert parallel: tokens travel
#
# In a mixture of experts most weights belong to experts, and a token meets
# few of them. So each rank keeps *some experts whole*, and tokens go to where
# their experts are: an *all-to-all*, in which every rank has something
# different for every other. (Real ranks first tell each other how many rows
# are to come.) Each runs its experts on the boxes that have come, sorted by
# expert. The results go back the way they came, by a second all-to-all, and
# are weighed. Tokens and choices here are those of the model's own router.
#
# > **Predict.** 64 tokens choose two experts each: 128 pairs. Does each of two
# > ranks compute 64?

# %%
one, seen = nanomai.build_model(experts), []
layer = one.blocks["0"].mlp.experts
layer.register_forward_pre_hook(lambda layer, inputs: seen.extend(inputs))
one(ids)
tokens, gates, chosen = (x.detach() for x in seen)  # (N, D), (N, 2) twice
stacks = list(layer.parameters())  # (4, ., .) each


def all_to_all(boxes):
    """boxes[r][s] is what rank r has for rank s -> [s][r]"""
    return [list(column) for column in zip(*boxes, strict=True)]


def dispatch(x, chosen):
    """[r][e]: which pairs; [r][s][e]: their rows, by owner and expert"""
    pairs = [[(mine == e).nonzero().T for e in range(4)]
             for mine in chosen.chunk(R)]  # (token, first or second choice)
    rows = [[own[token] for token, _ in of_rank]
            for own, of_rank in zip(x.chunk(R), pairs, strict=True)]
    return pairs, [[of_rank[:2], of_rank[2:]] for of_rank in rows]

# %%
def expert_parallel(x, gates, chosen, *stacks):
    pairs, boxes = dispatch(x, chosen)
    results = [[[mlp(rows, *(stack[2 * s + e] for stack in stacks))
                 for e, rows in enumerate(box)] for box in arrived]
               for s, arrived in enumerate(all_to_all(boxes))]
    ys = [torch.zeros_like(own) for own in x.chunk(R)]
    for r, came_back in enumerate(all_to_all(results)):
        gate = gates.chunk(R)[r]
        for pair, rows in zip(pairs[r], chain(*came_back), strict=True):
            rows = rows * gate[*pair, None]
            ys[r] = ys[r].index_add(0, pair[0], rows)
    return torch.cat(ys)


tokens.requires_grad_()
assert_same(expert_parallel(tokens, gates, chosen, *stacks),
            moe.dispatch(tokens, gates, chosen, *stacks, "swiglu"),
            (tokens, *stacks))
print("two ranks equal one:", len(stacks) + 1, "gradients too")

# %%
times = compare("expert")
_, boxes = dispatch(tokens, chosen)
for s, arrived in enumerate(all_to_all(boxes)):
    ours = [[len(rows) for rows in box] for box in arrived]
    assert ours == found["expert"][s]["coming"][0]  # of the first layer
    print(f"rank {s} gets", ours[0], "from rank 0 and", ours[1], "from 1:",
          sum(map(sum, ours)), "rows")
print("all-to-alls in a layer:", times["all_to_all_single"] // 4)
assert times["all_to_all_single"] == 4 * 5

# %% [markdown]
# Only a fair router would give each 64. (The two processes told each other the
# same counts as ours.) All wait for the busiest rank: so in a dropless model
# imbalance (`09_moe`) costs time, not tokens. Of the five all-to-alls one is for
# the counts, two are for rows, and two for their gradients. FSDP would gather
# whole experts; this sends tokens instead, which is less once experts outweigh
# the tokens that meet them.
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


ranks = torch.arange(8)
theory = (2 * ranks + 1) / 8
cuts = (("consecutive pieces", torch.arange(4096).chunk(8), theory),
        ("zigzag", [zigzag(4096, 8, r) for r in ranks], torch.ones(8)))
for i, (name, pieces, expected) in enumerate(cuts):
    pairs = torch.stack([(piece + 1.0).sum() for piece in pieces])
    print(f"{name}: most / least is {pairs.max() / pairs.min():.1f}")
    pairs /= pairs.mean()
    plt.bar(ranks - 0.2 + 0.4 * i, pairs, 0.4, label=name)
    assert_close(pairs, expected, atol=0.001, rtol=0)
plt.plot(ranks, theory, "k.--", label="(2 r + 1) / R")
plt.gca().set(xlabel="rank r of 8", ylabel="pairs of query and key / mean")
plt.legend()
plt.show()

# %% [markdown]
# About fifteen times as many. In zigzag, a piece and its mirror image, all have
# equally many. Now the attention: own queries, all keys in whatever order the
# ranks bring them, and a mask that compares *positions*, not places.
#
# In `nanomai/parallel/context.py` the model learns nothing of this. It already
# knows a *cache* (`07_sampling_kv_cache`): something that is given new keys
# and values and returns older ones with them. Here the others do not come
# from the past, but from other ranks. And since a matrix would be computed
# whole, hidden pairs too, the package puts the keys in order and lets each of
# the two pieces attend to those up to its own end: causal, without a matrix.

# %%
q, k, v = (randn(2, 4, 16, 8) for _ in range(3))  # (B, H, T, K)
plain = F.scaled_dot_product_attention(q, k, v, is_causal=True)
own = [zigzag(16, R, r) for r in range(R)]
everyone = torch.cat(own)  # as the all-gather brings them
y = torch.empty_like(q)
for mine in own:
    mask = mine[:, None] >= everyone  # (T / R, T)
    y[:, :, mine] = F.scaled_dot_product_attention(
        q[:, :, mine], k[:, :, everyone], v[:, :, everyone], mask)
print("order of the keys:", *everyone.tolist())
assert_same(y, plain, (q, k, v))
print("equal to plain attention, with the gradients of q, k and v")

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
assert_same(torch.cat(swap(ys, 2, 1), 2), plain, (q, k, v))
print("equal to plain attention again")

# %% [markdown]
# What do they send? To gather keys and values a rank sends $2GTK\,(R-1)/R$
# numbers. By heads it changes $(2H + 2G)\,TK/R$ of its own, queries, results,
# keys and values, and keeps one part in $R$ of them. (Where $R$ does not divide
# $G$, key heads are copied first until it does.)
#
# > **Predict.** From how many ranks on do heads send less: with a key head for
# > each query head? With one for eight, as in `mai-1-moe`?

# %%
for layout, collective, in_a_layer in (
        ("context", "all_gather_into_tensor", 2),  # keys, values
        ("heads", "all_to_all_single", 8)):  # q, k, v, y; gradients
    assert compare(layout)[collective] == 4 * in_a_layer
    print("  in a layer:", in_a_layer, collective)
for r in range(R):  # what the embedding was given
    assert torch.equal(found["context"][r]["ids"], ids[:, own[r]])
    assert torch.equal(found["heads"][r]["ids"], ids.chunk(R, 1)[r])

for G in (64, 8):
    ratios = {R: (2 * 64 + 2 * max(G, R)) / R / (2 * G)  # with copies
              for R in (2, 4, 8, 16)}
    print(f"{G} key heads, by heads / by keys:",
          ", ".join(f"{ratio:.2f} on {R}" for R, ratio in ratios.items()))
assert ratios[8] > 1 > ratios[16]

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
# cannot share. For seconds we take the makers' figures for an H100's links
# inside a machine and for the network between machines, and assume 40 % of the
# peak for arithmetic.
#
# > **Predict.** Order by bytes: tensor, pipeline, FSDP, and context 4 if we
# > had it too. Which could leave the machine?

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
plt.gca().set(xscale="log", xlim=(0.02, 200),
              xlabel="sent by one GPU for one sequence (GB, log)")
plt.show()
assert sent["tensor 8"] > 50 * max(list(sent.values())[1:])

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
# Tensor parallel sends nearly a hundred times as much as any other and is waited
# for eight times a block; a pipeline sends next to nothing. So the grid's last
# axis, neighbours in one machine, is tensor, and its first is pipeline: see
# `AXES` in `nanomai/parallel/layout.py`. Real links reach a part of these
# figures; `15_planning_a_500b_run` says which, and puts memory beside time.
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
