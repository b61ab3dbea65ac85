# %% [markdown]
# # 04 · How does attention tell order, and stay affordable?
#
# **Goal.** Give attention positions by rotation (RoPE), share keys and values
# among heads (GQA), and compute it in small tiles (flash attention), each
# equal to the package in values and in gradients.
#
# **Prerequisites.** `03_attention`; complex numbers as points that turn.
# **Time.** About 60 minutes; it runs in a few seconds.
#
# **You will be able to**
# - show that a rotated score depends on the distance alone;
# - compute the bytes of a key-value cache, and say what sharing heads saves;
# - derive the online softmax, tiled attention, and its backward pass;
# - count the bytes that tiles save.

# %%
import cmath
import math

import matplotlib.pyplot as plt
import torch
from torch.testing import assert_close

import nanomai
from nanomai import ops
from nanomai.model import Attention
from nanomai.sampling import KVCache
from nanomai.show import lesson

lesson()
generator = torch.Generator().manual_seed(4)


def value_and_gradients(f, *inputs):
    """As in notebook 03: f's output, and what a fixed gradient pulls back."""
    inputs = [z.detach().clone().requires_grad_() for z in inputs]
    y = f(*inputs)
    upstream = torch.linspace(-1, 1, y.numel()).view_as(y)
    return (y.detach(), *torch.autograd.grad(y, inputs, upstream))


# %% [markdown]
# ## 1 Does attention know the order?
#
# Let the last token ask its question twice: once of the past as it was, once of
# the same keys and values in another order.
#
# > **Predict.** By how much does its answer change?

# %%
B, H, T, K = 2, 4, 9, 8
q, k, v = torch.randn(3, B, H, T, K, generator=generator)
order = [*torch.randperm(T - 1, generator=generator).tolist(), T - 1]
plain = ops.attention(q, k, v)[:, :, -1]  # (B, H, K)
shuffled = ops.attention(q, k[:, :, order], v[:, :, order])[:, :, -1]
assert order != sorted(order)
assert_close(plain, shuffled)
print("past read in the order", order)
print("the last answer is the same:", tuple(plain.shape))

# %% [markdown]
# Not at all. Scores are dot products, the answer is a weighted mean, and
# neither knows where a key stood: "dog bites man" and "man bites dog" are one
# bag of words. (Deeper layers can infer some order from the causal mask, which
# shows each word only what came before it. It is better to tell them.)
#
# ## 2 Turn each vector by its position
#
# The position has to enter the scores. See two numbers $(a, b)$ of a query as
# the complex number $q = a + ib$, and two of a key as $k$. Their dot product is
# $\mathrm{Re}(q \bar k)$, where the bar turns $i$ into $-i$. Now turn the query
# at position $m$ by the angle $m\omega$ and the key at $n$ by $n\omega$:
#
# $$\mathrm{Re}\left(q e^{im\omega} \cdot \overline{k e^{in\omega}}\right)
#   = \mathrm{Re}\left(q \bar k \, e^{i(m-n)\omega}\right).$$
#
# The two positions have become their difference. We try it on one pair.

# %%
pair_q, pair_k = 2 + 1j, 1 - 1j


def pair_score(m, n, omega=0.3):
    turned_q = pair_q * cmath.exp(1j * m * omega)
    turned_k = pair_k * cmath.exp(1j * n * omega)
    return (turned_q * turned_k.conjugate()).real


for m, n in [(5, 2), (105, 102), (5, 3), (2, 5)]:
    print(f"m {m:3}, n {n:3}, m - n {m - n:2}: {pair_score(m, n):6.3f}")
assert abs(pair_score(5, 2) - pair_score(105, 102)) < 1e-4
assert abs(pair_score(5, 2) - pair_score(2, 5)) > 1e-2

# %% [markdown]
# One speed is not enough: it comes round again after $2\pi/\omega$ positions.
# RoPE (Su et al. 2021) gives each of the $K/2$ pairs its own,
# $\omega_i = \theta^{-2i/K}$ for $i = 0, 1, \dots$, from one radian a position
# down to about $1/\theta$, like the hands of a clock. The paper takes
# $\theta$ = 10,000 and pairs neighbours. We pair number $i$ with $i + K/2$, as
# Llama does: dot products do not mind the order, if $q$ and $k$ agree on it.
#
# `ops.rotary_table` makes cosines and sines once for all layers, and
# `ops.rotary` turns with real numbers only. Are they equal to ours?

# %%
def rope_complex(x, positions, theta):
    """x (B, H, T, K), turned by positions (T,)."""
    K = x.shape[-1]
    omega = theta ** (-2 * torch.arange(K // 2) / K)  # (K/2,)
    angle = positions[:, None] * omega  # (T, K/2)
    turn = torch.polar(torch.ones_like(angle), angle)  # e^(i angle)
    y = torch.complex(x[..., : K // 2], x[..., K // 2 :]) * turn
    return torch.cat([y.real, y.imag], -1)


theta, positions = 10_000.0, torch.arange(5, 5 + T)
table = ops.rotary_table(positions, K, theta)  # two of (T, K/2)
ours = value_and_gradients(lambda x: rope_complex(x, positions, theta), q)
for turn in (ops.rotary, ops.rotary_plain):
    assert_close(value_and_gradients(lambda x, f=turn: f(x, *table), q), ours)
assert_close(ours[0].norm(dim=-1), q.norm(dim=-1))
print("table", tuple(table[0].shape), "- equal; no vector changed its length")

# %% [markdown]
# What if positions are wrong by one? Add 1 to those of queries *and* keys; then
# to those of the keys alone, as a cache does that miscounts.
#
# > **Predict.** Which of the two changes the scores?

# %%
def scores(query_positions, key_positions):
    turned_q = ops.rotary(q, *ops.rotary_table(query_positions, K, theta))
    turned_k = ops.rotary(k, *ops.rotary_table(key_positions, K, theta))
    return turned_q @ turned_k.mT  # (B, H, T, T)


right = scores(positions, positions)
assert_close(scores(positions + 1, positions + 1), right)
print("both shifted: the same scores")
try:
    assert_close(scores(positions, positions + 1), right)
except AssertionError as error:
    print("keys shifted:", type(error).__name__)

# %% [markdown]
# Only the second. A test of scores alone would miss the first, which is why we
# compared the rotated vectors themselves before.
#
# How does distance change a score? Take a query equal to its key, all ones.
# Each pair gives $2\cos(d\,\omega_i)$ at distance $d$, so the score divided by
# $K$ is the mean of the cosines. We measure it with the package, the key once
# at position 0 and once at 1000.

# %%
K_, distances = 64, torch.arange(1, 8193)


def measured(start, theta):
    """Score / K of a key at `start` and queries beyond it, all of ones."""
    query, key = torch.ones(1, 1, 8192, K_), torch.ones(1, 1, 1, K_)
    query = ops.rotary(query, *ops.rotary_table(start + distances, K_, theta))
    key = ops.rotary(key, *ops.rotary_table(torch.tensor([start]), K_, theta))
    return (query @ key.mT).flatten() / K_  # (8192,)


def mean_cosine(theta):
    omega = theta ** (-2 * torch.arange(K_ // 2) / K_)  # (K/2,)
    return (distances[:, None] * omega).cos().mean(-1)  # (8192,)


# %%
few = 2 ** torch.arange(14) - 1  # at distances 1, 2, 4, ..., 8192
for color, base in (("C0", 1e4), ("C1", 5e5)):
    name = rf"$\theta$ = {base:,.0f}"
    plt.plot(distances, mean_cosine(base), color, lw=0.4, alpha=0.6,
             label=f"theory, {name}")
    for start, style in ((0, color + "o"), (1000, "kx")):
        score = measured(start, base)
        assert_close(score, mean_cosine(base), rtol=0, atol=2e-3)
        plt.plot(distances[few], score[few], style, mec="k",
                 label=f"measured from {start}, {name}")
plt.xscale("log", base=2)
plt.xlabel("distance m - n (tokens, log axis)")
plt.ylabel("score / K")
plt.legend(fontsize=8)
plt.show()

# %% [markdown]
# Circles and crosses coincide: distance is all that counts. On the whole the
# score falls: of two keys that equal the query, the nearer usually wins. A
# larger $\theta$ makes it fall later; hence models for long texts raise it.
#
# ## 3 Share keys and values
#
# A model that writes needs the keys and values of the whole past for every new
# token, so it keeps them: the *KV cache*. Grouped-query attention (GQA, Ainslie
# et al. 2023) has only $G < H$ heads of keys and values; each serves $H/G$
# neighbouring query heads. Query head $h$ reads key-value head
# $\lfloor h / (H/G) \rfloor$. A tempting slip is $h \bmod G$, which deals the
# heads out like cards.

# %%
G = 2
k, v = torch.randn(2, B, G, T, K, generator=generator)  # q has H = 4 heads


def grouped_loop(q, k, v, dealt=False):
    heads = []
    for h in range(H):
        g = h % G if dealt else h // (H // G)
        one = (q[:, [h]], k[:, [g]], v[:, [g]])  # (B, 1, T, K) each
        heads.append(ops.attention(*one))
    return torch.cat(heads, dim=1)  # (B, H, T, K)


assert_close(value_and_gradients(ops.attention, q, k, v),
             value_and_gradients(grouped_loop, q, k, v))
print("grouped equals one head at a time, values and gradients")
try:
    assert_close(ops.attention(q, k, v), grouped_loop(q, k, v, dealt=True))
except AssertionError as error:
    print("heads dealt out:", type(error).__name__)

# %% [markdown]
# GQA is ordinary attention with repeated heads. A layer of four heads by hand,
# rotation included, with key and value weights copied within each group, must
# equal `nanomai.model.Attention`, which holds them once. The gradient of a
# shared weight is then the *sum* over its copies.

# %%
D = 24
wq, wk, wv, wo = (torch.randn(n * K, D, generator=generator) / 5
                  for n in (H, G, G, H))
x = torch.randn(B, T, D, generator=generator)
config = nanomai.ModelConfig(d_model=D, n_heads=H, n_kv_heads=G, head_dim=K)


def package(x, wq, wk, wv, wo):
    weights = {"wq.weight": wq, "wk.weight": wk, "wv.weight": wv,
               "wo.weight": wo.T}
    return torch.func.functional_call(Attention(config), weights,
                                      (x, table, None))


def by_hand(x, wq, wk, wv, wo):
    q, k, v = ((x @ w.T).unflatten(-1, (H, K)).transpose(1, 2)
               for w in (wq, wk, wv))  # (B, H, T, K) each
    q, k = (rope_complex(y, positions, theta) for y in (q, k))
    y = ops.attention(q, k, v).transpose(1, 2)  # (B, T, H, K)
    return y.flatten(2) @ wo  # here wo is (H K, D); the package transposes it


# %%
def copied(w):  # (G K, D) -> (H K, D)
    groups = w.view(G, 1, K, D).expand(-1, H // G, -1, -1)
    return groups.reshape(H * K, D)


shared = value_and_gradients(package, x, wq, wk, wv, wo)
full = value_and_gradients(by_hand, x, wq, copied(wk), copied(wv), wo)
summed = [g.view(G, H // G, K, D).sum(1).view(G * K, D) for g in full[3:5]]
assert_close(shared, (*full[:3], *summed, full[5]))
print("shared = copied; gradients of the copies add up:",
      tuple(full[3].shape), "->", tuple(shared[3].shape))

# %% [markdown]
# The gain is memory. For each token the cache holds two vectors (key, value)
# times layers, times $G$, times $K$ numbers. We compare that formula with the
# bytes in the package's cache, in a model of three layers.

# %%
groups, counted, formula = [1, 2, 4, 8], [], []
for G_ in groups:
    small = nanomai.ModelConfig(n_layers=3, n_heads=8, n_kv_heads=G_,
                                head_dim=16, d_model=32, vocab_size=32)
    cache = KVCache(nanomai.build_model(small), batch_size=1, capacity=50)
    held = sum(c.keys.nbytes + c.values.nbytes for c in cache.layers)
    counted.append(held / 50)
    formula.append(2 * 3 * G_ * 16 * 4)  # float32
    assert counted[-1] == formula[-1] == small.kv_cache_bytes_per_token(4)

plt.plot(groups, formula, "k--", lw=1,
         label="formula: 2 x 3 layers x G x K x 4 bytes")
plt.plot(groups, counted, "o", label="counted in the cache")
plt.xticks(groups, ["1\n(multi-query)", "2", "4", "8\n(every head)"])
plt.xlabel("key-value heads G, of 8 query heads")
plt.ylabel("cache (bytes per token)")
plt.ylim(0)
plt.legend()
plt.show()

# %% [markdown]
# ## 4 A softmax that never sees the whole row
#
# Notebook 03 ended with 19 GB of scores. Must they all exist at once? A
# softmax seems to need the whole row: its largest score (subtracted so that
# $e^s$ cannot overflow) and its sum. But both can be *corrected*. Go through
# the row in tiles and keep three things: the largest score so far $m$ (not a
# position now), $z = \sum e^{s - m}$, and $o = \sum e^{s - m} v$. When a tile
# brings a larger maximum $m'$, multiply $z$ and $o$ by $e^{m - m'}$, which
# turns each $e^{s - m}$ into $e^{s - m'}$. In the end $o / z$ is the answer.

# %%
def online(scores, values, tile, rescale=True):
    """softmax(scores) @ values, a tile at a time: (S,), (S, K) -> (K,)."""
    m, z, o = torch.tensor(-torch.inf), 0.0, 0.0
    for s, v in zip(scores.split(tile), values.split(tile), strict=True):
        new = torch.maximum(m, s.max())
        keep = (m - new).exp() if rescale else 1.0  # e^-inf = 0 at first
        p = (s - new).exp()
        z, o, m = z * keep + p.sum(), o * keep + p @ v, new
    return o / z


s = 3 * torch.randn(50, generator=generator)
values = torch.randn(50, K, generator=generator)
exact = s.softmax(-1) @ values
for tile in (1, 7, 50):
    assert_close(online(s, values, tile), exact)
large = s + 1000  # e^1000 would overflow
assert_close(online(large, values, 7), large.softmax(-1) @ values)
print("tiles of 1, 7 and 50 agree; kept between tiles:", K + 2, "numbers")

# %% [markdown]
# > **Predict.** Forget the correction factor. For which order of the scores
# > is the answer right nevertheless?

# %%
for name, order in (("as they come", torch.arange(50)),
                    ("rising", s.argsort()),
                    ("falling", s.argsort(descending=True))):
    place = s[order].argmax().item()
    try:
        wrong = online(s[order], values[order], 7, rescale=False)
        assert_close(wrong, exact)
        print(f"{name:12} largest in tile {place // 7 + 1}: right, by luck")
    except AssertionError as error:
        print(f"{name:12} largest in tile {place // 7 + 1}:",
              type(error).__name__)

# %% [markdown]
# With the largest score in the first tile, as our row happens to have it,
# nothing needs correcting. A test on such data would pass a wrong function.
#
# Now whole attention. Take a tile of queries, go through the tiles of keys and
# values up to the diagonal, and never hold more than one tile of scores.
# `load` and `store` count the bytes that they pass on, for section 5. Besides
# the output, keep $L = m + \ln z$ of each row: with it any weight can be made
# again as $p = e^{s - m} / z = e^{s - L}$.

# %%
traffic = {"bytes": 0}


def load(x, start, size):
    part = x[..., start : start + size, :]
    traffic["bytes"] += part.nbytes
    return part


def store(tiles):
    whole = torch.cat(tiles, -2)
    traffic["bytes"] += whole.nbytes
    return whole


def tile_scores(qi, kj, i, j):
    """Scaled and causal: query tile from row i, key tile from column j."""
    s = qi @ kj.mT / math.sqrt(qi.shape[-1])
    rows = i + torch.arange(s.shape[-2])[:, None]
    columns = j + torch.arange(s.shape[-1])
    return s.masked_fill(columns > rows, -torch.inf)


# %%
def tiled_forward(q, k, v, tile):
    """q, k, v (..., T, K) -> output (..., T, K) and L (..., T, 1)."""
    out, logs = [], []
    for i in range(0, q.shape[-2], tile):
        qi = load(q, i, tile)
        m = torch.full_like(qi[..., :1], -torch.inf)
        z, o = torch.zeros_like(m), torch.zeros_like(qi)
        for j in range(0, i + 1, tile):  # the rest is the future
            s = tile_scores(qi, load(k, j, tile), i, j)
            new = torch.maximum(m, s.amax(-1, keepdim=True))
            keep, p = (m - new).exp(), (s - new).exp()
            z = z * keep + p.sum(-1, keepdim=True)
            o, m = o * keep + p @ load(v, j, tile), new
        out.append(o / z)
        logs.append(m + z.log())
    return store(out), torch.cat(logs, -2)


T = 37
q, k, v = torch.randn(3, B, H, T, K, generator=generator)
dense = ops.attention(q, k, v)
for tile in (1, 8, 16, 64):
    difference = (tiled_forward(q, k, v, tile)[0] - dense).abs().max()
    assert difference < 5e-6
print("tiles of 1, 8, 16, 64 at T = 37: equal, but for rounding")

# %% [markdown]
# Training needs gradients, and autograd would store every tile's weights: the
# whole matrix again. Flash attention makes them anew instead. Write $dx$ for
# the gradient of the loss with respect to $x$; $do$ is given. From $o = p\,v$
# follow $dv = p^\top do$ and $dp = do\,v^\top$. The softmax's derivative (03)
# gives
#
# $$ds_{ij} = p_{ij}\,(dp_{ij} - \delta_i), \qquad
#   \delta_i = \sum_j p_{ij}\,dp_{ij}
#            = do_i \cdot \sum_j p_{ij} v_j = do_i \cdot o_i.$$
#
# So the sum over a whole row takes only the output, and the rest can be done in
# tiles: $dq = ds\,k/\sqrt K$ and $dk = ds^\top q/\sqrt K$.

# %%
def tiled_backward(q, k, v, o, log, do, tile):
    """The gradients of q, k, v from `do`, that of the output."""
    def at(x, i):
        return x[..., i : i + tile, :]

    dq, dk, dv = (torch.zeros_like(z) for z in (q, k, v))
    delta = (do * o).sum(-1, keepdim=True)  # (..., T, 1)
    for i in range(0, q.shape[-2], tile):
        for j in range(0, i + 1, tile):
            s = tile_scores(at(q, i), at(k, j), i, j)
            p = (s - at(log, i)).exp()  # the weights, made again
            dp = at(do, i) @ at(v, j).mT
            ds = p * (dp - at(delta, i)) / math.sqrt(q.shape[-1])
            at(dv, j).add_(p.mT @ at(do, i))
            at(dq, i).add_(ds @ at(k, j))
            at(dk, j).add_(ds.mT @ at(q, i))
    return dq, dk, dv


# %%
class Flash(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, tile):
        o, log = tiled_forward(q, k, v, tile)
        ctx.save_for_backward(q, k, v, o, log)  # no scores, no weights
        ctx.tile = tile
        return o

    @staticmethod
    def backward(ctx, do):
        return (*tiled_backward(*ctx.saved_tensors, do, ctx.tile), None)


reference = value_and_gradients(ops.attention, q, k, v)
for tile in (1, 8, 64):
    ours = value_and_gradients(
        lambda *z, n=tile: Flash.apply(*z, n), q, k, v)
    assert_close(ours, reference)
print("output, dq, dk, dv: tiled equals dense, but for rounding")

# %% [markdown]
# What does each version keep until the backward pass? PyTorch tells, through a
# hook on every tensor that is saved.
#
# > **Predict.** One head, $T = 512$, $K = 64$. How many numbers has the
# > largest saved tensor, dense and tiled?

# %%
def largest_saved(attend, T=512, K=64):
    x = torch.randn(3, 1, 1, T, K, generator=generator).requires_grad_()
    sizes = []

    def keep(saved):
        sizes.append(saved.numel())
        return saved

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda y: y):
        attend(*x.unbind(0))
    return max(sizes)


dense_saved = largest_saved(ops.attention_plain)
tiled_saved = largest_saved(lambda *z: Flash.apply(*z, 128))
print("dense", dense_saved, "= 512 x 512; tiled", tiled_saved, "= 512 x 64")
assert (dense_saved, tiled_saved) == (512 * 512, 512 * 64)

# %% [markdown]
# ## 5 Bytes moved
#
# A GPU has little fast memory on the chip and much slow memory beside it.
# Count what crosses between them. Dense attention takes three steps (scores,
# softmax, product with $V$), and each reads and writes its matrices:
# $4T^2 + 4TK$ numbers. Tiles read each query and write each output once, and
# read keys and values up to the diagonal for each tile of queries. With
# $n = T/\text{tile}$ that makes $TK(n + 3)$, leaving out the $T$ numbers of
# $L$. Larger tiles move less, but four tiles of vectors ($q$, $k$, $v$, $o$)
# and one of scores must fit into the 228 KB of one processor of an H100.
#
# > **Predict.** $T = 512$, $K = 64$. Do tiles of 8 rows beat dense attention?

# %%
T, K_, tiles = 512, 64, [8, 16, 32, 64, 128, 256, 512]
x = torch.randn(3, T, K_, generator=generator)
moved = []
for tile in tiles:
    traffic["bytes"] = 0
    tiled_forward(*x, tile)
    moved.append(traffic["bytes"])
formula = [4 * T * K_ * (T // tile + 3) for tile in tiles]
dense_moved = 4 * (4 * T * T + 4 * T * K_)
fits = [tile for tile in tiles
        if 4 * (4 * tile * K_ + tile * tile) <= 228 * 1024]
assert moved == formula and fits[-1] == 128
assert moved[0] > 1.8 * dense_moved and moved[-1] == 4 * 4 * T * K_
for tile, n in zip(tiles, moved, strict=True):
    verdict = "fits" if tile in fits else "too large for the chip"
    print(f"tiles of {tile:3}: {n / dense_moved:.2f} of dense, {verdict}")

# %%
plt.loglog(tiles, formula, "k--", lw=1, label="formula: 4 T K (n + 3)")
plt.loglog(tiles, moved, "o", label="counted")
plt.axhline(dense_moved, color="C1", label="dense: 4 (4 T² + 4 T K)")
plt.axhline(moved[-1], color="k", ls=":", lw=1, label="each number once")
plt.axvline(fits[-1], color="C2", lw=1, label="largest tile in 228 KB")
plt.xticks(tiles, tiles)
plt.xlabel("tile (rows, log axis)")
plt.ylabel("moved for one head (bytes, log axis)")
plt.legend(loc=(0.02, 0.08))
plt.show()

# %% [markdown]
# No: they move nearly twice as much, because every eight queries read all the
# past again. Tiling alone saves no traffic; *large* tiles do, and the chip's
# memory decides how large they may be.
#
# ## 6 Exercises
#
# **1 · Shift invariance.** Return one number: the rotated score (not divided
# by $\sqrt K$) of `q` and `k`, both `(K,)` and not yet turned, from their
# distance $d = m - n$ alone. Number $i$ belongs with number $i + K/2$.
#
# <details><summary>Hint</summary>
#
# Section 2: add up $\mathrm{Re}(q_i \bar k_i e^{id\omega_i})$. Only one of the
# two vectors has to turn, by the whole distance.
#
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# def score_from_distance(q, k, distance, theta):
#     half = len(q) // 2
#     omega = theta ** (-torch.arange(half) / half)
#     turn = torch.polar(torch.ones(half), distance * omega)
#     pairs_q = torch.complex(q[:half], q[half:])
#     pairs_k = torch.complex(k[:half], k[half:])
#     return (pairs_q * pairs_k.conj() * turn).real.sum()
# ```
#
# </details>

# %%
from nanomai.exercises.rope_flash import (
    check_merge_partials,
    check_online_update,
    check_score_from_distance,
)


def score_from_distance(q, k, distance, theta):
    raise NotImplementedError


check_score_from_distance(score_from_distance)

# %% [markdown]
# **2 · The online update.** The state is `(m, z, o)`, three tensors that begin
# as $-\infty$, 0 and zeros `(K,)`. Take in one tile of `scores` `(S,)` and
# `values` `(S, K)`, and return the new state. Try it without looking back.
#
# <details><summary>Hint</summary>
#
# New maximum first; then one factor for what is old, and exponentials of what
# is new. Nothing is divided before the end.
#
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# def online_update(state, scores, values):
#     m, z, o = state
#     new = torch.maximum(m, scores.max())
#     keep, p = (m - new).exp(), (scores - new).exp()
#     return new, z * keep + p.sum(), o * keep + p @ values
# ```
#
# </details>

# %%
def online_update(state, scores, values):
    raise NotImplementedError


check_online_update(online_update)

# %% [markdown]
# **3 · Merge two partial softmaxes.** Two machines hold different keys for the
# same queries. Each returns its own finished output `o` `(T, K)` and
# $L = \ln\sum e^s$ `(T,)`. Return the output and $L$ over all keys. Where the
# second holds no key for a query, its `o` is 0 and its $L$ is $-\infty$.
#
# <details><summary>Hint</summary>
#
# The total is $L = \ln(e^{L_1} + e^{L_2})$, which `torch.logaddexp` computes
# without overflow. Each part weighs $e^{L_i - L}$.
#
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# def merge_partials(o1, log1, o2, log2):
#     log = torch.logaddexp(log1, log2)
#     share1, share2 = (log1 - log).exp(), (log2 - log).exp()
#     return share1[:, None] * o1 + share2[:, None] * o2, log
# ```
#
# </details>

# %%
def merge_partials(o1, log1, o2, log2):
    raise NotImplementedError


check_merge_partials(merge_partials)

# %% [markdown]
# ## 7 At 500B
#
# `mai-1-dense` is this project's own proposal for a model of the size that was
# reported for MAI-1, whose own dimensions were never published. Each of its 120
# layers has 144 query heads and 8 key-value heads of 128 numbers. On the `meta`
# device a model has shapes but no numbers, so we can build its real cache and
# weigh it.
#
# > **Predict.** How many GB does the cache of *one* 8,192-token conversation
# > take at 2 bytes a number? And without sharing? With $\theta$ = 500,000, how
# > many of the 64 pairs turn a full circle within those 8,192 positions?

# %%
big = nanomai.load_config("mai-1-dense").model
with torch.device("meta"):
    model = nanomai.build_model(big)
model.compute_dtype = torch.bfloat16
T = big.context_length
cache = KVCache(model, batch_size=1, capacity=T)
held = sum(c.keys.nbytes + c.values.nbytes for c in cache.layers)
assert held == T * big.kv_cache_bytes_per_token()

unshared = held * big.n_heads // big.n_kv_heads
print(f"one token: {big.kv_cache_bytes_per_token():,} bytes")
print(f"8,192 tokens: {held / 1e9:.1f} GB, with all 144 heads",
      f"{unshared / 1e9:.1f} GB")
assert big.kv_cache_bytes_per_token() == 491_520
assert unshared == 18 * held

# %%
omega = big.rope_theta ** (-2 * torch.arange(big.head_dim // 2).double()
                           / big.head_dim)
turns = T * omega / (2 * math.pi)
print(int((turns >= 1).sum()), "of 64 pairs turn round at least once;",
      f"the slowest makes {turns[-1].item():.3f} turns")
assert (turns >= 1).sum() == 35 and turns[-1] < 0.01
distinct = len(torch.arange(T).to(torch.bfloat16).unique())
print("bfloat16 tells", distinct, "of", T, "positions apart")
assert distinct == 257 + 5 * 128  # to 256 all, then 128 in each doubling


H_, K_, tile = big.n_heads, big.head_dim, 128
dense_moved = H_ * 2 * (4 * T * T + 4 * T * K_)
tiled_moved = H_ * 2 * T * K_ * (T // tile + 3)
print(f"moved in one layer: dense {dense_moved / 1e9:.0f} GB,",
      f"tiles of {tile} {tiled_moved / 1e9:.0f} GB")
print(f"scores held at once, one head: dense {T * T:,}, tiled",
      f"{tile * tile:,}")
assert dense_moved > 3.5 * tiled_moved and (T // tile) ** 2 == 4096

# %% [markdown]
# Half a megabyte for every token. Without sharing, one conversation would all
# but fill an 80 GB card. With it, 8 cards that split the heads (tensor
# parallelism) hold one key-value head each, half a GB. The slow hands hardly
# move within the context, so a longer text turns them to angles that training
# never showed (the reason for LongRoPE, later in the course). In bfloat16 eight
# of nine positions would be lost, so the package makes its table in float32.
# Tiles divide the bytes moved by nearly four, the scores held at once by 4,096.
#
# ## What to keep
#
# 1. RoPE turns $q$ and $k$ by position, and scores see only the distance.
# 2. GQA divides the cache by $H/G$; it equals repeated heads, and gradients
#    add up.
# 3. The online softmax makes attention exact in tiles, forward and backward.
#
# **Real systems** take queries and keys in tiles of different sizes, overlap
# copies with products, and profit from a hardware cache that our count ignores.
# A long context can be split over machines, and merged as in exercise 3.
#
# **Read on.** The code: [`nanomai/ops.py`](../nanomai/ops.py) (`rotary_table`,
# `rotary`, `attention`), [`nanomai/sampling.py`](../nanomai/sampling.py)
# (`KVCache`). Papers: [RoPE](https://arxiv.org/abs/2104.09864),
# [GQA](https://arxiv.org/abs/2305.13245),
# [online softmax](https://arxiv.org/abs/1805.02867),
# [FlashAttention](https://arxiv.org/abs/2205.14135) and
# [its second version](https://arxiv.org/abs/2307.08691).
#
# **Next:** `05_block_and_model` puts attention into a block, and blocks into
# a model.
