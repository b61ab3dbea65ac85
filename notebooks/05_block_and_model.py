# %% [markdown]
# # 05 · How can a hundred layers pass a signal on without spoiling it?
#
# **Goal.** Build the whole Transformer out of single operations, prove that
# it computes what `nanomai`'s model computes, and see what each part is for.
#
# **Prerequisites.** `03_attention` and `04_rope_gqa_flash`; the chain rule;
# what a variance is. **Time.** About 60 minutes; it runs in ten seconds.
#
# **You will be able to**
# - derive the gradient of a layer by hand and prove it right;
# - say what goes wrong without norms, without the residual stream, and
#   without the $1/\sqrt{2L}$ in the initial weights, and by how much;
# - predict the loss of a model that has learned nothing;
# - count the arithmetic of a training step to the last multiplication.

# %%
import math

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import nanomai
from nanomai import ops
from nanomai.config import ModelConfig
from nanomai.exercises import block as exercises
from nanomai.show import lesson

lesson()
generator = torch.Generator().manual_seed(5)

# %% [markdown]
# ## 1 RMSNorm: one size for every vector
#
# A layer should react to the *direction* of its input. How long the vector
# is depends on how many layers added to it before, so we divide by its root
# mean square, and let a learned weight per channel say how loud that channel
# should be. The $\varepsilon$ keeps a vector of zeros from dividing by zero:
#
# $$y = \frac{x}{\sqrt{\overline{x^2} + \varepsilon}} \odot w .$$

# %%
def rms_norm(x, weight, eps):
    """x (..., D), weight (D,) -> (..., D)"""
    rms = (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()  # (..., 1)
    return x / rms * weight


D, eps = 48, 1e-5
x = torch.randn(5, D, generator=generator, requires_grad=True)
weight = torch.rand(D, generator=generator, requires_grad=True)
assert_close(rms_norm(x, weight, eps), ops.rms_norm(x, weight, eps))
print("shape", tuple(rms_norm(x, weight, eps).shape), "as the package's")

# %% [markdown]
# If $\varepsilon$ is too small to matter, as below, a longer $x$ gives the
# same $y$. That tells us something about the gradient before we derive it.
#
# > **Predict.** Some loss depends on $y$. What is the dot product of $x$ and
# > the loss's gradient with respect to $x$? And how large is that gradient if
# > $x$ is 100 times as long?

# %%
d_y = torch.randn(5, D, generator=generator)  # what arrives from above


def gradient(x, norm=rms_norm):
    return torch.autograd.grad(norm(x, weight, 1e-12), x, d_y)[0]


d_x = gradient(x)
along = (x * d_x).sum(-1) / (x.norm(dim=-1) * d_x.norm(dim=-1))
shrunk = gradient(100 * x).norm() / d_x.norm()
print("cosine of x and its gradient:", round(along.abs().max().item(), 3))
print("x is 100 times as long, the gradient", round(shrunk.item(), 3))
assert along.abs().max() < 1e-4 and abs(shrunk - 0.01) < 1e-5
assert_close(gradient(x, ops.rms_norm), d_x)

# %% [markdown]
# Zero: a step along $x$ changes nothing. And a hundredth: the norm divides
# the gradient by the same number as the signal.
#
# ## 2 SwiGLU: a gate and a value
#
# The MLP works on each position alone. SwiGLU makes two vectors of $F$
# numbers from its input, a gate $g$ and a value $u$. The gate, as
# $\mathrm{silu}(g) = g\,\sigma(g)$ with the sigmoid $\sigma$, decides how
# much of the value passes: $h = \mathrm{silu}(g) \odot u$. A third matrix
# leads back to $D$ numbers.
#
# We derive its gradient by hand. The product rule gives
# $\partial h/\partial u = \mathrm{silu}(g)$, and
# $\partial h/\partial g = u\,\mathrm{silu}'(g)$ with
# $\mathrm{silu}' = \sigma + g\,\sigma (1-\sigma)$. `compare` holds this
# against autograd in float64, where a right formula agrees to a dozen digits.
# The third formula below is wrong on purpose: it forgets the derivative of
# $\sigma$.

# %%
def compare(name, by_hand, autograd):
    """Say how well a gradient agrees with autograd's; stop if it doesn't."""
    off = (by_hand - autograd).abs().max() / autograd.abs().max()
    assert off < 1e-9, f"{name} is off by {off:.1g} of its largest number"
    print(f"{name}: equal")


wide = {"generator": generator, "dtype": torch.float64}
g, u = (torch.randn(7, 9, **wide).requires_grad_() for _ in range(2))
d_h = torch.randn(7, 9, **wide)
true_g, true_u = torch.autograd.grad(F.silu(g) * u, (g, u), d_h)

s = g.sigmoid()
compare("d_u", d_h * g * s, true_u)
compare("d_g", d_h * u * (s + g * s * (1 - s)), true_g)
try:
    compare("d_g", d_h * u * s, true_g)
except AssertionError as error:
    print(f"{type(error).__name__}: {error}")

# %% [markdown]
# A network with this mistake may still learn, only less well. A falling loss
# would hide it; the comparison does not.
#
# ## 3 The block, and the whole model
#
# One vector for each token runs from the embedding to the head: the
# *residual stream*. A block reads it through a norm and *adds* its result,
# twice:
#
# $$x \leftarrow x + \mathrm{attention}(\mathrm{norm}(x)), \qquad
#   x \leftarrow x + \mathrm{mlp}(\mathrm{norm}(x)).$$
#
# Here is all of it on plain tensors, `w` being a dictionary of weights by
# name. Attention goes head by head, as notebooks 03 and 04 derived it.

# %%
def attention(x, w, name, c):
    """Causal grouped-query attention, one head at a time: x (B, T, D)."""
    T, K, shared = x.shape[1], c.head_dim, c.n_heads // c.n_kv_heads
    speed = c.rope_theta ** (-torch.arange(0, K, 2) / K)  # (K/2,)
    angle = torch.outer(torch.arange(T), speed)  # (T, K/2)

    def head(matrix, i):
        return x @ w[f"{name}.{matrix}.weight"][i * K : (i + 1) * K].T

    def turn(y):  # (B, T, K) -> (B, T, K)
        z = torch.complex(*y.chunk(2, -1))  # (B, T, K/2)
        z = z * torch.polar(torch.ones(()), angle)
        return torch.cat((z.real, z.imag), -1)

    future, outputs = torch.ones(T, T).triu(1).bool(), []
    for h in range(c.n_heads):
        q, k = turn(head("wq", h)), turn(head("wk", h // shared))
        scores = q @ k.mT / math.sqrt(K)  # (B, T, T)
        p = scores.masked_fill(future, -torch.inf).softmax(-1)
        outputs.append(p @ head("wv", h // shared))
    return torch.cat(outputs, -1) @ w[f"{name}.wo.weight"].T  # (B, T, D)

# %% [markdown]
# The rest is short. The input table `embed` is used a second time at the end:
# the logit of a token is the dot product of its own embedding and the final
# vector. That is the *tied head*, and it saves $V D$ weights.

# %%
def mlp(x, w, name):
    gate, up, down = (w[f"{name}.w_{part}.weight"]
                      for part in ("gate", "up", "down"))
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


def transformer(ids, w, c):
    """ids (B, T) -> logits (B, T, V)"""
    x = w["embed.weight"][ids]  # (B, T, D)
    for i in range(c.n_layers):
        b = f"blocks.{i}"
        y = rms_norm(x, w[f"{b}.attention_norm.weight"], c.norm_eps)
        x = x + attention(y, w, f"{b}.attention", c)
        y = rms_norm(x, w[f"{b}.mlp_norm.weight"], c.norm_eps)
        x = x + mlp(y, w, f"{b}.mlp")
    x = rms_norm(x, w["norm.weight"], c.norm_eps)
    return x @ w["embed.weight"].T  # (B, T, V)

# %% [markdown]
# Is it the package's model? We let `nanomai` build one whose sizes all
# differ, so that no mix-up stays hidden, move the norm weights away from one,
# copy everything, and compare the logits.

# %%
config = ModelConfig(n_layers=3, d_model=48, n_heads=4, n_kv_heads=2,
                     head_dim=20, d_ff=72, vocab_size=97)
model = nanomai.build_model(config)
with torch.no_grad():
    for p in model.parameters():
        if p.ndim == 1:
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
w = {name: p.detach().clone().requires_grad_()
     for name, p in model.named_parameters()}
ids = torch.randint(97, (2, 24), generator=generator)
inputs, targets = ids[:, :-1], ids[:, 1:].clone()  # (B, T) each
logits = transformer(inputs, w, config)
assert_close(logits, model(inputs))
print("logits", tuple(logits.shape), "equal")

# %% [markdown]
# Equal values are half the proof. The other half is the gradient of every
# weight, since that is what training sees. We mark some targets as `IGNORE`:
# they carry no loss, and must give no gradient either.

# %%
targets[:, ::7] = ops.IGNORE
valid = targets != ops.IGNORE  # (B, T)
log_p = logits[valid].log_softmax(-1)  # (valid, V)
loss = -log_p.gather(-1, targets[valid][:, None]).mean()
loss.backward()
package_loss = model(inputs, targets)
package_loss.backward()
assert_close(loss, package_loss)
for name, p in model.named_parameters():
    assert_close(w[name].grad, p.grad, msg=name)
numbers = sum(p.numel() for p in w.values())
print(len(w), "tensors,", numbers, "numbers: every gradient equal")
assert numbers == config.n_parameters

# %% [markdown]
# ## 4 Why the norm?
#
# Leave the norm out and feed an MLP directly with streams of many sizes.
#
# > **Predict.** The stream becomes ten times as large. By what factor does
# > the output of a SwiGLU MLP grow without a norm in front of it? With one?

# %%
deep = ModelConfig(n_layers=32, vocab_size=4096)
block = nanomai.build_model(deep).blocks["0"]
x = torch.randn(512, deep.d_model, generator=generator)  # (N, D), std 1
sizes = 10.0 ** torch.arange(-1, 6)
with torch.no_grad():
    normed = torch.stack([block.mlp(block.mlp_norm(s * x)).std()
                          for s in sizes])
    bare = torch.stack([block.mlp(s * x).std() for s in sizes])

plt.loglog(sizes, bare, "o", label="without norm")
plt.loglog(sizes, bare[0] * (sizes / sizes[0]) ** 2, "C0--",
           label="a square: slope 2")
plt.loglog(sizes, normed, "s", color="C1", label="with norm")
plt.loglog(sizes, sizes, "k:", label="as large as the stream itself")
plt.xlabel("std of the stream (log)")
plt.ylabel("std of what the MLP adds (log)")
plt.legend()
plt.show()
slopes = (bare[1:] / bare[:-1]).log10()
print("powers of ten out for one in:", [round(s.item(), 1) for s in slopes])
assert (slopes - 2).abs().max() < 0.2 and normed.max() / normed.min() < 1.1

# %% [markdown]
# A hundredfold, since gate and value both grow and the output is their
# product. Beyond the crossing of the lines, the MLP adds more than it
# received, and the next one sees an even larger stream; far below, it adds
# next to nothing. With a norm it adds the same at any size.
#
# ## 5 Why the residual stream?
#
# Take the "$x\,+$" away, and each block must hand on all that the later ones
# need. We watch two things. On the way up: how alike do the vectors of
# different positions become? If all are the same, the tokens are lost. On the
# way down: how large is the loss's gradient at each height of the stream?

# %%
def enter(model, ids):
    """The embeddings of ids (B, T), and the rotations of the T positions."""
    c, positions = model.config, torch.arange(ids.shape[1])
    rotary = ops.rotary_table(positions, c.head_dim, c.rope_theta)
    return model.embed(ids), rotary


def alike(x):
    """Mean cosine of two positions, where the past is long: second half."""
    n = F.normalize(x[:, x.shape[1] // 2 :], dim=-1)  # (B, T/2, D)
    cosine, t = n @ n.mT, n.shape[1]  # (B, T/2, T/2)
    return ((cosine.sum((1, 2)) - t) / (t * t - t)).mean().item()

# %%
def journey(model, ids, residual):
    """Likeness, and gradient norm, after 0, 1, ..., L blocks."""
    x, rotary = enter(model, ids[:, :-1])
    streams = [x]
    for b in model.blocks.values():
        a = b.attention(b.attention_norm(x), rotary, None)
        x = x + a if residual else a
        m = b.mlp(b.mlp_norm(x))
        x = x + m if residual else m
        streams.append(x)
    logits = model.norm(x) @ model.embed.weight.T
    loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    gradients = torch.autograd.grad(loss, streams)
    return ([alike(x) for x in streams],
            [gradient.norm().item() for gradient in gradients])

# %% [markdown]
# > **Predict.** With initial weights, attention looks at all of the past
# > about equally. After how many blocks without a residual is the mean cosine
# > above 0.9?

# %%
eight = ModelConfig(n_layers=8, vocab_size=4096, context_length=64)
model = nanomai.build_model(eight)
ids = torch.randint(4096, (8, 65), generator=generator)
with_x, without_x = (journey(model, ids, keep) for keep in (True, False))

figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.6), layout="constrained")
for i, what in enumerate(("mean cosine of two positions",
                          "norm of the stream's gradient (log)")):
    axes[i].plot(with_x[i], "o-", label="with residual")
    axes[i].plot(without_x[i], "s-", label="without")
    axes[i].set(xlabel="blocks passed", ylabel=what)
axes[1].set_yscale("log")
axes[0].legend()
plt.show()
collapsed = next(i for i, c in enumerate(without_x[0]) if c > 0.9)
spread = [max(g) / min(g) for _, g in (with_x, without_x)]
print("above 0.9 after", collapsed, "blocks without the residual")
print(f"largest gradient / smallest: {spread[0]:.1f} with,",
      f"{spread[1]:.0f} without the residual")
assert collapsed == 2 and max(with_x[0]) < 0.5
assert spread[0] < 2 and spread[1] > 10

# %% [markdown]
# Two. Attention takes means, and the mean of a long past hardly changes from
# one position to the next. With the residual, each position keeps its own
# token and *adds* the mean. The gradients with the residual pass down almost
# unchanged. Without it, from block 7 down to block 1, they grow by about two
# thirds with every block: twentyfold in six, and without bounds in a hundred.
#
# ## 6 Why $1/\sqrt{2L}$?
#
# Independent numbers add their *variances*. Thanks to the norms each block
# adds about the same variance $v$, so after $l$ blocks the stream has std
# $\sqrt{s^2 + l v}$, where $s$ (`init_std`) is the std of the embedding and
# of all matrices at the start. That grows with depth. But let the $2L$
# matrices that write to the stream, `wo` and `w_down`, begin smaller by
# $\sqrt{2L}$: then each block adds $v/2L$, and all $L$ together $v/2$ at any
# depth.
#
# What is $v$? A matrix of std $s$ makes of $n$ numbers with mean square $q$
# numbers of variance $n q s^2$. So behind the norm, values, gates and `up`
# have variance $s^2 D$. `wo` sums $HK$ values, and `w_down` $F$ products of
# gate and `up`:
#
# $$v = s^2 \cdot s^2 D \cdot
#   \left(HK + F\,\overline{\mathrm{silu}(g)^2}\right).$$
#
# We measure on rows of one token, where attention just hands on its value.

# %%
normal = torch.randn(10**5, generator=generator)


def theory(c, blocks, scaled):
    """Std of the stream after `blocks` blocks at the start of training."""
    s2, HK = c.init_std**2, c.n_heads * c.head_dim
    gate = F.silu((s2 * c.d_model) ** 0.5 * normal).pow(2).mean().item()
    v = s2 * s2 * c.d_model * (HK + c.d_ff * gate)
    return (s2 + blocks * v / (2 * c.n_layers if scaled else 1)) ** 0.5

# %%
@torch.no_grad()
def measured(c, scaled):
    model = nanomai.build_model(c)
    ids = torch.randint(c.vocab_size, (512, 1), generator=generator)
    x, rotary = enter(model, ids)
    stds = [x.std().item()]
    for b in model.blocks.values():
        if not scaled:  # undo what `init_weights` did
            b.attention.wo.weight.mul_(math.sqrt(2 * c.n_layers))
            b.mlp.w_down.weight.mul_(math.sqrt(2 * c.n_layers))
        x = b(x, rotary, None)
        stds.append(x.std().item())
    return stds

# %% [markdown]
# > **Predict.** Here $v$ is $6.8\,s^2$. After 64 layers, what share of the
# > final vector's variance is still the token's own embedding: with the
# > scaling, and without?

# %%
c = ModelConfig(n_layers=64, vocab_size=4096)
runs = {scaled: measured(c, scaled) for scaled in (True, False)}
for scaled, color, label in [(False, "C3", "plain init"),
                             (True, "C0", "with 1/sqrt(2L)")]:
    line = [theory(c, i, scaled) for i in range(0, 65, 4)]
    plt.plot(range(0, 65, 4), line, color + "--", label=f"theory, {label}")
    plt.plot(range(0, 65, 4), runs[scaled][::4], color + "o", ms=4,
             label=f"measured, {label}")
plt.xlabel("blocks passed, of 64")
plt.ylabel("std of the residual stream")
plt.legend()
plt.show()
for scaled, stds in runs.items():
    share = (stds[0] / stds[-1]) ** 2
    print(f"scaled {scaled!s:5}  ends at {stds[-1]:.2f},",
          f"the embedding is {share:.1%} of the variance")
    for i in range(0, 65, 8):
        assert abs(stds[i] / theory(c, i, scaled) - 1) < 0.1
assert 5 * runs[True][-1] < runs[False][-1]

# %% [markdown]
# $1 / (1 + 3.4)$ with it, and $1 / (1 + 64 \cdot 6.8)$ without: nothing was
# fitted, and the dots lie on the lines. Without the scaling a deep model
# begins as noise in which its own input is lost.
#
# ## 7 The loss of a model that knows nothing
#
# At the start all $V$ tokens get a probability near $1/V$, and the loss is
# near $\ln V$. More exactly: behind the last norm the $D$ numbers have mean
# square one, so a logit has std $\tau = s \sqrt D$. The mean of $e^z$ over
# normal numbers of that std is $e^{\tau^2/2}$, so the loss is near
# $\ln V + \tau^2/2$. Compare your own first loss: many bugs show there.
#
# > **Predict.** The tied model has learned nothing. Which token does it think
# > comes next?

# %%
print("   V   ln V  untied   tied   tied one repeats   with p * V of")
for V in (256, 1024, 4096):
    ids = torch.randint(V, (16, 65), generator=generator)
    inputs, targets = ids[:, :-1], ids[:, 1:]
    losses = []
    for tied in (False, True):
        c = ModelConfig(n_layers=2, vocab_size=V, tied_embeddings=tied)
        with torch.no_grad():
            logits = nanomai.build_model(c)(inputs)
        losses.append(F.cross_entropy(logits.mT, targets).item())
    p = logits.softmax(-1)  # of the tied model, the last
    repeats = (p.argmax(-1) == inputs).float().mean()
    own = V * p.gather(-1, inputs[..., None]).mean()
    print(f"{V:5} {math.log(V):6.2f}  {losses[0]:6.2f} {losses[1]:6.2f}"
          f"   {repeats:15.0%} {own:15.0f}")
    expected = math.log(V) + c.init_std**2 * c.d_model / 2
    assert max(abs(x - expected) for x in losses) < 0.03 and repeats > 0.99

# %% [markdown]
# The very token it has just read. In a long row attention adds a mean of many
# values, which is small, so the final vector is mostly the token's embedding,
# and the tied head asks which embedding it resembles. Eight times $1/V$ is
# still little and hardly shows in the loss.
#
# ## 8 How much arithmetic is a token?
#
# A product of an $(m, n)$ matrix and a vector costs $2mn$ FLOPs: a
# multiplication and an addition for each weight. The backward pass does two
# such products, one for the input's gradient and one for the weight's. So
# training costs 6 FLOPs per weight and token. Attention comes on top:
# $q \cdot k$ and $p\,v$ cost $2K$ each for a head and a pair of positions,
# and three times that with the backward pass: $12K$.
#
# PyTorch can count what really runs. It counts all $T$ keys, where a causal
# row needs half.

# %%
small = ModelConfig(n_layers=4, d_model=128, vocab_size=4096)
T = 256
ids = torch.randint(small.vocab_size, (2, T + 1), generator=generator)
with FlopCounterMode(display=False) as counter:
    nanomai.build_model(small)(ids[:, :-1], ids[:, 1:]).backward()
counted = counter.get_total_flops() // (2 * T)

scores = 12 * small.n_layers * T * small.n_heads * small.head_dim
norms = 6 * small.n_layers * 2 * small.d_model  # no matrices, yet counted
print("counted", counted, " formula", small.flops_per_token(T))
assert small.flops_per_token(T) == counted - scores // 2 + norms
head = 6 * small.vocab_size * small.d_model
print(f"the head alone: {head / counted:.0%}")

# %% [markdown]
# They agree to the last FLOP, apart from the masked half and the norm
# weights, which the formula counts as if they were matrices. The tied head
# needs no weight of its own, yet takes a third of the arithmetic.
#
# ## 9 At 500B
#
# In May 2024 the press reported that Microsoft was training MAI-1, a model of
# about 500 billion parameters. Nothing of its architecture was published:
# `mai-1-dense` is *our proposal* for a dense model of that size. On the
# `meta` device a tensor has a shape and no numbers.

# %%
config = nanomai.load_config("mai-1-dense")
c, T = config.model, config.sequence_length
with torch.device("meta"):
    model = nanomai.build_model(c)
total = sum(p.numel() for p in model.parameters())
in_mlp = sum(p.numel() for name, p in model.named_parameters()
             if ".mlp." in name)
print(f"{total:,} parameters, {in_mlp / total:.0%} of them in MLPs")
assert total == c.n_parameters == 497_457_285_120
print(f"{c.flops_per_token(T) / 1e12:.2f} TFLOP a token")
print(f"logits of one row of {T}: {4 * T * c.vocab_size / 1e9:.1f} GB")
print(f"wo and w_down begin {math.sqrt(2 * c.n_layers):.1f} times smaller")

# %% [markdown]
# Attention over the past is work that no parameter pays for: $6 L T H K$
# FLOPs a token, halved by the causal mask.
#
# > **Predict.** At which row length $T$ does it take half of the arithmetic?
# > First for the model of section 8: 1.3 million weights multiply, $L = 4$
# > and $HK = 128$. Then at 500B, where $L = 120$ and $HK = 18{,}432$.

# %%
for name, m in (("section 8", small), ("mai-1-dense", c)):
    past = 6 * m.n_layers * m.n_heads * m.head_dim  # FLOPs per token of row
    half = (m.flops_per_token(2) - 2 * past) / past
    print(f"{name:12} half at a row of {round(half, -2):9,.0f} tokens;",
          f"{past * T / m.flops_per_token(T):3.0%} at {T:,}")
    at_half = m.flops_per_token(round(half))
    assert abs(past * round(half) / at_half - 0.5) < 1e-3

# %% [markdown]
# Weights grow as $D^2$, scores as $D$, so a wide model hardly feels them at
# its training length: "6 FLOPs a parameter" is a good rule.
#
# One thing does *not* scale by itself. By section 7 the first logits have the
# std $s\sqrt D$. GPT-2's $s = 0.02$ was chosen for widths around a thousand.
# A rule such as $s = 1/\sqrt{3D}$, close to what the 530B model MT-NLG used,
# gives the same logits at every width. The last line is the proposal's.

# %%
noise = torch.randn(c.vocab_size, generator=generator)
for rule, s in (("GPT-2", 0.02), ("1 / sqrt(3 D)", (3 * c.d_model) ** -0.5),
                ("mai-1-dense", c.init_std)):
    tau = s * math.sqrt(c.d_model)
    first = (tau * noise).logsumexp(-1).item()  # the logits of one token
    print(f"{rule:14} s = {s:.4f}, logits of std {tau:.1f}:",
          f"first loss {first:.1f}")
    assert abs(first - math.log(c.vocab_size) - tau**2 / 2) < 0.3
print(f"ln V = {math.log(c.vocab_size):.1f}")

# %% [markdown]
# With GPT-2's number a model of this width would begin not ignorant but sure
# of wrong answers. A constant was right only at its own width; notebook 08
# puts the width into the formula.
#
# ## Exercises
#
# **1. RMSNorm, by hand.** Given $x$, $w$, $\varepsilon$ and the gradient
# `d_y` of the output, return `(d_x, d_weight)`. Leading dimensions are free.

# %%
def rms_norm_gradient(x, weight, eps, d_y):
    raise NotImplementedError


exercises.check_rms_norm_gradient(rms_norm_gradient)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Call $r$ the root and $n = x/r$. First the gradient of $n$, which is
# $d_n = d_y \odot w$. Then $x$ acts twice: directly, and through $r$, for
# which $\partial r / \partial x_i = x_i / (D r)$. Section 1 tells you what
# must come out for $\varepsilon = 0$: something perpendicular to $x$.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# def rms_norm_gradient(x, weight, eps, d_y):
#     r = (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()
#     n = x / r
#     d_n = d_y * weight
#     d_x = (d_n - n * (n * d_n).mean(-1, keepdim=True)) / r
#     d_weight = (d_y * n).flatten(0, -2).sum(0)
#     return d_x, d_weight
# ```
# The subtracted part removes from $d_n$ what points along $x$.
# </details>
#
# **2. FLOPs.** Write what `FlopCounterMode` counts for one training token of
# a model `config` in a row of `t` tokens: every matrix product, forward and
# backward, all `t` keys for each query. Watch the heads, the GELU model (two
# matrices in its MLP) and the head of a tied model.

# %%
def flops(config, t):
    raise NotImplementedError


exercises.check_flops(flops)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Six for each weight of each matrix that multiplies, the output head among
# them; the embedding table is looked up, not multiplied. Keys and values have
# `n_kv_heads`, but every one of the `n_heads` query heads computes scores.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# def flops(config, t):
#     d, k = config.d_model, config.head_dim
#     attention = d * k * (2 * config.n_heads + 2 * config.n_kv_heads)
#     matrices = 3 if config.activation == "swiglu" else 2
#     mlp = matrices * d * config.d_ff
#     weights = config.n_layers * (attention + mlp) + config.vocab_size * d
#     return 6 * weights + 12 * config.n_layers * t * config.n_heads * k
# ```
# </details>
#
# **3. Remove the norms.** Return the std of a stream `x` (B, T, D) as it
# enters, and after each block of `model` with both of the block's norms left
# out: `n_layers + 1` numbers. Leave the model and `x` as you found them. Then
# try it on `nanomai.build_model(deep)`, the 32 layers of section 4, with
# `x = s * torch.randn(2, 32, 128)` and `s` from 1 to 10,000. Explain what you
# see with the plot of section 4.

# %%
def stream_without_norm(model, x):
    raise NotImplementedError


exercises.check_stream_without_norm(stream_without_norm)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `block.attention(x, rotary, None)` and `block.mlp(x)` can be called without
# going through `block`. `journey` in section 5 has nearly all you need.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# @torch.no_grad()
# def stream_without_norm(model, x):
#     c = model.config
#     positions = torch.arange(x.shape[1])
#     rotary = ops.rotary_table(positions, c.head_dim, c.rope_theta)
#     stds = [x.std().item()]
#     for block in model.blocks.values():
#         x = x + block.attention(x, rotary, None)
#         x = x + block.mlp(x)
#         stds.append(x.std().item())
#     return stds
# ```
# With `s = 1` nothing seems to be wrong: the blocks add so little that the
# stream stays as it was. At `s = 1000`, where the lines cross, every MLP adds
# more than it received, the size is roughly squared at every layer, and after
# a few blocks there is only `nan`. Even `s = 100` creeps up to the crossing
# and gets there within 32 layers. Training changes weights and streams all
# the time, so a model without norms would always be close to one or the
# other.
# </details>
#
# ## Recap
#
# - The residual stream carries the signal up and the gradient down; behind a
#   norm, a branch does not notice the stream's size; $1/\sqrt{2L}$ makes the
#   sum of all branches independent of depth.
# - At the start the loss is near $\ln V + s^2 D / 2$. Training costs 6 FLOPs a
#   weight and token, and 12 a channel of each head for each key it sees.
# - To trust a layer, compare its values *and* all its gradients.
#
# **What real systems do differently.** They fuse norm, gate and loss into
# single kernels (`11_triton_kernels`), compute in bfloat16 while the norm
# stays in float32, add a norm on queries and keys or a second one after each
# branch, and often untie the head once $VD$ is small beside the rest.
#
# **Read on.** [`nanomai/model.py`](../nanomai/model.py),
# [`nanomai/ops.py`](../nanomai/ops.py) and
# [`nanomai/config.py`](../nanomai/config.py) (`flops_per_token`). RMSNorm
# [1910.07467](https://arxiv.org/abs/1910.07467), SwiGLU
# [2002.05202](https://arxiv.org/abs/2002.05202), where to put the norm
# [2002.04745](https://arxiv.org/abs/2002.04745), what is lost without
# residuals [2103.03404](https://arxiv.org/abs/2103.03404), the tied head
# [1608.05859](https://arxiv.org/abs/1608.05859), MT-NLG
# [2201.11990](https://arxiv.org/abs/2201.11990).
#
# **Next:** `05b_families` walks from this block's ancestor to today's models;
# `06_training` makes it learn.
