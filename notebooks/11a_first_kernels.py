# %% [markdown]
# # 11a · What does a GPU program do, and how can I watch it without a GPU?
#
# **Goal.** Write first kernels, see which program touches which number, catch
# the bugs that a GPU would hide, count every byte, and read the package's
# RMSNorm as the first kernel that trains models.
#
# **Prerequisites.** `05_block_and_model` (softmax, RMSNorm); indexing in
# PyTorch. **Needs** Triton, which exists for Linux on x86-64 only: on macOS,
# Windows or ARM read the stored outputs. No GPU is needed. **Time.** About 60
# minutes; it runs in under half a minute.
#
# **You will be able to**
# - write a kernel with program ids, tiles and masks;
# - find accesses out of bounds, and races between programs;
# - predict a kernel's memory traffic, and from it the least time it takes;
# - compile a kernel for an H100 that is not there, and read the result.

# %%
from textwrap import fill

import matplotlib.pyplot as plt
import torch
import triton
import triton.language as tl
from torch.testing import assert_close

import nanomai
from nanomai import ops
from nanomai.exercises import first_kernels as exercises
from nanomai.show import lesson
from triton_kernels import aot, lessons, rms_norm
from triton_kernels.engine import Kernel
from triton_kernels.lens import OutOfBounds, Race, Trace

lesson()
generator = torch.Generator().manual_seed(11)


def told(error):
    return fill(f"{type(error).__name__}: {error}", 76)

# %% [markdown]
# ## 1 One program, many times
#
# A GPU runs one piece of code thousands of times at once. Triton calls each
# run a *program*, and the code a *kernel*. All programs get the same
# arguments; the only difference is `tl.program_id(0)`: 0, 1, 2, ... Each
# computes from it which *tile* of the data is its own.
#
# A kernel sees no tensors, only addresses. `x_ptr` is the address of the first
# number, `x_ptr + at` a whole tile of addresses, and `tl.load` fetches them.
# `tl.constexpr` marks what the compiler must know; the length of a tile is
# such, and has to be a power of two.

# %%
@Kernel
@triton.jit
def add_tiles(x_ptr, y_ptr, z_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    z = tl.load(x_ptr + at) + tl.load(y_ptr + at)
    tl.store(z_ptr + at, z)


x, y = torch.randn(2, 4, 12, generator=generator)  # (4, 12) each
z = torch.full_like(x, torch.nan)
with Trace(x=x, y=y, z=z) as trace:
    add_tiles[(6,)](x, y, z, BLOCK=8)
assert_close(z, x + y)
print("equal; programs:", trace.grid[0])

# %% [markdown]
# `[(6,)]` is the *grid*: six programs. The tensors are on the CPU, so
# `Kernel` let Triton's interpreter run them, one after the other; tensors on a
# GPU would run the same lines compiled. `Trace` is our lens: while it is open,
# it sees each load and store.
#
# > **Predict.** `z` has 4 rows of 12 numbers, a tile has 8. Which programs
# > write row 1?

# %%
trace.draw("z").set_yticks(range(4))
plt.show()
owners = trace.owners("z")
print("row 1 belongs to programs", sorted(set(owners[1].tolist())))
assert owners.reshape(-1).tolist() == [i // 8 for i in range(48)]

# %% [markdown]
# Programs 1 and 2. In memory there are no rows, only 48 numbers on end, and a
# tile may begin in one row and end in the next.
#
# ## 2 Masks
#
# 48 is a multiple of 8. Let there be 45 numbers, still in six tiles: the last
# tile reaches three too far. To see what that does without harm, we let all
# tensors be the beginnings of larger ones, and run without the lens.
#
# > **Predict.** Does it raise an error? Is `z` right?

# %%
N = 45
memory = [torch.arange(64.0), torch.arange(64.0), torch.zeros(64)]
x, y, z = (m[:N] for m in memory)
add_tiles[(6,)](x, y, z, BLOCK=8)
assert_close(z, x + y)
print("z is right; the 19 zeros behind it are now:")
print([int(number) for number in memory[2][N:]])
assert memory[2][N:].count_nonzero() == 3

# %% [markdown]
# No error, a right answer, and three numbers destroyed that belong to someone
# else. On a GPU the neighbour may be a weight, and the loss goes bad days
# later. The lens knows where each tensor ends, and names the program.

# %%
try:
    with Trace(x=x, y=y, z=z):
        add_tiles[(6,)](x, y, z, BLOCK=8)
except OutOfBounds as error:
    print(told(error))
    assert "program (5, 0, 0)" in str(error)
else:
    raise AssertionError("the lens must see it")

# %% [markdown]
# A tile cannot be shorter, but its places, the *lanes*, can be switched off.
# `mask` is a tile of booleans; where it is false, nothing is read or written, and a load gives
# `other` instead. Here is the sum for any $N$, and the package's beside it.

# %%
@Kernel
@triton.jit
def add(x_ptr, y_ptr, z_ptr, N, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < N
    x = tl.load(x_ptr + at, mask=inside, other=0.0)
    y = tl.load(y_ptr + at, mask=inside, other=0.0)
    tl.store(z_ptr + at, x + y, mask=inside)


for N in (1, 7, 8, 9, 45):
    x, y = torch.randn(2, N, generator=generator)
    z = torch.full_like(x, torch.nan)
    with Trace(x=x, y=y, z=z) as trace:
        add[(triton.cdiv(N, 8),)](x, y, z, N, BLOCK=8)
    assert_close(z, x + y)
    assert_close(z, lessons.add(x, y))
    assert sum(trace.loads.values()) == 8 * N  # two numbers of 4 bytes
print("equal for every N, and no byte too many")

# %% [markdown]
# ## 3 Programs run in any order, and at once
#
# Two programs may not depend on one another. The next kernel sums a tensor:
# each program adds its tile to one number in memory. That takes three steps:
# read, add, write.
#
# > **Predict.** On the CPU, programs run one after another. Is the sum right
# > there? And on a GPU?

# %%
@Kernel
@triton.jit
def total(x_ptr, sum_ptr, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))
    before = tl.load(sum_ptr)
    tl.store(sum_ptr, before + tl.sum(x, axis=0))


x, found = torch.arange(32.0), torch.zeros(1)
with Trace(x=x, sum=found, races=False):
    total[(4,)](x, found, BLOCK=8)
print("one after another:", found.item(), "of", x.sum().item())
assert found == x.sum()
try:
    with Trace(x=x, sum=found):
        total[(4,)](x, found, BLOCK=8)
except Race as error:
    print(told(error))
else:
    raise AssertionError("the lens must see it")

# %% [markdown]
# Right on the CPU, by luck of the order. On a GPU two programs read the same
# `before`, and one addition is lost. By default the lens refuses what could go
# wrong: a number that one program writes and another touches, in one launch.
# With `races=False` it only counts.
#
# A GPU can do the three steps as one that nothing interrupts, with
# `tl.atomic_add`, and the lens does not mind it. But $(a+b)+c \ne a+(b+c)$ in
# the last bit, so atomics, which come in any order, make results differ from
# run to run. The package's kernels write partial sums instead.
#
# `shuffle` runs programs in a random order, which shows a dependence in the
# *numbers*. This running sum takes its start from the end of the previous tile.
#
# > **Predict.** In order it is right. In which random orders would it be?

# %%
@Kernel
@triton.jit
def running_sum(x_ptr, y_ptr, BLOCK: tl.constexpr):
    first = tl.program_id(0) * BLOCK
    at = first + tl.arange(0, BLOCK)
    carry = tl.load(y_ptr + first - 1, mask=first > 0, other=0.0)
    tl.store(y_ptr + at, carry + tl.cumsum(tl.load(x_ptr + at), axis=0))


right = []
for shuffle in (None, 0, 1, 2):
    out = torch.zeros(32)
    with Trace(x=x, y=out, shuffle=shuffle, races=False):
        running_sum[(4,)](x, out, BLOCK=8)
    right.append(bool(torch.equal(out, x.cumsum(0))))
print("in order:", right[0], " shuffled:", right[1:])
assert right == [True, False, False, False]

# %% [markdown]
# Only where each tile comes after its left neighbour, and that order is the one
# we began with.
#
# ## 4 Count the bytes
#
# A GPU computes far faster than it reads, so for most kernels the question is:
# how many bytes cross between memory and the chip? The *arithmetic minimum* is
# to read each input once and write each output once.
#
# Softmax over a row is $e^{x_j-m} / \sum_i e^{x_i-m}$ with $m = \max_i x_i$.
# Written as a library would without fusion, it is three kernels. One program
# takes one row; `other` is minus infinity, since an absent number must be
# neither the maximum nor part of the sum.

# %%
@Kernel
@triton.jit
def row_max(x_ptr, m_ptr, D, BLOCK: tl.constexpr):
    row, col = tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * D + col, mask=col < D, other=-float("inf"))
    tl.store(m_ptr + row, tl.max(x, axis=0))


@Kernel
@triton.jit
def exp_and_sum(x_ptr, m_ptr, e_ptr, sum_ptr, D, BLOCK: tl.constexpr):
    row, col = tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * D + col, mask=col < D, other=-float("inf"))
    e = tl.exp(x - tl.load(m_ptr + row))
    tl.store(e_ptr + row * D + col, e, mask=col < D)
    tl.store(sum_ptr + row, tl.sum(e, axis=0))


@Kernel
@triton.jit
def divide(e_ptr, sum_ptr, y_ptr, D, BLOCK: tl.constexpr):
    row, col = tl.program_id(0), tl.arange(0, BLOCK)
    e = tl.load(e_ptr + row * D + col, mask=col < D)
    y = e / tl.load(sum_ptr + row)
    tl.store(y_ptr + row * D + col, y, mask=col < D)

# %% [markdown]
# Fused, the row stays in the program's registers from the load to the store:

# %%
@Kernel
@triton.jit
def softmax(x_ptr, y_ptr, D, BLOCK: tl.constexpr):
    row, col = tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * D + col, mask=col < D, other=-float("inf"))
    e = tl.exp(x - tl.max(x, axis=0))  # (BLOCK,), 0 where masked
    y = e / tl.sum(e, axis=0)
    tl.store(y_ptr + row * D + col, y, mask=col < D)

# %% [markdown]
# > **Predict.** Call the bytes of `x` one. How many does each version move?

# %%
x = torch.randn(6, 300, generator=generator) - 5  # (N, D)
(N, D), meta = x.shape, {"BLOCK": 512}
m, s, e, y, y1 = (torch.full(shape, torch.nan) for shape in
                  [(N,), (N,), (N, D), (N, D), (N, D)])
with Trace(x=x, e=e, y=y, m=m, sum=s, shuffle=0) as apart:
    row_max[(N,)](x, m, D, **meta)
    exp_and_sum[(N,)](x, m, e, s, D, **meta)
    divide[(N,)](e, s, y, D, **meta)
with Trace(x=x, y=y1, shuffle=0) as fused:
    softmax[(N,)](x, y1, D, **meta)
for result in (y, y1, lessons.softmax(x)):
    assert_close(result, x.softmax(-1))
total_apart = sum(apart.loads.values()) + sum(apart.stores.values())
total_fused = sum(fused.loads.values()) + sum(fused.stores.values())
print("x is read", apart.loads["x"] // x.nbytes, "times apart,",
      fused.loads["x"] // x.nbytes, "fused")
print(f"all bytes: {total_apart / x.nbytes:.2f} apart,",
      f"{total_fused / x.nbytes:.2f} fused")
assert total_apart == 5 * x.nbytes + 4 * m.nbytes
assert total_fused == 2 * x.nbytes

# %% [markdown]
# Five against two, and two is the minimum. The maxima and sums, one a row,
# make the 0.01. Five separate operations of PyTorch would move eight: the
# maximum reads 1, the difference and `exp` move 2 each, the sum reads 1, and
# the division moves 2.

# %%
steps = {"five operations": [("x", 2), ("difference", 2), ("exp", 3),
                             ("y", 1)],
         "three kernels": [(name, moved_by / x.nbytes) for name, moved_by in
                           (("x", apart.loads["x"]),
                            ("exp", apart.loads["e"] + apart.stores["e"]),
                            ("y", apart.stores["y"]))],
         "fused": [("x", fused.loads["x"] / x.nbytes),
                   ("y", fused.stores["y"] / x.nbytes)]}
colours = {"x": "C0", "difference": "C3", "exp": "C1", "y": "C2"}
totals = {}
for name, parts in steps.items():
    left = 0
    for tensor, width in parts:
        plt.barh(name, width, left=left, color=colours[tensor])
        plt.text(left + width / 2, name, tensor, ha="center", va="center")
        left += width
    totals[name] = left
plt.axvline(2, color="k", ls="--", label="arithmetic minimum")
plt.xlabel("bytes moved / bytes of x")
plt.legend()
plt.show()
assert list(totals.values()) == [8, 5, 2]

# %% [markdown]
# ## 5 The roofline
#
# A kernel takes at least as long as its bytes and at least as long as its
# arithmetic: $t \ge \max(\text{bytes} / \text{bandwidth},\
# \text{FLOPs} / \text{peak})$. Which of the two binds depends on the
# *intensity*, the FLOPs done for each byte.
#
# NVIDIA publishes 3.35 TB/s and 989 TFLOP/s (bfloat16, tensor cores) for the
# H100 SXM. On one such GPU 3.0 TB/s for a copy and 798 TFLOP/s for a large
# matrix product were measured. We take numbers of 2 bytes. A sum does 1 FLOP
# for 3 numbers. Softmax does 5 for 2 (maximum, difference, exponential, sum,
# division), RMSNorm 4 for 2. The product of two $n \times n$ matrices does
# $2n^3$ for $3n^2$.
#
# > **Predict.** Left or right of the ridge: softmax, and a product with
# > $n = 256$?

# %%
BANDWIDTH, PEAK = 3.35e12, 989e12
intensity = {"add": 1 / 6, "RMSNorm": 4 / 4, "softmax": 5 / 4,
             "n = 256": 256 / 3, "n = 8192": 8192 / 3}
flops = 10.0 ** torch.linspace(-1.2, 4, 200)  # per byte


def roof(i, bandwidth=BANDWIDTH, peak=PEAK):
    return torch.as_tensor(i * bandwidth).clamp(max=peak) / 1e12


ridge = PEAK / BANDWIDTH
plt.loglog(flops, roof(flops), label="published: 3.35 TB/s, 989 TFLOP/s")
plt.loglog(flops, roof(flops, 3.0e12, 798e12), "C0--",
           label="measured: 3.0 TB/s, 798 TFLOP/s")
plt.plot([ridge, ridge], [10, 989], "k:", label="ridge, published")
for name, i in intensity.items():
    plt.loglog(i, roof(i), "o", color="C1")
    above = name in ("softmax", "n = 256", "n = 8192")
    plt.annotate(name, (i, roof(i)), textcoords="offset points",
                 xytext=(-4, 7) if above else (7, -12),
                 ha="right" if above else "left")
    print(f"{name:9} {i:8.2f} FLOP/byte:",
          "memory" if i < ridge else "arithmetic", "binds")
plt.xlabel("intensity: FLOPs per byte moved (log)")
plt.ylabel("attainable TFLOP/s (log)")
plt.legend(loc="lower right")
plt.show()
assert abs(ridge - 295) < 1 and abs(roof(ridge) - 989) < 0.1
assert [i < ridge for i in intensity.values()] == [True] * 4 + [False]

# %% [markdown]
# Both are left of the ridge, which is at 295 FLOPs a byte. Even a product with
# $n = 256$ waits for memory. A sum reaches less than a thousandth of the peak
# (that of the tensor cores, which only products of matrices can use anyway).
# The plan for all kernels on the left is the same: move fewer bytes. At full
# bandwidth, fused softmax takes two fifths of the time of the three kernels,
# because it moves two fifths.
#
# ## 6 RMSNorm, the first real kernel
#
# Now [`triton_kernels/rms_norm.py`](../triton_kernels/rms_norm.py). Its naive
# form is as short as softmax: one row a program, $y = x\,r\,w$ with
# $r = 1/\sqrt{\overline{x^2} + \varepsilon}$. `other=0.0` is right here,
# because a zero adds nothing to a sum of squares.

# %%
@Kernel
@triton.jit
def rms_one_row(x_ptr, w_ptr, y_ptr, D, eps, BLOCK: tl.constexpr):
    row, col = tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * D + col, mask=col < D, other=0.0)
    w = tl.load(w_ptr + col, mask=col < D, other=0.0)
    r = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / D + eps)
    tl.store(y_ptr + row * D + col, x * r * w, mask=col < D)


N, D, eps = 200, 24, 0.01  # an eps that is seen where it is left out
x = torch.randn(N, D, generator=generator, requires_grad=True)
w = torch.rand(D, generator=generator, requires_grad=True)
y = torch.full_like(x, torch.nan, requires_grad=False)
with Trace(shuffle=0) as naive:
    rms_one_row[(N,)](x.detach(), w.detach(), y, D, eps, BLOCK=32)
assert_close(y, ops.rms_norm_plain(x, w, eps).detach())
print("equal to the plain definition; w is read",
      naive.loads["w_ptr"] // w.nbytes, "times")

# %% [markdown]
# The package's kernel adds three things. A program takes several short rows,
# so that all its threads have work. It computes in float32, whatever it
# reads. And it keeps $r$, 4 bytes a row: backward needs it, and would have to
# read $x$ a second time to know it.
#
# Backward, with $g = d_y \odot w$ and $n = x\,r$, is
# $d_x = r\,(g - n\,\overline{g n})$, as in notebook 05, and
# $d_w = \sum_\text{rows} d_y \odot n$. The last sum runs over rows of *all*
# programs. Each writes its own partial sum, and PyTorch adds the few that
# there are: no atomics, so no order matters. Values and gradients, under the
# lens:

# %%
d_y = torch.randn(N, D, generator=generator)
with Trace(x=x, w=w, shuffle=1) as forward:
    y = rms_norm.rms_norm(x, w, eps)
with Trace(x=x, w=w, dy=d_y, shuffle=2) as backward:
    gradients = torch.autograd.grad(y, (x, w), d_y)
plain = ops.rms_norm_plain(x, w, eps)
assert_close(y, plain)
assert_close(gradients, torch.autograd.grad(plain, (x, w), d_y))
print("values and both gradients equal, programs shuffled")
programs = forward.grid[0]
print("programs:", programs, " rows of each:", rms_norm.tiles(x)["ROWS"])
figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.6), layout="constrained")
forward.draw("y_ptr", ax=axes[0])
backward.draw("partial_ptr", ax=axes[1]).set_yticks(range(programs))
plt.show()
owners = forward.owners("y_ptr")  # (N, D)
assert (owners == owners[:, :1]).all() and owners.max() == programs - 1
assert backward.owners("partial_ptr").shape == (programs, D)

# %% [markdown]
# Each program owns whole rows of $y$, and one row of partial sums. Do the
# bytes agree with the file's docstring? With $e$ bytes a number it says:
# forward $2eND + 4N$, backward $3eND + 4N$, the weight once for each of $P$
# programs, and $4PD$ written for $d_w$.
#
# > **Predict.** $x$ is float32, so $e = 4$. What share of the forward
# > traffic is the kept $r$?

# %%
once, weights = 4 * N * D, programs * w.nbytes
counted = [sum(t.loads.values()) + sum(t.stores.values())
           for t in (forward, backward)]
formula = [2 * once + 4 * N + weights,
           3 * once + 4 * N + weights + 4 * programs * D]
print("counted", counted, " formula", formula)
print(f"r is {4 * N / counted[0]:.1%} of the forward bytes")
assert counted == formula
assert backward.loads["rstd_ptr"] == 4 * N

# %% [markdown]
# Equal to the byte, and 4 bytes a row save $4D$. Such an equation is a test
# that cannot be noisy: one load too many, and it fails on any laptop.
#
# ## 7 Compile for a GPU that is not there
#
# A compiler needs no GPU either. `compile_launches` calls a launcher with
# tensors on the `meta` device, which have shapes and no memory, and compiles
# each kernel that it would launch, for the H100 (`sm_90`). There a program is
# 4 to 16 *warps* of 32 threads, which share its tile. What matters in the
# machine code: *registers* (a thread has 255 at most), *spills* (values
# that found no register and go to memory, uncounted by us), and whether loads
# take 128 bits at a time.

# %%
x = torch.empty(16384, 2048, dtype=torch.bfloat16, device="meta")
w, rstd = torch.empty(2048, device="meta"), torch.empty(16384, device="meta")
binaries = [
    *aot.compile_launches("sm_90", lessons.add, x, x),
    *aot.compile_launches("sm_90", lessons.softmax, x),
    *aot.compile_launches("sm_90", rms_norm.forward, x, None, w, eps),
    *aot.compile_launches("sm_90", rms_norm.backward, x, None, x, w, rstd)]
for b in binaries:
    narrow = b.loads - b.wide_loads
    print(f"{b.kernel:17} under 128 registers: {b.registers < 128},",
          f"spills: {b.spilled > 0}, narrow loads: {narrow}")
    assert 16 <= b.registers < 128 and b.spilled == 0 and b.wide_loads > 0
    assert narrow == (b.kernel == "rms_norm_backward")

# %% [markdown]
# The exact number of registers changes with the compiler's version, so we
# print only the bound. The one narrow load is $r$: one number a row.
#
# > **Predict.** Sum two tensors that begin one number (2 bytes) later. What
# > becomes of the wide loads? And what if softmax of rows of 16,384 may use
# > only 32 registers a thread?

# %%
odd = torch.empty(2**24 + 1, dtype=torch.bfloat16, device="meta")[1:]
(narrow,) = aot.compile_launches("sm_90", lessons.add, odd, odd)
print("odd start: wide loads", narrow.wide_loads, "- but more loads:",
      narrow.loads > binaries[0].loads)
assert narrow.wide_loads == 0 and narrow.loads > binaries[0].loads
x = torch.empty(8192, 16384, dtype=torch.bfloat16, device="meta")
tight = aot.compile_kernel(lessons.softmax_kernel, "sm_90", x, x, 16384,
                           BLOCK=16384, num_warps=16, maxnreg=32)
print("32 registers: spills", tight.spilled > 0)
assert tight.spilled > 0 and tight.registers <= 32

# %% [markdown]
# A wide load must begin at a multiple of 16 bytes. The results stay right, and
# the kernel issues many more instructions for the same bytes: no test of
# numbers sees it. And 16 warps of 32 threads hold 16,384 numbers as 32 each: 32
# registers leave no room for anything else.
#
# ## 8 At 500B
#
# `mai-1-dense` is our own proposal for a model of MAI-1's reported size. Each
# block has two norms with the residual added in the same kernel: $4eD$ bytes
# for a token. Beside it the token costs 2 FLOPs a parameter. We divide both by
# the published roofs, forward only, and compare with a model of GPT-2's size.
#
# > **Predict.** In which of the two models do norms cost the larger share?

# %%
share = {}
for name in ("gpt2-124m", "mai-1-dense"):
    c = nanomai.load_config(name).model
    norms = 2 * c.n_layers * 4 * 2 * c.d_model / BANDWIDTH  # seconds
    matrices = 2 * c.n_parameters / PEAK
    share[name] = norms / matrices
    print(f"{name:12} D = {c.d_model:6,}, norms / matrices:",
          f"{share[name]:.1%}")
assert 0.1 < share["gpt2-124m"] < 0.3 and share["mai-1-dense"] < 0.02
try:
    rms_norm.tiles(torch.empty(1, c.d_model, device="meta"))
except ValueError as error:
    print(told(error))
else:
    raise AssertionError("a row this wide does not fit")

# %% [markdown]
# The small one, by far: norms grow with $D$, matrices with $D^2$. And a row of
# 18,432 does not fit the registers of one program: at this width our kernel
# refuses, and one would walk along the row in tiles, as `11b` does along the
# keys of attention.
#
# ## Exercises
#
# Each gives the spec as a line of PyTorch. Fill in the kernel in place of
# `raise`. The check runs it under the lens, on ragged sizes, programs
# shuffled, into a `y` full of NaN, and draws who wrote `y`.
#
# **1. Bias and ReLU.** `y = torch.relu(x + bias)`, where `x` has rows of `D`
# numbers, `N` numbers in all, and `bias` has `D`. Tiles run over the rows'
# ends, as in section 1.

# %%
@Kernel
@triton.jit
def bias_relu(x_ptr, bias_ptr, y_ptr, N, D, BLOCK: tl.constexpr):
    raise NotImplementedError


exercises.check_bias_relu(bias_relu)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Number `at` stands in column `at % D`. `tl.maximum(a, b)` is elementwise.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# @Kernel
# @triton.jit
# def bias_relu(x_ptr, bias_ptr, y_ptr, N, D, BLOCK: tl.constexpr):
#     at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
#     x = tl.load(x_ptr + at, mask=at < N)
#     bias = tl.load(bias_ptr + at % D, mask=at < N)
#     tl.store(y_ptr + at, tl.maximum(x + bias, 0.0), mask=at < N)
# ```
# </details>
#
# **2. Softmin.** `y = (-x).softmax(-1)`: physics' weights of states with
# energies `x`. One program a row, `BLOCK` at least `D`. What must stand for
# the numbers that are not there? Energies may be in the hundreds.

# %%
@Kernel
@triton.jit
def softmin(x_ptr, y_ptr, D, BLOCK: tl.constexpr):
    raise NotImplementedError


exercises.check_softmin(softmin)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Subtract the *smallest* energy. An absent state has probability zero, so its
# energy is not zero.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# @Kernel
# @triton.jit
# def softmin(x_ptr, y_ptr, D, BLOCK: tl.constexpr):
#     col = tl.arange(0, BLOCK)
#     at, inside = tl.program_id(0) * D + col, col < D
#     x = tl.load(x_ptr + at, mask=inside, other=float("inf"))
#     e = tl.exp(tl.min(x, axis=0) - x)
#     tl.store(y_ptr + at, e / tl.sum(e, axis=0), mask=inside)
# ```
# </details>
#
# **3. Transpose.** `y = x.T.contiguous()`, in square tiles: the grid has two
# axes, and program $(i, j)$ takes rows from $i \cdot$ `TILE` and columns from
# $j \cdot$ `TILE` of `x` $(N, M)$. Number $(n, m)$ of `x` is at
# `n * x_row + m * x_column`: `x` need not be contiguous. A row of `y` begins
# every `y_row` numbers.

# %%
@Kernel
@triton.jit
def transpose(x_ptr, y_ptr, N, M, x_row, x_column, y_row,
              TILE: tl.constexpr):
    raise NotImplementedError


exercises.check_transpose(transpose)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `n[:, None]` and `m[None, :]` make a tile of addresses and a tile of
# booleans, `(TILE, TILE)` each. Nothing has to be turned: load at the
# addresses of `x`, store the same tile at those of `y`.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# @Kernel
# @triton.jit
# def transpose(x_ptr, y_ptr, N, M, x_row, x_column, y_row,
#               TILE: tl.constexpr):
#     n = (tl.program_id(0) * TILE + tl.arange(0, TILE))[:, None]
#     m = (tl.program_id(1) * TILE + tl.arange(0, TILE))[None, :]
#     inside = (n < N) & (m < M)
#     x = tl.load(x_ptr + n * x_row + m * x_column, mask=inside)
#     tl.store(y_ptr + m * y_row + n, x, mask=inside)
# ```
# </details>
#
# ## Recap
#
# - A kernel is one program, run many times in any order; its id says which
#   tile is its own, and a mask where its data ends.
# - A race or a missing mask can give right numbers. The lens sees the access
#   itself, and a shuffled order the dependence.
# - Below 295 FLOPs a byte an H100 waits for memory: count bytes, fuse, and
#   check registers and wide loads before you rent it.
#
# **What real systems do differently.** They time every choice of tile on the
# GPU itself; `torch.compile` writes fused kernels such as these on its own.
# An interpreter sees no races between threads *inside* a program: for those
# there is NVIDIA's compute-sanitizer.
#
# **Read on.** [`lessons.py`](../triton_kernels/lessons.py),
# [`rms_norm.py`](../triton_kernels/rms_norm.py),
# [`lens.py`](../triton_kernels/lens.py),
# [`aot.py`](../triton_kernels/aot.py). RMSNorm
# [1910.07467](https://arxiv.org/abs/1910.07467), softmax in fewer
# passes [1805.02867](https://arxiv.org/abs/1805.02867), the roofline
# ([Williams et al. 2009](https://doi.org/10.1145/1498765.1498785)).
#
# **Next:** `11b_matmul_and_flash_attention` goes to the right of the ridge.
