"""Linear layers with weights of int8 or int4, for decoding: y = x W^T, and W becomes numbers in registers only.

Shapes: x (..., D), seen as M rows; W (F, D); y (..., F). Rounded to nearest, symmetric about zero, with one scale for
    int8   each row of W: q (F, D) int8 in -127..127, scale (F,) float32; W = scale q
    int4   each group of 64, 128 or 256 numbers of a row: scale (F, D / group) bfloat16; n = q + 8 in 1..15, two a byte
           in packed (F, D / 2) uint8; W = scale (n - 8)
so that no weight is further off than half its scale. Without a zero point zero stays zero, and weights lie evenly about
it; for normal ones in groups of 128 it would leave 0.86 of our error, for one more load and sum over x a group.

Scales stay out of the inner product, y_f = sum over groups g of scale_fg (sum over d in g of q_fd x_d): tensor cores
multiply x by integers that bfloat16 and float16 hold exactly, and add in float32.

From nibble to number. A group is four quarters, and its 16-bit word t holds number t of each. So a 32-bit word holds
two neighbours of each quarter 16 bits apart, as a tensor core wants its operand, and no thread needs what another one
loaded. The last bit of 128.0 counts 1 in bfloat16: with n below, its bits say 128 + n. One shift, one logical
operation and the subtraction of 136 unpack two numbers (float16: 1024 + n, and 1032).

Traffic in bytes, e a number of x, up to 16 rows (scales included; x comes from L2 for all but the first program):
    int8   F D + 4 F            + e M (F D / 32 + F)    at M = 8 half as much for x as for W
    int4   F D (1/2 + 2/group)  + e M (F D / 32 + F)    at M = 8 as much
For F = D = 4,096 W takes 5.6 us and 2.9 us at 3 TB/s, in bfloat16 11.2 us. These are floors; no GPU has timed it yet.

Work. W is the left operand and x^T the right one, which is padded to 8 or 16 columns: one row costs what eight do. A
number of int4 takes a thread 2.5 instructions on sm_90, of int8 3.9 (2.9 and 4.2 for 16 rows), counted in the loops
that Triton 3.9 makes.
At 3 TB/s 5.8e12 and 3.0e12 numbers come a second: 14e12 and 12e12 instructions, where 132 multiprocessors of 128 lanes
at 1.7 GHz can issue 29e12. A first version for one row, without tensor cores, took 5.7: too many.
Past 16 rows W is read and unpacked again for every 16: right, but a bfloat16 matmul, which reads 1.5e12 numbers a
second, wins from M = 16 x 29 / (2.9 x 1.5) = 107 at the latest.

A program owns BLOCK_F rows of W and all of D. Its warps go along D abreast, WAYS blocks at a time (a product of
batches, one for each warp), and add up at the end. So F = 4,096 has a program for almost each multiprocessor of an
H100, with 32 KB of W on their way to it (3 TB/s for 700 ns are 16 KB each), and needs no second pass and no atomics.

Gradient: W is frozen, and dx = dy W with W in memory, which is enough to train adapters on top of it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_kernels.engine import Kernel, architecture

# (BLOCK_M of few rows, of more, BLOCK_F, WAYS, stages); a warp for each way. Found with aot.py and not yet timed: no
# spills, at most 99 KB of shared memory (to serve sm_86, sm_89 and sm_120), two programs a multiprocessor of sm_90.
# BLOCK_F 16 would read x twice as often and take 3.2 instructions a number, 64 leave half the GPU idle at F = 4,096.
TILES = {
    "sm_80": (8, 16, 32, 8, 3),
    "sm_90": (8, 16, 32, 8, 3),
    "sm_100": (8, 16, 32, 8, 3),
    "gfx942": (16, 16, 32, 4, 2),
    "cpu": (8, 16, 32, 4, 1),
}
BLOCK_D = 64  # bytes of a row of int8 that one way takes at a time, as many as a group of 128 has in int4
GROUP_SIZES = (64, 128, 256)
TINY = torch.finfo(torch.bfloat16).tiny  # the smallest scale: a row of zeros needs one too


# --- Quantisation -----------------------------------------------------------------------------------------------------


def _wide(weight: Tensor) -> Tensor:
    """The weight (F, D) in float32."""
    if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"quantize: a weight of {weight.dtype}; float32, float16 and bfloat16 can be quantised")
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(f"quantize: a weight of shape {tuple(weight.shape)}; it must be (F, D), and not empty")
    if not weight.isfinite().all():
        raise ValueError("quantize: the weight holds infinities or NaN, for which no scale is right")
    return weight.detach().float().contiguous()


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(F, D) -> q (F, D) int8, scale (F,) float32"""
    weight = _wide(weight)
    scale = (weight.abs().amax(1) / 127).clamp(min=TINY)
    return (weight / scale[:, None]).round().to(torch.int8), scale


def dequantize_int8(q: Tensor, scale: Tensor) -> Tensor:
    """What quantize_int8 made -> (F, D) float32"""
    return q.float() * scale[:, None]


def quantize_int4(weight: Tensor, group: int = 128) -> tuple[Tensor, Tensor]:
    """(F, D) -> packed (F, D / 2) uint8, scale (F, D / group) bfloat16"""
    weight = _wide(weight)
    rows, width = weight.shape
    if group not in GROUP_SIZES or width % group:
        raise ValueError(f"quantize_int4: rows of {width} in groups of {group}; it must divide them, of {GROUP_SIZES}")
    weight = weight.view(rows, -1, group)
    scale = (weight.abs().amax(2) / 7).clamp(min=TINY).to(torch.bfloat16)  # rounded before it divides
    n = (weight / scale[..., None]).round().to(torch.uint8) + 8
    a, b, c, d = n.view(rows, -1, 4, group // 4).unbind(2)  # (F, D / group, group / 4) each
    return torch.stack((a + 16 * b, c + 16 * d), dim=3).view(rows, -1), scale


def dequantize_int4(packed: Tensor, scale: Tensor) -> Tensor:
    """What quantize_int4 made -> (F, D) float32, exact"""
    first, second = packed.reshape(*scale.shape, -1, 2).unbind(3)  # (F, D / group, group / 4) each
    n = torch.cat((first & 15, first >> 4, second & 15, second >> 4), dim=2)
    return ((n.float() - 8) * scale.float()[..., None]).view(packed.shape[0], -1)


# --- Kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def quarter(words, j: tl.constexpr, dtype: tl.constexpr):
    """Quarter j of each group, as numbers: words (WAYS, BLOCK_F, group / 8) int32 -> (WAYS, BLOCK_F, group / 4)."""
    half: tl.constexpr = tl.float16 if dtype == tl.float16 else tl.bfloat16
    bits: tl.constexpr = 0x64006400 if half == tl.float16 else 0x43004300  # 1024.0 or 128.0, twice
    zero: tl.constexpr = 1032.0 if half == tl.float16 else 136.0
    pairs = ((words >> (4 * j)) & 0x000F000F) | bits
    pairs = tl.join((pairs & 0xFFFF).to(tl.int16), (pairs >> 16).to(tl.int16))  # what it was, in halves: no instruction
    numbers = tl.reshape(pairs, (words.shape[0], words.shape[1], 2 * words.shape[2])).to(half, bitcast=True)
    return (numbers - zero).to(dtype)


@triton.jit
def indices(BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr):
    """The rows of x and of W that this program multiplies: (BLOCK_M,), (BLOCK_F,)"""
    return tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)


@triton.jit
def store_sum(y_ptr, acc, m, f, M, F):
    """The sum of what all ways found, acc (WAYS, BLOCK_F, BLOCK_M), into y."""
    at = m.to(tl.int64)[None, :] * F + f[:, None]  # (BLOCK_F, BLOCK_M)
    inside = (m < M)[None, :] & (f < F)[:, None]
    tl.store(y_ptr + at, tl.sum(acc, axis=0).to(y_ptr.dtype.element_ty), mask=inside)


@Kernel
@triton.jit
def int8_forward(x_ptr, q_ptr, scale_ptr, y_ptr, M, F, D, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr,
                 WAYS: tl.constexpr, BLOCK_D: tl.constexpr):
    """BLOCK_M rows of x and BLOCK_F of W a program; WAYS blocks of D at a time."""
    m, f = indices(BLOCK_M, BLOCK_F)
    way, d = tl.arange(0, WAYS)[:, None, None], tl.arange(0, BLOCK_D)
    d_q, d_x = way * BLOCK_D + d[None, None, :], way * BLOCK_D + d[None, :, None]  # as q, as x^T
    q_ptr += f.to(tl.int64)[None, :, None] * D + d_q  # F D may pass 2^31
    x_ptr += m.to(tl.int64)[None, None, :] * D + d_x
    acc = tl.zeros((WAYS, BLOCK_F, BLOCK_M), tl.float32)
    for start in range(0, D, WAYS * BLOCK_D):
        q = tl.load(q_ptr + start, mask=(f < F)[None, :, None] & (start + d_q < D), other=0)
        x = tl.load(x_ptr + start, mask=(m < M)[None, None, :] & (start + d_x < D), other=0.0)
        acc = tl.dot(q.to(x.dtype), x, acc, input_precision="ieee")
    acc *= tl.load(scale_ptr + f, mask=f < F, other=0.0)[None, :, None]
    store_sum(y_ptr, acc, m, f, M, F)


@Kernel
@triton.jit
def int4_forward(x_ptr, words_ptr, scale_ptr, y_ptr, M, F, N, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr,
                 WAYS: tl.constexpr, GROUP: tl.constexpr):
    """As int8_forward, WAYS of the N groups of a row at a time. Strides are N times constants: wide loads need that."""
    m, f = indices(BLOCK_M, BLOCK_F)
    way, of_x, of_w = tl.arange(0, WAYS)[:, None], (m < M)[None, None, :], (f < F)[None, :]
    group = f.to(tl.int64)[None, :] * N + way  # (WAYS, BLOCK_F), of all the groups of W
    words_ptr += group[:, :, None] * (GROUP // 8) + tl.arange(0, GROUP // 8)[None, None, :]
    d = way * GROUP + tl.arange(0, GROUP // 4)[None, :]  # (WAYS, GROUP / 4): the first quarter
    x_ptr += m.to(tl.int64)[None, None, :] * N * GROUP + d[:, :, None]
    next_scale = tl.load(scale_ptr + group, mask=of_w & (way < N), other=0.0)
    acc = tl.zeros((WAYS, BLOCK_F, BLOCK_M), tl.float32)
    for start in range(0, N, WAYS):
        live, scale, ahead = start + way < N, next_scale, start + WAYS
        words = tl.load(words_ptr + start * (GROUP // 8), mask=(of_w & live)[:, :, None], other=0)
        # a step ahead, as scales are too narrow for the asynchronous copies that bring words and x in time
        next_scale = tl.load(scale_ptr + group + ahead, mask=of_w & (ahead + way < N), other=0.0)
        product = tl.zeros_like(acc)
        for j in tl.static_range(4):
            x = tl.load(x_ptr + start * GROUP + j * (GROUP // 4), mask=of_x & live[:, :, None], other=0.0)
            product = tl.dot(quarter(words, j, x.dtype), x, product, input_precision="ieee")
        acc += product * scale.to(tl.float32)[:, :, None]
    store_sum(y_ptr, acc, m, f, M, F)


# --- Launchers --------------------------------------------------------------------------------------------------------


def launch(kernel: Kernel, x: Tensor, weight: Tensor, scale: Tensor, length: int, bytes_a_way: int, arch: str | None,
           **constants: int) -> Tensor:
    """y. `length`: of a row of W, in numbers or groups; `bytes_a_way`: of a row of W that a way takes at a time."""
    few, many, block_f, ways, stages = TILES[arch or architecture(x)]
    if x.dtype == torch.float32:  # products without tensor cores, out of registers; x takes twice the shared memory
        many, stages = few, 1
    rows, ways = x.numel() // x.shape[-1], min(ways, ways * 64 // bytes_a_way)
    block_m = few if rows <= few else many
    y = torch.empty(*x.shape[:-1], weight.shape[0], dtype=x.dtype, device=x.device)
    if rows:
        grid = (triton.cdiv(rows, block_m), triton.cdiv(weight.shape[0], block_f))
        kernel[grid](x.contiguous(), weight, scale.contiguous(), y, rows, weight.shape[0], length, BLOCK_M=block_m,
                     BLOCK_F=block_f, WAYS=ways, num_warps=ways, num_stages=stages, **constants)
    return y


def check(x: Tensor, weight: Tensor, scale: Tensor, dtypes: tuple[torch.dtype, torch.dtype], packed: int) -> None:
    """Says what does not fit; `packed` numbers lie in each element of `weight`."""
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16) or (weight.dtype, scale.dtype) != dtypes:
        raise TypeError(f"weight_only: x {x.dtype}, weight {weight.dtype}, scale {scale.dtype}; x must be float32, "
                        f"float16 or bfloat16, the others {dtypes[0]} and {dtypes[1]}")
    if (weight.ndim != 2 or 0 in weight.shape or x.shape[-1:] != (packed * weight.shape[1],)
            or scale.shape[:1] != weight.shape[:1] or scale.ndim != (1 if weight.dtype == torch.int8 else 2)):
        raise ValueError(f"weight_only: x {tuple(x.shape)}, weight {tuple(weight.shape)} and scale "
                         f"{tuple(scale.shape)} do not fit one another")


def int8_launch(x: Tensor, q: Tensor, scale: Tensor, arch: str | None = None) -> Tensor:
    """y (..., F)"""
    check(x, q, scale, (torch.int8, torch.float32), 1)
    return launch(int8_forward, x, q.contiguous(), scale, q.shape[1], BLOCK_D, arch, BLOCK_D=BLOCK_D)


def int4_launch(x: Tensor, packed: Tensor, scale: Tensor, arch: str | None = None) -> Tensor:
    """y (..., F)"""
    check(x, packed, scale, (torch.uint8, torch.bfloat16), 2)
    groups = scale.shape[1]
    group = x.shape[-1] // max(1, groups)
    if group not in GROUP_SIZES or groups * group != x.shape[-1]:
        raise ValueError(f"int4_linear: {groups} scales for rows of {x.shape[-1]}; groups have {GROUP_SIZES} numbers")
    words = packed.contiguous().view(torch.int32)
    return launch(int4_forward, x, words, scale, groups, group // 2, arch, GROUP=group)


# --- Ops: what torch.compile, autograd and checkpointing see ----------------------------------------------------------


@torch.library.custom_op("nanomai::int8_linear", mutates_args=())
def int8_linear_op(x: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    """y"""
    return int8_launch(x, q, scale)


@torch.library.custom_op("nanomai::int4_linear", mutates_args=())
def int4_linear_op(x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    """y"""
    return int4_launch(x, packed, scale)


def _save(ctx, inputs: tuple, output: Tensor) -> None:
    if ctx.needs_input_grad[2]:
        raise ValueError("weight_only: a scale that requires grad; the weight is frozen, only x gets a gradient")
    ctx.save_for_backward(*inputs[1:])


def _register(op, dequantize) -> None:
    """The shape and the gradient of an op. Training has rows enough to make W a matrix in memory for them."""

    def gradients(ctx, dy: Tensor) -> tuple[Tensor, None, None]:
        return dy @ dequantize(*ctx.saved_tensors).to(dy.dtype), None, None

    op.register_fake(lambda x, weight, scale: x.new_empty(*x.shape[:-1], weight.shape[0]))
    op.register_autograd(gradients, setup_context=_save)


_register(int8_linear_op, dequantize_int8)
_register(int4_linear_op, dequantize_int4)


def int8_linear(x: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    """x W^T with W as quantize_int8 made it: (..., D) -> (..., F)"""
    return int8_linear_op(x, q, scale)


def int4_linear(x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    """x W^T with W as quantize_int4 made it (the shape of scale tells the group): (..., D) -> (..., F)"""
    return int4_linear_op(x, packed, scale)
