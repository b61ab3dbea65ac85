# %% [markdown]
# # 06 · What happens in one training step, and what protects the next million?
#
# **Goal.** Write every part of a training step by hand: loss, AdamW, Muon,
# schedule, clipping. Put them together into a loop that gives the very same
# numbers as `nanomai.train`, then learn what a long run needs besides.
#
# **Prerequisites.** `05_block_and_model`; singular values. **Time.** About 60
# minutes; it runs in half a minute.
#
# **You will be able to**
# - derive AdamW and Muon, and say what each does to a gradient;
# - read a learning-rate schedule, and clip without turning the direction;
# - split a batch so that the result stays the same;
# - stop a run at any step and go on as if nothing had happened.

# %%
import itertools
import math
import shutil
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch.testing import assert_close

import nanomai
from nanomai import ops, optim
from nanomai.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from nanomai.config_file import replace
from nanomai.exercises import training as exercises
from nanomai.guard import SpikeGuard
from nanomai.parallel.apply import clip_gradients
from nanomai.show import lesson

lesson()
generator = torch.Generator().manual_seed(6)

# %% [markdown]
# ## 1 The loss, and the push it gives
#
# The model gives each token a probability $p = \mathrm{softmax}(z)$, and pays
# $-\ln p_y$ for the token $y$ that really came. Since
# $-\ln p_y = \ln \sum_j e^{z_j} - z_y$, the derivative with respect to the
# logit $z_j$ is $p_j$, minus one if $j = y$.
#
# > **Predict.** How large is the sum of all these derivatives of one token?

# %%
N, D, V = 6, 8, 11
hidden = torch.randn(N, D, generator=generator, requires_grad=True)
table = torch.randn(V, D, generator=generator, requires_grad=True)
targets = torch.randint(V, (N,), generator=generator)

logits = hidden @ table.T  # (N, V)
p = logits.softmax(-1)
loss = -p[range(N), targets].log().sum()
d_logits = p.clone()
d_logits[range(N), targets] -= 1
assert_close(torch.autograd.grad(loss, logits, retain_graph=True)[0],
             d_logits)

package = ops.linear_cross_entropy(hidden, table, targets)
assert_close(package, loss)
package.backward()
assert_close(hidden.grad, d_logits @ table)
assert_close(table.grad, d_logits.T @ hidden)
print("gradient", tuple(d_logits.shape), "rows sum to zero:",
      d_logits.sum(-1).abs().max().item() < 1e-6)

# %% [markdown]
# Zero. A step against the gradient raises the right token's logit by as much
# as it lowers all the others' together, each in proportion to its
# probability.
#
# ## 2 AdamW: every number at its own scale
#
# The *size* of a gradient says little: those of two weights can differ a
# thousandfold. So Adam keeps running means of $g$ and of
# $g^2$ for each weight, and steps by the first over the root of the second:
#
# $$m \leftarrow \beta_1 m + (1-\beta_1)\,g, \qquad
#   v \leftarrow \beta_2 v + (1-\beta_2)\,g^2, \qquad
#   p \leftarrow (1 - \eta\lambda)\,p
#     - \eta\,\frac{\hat m}{\sqrt{\hat v} + \varepsilon} .$$
#
# Both means begin at zero and so are too small at first. Under a constant
# gradient $m$ is $(1-\beta_1^t)\,g$ after $t$ steps; dividing by $1-\beta^t$
# makes true means of them, the ones with hats. The W is for *weight decay*
# $\lambda$, which shrinks $p$ itself, apart from the gradient; $\eta$ is the
# learning rate.

# %%
def adamw_step(p, g, state, lr, decay, betas=(0.9, 0.95), eps=1e-8,
               corrected=True):
    """The new p after one step; `state` keeps t, m and v between steps."""
    b1, b2 = betas
    t = state["t"] = state.get("t", 0) + 1
    m = state["m"] = b1 * state.get("m", 0) + (1 - b1) * g
    v = state["v"] = b2 * state.get("v", 0) + (1 - b2) * g**2
    if corrected:
        m, v = m / (1 - b1**t), v / (1 - b2**t)
    return p * (1 - lr * decay) - lr * m / (v.sqrt() + eps)


def five_steps(**options):
    """Largest difference from torch.optim.AdamW in five steps, in lr."""
    theirs = torch.zeros(4, 3, requires_grad=True)
    mine, state, off = theirs.detach().clone(), {}, 0.0
    judge = torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.95),
                              weight_decay=0.1)
    for g in torch.randn(5, 4, 3, generator=generator):
        theirs.grad = g * torch.tensor([1e-3, 1.0, 1e3])  # three scales
        mine = adamw_step(mine, theirs.grad, state, 0.01, 0.1, **options)
        judge.step()
        off = max(off, (mine - theirs).abs().max().item() / 0.01)
    return off

# %% [markdown]
# PyTorch judges ours, and then ours without the correction, on purpose.
#
# > **Predict.** Without the correction, is the first step too long or too
# > short? Take $\beta_1 = 0.9$, $\beta_2 = 0.95$, and mind the root.

# %%
assert five_steps() < 1e-4
print("five steps equal torch.optim.AdamW")
try:
    assert five_steps(corrected=False) < 1e-4
except AssertionError as error:
    print("without correction:", type(error).__name__)

steps, sizes = range(1, 101), {}
for corrected, style in ((True, "C0o"), (False, "C1s")):
    state = {}  # a gradient of one at every step, and a rate of one
    sizes[corrected] = torch.stack([
        -adamw_step(torch.zeros(()), torch.ones(()), state, 1.0, 0.0,
                    corrected=corrected) for _ in steps])
    plt.plot(steps, sizes[corrected], style, ms=3,
             label="corrected" if corrected else "not corrected")
theory = torch.tensor([(1 - 0.9**t) / (1 - 0.95**t) ** 0.5 for t in steps])
plt.plot(steps, theory, "C1--", label="(1 - b1^t) / sqrt(1 - b2^t)")
plt.xlabel("optimizer step t")
plt.ylabel("size of the step (learning rates)")
plt.legend()
plt.show()
assert_close(sizes, {True: torch.ones(100), False: theory})

# %% [markdown]
# Less than half as long at first, then too long for a while. The true means
# give one learning rate per step, at every scale of the gradient.
#
# Which weights decay is a decision of its own. `build_optimizers` decays the
# matrices that multiply, and not embeddings, norms or biases: the embedding
# of a rare token would fade while nothing teaches it. We give our function
# the same rule and let both train the same model, on bytes as tokens.

# %%
folder = Path(tempfile.mkdtemp())
config = Config(
    model=ModelConfig(n_layers=2, d_model=64, n_heads=2, n_kv_heads=1,
                      head_dim=32, d_ff=192, vocab_size=257,
                      context_length=64),
    data=DataConfig(corpus="lesson.txt", tokenizer="bytes", workers=1,
                    folder=str(folder)),
    optim=OptimConfig(lr=0.01, warmup_steps=10, weight_decay=0.1),
    train=TrainConfig(steps=60, batch_tokens=16 * 64, device="cpu",
                      threads=1, dtype="float32", compile="off"))
prepared = nanomai.prepare(config.data, 257, show=False)
print(config.model.n_parameters, "parameters")

# %%
model = nanomai.build_model(config.model)
(adamw,) = optim.build_optimizers(model, config.optim)
optim.set_learning_rate([adamw], 0.01)
named = dict(model.named_parameters())
mine = {name: p.detach().clone() for name, p in named.items()}
states = {name: {} for name in named}
for batch in prepared.loader(64).batches(0, [4] * 5):
    adamw.zero_grad()
    model(*batch).backward()
    adamw.step()
    for name, p in named.items():
        decay = 0.1 if p.ndim == 2 and "blocks" in name else 0.0
        mine[name] = adamw_step(mine[name], p.grad, states[name], 0.01, decay)
for name, p in named.items():
    assert_close(mine[name], p, rtol=1e-4, atol=1e-6, msg=name)
print(len(named), "tensors equal after five steps of the package")

# %% [markdown]
# ## 3 Muon: every direction at its own scale
#
# A weight matrix turns some directions into others. Write its gradient as
# $U \Sigma V^\top$: a plain gradient step teaches each pair of directions, a
# column of $U$ and one of $V$, in proportion to its singular value. The first
# MLP's `w_up` has 64 of them.
#
# > **Predict.** The squared norm of the gradient is the sum of the squared
# > singular values. What share lies in the five largest: in a fresh model,
# > and after our five steps of AdamW?

# %%
fresh = nanomai.build_model(config.model)
fresh(*batch).backward()
for trained, name in ((model, "after five steps"), (fresh, "fresh")):
    gradient = trained.blocks["0"].mlp.w_up.weight.grad.T  # (64, 192)
    U, before, Vt = torch.linalg.svd(gradient / gradient.norm(),
                                     full_matrices=False)
    share = before[:5].pow(2).sum().item()
    print(f"{name}: the largest 5 of {len(before)} hold {share:.0%}")
    assert share > (0.6 if trained is fresh else 0.95)

# %% [markdown]
# A few directions would learn most, or nearly all. Muon keeps the directions
# and makes all singular values about one, so that each learns as much:
# $U V^\top$, almost. An SVD would do it, slowly. Products alone do it too:
# since $X X^\top X = U \Sigma^3 V^\top$, the polynomial
# $a X + b X X^\top X + c X X^\top X X^\top X$ leaves $U$ and $V$ alone and
# sends each singular value $\sigma$ to $a\sigma + b\sigma^3 + c\sigma^5$.
# Five rounds with $a = 3.4445$, $b = -4.7750$, $c = 2.0315$ are enough.
#
# > **Predict.** These never settle at one, they end between 0.7 and 1.2.
# > With $a = 1.5$, $b = -0.5$, $c = 0$ all would settle at one. Why not take
# > those? Think of a $\sigma$ of 0.002.

# %%
a, b, c = 3.4445, -4.7750, 2.0315


def newton_schulz(g, steps=5):
    x = g / g.norm()  # now no singular value is above one
    for _ in range(steps):
        x = a * x + b * x @ x.T @ x + c * x @ x.T @ x @ x.T @ x
    return x


x = newton_schulz(gradient)
assert_close(x, optim.orthogonalize(gradient[None])[0], rtol=1e-3, atol=1e-4)
after = (U.T @ x @ Vt.T).diagonal()[before > 0.002]  # by direction
print(len(after), "singular values were above 0.002 of the norm;",
      f"now they lie in {after.min():.2f} to {after.max():.2f}")
assert after.min() > 0.68 and after.max() < 1.21

# %%
sigma = torch.logspace(-4, 0, 400)
for steps, color in ((0, "k"), (1, "C0"), (3, "C1"), (5, "C2")):
    y = sigma.clone()
    for _ in range(steps):
        y = a * y + b * y**3 + c * y**5
    plt.semilogx(sigma, y, color=color, label=f"after {steps}")
    x = newton_schulz(gradient, steps)
    measured = (U.T @ x @ Vt.T).diagonal()
    plt.semilogx(before, measured, ".", color=color)
plt.axhspan(0.68, 1.21, color="k", alpha=0.08)
plt.xlim(1e-4, 1.1)
plt.xlabel("singular value of the gradient, as a share of its norm (log)")
plt.ylabel("singular value after the rounds")
plt.legend(title="lines: polynomial\ndots: matrix", loc="center left",
           bbox_to_anchor=(1, 0.5))
plt.show()
assert ((y > 0.68) & (y < 1.21))[sigma > 0.002].all() and y[0] < 0.1
for _ in range(5):
    before = a * before + b * before**3 + c * before**5
assert_close(measured, before, rtol=1e-2, atol=1e-3)

# %% [markdown]
# They would need more rounds: near zero each round multiplies $\sigma$ by
# $a$, and $1.5^5$ is 8, but $3.4445^5$ is 485. Even so, what lies below
# 0.0015 of the norm does not get there. Near one is good enough for a
# direction that is noisy anyway.
#
# The rest of Muon is momentum and a scale. The momentum is a running mean;
# *Nesterov's* look ahead mixes the new gradient in once more. And as
# $U V^\top$ has $\min(m,n)$ singular values of one, the squares of its $mn$
# numbers add up to $\min(m,n)$: their root mean square is
# $1/\sqrt{\max(m,n)}$. Times $0.2 \sqrt{\max(m,n)}$ it is 0.2, about that of
# an AdamW update. So one learning rate serves both.

# %%
p = torch.randn(64, 96, generator=generator, requires_grad=True)
mine, momentum = p.detach().clone(), torch.zeros(64, 96)
muon = optim.Muon([p], momentum=0.95, weight_decay=0.1, lr=0.01)
for g in torch.randn(3, 64, 96, generator=generator):
    momentum = 0.95 * momentum + 0.05 * g
    ahead = 0.95 * momentum + 0.05 * g
    update = 0.2 * math.sqrt(96) * newton_schulz(ahead)
    mine = mine * (1 - 0.01 * 0.1) - 0.01 * update
    p.grad = g
    muon.step()
assert_close(mine, p, rtol=1e-4, atol=1e-5)
rms = update.pow(2).mean().sqrt().item()
print(f"three steps equal; root mean square of an update: {rms:.2f}")
assert 0.15 < rms < 0.22

# %% [markdown]
# ## 4 Schedule and clipping
#
# The first gradients are large and alike, and Adam's $v$ rests on few of
# them: so the rate rises linearly at first (*warmup*). At the end, a small
# rate lets the weights settle where a large one would keep them bouncing.
# *Cosine* falls from the peak on, so it must know the length of the run from
# the start; *warmup-stable-decay* (`wsd`) stays at the peak and decides late.

# %%
def by_hand(schedule, t, steps=200, peak=0.01, warmup=20, low=0.1):
    if t < warmup:
        return peak * (t + 1) / warmup
    if schedule == "cosine":
        done = (t - warmup) / (steps - warmup)
        share = (1 + math.cos(math.pi * done)) / 2  # half a wave, 1 to 0
    else:  # a fifth of the steps for the decay
        share = min(1, (steps - t) / (0.2 * steps))
    return peak * (low + (1 - low) * share)


for schedule in ("cosine", "wsd"):
    rates = [by_hand(schedule, t) for t in range(200)]
    settings = replace(config, **{
        "optim.schedule": schedule, "optim.warmup_steps": 20}).optim
    theirs = [optim.learning_rate(settings, t, 200) for t in range(200)]
    assert_close(rates, theirs)
    plt.plot(range(200), theirs, label=f"{schedule}, the package")
    plt.plot(range(0, 200, 8), rates[::8], "k.", ms=4)
plt.xlabel("optimizer step")
plt.ylabel("learning rate")
plt.legend(title="dots: by hand", loc="lower center")
plt.show()

# %% [markdown]
# Clipping guards against one gradient that is far too long, because of one
# odd batch. *All* gradients together form one vector, and it is shortened as
# a whole. Clipping each number or each matrix by itself would turn it. The
# package's function first divides the gradients, which are sums over tokens,
# by the number of tokens.

# %%
def flat_gradient():
    return torch.cat([p.grad.double().flatten()
                      for p in model.parameters()])


tokens = batch.targets.numel()
for most in (0.1, 100.0, 0.0):  # clips, has nothing to clip, never clips
    model.zero_grad()
    model(*batch, reduction="sum").backward()
    whole = flat_gradient() / tokens
    norm = clip_gradients(model, most, divide_by=tokens)
    expected = whole * min(1, (most or math.inf) / whole.norm().item())
    assert_close(norm.item(), whole.norm().item(), rtol=1e-4, atol=0)
    assert_close(flat_gradient(), expected, rtol=1e-4, atol=1e-9)
each = whole.clamp(-1e-3, 1e-3)
cosine = torch.cosine_similarity(each, whole, dim=0).item()
print(f"clipped number by number, the cosine with the truth is {cosine:.2f}")
assert cosine < 0.9

# %% [markdown]
# ## 5 The loop
#
# Here is everything in its order, in batches of 16 rows of 64 tokens. The
# loss is a *sum* over tokens; `clip_gradients` divides once by the number of
# valid targets. (`forget_at` is for an experiment in section 8.)

# %%
def train_by_hand(config, seed=0, forget_at=None):
    """The loss of each step."""
    model, losses = nanomai.build_model(config.model, seed), []
    optimizers = optim.build_optimizers(model, config.optim)
    steps = config.train.steps
    batches = prepared.loader(64, seed).batches(0, [16] * steps)
    for t, batch in enumerate(batches):
        if t == forget_at:
            optimizers = optim.build_optimizers(model, config.optim)
        valid = (batch.targets != ops.IGNORE).sum().item()
        loss = model(*batch, reduction="sum")
        loss.backward()
        clip_gradients(model, config.optim.grad_clip, valid)
        rate = optim.learning_rate(config.optim, t, steps)
        optim.set_learning_rate(optimizers, rate)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item() / valid)
    return losses

# %% [markdown]
# Now AdamW and Muon at equal steps, from the same three initial models and on
# the same data, both with the rate 0.01. (Seven rates from 0.001 to 0.04 did
# not bring AdamW's last ten losses below 3 on average in any of 21 runs.) A
# line shows what can be had by knowing no more than how often each byte
# occurs.
#
# > **Predict.** By how much does Muon's last loss differ from AdamW's? Is
# > the difference larger than that between seeds?

# %%
curves = {}
for name, color in (("adamw", "C0"), ("muon", "C1")):
    settings = replace(config, **{"optim.name": name})
    curves[name] = torch.tensor(
        [train_by_hand(settings, seed) for seed in range(3)])  # (3, steps)
    for seed, curve in enumerate(curves[name]):
        plt.plot(curve, color, alpha=0.8, label=None if seed else name)
text = torch.tensor(list(Path("lesson.txt").read_bytes()))
share = text.bincount().double() / len(text)
entropy = torch.special.entr(share).sum().item()  # of -p ln p
plt.axhline(math.log(257), color="k", ls=":", label="ln V: knows nothing")
plt.axhline(entropy, color="k", ls="--", label="entropy of the bytes")
plt.xlabel("optimizer step")
plt.ylabel("cross-entropy (nats per byte)")
plt.legend(title="three seeds each", loc="upper right",
           bbox_to_anchor=(1, 0.92))
plt.show()
last = {name: c[:, -10:].mean(1) for name, c in curves.items()}
print("every Muon run ends more than 0.5 below every AdamW run:",
      (last["muon"].max() + 0.5 < last["adamw"].min()).item())
assert last["muon"].max() + 0.3 < last["adamw"].min()

# %% [markdown]
# By more than the seeds differ. Ten steps teach both how often each byte
# occurs. Any further gain must come from context, through the hidden
# matrices, whose lopsided gradient we saw. This is one small model, 60 steps,
# one batch size: a sign, not a law. Nor are equal steps equal work: see
# section 9.
#
# ## 6 The package's loop is ours
#
# `nanomai.train` does the same and more: it logs, evaluates, samples, saves.
# If our understanding is complete, its losses are ours to the last bit. We
# also let it cut each batch of 16 rows into four *micro-batches*, whose
# gradients add up, as one does when a batch does not fit into memory.
#
# > **Predict.** Are the losses with micro-batches also equal to the last bit?

# %%
short = replace(config, **{
    "optim.name": "muon", "train.steps": 12, "train.seed": 0,
    "train.checkpoint_every": 6})


def run(name, **changes):
    changes = {"train.run_dir": str(folder / name),
               "train.micro_batch": 16} | changes
    return nanomai.train(replace(short, **changes), show=False)


unbroken = run("unbroken")
micro = run("micro", **{"train.micro_batch": 4})
ours = train_by_hand(short)
print("ours, to the last bit:", unbroken.losses == ours)
print("in micro-batches, to the last bit:", micro.losses == unbroken.losses)
assert unbroken.losses == ours
assert_close(micro.losses, unbroken.losses, rtol=1e-4, atol=0)

# %% [markdown]
# No: a sum in another order rounds differently, and from then on the two runs
# drift apart by tiny amounts. That is all the difference there is, because
# the division by the token count happens once, at the end (exercise 3).
#
# ## 7 The guard
#
# Once in a while a batch is so odd that its step would spoil the weights. The
# guard keeps running means and variances of $\ln$ loss and $\ln$ gradient
# norm (logarithms, since a spike is a *factor*), and refuses a step that lies
# too many standard deviations above them, or is not a number. Over
# the first 50 accepted steps they are plain means; then older steps fade.
#
# > **Predict.** A loss falls calmly from 5 to 3. One step has three times the
# > usual loss, one a gradient norm of `nan`, and one half the usual loss.
# > Which does a guard with a limit of 8 deviations refuse?

# %%
losses = torch.linspace(5, 3, 50)
losses = losses * torch.exp(0.03 * torch.randn(50, generator=generator))
losses[25] *= 3
losses[45] /= 2
norms = torch.full((50,), 0.5)
norms[35] = math.nan
guard, refused = SpikeGuard(limit=8.0), []
for t, (loss, norm) in enumerate(zip(losses, norms, strict=True)):
    reason = guard.verdict(loss.item(), norm.item())
    if reason:
        refused.append(t)
        print(f"step {t}: {reason}")
assert refused == [25, 35] and guard.skipped == 2
accepted = [t for t in range(50) if t not in refused]
logs = losses[accepted].double().log()
assert_close(guard.loss.mean, logs.mean().item())
assert_close(guard.loss.variance, logs.var(correction=0).item())

# %% [markdown]
# The two bad ones; a pleasant surprise may pass. A refused step leaves
# weights and optimizer as they were, and its numbers do not enter the
# statistics. After several in a row the trainer stops:
# something deeper must be wrong. The first 20 steps
# need only be finite, since there is too little yet to compare them with.
#
# ## 8 Stop, and go on
#
# A long run *will* be interrupted. We take the power away after step 6: a
# copy of the run without its last checkpoint. Then we resume it, and as a
# contrast let our own loop forget the optimizer's state at the same step and
# keep the weights.
#
# > **Predict.** Which of the losses 7 to 12 will be equal to the unbroken
# > ones: when resumed, and when only the weights are kept?

# %%
shutil.copytree(folder / "unbroken", folder / "broken")
shutil.rmtree(folder / "broken" / "checkpoints" / "step-00000012")
resumed = run("broken", **{"train.resume": True})
forgetful = train_by_hand(short, forget_at=6)


def equal_steps(losses):
    pairs = zip(losses, unbroken.losses, strict=True)
    return [t for t, (x, y) in enumerate(pairs, 1) if x == y]


print("resumed equals unbroken at steps   ", *equal_steps(resumed.losses))
print("weights alone equal it at steps    ", *equal_steps(forgetful))
assert equal_steps(resumed.losses) == list(range(1, 13))
assert equal_steps(forgetful) == list(range(1, 8))
weights = [nanomai.load_run(folder / name).model.state_dict()
           for name in ("unbroken", "broken")]
assert all(torch.equal(w, weights[1][name]) for name, w in weights[0].items())
print("final weights equal, bit for bit")
shutil.rmtree(folder, ignore_errors=True)

# %% [markdown]
# All of them when resumed. With the weights alone, step 7 is still right,
# since its loss is measured before its update, and nothing after that. A
# checkpoint therefore holds the weights, the optimizers' state, the number of
# steps and of samples consumed, and the guard's statistics. What is random is a
# function of the seed and the sample, so there is no state of it to keep.
#
# ## 9 At 500B
#
# `mai-1-dense` is our own proposal for a dense model of the size that the
# press reported for MAI-1; how that one was trained has not been published.
# How much must such a run remember? First count on the small model.

# %%
def state_bytes(name):
    """Bytes that the optimizers keep, and bytes of the weights."""
    settings = replace(config, **{"optim.name": name}).optim
    optimizers = optim.build_optimizers(model, settings)
    state = optim.named_state(optimizers, model)
    kept = sum(t.numel() * 4 for key, t in state.items() if t.ndim)
    return kept, 4 * config.model.n_parameters


big = nanomai.load_config("mai-1-dense")
n = big.model.n_parameters
for name in ("adamw", "muon"):
    kept, weights = state_bytes(name)
    print(f"{name:6} keeps {kept / weights:.2f} bytes per byte of weights")
assert state_bytes("adamw")[0] == 2 * state_bytes("adamw")[1]
print(f"at 500B in float32: weights {4 * n / 1e12:.1f} TB,",
      f"AdamW's state {8 * n / 1e12:.1f} TB,\nwith gradients",
      f"{16 * n / 1e12:.1f} TB:", math.ceil(16 * n / 80e9),
      "GPUs of 80 GB only to hold it")

# %% [markdown]
# The batch grows on the way. Early gradients agree with each other, so small
# batches suffice and give more steps; late ones are noisy, and a larger batch
# also keeps more GPUs busy. Llama 3 published such a growth, from 4M tokens
# over 8M to 16M, and `mai-1-dense` follows it.

# %%
train, T = big.train, big.sequence_length
starts = [*train.batch_tokens, train.steps]
tokens = 0
for start, end in itertools.pairwise(starts):
    batch_tokens = optim.piecewise(train.batch_tokens, start)
    tokens += (end - start) * batch_tokens
    print(f"steps {start:7,} to {end:7,}: {batch_tokens >> 20:2}M tokens,",
          f"{batch_tokens // T:5} rows, {tokens / 1e9:8,.1f}B so far")
assert tokens == sum(optim.piecewise(train.batch_tokens, t)
                     for t in range(train.steps))
flops = tokens * big.model.flops_per_token(T)
days = flops / (10_000 * 989.4e12 * 0.4) / 86400
print(f"{tokens / n:.0f} tokens a parameter, {flops:.2e} FLOPs:",
      f"{days:.0f} days on 10,000 H100 at 40 %")
assert 1 < flops / (6 * n * tokens) < 1.05  # 6 a parameter, and attention

# %% [markdown]
# The 40 % are an assumption, and a good value; 989.4 TFLOP/s is the peak of
# an H100 in bfloat16.
#
# > **Predict.** What share of the arithmetic would Muon's iterations add at
# > this size, with the smallest batch: a third, a tenth, a sixtieth?

# %%
def muon_share(config, batch_tokens):
    """FLOPs of five iterations on all hidden matrices / FLOPs of a step."""
    with torch.device("meta"):
        model = nanomai.build_model(config.model)
    extra = 0
    for name, p in model.named_parameters():
        if optim.is_hidden_matrix(name, p):
            m, k = sorted(p.shape)
            extra += 5 * (4 * m * m * k + 2 * m**3)
    per_token = config.model.flops_per_token(config.sequence_length)
    return extra / (batch_tokens * per_token)


smallest = optim.piecewise(train.batch_tokens, 0)
here, there = muon_share(config, 16 * 64), muon_share(big, smallest)
print(f"our runs above: {here:.0%},  at 500B with {smallest >> 20}M tokens:",
      f"{there:.1%}")
assert 0.01 < there < 0.03 < here

# %% [markdown]
# About a sixtieth, and less as the batch grows: the iteration's price depends
# on the matrices, the rest on the batch as well, and the batch is large. Its
# real price there is that it needs each matrix as a whole, while AdamW works
# on any slice of it.
#
# ## Exercises
#
# **1. Bias correction.** Return the corrected running mean after each of
# `values`, where `betas[t]` is the $\beta$ of that step: it may change on the
# way. Then $1 - \beta^t$ is not what the weights add up to. What is?

# %%
def running_means(values, betas):
    raise NotImplementedError


exercises.check_running_means(running_means)

# %% [markdown]
# <details><summary>Hint</summary>
#
# $m_t = \beta_t m_{t-1} + (1 - \beta_t) x_t$ is a weighted sum of the values
# so far. Feed it a sequence of ones: what comes out is the sum of weights.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# def running_means(values, betas):
#     mean, weight, out = 0.0, 0.0, []
#     for value, beta in zip(values, betas):
#         mean = beta * mean + (1 - beta) * value
#         weight = beta * weight + (1 - beta)
#         out.append(mean / weight)
#     return out
# ```
# With a constant $\beta$, `weight` is $1 - \beta^t$; in general it is one
# minus the product of all betas.
# </details>
#
# **2. Decoupled decay.** `adam(p)` does an Adam step on `p` in place, without
# decay. Make an AdamW step of it, at learning rate `lr`: change `p` in place,
# with the package's rule about who decays. Names are like
# `blocks.0.mlp.w_up.weight`, `embed.weight`, `head.weight`, `norm.weight`.

# %%
def decayed_step(name, p, lr, weight_decay, adam):
    raise NotImplementedError


exercises.check_decayed_step(decayed_step)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Adding `weight_decay * p` to the gradient would be the old way: Adam then
# divides it by $\sqrt v$ as well, so weights with large gradients decay less.
# Here the weight that came in shrinks by a factor of its own. `adamw_step`
# above shows where, and `optim.is_decayed` whom.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# def decayed_step(name, p, lr, weight_decay, adam):
#     matrix = p.ndim == 2 and name.startswith(("blocks.", "head."))
#     if matrix:
#         p.mul_(1 - lr * weight_decay)
#     adam(p)
# ```
# Adam's own step does not read `p`, so shrinking first does not change it.
# Shrinking afterwards would shrink the step as well.
# </details>
#
# **3. Accumulate == big batch.** `micro_batches` is a list of `(ids,
# targets)`, and some targets are -100. Leave in the model's `.grad` the
# gradient of the *mean over all valid tokens*, as one big batch would. They
# are `None` when you begin.

# %%
def accumulate(model, micro_batches):
    raise NotImplementedError


exercises.check_accumulate(accumulate)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `model(ids, targets, reduction="sum")` gives a sum, and sums can be added.
# What must you know before you divide, and how often do you divide?
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# def accumulate(model, micro_batches):
#     valid = sum((t != -100).sum().item() for _, t in micro_batches)
#     for ids, targets in micro_batches:
#         loss = model(ids, targets, reduction="sum")
#         (loss / valid).backward()
# ```
# A mean of the means would give the tokens of a nearly empty micro-batch more
# weight than the others, and one without valid targets would give `nan`.
# </details>
#
# ## Recap
#
# - AdamW steps by a ratio of two corrected means, number by number; Muon makes
#   all singular values of a matrix's update about equal.
# - Sums over tokens, divided once: then micro-batches change only rounding.
# - A run that survives needs a guard before the weights and a checkpoint of
#   *everything* that the next step reads.
#
# **What real systems do differently.** They shard weights, gradients and
# state over all GPUs (`13_data_parallel_fsdp`), keep the state in fewer bits,
# write checkpoints in the background, compute in bfloat16 over float32
# weights (`10_mixed_precision`), and watch the spikes that a guard does not
# catch.
#
# **Read on.** [`nanomai/optim.py`](../nanomai/optim.py),
# [`nanomai/trainer.py`](../nanomai/trainer.py) (`Trainer.step`),
# [`nanomai/guard.py`](../nanomai/guard.py) and
# [`nanomai/checkpoint.py`](../nanomai/checkpoint.py). Adam
# [1412.6980](https://arxiv.org/abs/1412.6980), AdamW
# [1711.05101](https://arxiv.org/abs/1711.05101), Muon at scale
# [2502.16982](https://arxiv.org/abs/2502.16982), warmup-stable-decay
# [2404.06395](https://arxiv.org/abs/2404.06395), Llama 3 and its batches
# [2407.21783](https://arxiv.org/abs/2407.21783).
#
# **Next:** `07_sampling_kv_cache` lets the model write.
