# %% [markdown]
# # 05b · What changed between GPT-2 and the models of today, and what did each change buy?
#
# **Goal.** Walk from GPT-2 to a model of 500 billion parameters, one setting
# of the configuration at a time. Price each step by formula, see what it did
# to the loss at equal compute, and prove that one model file serves them all.
#
# **Prerequisites.** `05_block_and_model`. **Time.** About 50 minutes; it runs
# in half a minute.
#
# **You will be able to**
# - read a configuration as a list of differences from GPT-2;
# - tell changes that lower the loss from changes that lower the bill;
# - compare two models fairly, and say when a comparison says nothing;
# - catch weights that were read with the settings of another family.

# %%
import json
import math
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch.testing import assert_close

import nanomai
from nanomai import ops
from nanomai.architecture import MLAConfig, MoEConfig
from nanomai.exercises import families as exercises
from nanomai.show import lesson

lesson()
generator = torch.Generator().manual_seed(5)

# %% [markdown]
# ## 1 Two helpers and a small GPT-2
#
# A family is a set of values in `ModelConfig`. So the first helper lists the
# fields in which two configurations differ. The second asks the closed forms
# what a model costs: parameters, FLOPs of a training token, and the bytes
# that one more token adds to the key-value cache when the model writes.
#
# We begin with `gpt2-124m` itself, and change only its sizes.

# %%
def flat(config, prefix=""):
    """Every setting by its name: {"norm": "layernorm", ...}"""
    found = {}
    for field in fields(config):
        name, value = prefix + field.name, getattr(config, field.name)
        found |= flat(value, name + ".") if is_dataclass(value) else {
            name: value}
    return found


def diff(a, b):
    """{field: (in a, in b)} where they differ"""
    a, b = flat(a), flat(b)
    return {name: (a[name], b[name]) for name in a if a[name] != b[name]}


def price(c):
    return c.n_parameters, c.flops_per_token(), c.kv_cache_bytes_per_token()

# %%
gpt2 = nanomai.load_config("gpt2-124m").model
small = replace(gpt2, n_layers=4, d_model=128, n_heads=4, n_kv_heads=4,
                head_dim=32, d_ff=512, vocab_size=512, context_length=128)
for name, (ours, theirs) in diff(small, gpt2).items():
    print(f"{name:15} {theirs:6,} -> {ours:4,}")
assert set(diff(small, gpt2)) == {
    "n_layers", "d_model", "n_heads", "n_kv_heads", "head_dim", "d_ff",
    "vocab_size", "context_length"}

# %% [markdown]
# ## 2 The ladder
#
# Each rung changes the rung before it and prints what changed. `family` names
# a file of `scale_configs/` that has the setting. The cell checks it: choices
# must be the same there, and what can be switched off must be on or off.
#
# **phi-1.5** lets attention and MLP read the *same* normed input and adds
# both to the stream. There is one norm less, and neither branch has to wait
# for the other. And it turns queries and keys by their position (RoPE, only
# half of each head) where GPT-2 adds a learned table.

# %%
CHOICES = {"norm", "activation", "position", "parallel_block",
           "tied_embeddings"}
SWITCHES = {"biases", "rotary_dim", "sliding_window", "moe.n_experts",
            "moe.n_shared_experts", "mla.kv_rank"}
ladder = {"GPT-2": small}


def climb(name, family, **changes):
    *_, before = ladder.values()
    config = ladder[name] = replace(before, **changes)
    known = flat(nanomai.load_config(family).model)
    print(f"{name}, as in {family}")
    for field, (old, new) in diff(before, config).items():
        print(f"    {field}: {old} -> {new}")
        assert field not in CHOICES or known[field] == new
        assert field not in SWITCHES or bool(known[field]) == bool(new)
    n, flops, kv = price(config)
    print(f"    {n:,} parameters, {flops / 1e6:.2f} MFLOP, {kv:,} bytes")


climb("parallel block", "phi-1.5", parallel_block=True)
climb("RoPE, half of a head", "phi-1.5", position="rope", rotary_dim=16)

# %% [markdown]
# **Llama** puts the MLP after attention again, turns whole heads, and takes
# a simpler norm, no biases, a gated MLP and a head of its own.
#
# > **Predict.** SwiGLU has three matrices where GELU has two. How wide must
# > its MLP be to cost the same?

# %%
climb("RoPE, all of a head", "llama-2-7b", rotary_dim=None)
climb("MLP after attention", "llama-2-7b", parallel_block=False)
climb("RMSNorm", "llama-2-7b", norm="rmsnorm")
climb("no biases", "llama-2-7b", biases=())
climb("SwiGLU", "llama-2-7b", activation="swiglu", d_ff=336)
climb("untied head", "llama-2-7b", tied_embeddings=False)
assert abs(3 * 336 / (2 * 512) - 1) < 0.02

# %% [markdown]
# Two thirds as wide. Llama-2-7B has $11008$ where $\frac23 \cdot 4 d$ would be
# $10923$; exercise 2 finds its rule.
#
# The next rungs are about what a model costs *in use*: fewer key-value heads
# (Llama-2-70B), a window (Mistral), fewer and wider heads (64 numbers in
# GPT-2 and phi-1.5, 80 in phi-2, 96 in phi-3-mini, 128 in nearly all others), a
# vocabulary four times as large (32,000 in Mistral 7B, 131,072 in NeMo). Our
# dense 500B proposal takes the window off again.
#
# Last, the sparse families: eight experts of which a token meets two
# (Mixtral), together as wide as the MLP before; then smaller ones beside a
# shared expert, balanced by a bias (DeepSeek-V3, and our `mai-1-moe`); then keys
# and values that are made from one short latent vector (DeepSeek-V3).
# `09_moe` takes experts apart.

# %%
climb("grouped queries", "llama-2-70b", n_kv_heads=2)
climb("window of 32", "mistral-7b", sliding_window=32)
climb("fewer, wider heads", "mistral-nemo-12b",
      n_heads=2, n_kv_heads=1, head_dim=64)
climb("4 x the vocabulary", "mistral-nemo-12b", vocab_size=2048)
climb("no window", "mai-1-dense", sliding_window=None)
routed = MoEConfig(n_experts=8, experts_per_token=2, d_expert=168,
                   balance_loss=0.01)
climb("experts", "mixtral-8x7b", moe=routed)
climb("a shared expert, a bias", "mai-1-moe", moe=MoEConfig(
    n_experts=8, experts_per_token=2, d_expert=112, n_shared_experts=1,
    router="sigmoid", bias_speed=0.01))
climb("latent attention", "deepseek-v3", n_kv_heads=2,
      mla=MLAConfig(kv_rank=64, rope_dim=16, v_dim=64))
for config in ladder.values():
    with torch.device("meta"):
        built = nanomai.build_model(config)
    n = sum(p.numel() for p in built.parameters())
    assert n == config.n_parameters
print(len(ladder), "models; each has as many parameters as it should")

# %% [markdown]
# ## 3 One model file for all of them
#
# Seventeen models were just built by the same code, so the differences must
# lie in small parts. We write three blocks by hand, in the plainest way, and
# compare each with what `build_model` makes of the configuration: values and
# gradients of every parameter. First the parts: two norms, two MLPs,
# attention, and RoPE as a product of complex numbers, of the first `dim`
# numbers of a head.

# %%
def rms_norm(norm, x):
    return x / (x.pow(2).mean(-1, keepdim=True)
                + norm.eps).sqrt() * norm.weight


def layer_norm(norm, x):
    return rms_norm(norm, x - x.mean(-1, keepdim=True)) + norm.bias


def linear(layer, x):
    return x @ layer.weight.T + (0 if layer.bias is None else layer.bias)


def gelu_mlp(mlp, x):
    u = linear(mlp.w_up, x)
    inner = math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)
    return linear(mlp.w_down, 0.5 * u * (1 + inner.tanh()))


def gated_mlp(mlp, x):
    gate = linear(mlp.w_gate, x)
    return linear(mlp.w_down, gate * gate.sigmoid() * linear(mlp.w_up, x))

# %%
def turn(x, dim):
    """x (B, H, T, K): its first `dim` numbers, by position"""
    r = dim // 2
    angle = torch.arange(x.shape[2])[:, None] \
        * 10_000 ** (-torch.arange(r) / r)  # (T, r)
    pairs = torch.complex(x[..., :r], x[..., r:dim])
    pairs = pairs * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((pairs.real, pairs.imag, x[..., dim:]), -1)


# %%
def attend(layer, x, dim):
    q, k, v = (linear(w, x).unflatten(-1, (-1, layer.head_dim))
               .transpose(1, 2)  # (B, H, T, K), (B, G, T, K)
               for w in (layer.wq, layer.wk, layer.wv))
    q, k = turn(q, dim), turn(k, dim)
    shared = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(shared, 1) for t in (k, v))
    scores = q @ k.mT / math.sqrt(layer.head_dim)  # (B, H, T, T)
    future = torch.ones(scores.shape[-2:], dtype=bool).triu(1)
    p = scores.masked_fill(future, -math.inf).softmax(-1)
    return linear(layer.wo, (p @ v).transpose(1, 2).flatten(2))

# %% [markdown]
# Then the blocks: the whole difference between the three families. Fresh
# biases are zero and fresh norms are one, which would hide mistakes: a
# comparison must not begin with the initial weights. So all numbers are drawn
# at random.

# %%
def gpt2_block(b, x):
    x = x + attend(b.attention, layer_norm(b.attention_norm, x), dim=0)
    return x + gelu_mlp(b.mlp, layer_norm(b.mlp_norm, x))


def phi_block(b, x):
    h = layer_norm(b.attention_norm, x)
    return x + attend(b.attention, h, dim=16) + gelu_mlp(b.mlp, h)


def llama_block(b, x):
    x = x + attend(b.attention, rms_norm(b.attention_norm, x), dim=32)
    return x + gated_mlp(b.mlp, rms_norm(b.mlp_norm, x))

# %%
def with_gradients(y, x, layer):
    d_y = torch.linspace(-1, 1, y.numel()).view_as(y)
    return y, *torch.autograd.grad(y, (x, *layer.parameters()), d_y)


for mine, rung in ((gpt2_block, "GPT-2"),
                   (phi_block, "RoPE, half of a head"),
                   (llama_block, "grouped queries")):
    c = ladder[rung]
    layer = nanomai.build_model(c).blocks["0"]
    for p in layer.parameters():
        p.data = 0.2 * torch.randn(p.shape, generator=generator)
    x = torch.randn(2, 13, 128, generator=generator, requires_grad=True)
    table = ops.rotary_table(torch.arange(13), c.turned_dim, c.rope_theta)
    table = table if c.position == "rope" else None
    for ours, theirs in zip(
            with_gradients(mine(layer, x), x, layer),
            with_gradients(layer(x, table, None), x, layer), strict=True):
        assert_close(ours, theirs, rtol=1e-4, atol=1e-3)
    print(f"{mine.__name__:12} equals {rung!r}:",
          1 + sum(1 for _ in layer.parameters()), "gradients too")

# %% [markdown]
# Around the blocks there is little: an embedding with a table of positions
# and the same matrix as the head in GPT-2, an embedding and a head in Llama.

# %%
def gpt2_logits(model, ids):
    x = model.embed.weight[ids] + model.positions.weight[:ids.shape[1]]
    for block in model.blocks.values():
        x = gpt2_block(block, x)
    return layer_norm(model.norm, x) @ model.embed.weight.T


def llama_logits(model, ids):
    x = model.embed.weight[ids]
    for block in model.blocks.values():
        x = llama_block(block, x)
    return linear(model.head, rms_norm(model.norm, x))


ids = torch.randint(512, (2, 13), generator=generator)
for mine, rung in ((gpt2_logits, "GPT-2"),
                   (llama_logits, "grouped queries")):
    whole = nanomai.build_model(ladder[rung])
    for p in whole.parameters():
        p.data = 0.1 * torch.randn(p.shape, generator=generator)
    assert_close(mine(whole, ids), whole(ids), rtol=1e-4, atol=1e-3)
    print(f"{mine.__name__:12} equals the model {tuple(whole(ids).shape)}")

# %% [markdown]
# ## 4 What each rung did to the loss
#
# To train each model for equally many *steps* would be unfair: some cost more
# a step. Here each had the same training *FLOPs* $C$, so a dearer one had
# fewer steps:
#
# $$\mathrm{steps} = \frac{C}{\mathrm{FLOPs\ a\ token} \cdot
#   \mathrm{tokens\ a\ step}} .$$
#
# That takes too long for a lesson, so
# [`benchmarks/families.py`](../benchmarks/families.py) did it once, on code
# from Python's library: one recipe, four seeds, and a seed gives all rungs
# the same order of text. The learning rate was checked at both ends of the
# ladder: a rung that needs another rate than its neighbour would be judged by
# its rate. The measure is bits per *byte* of held-out text, as tokens of two
# vocabularies cannot be compared. We read its results, after checking that it
# climbed our ladder.

# %%
result = json.loads(
    Path("../benchmarks/results/families.json").read_text("utf-8"))
rows, C = result["rungs"], result["training_flops"]
for row, (name, c) in zip(rows, ladder.items(), strict=True):
    assert (row["name"], row["parameters"], row["flops"],
            row["kv_bytes"]) == (name, *price(c))
    assert row["steps"] == round(
        C / (c.flops_per_token() * result["batch_tokens"]))
for rates in result["rates"].values():
    assert min(rates, key=rates.get) == f"{result['recipe']['lr']:g}"
scores = torch.tensor([row["bits_per_byte"] for row in rows])
seeds = scores.shape[1]
print(f"{len(rows)} rungs, {seeds} seeds, {C:.1e} FLOPs a run;",
      "steps from", min(row["steps"] for row in rows),
      "to", max(row["steps"] for row in rows))

# %% [markdown]
# When does a difference count? Two runs of *one* model differ as well, as soon
# as their seeds do. We call a rung separated from noise if all seeds agree on
# the sign, and the mean of their differences is larger than its range,
# greatest less least; the others get a question mark. What chance has pure
# noise to pass? Numbers from a normal distribution tell.
#
# > **Predict.** Sixteen steps, each of which became standard somewhere. How
# > many of them lower the loss at this size, beyond noise?

# %%
gaps = scores[1:] - scores[:-1]  # (16, seeds), each to the rung before


def separated(gaps):
    low, high = gaps.amin(-1), gaps.amax(-1)
    return (low * high > 0) & (gaps.mean(-1).abs() > high - low)


noise = torch.randn(100_000, seeds, generator=generator)
print(f"noise alone passes: {separated(noise).float().mean():.0%}")
sure, mean = separated(gaps), gaps.mean(1)
titles = [row["name"] for row in rows[1:]]
for name, gap, here in zip(titles, mean, sure, strict=True):
    print(f"{name:26}{gap:+.2f} bits per byte", "" if here else "(?)")

# %%
plt.figure(figsize=(8, 5.2))
y = torch.arange(len(titles))[:, None].expand_as(gaps)
for label, rungs, colour in (("lower loss", sure & (mean < 0), "C0"),
                             ("not separated", ~sure, "0.5")):
    plt.plot(gaps[rungs].flatten(), y[rungs].flatten(), "o", color=colour,
             ms=4, label=label)
    plt.plot(mean[rungs], y[rungs, 0], "|", color=colour, ms=16)
plt.axvline(0, color="k", ls=":")
plt.yticks(y[:, 0], titles)
plt.gca().invert_yaxis()
plt.xlabel("difference to the rung above (bits per byte), each seed")
plt.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
plt.show()
assert (mean[sure] < 0).all() and sure.sum() == 5

# %% [markdown]
# Rotary positions help at once. So does a window, which is odd: seeing less
# cannot make a step better. But it makes a step cheaper, and the same FLOPs
# then pay for 302 steps in place of 289. A larger vocabulary costs more a
# token, and a token says more.
#
# The rest is *not separated from noise*, which says something about this
# experiment and nothing against the changes. A run has some 260 steps and
# ends near 2.3 bits, where `make train` reaches 1.23: it shows who starts
# fast. And most of these changes were never made for the loss. A parallel
# block has fewer things to wait for, RMSNorm and missing biases are less to
# read and to shard.
#
# > **Predict.** What would we have said after three of these four seeds?

# %%
with_three = separated(gaps[:, [0, 2, 3]])
fooled = {name for name, few, all_four in zip(
    titles, with_three, sure, strict=True) if few and not all_four}
print("separated with seeds 0, 2 and 3, not with 1:", *sorted(fooled),
      sep="\n    ")
assert result["seeds"] == [0, 1, 2, 3]
assert {"grouped queries", "no biases"} <= fooled

# %% [markdown]
# Few seeds fool: grouped queries would have passed as better and missing
# biases as worse, and one more seed took both back.
#
# ## 5 What the others buy
#
# A change that does nothing to the loss may still be worth a great deal.
# While a model writes, every token leaves keys and values behind, in every
# layer, and each further token reads them all. We compare the cache of real
# configurations for one text of 32,768 tokens, in bfloat16, with one in which
# every query head keeps a key and a value of its own, as in GPT-2, and
# nothing is forgotten.
#
# > **Predict.** Which saves most: a window of 4,096, eight query heads on one
# > key, or latents?

# %%
def cache_of(c, length=32_768):
    """(as GPT-2 would, as it is), in gigabytes"""
    value = c.mla.v_dim if c.mla.kv_rank else c.head_dim
    every_head = 2 * c.n_layers * c.n_heads * (c.head_dim + value)
    kept = min(length, c.sliding_window or length)
    return (length * every_head / 1e9,
            kept * c.kv_cache_bytes_per_token() / 1e9)


users = ("llama-2-7b", "mistral-7b", "llama-2-70b", "mistral-nemo-12b",
         "deepseek-v3", "mai-1-moe", "mai-1-dense")
caches = torch.tensor([cache_of(nanomai.load_config(name).model)
                       for name in users])  # (7, 2)
saved = caches[:, 0] / caches[:, 1]
for name, times in zip(users, saved.tolist(), strict=True):
    print(f"{name:17} {times:5.1f} times less")

# %%
plt.figure(figsize=(7.5, 3.6))
plt.hlines(users, caches[:, 1], caches[:, 0], color="0.8", lw=4, zorder=1)
plt.semilogx(caches[:, 0], users, "C1o", label="every query head for itself")
plt.semilogx(caches[:, 1], users, "C0o", label="as it is")
plt.xlabel("cache of one text of 32,768 tokens (GB, log)")
plt.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
plt.gca().invert_yaxis()
plt.show()
assert saved.argmax() == users.index("deepseek-v3") and saved[0] == 1
mistral = nanomai.load_config("mistral-7b").model
full = replace(mistral, sliding_window=None)
share = mistral.flops_per_token(131_072) / full.flops_per_token(131_072)
print(f"a window leaves {share:.0%} of the FLOPs of 131,072 tokens")
assert share < 0.35

# %% [markdown]
# Latents, by far; and Mistral's window and groups multiply. A window also
# saves arithmetic, once texts are much longer than it.
#
# ## 6 See one happen
#
# One rung is large enough to watch. We train GPT-2's architecture, smaller
# still, by bytes on the text of our lessons, and beside it the same with
# `position="rope"`. The two have equal FLOPs by the closed form, so equal
# compute is equal steps; and the rotation has fewer parameters. Three seeds.
#
# > **Predict.** A learned table can represent any position. Why should a fixed
# > rotation be better after 120 steps?

# %%
learned = replace(small, n_layers=2, d_model=64, n_heads=2, n_kv_heads=2,
                  d_ff=256, vocab_size=256, context_length=64)
turned = replace(learned, position="rope")
print(diff(learned, turned))
assert learned.flops_per_token() == turned.flops_per_token()
assert learned.n_parameters - turned.n_parameters == 64 * 64
text = torch.tensor(list(Path("lesson.txt").read_bytes()))


def windows(starts):
    """Texts of 64 bytes and what follows each byte, (B, T) each"""
    rows = text[starts[:, None] + torch.arange(65)]
    return rows[:, :-1], rows[:, 1:]


def held_out(model):
    with torch.no_grad():
        loss = model(*windows(torch.arange(110_000, 114_096, 64)))
    return loss.item() / math.log(2)  # bits per byte

# %%
def train(config, seed):
    """A model after 120 steps; what it reached at 40, 80 and 120"""
    model, scores = nanomai.build_model(config, seed), []
    g = torch.Generator().manual_seed(seed)
    adamw = torch.optim.AdamW(model.parameters(), 4e-3, (0.9, 0.95))
    for t in range(1, 121):
        adamw.param_groups[0]["lr"] = 4e-3 * min(1, t / 10, (125 - t) / 25)
        adamw.zero_grad()
        model(*windows(torch.randint(100_000, (8,), generator=g))).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
        scores += [held_out(model)] if t % 40 == 0 else []
    return model, scores

# %%
pair = {"learned positions": learned, "rotary positions": turned}
curves = {name: torch.tensor([train(c, seed)[1] for seed in range(3)])
          for name, c in pair.items()}  # (3 seeds, 3 evaluations)
for (name, curve), color in zip(curves.items(), ("C1", "C0"), strict=True):
    plt.plot((40, 80, 120), curve.T, "o-", color=color, ms=4, alpha=0.8)
    plt.plot([], [], color=color, label=name)
plt.xlabel("optimizer step")
plt.ylabel("held-out bits per byte")
plt.xticks((40, 80, 120))
plt.legend(title="three seeds each")
plt.show()
ahead = (curves["learned positions"] - curves["rotary positions"])[:, -1]
print("rotary positions ahead by more than 0.2 bits:",
      (ahead > 0.2).tolist())
assert (ahead > 0.2).all()

# %% [markdown]
# "Look at the token before" is one thing to learn for a rotation, whatever the
# position; a table has to learn it for each of 64 positions, from random
# vectors. Given enough text it does, as GPT-2 shows. What we see here is
# how soon, not how well in the end.
#
# ## 7 Break it: the wrong family's settings
#
# Weights do not say which family they belong to. Shapes often fit even when
# the meaning does not: gate and up are equally large, and $\theta$ is a number
# that no tensor depends on. We train a small Llama, hand its weights on
# with two such mistakes, and look at what a user would look at: the loss.
#
# > **Predict.** Which of the two would you notice?

# %%
llama = replace(turned, norm="rmsnorm", activation="swiglu", d_ff=168,
                biases=())
trained, _ = train(llama, seed=0)
weights, swap = trained.state_dict(), {"w_gate": "w_up", "w_up": "w_gate"}
swapped = nanomai.build_model(llama)
swapped.load_state_dict({".".join(swap.get(part, part) for part in
                                  name.split(".")): value
                         for name, value in weights.items()})
other_theta = nanomai.build_model(replace(llama, rope_theta=500_000.0))
other_theta.load_state_dict(weights)

ids, _ = windows(torch.arange(110_000, 110_256, 64))
for name, imported in (("gate and up swapped", swapped),
                       ("theta of Llama 3", other_theta)):
    rise = held_out(imported) - held_out(trained)
    try:
        assert_close(imported(ids), trained(ids))
    except AssertionError as error:
        print(f"{name}: {rise:+.2f} bits; {type(error).__name__}")

# %% [markdown]
# Swapped gates shout. Another $\theta$ whispers: neighbours turn nearly as
# before, and a text of 64 tokens hides the rest. Only the comparison of
# logits with those of the original program finds both, which is why
# `tests/test_model_parity.py` makes it for every family, and for mistakes
# planted on purpose.
#
# ## 8 At 500B
#
# The far end, in the ten fields that say most. `mai-1-dense` and `mai-1-moe`
# are this project's own proposals: of MAI-1 the press reported about 500
# billion parameters, and nothing of its architecture. `gpt4-rumour` fits a
# rumour; GPT-4's dimensions are not public. DeepSeek-V3's are.
#
# > **Predict.** What have all four in common that GPT-2 has not, besides size?

# %%
TEN = ["n_layers", "d_model", "n_heads", "n_kv_heads", "head_dim", "norm",
       "activation", "vocab_size", "moe.n_experts", "mla.kv_rank"]
large = {name: nanomai.load_config(name).model for name in (
    "mai-1-dense", "mai-1-moe", "gpt4-rumour", "deepseek-v3")}
print(f"{'':14}{'gpt2-124m':>11}", *(f"{name:>12}" for name in large))
for field in TEN:
    cells = (flat(c)[field] for c in large.values())
    print(f"{field:14}{flat(gpt2)[field]:>11}",
          *(f"{cell:>12}" for cell in cells))
for name, of in (("parameters, B", lambda c: c.n_parameters / 1e9),
                 ("active, B", lambda c: c.n_active_parameters / 1e9),
                 ("GFLOP a token", lambda c: c.flops_per_token(1024) / 1e9),
                 ("KV, kB a token",
                  lambda c: c.kv_cache_bytes_per_token() / 1e3)):
    print(f"{name:14}{of(gpt2):11.2f}",
          *(f"{of(c):12,.1f}" for c in large.values()))
common = set.intersection(*({(name, new) for name, (_, new) in
                             diff(gpt2, c).items()} for c in large.values()))
print("in common:", *sorted(name for name, _ in common))
assert {"norm", "position", "biases"} < {name for name, _ in common}

# %% [markdown]
# RMSNorm, RoPE, no biases, a head of its own: four settings. And the model file
# is the same for all.
#
# ## Exercises
#
# **1. The cache of any family.** Return the bytes of keys and values, in
# bfloat16, that a text of `length` tokens needs: every head, grouped heads, a
# window, latents. Use the dimensions, not `kv_cache_bytes_per_token`.

# %%
def cache_bytes(config, length):
    raise NotImplementedError


exercises.check_cache_bytes(cache_bytes)

# %% [markdown]
# <details><summary>Hint</summary>
#
# A window of $w$ needs the last $w$ tokens at most. With latents
# (`config.mla.kv_rank` above 0) a token leaves `kv_rank + rope_dim` numbers in
# each layer, for all heads together.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# def cache_bytes(config, length):
#     kept = min(length, config.sliding_window or length)
#     numbers = 2 * config.n_kv_heads * config.head_dim
#     if config.mla.kv_rank:
#         numbers = config.mla.kv_rank + config.mla.rope_dim
#     return 2 * kept * config.n_layers * numbers
# ```
# </details>
#
# **2. The width of a gated MLP.** An MLP with GELU is `d_ff` wide. Return the
# least `multiple` of which a SwiGLU MLP has at least as many weights. With
# multiples of 256 your function should give 11008 for Llama-2-7B
# ($4 \cdot 4096$) and 13824 for 13B ($4 \cdot 5120$).

# %%
def swiglu_width(d_ff, multiple):
    raise NotImplementedError


exercises.check_swiglu_width(swiglu_width)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Three matrices against two: $3 d w \ge 2 d\, d_\mathrm{ff}$. In whole numbers
# `-(-a // b)` rounds $a / b$ up.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# def swiglu_width(d_ff, multiple):
#     return -(-2 * d_ff // (3 * multiple)) * multiple
# ```
# On our ladder that would be 344. We took 336, 1.6 % less, because it can be
# shared by two experts and by three.
# </details>
#
# **3. Weights from a fused matrix.** Phi-3 stores queries, keys and values as
# the rows of one matrix, in this order. Return `(wq, wk, wv)` for a model of
# this `config`. Mind the groups.

# %%
def split_qkv(fused, config):
    raise NotImplementedError


exercises.check_split_qkv(split_qkv)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `n_heads * head_dim` rows are queries; keys and values have
# `n_kv_heads * head_dim` each. `Tensor.split` takes a list of sizes.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# def split_qkv(fused, config):
#     q = config.n_heads * config.head_dim
#     kv = config.n_kv_heads * config.head_dim
#     return fused.split([q, kv, kv])
# ```
# With as many keys as queries, three equal parts would do, and the mistake
# would wait for the first model with groups.
# </details>
#
# ## Recap
#
# - A family is a list of differences from GPT-2; one model file serves all,
#   and a naive block proves it in values and gradients.
# - At equal compute and this size rotary positions, a window and a larger
#   vocabulary lowered the loss; most other changes did not separate
#   from noise, and were made for other reasons: groups, windows and latents
#   divide the cache by 4 to 71.
# - Shapes and losses do not tell whether weights were read rightly; a
#   comparison of logits does.
#
# **What real systems do differently.** They judge a change by runs at several
# sizes and follow its effect along a scaling law (`08_scaling_laws`): a gain
# that shrinks with size is no gain. And each arm gets a learning rate of its own.
#
# **Read on.** [`nanomai/architecture.py`](../nanomai/architecture.py),
# [`scale_configs/README.md`](../scale_configs/README.md),
# [`benchmarks/results/families.md`](../benchmarks/results/families.md).
# phi-1.5 [2309.05463](https://arxiv.org/abs/2309.05463), Llama
# [2302.13971](https://arxiv.org/abs/2302.13971), Llama 2
# [2307.09288](https://arxiv.org/abs/2307.09288), Mistral 7B
# [2310.06825](https://arxiv.org/abs/2310.06825), Mixtral
# [2401.04088](https://arxiv.org/abs/2401.04088), DeepSeek-V3
# [2412.19437](https://arxiv.org/abs/2412.19437), and the same exercise at
# larger sizes, [2102.11972](https://arxiv.org/abs/2102.11972).
#
# **Next:** `06_training` makes it learn.
