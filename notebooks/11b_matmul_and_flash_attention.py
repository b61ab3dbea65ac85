# %% [markdown]
# # 11b · How few bytes does a matrix product need, and how few does attention?
#
# **Goal.** Write a matrix product and flash attention in tiles, count every
# byte that they move, compile them for a GPU that is not here, and find the
# very kernels of the package.
#
# **Prerequisites.** `11a_first_kernels` (programs, masks, the lens) and
# `04_rope_gqa_flash` (online softmax, the backward pass of attention).
# **Time.** About 75 minutes; it runs in half a minute, without a GPU.
# Triton exists for **Linux on x86-64** only; elsewhere, read the outputs.
#
# **You will be able to**
# - say how many bytes a tile saves, and how large it may be;
# - order programs so that neighbours share what they read;
# - see in machine code whether a product runs on tensor cores, or spills;
# - read a flash attention kernel, and say which tiles a mask lets it skip.

# %%
import re

import matplotlib.pyplot as plt
import torch
import triton
import triton.language as tl
from torch.testing import assert_close

import nanomai
from nanomai import ops
from nanomai.show import lesson
from triton_kernels import aot, flash_tiles
from triton_kernels.engine import Kernel
from triton_kernels.lens import OutOfBounds, Trace

lesson()
generator = torch.Generator().manual_seed(11)


def value_and_gradients(f, *inputs):
    """As in notebook 04: f's output, and what a fixed gradient pulls back."""
    inputs = [z.detach().clone().requires_grad_() for z in inputs]
    y = f(*inputs)
    upstream = torch.linspace(-1, 1, y.numel()).view_as(y)
    return (y.detach(), *torch.autograd.grad(y, inputs, upstream))


# %% [markdown]
# ## 1 A row at a time
#
# We want $c = ab$ with $a$ $(M, K)$ and $b$ $(K, N)$. The obvious plan: one
# program for each row of $c$. It needs one row of $a$, and all of $b$.
#
# > **Predict.** All three matrices are 128 × 128. How often is each number of
# > $a$ read, and how often each of $b$?

# %%
@Kernel
@triton.jit
def matmul_rows(a_ptr, b_ptr, c_ptr, N: tl.constexpr, K: tl.constexpr):
    """Program i: row i of c."""
    i, n, k = tl.program_id(0), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(a_ptr + i * K + k)  # (K,)
    b = tl.load(b_ptr + k[:, None] * N + n[None, :])  # (K, N)
    tl.store(c_ptr + i * N + n, tl.sum(a[:, None] * b, axis=0))  # (N,)


S = 128
a, b = torch.randn(2, S, S, generator=generator)
c = torch.empty(S, S)
with Trace(a=a, b=b) as t:
    matmul_rows[(S,)](a, b, c, N=S, K=S)
assert_close(c, a @ b)
by_rows = t.loads["a"] + t.loads["b"] + t.stores["c_ptr"]
print("a is read", t.loads["a"] // a.nbytes, "time,",
      "b", t.loads["b"] // b.nbytes, "times")
assert t.loads["b"] == S * b.nbytes

# %% [markdown]
# Once and 128 times. A number of $b$ that has been read takes part in *one*
# product here before it is forgotten.
#
# ## 2 Tiles
#
# Let a program own a square of $c$ instead. It walks along $K$, loads a tile
# of $a$ and one of $b$, and adds their product to its sums. A number now serves
# a whole row or column of the square. `tl.dot` is the product of two tiles;
# `"ieee"` asks for true float32 instead of the rounded tf32. With matrices of
# $S \times S$ there are $S/\text{tile}$ columns of tiles, each of which reads
# all of $a$; so with $b$. With $c$ written once, the bytes must be
# $4\,(2S^3/\text{tile} + S^2)$ in float32. The lens counts.

# %%
@Kernel
@triton.jit
def matmul_square(a_ptr, b_ptr, c_ptr, N, K, TILE: tl.constexpr):
    """Program (j, i): tile (i, j) of c; it must divide M, N and K."""
    t = tl.arange(0, TILE)
    row = tl.program_id(1) * TILE + t  # (TILE,)
    column = tl.program_id(0) * TILE + t
    c = tl.zeros((TILE, TILE), tl.float32)
    for start in range(0, K, TILE):
        k = start + t
        a = tl.load(a_ptr + row[:, None] * K + k[None, :])
        b = tl.load(b_ptr + k[:, None] * N + column[None, :])
        c = tl.dot(a, b, c, input_precision="ieee")
    tl.store(c_ptr + row[:, None] * N + column[None, :], c)


# %%
tiles, moved = [16, 32, 64, 128], []
for tile in tiles:
    c = torch.full((S, S), torch.nan)
    with Trace(a=a, b=b, shuffle=tile) as t:
        matmul_square[(S // tile, S // tile)](a, b, c, S, S, TILE=tile)
    assert_close(c, a @ b)
    moved.append(t.loads["a"] + t.loads["b"] + t.stores["c_ptr"])
formula = [4 * (2 * S**3 // tile + S**2) for tile in tiles]
assert moved == formula and by_rows > 7 * moved[0]

plt.loglog(tiles, formula, "k--", lw=1, label="formula", base=2)
plt.loglog(tiles, moved, "o", base=2, label="counted by the lens")
plt.axhline(by_rows, color="C1", label="a row at a time, counted")
plt.axhline(3 * a.nbytes, color="k", ls=":", lw=1, label="each number once")
plt.xticks(tiles, tiles)
plt.yticks([2**18, 2**20, 2**22, 2**23], ["256K", "1M", "4M", "8M"])
plt.xlabel("tile (rows and columns, log axis)")
plt.ylabel("moved (bytes, log axis)")
plt.legend(loc=(0.55, 0.55))
plt.show()

# %% [markdown]
# Twice the tile, half the bytes. Divide the work, $2S^3$ floating point
# operations (FLOP), by the bytes of $a$ and $b$, and $S$ cancels: a square
# tile does $\text{tile}/4$ FLOP a byte in float32, $\text{tile}/2$ in
# bfloat16. This is its *arithmetic intensity*. A GPU asks for as much as it
# computes while one byte arrives. We quote what was measured on one H100: 798
# TFLOP/s in large bfloat16 products, and 3.0 TB/s in copies.
#
# > **Predict.** How large must a square tile be? Its sums, in float32, have to
# > fit into 256 KB of registers.

# %%
H100 = 798e12 / 3.0e12  # FLOP a byte
needed = 2 * H100
print(f"needed: {H100:.0f} FLOP a byte, so a tile of {needed:.0f} rows,")
print(f"whose sums take {4 * needed**2 / 1024:.0f} KB of 256 KB")
fits = [tile for tile in (64, 128, 256, 512) if 4 * tile**2 <= 256 * 1024]
print("sums that fit:", fits)
assert fits[-1] < needed < 2 * 512

# %% [markdown]
# Four times more than there is, and even the 256 that just fits leaves no
# register for anything else. A real tile, 128 × 256, does 85 FLOP a byte. So
# two thirds of what it reads must come from elsewhere than memory.
#
# But first, sizes that no tile divides. Our kernel has no masks, and the lens
# will catch it where a tile of $b$ ends below the matrix. In most rows of $a$
# it would see nothing: past their end lies the next row, legal to read and
# wrong. The package's kernel masks rows, columns *and* the walk along $K$
# (exercise 1). Its gradients, $da = dc\,b^\top$ and $db = a^\top dc$, are
# products by the same kernel, which reads transposed matrices where they lie.

# %%
from triton_kernels.matmul import matmul, matmul_tiles, multiply

a, b, c = torch.ones(32, 37), torch.ones(37, 32), torch.empty(32, 32)
try:
    with Trace(a=a, b=b):
        matmul_square[(2, 2)](a, b, c, 32, 37, TILE=16)
    raise AssertionError("the lens has missed it")
except OutOfBounds as error:
    print("without masks:", type(error).__name__)
for m, n, k in [(1, 1, 1), (37, 129, 65), (130, 5, 257)]:
    a, b = (torch.randn(shape, generator=generator)
            for shape in ((m, k), (k, n)))
    assert_close(value_and_gradients(matmul, a, b),
                 value_and_gradients(torch.matmul, a, b),
                 rtol=1e-4, atol=1e-4)
print("the package: values and gradients equal torch's")

# %% [markdown]
# ## 3 Order, and the cache that all share
#
# Between memory and the 132 processors of an H100 lies the L2 cache, 50 MB.
# What one program has just read, another gets from there, if both run at about
# the same time. Those that run at once are a *wave*. Each needs one strip of
# $a$ (a row of tiles) and one of $b$ (a column). Numbering tiles along the rows
# is natural; walking `GROUP` rows of them column by column is better. The lens
# draws who wrote what.

# %%
tile = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16}
a, b = torch.randn(2, 128, 16, generator=generator)
figure, both = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
for axes, group in zip(both, (1, 4), strict=True):
    with Trace() as t:
        multiply(a, b.T, **tile, GROUP=group)
    t.draw("c_ptr", ax=axes).images[0].set(cmap="YlOrRd", alpha=0.6)
    owners = t.owners("c_ptr")[::16, ::16]  # one number for each tile
    for (i, j) in torch.cartesian_prod(torch.arange(8), torch.arange(8)):
        owner = owners[i, j]
        axes.text(16 * j + 8, 16 * i + 8, owner, ha="center", va="center",
                  weight="bold" if owner < 8 else None,
                  color="black", fontsize=12 if owner < 8 else 8)
    axes.set(title=f"GROUP = {group}: the first 8 programs are bold")
assert sorted(owners[:4, :2].flatten()) == list(range(8))
plt.show()

# %% [markdown]
# > **Predict.** Eight programs run at once. How many strips of $a$ and $b$ do
# > they read together on the left? On the right?
#
# Launch the first wave only, and let the lens say which rows of $a$ and columns
# of $b$ were touched. We take waves of 16 among 16 × 16 tiles.

# %%
a, b = torch.randn(2, 256, 16, generator=generator)
W, groups, strips = 16, [1, 2, 4, 8, 16], []
for group in groups:
    c = torch.empty(256, 256)
    strides = 16, 1, 1, 16  # b lies transposed
    with Trace(a=a, b=b) as t:
        matmul_tiles[(W,)](a, b, c, 256, 256, 16, *strides, **tile,
                           GROUP=group)
    touched = (t.reads("a") > 0).sum() + (t.reads("b") > 0).sum()
    strips.append(int(touched) // (16 * 16))
formula = [group + W // group for group in groups]
assert strips == formula and min(strips) == strips[2]
print("strips read by a wave of 16:", dict(zip(groups, strips, strict=True)))

many = 2 ** torch.linspace(0, 7, 50)
plt.plot(groups, strips, "o", label="16 programs, counted")
plt.plot(many[:29], many[:29] + 16 / many[:29], "k--", lw=1,
         label="theory: GROUP + W / GROUP")
plt.plot(many, many + 132 / many, "C1", label="132 programs, as an H100 has")
plt.plot(8, 8 + 132 / 8, "C1s", label="the package's GROUP = 8")
plt.xscale("log", base=2)
plt.xticks([1, 2, 4, 8, 16, 32, 64, 128], [1, 2, 4, 8, 16, 32, 64, 128])
plt.xlabel("GROUP (rows of tiles, log axis)")
plt.ylabel("strips that one wave reads")
plt.ylim(0)
plt.legend()
plt.show()

# %% [markdown]
# Nine strips on the left, six on the right: a wave that is nearly square shares
# most, $\text{GROUP} \approx \sqrt W$. For 132 programs, about 25 strips
# instead of 133, by five lines of index arithmetic (`place` in
# [`matmul.py`](../triton_kernels/matmul.py)).
#
# ## 4 What `tl.dot` becomes
#
# The compiler needs no GPU. `aot` takes the very file that we have just run and
# compiles it for an H100 (`sm_90`): Triton writes PTX, NVIDIA's portable
# assembly, and NVIDIA's assembler makes machine code of it. Tensors on the
# `meta` device have shapes and types, and compute nothing.
#
# > **Predict.** Does every `tl.dot` become a tensor-core instruction? Take
# > tiles of 128 rows, then of 32 rows, then float32 in true precision.

# %%
def compiled(dtype=torch.bfloat16, **tile):
    """The package's product of two 4096 x 4096 matrices, for an H100."""
    a, b = (torch.empty(4096, 4096, dtype=dtype, device="meta")
            for _ in "ab")
    return aot.compile_launches("sm_90", multiply, a, b, **tile)[0]


cases = {"bfloat16, 128 rows": compiled(),
         "bfloat16, 32 rows": compiled(BLOCK_M=32, BLOCK_N=64, num_warps=4),
         "float32, 64 rows": compiled(torch.float32)}
product = r"\b(wgmma\.mma_async|mma\.sync|HGMMA|HMMA)[.\w]+"
for name, binary in cases.items():
    for text in (binary.ptx, binary.assembly):
        unit = re.search(product, text)
        print(f"{name:18}", unit[0] if unit else "no tensor core")
units = [list(binary.tensor_core) for binary in cases.values()]
assert units == [["HGMMA"], ["HMMA"], []]
assert "FFMA" in binary.assembly

# %% [markdown]
# Only the first becomes the best (first line PTX, second machine code): `wgmma`
# lets 128 threads multiply 64 × 16 by 16 × 256 out of shared memory, 524,288
# FLOP in one instruction. It needs 64 rows; smaller tiles fall back to `mma`,
# an older one that is fed from registers. float32 in `ieee` precision is
# ordinary arithmetic (`FFMA`, one product a thread). No error, no warning: only
# the assembly tells.
#
# Now the limits. The sums of a tile are spread over the threads of a program
# (32 a warp), and a thread has 255 registers at most. If it needs more, the
# compiler *spills*: it parks numbers in memory, again and again.

# %%
sizes = [(64, 64, 4), (128, 128, 8), (128, 256, 8), (256, 256, 8)]
sums = [rows * columns // (32 * warps) for rows, columns, warps in sizes]
binaries = [compiled(BLOCK_M=rows, BLOCK_N=columns, num_warps=warps)
            for rows, columns, warps in sizes]
names = [f"{m} x {n}\n{warps} warps" for m, n, warps in sizes]
plt.plot(names, sums, "k--o", label="for the sums: tile / threads")
plt.plot(names, [x.registers for x in binaries], "s", label="as compiled")
plt.axhline(255, color="C1", lw=1, label="limit")
plt.ylabel("registers of a thread")
plt.xlabel("tile of c")
plt.ylim(0)
plt.legend()
plt.show()
for (rows, columns, _), x in zip(sizes, binaries, strict=True):
    print(f"{rows:3} x {columns:3}", "SPILLS" if x.spilled else "fits")
assert [x.spilled > 0 for x in binaries] == [False, False, False, True]
assert all(n < x.registers < 256 for n, x in zip(sums[:3], binaries[:3],
                                                 strict=True))

# %% [markdown]
# The other limit is shared memory, where tiles of $a$ and $b$ wait for the
# tensor cores. While one pair is multiplied, the next are on their way:
# `num_stages` (here 3) pairs lie there at a time. Twice the step along $K$, a
# plausible idea, does not fit.

# %%
limit = aot.SHARED_LIMIT["sm_90"]
for step in (64, 128):
    binary = compiled(BLOCK_K=step)
    expected = 3 * (128 * step + step * 256) * 2  # stages, tiles, bytes
    assert binary.shared == expected
    verdict = "fits" if binary.shared <= limit else "does NOT fit"
    print(f"step {step:3}: {binary.shared:,} of {limit:,} bytes: {verdict}")
assert binary.shared > limit

# %% [markdown]
# ## 5 Flash attention, as a kernel
#
# Notebook 04 derived the softmax of a row tile by tile, with three running
# values: the largest score `top`, the sum `total`, and the weighted values
# `acc`, rescaled whenever a tile brings a larger score. Here it is as a kernel:
# a program holds one tile of queries and walks over tiles of keys, up to its
# own.

# %%
@Kernel
@triton.jit
def flash(q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, T, scale,
          K: tl.constexpr, TILE: tl.constexpr):
    first, column = tl.program_id(0) * TILE, tl.arange(0, K)
    row = first + tl.arange(0, TILE)
    at = row[:, None] * K + column[None, :]  # (TILE, K)
    q = tl.load(q_ptr + at, mask=(row < T)[:, None], other=0.0)
    acc = tl.zeros((TILE, K), tl.float32)
    total = tl.zeros((TILE,), tl.float32)
    top = tl.full((TILE,), float("-inf"), tl.float32)
    for start in range(0, first + TILE, TILE):  # the rest is the future
        key = start + tl.arange(0, TILE)
        at_key = key[:, None] * K + column[None, :]
        k = tl.load(k_ptr + at_key, mask=(key < T)[:, None], other=0.0)
        v = tl.load(v_ptr + at_key, mask=(key < T)[:, None], other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        s = tl.where(key[None, :] <= row[:, None], s, float("-inf"))
        higher = tl.maximum(top, tl.max(s, axis=1))  # (TILE,)
        p, keep = tl.exp(s - higher[:, None]), tl.exp(top - higher)
        total = total * keep + tl.sum(p, axis=1)
        acc = tl.dot(p, v, acc * keep[:, None], input_precision="ieee")
        top = higher
    tl.store(o_ptr + at, acc / total[:, None], mask=(row < T)[:, None])
    tl.store(lse_ptr + row, top + tl.log(total), mask=row < T)


# %% [markdown]
# The scores live in registers only. Besides the output it stores one number a
# row, the log-sum-exp $L$.
#
# > **Predict.** 100 positions, tiles of 16. How often is the first key read,
# > and how often the last?

# %%
T, K = 100, 16
q, k, v = torch.randn(3, 1, 1, T, K, generator=generator)
o, lse = torch.full_like(q, torch.nan), torch.full((T,), torch.nan)
with Trace(k=k, shuffle=0) as t:
    flash[(triton.cdiv(T, 16),)](q, k, v, o, lse, T, K**-0.5, K=K, TILE=16)
assert_close(o, ops.attention_plain(q, k, v))

scores = (q @ k.mT)[0, 0] * K**-0.5  # (T, T)
scores = scores.masked_fill(~ops.causal_mask(q, k), -torch.inf)
assert_close(lse, scores.logsumexp(-1))
reads = t.reads("k")[0, 0, ::16, 0].tolist()
print("reads of the seven tiles of keys:", reads)
assert reads == [7, 6, 5, 4, 3, 2, 1]

# %% [markdown]
# Seven times and once: each tile of queries reads its past. The package's
# [`flash_forward`](../triton_kernels/flash_attention.py) is the same walk with
# six additions. Read it now.
#
# | addition | why |
# |---|---|
# | `head // GROUP` | query heads share key heads (GQA) |
# | `exp2`, scores times $\log_2 e$ | what a GPU has in hardware |
# | three `PARTS` of the walk | tiles that are visible whole need no mask |
# | the longest walks first | or a long one finishes alone |
# | `_keys_of`: where to begin and end | a window, or documents, skip tiles too |
# | `top` begins at $-10^{30}$ | a row may see nothing of its first tile, and $-\infty - (-\infty)$ is no number |
#
# We check it under all masks, in values and gradients, with four query heads on
# two key heads (and small tiles for the CPU, so that a short text has many).

# %%
from triton_kernels.flash_attention import flash_attention

flash_tiles.TILES["cpu"] = ((16, 16, 4, 1),) * 6  # queries, keys, ...
T, window = 77, 20
ids = torch.tensor([30, 5, 42])  # lengths of three packed documents
ids = torch.arange(3).repeat_interleave(ids)[None]  # (1, T)
positions = torch.arange(T)
q = torch.randn(1, 4, T, K, generator=generator)
k, v = torch.randn(2, 1, 2, T, K, generator=generator)
for w, d in [(None, None), (window, None), (None, ids), (window, ids)]:
    mask = ops.attention_mask(positions, positions, w, d, d)
    ours = value_and_gradients(
        lambda q, k, v, w=w, d=d: flash_attention(q, k, v, w, d), q, k, v)
    plain = value_and_gradients(
        lambda q, k, v, m=mask: ops.attention_plain(q, k, v, m), q, k, v)
    assert_close(ours, plain, rtol=1e-4, atol=1e-5)
print("four masks: output, dq, dk, dv equal the plain definition")

# %% [markdown]
# ## 6 Masks that save bytes
#
# In dense attention a mask saves nothing: scores are computed, then thrown
# away. Here a tile without a visible pair is not even read. Below, a tile is
# coloured if any of its queries sees any of its keys; the sum of a column says
# how often those keys must be read. Does the lens agree?
#
# > **Predict.** 128 positions, tiles of 16, so 64 in all and 36 up to the
# > diagonal. How many remain for a window of 20?

# %%
def tile_map(T, window, ids, tile=16):
    """True where a tile of queries (row) sees into a tile of keys."""
    p = torch.arange(T)
    mask = ops.attention_mask(p, p, window, ids, ids).view(T, T)
    return mask.view(T // tile, tile, T // tile, tile).any(3).any(1)


T = 128
ids = torch.arange(3).repeat_interleave(torch.tensor([50, 30, 48]))[None]
q = torch.randn(1, 4, T, K, generator=generator)
k, v = torch.randn(2, 1, 2, T, K, generator=generator)
masks = {"causal": (None, None), "window of 20": (20, None),
         "3 documents": (None, ids), "both": (20, ids)}
maps, counted = {}, {}
for name, (w, d) in masks.items():
    with Trace(k=k) as t:
        flash_attention(q, k, v, w, d)
    maps[name] = tile_map(T, w, d)
    counted[name] = torch.tensor(t.reads("k")[0, 0, ::16, 0])  # (8,)
    assert (counted[name] == 2 * maps[name].sum(0)).all()  # 2 heads read it
    dense = 4 * 8 * k[0, 0].nbytes  # four heads, eight tiles, all the keys
    assert t.loads["k"] * 64 == dense * int(maps[name].sum())

# %%
figure, axes = plt.subplots(2, 4, figsize=(10, 4.6), layout="constrained",
                            height_ratios=(3, 2), sharex=True, sharey="row")
for name, (top, bottom) in zip(masks, axes.T, strict=True):
    top.imshow(maps[name], cmap="Blues", vmax=1.5, aspect="auto")
    top.set_title(f"{name}: {int(maps[name].sum())} of 64")
    bottom.bar(range(8), counted[name], color="C1", label="counted")
    bottom.plot(2 * maps[name].sum(0), "k_", ms=14, label="2 x column sum")
    bottom.set_xlabel("tile of keys")
axes[0, 0].set_ylabel("tile of queries")
axes[1, 0].set_ylabel("times read")
axes[1, 3].legend(fontsize=8)
plt.show()
print({name: int(m.sum()) for name, m in maps.items()})
assert [int(m.sum()) for m in maps.values()] == [36, 21, 18, 17]

# %% [markdown]
# It does, with twice the sums, as two query heads share each key head. Causal
# attention reads just over half, a window a band whose width does not grow with
# $T$, and documents leave blocks on the diagonal.
#
# ## 7 One number a row, for the way back
#
# Autograd would keep all the weights $p$. The package keeps $q$, $k$, $v$, $o$
# and $L$, and makes $p_{ij} = e^{s_{ij} - L_i}$ again. The gradient of the
# scores is $ds_{ij} = p_{ij}(dp_{ij} - \delta_i)$ with $\delta_i = do_i \cdot
# o_i$ (derived in 04): again one number a row, made on the way.
#
# What if someone forgets $\delta$? One check needs no second implementation:
# the same constant added to all scores of a row changes no weight, so the
# gradients of a row's scores must sum to zero.

# %%
from triton_kernels import flash_attention as kernels

q, k, v, do = torch.randn(4, 1, 1, T, K, generator=generator)
o, lse = kernels.forward(q, k, v, None, None, K**-0.5)  # lse (1, 1, T)
scores = (q @ k.mT) * K**-0.5
scores = scores.masked_fill(~ops.causal_mask(q, k), -torch.inf)
p, dp = (scores - lse[..., None]).exp(), do @ v.mT
delta = (do * o).sum(-1, keepdim=True)  # (1, 1, T, 1)
assert_close(p, scores.softmax(-1))
assert_close(delta, (p * dp).sum(-1, keepdim=True))

zero = torch.zeros(1, 1, T)
for name, ds in (("with delta", p * (dp - delta)), ("without", p * dp)):
    try:
        assert_close(ds.sum(-1), zero, rtol=0, atol=1e-4)
        print(f"{name}: the rows sum to zero")
    except AssertionError as error:
        print(f"{name}: {type(error).__name__}")
dq = kernels.backward(do, q, k, v, o, lse, None, None, K**-0.5)[0]
by_hand = (p * (dp - delta)) @ k * K**-0.5
assert_close(dq, by_hand, rtol=1e-4, atol=1e-5)

# %% [markdown]
# ## 8 The roofline of attention
#
# One causal head in bfloat16, $K = 128$: $2T^2K$ useful FLOP. *Scores in memory* are
# written and read twice, $8T^2$ bytes. With *tiles* of $n$ queries, keys and
# values are read for each, about $2T^2K/n$ bytes. *Each number once* is
# $8TK$. A head of 64k positions has 34 MB of keys and values, less than the L2
# cache, so a real run lies between the last two.
#
# > **Predict.** Which of the three passes the 266 FLOP a byte of an H100, and
# > from what length on?
#
# Tiles of 64 we can count; the rest are formulas.

# %%
def flash_bytes(T, tile, K=128):
    """q, o, and for each tile of queries its keys and values; and L."""
    walked = tile * (T // tile) * (T // tile + 1) // 2  # rows of keys
    return 2 * (2 * T * K + 2 * walked * K) + 4 * T


flash_tiles.TILES["cpu"] = ((64, 64, 4, 1),) * 6
lengths, counted = [256, 512, 1024], []
for T in lengths:
    q, k, v = torch.randn(3, 1, 1, T, 128, generator=generator).bfloat16()
    with Trace() as t:
        flash_attention(q, k, v)
    counted.append(sum(t.loads.values()) + sum(t.stores.values()))
assert counted == [flash_bytes(T, 64) for T in lengths]
print("bytes counted at T = 256, 512, 1024:", counted)

# %%
T = 2.0 ** torch.arange(8, 17)
flop = 2 * T**2 * 128
intensity = {"scores in memory": flop / (8 * T**2 + 8 * T * 128),
             "tiles of 64": flop / flash_bytes(T, 64),
             "tiles of 128": flop / flash_bytes(T, 128),
             "each number once": flop / (8 * T * 128 + 4 * T)}
for name, y in intensity.items():
    plt.loglog(T, y, base=2, label=name)
few = torch.tensor(lengths)
plt.loglog(few, 2 * few**2 * 128 / torch.tensor(counted), "ko", base=2,
           label="tiles of 64, counted")
plt.axhline(H100, color="k", ls="--", lw=1, label="an H100 asks for 266")
plt.xticks(T[::2], [f"{int(n):,}" for n in T[::2]])
plt.yticks([16, 64, 256, 1024, 4096, 16384],
           [16, 64, 256, "1,024", "4,096", "16,384"])
plt.xlabel("positions T (log axis)")
plt.ylabel("FLOP a byte (log axis)")
plt.legend(fontsize=8)
plt.show()
passes = {name: [int(n) for n in T[y > H100]]
          for name, y in intensity.items()}
for name, where in passes.items():
    print(f"{name:17}", f"from T = {where[0]:,} on" if where else "never")
assert [len(where) for where in passes.values()] == [0, 0, 0, 6]

# %% [markdown]
# Only the last, from 2,048 on. Scores in memory stay below 32 FLOP a byte
# however long the text, an eighth of what the GPU asks for; tiles approach
# their own size, 64 or 128. As with products, the cache must do the rest.
#
# ## 9 Exercises
#
# **1 · A product of any size.** The spec is `a @ b`. All matrices are
# contiguous, and nothing divides anything. Replace the `raise` by up to five
# lines: load the tiles at `k` and add their product to `c`. The check poisons
# what lies after a row, shuffles the programs, and draws where you are wrong.
#
# <details><summary>Hint</summary>
#
# A mask has the shape of its tile: `(row < M)[:, None] & (k < K)[None, :]`.
# What must stand in the lanes that are off (`other`), so that the sum is right?
#
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# @Kernel
# @triton.jit
# def matmul_ragged(a_ptr, b_ptr, c_ptr, M, N, K,
#                   TILE: tl.constexpr, STEP: tl.constexpr):
#     row = tl.program_id(1) * TILE + tl.arange(0, TILE)
#     column = tl.program_id(0) * TILE + tl.arange(0, TILE)
#     c = tl.zeros((TILE, TILE), tl.float32)
#     for start in range(0, K, STEP):
#         k = start + tl.arange(0, STEP)
#         a = tl.load(a_ptr + row[:, None] * K + k[None, :],
#                     mask=(row < M)[:, None] & (k < K)[None, :], other=0.0)
#         b = tl.load(b_ptr + k[:, None] * N + column[None, :],
#                     mask=(k < K)[:, None] & (column < N)[None, :], other=0.0)
#         c = tl.dot(a, b, c, input_precision="ieee")
#     inside = (row < M)[:, None] & (column < N)[None, :]
#     tl.store(c_ptr + row[:, None] * N + column[None, :], c, mask=inside)
# ```
#
# </details>

# %%
from nanomai.exercises.matmul_flash import (
    check_decode,
    check_key_tiles,
    check_matmul_ragged,
)


@Kernel
@triton.jit
def matmul_ragged(a_ptr, b_ptr, c_ptr, M, N, K,
                  TILE: tl.constexpr, STEP: tl.constexpr):
    row = tl.program_id(1) * TILE + tl.arange(0, TILE)
    column = tl.program_id(0) * TILE + tl.arange(0, TILE)
    c = tl.zeros((TILE, TILE), tl.float32)
    for start in range(0, K, STEP):
        k = start + tl.arange(0, STEP)
        raise NotImplementedError(k)
    inside = (row < M)[:, None] & (column < N)[None, :]
    tl.store(c_ptr + row[:, None] * N + column[None, :], c, mask=inside)


check_matmul_ragged(matmul_ragged)

# %% [markdown]
# **2 · One query.** A model that writes has one new query for each head, and
# all $S$ keys. The spec is `torch.softmax(k @ q * scale, 0) @ v`. Everything is
# loaded; fill in the step, up to five lines.
#
# <details><summary>Hint</summary>
#
# The four lines of `flash` from `higher` on, with one row instead of a tile of
# them. Without a second axis `tl.dot` has nothing to do: use `tl.sum`.
#
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# @Kernel
# @triton.jit
# def decode(q_ptr, k_ptr, v_ptr, o_ptr, S, scale,
#            K: tl.constexpr, TILE: tl.constexpr):
#     row, column = tl.program_id(0), tl.arange(0, K)
#     q = tl.load(q_ptr + row * K + column)  # (K,)
#     top, total = float("-inf"), 0.0
#     acc = tl.zeros((K,), tl.float32)
#     for start in range(0, S, TILE):
#         key = start + tl.arange(0, TILE)
#         at, there = key[:, None] * K + column[None, :], key < S
#         k = tl.load(k_ptr + at, mask=there[:, None], other=0.0)  # (TILE, K)
#         v = tl.load(v_ptr + at, mask=there[:, None], other=0.0)
#         s = tl.sum(k * q[None, :], axis=1) * scale  # (TILE,)
#         s = tl.where(there, s, float("-inf"))
#         higher = tl.maximum(top, tl.max(s, axis=0))
#         p, keep = tl.exp(s - higher), tl.exp(top - higher)
#         total = total * keep + tl.sum(p, axis=0)
#         acc = acc * keep + tl.sum(p[:, None] * v, axis=0)
#         top = higher
#     tl.store(o_ptr + row * K + column, acc / total)
# ```
#
# </details>

# %%
@Kernel
@triton.jit
def decode(q_ptr, k_ptr, v_ptr, o_ptr, S, scale,
           K: tl.constexpr, TILE: tl.constexpr):
    row, column = tl.program_id(0), tl.arange(0, K)
    q = tl.load(q_ptr + row * K + column)  # (K,)
    top, total = float("-inf"), 0.0
    acc = tl.zeros((K,), tl.float32)
    for start in range(0, S, TILE):
        key = start + tl.arange(0, TILE)
        at, there = key[:, None] * K + column[None, :], key < S
        k = tl.load(k_ptr + at, mask=there[:, None], other=0.0)  # (TILE, K)
        v = tl.load(v_ptr + at, mask=there[:, None], other=0.0)
        s = tl.sum(k * q[None, :], axis=1) * scale  # (TILE,)
        s = tl.where(there, s, float("-inf"))
        raise NotImplementedError(top, s, v)
    tl.store(o_ptr + row * K + column, acc / total)


check_decode(decode)

# %% [markdown]
# **3 · Where the walk begins and ends.** Queries `first` to
# `first + queries - 1` (but no further than `keys - 1`) see back `window`
# positions, themselves included, and nothing ahead. Return `(begin, end)`: the
# first tile of `tile` keys that they meet, and the first past them. Plain
# Python; the spec is section 6's map.
#
# <details><summary>Hint</summary>
#
# The earliest key is seen by the *first* query, the latest by the last. Mind
# that a position cannot be negative, and that `end` is one past.
#
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# def key_tiles(first, queries, tile, window, keys):
#     begin = max(first - window + 1, 0)
#     last = min(first + queries, keys) - 1
#     return begin // tile, last // tile + 1
# ```
#
# </details>

# %%
def key_tiles(first, queries, tile, window, keys):
    raise NotImplementedError


check_key_tiles(key_tiles)

# %% [markdown]
# ## 10 At 500B
#
# `mai-1-dense` is this project's own proposal; MAI-1's dimensions were never
# published. The largest products of a layer are 8,192 tokens of 18,432 numbers
# times a weight of 18,432 × 61,440; its attention has 144 query heads on 8 key
# heads, $K = 128$.
#
# > **Predict.** How often does such a product read the weight, a row at a time,
# > and in tiles of 128 × 256?
#
# We count, and compile both kernels at these very sizes for an H100.

# %%
big = nanomai.load_config("mai-1-dense").model
T, D, F = big.context_length, big.d_model, big.d_ff
weight, tokens, out = 2 * D * F, 2 * T * D, 2 * T * F  # bytes in bfloat16
in_rows = tokens + T * weight + out
in_tiles = F // 256 * tokens + T // 128 * weight + out
once = tokens + weight + out
for name, n in (("rows", in_rows), ("tiles", in_tiles), ("once", once)):
    print(f"{name:6} {n / 1e9:10,.1f} GB,",
          f"{2 * T * D * F / n:7,.1f} FLOP a byte")
assert (T // 128, F // 256) == (64, 240) and in_tiles > 50 * once
heads = big.n_heads
print(f"attention: scores {heads * 8 * T * T / 1e9:.0f} GB, tiles of 128",
      f"{heads * flash_bytes(T, 128) / 1e9:.1f} GB a layer")
assert heads * flash_bytes(T, 128) < heads * 8 * T * T / 3

x, w = (torch.empty(shape, dtype=torch.bfloat16, device="meta")
        for shape in ((T, D), (D, F)))
q, k = (torch.empty(1, n, T, big.head_dim, dtype=torch.bfloat16,
                    device="meta") for n in (heads, big.n_kv_heads))
for binary in (*aot.compile_launches("sm_90", multiply, x, w),
               *aot.compile_launches("sm_90", kernels.forward, q, k, k, None,
                                     None, big.head_dim**-0.5, "sm_90")):
    print(f"{binary.kernel}: {', '.join(binary.tensor_core)},",
          "spills" if binary.spilled else "no spills")
    assert list(binary.tensor_core) == ["HGMMA"] and binary.spilled == 0
    assert binary.shared <= limit and binary.wide_loads >= 16

# %% [markdown]
# 64 times instead of 8,192: still 145 GB, twice the bytes of the tokens, because
# the tile is wider than high. One product moves 218 GB where 4 GB would do; the
# cache has to make up for it.
#
# ## What to keep
#
# 1. A tile of $n \times n$ divides the bytes by $n$; registers and shared
#    memory say how large $n$ may be, and the cache must do the rest.
# 2. Programs that run together should share strips: nearly square waves.
# 3. Flash attention keeps scores in registers, skips tiles that a mask hides,
#    and needs $L$ and $\delta$, two numbers a row, on the way back.
#
# **Real systems.** For heads of 128, 16k positions and no mask, the figures of
# the FlashAttention-3 paper (quoted; not measured by us) show on an H100 about
# 370 TFLOP/s for FlashAttention-2, 395 for Triton, 595 for cuDNN, and 648 for
# FlashAttention-3. The leaders copy tiles with a unit of their own (TMA), give
# warps different trades (some load, others multiply: *warp specialisation*),
# and overlap the softmax of one tile with the product of another. So training
# here calls a library's products, and its attention by default.
#
# **Read on.** [`matmul.py`](../triton_kernels/matmul.py),
# [`flash_attention.py`](../triton_kernels/flash_attention.py),
# [`flash_tiles.py`](../triton_kernels/flash_tiles.py),
# [`aot.py`](../triton_kernels/aot.py). Papers:
# [FlashAttention-2](https://arxiv.org/abs/2307.08691),
# [FlashAttention-3](https://arxiv.org/abs/2407.08608),
# [Triton](https://doi.org/10.1145/3315508.3329973).
#
# **Next:** `11c_fused_cross_entropy`, on the largest matrix of all: the logits.
