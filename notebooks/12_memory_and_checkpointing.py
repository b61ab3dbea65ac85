# %% [markdown]
# # 12 · What must a training step keep in memory, and a run on disk?
#
# **Goal.** Find the owner of every byte that a training step holds. Trade
# activations for arithmetic, and see what that costs. Then write what a run
# must not forget so that no kill, at any moment, can spoil it.
#
# **Prerequisites.** `05_block_and_model`, `06_training`; what a file's
# checksum is. **Time.** About 60 minutes; it runs in under a minute.
#
# **You will be able to**
# - count weights, gradients, moments and activations, to the byte;
# - say which tensors autograd keeps for a block, and why;
# - recompute blocks, and choose how many to recompute together;
# - tell a checkpoint that survives from one that does not.

# %%
import json
import math
import shutil
import tempfile
import weakref
from dataclasses import replace
from pathlib import Path
from unittest import mock

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import nanomai
from nanomai import checkpoint, ops, optim
from nanomai.config import ModelConfig, OptimConfig
from nanomai.exercises import memory as exercises
from nanomai.parallel.recompute import recompute
from nanomai.planner import counts
from nanomai.show import lesson

lesson()
generator = torch.Generator().manual_seed(12)

# %% [markdown]
# ## 1 Three owners that do not depend on the batch
#
# A parameter is a float32 number: 4 bytes. Its gradient is another one, and
# AdamW keeps two running means, its *moments*. We count the tensors of a real
# step, and ask the planner, which builds nothing and knows only formulas.
#
# > **Predict.** How many bytes for each parameter?

# %%
config = ModelConfig(n_layers=6, d_model=128, n_heads=4, n_kv_heads=2,
                     head_dim=32, d_ff=344, vocab_size=256,
                     context_length=1024, norm="layernorm",
                     tied_embeddings=False)
model = nanomai.build_model(config)
(adamw,) = optim.build_optimizers(model, OptimConfig())
ids = torch.randint(256, (1, 64), generator=generator)
model(ids, ids).backward()
adamw.step()

# %%
N, parameters = config.n_parameters, list(model.parameters())
owners = {"weights": parameters, "gradients": [p.grad for p in parameters],
          "moments": [state[m] for state in adamw.state.values()
                      for m in ("exp_avg", "exp_avg_sq")]}
sizes = {name: sum(t.nbytes for t in each) for name, each in owners.items()}
print(N, "parameters:", {n: size / N for n, size in sizes.items()}, "bytes")
assert sum(sizes.values()) == 16 * N
alone = exercises.ALONE  # one process
planned = counts.memory_of(nanomai.Config(model=config), alone, 1, 1, 0)
assert planned["weights"] == sizes["weights"]
assert planned["optimizer"] == sizes["moments"]

# %% [markdown]
# Sixteen. (With bfloat16 weights and gradients beside float32 copies of the
# weights it is 2 + 2 + 4 + 8: sixteen again.)
#
# ## 2 The fourth owner: what autograd keeps
#
# The backward pass needs numbers of the forward pass: the gradient of
# $y = x W^\top$ with respect to $W$ needs $x$, and that with respect to $x$
# needs $W$. While `saved_tensors_hooks` is active, PyTorch shows a function of
# ours each tensor that is kept. A tensor may be kept twice, or be a view of
# another, so we count *storages*, each once, and leave out those that exist
# anyway.
#
# > **Predict.** Which of these keep nothing: a sum of two tensors, a product
# > by a weight, a SiLU, an elementwise product, a softmax?

# %%
def kept(function, known=()):
    """The storages that autograd keeps while `function()` runs"""
    seen, old = {}, {t.untyped_storage().data_ptr() for t in known}

    def pack(t):
        seen[t.untyped_storage().data_ptr()] = t.untyped_storage()
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        function()
    return [storage for place, storage in seen.items() if place not in old]


a, b, w = (torch.randn(8, 8, requires_grad=True) for _ in range(3))
cases = {"a + b": lambda: a + b, "a @ w.T": lambda: F.linear(a, w),
         "silu(a)": lambda: F.silu(a), "a * b": lambda: a * b,
         "softmax(a)": lambda: a.softmax(-1)}
numbers = {name: len(kept(f)) for name, f in cases.items()}
print("tensors kept:", *(f"{f}: {n} " for f, n in numbers.items()))
assert numbers["a + b"] == 0 and numbers["a * b"] == 2

# %% [markdown]
# Only the sum: its gradient does not depend on the numbers. A residual
# connection by itself keeps nothing.
#
# Now a whole block. By hand, in numbers for each token, with the letters of
# the package ($D$ is the width, $F$ the MLP's; there are $H$ heads of queries
# and $G$ of keys, of $K$ numbers each):
#
# | kept | numbers | for |
# |---|---|---|
# | inputs of two norms | $2D$ | the norms |
# | their results | $2D$ | the products with $W_q, W_k, W_v$; gate and up |
# | queries and keys, turned by RoPE; values | $HK + 2GK$ | attention |
# | its result, and a log-sum-exp | $HK + H$ | attention |
# | its result with heads in a row | $HK$ | the product with $W_o$ |
# | gate, silu(gate), up, their product | $4F$ | SwiGLU, and down |
# | mean and deviation of two norms | $4$ | LayerNorm |
#
# `counts.kept_bytes` is the planner's formula.

# %%
def block_keeps(T):
    """Bytes a token that one block keeps of a text of T tokens"""
    x = torch.randn(1, T, 128, requires_grad=True)
    rotary = ops.rotary_table(torch.arange(T), 32, config.rope_theta)
    known = [*model.parameters(), *rotary]  # tables serve all layers
    tensors = kept(lambda: model.blocks["0"](x, rotary, None), known)
    return sum(storage.nbytes() for storage in tensors) / T


D, H, G, K, Ff = 128, 4, 2, 32, 344
by_hand = 4 * (2 * D + 2 * D + (H * K + 2 * G * K) + (H * K + H) + H * K
               + 4 * Ff + 4)
planner = counts.kept_bytes(config, False, alone, "none", width=4)
print(f"bytes a token: measured {block_keeps(1024):.0f}, by hand {by_hand},",
      f"planner {planner:.0f}")
assert block_keeps(1024) == by_hand == planner + 16

# %% [markdown]
# To the byte, except that the planner leaves out LayerNorm's 16 bytes of
# statistics. (With RMSNorm it would be off by more: the CPU has no fused one
# and keeps its normalised input as well, which a GPU does not.) Not in the
# number: rotary tables, which all layers share; in bfloat16, the casts of
# weights, which the planner counts apart, as `gathered`; temporaries within an
# operation, which no hook sees. And the planner speaks of *flash* attention.
# For short texts on a CPU the package takes the plain formula, whose
# $T \times T$ probabilities are kept:
#
# > **Predict.** How do the bytes *per token* grow with $T$ then?

# %%
for T in (128, 256, 512, 1024):
    extra = block_keeps(T) - by_hand
    print(f"T = {T:4}: {extra:5.0f} bytes a token too many")
    assert extra == ((4 * H + 1) * T - 16 if T <= 512 else 0)

# %% [markdown]
# Linearly: a token keeps a probability for each position and head, $4HT$
# bytes, and a byte of the mask for each position. Above 512 tokens the CPU
# takes a flash kernel as well, which keeps one number for each query and head
# instead (notebook 04).
#
# Over the whole model: each layer adds the same, and what is kept outside the
# blocks stays. We draw all four owners for batches of one to four sequences.

# %%
def step_keeps(n, config=config, T=1024):
    """Bytes kept by a forward pass over n sequences"""
    model = nanomai.build_model(config)
    ids = torch.randint(256, (n, T), generator=generator)
    known = [*model.parameters(), ids]
    return sum(storage.nbytes() for storage in kept(
        lambda: model(ids, ids), known))


tokens = [1024, 2048, 4096]
activations = [step_keeps(n // 1024) for n in tokens]
theory = [n * 6 * by_hand for n in tokens]
rest = [x - y for x, y in zip(activations, theory, strict=True)]
print(f"outside the blocks: {rest[0] / activations[0]:.1%} of them")
assert rest[0] == step_keeps(1, replace(config, n_layers=1)) - 1024 * by_hand
assert max(rest) < 0.025 * activations[-1]

# %%
bottom, MiB = [0.0] * 3, 2**20
for name, size in (*sizes.items(), ("activations", activations)):
    each = [x / MiB for x in (size if name == "activations" else [size] * 3)]
    plt.bar(range(3), each, 0.6, label=name, bottom=bottom)
    bottom = [x + y for x, y in zip(bottom, each, strict=True)]
marks = [(16 * N + x) / MiB for x in theory]
plt.hlines(marks, [-0.4, 0.6, 1.6], [0.4, 1.4, 2.4], "k", "--",
           label="16 N + tokens x layers x by hand")
assert all(0.97 < x / y < 1 for x, y in zip(marks, bottom, strict=True))
plt.xticks(range(3), [f"{n:,} tokens" for n in tokens])
plt.ylabel("memory (MiB)")
plt.legend(loc="upper left")
plt.show()

# %% [markdown]
# What is outside is a last norm, rotary tables, and, in place of logits, the
# gradient that the fused loss has already computed (notebook 11c). The
# activations soon are all that matters, and they alone grow with batch and
# length.
#
# ## 3 Recompute
#
# What can be computed again need not be kept. *Full* recomputation keeps the
# input of each block alone; when the backward pass reaches a block it runs
# its forward once more, now keeping everything, and then its backward.
# *Selective* recomputation keeps the results of the expensive operations,
# matrix products and attention, and computes again what is cheap: norms,
# rotations, SwiGLU. We do the first by hand, and count FLOPs.
#
# > **Predict.** A forward pass is a third of a step's arithmetic. How much
# > more does each way compute?

# %%
def by_hand_step(model, ids):
    """Gradients of the loss, each block run twice"""
    x, blocks = model.embed(ids), model.blocks.values()
    rotary = ops.rotary_table(torch.arange(ids.shape[1]), 32,
                              config.rope_theta)
    inputs = [x.detach()]
    with torch.no_grad():
        for block in blocks:
            inputs.append(block(inputs[-1], rotary, None))
    top = inputs.pop().requires_grad_()
    hidden = model.norm(top).flatten(0, 1)
    model.loss(hidden, model.head.weight, ids.flatten()).backward()
    d = top.grad
    for block, h in zip(reversed(blocks), reversed(inputs), strict=True):
        h.requires_grad_()
        block(h, rotary, None).backward(d)  # once more, and back
        d = h.grad
    x.backward(d)
    return {n: p.grad for n, p in model.named_parameters()}

# %%
def package_step(what, ids):
    model = nanomai.build_model(config)
    recompute(model, what)
    with FlopCounterMode(display=False) as counter:
        model(ids, ids, reduction="sum").backward()
    gradients = {n: p.grad for n, p in model.named_parameters()}
    return gradients, counter.get_total_flops()


ids = torch.randint(256, (1, 640), generator=generator)
short = ids[:, :256]  # PyTorch does not count the CPU's flash kernel
(true, _), (_, least) = package_step("none", ids), package_step("none", short)
ours = by_hand_step(nanomai.build_model(config), ids)
assert_close(ours, true, rtol=1e-4, atol=1e-5)
for what, low, high in (("selective", 1, 1), ("full", 1.2, 4 / 3)):
    assert_close(package_step(what, ids)[0], true, rtol=1e-4, atol=1e-5)
    more = package_step(what, short)[1] / least
    print(f"{what}: all {len(true)} gradients equal, {more:.2f} x the FLOPs")
    assert low <= more <= high

# %% [markdown]
# Less than a third: the last product of a block need not be done again, since
# no gradient asks for its result, nor need the head's. Selective repeats no
# product at all. (In the paper that coined the word only the $T \times T$
# matrices of attention are computed again; a flash kernel does that anyway.)
#
# How much does each way keep? What selective keeps does not pass the hooks. So
# we watch *every* storage, wherever it comes from, and ask after each
# operation how many bytes are alive.
#
# > **Predict.** Sketch the memory over one step, forward and backward, for
# > all three ways. Where is each peak?

# %%
def storages(tree):
    return {t.untyped_storage()._cdata: t.untyped_storage()
            for t in tree_leaves(tree) if torch.is_tensor(t)}


class Meter(TorchDispatchMode):
    """Bytes that were made inside and are alive, after each operation"""

    def __init__(self):
        super().__init__()
        self.line, self.alive = [0], weakref.WeakValueDictionary()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        y = op(*args, **(kwargs or {}))
        given = storages((args, kwargs))  # a view of these is not new
        self.alive.update({key: storage for key, storage
                           in storages(y).items() if key not in given})
        self.line.append(sum(s.nbytes() for s in self.alive.values()))
        return y

# %%
def watch(what, n_layers):
    """Bytes kept between forward and backward, and alive at each moment"""
    model = nanomai.build_model(replace(config, n_layers=n_layers))
    recompute(model, what)
    ids = torch.randint(256, (1, 1024), generator=generator)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)  # there before: not counted
    with Meter() as meter:
        loss = model(ids, ids)
        between = sum(s.nbytes() for s in meter.alive.values())
        loss.backward()
    return between, meter.line

# %%
peaks = {}
for what in ("none", "selective", "full"):
    (small, _), (large, line) = watch(what, 5), watch(what, 6)
    planner = counts.kept_bytes(config, False, alone, what, width=4)
    statistics = 16 * (what == "none")  # recomputed, or never counted
    assert (large - small) / 1024 == planner + statistics
    print(f"{what}: a layer keeps {planner + statistics:.0f} bytes a token")
    plt.plot(torch.linspace(0, 1, len(line)), [x / MiB for x in line],
             label=what)
    peaks[what] = max(line)
plt.axhline(theory[0] / MiB, color="k", ls="--", label="6 layers, all kept")
plt.xlabel("progress of the step (share of its operations)")
plt.ylabel("memory beyond 16 N (MiB)")
plt.ylim(0, 75)
plt.legend(title="recompute", ncol=4, loc="upper center")
plt.show()
assert peaks["full"] < peaks["selective"] < peaks["none"]
assert peaks["full"] < 0.4 * peaks["none"]

# %% [markdown]
# To the byte again, all three. `none` peaks between the passes. `full` climbs
# gently, and then has a tooth for each block of the backward pass, as high as
# one block's activations and their gradients. With 6 layers that tooth is most
# of its peak; with 100 the inputs of the blocks would be.
#
# Break it. Running twice must give the same twice. A block that draws random
# numbers, as dropout does, draws others the second time, and then the
# gradient is that of another function. `torch.utils.checkpoint` puts the
# generator back. We forget to.

# %%
def gradient(twice, restore=True):
    """Of a sum of noisy numbers, w.r.t. w, run once or twice"""
    def noisy():
        return torch.tanh(F.dropout(a, 0.3) @ w).sum()

    torch.manual_seed(0)
    state = torch.get_rng_state()
    if twice:
        noisy()
    if restore:
        torch.set_rng_state(state)
    return torch.autograd.grad(noisy(), w)[0]


assert_close(gradient(twice=True), gradient(twice=False))
try:
    assert_close(gradient(twice=True, restore=False), gradient(twice=False))
except AssertionError as error:
    print("another mask the second time:", type(error).__name__)

# %% [markdown]
# ## 4 The square root of the depth
#
# One may recompute several layers at once. Cut $L$ layers into $k$ segments
# and keep the $k$ inputs. During the backward pass one segment's layers are
# there as well: $k + a L / k$ inputs' worth, if a layer keeps $a$ times its
# input. That is least at $k = \sqrt{aL}$.
#
# > **Predict.** 36 equal layers with $a = 1$. Which of $k = 1, 6, 36$ needs
# > most, which least? What does it cost in arithmetic to go from 36 to 6?

# %%
def segmented_peak(k, L=36):
    """Peak, in inputs, of L layers y = tanh(x) in k segments"""
    def segment(x):
        for _ in range(L // k):
            x = torch.tanh(x)  # keeps its result, for 1 - y^2
        return x

    inputs = [torch.randn(256, 256, generator=generator)]
    with Meter() as meter:
        with torch.no_grad():
            for _ in range(k):
                inputs.append(segment(inputs[-1]))
        d = torch.ones_like(inputs.pop())
        while inputs:
            h = inputs.pop().requires_grad_()
            (d,) = torch.autograd.grad(segment(h), h, d)
    return max(meter.line) / d.nbytes

# %%
ks, line = [1, 2, 3, 4, 6, 9, 12, 18, 36], torch.linspace(1, 36, 200)
measured = [segmented_peak(k) for k in ks]
plt.plot(line, line + 36 / line, "k--", label="k + L / k")
plt.plot(ks, measured, "o", label="measured")
plt.axvline(math.sqrt(36), color="C1", ls=":", label="sqrt(L)")
plt.ylim(0)
plt.xlabel("segments k of 36 layers")
plt.ylabel("peak (inputs of a layer)")
plt.legend()
plt.show()
print("inputs at k = 1, 6, 36:", *(f"{measured[i]:.0f}" for i in (0, 4, 8)))
assert min(measured) == measured[4]
for k, peak in zip(ks, measured, strict=True):
    assert 0 <= peak - (k + 36 / k) <= 3

# %% [markdown]
# Both ends are bad, and the middle costs no more arithmetic than the right
# end: every layer runs twice, whatever $k$. A little more than the theory is
# measured, for the gradient that travels. A Transformer's block keeps about
# 20 times its input, so its $\sqrt{aL}$ is a good part of $L$; one segment
# for each block, as the package cuts, is simple and not far from the best
# (exercise 1: with 120 blocks it needs a third more).
#
# ## 5 What a run must not forget
#
# Memory is lost when a process dies, and of thousands of GPUs some fail every
# day: Llama 3's largest run reports 419 unexpected interruptions in 54 days
# ([2407.21783](https://arxiv.org/abs/2407.21783)). So a run writes
# *checkpoints*: weights, moments, and its place in the data. The plainest way
# is to overwrite a file.
#
# > **Predict.** The process is killed between the first file and the second.
# > What does loading say?

# %%
folder = Path(tempfile.mkdtemp())


def naive_save(step, *names):
    for name in names:  # in place
        torch.save(torch.tensor(step), folder / name)


naive_save(1, "weights.pt", "moments.pt")
naive_save(2, "weights.pt")  # killed here
steps = [torch.load(folder / name).item() for name in
         ("weights.pt", "moments.pt")]
print("loads: weights of step {}, moments of step {}".format(*steps))
assert steps == [2, 1]
whole = (folder / "weights.pt").read_bytes()
(folder / "weights.pt").write_bytes(whole[: len(whole) // 2])
try:
    torch.load(folder / "weights.pt")
except RuntimeError as error:
    print("half a file:", type(error).__name__, "and the one before is gone")

# %% [markdown]
# In the worse case nothing: it loads, and is a mixture of two models. Three
# rules help. Never overwrite: each checkpoint is a folder of its own. Write
# under another name and *rename* when all is done; a rename happens or does
# not. And say in a *manifest*, written last, what must be there: names, sizes
# and checksums. `nanomai/checkpoint.py` does so.
#
# What is saved must also be enough: a run that goes on from the file of step 2
# must be the run that was never broken, to the bit.

# %%
def tensors_of(model, adamw):
    state = optim.named_state([adamw], model)
    return {**model.state_dict(),
            **{f"optimizer/{name}": t for name, t in state.items()}}


def train_step(model, adamw, step):
    g = torch.Generator().manual_seed(step)
    ids = torch.randint(256, (1, 64), generator=g)
    optim.set_learning_rate([adamw], 0.01)
    adamw.zero_grad()
    model(ids, ids).backward()
    adamw.step()

# %%
folder = Path(tempfile.mkdtemp())
for step in (1, 2):
    train_step(model, adamw, step)
    path = checkpoint.save(folder, step, tensors_of(model, adamw),
                           {"step": step})
print(*sorted(p.name for p in folder.iterdir()))
manifest = json.loads((path / "manifest.json").read_text())["files"]
for name, entry in manifest.items():
    print(f"{name:14}", sorted(entry))
stored = sum(entry["bytes"] for entry in manifest.values())
print(f"{stored / N:.0f} bytes a parameter: weights and two moments")
assert 12 < stored / N < 12.5

# %%
train_step(model, adamw, 3)  # unbroken
again = nanomai.build_model(config, seed=99)
(other,) = optim.build_optimizers(again, OptimConfig())
checkpoint.load(path, tensors_of(again, other))
train_step(again, other, checkpoint.read_state(path)["step"] + 1)
for name, tensor in tensors_of(model, adamw).items():
    assert torch.equal(tensor, tensors_of(again, other)[name]), name
print("step 3 from the file of step 2:", len(tensors_of(again, other)),
      "tensors equal to the bit")

# %% [markdown]
# Gradients are not in it: the next step makes new ones. There is no file that
# says which checkpoint is the newest, either, since such a file could be torn
# or lie. `newest` takes the last folder whose every file matches its
# manifest, and names those that it passes over.
#
# > **Predict.** We hurt the checkpoint of step 2 in four ways. Which would
# > go unnoticed without checksums?

# %%
def flip(data):
    data[len(data) // 2] ^= 1  # one bit
    return data


hurts = {"it is truncated": ("__0_0.distcp", lambda data: data[:-9]),
         "does not match its checksum": ("__0_0.distcp", flip),
         "state.json is missing": ("state.json", None),
         "the checkpoint is incomplete": ("manifest.json", None)}
for reason, (name, change) in hurts.items():
    copy = shutil.copytree(folder, Path(tempfile.mkdtemp()) / "copy")
    assert checkpoint.newest(copy) == (copy / path.name, [])
    file = copy / path.name / name
    if change:
        file.write_bytes(change(bytearray(file.read_bytes())))
    else:
        file.unlink()
    found, complaints = checkpoint.newest(copy)
    assert found == copy / "step-00000001" and len(complaints) == 1
    assert path.name in complaints[0] and reason in complaints[0]
    print(f"{path.name}: {reason}; used: {found.name}")

# %% [markdown]
# The flipped bit. All four are named, and step 1 is used. Now kills: we stop
# the real code at four moments of writing step 3, as if the machine had died
# there.

# %%
kill = KeyboardInterrupt
moments = {"the tensors": (checkpoint.dcp, "save", [kill]),
           "state and manifest": (checkpoint, "write_atomically", [kill]),
           "the rename": (checkpoint, "flush_folder", [kill]),
           "the pruning": (checkpoint, "flush_folder", [None, kill])}
for name, (where, what, calls) in moments.items():
    copy = shutil.copytree(folder, Path(tempfile.mkdtemp()) / "copy")
    with mock.patch.object(where, what, side_effect=calls):
        try:
            checkpoint.save(copy, 3, tensors_of(model, adamw), {"step": 3})
        except KeyboardInterrupt:
            left = len(list(copy.glob(".writing-*/*")))
    found, complaints = checkpoint.newest(copy)
    print(f"killed before {name}: {left} files lie there,",
          "used:", found.name)
    assert found.name[-1] == ("3" if name == "the pruning" else "2")
    checkpoint.save(copy, 4, tensors_of(model, adamw), {"step": 4})
    assert complaints == []
    assert sorted(p.name[-1] for p in copy.iterdir()) == [found.name[-1], "4"]

# %% [markdown]
# At each moment a whole one is there, and nothing half done is taken for one;
# the next save clears it away. The oldest is removed last of all, once the
# new one is in place. (Before the rename everything is flushed to the disk,
# so that a power cut cannot undo the order.)
#
# ## 6 At 500B
#
# `mai-1-dense` is this project's own proposal of a dense model of the size
# that was reported for MAI-1; nothing of its architecture was. What do the
# activations of *one* sequence of 8,192 tokens weigh, in bfloat16, all blocks
# together, and what does a checkpoint?
#
# > **Predict.** Which of the three ways fits into 80 GB?

# %%
big = nanomai.load_config("mai-1-dense")
L, T, ways = big.model.n_layers, big.sequence_length, [*peaks]
held = [L * T * counts.kept_bytes(big.model, False, alone, what) / 1e9
        for what in ways]
again = [(held[0] - x) / L for x in held]
plt.bar(ways, held, 0.6, label=f"kept by {L} blocks")
plt.bar(ways, again, 0.6, bottom=held, label="made again in one block")
plt.axhline(80, color="k", ls="--", label="80 GB")
plt.ylabel("activations of one sequence (GB)")
plt.legend()
plt.show()
total = [x + y for x, y in zip(held, again, strict=True)]
print(*(f"{x}: {size:,.0f} GB " for x, size in zip(ways, total, strict=True)))
assert held[2] == 2 * L * T * big.model.d_model / 1e9
assert total[2] < 80 < total[1]
size = 12 * big.model.n_parameters  # weights and two moments, float32
print(f"a checkpoint: {size / 1e12:.1f} TB, {size / 1024 / 1e9:.1f} GB",
      "from each of 1,024 ranks")
assert 5e12 < size < 7e12

# %% [markdown]
# Only full recomputation, and that of one sequence on a GPU that holds
# nothing else. (The proposal cuts each block over 8 GPUs and the depth over
# 8 more, so a GPU sees an eighth of each of 15 blocks, several sequences at a
# time: notebook 14.) A checkpoint of 6 TB is no file for one writer: each
# rank writes what it holds, from a copy in the CPU's memory while training
# goes on.
#
# ## Exercises
#
# **1. The best number of segments.** `n_layers` layers are cut into `k`
# segments as evenly as can be; the longest has $\lceil L / k \rceil$ layers.
# A layer keeps `kept` times a segment's input. Return a `k` for which the
# inputs of all segments and all of the longest one together are least.

# %%
def best_segments(n_layers, kept):
    raise NotImplementedError


exercises.check_best_segments(best_segments)

# %% [markdown]
# <details><summary>Hint</summary>
#
# $\sqrt{aL}$ is where the derivative vanishes, but $k$ is whole, and so is
# $\lceil L / k \rceil$. There are only $L$ candidates.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# def best_segments(n_layers, kept):
#     def peak(k):
#         return k + kept * math.ceil(n_layers / k)
#
#     return min(range(1, n_layers + 1), key=peak)
# ```
# For 120 layers that keep 22.5 inputs each it is 60 segments of two: 105
# inputs instead of the 142.5 of one segment for each layer.
# </details>
#
# **2. The largest batch.** `memory` bytes hold a whole model in float32
# (weights, gradients, moments) and activations in bfloat16. Return how many
# sequences of `model.context_length` fit in one micro-batch, with `recompute`
# none, selective or full. Beside what all blocks keep, count what one block
# makes again. `counts.kept_bytes(model, False, alone, recompute)` is per
# token and block. How many of GPT-2's (`gpt2-124m`) fit into 80 GB?

# %%
def largest_batch(model, recompute, memory):
    raise NotImplementedError


exercises.check_largest_batch(largest_batch)

# %% [markdown]
# <details><summary>Hint</summary>
#
# What one block makes again is what `none` would keep, less what is kept.
# Subtract the states first, then divide, and round down. A model that does
# not fit at all leaves room for no sequence, and for no negative number of
# them.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# def largest_batch(model, recompute, memory):
#     kept = counts.kept_bytes(model, False, alone, recompute)
#     again = counts.kept_bytes(model, False, alone, "none") - kept
#     token = model.n_layers * kept + again
#     left = memory - 16 * model.n_parameters
#     return max(0, int(left // (token * model.context_length)))
# ```
# Of GPT-2's sequences 242, 358 or 1,769 fit. The loss, casts of weights and
# the allocator's losses are left out; `nanomai plan` counts the first two and
# leaves room for the third.
# </details>
#
# **3. Moments of 8 bits.** Store each moment in one byte a number, with a
# float32 scale for every 256 numbers of a tensor (the last block may be
# shorter). Tensors of fewer than 4,096 numbers stay as they are. Return how
# many bytes AdamW then saves on tensors of these `shapes`.

# %%
def bytes_saved(shapes):
    raise NotImplementedError


exercises.check_bytes_saved(bytes_saved)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Two moments, 4 bytes each, become two of one byte and a scale per block.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# def bytes_saved(shapes):
#     saved = 0
#     for shape in shapes:
#         n = math.prod(shape)
#         if n >= 4096:
#             saved += 2 * (4 * n - n - 4 * math.ceil(n / 256))
#     return saved
# ```
# Nearly 6 of the 16 bytes a parameter. That helps one GPU; where 1,024 share
# the state it is a fraction of what they hold (notebook 13).
# </details>
#
# ## Recap
#
# - 16 bytes a parameter whatever the batch, and activations that grow with
#   it: autograd keeps what its formulas read, and nothing else.
# - Recomputation spares all but a block's input, for a third more arithmetic
#   at most; the gradients are the same if the second run is.
# - A checkpoint is written beside, checked, and renamed: at each moment there
#   is a whole one, and a torn one is known by its manifest.
#
# **What real systems do differently.** They compile blocks, so that fewer
# tensors are kept (`train.compile`: the package can, too); move activations
# to the CPU's memory and back; keep some of them in 8 bits; choose what to recompute by solving for the fastest plan
# that fits; keep copies of checkpoints in the memory of other machines.
#
# **Read on.** [`nanomai/parallel/recompute.py`](../nanomai/parallel/recompute.py),
# [`nanomai/checkpoint.py`](../nanomai/checkpoint.py),
# [`nanomai/planner/counts.py`](../nanomai/planner/counts.py). Sublinear memory
# [1604.06174](https://arxiv.org/abs/1604.06174), selective recomputation
# [2205.05198](https://arxiv.org/abs/2205.05198), 8-bit optimizers
# [2110.02861](https://arxiv.org/abs/2110.02861).
#
# **Next:** `13_data_parallel_to_fsdp` shares these bytes among many
# processes.
