# %% [markdown]
# # 00 · What is in a language model, from text to answer?
#
# **Goal.** Walk once through the whole house: text, tokens, batches, model,
# loss, training, an answer. Later notebooks look closely at one part each.
#
# **Prerequisites.** Python; what a matrix product and a derivative are.
# **Time.** About 30 minutes; it runs in half a minute.
#
# **You will be able to**
# - name the parts of a language model and find each in the source;
# - train one of about 0.1 million parameters and let it write;
# - count the parameters of a model before you build it, at any size.
#
# All of it runs on a CPU, in 32-bit floats, with one thread: the outputs below
# are then the same on your machine, and a test compares them.

# %%
import dataclasses
import math
import tempfile
import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch.testing import assert_close

import nanomai
from nanomai.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from nanomai.exercises import house_map
from nanomai.preparation import prepare
from nanomai.show import lesson

lesson()

# %% [markdown]
# ## 1 The house
#
# A *token* is a word or a piece of one. A language model does one thing: given
# the tokens so far, it says how likely each token is to come next. Everything
# else serves to make that guess good, or to use it. Each duty has a file or
# two, short enough to read in a sitting.
#
# | duty | where it lives | notebook |
# |---|---|---|
# | what a run is: all settings | [`config.py`](../nanomai/config.py), [`scale_configs/`](../scale_configs) | 00 |
# | text into tokens and back | [`tokenizer.py`](../nanomai/tokenizer.py) | 01 |
# | documents, shards, batches | [`corpus.py`](../nanomai/corpus.py), [`data.py`](../nanomai/data.py) | 02, to come |
# | attention, rotations, norms, the loss | [`ops.py`](../nanomai/ops.py) | 03, 04, 05 |
# | the Transformer itself | [`model.py`](../nanomai/model.py) | 05 |
# | what makes a family: its settings | [`architecture.py`](../nanomai/architecture.py) | 05b |
# | turning gradients into better weights | [`optim.py`](../nanomai/optim.py), [`guard.py`](../nanomai/guard.py) | 06 |
# | the loop around it all | [`trainer.py`](../nanomai/trainer.py), [`checkpoint.py`](../nanomai/checkpoint.py) | 06 |
# | writing with a model | [`sampling.py`](../nanomai/sampling.py) | 07 |
# | how good is it? | [`evaluation.py`](../nanomai/evaluation.py) | 00; 16, to come |
# | many processes as one | [`parallel/`](../nanomai/parallel) | 13, 14, to come |
#
# ## 2 Text and settings
#
# Our text is [`lesson.txt`](lesson.txt): little stories and sums which
# [`tools/lesson_text.py`](../tools/lesson_text.py) made from a grammar and a
# seed. It has accents and curly quotes, because most of the world's writing is
# not plain ASCII.

# %%
text = Path("lesson.txt").read_text(encoding="utf-8")
for story in text.split("\n\n")[1:4]:
    print(textwrap.fill(story, 76), end="\n\n")
n_bytes = len(text.encode())
print(f"{len(text):,} characters, {n_bytes:,} bytes")
assert n_bytes > len(text)  # é takes two bytes, “ takes three

# %% [markdown]
# A run is described by one tree of settings, and a setting that does not exist
# is an error, never silently ignored. Ours is a small one: two layers, 64
# numbers for each token, 512 different tokens. You will meet the other names
# one by one. `load_config` reads such trees from the files in `scale_configs/`,
# which we shall need for larger models.

# %%
folder = tempfile.TemporaryDirectory()
config = Config(
    model=ModelConfig(n_layers=2, d_model=64, n_heads=2, n_kv_heads=1,
                      head_dim=32, d_ff=192, vocab_size=512,
                      context_length=64),
    data=DataConfig(corpus="lesson.txt", folder=folder.name, workers=1),
    optim=OptimConfig(name="adamw", lr=5e-3, schedule="wsd",
                      warmup_steps=25),
    train=TrainConfig(steps=400, batch_tokens=1024, threads=1))
V, D = config.model.vocab_size, config.model.d_model
L, F = config.model.n_layers, config.model.d_ff
T = config.sequence_length  # tokens that the model sees at once
B, STEPS = config.train.batch_tokens // T, config.train.steps
print(f"{B} sequences of {T} tokens in each of {STEPS} steps")

# %% [markdown]
# ## 3 Text becomes tokens, tokens become batches
#
# `prepare` holds out the last 12 % of the text, to test the model on later. It
# trains a tokenizer of 512 tokens on the rest, and writes the token ids, which
# are whole numbers below 512, to disk. Frequent words become single tokens;
# rarer words take several.
#
# > **Predict.** Will "Émilie has 12 plums." need more tokens than
# > "Emily has 12 plums.", which is one letter shorter and has no accent?

# %%
prepared = prepare(config.data, V, show=False)
tokenizer = prepared.tokenizer
for sentence in ("Émilie has 12 plums.", "Emily has 12 plums."):
    ids = tokenizer.encode(sentence)
    print(len(ids), [tokenizer.decode([i]) for i in ids])
    assert tokenizer.decode(ids) == sentence

# %% [markdown]
# Fewer: Émilie is a name in these stories, so it is one token, and Emily must
# be spelled out. Decoding gives back the text exactly. Notebook 01 builds this
# tokenizer from nothing.
#
# The loader hands out *batches*: B rows of T token ids, and for each id its
# *target*, the token that comes next. Nobody has to label anything: the text
# shifted by one token is its own answer sheet.

# %%
loader = prepared.loader(T, config.data.seed)
batch = loader.samples(start=0, count=B)  # ids, targets: (B, T) each
print("ids", tuple(batch.ids.shape), "targets", tuple(batch.targets.shape))
for name, row in (("ids    ", batch.ids[0]), ("targets", batch.targets[0])):
    print(name, [tokenizer.decode([i]) for i in row[20:28]])
assert torch.equal(batch.ids[:, 1:], batch.targets[:, :-1])

# %% [markdown]
# ## 4 The model, part by part
#
# The model's *embedding* is a table which turns each token id into D numbers.
# Each *block* then does two things: *attention* lets a position look back at
# earlier positions, and an *MLP* (a plain neural network) computes on each
# position alone. *Norms* keep the numbers at a steady size. At the end, the
# embedding is used again, the other way round, to score every token of the
# vocabulary. The *parameters* are the numbers that training changes; here are
# those of one block.

# %%
model = nanomai.build_model(config.model, config.train.seed)
for name, parameter in model.blocks["0"].named_parameters():
    print(f"{name:24} {tuple(parameter.shape)!s:12}"
          f"{parameter.numel():7,}")

# %% [markdown]
# > **Predict.** How many parameters does the whole model have? Which part has
# > most of them: embedding, attention, or MLP?
#
# Each part follows from a handful of dimensions. Attention here has 2 query
# heads and 1 key-value head of 32 numbers each (notebook 03 explains them), so
# it projects 64 numbers to 64, 32 and 32, and back from 64 to 64. The MLP is
# three matrices of 64 by 192. One more norm stands at the end.

# %%
def count_parts(model):
    counted = {"embedding": 0, "attention": 0, "MLP": 0, "norms": 0}
    for name, parameter in model.named_parameters():
        part = ("norms" if "norm" in name else "MLP" if "mlp" in name
                else "attention" if "attention" in name else "embedding")
        counted[part] += parameter.numel()
    return counted


formula = {"embedding": V * D, "attention": L * (64 + 32 + 32 + 64) * D,
           "MLP": L * 3 * D * F, "norms": (2 * L + 1) * D}
assert count_parts(model) == formula
assert sum(formula.values()) == config.model.n_parameters
print(f"{config.model.n_parameters:,} parameters")

# %% [markdown]
# The formula, the package's own (`n_parameters` in `config.py`) and the model
# itself agree exactly, so a model's size is known before it is built. The MLP
# has more than half of the parameters. The embedding has a quarter: in a tiny
# model, a vocabulary is expensive.

# %%
counted = count_parts(model)
figure, axes = plt.subplots(figsize=(6.5, 2.8))
axes.barh(list(counted), list(counted.values()), label="counted in the model")
axes.plot(list(formula.values()), list(formula), "k|", ms=18, mew=2,
          label="formula")
axes.set(xlabel="parameters", title="Where the parameters are")
axes.invert_yaxis()
axes.legend(loc="upper right", labelspacing=1)
plt.show()
assert counted["MLP"] > counted["embedding"] > counted["attention"]

# %% [markdown]
# ## 5 A guess, and how wrong it is
#
# Given ids, the model returns *logits*: one score for each token of the
# vocabulary, at every position. `softmax` makes probabilities of them. The
# *loss* is the mean of -ln(probability of the token that really came next), in
# *nats*: 0 would be always certain and right. We write it in three lines, and
# compare value and gradient with the package's, which saves memory by never
# holding all the logits at once.
#
# > **Predict.** The model knows nothing yet. With 512 tokens to choose from,
# > what is its loss?

# %%
logits = model(batch.ids)  # (B, T) -> (B, T, V)
log_p = logits.log_softmax(-1)
naive = -log_p.gather(-1, batch.targets[..., None]).mean()
naive_gradient, = torch.autograd.grad(naive, model.embed.weight)
loss = model(batch.ids, batch.targets)
gradient, = torch.autograd.grad(loss, model.embed.weight)
assert_close(naive, loss)
assert_close(naive_gradient, gradient)
print("logits", tuple(logits.shape), "- loss and gradient equal")
print(f"loss {loss.item():.2f}, ln {V} = {math.log(V):.2f}")
assert abs(loss.item() - math.log(V)) < 0.05

# %% [markdown]
# It gives all 512 tokens about the same probability, and -ln(1/512) = ln 512.
# A new model that starts far from ln V has something wrong with it; this is the
# cheapest test there is.
#
# ## 6 Training
#
# Each step computes the loss of a new batch, then its derivative by every
# parameter (`backward`), and moves each parameter a little in the direction
# that lowers the loss (`optimizer.step`). The size of the steps follows a
# schedule, and a gradient that is too long is scaled down; notebook 06 says why.

# %%
from nanomai.optim import build_optimizers, learning_rate, set_learning_rate

[optimizer] = build_optimizers(model, config.optim)
losses = []
for step, batch in enumerate(loader.batches(0, [B] * STEPS)):
    loss = model(batch.ids, batch.targets)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.grad_clip)
    lr = learning_rate(config.optim, step, STEPS)
    set_learning_rate([optimizer], lr)
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
print(f"first loss {losses[0]:.2f}, last {losses[-1]:.1f}")

# %% [markdown]
# Two lines to compare with: *even bets* cost ln V, and somebody who knows only
# how often each token occurs would pay the *entropy* of those frequencies, the
# sum of -p ln p. To get below that, a model must use the tokens before. The
# held-out text shows whether it has learned or only memorized.

# %%
tokens = torch.tensor(loader.sources[0].shards[0].tolist())
frequency = tokens.bincount(minlength=V) / len(tokens)
entropy = -(frequency * frequency.clamp_min(1e-9).log()).sum().item()
validation = prepared.validation(T)
held_out = nanomai.evaluate(model, tokenizer, validation.batches(16))
last = sum(losses[-20:]) / 20  # the mean of the last 20 steps
assert last < held_out.loss < entropy < losses[0]
print(f"even bets {math.log(V):.1f}, frequencies {entropy:.1f}, "
      f"held out {held_out.loss:.1f}, training {last:.1f}")
print(f"each story read {STEPS * B * T / len(tokens):.0f} times")

# %%
plt.plot(range(1, STEPS + 1), losses, label="training, each step")
plt.axhline(math.log(V), color="C3", ls="--", label="even bets: ln V")
plt.axhline(entropy, color="C2", ls="--", label="knowing frequencies only")
plt.plot(STEPS, held_out.loss, "ko", label="held-out text, at the end")
plt.xlabel("optimizer step")
plt.ylabel("loss (nats per token)")
plt.ylim(0)
plt.legend()
plt.show()
crossing = next(i for i, x in enumerate(losses) if x < entropy)
assert crossing < 60 and max(losses[100:]) < 0.6 * entropy

# %% [markdown]
# Within a few dozen steps the model is better than frequencies alone could make
# it; everything below that line comes from context. Held-out text costs a
# little more than training text: the model has read each training story about
# nine times, and part of what it learned is these very stories.
#
# The loop above is not a toy: `nanomai.train` takes the same steps, and adds
# checkpoints, a guard against bad steps, several processes and a report. We let
# it take five and compare the losses.

# %%
# constant: in a run of only five steps, wsd would slow down at once
short = dataclasses.replace(
    config, optim=dataclasses.replace(config.optim, schedule="constant"),
    train=dataclasses.replace(config.train, steps=5,
                              run_dir=folder.name + "/run"))
result = nanomai.train(short, show=False)
assert_close(result.losses, losses[:5], rtol=1e-4, atol=0)
print("the package's first five losses are ours:", result.steps, "steps")

# %% [markdown]
# ## 7 What has it learned?
#
# > **Predict.** English says "a drum" but "an oar", and "Zoë ... she" but
# > "André ... he". Which of the two rules does a model learn first, and why?
#
# For the first rule we add up the probability of all next tokens that begin
# with a vowel, in a new model and in ours. For the second we compare " She" with
# " He" after a sentence about a person, for six women's and six men's names.

# %%
@torch.no_grad()
def next_token(model, prompt):
    """The model's probability of each token after the prompt: (V,)"""
    ids = [tokenizer.end_of_text, *tokenizer.encode(prompt)]
    return model(torch.tensor([ids]))[0, -1].softmax(-1)


vowel = torch.tensor([tokenizer.decode([i]).lstrip()[:1] in tuple("aeiou")
                      for i in range(V)])
new = nanomai.build_model(config.model, config.train.seed)
an = {f"{article}\n{when}": next_token(m, f"Long ago, Rosa found {article}")
      [vowel].sum().item() for article in ("a", "an")
      for when, m in (("new", new), ("trained", model))}
print({key.replace("\n", ", "): round(p, 1) for key, p in an.items()})

# %%
women = "Zoë Anna Mei Yuki Rosa Inès".split()
men = "André Omar Kenji Paul Léo Ravi".split()
[she], [he] = tokenizer.encode(" She"), tokenizer.encode(" He")
says_she, pronoun = {}, {}
for name in women + men:
    p = next_token(model, f"Long ago, {name} found a key in the attic.")
    pronoun[name] = (p[she] + p[he]).item()
    says_she[name] = p[she].item() / pronoun[name]
gap = abs(sum(map(says_she.get, women)) - sum(map(says_she.get, men))) / 6
assert min(pronoun.values()) > 0.9  # that one of the two is due, it knows
assert gap < 0.2  # far from the 1 that is right
print(f"“She” rather than “He”: women and men differ by {gap:.1f}")

# %%
figure, (left, right) = plt.subplots(
    1, 2, figsize=(9.5, 3.8), width_ratios=(2, 3), layout="constrained")
left.bar(list(an), list(an.values()), color=["C7", "C0", "C7", "C0"])
left.plot(list(an), [0, 0, 1, 1], "k_", ms=30, mew=2, label="English")
left.set(ylabel="P(next token begins with a vowel)", ylim=(-0.03, 1.05))
right.bar(list(says_she), list(says_she.values()), color="C0")
right.plot(list(says_she), [1] * 6 + [0] * 6, "k_", ms=20, mew=2,
           label="the text")
right.set(ylabel="P(“She”) / P(“She” or “He”)", ylim=(-0.03, 1.05))
right.tick_params(axis="x", rotation=45)
for axes in (left, right):
    axes.legend(loc="center", frameon=True)
plt.show()
assert an["a\ntrained"] < 0.1 and an["an\ntrained"] > 0.6

# %% [markdown]
# "An" is learned, nearly: the evidence is the word right before. "She" is not:
# the model knows that a pronoun is due, but bets the same for Zoë and for
# André. Here the evidence stands seven words back, and which pronoun goes with
# which name must be learned by heart for each of 32 people. Form comes before
# fact: remember that when a fluent text is in front of you.
#
# ## 8 The answer
#
# To write, we choose one token by the model's probabilities, append it, and ask
# the model again. Taking the likeliest each time is called *greedy*. Our loop
# reads the whole text anew for each token; the package keeps what it has
# already computed (notebook 07), and must give the same tokens.
#
# > **Predict.** How will it go on after "Mei gives him 2 more. Now"?

# %%
question = "Kenji has 5 pears. Mei gives him 2 more. Now"
prompt = [tokenizer.end_of_text, *tokenizer.encode(question)]
written = []
with torch.no_grad():
    while "." not in tokenizer.decode(written) and len(written) < 30:
        logits = model(torch.tensor([prompt + written]))[0, -1]  # (V,)
        written.append(int(logits.argmax()))
assert written == nanomai.generate(model, prompt, max_tokens=len(written))
print(question + tokenizer.decode(written).rstrip())

# %%
opening = "Early in spring,"
pieces = nanomai.stream_text(model, tokenizer, opening, max_tokens=50,
                             temperature=0)
print(textwrap.fill(opening + "".join(pieces) + " ...", 76))

# %% [markdown]
# A good sentence of its kind, with the wrong person, number and fruit; and
# somebody who carries a book is asked about a bell. Form before fact, again.
#
# ## 9 Break it
#
# A classic bug is a target that is not shifted: the model is asked to predict
# the very token it is looking at.
#
# > **Predict.** Will the loss of such a run be higher or lower than ours?

# %%
broken = nanomai.build_model(config.model, config.train.seed)
[optimizer] = build_optimizers(broken, config.optim)
set_learning_rate([optimizer], 5e-3)
for batch in loader.batches(0, [B] * 80):
    targets = batch.ids  # the bug
    loss = broken(batch.ids, targets)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print(f"loss {loss.item():.1f} after 80 steps, ours {last:.1f} after {STEPS}")
assert loss.item() < 0.03 < 0.5 * last

# %%
echo = nanomai.generate(broken, prompt, max_tokens=6)
print(repr(tokenizer.decode(echo)))
try:
    assert torch.equal(batch.ids[:, 1:], targets[:, :-1]), "not shifted"
except AssertionError as error:
    print(type(error).__name__, "-", error)

# %% [markdown]
# Far lower, after a fifth of the steps, and worthless: the model has learned to
# copy, so it repeats the last token for ever. If a loss is too good, look for a
# bug first. The assertion of section 3 finds this one without any training.
#
# ## 10 Exercises
#
# **1 · Count before you build.** Write `count(c)`: the number of parameters of
# a model built like ours, without biases, from the attributes `n_layers`,
# `d_model`, `n_heads`, `n_kv_heads`, `head_dim`, `d_ff`, `vocab_size` and
# `tied_embeddings` of `c`. Where `tied_embeddings` is false, the output has its
# own matrix, of the embedding's size.

# %%
def count(c):
    raise NotImplementedError


house_map.check_count(count)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Queries are `n_heads * head_dim` wide, which need not be `d_model`; keys and
# values are `n_kv_heads * head_dim` wide. Each block has two norms, and one
# more stands before the output.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# def count(c):
#     q, kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
#     attention = c.d_model * (q + 2 * kv + q)
#     mlp = 3 * c.d_model * c.d_ff
#     block = attention + mlp + 2 * c.d_model
#     tables = 1 if c.tied_embeddings else 2
#     return (tables * c.vocab_size * c.d_model
#             + c.n_layers * block + c.d_model)
# ```
# </details>
#
# **2 · Change one field.** Write `widen(config, budget)`: the `ModelConfig` with
# nothing changed but `d_ff`, which is to be the largest that gives at most
# `budget` parameters, even if it is smaller than before. A config is frozen:
# `dataclasses.replace(config, d_ff=...)` makes a changed copy.

# %%
def widen(config, budget):
    raise NotImplementedError


house_map.check_widen(widen)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `config.n_parameters` is a straight line in `d_ff`. What does one more cost?
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# def widen(config, budget):
#     one_more = dataclasses.replace(config, d_ff=config.d_ff + 1)
#     price = one_more.n_parameters - config.n_parameters
#     room = budget - config.n_parameters  # negative: make it narrower
#     return dataclasses.replace(config, d_ff=config.d_ff + room // price)
# ```
# </details>
#
# ## 11 At 500B
#
# In May 2024 the press reported that Microsoft was training MAI-1, of about 500
# billion parameters. Nothing of its architecture was reported; our
# `mai-1-dense` is this project's own proposal for a model of that size, never
# MAI-1's numbers. It is the same tree of settings, so the same lines read it.
# For scale we assume a CPU thread that does 1e11 operations a second.

# %%
big = nanomai.load_config("mai-1-dense").model
parameters = big.n_parameters
tokens = 20 * parameters  # a rule of thumb; notebook 08 says whence it comes
flops = tokens * big.flops_per_token()
print(f"{parameters:,} parameters, {big.n_layers} layers of {big.d_model:,}")
print(f"{parameters / config.model.n_parameters:,.0f} times our model")
print(f"{2 * parameters / 80e9:.1f} GPUs of 80 GB hold the weights, "
      "at 2 bytes each")
print(f"{flops:.1e} operations to train on {tokens:.1e} tokens")
years = flops / 1e11 / (365 * 24 * 3600)
print(f"at 1e11 a second: {years / 1e6:.0f} million years")
assert parameters == 497_457_285_120 and flops > 3e25

# %% [markdown]
# What else changes with size? `torch.device("meta")` builds any model without
# its numbers, so that we can count its real matrices.
#
# > **Predict.** The embedding is a quarter of our model. What is its share at
# > 500 billion, where the vocabulary is about 200 times larger and there are
# > two such tables, one for the input and one for the output?

# %%
shares = {}
for name in ("this lesson", "gpt2-124m", "llama-3-8b", "mai-1-dense"):
    c = (config if name == "this lesson" else nanomai.load_config(name)).model
    with torch.device("meta"):
        counts = count_parts(nanomai.build_model(c))
    assert sum(counts.values()) == c.n_parameters
    shares[name] = {k: n / c.n_parameters for k, n in counts.items()}
    row = ", ".join(f"{k} {x:.1%}" for k, x in shares[name].items())
    print(f"{name:12}", row)

# %%
figure, axes = plt.subplots(figsize=(7.5, 3.2), layout="constrained")
start = [0.0] * len(shares)
for part in ("embedding", "attention", "MLP"):
    widths = [row[part] for row in shares.values()]
    axes.barh(list(shares), widths, left=start, label=part)
    start = [a + b for a, b in zip(start, widths, strict=True)]
axes.invert_yaxis()
axes.set(xlabel="share of the parameters (norms: below 1 %)", xlim=(0, 1))
axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3)
plt.show()
assert shares["mai-1-dense"]["embedding"] < 0.01 and min(start) > 0.99
assert shares["this lesson"]["embedding"] > 0.2

# %% [markdown]
# The tables (embedding, output, and GPT-2's learned positions) shrink to under
# 1 %, and the MLPs take four fifths. A table grows in proportion to `d_model`,
# a block with its square, and a large model has many blocks.
#
# ## Recap
#
# 1. Text becomes tokens, tokens become vectors, blocks of attention and MLP
#    refine them, and the last vector scores every possible next token.
# 2. Training is one loop: loss, gradients, a small step. It starts at ln V;
#    frequencies and form are learned early, facts late or not at all.
# 3. A config fixes the number of parameters exactly, from 131,392 to 500
#    billion, before anything is built.
#
# **What real systems do differently.** They read trillions of tokens, most of
# them once; they spread one model over thousands of GPUs; they go on after this
# training, with examples of answers and with preferences between them; and much
# of their code deals with hardware that fails. The loop is the same.
#
# **Read on.** Source: [`model.py`](../nanomai/model.py),
# [`trainer.py`](../nanomai/trainer.py), [`config.py`](../nanomai/config.py).
# Papers: [Attention is all you need](https://arxiv.org/abs/1706.03762) (2017),
# [GPT-3](https://arxiv.org/abs/2005.14165) (2020),
# [Llama 3](https://arxiv.org/abs/2407.21783) (2024).
#
# **Next:** [01 · How does text become numbers, and come back
# unharmed?](01_bpe.ipynb)
