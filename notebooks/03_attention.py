# %% [markdown]
# # 03 · How does a token read the others?
#
# **Goal.** Build attention from a soft look-up and end with the very function
# that `nanomai` calls, equal in values and in gradients.
#
# **Prerequisites.** Matrix products, softmax, and what a gradient is.
# `00_map` helps. **Time.** About 50 minutes; it runs in a few seconds.
#
# **You will be able to**
# - write causal attention with heads from memory, and say why each part is
#   there;
# - explain the $1/\sqrt K$: what grows without it, and what vanishes;
# - read an attention map, and build two heads that continue a repeated text;
# - pack documents into one row, and limit the view.

# %%
import math

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import nanomai
from nanomai import ops
from nanomai.model import Attention
from nanomai.show import lesson

lesson()
generator = torch.Generator().manual_seed(3)

# %% [markdown]
# ## 1 A dictionary that is never sure
#
# A Python dictionary compares your key with its own and gives the value of the
# one that is equal. Learned numbers are never quite equal, and "equal or not"
# has no slope for gradient descent. So we soften it: score the query against
# every key by a dot product, turn the scores into weights with a softmax, and
# return the weighted mean of all values. Below, $S$ keys have $K$ numbers each.

# %%
keys = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])  # (S, K)
values = torch.tensor([10.0, 20.0, 60.0])  # (S,)
query = torch.tensor([0.0, 4.0])  # (K,): it asks for the second key

weights = (keys @ query).softmax(-1)  # (S,)
print("weights", [round(w, 3) for w in weights.tolist()])
print("answer ", round((weights @ values).item(), 2))
assert weights.argmax() == 1 and abs(weights.sum() - 1) < 1e-6

# %% [markdown]
# About 20: the other two values have a small say. In a language model each of
# $T$ positions sends a query $q_i$ and offers a key $k_i$ and a value $v_i$,
# all made from its own vector. Position $i$ may read only positions $j \le i$,
# because the later ones are what the model has to predict. Section 2 explains
# the $\sqrt K$ in
#
# $$y_i = \sum_{j \le i} p_{ij} v_j, \qquad
#   p_{ij} = \frac{e^{q_i \cdot k_j / \sqrt K}}
#                 {\sum_{l \le i} e^{q_i \cdot k_l / \sqrt K}}.$$
#
# Here it is as plain loops.

# %%
def attention_loops(q, k, v):
    """One head: q, k, v (T, K) -> (T, K)."""
    rows = []
    for i in range(len(q)):
        scores = [q[i] @ k[j] / math.sqrt(len(q[i])) for j in range(i + 1)]
        terms = [score.exp() for score in scores]
        total = sum(terms)
        rows.append(sum(e / total * v[j] for j, e in enumerate(terms)))
    return torch.stack(rows)


T, K = 7, 8
q, k, v = torch.randn(3, T, K, generator=generator)
looped = attention_loops(q, k, v)
print("out", tuple(looped.shape))

# %% [markdown]
# The same with matrices. All scores come from one product; the forbidden ones
# become $-\infty$, which the exponential turns into zero. The mask must come
# *before* the softmax, so that each row of weights still sums to one.

# %%
def attention_matrix(q, k, v):
    """Any leading dimensions: q, k, v (..., T, K) -> (..., T, K)."""
    T, K = q.shape[-2:]
    scores = q @ k.transpose(-1, -2) / math.sqrt(K)  # (..., T, T)
    past = torch.ones(T, T).tril().bool()  # True where j <= i
    p = scores.masked_fill(~past, -torch.inf).softmax(-1)
    return p @ v  # (..., T, K)


assert_close(attention_matrix(q, k, v), looped)
print("matrices equal loops:", tuple(looped.shape))

# %% [markdown]
# "May not read the future" can be tested without looking at the code: change
# the key and the value of the last token, and no earlier output may move.
#
# > **Predict.** Someone forgets the mask. How many of the first six outputs
# > move when only the last token changes?

# %%
def without_mask(q, k, v):
    return (q @ k.T / math.sqrt(q.shape[-1])).softmax(-1) @ v


last = torch.zeros(T, K)
last[-1] = 1  # added to keys and values, it changes the last token only
for attend in (attention_matrix, without_mask):
    change = attend(q, k + last, v + last) - attend(q, k, v)  # (T, K)
    moved = (change[:-1].abs().amax(-1) > 1e-6).sum().item()
    try:
        assert moved == 0, f"it reads the future, {moved} of {T - 1} moved"
        print(f"{attend.__name__}: causal")
    except AssertionError as error:
        print(f"{attend.__name__}: {type(error).__name__}: {error}")

# %% [markdown]
# All six: a softmax over everything gives every row some weight on the last
# token. Such a model would reach a wonderful training loss by copying the
# answer, and be worthless at generating.
#
# ## 2 Why divide by $\sqrt K$?
#
# Suppose the numbers of $q$ and $k$ are independent with mean 0 and variance 1.
# Then so is each product $q_a k_a$. Variances of independent terms add, so the
# sum of $K$ products has a standard deviation of $\sqrt K$. We measure it.

# %%
sizes = [4, 16, 64, 256, 1024]
theory = torch.tensor(sizes).sqrt()
spread = torch.zeros(len(sizes))
for n, K_ in enumerate(sizes):
    a, b = torch.randn(2, 4096, K_, generator=generator)
    spread[n] = (a * b).sum(-1).std()
assert_close(spread, theory, rtol=0.05, atol=0)

plt.loglog(sizes, theory, "k--", lw=1, base=2, label=r"theory: $\sqrt{K}$")
plt.loglog(sizes, spread, "o", base=2, label=r"$q \cdot k$")
plt.loglog(sizes, spread / theory, "s", base=2,
           label=r"$q \cdot k / \sqrt{K}$")
plt.xlabel("numbers in a query, K (log axis)")
plt.ylabel("standard deviation of scores (log axis)")
plt.legend()
plt.show()

# %% [markdown]
# Why is a large spread bad? The derivative of a softmax is
# $\partial p_i/\partial s_j = p_i(\delta_{ij} - p_j)$, where $\delta_{ij}$ is 1
# if $i = j$ and else 0. If one weight is nearly 1 and the others nearly 0,
# this whole matrix is nearly 0: no gradient gets back to the scores, and
# queries and keys cannot learn. Its size (the root of the summed squares) says
# how much gets through.
#
# > **Predict.** A query looks at 64 keys with $K = 1024$, unscaled: the scores
# > have a standard deviation of 32. How large is the largest weight of a
# > typical row? How many times smaller is the matrix than with the scale?

# %%
def slopes(scores):
    """Every dp_i / ds_j of the softmax of one row: (S,) -> (S, S)."""
    p = scores.softmax(-1)
    return p.diag() - torch.outer(p, p)


row = torch.randn(64, generator=generator)
by_autograd = torch.autograd.functional.jacobian(lambda s: s.softmax(-1), row)
assert_close(slopes(row), by_autograd)
print("formula equals autograd:", tuple(by_autograd.shape))

# %%
found = torch.zeros(2, 2, len(sizes))  # (unscaled | scaled, weight | slope)
for n, K_ in enumerate(sizes):
    queries = torch.randn(256, 1, K_, generator=generator)
    keys = torch.randn(256, 64, K_, generator=generator)
    s = (queries * keys).sum(-1)  # (256, 64): 256 queries, 64 keys each
    for i, scores in enumerate((s, s / math.sqrt(K_))):
        found[i, 0, n] = scores.softmax(-1).amax(-1).median()
        size = torch.stack([slopes(row).norm() for row in scores])
        found[i, 1, n] = size.median()

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8),
                                     layout="constrained")
for (weight, slope), name in zip(found, ("unscaled", "scaled"), strict=True):
    left.plot(sizes, weight, "o-", label=name)
    right.loglog(sizes, slope, "o-", label=name)
left.axhline(1 / 64, color="k", ls=":", lw=1, label="uniform: 1/64")
right.axhline(slopes(torch.zeros(64)).norm(), color="k", ls=":", lw=1,
              label="at uniform weights")
left.set(ylabel="largest weight, median row")
right.set(ylabel=r"$\|\partial p/\partial s\|$, median row (log axis)")
for axes in (left, right):
    axes.set_xscale("log", base=2)
    axes.set_xlabel("numbers in a query, K (log axis)")
    axes.legend()
plt.show()

weight, slope = found.unbind(1)  # (2, sizes) each: unscaled, scaled
assert weight[0, -1] > 0.99 and slope[1].max() / slope[1].min() < 1.2
assert slope[0, -1] < slope[1, -1] / 100
print("K = 1024: largest weight > 0.99, slopes > 100 times smaller")

# %% [markdown]
# With the scale, nothing depends on $K$. Without it, small heads get even more
# gradient, and then comes a cliff: a head of 64 numbers still learns, one of
# 1024 has all but stopped before its first step. Real heads, with 64 to 128,
# would stand at the edge.
#
# ## 3 Heads: several questions at once
#
# One softmax gives one weighted mean. A position that needs the subject *and*
# the verb would get a blur. So the layer asks $H$ questions in parallel: head
# $h$ has its own slice of $K$ numbers in query, key and value, and the output
# matrix adds up what the heads found. The input is $B$ texts of $T$ tokens,
# each a vector of $D$ numbers. First a loop over heads; weights are stored
# `(out, in)`, as in `torch.nn.Linear`.

# %%
B, T, D, H, K = 2, 9, 24, 4, 8  # H K = 32 need not be D
wq, wk, wv = torch.randn(3, H * K, D, generator=generator) / math.sqrt(D)
wo = torch.randn(D, H * K, generator=generator) / math.sqrt(H * K)
x = torch.randn(B, T, D, generator=generator)


def layer_loop(x, wq, wk, wv, wo):
    """x (B, T, D) -> (B, T, D)."""
    heads = []
    for h in range(H):
        rows = slice(h * K, (h + 1) * K)  # this head's rows of each weight
        q, k, v = (x @ w[rows].T for w in (wq, wk, wv))  # (B, T, K)
        heads.append(attention_matrix(q, k, v))
    return torch.cat(heads, -1) @ wo.T  # (B, T, H K) -> (B, T, D)


looped = layer_loop(x, wq, wk, wv, wo)
print("in", tuple(x.shape), "-> out", tuple(looped.shape))

# %% [markdown]
# Without the loop: one big product, a *view* that splits the last dimension
# into heads, a *transpose* that makes the head a batch dimension; at the end,
# the way back. Leaving out the transposes is a classic mistake, because
# `view(B, H, T, K)` has the right shape too.
#
# > **Predict.** Is the layer without the transposes still causal? Is it right?

# %%
def layer_batched(x, transpose=True):
    q, k, v = (x @ w.T for w in (wq, wk, wv))  # (B, T, H K) each
    if transpose:
        heads = (y.view(B, T, H, K).transpose(1, 2) for y in (q, k, v))
        y = attention_matrix(*heads).transpose(1, 2)  # (B, T, H, K)
    else:  # the right shape, the wrong numbers
        y = attention_matrix(*(y.view(B, H, T, K) for y in (q, k, v)))
    return y.reshape(B, T, H * K) @ wo.T


assert_close(layer_batched(x), looped)
try:
    assert_close(layer_batched(x, transpose=False), looped)
except AssertionError as error:
    print("without the transposes:", type(error).__name__)
changed = x.clone()
changed[:, -1] += 1
assert_close(layer_batched(changed, transpose=False)[:, :-1],
             layer_batched(x, transpose=False)[:, :-1])
print("... and yet it is causal")

# %% [markdown]
# It is causal and wrong: each of the four "heads" sees only its own quarter of
# the text. Testing one property is no substitute for equality with a plain
# version, which is how this project tests its operations.
#
# ## 4 The same as the package
#
# `nanomai.ops.attention` takes the heads after the split, `(B, H, T, K)`, and
# is causal where it is given no mask. We compare it, its plain definition
# (which it calls for small inputs on a CPU), and torch's own fused call with
# ours. Values alone would not do, since training runs on gradients: we choose
# a gradient at the output, and let autograd pull it back to the inputs.

# %%
def value_and_gradients(f, *inputs):
    inputs = [z.detach().clone().requires_grad_() for z in inputs]
    y = f(*inputs)
    upstream = torch.linspace(-1, 1, y.numel()).view_as(y)
    return (y.detach(), *torch.autograd.grad(y, inputs, upstream))


def torch_attention(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


q, k, v = torch.randn(3, B, H, T, K, generator=generator)
ours = value_and_gradients(attention_matrix, q, k, v)
assert_close(value_and_gradients(ops.attention, q, k, v), ours)
assert_close(value_and_gradients(ops.attention_plain, q, k, v), ours)
assert_close(value_and_gradients(torch_attention, q, k, v), ours)
print("values, and gradients of q, k, v: equal in all three")

# %% [markdown]
# And the whole layer: `functional_call` runs `nanomai.model.Attention` with
# our weights. Its last two arguments are the rotary table, which the next
# notebook explains, and the mask.

# %%
config = nanomai.ModelConfig(d_model=D, n_heads=H, n_kv_heads=H, head_dim=K)
layer = Attention(config)


def package_layer(x, wq, wk, wv, wo):
    weights = {"wq.weight": wq, "wk.weight": wk, "wv.weight": wv,
               "wo.weight": wo}
    return torch.func.functional_call(layer, weights, (x, None, None))


inputs = (x, wq, wk, wv, wo)
assert_close(value_and_gradients(package_layer, *inputs),
             value_and_gradients(layer_loop, *inputs))
print("output and", len(inputs), "gradients equal")

# %% [markdown]
# ## 5 Two heads that continue a repeated text
#
# What can such a look-up compute? A well understood example is the *induction
# head* (Olsson et al. 2022): find where the current word stood before, and say
# what came next. It takes two heads, one in each of two layers. Training finds
# them by itself; we set them by hand, with one-hot words and positions.
#
# - Head 1: position $i$ asks for position $i - 1$ and fetches the word there.
# - Head 2: each position asks with its own word. It offers as key the word
#   *before* it, which head 1 has just fetched, and as value its own word.

# %%
text = "<start> the red fox met the old owl . the red fox met the old owl ."
words = text.split()
names = sorted(set(words))
N = len(words)
word = torch.eye(len(names))[[names.index(w) for w in words]]  # (N, V)
place = torch.eye(N)  # (N, N)


def head(q, k, v, sharpness=20.0):
    """One sharp head through the package's attention."""
    q = q * sharpness * math.sqrt(q.shape[-1])  # a match scores 20, not 1
    return ops.attention(*(z[None, None] for z in (q, k, v)))[0, 0]


before = place[[0, *range(N - 1)]]  # row i is the one-hot of i - 1
previous_word = head(before, place, word)  # (N, V)
answer = head(word, previous_word, word)  # (N, V): weights over words
print("words", N, "answer", tuple(answer.shape))

# %% [markdown]
# With the identity as values, attention returns its own weights. This is the
# attention map: row $i$ shows what position $i$ reads.
#
# > **Predict.** In the second sentence seven words have a successor. After how
# > many of them does head 2 name the right one with certainty?

# %%
maps = {"head 1: the position before": head(before, place, place),
        "head 2: what followed this word": head(word, previous_word, place)}
figure, panels = plt.subplots(1, 2, figsize=(11, 5.2), layout="constrained")
for axes, (title, p) in zip(panels, maps.items(), strict=True):
    image = axes.imshow(p, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(N), words, rotation=90, fontsize=8)
    axes.set_yticks(range(N), words, fontsize=8)
    axes.set(title=title, xlabel="key: the word that is read",
             ylabel="query: the word that reads")
    axes.grid(False)
figure.colorbar(image, ax=panels, label="attention weight", shrink=0.8)
plt.show()

# %%
first, second = maps.values()
assert (first.diagonal(-1) > 0.99).all()
sure = []
for i in range(9, N - 1):
    chance = answer[i, names.index(words[i + 1])].item()
    sure.append(chance > 0.99)
    print(f"{words[i]:>4} -> {words[i + 1]:4} weight {chance:.2f}")
assert sum(sure) == 5 and second[10, 3] > 0.99

# %% [markdown]
# Five of seven. The stripe in the lower half of the second map is the copying.
# After "the", two or three places match equally well and the softmax can only
# return their mean: one word of context is not enough. The pale rows are as
# telling: a softmax cannot answer "nothing found", so a query without a
# match reads everything a little.
#
# ## 6 Who may read whom
#
# The mask is a table of permissions, and causality is only the commonest rule.
# Training rows are packed with several documents, and none may read its
# neighbour. A sliding window shows a position only the last few, which bounds
# the cost. `ops.attention_mask` makes them all from positions and document
# numbers. We count the permitted pairs: $N(N+1)/2$ in a triangle, at most $w$
# a row in a window of $w$.

# %%
N = 12
at = torch.arange(N)
document = torch.tensor([[0] * 5 + [1] * 7])  # (1, N)
masks = {
    "causal": ops.attention_mask(at, at),
    "window of 4": ops.attention_mask(at, at, 4),
    "two documents": ops.attention_mask(at, at, None, document, document),
    "both": ops.attention_mask(at, at, 4, document, document),
}
count = [mask.sum().item() for mask in masks.values()]
print(dict(zip(masks, count, strict=True)))
assert count[:3] == [N * (N + 1) // 2, 1 + 2 + 3 + 4 * (N - 3),
                     5 * 6 // 2 + 7 * 8 // 2]

# %%
figure, panels = plt.subplots(1, 4, figsize=(11, 3.3), layout="constrained")
for axes, title, n in zip(panels, masks, count, strict=True):
    axes.imshow(masks[title].view(N, N), cmap="Greys", vmin=0, vmax=1.6)
    axes.set(title=f"{title}: {n} pairs", xlabel="key position",
             xticks=range(0, N, 3), yticks=range(0, N, 3))
    axes.grid(False)
panels[0].set_ylabel("query position (grey: may read)")
plt.show()

# %% [markdown]
# For packing one claim matters: a packed row gives what each document gives
# alone, in values and in gradients.

# %%
q, k, v = torch.randn(3, 1, H, N, K, generator=generator)


def packed(q, k, v):
    return ops.attention(q, k, v, masks["two documents"])


def separate(q, k, v):
    pieces = zip(*(z.split([5, 7], dim=2) for z in (q, k, v)), strict=True)
    return torch.cat([attention_matrix(*piece) for piece in pieces], dim=2)


assert_close(value_and_gradients(packed, q, k, v),
             value_and_gradients(separate, q, k, v))
print("packed equals separate, values and gradients")

# %% [markdown]
# ## 7 Exercises
#
# **1 · A sliding window.** Write the mask from two position vectors: a tensor
# of booleans `(queries, keys)`, True where $0 \le m - n < w$ for query position
# $m$ and key position $n$. Positions need not start at zero, nor be equally
# many.
#
# <details><summary>Hint</summary>
#
# `query[:, None]` against `key[None, :]` gives every difference at once. A
# window of 1 sees only itself.
#
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# def window_mask(query_positions, key_positions, window):
#     distance = query_positions[:, None] - key_positions[None, :]
#     return (distance >= 0) & (distance < window)
# ```
#
# </details>

# %%
from nanomai.exercises.attention import (
    check_alibi_bias,
    check_permute_heads,
    check_window_mask,
)


def window_mask(query_positions, key_positions, window):
    raise NotImplementedError


check_window_mask(window_mask)

# %% [markdown]
# **2 · ALiBi** (Press et al. 2021) makes distant keys count less: it adds
# $-m_h (i - j)$ to the scaled score of query $i$ and key $j$, with a fixed
# slope $m_h$ for each head. With $H$ heads ($H$ a power of two) the slopes are
# $2^{-8/H}, 2^{-16/H}, \dots, 2^{-8}$. Return the bias `(H, T, T)`. What stands
# above the diagonal is masked later, so it may be anything finite.
#
# <details><summary>Hint</summary>
#
# The first head has $2^{-8/H}$, not $2^0$: count heads from one.
#
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# def alibi_bias(n_heads, length):
#     head = torch.arange(1, n_heads + 1)
#     slope = 2.0 ** (-8 * head / n_heads)  # (H,)
#     position = torch.arange(length)
#     distance = position[:, None] - position[None, :]  # (T, T)
#     return -slope[:, None, None] * distance  # (H, T, T)
# ```
#
# </details>

# %%
def alibi_bias(n_heads, length):
    raise NotImplementedError


check_alibi_bias(alibi_bias)

# %% [markdown]
# **3 · Heads have no order.** Return four new weights in which head $h$ is the
# old head `order[h]` (`order` is a list), such that the layer computes the same
# function. Weights are `(out, in)`: `wq`, `wk`, `wv` are $(HK, D)$ and `wo` is
# $(D, HK)$.
#
# <details><summary>Hint</summary>
#
# Head $h$ owns *rows* of `wq`, `wk`, `wv`, and *columns* of `wo`. See them
# as `(H, K, D)` and `(D, H, K)`.
#
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# def permute_heads(wq, wk, wv, wo, order):
#     H, D = len(order), wo.shape[0]
#     rows = [w.view(H, -1, D)[order].reshape(-1, D) for w in (wq, wk, wv)]
#     columns = wo.view(D, H, -1)[:, order].reshape(D, -1)
#     return *rows, columns
# ```
#
# </details>

# %%
def permute_heads(wq, wk, wv, wo, order):
    raise NotImplementedError


check_permute_heads(permute_heads)

# %% [markdown]
# ## 8 At 500B
#
# `mai-1-dense` is this project's own proposal for a model of the size that was
# reported for MAI-1, whose architecture was never published. It has 120 layers
# of 144 heads with 128 numbers each. Attention costs memory first: the scores
# of one layer form a $(H, T, T)$ array for each sequence.
#
# > **Predict.** How many of the 80 GB of an H100 would the scores of one
# > layer take, for one sequence of 8,192 tokens at 2 bytes a score?

# %%
big = nanomai.load_config("mai-1-dense").model
T = big.context_length
score_bytes = 2 * big.n_heads * T * T
# keys and values are shared among heads: the next notebook explains how
heads = 2 * big.n_heads + 2 * big.n_kv_heads  # q and output, k and v
vector_bytes = 2 * heads * T * big.head_dim
print(f"{big.n_layers} layers, {big.n_heads} heads of {big.head_dim}, T {T}")
print(f"scores, one layer:     {score_bytes / 1e9:6.1f} GB")
print(f"q, k, v and the output:{vector_bytes / 1e9:6.1f} GB")
print(f"scores, all layers:    {big.n_layers * score_bytes / 1e12:6.2f} TB")
assert score_bytes // vector_bytes == 30
assert 19 < score_bytes / 1e9 < 20

# %% [markdown]
# A quarter of the card, for one layer of one sequence, and 30 times as much as
# goes in and comes out.
#
# The second cost is arithmetic, in FLOPs (one addition or multiplication). In
# training a weight costs 6 a token: multiply and add, once forward, twice
# backward. By the same count $q \cdot k$ and $p\,v$ cost $6\,THK$ a layer, as a
# token sees $T/2$ keys on average. A layer has 4.1 billion weights, and
# $HK = 18{,}432$.
#
# > **Predict.** At 8,192 tokens, what share of the training arithmetic is
# > attention's two products? At what length is it half?

# %%
def product_flops(T):
    """Of one training token in attention's two products, all layers."""
    return 6 * big.n_layers * T * big.n_heads * big.head_dim


lengths = [2**n for n in range(10, 21)]
share = [100 * product_flops(T) / big.flops_per_token(T) for T in lengths]
half = big.flops_per_token(1) / product_flops(1) - 1  # weights / products
print(f"at 8,192 tokens {share[3]:.1f} %, half at {half / 1e3:.0f} thousand")
assert lengths[3] == 8192 and 3 < share[3] < 4 and 2**17 < half < 2**18

plt.semilogx(lengths, share, "o-", base=2)
plt.axvline(8192, color="k", ls=":", lw=1, label="8,192 tokens")
plt.axhline(50, color="k", ls="--", lw=1, label="half")
plt.xlabel("tokens in a sequence, T (log axis)")
plt.ylabel("attention's share of FLOPs (%)")
plt.title("mai-1-dense (our proposal), training")
plt.legend()
plt.show()

# %% [markdown]
# Three and a half percent. The famous quadratic cost is no obstacle to
# *arithmetic* at this length: a model this wide spends nearly everything in its
# weight matrices. What hurts first is memory and the bytes moved.
#
# ## What to keep
#
# 1. Attention is a soft look-up: scores, mask, softmax, weighted mean.
# 2. $1/\sqrt K$ keeps the scores' spread at one, so that gradients survive.
# 3. The mask is a table of permissions; heads ask several questions at once.
#
# **Real systems** avoid storing the scores (next notebook) and skip the masked
# half of the work. Many normalise queries and keys as well (QK-norm), some
# scale by $1/K$ (muP), and some give the softmax a place for "nothing found"
# (an attention sink).
#
# **Read on.** The code: [`nanomai/ops.py`](../nanomai/ops.py) (`attention`,
# `attention_mask`) and [`nanomai/model.py`](../nanomai/model.py)
# (`Attention`). Papers:
# [attention](https://arxiv.org/abs/1706.03762),
# [induction heads](https://arxiv.org/abs/2209.11895),
# [ALiBi](https://arxiv.org/abs/2108.12409),
# [sliding windows in Mistral](https://arxiv.org/abs/2310.06825).
#
# **Next:** `04_rope_gqa_flash`. Does attention know the *order* of the past?
# Section 5 had to hand it one-hot positions. We mend that, and make the 19 GB
# vanish.
