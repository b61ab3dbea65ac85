# %% [markdown]
# # 07 · How does a model write, one token at a time?
#
# **Goal.** Choose each next token well, and stop reading the whole text again
# for each one: build the samplers and the key-value cache, equal to
# `nanomai.sampling`.
#
# **Prerequisites.** `03_attention` and `04_rope_gqa_flash`. **Time.** About 50
# minutes; it runs in under a minute.
#
# **You will be able to**
# - say what temperature, top-k, top-p and min-p do to a distribution;
# - derive the cache from the causal mask, and count what it saves;
# - write to many prompts of different lengths at once;
# - bound the speed and memory of a 500B model with three numbers.

# %%
import dataclasses
import math
import re
import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch.testing import assert_close

import nanomai
from nanomai import ops, sampling
from nanomai.config import ModelConfig, OptimConfig
from nanomai.optim import build_optimizers, learning_rate, set_learning_rate
from nanomai.show import lesson

lesson()

# %% [markdown]
# ## 1 A model to write with
#
# Two layers, a thousand tokens and a small text of tiny stories are enough to
# see everything below. Notebook 06 explained the loop.

# %%
text = Path("lesson.txt").read_text(encoding="utf-8")
tokenizer = nanomai.train_bpe([text], 1024)
ids = torch.tensor(tokenizer.encode(text))
config = ModelConfig(n_layers=2, d_model=64, n_heads=4, n_kv_heads=2,
                     head_dim=16, d_ff=192, vocab_size=1024,
                     context_length=96)
model = nanomai.build_model(config)
print(f"{len(ids):,} tokens, {config.n_parameters:,} parameters")

# %%
optim = OptimConfig(name="muon", lr=1e-2, warmup_steps=20)
optimizers = build_optimizers(model, optim)
generator = torch.Generator().manual_seed(0)
steps, T, B = 300, config.context_length, 12
for step in range(steps):
    set_learning_rate(optimizers, learning_rate(optim, step, steps))
    starts = torch.randint(len(ids) - T, (B, 1), generator=generator)
    window = ids[starts + torch.arange(T + 1)]  # (B, T + 1)
    loss = model(window[:, :-1], window[:, 1:])
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
print(f"loss {loss.item():.1f} nats a token, {math.log(1024):.1f} untrained")
assert loss < 1.2

# %% [markdown]
# The model turns ids into logits, one row for each position; the last row is
# about the next token. Writing is a loop: choose a token from that row, append
# it, and ask again. Nothing here needs gradients, so we switch them off.
#
# > **Predict.** We always take the likeliest token. Will the text be good?

# %%
torch.set_grad_enabled(False)


def write_naively(ids, n, choose):
    """`ids` and n more, reading the last 96 again for each."""
    ids = list(ids)
    for _ in range(n):
        logits = model(torch.tensor([ids[-96:]]))  # (1, T, V)
        ids.append(choose(logits[0, -1]))
    return ids


def show(ids):
    for line in tokenizer.decode(ids).split("\n"):
        print(textwrap.fill(line, 76))


prompt = tokenizer.encode("The elephant")
greedy = write_naively(prompt, 130, lambda logits: int(logits.argmax()))
show(greedy)
assert tokenizer.decode(greedy).count("to eat, André?") > 2

# %% [markdown]
# Each sentence is fine, but soon the story is about André and his goulash, for
# ever: what has just been written is likelier to come again, and the likeliest
# token closes the circle. A row of likeliest tokens is not the likeliest text,
# let alone the best. We have to draw.
#
# ## 2 Temperature
#
# To draw from probabilities $p$, take a uniform number $u$ and find where the
# running sum of $p$ passes it. A temperature $\tau$ first divides the logits:
#
# $$p_i = \frac{e^{z_i/\tau}}{\sum_j e^{z_j/\tau}}$$
#
# Below 1 it sharpens the distribution, above 1 it flattens it.
#
# > **Predict.** What does temperature 2 do to the elephant?

# %%
def tempered(logits, tau):
    weights = ((logits - logits.max()) / tau).exp()
    return weights / weights.sum()


def draw(p, generator):
    u = torch.rand((), generator=generator)
    found = torch.searchsorted(p.cumsum(-1), u)
    return int(found.clamp_max(len(p) - 1))  # a sum may round to 0.999...


for tau in (0.7, 2.0):
    print(f"--- temperature {tau}")
    show(write_naively(
        prompt, 40, lambda z, tau=tau: draw(tempered(z, tau), generator)))

# %% [markdown]
# Sense at 0.7, rubble at 2. Look at one distribution: what was found?

# %%
def logits_after(text):
    return model(torch.tensor([tokenizer.encode(text)]))[0, -1]  # (V,)


logits = logits_after("One evening, Mei found a")
for tau in (0.3, 1.0, 3.0):
    p = tempered(logits, tau)
    assert_close(p, sampling.probabilities(logits[None], tau)[0])
    print(f"temperature {tau}: the likeliest token has {p.max():.2f}, "
          f"the 1,000 least likely {p.sort().values[:1000].sum():.2f}")

# %% [markdown]
# How much freedom is that? Entropy $H = -\sum_i p_i \ln p_i$ measures it in
# nats; $e^H$ is a number of equally likely choices. Two ends are known:
# $H \to 0$ as $\tau \to 0$ (one winner) and $H \to \ln V$ as $\tau \to \infty$.
# For a hot distribution, expanding the exponentials gives
# $H \approx \ln V - \mathrm{Var}(z) / 2\tau^2$. In between,
# $dH/d\tau = \mathrm{Var}_p(z)/\tau^3$ is never negative.
#
# We draw 12,000 tokens with the package's `choose` at each temperature and
# compare the entropy of what came out.

# %%
def entropy(p):
    return -torch.xlogy(p, p).sum().item()


def drawn_entropy(tau, n=12_000):
    rows = logits.expand(1000, -1)
    tokens = torch.cat([sampling.choose(rows, tau, generator=generator)
                        for _ in range(n // 1000)])
    return entropy(tokens.bincount(minlength=1024) / n)


dots = [0.1, 0.3, 0.7, 1.2, 2.0, 4.0, 10.0]
measured = [drawn_entropy(t) for t in dots]
exact = [entropy(tempered(logits, t)) for t in dots]
assert exact == sorted(exact)
assert all(abs(m - e) < 0.1 for m, e in zip(measured, exact, strict=True))

# %%
taus = torch.logspace(-1, 1.3, 60).tolist()
hot = [t for t in taus if t > 4]
plt.semilogx(taus, [entropy(tempered(logits, t)) for t in taus],
             label=r"theory: entropy of softmax$(z/\tau)$")
plt.semilogx(hot, [math.log(1024) - logits.var().item() / (2 * t * t)
                   for t in hot], "--",
             label=r"theory, hot: $\ln V - \mathrm{Var}(z)/2\tau^2$")
plt.semilogx(dots, measured, "ko", ms=5, label="12,000 draws")
plt.axhline(math.log(1024), color="grey", ls=":", label=r"$\ln V$")
plt.xlabel(r"temperature $\tau$ (log axis)")
plt.ylabel("entropy (nats)")
plt.legend()
plt.show()

# %% [markdown]
# ## 3 Cutting the tail
#
# At temperature 1 we draw from what the model believes, long tail included.
#
# > **Predict.** All but the 20 likeliest tokens share how much probability, on
# > average over a text? How probable is a text of 90 tokens that never draws
# > one of them?

# %%
rows = ids[: 96 * 20].view(20, 96)
p = model(rows).softmax(-1)  # (20, 96, V)
tail = 1 - p.topk(20).values.sum(-1)  # (20, 96)
print(f"tail {tail.mean():.2f} on average; "
      f"90 tokens without it {(1 - tail).log().mean().mul(90).exp():.2f}")
assert 0.01 < tail.mean() < 0.05

# %% [markdown]
# Three hundredths look harmless, but each token is a new chance, and a text with
# no slip is rare. So we cut. **Top-k** keeps the $k$ likeliest tokens.
# **Top-p**, nucleus sampling, keeps the fewest whose probabilities reach $p$.
# **Min-p** keeps those with at least a share of the largest probability
# (exercise 2). What stays is divided by its sum.

# %%
def top_k(p, k):
    return p.argsort(descending=True)[:k].tolist()


def top_p(p, enough):
    kept, total = [], 0.0
    for token in p.argsort(descending=True).tolist():
        kept.append(token)
        total += p[token].item()
        if total >= enough:
            return kept


def renormalized(p, kept):
    cut = torch.zeros_like(p)
    cut[kept] = p[kept]
    return cut / cut.sum()

# %%
rows = model(ids[None, :60])[0]  # (60, V): sure and unsure positions
for row in rows:
    p = row.softmax(-1)
    for k in (1, 5, 50):
        package = sampling.probabilities(row[None], top_k=k)[0]
        assert_close(package, renormalized(p, top_k(p, k)))
    for enough in (0.1, 0.5, 0.9, 0.99):
        package = sampling.probabilities(row[None], top_p=enough)[0]
        kept = top_p(p, enough)
        assert set(package.nonzero()[:, 0].tolist()) == set(kept)
        assert_close(package, renormalized(p, kept))
print("top-k and top-p keep the same tokens as the package")

# %% [markdown]
# > **Predict.** Which rule keeps fewer tokens where the model is sure, and
# > which keeps more where it is not?

# %%
sure, unsure = "Last winter, Mei", "One evening, Mei found a"
rules = {"top_k": 10, "top_p": 0.9, "min_p": 0.1}
kept = {}
figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True,
                            layout="constrained")
for ax, prefix in zip(axes, (sure, unsure), strict=True):
    row = logits_after(prefix)
    p = row.softmax(-1).sort(descending=True).values
    ax.loglog(range(1, 1025), p, "k")
    for i, (rule, value) in enumerate(rules.items()):
        cut = sampling.probabilities(row[None], **{rule: value})
        kept[prefix, rule] = n = int((cut > 0).sum())
        ax.axvline(n, color=f"C{i}", ls=("-", "--", ":")[i],
                   label=f"{rule} {value} keeps {n}")
    ax.set(title=f"after “{prefix}”", xlabel="rank of a token (log axis)")
    ax.legend(loc="upper right", bbox_to_anchor=(1.02, 1.02))
axes[0].set(ylabel="probability (log axis)", ylim=(1e-8, 3))
plt.show()
assert kept[sure, "top_p"] == kept[sure, "min_p"] == 1
assert kept[sure, "top_k"] == kept[unsure, "top_k"] == 10
assert kept[unsure, "top_p"] > 10 and kept[unsure, "min_p"] > 10

# %% [markdown]
# Top-k is too generous on the left and too strict on the right; the other two
# adapt. Does it matter? A word that never occurs in the lesson was put
# together wrongly from pieces of words. We count such words.

# %%
known = set(re.findall(r"\w+", text))
starts = [tokenizer.encode(s) for s in ("One evening,", "Mei", "After", "“")]


def invented(**options):
    """The share of words that no one ever used."""
    outs = nanomai.generate(model, starts * 6, 60, seed=0, **options)
    words = [w for out in outs
             for w in re.findall(r"\w+", tokenizer.decode(out))[1:-1]]
    return sum(w not in known for w in words) / len(words)


plain = invented(temperature=1.0)
hot, cut = (invented(temperature=1.5, min_p=m) for m in (0.0, 0.1))
assert hot > 3 * plain and hot > 3 * cut
print("at temperature 1.5 min-p removes most of the invented words")

# %% [markdown]
# ## 4 What does a token cost?
#
# Our loop read the whole text again for every token. Time depends on the
# machine, so we count: a hook on the embedding sees every position that the
# model computes. After a prompt of $P$ tokens, new token $i$ (from 0) costs
# $P + i$.
#
# > **Predict.** 88 tokens after a prompt of 8: how many positions in all?

# %%
def positions_computed(write):
    """Of each forward pass during `write()`; and what was written."""
    counts = []
    hook = model.embed.register_forward_hook(
        lambda module, inputs, output: counts.append(inputs[0].numel()))
    written = write()
    hook.remove()
    return counts, written


P, n = 8, 88
prompt = ids[:P].tolist()
naive, slow_text = positions_computed(
    lambda: write_naively(prompt, n, lambda z: int(z.argmax())))
print("without memory:", sum(naive), "positions")
assert sum(naive) == n * P + n * (n - 1) // 2

# %% [markdown]
# Quadratic in $n$. What is computed again each time? Add a token to a text and
# look at the logits of the positions before it.
#
# > **Predict.** How far do they move?

# %%
before, after = model(ids[None, :20]), model(ids[None, :21])  # (1, T, V)
assert_close(after[:, :20], before)
print("logits of the first 20 positions: unchanged")

# %% [markdown]
# Not at all: the causal mask forbids a position to look ahead, so nothing that
# comes later can change it, in any layer. A later position needs only two
# things from it, its key and its value. We keep them.
#
# ## 5 The key-value cache
#
# First one attention layer by hand. Positions come one by one; each brings a
# query, a key and a value, and only the last two are remembered. There is no
# mask: what must not be seen does not exist yet.

# %%
layer, K, T = model.blocks["0"].attention, config.head_dim, 9
x = torch.randn(1, T, config.d_model, generator=generator)
cos, sin = ops.rotary_table(torch.arange(T), K, config.rope_theta)


def heads(y):
    return y.unflatten(-1, (-1, K)).transpose(1, 2)  # (1, heads, T, K)


keys, values, rows = [], [], []
for t in range(T):
    new, angle = x[:, t : t + 1], (cos[t : t + 1], sin[t : t + 1])
    q = ops.rotary(heads(layer.wq(new)), *angle)  # (1, H, 1, K)
    keys.append(ops.rotary(heads(layer.wk(new)), *angle))
    values.append(heads(layer.wv(new)))
    k, v = (torch.cat(past, 2).repeat_interleave(2, dim=1)
            for past in (keys, values))  # (1, H, t + 1, K)
    y = (q @ k.mT / math.sqrt(K)).softmax(-1) @ v  # (1, H, 1, K)
    rows.append(layer.wo(y.transpose(1, 2).flatten(2)))
assert_close(torch.cat(rows, 1), layer(x, (cos, sin), None))
print("one position at a time equals all at once")

# %% [markdown]
# The whole model asks a cache for three things: the past keys and values of
# each layer, the positions, and a mask. This one glues tensors together.

# %%
class NaiveLayer:
    keys = values = None

    def extend(self, k, v):  # (B, G, new, K), and returns (B, G, all, K)
        if self.keys is not None:
            k = torch.cat((self.keys, k), 2)
            v = torch.cat((self.values, v), 2)
        self.keys, self.values = k, v
        return k, v


class NaiveCache:
    def __init__(self):
        self.layers = [NaiveLayer() for _ in range(config.n_layers)]

    @property
    def length(self):
        keys = self.layers[0].keys
        return 0 if keys is None else keys.shape[2]

    def key_positions(self, new):
        return torch.arange(self.length + new)

    def mask(self, queries, keys, window):
        return None  # plainly causal

# %%
def in_pieces(cache, sizes):
    pieces = ids[None, : sum(sizes)].split(sizes, dim=1)
    return torch.cat([model(piece, cache=cache) for piece in pieces], 1)


full = model(ids[None, :40])  # (1, 40, V)
for sizes in ([40], [1] * 40, [30] + [1] * 10, [7, 1, 20, 12]):
    package = sampling.KVCache(model, batch_size=1, capacity=40)
    assert_close(in_pieces(NaiveCache(), sizes), full)
    assert_close(in_pieces(package, sizes), full)
print("cached logits equal a full forward pass, however it is cut")

# %% [markdown]
# The package's `KVCache` sets its room aside once and writes into slices,
# instead of copying the whole past for each token; `LayerCache.extend` is four
# lines. Where can such a cache go wrong? In its positions.
#
# > **Predict.** One cache counts from 100 instead of from 0. In another only
# > the tokens after the prompt stand one too far. Which changes the logits?

# %%
class Moved(NaiveCache):
    def __init__(self, start, later):
        super().__init__()
        self.start, self.later = start, later

    def key_positions(self, new):
        jump = self.later if self.length else 0
        return super().key_positions(new) + self.start + jump


moved = in_pieces(Moved(100, 0), [30] + [1] * 10)
assert_close(moved, full, rtol=1e-3, atol=1e-3)
broken = in_pieces(Moved(0, 1), [30] + [1] * 10)
try:
    assert_close(broken, full, rtol=1e-3, atol=1e-3)
except AssertionError as error:
    print("one too far, caught:", type(error).__name__)
same = (broken.argmax(-1) == full.argmax(-1))[0, 30:].sum().item()
print(f"yet {same} of its 10 likeliest tokens are right")
assert 5 <= same < 10

# %% [markdown]
# Counting from 100 changes nothing, since RoPE knows only distances (notebook
# 04). The second is a real bug, and a sly one: most choices stay right, so the
# text still looks good. Only the comparison with a full forward pass shows it.
#
# Now we count what the package computes, and compare its text with ours.

# %%
cached, text_of_cache = positions_computed(
    lambda: nanomai.generate(model, prompt, n))
assert prompt + text_of_cache == slow_text
i, some = torch.arange(n), slice(None, None, 4)
plt.plot(i, P + i, "k-", lw=1, label="theory: P + i")
plt.plot(i[some], naive[some], "o", ms=5, label="without cache")
plt.plot(i, [P] + [1] * (n - 1), "k--", lw=1, label="theory: P, then 1")
plt.plot(i[some], cached[some], "s", ms=5, label="with cache")
plt.xlabel("new token, i")
plt.ylabel("positions computed for it")
plt.legend()
plt.show()
assert cached == [P] + [1] * (n - 1)
times = sum(naive) // sum(cached)
print(f"{sum(naive)} against {sum(cached)} positions: {times} times")

# %% [markdown]
# The prompt is read at once (**prefill**), then each token costs one position
# (**decode**). That position still attends to the whole past, so its attention
# grows with the text, but the weight matrices work once. The price is memory:
# two vectors of $G \cdot K$ numbers in each layer, for each token.
#
# ## 6 Many prompts at once
#
# A matrix that is read once can serve many rows. Prompts differ in length, and
# the new token must come in the same column for all, so pads go to the *left*.
# Then each row needs its own positions, and no token may see a pad.

# %%
prompts = [tokenizer.encode(s) for s in
           ("Mei", "One evening, Kwame", "Today is Monday. Tomorrow will")]
longest = max(map(len, prompts))
padding = torch.tensor([longest - len(p) for p in prompts])
rows = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
alone = torch.cat([model(torch.tensor([p]), last_only=True) for p in prompts])

padded = sampling.KVCache(model, 3, 40, padding)
assert_close(model(rows, cache=padded, last_only=True), alone)
try:  # break it: nobody tells the cache about the pads
    unaware = sampling.KVCache(model, 3, 40)
    assert_close(model(rows, cache=unaware, last_only=True), alone)
except AssertionError as error:
    print("pads as text, caught:", type(error).__name__)

# %% [markdown]
# `generate` does this for us. `stream` hands out each step as it comes, a list
# with one token for each row, and None once a row has met a stop token.

# %%
together = nanomai.generate(model, prompts, 16)
assert together == [nanomai.generate(model, p, 16) for p in prompts]
for p, new in zip(prompts, together, strict=True):
    written = tokenizer.decode(new).split("\n")[0]
    print(f"{tokenizer.decode(p):>32} |{written[:43]}")

stop = [t for t, b in enumerate(tokenizer.tokens) if b"\n" in b]
ended = list(sampling.stream(model, prompts, 60, 0.0, stop_tokens=stop))
lengths = [sum(step[row] is not None for step in ended) for row in range(3)]
print("tokens until a stop:", lengths)
assert len(ended) == max(lengths) and len(set(lengths)) > 1

# %% [markdown]
# ## 7 Exercises
#
# **1 · Repetition penalty.** The circles of section 1 can be broken: lower the
# logit of every token in `seen`, a list of ids, once each. A positive logit is
# divided by `penalty`, a negative one multiplied. Leave the input as it is.
#
# <details><summary>Hint</summary>
#
# Why two cases? Dividing a negative logit by 1.3 would raise it.
#
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# def penalize(logits, seen, penalty):
#     old = logits[seen]
#     new = logits.clone()
#     new[seen] = torch.where(old > 0, old / penalty, old * penalty)
#     return new
# ```
#
# </details>

# %%
from nanomai.exercises.sampling import (
    check_min_p,
    check_pad_left,
    check_penalize,
)


def penalize(logits, seen, penalty):
    raise NotImplementedError


check_penalize(penalize)

# %%
# the package's penalty, on one distribution and on the story of André
seen = torch.zeros(1, 1024, dtype=torch.bool)
seen[0, greedy] = True
lower = sampling.penalize_repetition(logits[None], seen, 1.3)[0] < logits
assert torch.equal(lower, seen[0])  # what was seen, and only that
again = nanomai.generate(model, tokenizer.encode("The elephant"), 130,
                         repetition_penalty=1.3)
asked = [tokenizer.decode(t).count("to eat, André") for t in (greedy, again)]
print(f"André is asked {asked[0]} times, with a penalty {asked[1]}")
assert asked[1] < asked[0]

# %% [markdown]
# **2 · Min-p.** From probabilities `p` `(V,)`, keep the tokens with at least
# `share` times the largest probability, and let what stays sum to one.
#
# <details><summary>Hint</summary>
#
# The limit is relative: `share * p.max()`. The likeliest token always stays.
#
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# def min_p(p, share):
#     kept = torch.where(p >= share * p.max(), p, 0.0)
#     return kept / kept.sum()
# ```
#
# </details>

# %%
def min_p(p, share):
    raise NotImplementedError


check_min_p(min_p)

# %% [markdown]
# **3 · Left padding.** From prompts (lists of ids) make `ids` `(B, T)` padded
# on the left, `positions` `(B, T)` counted from each row's own first token,
# and `mask` `(B, T, T)`: True where a token may look. No token sees a pad. A
# pad may look where it likes, but at something: a softmax over nothing is NaN.
#
# <details><summary>Hint</summary>
#
# Subtract each row's number of pads from `torch.arange(T)`: pads are then the
# negative positions.
#
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# def pad_left(prompts):
#     T = max(len(p) for p in prompts)
#     pads = torch.tensor([T - len(p) for p in prompts])
#     ids = torch.tensor([[0] * (T - len(p)) + p for p in prompts])
#     positions = torch.arange(T) - pads[:, None]  # (B, T)
#     causal = positions[:, :, None] >= positions[:, None, :]  # (B, T, T)
#     real = positions >= 0
#     mask = causal & real[:, None, :] | ~real[:, :, None]
#     return ids, positions, mask
# ```
#
# </details>

# %%
def pad_left(prompts):
    raise NotImplementedError


check_pad_left(pad_left)

# %% [markdown]
# ## At 500B
#
# MAI-1 was reported to be too complex for consumer devices, to be served from
# data centres. What does that take? `mai-1-dense` is our own proposal for a
# model of that size, not MAI-1. What follows is arithmetic, not measurement.
# A value takes two bytes (bfloat16).

# %%
big = nanomai.load_config("mai-1-dense").model
every = dataclasses.replace(big, n_kv_heads=big.n_heads)  # no grouping
cache, cache_every = (c.kv_cache_bytes_per_token(2) * c.context_length
                      for c in (big, every))
print(f"{big.kv_cache_bytes_per_token(2):,} bytes a token")
print(f"one conversation of 8,192 tokens: {cache / 1e9:.1f} GB; "
      f"with a key for each head {cache_every / 1e9:.1f} GB")
assert big.kv_cache_bytes_per_token(2) == 2 * 120 * 8 * 128 * 2
assert cache_every == 18 * cache

# %% [markdown]
# Decoding is a matter of reading: for one token every weight comes out of memory
# once (of the input embedding only one row). Take two servers of eight H100,
# the fewest that hold the weights, with 80 GB and 3.35 TB/s a card by the data
# sheet. No token can come faster than the weights can be read.
#
# > **Predict.** How many tokens a second, at best, for one reader?

# %%
weights = 2 * big.n_parameters  # bytes
read = weights - 2 * big.vocab_size * big.d_model  # for each token
memory, bandwidth = 16 * 80e9, 16 * 3.35e12  # bytes, bytes a second
assert memory / 2 < weights < memory
floor = read / bandwidth  # seconds
print(f"{read / 1e9:.0f} GB read for a token: at least "
      f"{1000 * floor:.1f} milliseconds,")
print(f"so at most {1 / floor:.0f} tokens a second")
assert 50 < 1 / floor < 60

# %% [markdown]
# One reader is a waste: the same weights could serve a whole batch. With $b$
# conversations of $S$ tokens, a step reads the weights once and $b$ caches, so
# the rate is at most
# $b \cdot \text{bandwidth} / (\text{weights} + b \cdot \text{cache})$.
#
# > **Predict.** What ends the growth first: bandwidth, or room for caches?

# %%
def rate(b, cache):
    return b * bandwidth / (read + b * cache)


batch = [2 ** (i / 4) for i in range(49)]  # 1 to 4,096
room = {}
for i, (name, c) in enumerate(
        {"8 key-value heads": cache, "144 heads": cache_every}.items()):
    room[name] = n = int((memory - weights) // c)
    fits = [b for b in batch if b < n] + [n]
    plt.loglog(batch, [rate(b, c) for b in batch], f"C{i}--", lw=1)
    plt.plot(fits, [rate(b, c) for b in fits], f"C{i}",
             label=f"{name}: memory full at {n}", marker="o", markevery=[-1])
    plt.axhline(bandwidth / c, color=f"C{i}", ls=":", lw=1)
plt.xlabel("conversations of 8,192 tokens at once (log axis)")
plt.ylabel("tokens a second, at most (log axis)")
plt.title("16 H100, bf16; dashed: if it fitted; dotted: caches alone")
plt.legend()
plt.show()

# %%
b = room["8 key-value heads"]
arithmetic = b * 2 * (read / 2) / (16 * 989e12)  # seconds at dense bf16 peak
assert arithmetic < b / rate(b, cache)  # reading is the slower part
print(f"{b} conversations: at most {rate(b, cache):,.0f} tokens a second in "
      f"all, {rate(b, cache) / b:.0f} each")
assert room["144 heads"] < 4 < 60 < b

# %% [markdown]
# Room ends it, long before bandwidth does. Grouped keys are what makes a
# batch of 70 possible instead of 3, and fifty times the text costs each reader
# a fifth of the speed.
#
# ## What to keep
#
# 1. Temperature sets the entropy; top-p and min-p cut a tail that adapts.
# 2. The causal mask freezes the past, so keys and values can be kept: one
#    position for each token, paid in memory.
# 3. Decoding reads weights and caches: bytes over bandwidth bound the speed.
#
# **Real systems** keep caches in pages and swap finished conversations for new
# ones at every step, share the cache of a common beginning, store it in 8
# bits, and let a small model guess ahead (speculative decoding).
#
# **Read on.** The code: [`nanomai/sampling.py`](../nanomai/sampling.py).
# Papers: [nucleus sampling](https://arxiv.org/abs/1904.09751),
# [min-p](https://arxiv.org/abs/2407.01082),
# [repetition penalty](https://arxiv.org/abs/1909.05858),
# [grouped-query attention](https://arxiv.org/abs/2305.13245),
# [paged attention](https://arxiv.org/abs/2309.06180).
#
# **Next:** `08_scaling_laws` (planned): how large a model, and on how much text?
