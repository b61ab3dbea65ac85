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
# - explain the $1/\sqrt K$ with a formula, a plot, and a gradient that
#   vanishes without it;
# - read an attention map, and build by hand two heads that continue a
#   repeated text;
# - pack documents into one row, and limit the view to a window.

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
# A Python dictionary compares your key with its own keys and gives the value
# of the one that is equal. Numbers learned by gradient descent are never quite
# equal, and "equal or not" has no slope to descend. So we soften it: score the
# query against every key by a dot product, turn the scores into weights with a
# softmax, and return the weighted mean of all values.

# %%
keys = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])  # (S, K)
values = torch.tensor([10.0, 20.0, 30.0])  # (S,)
query = torch.tensor([0.0, 4.0])  # (K,): it asks for the second key

weights = (keys @ query).softmax(-1)  # (S,)
print("weights", [round(w, 3) for w in weights.tolist()])
print("answer ", round((weights @ values).item(), 2))
assert weights.argmax() == 1 and abs(weights.sum() - 1) < 1e-6

# %% [markdown]
# In a language model every position $i$ sends a query $q_i$ and offers a key
# $k_i$ and a value $v_i$, all made from its own vector. Position $i$ may read
# only positions $j \le i$, because the later ones are what the model has to
# predict. With $K$ numbers in a query,
#
# $$y_i = \sum_{j \le i} p_{ij} v_j, \qquad
#   p_{ij} = \frac{e^{q_i \cdot k_j / \sqrt K}}
#                 {\sum_{l \le i} e^{q_i \cdot k_l / \sqrt K}}.$$
#
# Here it is as loops, so plain that there is nothing to hide in.

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
# The same thing as three matrix operations. All scores come from one product;
# the forbidden ones become $-\infty$, which the exponential turns into an
# exact zero. The mask must come *before* the softmax, so that each row of
# weights still sums to one over what it is allowed to see.

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
# the last token, and no earlier output may move.
#
# > **Predict.** Someone forgets the mask. How many of the first six outputs
# > change when only the last token does?

# %%
def moved(attend):
    """How many outputs before the last feel a change of the last token."""
    k2, v2 = k.clone(), v.clone()
    k2[-1] += 1
    v2[-1] += 1
    change = (attend(q, k, v) - attend(q, k2, v2)).abs().amax(-1)  # (T,)
    return (change[:-1] > 1e-6).sum().item()


def without_mask(q, k, v):
    return (q @ k.T / math.sqrt(q.shape[-1])).softmax(-1) @ v


for attend in (attention_matrix, without_mask):
    try:
        assert moved(attend) == 0, "it reads the future"
        print(f"{attend.__name__}: causal")
    except AssertionError as error:
        print(f"{attend.__name__}: {type(error).__name__}: {error},",
              moved(attend), "of 6 moved")

# %% [markdown]
# All six: a softmax over everything gives every row some weight on the last
# token. In training such a model would reach a wonderful loss by copying the
# answer, and would be worthless at generating. A loss that is too good is the
# usual sign of a lost mask.
#
# ## 2 Why divide by $\sqrt K$?
#
# Suppose the numbers of $q$ and $k$ are independent with mean 0 and variance 1
# (a normalised input times a matrix with entries of variance $1/D$ gives just
# that). Then $q \cdot k$ is a sum of $K$ products, each of variance 1, so its
# standard deviation is $\sqrt K$. We measure it.

# %%
sizes = [4, 16, 64, 256, 1024]
theory = torch.tensor(sizes).sqrt()
spread = []
for K_ in sizes:
    a, b = torch.randn(2, 4096, K_, generator=generator)
    spread.append((a * b).sum(-1).std())
spread = torch.stack(spread)
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
# $\partial p_i / \partial s_j = p_i(\delta_{ij} - p_j)$. If one weight is
# nearly 1 and the others nearly 0, every entry is nearly 0: no gradient gets
# back to the scores, so queries and keys cannot learn. The size of that
# matrix has a closed form,
# $\|J\|_F^2 = \sum p^2 - 2\sum p^3 + (\sum p^2)^2$.
#
# > **Predict.** A query looks at 64 keys with $K = 1024$, unscaled. How large
# > is the largest weight of a typical row, and how many times smaller is its
# > gradient than with the scale?

# %%
def gradient_size(scores):
    """Of dp/ds, row by row: by autograd, and by the closed form."""
    one_row = torch.func.jacrev(lambda s: s.softmax(-1))
    matrices = torch.func.vmap(one_row)(scores)  # (N, S, S)
    p = scores.softmax(-1)
    p2, p3 = p.pow(2).sum(-1), p.pow(3).sum(-1)
    closed = (p2 - 2 * p3 + p2 * p2).clamp_min(0).sqrt()
    return matrices.norm(dim=(-1, -2)), closed


found = {"unscaled": [], "scaled": []}
for K_ in sizes:
    a = torch.randn(256, 1, K_, generator=generator).double()
    b = torch.randn(256, 64, K_, generator=generator).double()
    s = (a * b).sum(-1)  # (256, 64): 256 queries, 64 keys each
    for name, scores in (("unscaled", s), ("scaled", s / math.sqrt(K_))):
        rows = (scores.softmax(-1).max(-1).values, *gradient_size(scores))
        found[name].append([row.median().item() for row in rows])
found = {name: torch.tensor(rows).T for name, rows in found.items()}

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8),
                                     layout="constrained")
for name, (largest, size, closed) in found.items():
    left.plot(sizes, largest, "o-", label=name)
    right.semilogy(sizes, size, "o", label=f"{name}, autograd")
    right.semilogy(sizes, closed, "k--", lw=1)
    assert_close(size, closed, rtol=1e-3, atol=1e-6)
left.axhline(1 / 64, color="k", ls=":", lw=1, label="uniform: 1/64")
right.plot([], [], "k--", lw=1, label="closed form")
left.set(xlabel="K (log axis)", ylabel="largest weight, median row")
right.set(xlabel="K (log axis)",
          ylabel=r"gradient size $\|J\|_F$, median row (log axis)")
for axes in (left, right):
    axes.set_xscale("log", base=2)
    axes.legend()
plt.show()

steady = found["scaled"][1]
assert found["unscaled"][0][-1] > 0.99 and steady.max() / steady.min() < 1.2
assert found["unscaled"][1][-1] < steady[-1] / 100
print("K = 1024: largest weight > 0.99, gradient > 100 times smaller")

# %% [markdown]
# The surprise is how sudden it is. With the scale, nothing depends on $K$;
# without it, a head of 64 numbers still learns and one of 1024 has all but
# stopped before its first step.
#
# ## 3 Heads: several questions at once
#
# One softmax gives one weighted mean. A position that needs the subject *and*
# the verb would get a blur of both. So the layer asks $H$ questions in
# parallel: head $h$ has its own slice of $K$ numbers in the query, key and
# value, and the output matrix adds up what the heads found. First as a loop
# over heads; weights are stored `(out, in)`, as in `torch.nn.Linear`.

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
# Without the loop: one big product, then a *view* that splits the last
# dimension into heads, then a *transpose* that makes the head a batch
# dimension. Forgetting the transpose is a classic mistake, because
# `view(B, H, T, K)` has the right shape too.
#
# > **Predict.** Is the layer without the transpose still causal? And is it
# > still right?

# %%
def layer_batched(x, transpose=True):
    def split(y):  # (B, T, H K) -> (B, H, T, K)
        if transpose:
            return y.view(B, T, H, K).transpose(1, 2)
        return y.view(B, H, T, K)  # the right shape, the wrong numbers

    y = attention_matrix(*(split(x @ w.T) for w in (wq, wk, wv)))
    y = y.transpose(1, 2) if transpose else y  # -> (B, T, H, K)
    return y.reshape(B, T, H * K) @ wo.T


assert_close(layer_batched(x), looped)
try:
    assert_close(layer_batched(x, transpose=False), looped)
except AssertionError as error:
    print("without the transpose:", type(error).__name__)
changed = x.clone()
changed[:, -1] += 1
assert_close(layer_batched(changed, transpose=False)[:, :-1],
             layer_batched(x, transpose=False)[:, :-1])
print("... and yet it is causal")

# %% [markdown]
# It is causal and wrong: each "head" now sees its own short stretch of the
# text. Testing one property is no substitute for equality with something
# plain, so that is how this project tests every operation.
#
# ## 4 The same as the package
#
# `nanomai.ops.attention` takes the heads after the split, `(B, H, T, K)`, and
# is causal where it is given no mask. We compare it, and torch's own fused
# call, with ours. Values alone would not do: training runs on gradients, so
# we pull one fixed upstream gradient through each.

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
# And the whole layer: `nanomai.model.Attention` with our weights copied in.
# Its last two arguments are the rotary table, which is the subject of the next
# notebook, and the mask.

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
# What can a look-up like this compute? Here is the best understood example, an
# *induction head* (Olsson et al. 2022): find where the current word stood
# before, and say what came next. It takes two heads, one in each of two layers,
# and we can set them by hand. Words and positions are one-hot vectors. Head 1
# at position $i$ asks for position $i - 1$ and fetches the word there. Head 2
# asks with its own word, and offers as its key the word *before* it, which is
# what head 1 has just written.

# %%
text = "<start> the red fox met the old owl . the red fox met the old owl ."
words = text.split()
names = sorted(set(words))
N = len(words)
word = torch.eye(len(names))[[names.index(w) for w in words]]  # (N, V)
place = torch.eye(N)  # (N, N)


def head(q, k, v, sharpness=20.0):
    """One sharp head through the package's attention."""
    q = q * sharpness * math.sqrt(q.shape[-1])  # undo the scale
    return ops.attention(*(z[None, None] for z in (q, k, v)))[0, 0]


before = place[[0, *range(N - 1)]]  # row i is the one-hot of i - 1
previous_word = head(before, place, word)  # (N, V)
answer = head(word, previous_word, word)  # (N, V): weights over words
print("words", N, "answer", tuple(answer.shape))

# %% [markdown]
# With the identity as values, attention returns its own weights: that is the
# attention map, row $i$ showing what position $i$ reads.
#
# > **Predict.** In the second sentence seven words have a successor. For how
# > many of them is the successor named with certainty?

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
# Five of seven. The stripe in the lower half of the second map is the copying
# itself. Where the word is "the", two or three places match equally well and
# the softmax can only return their mean: one word of context is not enough.
# The pale triangle in the upper half is just as telling: a softmax cannot
# answer "nothing found", so a query without a match reads everything a little.
#
# ## 6 Who may read whom
#
# The mask is a table of permissions, and causality is only the commonest one.
# Training rows are packed with several documents, and each must not read its
# neighbour. A sliding window lets a position see only the last few, which
# bounds the cost. `ops.attention_mask` builds them all from positions.

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
figure, panels = plt.subplots(1, 4, figsize=(11, 3.1), layout="constrained")
for axes, (title, mask) in zip(panels, masks.items(), strict=True):
    axes.imshow(mask.view(N, N), cmap="Greys", vmin=0, vmax=1.6)
    axes.set(title=title, xlabel="key position", xticks=range(0, N, 3),
             yticks=range(0, N, 3))
    axes.grid(False)
panels[0].set_ylabel("query position")
plt.show()

# %% [markdown]
# We count the permissions. Causal allows $N(N+1)/2$ pairs; a window of $w$
# allows at most $w$ a row; two documents are two smaller triangles. Then the
# claim that matters for packing: a packed row gives exactly what each document
# gives alone, in values and in gradients.

# %%
count = {title: mask.sum().item() for title, mask in masks.items()}
print(count)
assert count["causal"] == N * (N + 1) // 2
assert count["window of 4"] == sum(min(i + 1, 4) for i in range(N))
assert count["two documents"] == 5 * 6 // 2 + 7 * 8 // 2

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
# A window does not make a model forget after $w$ words, because layers stack:
# each layer reaches $w - 1$ positions further back through the one below. The
# gradient shows it: count the inputs from which the last output gets anything.

# %%
def reach(layers, window, n=40):
    """Inputs that the last of n outputs depends on."""
    x = torch.randn(1, 1, n, 4, generator=generator).requires_grad_()
    positions = torch.arange(n)
    mask = ops.attention_mask(positions, positions, window)
    y = x
    for _ in range(layers):
        y = ops.attention(y, y, y, mask)
    (gradient,) = torch.autograd.grad(y[0, 0, -1].sum(), x)
    return (gradient.abs().sum(-1) > 0).sum().item()


reached = [reach(layers, window=4) for layers in (1, 2, 3, 6)]
print("layers 1, 2, 3, 6 reach", reached, "positions")
assert reached == [1 + layers * (4 - 1) for layers in (1, 2, 3, 6)]

# %% [markdown]
# ## 7 Exercises
#
# **1 · A sliding window.** Write the mask from two position vectors: True
# where query position $m$ may read key position $n$, that is, where
# $0 \le m - n < w$. The positions need not start at zero, nor be equally many.
#
# <details><summary>Hint</summary>
#
# Two broadcasts: `query[:, None]` against `key[None, :]` gives every
# difference at once. A window of 1 sees only itself.
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
# **2 · ALiBi** (Press et al. 2021) tells attention about distance without
# any rotation: it adds $-m_h (i - j)$ to the scaled score of query $i$ and key
# $j$, with a fixed slope $m_h$ for each head. With $H$ heads ($H$ a power of
# two) the slopes are $2^{-8/H}, 2^{-16/H}, \dots, 2^{-8}$. Return the bias
# `(H, T, T)`. What stands above the diagonal is masked later, so it may be
# anything finite.
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
# **3 · Heads have no order.** Return new weights in which head $h$ is the old
# head `order[h]`, such that the layer computes the same function. Weights are
# `(out, in)`: `wq`, `wk`, `wv` are $(HK, D)$ and `wo` is $(D, HK)$.
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
# reported for MAI-1; the architecture of MAI-1 itself was never published.
# Two costs of attention can be read off it. The first is memory: the scores of
# one layer form a $(H, T, T)$ array for each sequence.
#
# > **Predict.** How many of the 80 GB of an H100 would the scores of one
# > layer take, for one sequence of 8,192 tokens at 2 bytes a score?

# %%
big = nanomai.load_config("mai-1-dense").model
T = big.context_length
score_bytes = big.n_heads * T * T * 2
vector_bytes = 2 * T * big.head_dim * (2 * big.n_heads + 2 * big.n_kv_heads)
print(f"{big.n_layers} layers, {big.n_heads} heads of {big.head_dim}, T {T}")
print(f"scores, one layer:     {score_bytes / 1e9:6.1f} GB")
print(f"q, k, v and the output:{vector_bytes / 1e9:6.1f} GB")
print(f"scores, all layers:    {big.n_layers * score_bytes / 1e12:6.2f} TB")
assert score_bytes // vector_bytes == 30
assert 19 < score_bytes / 1e9 < 20

# %% [markdown]
# A quarter of the card, for one layer of one sequence, and 30 times more than
# what goes in and comes out. The next notebook gets rid of it. The second
# cost is arithmetic, which grows as $T^2$ for a sequence and therefore as $T$
# for each token.
#
# > **Predict.** At 8,192 tokens, what share of the training arithmetic is
# > attention's two products? At what length is it half?

# %%
def pair_flops(T):
    """Of one training token in attention's products, T / 2 keys seen."""
    return 6 * big.n_layers * T * big.n_heads * big.head_dim


lengths = [2**n for n in range(10, 21)]
share = [100 * pair_flops(T) / big.flops_per_token(T) for T in lengths]
weights = big.flops_per_token(1) - pair_flops(1)  # the matrices' part
half = weights / pair_flops(1)
print(f"at 8,192 tokens {share[3]:.1f} %, half at {half / 1e3:.0f} thousand")
assert lengths[3] == 8192 and 3 < share[3] < 4 and 2**17 < half < 2**18

plt.semilogx(lengths, share, "o-", base=2)
plt.axvline(8192, color="k", ls=":", lw=1)
plt.text(9000, 80, "8,192", fontsize=9)
plt.axhline(50, color="k", ls="--", lw=1)
plt.text(9000, 52, f"half, at {half / 1e3:.0f} thousand", fontsize=9)
plt.xlabel("tokens in a sequence, T (log axis)")
plt.ylabel("attention's share of FLOPs (%)")
plt.title("mai-1-dense (our proposal), training")
plt.show()

# %% [markdown]
# Three and a half percent. The famous quadratic cost is no obstacle to
# *arithmetic* at this length, since a model this wide spends nearly everything
# in its weight matrices. What hurts first is memory and the bytes moved.
#
# ## What to keep
#
# 1. Attention is a soft look-up: scores, mask, softmax, weighted mean.
# 2. $1/\sqrt K$ keeps the scores' spread at one, so that gradients survive.
# 3. The mask is a table of permissions; heads ask several questions at once.
#
# **Real systems** never store the scores (next notebook); skip the masked
# half of the work; often normalise queries and keys as well (QK-norm); some
# scale by $1/K$ when width changes (muP), and some give the softmax a place
# for "nothing found" (an attention sink).
#
# **Read on.** The code: [`nanomai/ops.py`](../nanomai/ops.py) (`attention`,
# `attention_mask`) and [`nanomai/model.py`](../nanomai/model.py)
# (`Attention`). Papers:
# [attention](https://arxiv.org/abs/1706.03762),
# [induction heads](https://arxiv.org/abs/2209.11895),
# [ALiBi](https://arxiv.org/abs/2108.12409),
# [sliding windows in Mistral](https://arxiv.org/abs/2310.06825).
#
# **Next:** `04_rope_gqa_flash`. Attention itself does not know the *order* of
# the past: section 5 had to hand it one-hot positions. We mend that, and make
# the 19 GB vanish.
