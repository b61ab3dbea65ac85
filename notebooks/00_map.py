# %% [markdown]
# # 00 · What is in a language model, from text to answer?
#
# **Goal.** Walk once through the whole house: text, tokens, batches, model,
# loss, training, an answer. Every part gets its name and its place, and later
# notebooks open one door each.
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
# A language model does one thing: given the tokens so far, it says how likely
# each token is to come next. The rest serves to make that guess good, or to
# use it. Each duty has one file, short enough to read in a sitting.
#
# | duty | where it lives | notebook |
# |---|---|---|
# | what a run is: all settings | [`config.py`](../nanomai/config.py), [`scale_configs/`](../scale_configs) | 00 |
# | text into tokens and back | [`tokenizer.py`](../nanomai/tokenizer.py) | 01 |
# | documents, shards, batches | [`corpus.py`](../nanomai/corpus.py), [`data.py`](../nanomai/data.py) | 02 |
# | attention, rotations, norms, the loss | [`ops.py`](../nanomai/ops.py) | 03, 04, 05 |
# | the Transformer itself | [`model.py`](../nanomai/model.py) | 05 |
# | turning gradients into better weights | [`optim.py`](../nanomai/optim.py), [`guard.py`](../nanomai/guard.py) | 06 |
# | the loop around it all | [`trainer.py`](../nanomai/trainer.py), [`checkpoint.py`](../nanomai/checkpoint.py) | 06 |
# | writing with a model | [`sampling.py`](../nanomai/sampling.py) | 07 |
# | how good is it? | [`evaluation.py`](../nanomai/evaluation.py) | 00, 16 |
# | many processes as one | [`parallel/`](../nanomai/parallel) | 13, 14 |
#
# ## 2 Text and settings
#
# Our text is [`lesson.txt`](lesson.txt): little stories and sums which
# [`tools/lesson_text.py`](../tools/lesson_text.py) made from a grammar and a
# seed. It is small enough to learn from in seconds, and it has accents and
# curly quotes, because most of the world's writing is not plain ASCII.

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
# numbers for each token, 512 different tokens. `load_config` reads such trees
# from the files in `scale_configs/`, which we shall need for larger models.

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
T = config.sequence_length
B, STEPS = config.train.batch_tokens // T, config.train.steps
print(f"{B} sequences of {T} tokens in each of {STEPS} steps")

# %% [markdown]
# ## 3 Text becomes tokens, tokens become batches
#
# `prepare` holds out the last 12 % of the text for validation, trains a
# tokenizer of 512 tokens on the rest, and writes the token ids to disk. The
# tokenizer has seen this text, so its frequent words have become single tokens.
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
# Fewer: Émilie is in the text, so her name is one token, and Emily's must be
# spelled out. Digits always stand alone. Decoding gives back the text exactly.
# Notebook 01 builds this tokenizer from nothing.
#
# The loader hands out *batches*: B rows of T token ids, and for each id its
# *target*, the token which comes next. That shift by one is the whole
# supervision: nobody labels anything, the text is its own answer sheet.

# %%
loader = prepared.loader(T, config.data.seed)
batch = loader.samples(start=0, count=B)  # ids, targets: (B, T) each
print("ids", tuple(batch.ids.shape), "targets", tuple(batch.targets.shape))
print("reads  ", repr(tokenizer.decode(batch.ids[0, 20:30])))
print("answers", repr(tokenizer.decode(batch.targets[0, 20:30])))
assert torch.equal(batch.ids[:, 1:], batch.targets[:, :-1])

# %% [markdown]
# ## 4 The model, part by part
#
# Its *embedding* turns each token id into D numbers. Each *block* then does
# two things: *attention* lets a position look back at earlier positions, and an
# *MLP* computes on each position alone. *Norms* keep the numbers at a steady
# size. At the end, the embedding is used again, the other way round, to score
# every token of the vocabulary. Here are all the matrices of one block.

# %%
model = nanomai.build_model(config.model, config.train.seed)
for name, parameter in model.blocks["0"].named_parameters():
    print(f"{name:24} {tuple(parameter.shape)!s:12}"
          f"{parameter.numel():7,}")

# %% [markdown]
# > **Predict.** How many parameters has the whole model? Which part has most of
# > them: embedding, attention, or MLP?
#
# Each part follows from a handful of dimensions. There are 2 query heads and 1
# key-value head of 32 numbers, so attention projects 64 numbers to 64, 32 and
# 32, and back from 64 to 64; the MLP is three matrices of 64 by 192.

# %%
L, F = config.model.n_layers, config.model.d_ff
formula = {
    "embedding": V * D,
    "attention": L * (D * 64 + 2 * D * 32 + 64 * D),
    "MLP": L * 3 * D * F,
    "norms": (2 * L + 1) * D,
}
counted = dict.fromkeys(formula, 0)
for name, parameter in model.named_parameters():
    part = ("norms" if "norm" in name else "MLP" if "mlp" in name
            else "attention" if "attention" in name else "embedding")
    counted[part] += parameter.numel()
assert counted == formula
assert sum(formula.values()) == config.model.n_parameters
print(f"{config.model.n_parameters:,} parameters")

# %% [markdown]
# The formula, the package's closed form (`n_parameters` in `config.py`) and the
# model itself agree to the last number, so a model's size is known before a
# byte of it exists. The MLP is the largest part, and the 512 tokens take a
# quarter: in a tiny model, words are dear.

# %%
figure, axes = plt.subplots(figsize=(6.5, 2.8))
axes.barh(list(counted), list(counted.values()), label="counted in the model")
axes.plot(list(formula.values()), list(formula), "k|", ms=18, mew=2,
          label="formula")
axes.set(xlabel="parameters", title="Where the parameters are")
axes.invert_yaxis()
axes.legend(loc="lower right", labelspacing=1)
plt.show()
assert counted["MLP"] > counted["embedding"] > counted["attention"]

# %% [markdown]
# ## 5 A guess, and how wrong it is
#
# Given ids, the model returns *logits*: one score for each token of the
# vocabulary, at every position. `softmax` makes probabilities of them. The
# *loss* is the mean of -log(probability of the token that really came next),
# in nats, so 0 is a prophet. We write it in three lines and compare it with the
# package, which never holds all the logits at once: values, then gradients.
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
# It spreads its bets evenly over all 512 tokens, and -ln(1/512) = ln 512. A new
# model that starts far from ln V has a bug; this is the cheapest test there is.
#
# ## 6 Training
#
# Each step asks for the loss of a new batch, asks by how much every parameter
# would change it (`backward`), and moves all of them a little the other way
# (`optimizer.step`). That is the whole of training. The learning rate follows
# a schedule, and a gradient that is too long is cut; notebook 06 says why.

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
# Two lines of theory to compare with. *Even bets* cost ln V. Somebody who only
# knows how often each token occurs would pay the *entropy* of those
# frequencies. To get below that line, a model must use what stands before.
# The held-out text, which it never trained on, tells learning from memorizing.

# %%
tokens = torch.tensor(loader.sources[0].shards[0].tolist())
frequency = tokens.bincount(minlength=V) / len(tokens)
entropy = -(frequency * frequency.clamp_min(1e-9).log()).sum().item()
validation = prepared.validation(T)
held_out = nanomai.evaluate(model, tokenizer, validation.batches(16))
last = sum(losses[-20:]) / 20
assert last < held_out.loss < entropy < losses[0]
print(f"even bets {math.log(V):.1f}, frequencies {entropy:.1f}, "
      f"held out {held_out.loss:.1f}, training {last:.1f}")

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
# The frequencies are learned within a few dozen steps; everything after that is
# context. Held-out text costs more than training text: 400 steps have read each
# story about nine times, and part of what was learned is these very stories.
#
# The loop above is not a toy beside the real thing: `nanomai.train` takes the
# same steps, and adds checkpoints, refusals of bad steps, several processes
# and a report. We let it do five, and compare the losses.

# %%
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
# with a vowel. For the second we compare " She" with " He" after a sentence
# about a person, for six women's and six men's names.

# %%
@torch.no_grad()
def next_token(model, prompt):
    """The model's probability of each token after the prompt: (V,)"""
    ids = [tokenizer.end_of_text, *tokenizer.encode(prompt)]
    return model(torch.tensor([ids]))[0, -1].softmax(-1)


vowel = torch.tensor([tokenizer.decode([i]).lstrip()[:1] in tuple("aeiou")
                      for i in range(V)])
untrained = nanomai.build_model(config.model, config.train.seed)
an = {f"{article}\n{when}": next_token(m, f"Long ago, Rosa found {article}")
      [vowel].sum().item() for article in ("a", "an")
      for when, m in (("before", untrained), ("after", model))}
print({key.replace("\n", ", "): round(p, 1) for key, p in an.items()})

# %%
women = "Zoë Anna Mei Yuki Rosa Inès"
men = "André Omar Kenji Paul Léo Ravi"
[she], [he] = tokenizer.encode(" She"), tokenizer.encode(" He")
says_she = {}
for name in (women + " " + men).split():
    p = next_token(model, f"Long ago, {name} found a key in the attic.")
    says_she[name] = (p[she] / (p[she] + p[he])).item()
gap = abs(sum(says_she[name] for name in women.split())
          - sum(says_she[name] for name in men.split())) / 6
assert gap < 0.2  # far from the 1 that is right
print(f"“She” rather than “He”: women and men differ by {gap:.1f}")

# %%
figure, (left, right) = plt.subplots(
    1, 2, figsize=(9.5, 3.8), width_ratios=(2, 3), layout="constrained")
left.bar(list(an), list(an.values()), color=["C7", "C0", "C7", "C0"])
left.plot(list(an), [0, 0, 1, 1], "k_", ms=30, mew=2, label="English")
left.set(ylabel="probability that a vowel is next",
         ylim=(-0.03, 1.05))
right.bar(list(says_she), list(says_she.values()), color="C0")
right.plot(list(says_she), [1] * 6 + [0] * 6, "k_", ms=20, mew=2,
           label="the text")
right.set(ylabel="“She” as a share of “She” or “He”",
          ylim=(-0.03, 1.05))
right.tick_params(axis="x", rotation=45)
for axes in (left, right):
    axes.legend(loc="center", frameon=True)
plt.show()
assert an["a\nafter"] < 0.1 and an["an\nafter"] > 0.6

# %% [markdown]
# "An" is learned: its evidence is the word right before. "She" is not: the
# model knows that a pronoun is due, but bets the same for Zoë and for André.
# Here the evidence stands seven words back, and who is whom must be learned by
# heart for each of 32 names; a run ten times as long still bets the same. Form
# comes before fact: keep that in mind when a fluent text is in front of you.
#
# ## 8 The answer
#
# To write, the model's guess is turned into a token, the token is appended, and
# the model is asked again. Taking the likeliest each time is called *greedy*.
# Our loop reads the whole text anew for each token; the package keeps what it
# has already computed (notebook 07), and must give the same tokens.
#
# > **Predict.** How will it go on after "Mei gives him 2 more. Now"?

# %%
question = "Kenji has 5 pears. Mei gives him 2 more. Now"
prompt = [tokenizer.end_of_text, *tokenizer.encode(question)]
written = []
with torch.no_grad():
    for _ in range(12):
        logits = model(torch.tensor([prompt + written]))[0, -1]  # (V,)
        written.append(int(logits.argmax()))
assert written == nanomai.generate(model, prompt, max_tokens=12)
print(question + tokenizer.decode(written), "...")

# %%
opening = "Early in spring,"
pieces = nanomai.stream_text(model, tokenizer, opening, max_tokens=50,
                             temperature=0)
print(textwrap.fill(opening + "".join(pieces) + " ...", 76))

# %% [markdown]
# A good sentence of its kind, with the wrong person, number and fruit; and
# somebody who carries a book is asked about a bell. The same lesson again.
#
# ## 9 Break it
#
# The commonest bug in this house is a target that is not shifted: the model is
# asked to predict the very token it is looking at.
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
assert loss.item() < 0.5 * last
echo = nanomai.generate(broken, prompt, max_tokens=6)
print(repr(tokenizer.decode(echo)))
try:
    assert torch.equal(batch.ids[:, 1:], targets[:, :-1]), "not shifted"
except AssertionError as error:
    print(type(error).__name__, "-", error)

# %% [markdown]
# Far lower, after a fifth of the steps, and worthless: it repeats the last
# token for ever. A loss that is too good is a bug until proved otherwise. The
# assertion of section 3 sees it without any training.
#
# ## 10 Exercises
#
# **1 · Count before you build.** Write `count(c)`: the parameters of a model
# with RMSNorm, SwiGLU, RoPE and no biases, from its dimensions `n_layers`,
# `d_model`, `n_heads`, `n_kv_heads`, `head_dim`, `d_ff`, `vocab_size` and
# `tied_embeddings` alone. An untied model has a second matrix for the output.

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
# **2 · Change one field.** Write `widen(config, budget)`, which returns the
# `ModelConfig` with its `d_ff` changed, and nothing else, to the largest value
# with which the model has at most `budget` parameters. A config is frozen:
# `dataclasses.replace(config, d_ff=...)` makes a changed copy.

# %%
def widen(config, budget):
    raise NotImplementedError


house_map.check_widen(widen)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `n_parameters` is a straight line in `d_ff`. What does one more cost?
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
# For scale we assume a CPU thread of 1e11 operations a second.

# %%
big = nanomai.load_config("mai-1-dense").model
parameters = big.n_parameters
tokens = 20 * parameters  # a rule of thumb that notebook 08 will measure
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
# What changes with size, apart from the price? `torch.device("meta")` builds
# any model without its numbers, so that we can count its real matrices.
#
# > **Predict.** The embedding is a quarter of our model. What is its share at
# > 500 billion, where the vocabulary is 200 times larger and there are two
# > such matrices?

# %%
def shares(config):
    """Fractions of the parameters: embedding and head, attention, MLP."""
    with torch.device("meta"):
        sizes = {n: p.numel() for n, p
                 in nanomai.build_model(config).named_parameters()}
    assert sum(sizes.values()) == config.n_parameters
    tables = sum(s for n, s in sizes.items() if n.startswith(("emb", "head")))
    attention = sum(s for n, s in sizes.items() if ".attention." in n)
    mlp = sum(s for n, s in sizes.items() if ".mlp." in n)
    return [part / config.n_parameters for part in (tables, attention, mlp)]


names = ["gpt2-124m", "llama-3-8b", "mai-1-dense"]
rows = {"this lesson": shares(config.model)}
rows |= {name: shares(nanomai.load_config(name).model) for name in names}
for name, row in rows.items():
    print(f"{name:12}", *(f"{share:6.1%}" for share in row))

# %%
figure, axes = plt.subplots(figsize=(7.5, 3.2), layout="constrained")
start = [0.0] * len(rows)
for i, part in enumerate(("embedding and head", "attention", "MLP")):
    widths = [row[i] for row in rows.values()]
    axes.barh(list(rows), widths, left=start, label=part)
    start = [a + b for a, b in zip(start, widths, strict=True)]
axes.invert_yaxis()
axes.set(xlabel="share of the parameters (the rest, below 1 %: norms, biases,"
         " positions)", xlim=(0, 1))
axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3)
plt.show()
assert rows["mai-1-dense"][0] < 0.01 < 0.2 < rows["this lesson"][0]
assert min(start) > 0.99

# %% [markdown]
# Words get cheap and thought gets dear: the tables shrink to under 1 %, and the
# MLPs take four fifths.
#
# ## Recap
#
# 1. Text becomes tokens, tokens become vectors, blocks of attention and MLP
#    refine them, and the last vector scores every possible next token.
# 2. Training is one loop: loss, gradients, a small step; ln V is where it
#    starts, frequencies are learned first, facts that need looking back last.
# 3. A config fixes the number of parameters exactly, from 131,392 to 500
#    billion, before anything is built.
#
# **What real systems do differently.** They read trillions of tokens, most of
# them once; they spread one model over thousands of GPUs; they go on after this
# training, with examples of answers and with preferences between them; and most
# of their lines deal with hardware that fails. The loop is the same.
#
# **Read on.** Source: [`model.py`](../nanomai/model.py),
# [`trainer.py`](../nanomai/trainer.py), [`config.py`](../nanomai/config.py).
# Papers: [Attention is all you need](https://arxiv.org/abs/1706.03762) (2017),
# [GPT-3](https://arxiv.org/abs/2005.14165) (2020),
# [Llama 3](https://arxiv.org/abs/2407.21783) (2024).
#
# **Next:** [01 · How does text become numbers, and come back
# unharmed?](01_bpe.ipynb)
