"""A matrix product in tiles, for the lesson 11b: training calls torch's own product, which is faster.

Shapes: a (M, K), b (K, N), c (M, N), of any strides: a transposed matrix is read where it lies.

    c_mn = sum over k of a_mk b_kn

A program owns one tile of c, (BLOCK_M, BLOCK_N), and keeps its sums in registers, in float32. It walks along K in
steps of BLOCK_K, takes the two tiles of a and b that meet there, and adds their product. Each number that it reads
serves a whole row or column of its tile, which is the point: the traffic in bytes, e a number, is

    a  e M K ceil(N / BLOCK_N)        b  e K N ceil(M / BLOCK_M)        c  e M N

so that for each byte of a and b there are 2 BLOCK_M BLOCK_N / (e (BLOCK_M + BLOCK_N)) floating point operations: 64
at 128 x 128 in bfloat16. Memory that copies 3.0 TB/s would then hold the product at 192 TFLOP/s, and an H100 computes
four times that. The rest must come from the L2 cache, and so the order of the programs matters: those that run at the
same time should share rows of a and columns of b. GROUP rows of tiles are therefore walked column by column:

    GROUP = 1:  0 1 2 3        GROUP = 2:  0 2 4 6        W programs at once read GROUP strips of a and W / GROUP of b:
                4 5 6 7                    1 3 5 7        fewest where the two are equal

Backward: da = dc b^T, db = a^T dc, the same kernel on transposed views.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_kernels.engine import Kernel

# On sm_90 the products of 16-bit numbers run on tensor cores out of shared memory, those of float32 out of registers.
TILE_16 = {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "GROUP": 8, "num_warps": 8, "num_stages": 3}
TILE_32 = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16, "GROUP": 8, "num_warps": 8, "num_stages": 1}


# --- Kernel -----------------------------------------------------------------------------------------------------------


@triton.jit
def place(program, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """The row and the column, counted in tiles, of the tile of c that is this program's."""
    rows, columns = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first = program // (GROUP * columns) * GROUP  # row of its group
    height = tl.minimum(GROUP, rows - first)  # the last group may be lower
    within = program % (GROUP * columns)
    return first + within % height, within // height


@Kernel
@triton.jit
def matmul_tiles(a_ptr, b_ptr, c_ptr, M, N, K, a_m, a_k, b_k, b_n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                 BLOCK_K: tl.constexpr, GROUP: tl.constexpr):
    """A program: one tile of c, which is contiguous."""
    i, j = place(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP)
    row = i.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # (BLOCK_M,); M K may pass 2^31
    column = j.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    k = tl.arange(0, BLOCK_K)  # (BLOCK_K,)
    a_at = a_ptr + row[:, None] * a_m + k[None, :] * a_k  # (BLOCK_M, BLOCK_K)
    b_at = b_ptr + k[:, None] * b_k + column[None, :] * b_n  # (BLOCK_K, BLOCK_N)
    c = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        inside = start + k < K  # a zero past the end of a row adds nothing; the next row would
        a = tl.load(a_at, mask=(row < M)[:, None] & inside[None, :], other=0.0)
        b = tl.load(b_at, mask=inside[:, None] & (column < N)[None, :], other=0.0)
        c = tl.dot(a, b, c, input_precision="ieee")
        a_at += BLOCK_K * a_k
        b_at += BLOCK_K * b_k
    c_at = c_ptr + row[:, None] * N + column[None, :]
    tl.store(c_at, c.to(c_ptr.dtype.element_ty), mask=(row < M)[:, None] & (column < N)[None, :])


# --- Launcher ---------------------------------------------------------------------------------------------------------


def multiply(a: Tensor, b: Tensor, **tile: int) -> Tensor:
    """a b; `tile` replaces what is chosen for their dtype: BLOCK_M, BLOCK_N, BLOCK_K, GROUP, num_warps, num_stages."""
    if a.dtype != b.dtype or a.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"matmul: {a.dtype} and {b.dtype}; one of float32, bfloat16, float16 for both")
    if not a.ndim == b.ndim == 2 or a.shape[1] != b.shape[0]:
        raise ValueError(f"matmul: {tuple(a.shape)} and {tuple(b.shape)}; must be (M, K) and (K, N)")
    meta = (TILE_32 if a.dtype == torch.float32 else TILE_16) | tile
    (m, k), n = a.shape, b.shape[1]
    c = torch.empty((m, n), dtype=a.dtype, device=a.device)
    programs = triton.cdiv(m, meta["BLOCK_M"]) * triton.cdiv(n, meta["BLOCK_N"])
    if programs:
        matmul_tiles[(programs,)](a, b, c, m, n, k, *a.stride(), *b.stride(), **meta)
    return c


# --- Op: what torch.compile, autograd and checkpointing see -----------------------------------------------------------


@torch.library.custom_op("nanomai::matmul", mutates_args=())
def matmul_op(a: Tensor, b: Tensor) -> Tensor:
    """(M, K) and (K, N) -> (M, N)"""
    return multiply(a, b)


matmul_op.register_fake(lambda a, b: a.new_empty(a.shape[0], b.shape[1]))


def _save(ctx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx, dc: Tensor) -> tuple[Tensor | None, ...]:
    a, b = ctx.saved_tensors
    needs_a, needs_b = ctx.needs_input_grad
    return matmul_op(dc, b.T) if needs_a else None, matmul_op(a.T, dc) if needs_b else None


matmul_op.register_autograd(_gradients, setup_context=_save)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a b, summed in float32: (M, K) and (K, N) -> (M, N)"""
    return matmul_op(a, b)
