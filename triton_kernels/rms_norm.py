"""RMSNorm and residual-add + RMSNorm, forward and backward (Zhang & Sennrich 2019, arXiv 1910.07467).

Shapes: x, residual, s, y (..., D), seen as N rows of D; weight (D,); rstd (...,) float32.

Forward, for each row:    s = x + residual                      the residual stream (s = x without one)
                          r = (mean(s^2) + eps)^(-1/2)          kept as rstd: 4 bytes save a second pass over s
                          y = s r w

Backward. Call n = s r the normalised row and g = dy w. Since dr/ds_j = -r^3 s_j / D,

    dL/ds_j = sum_i g_i (r [i = j] + s_i dr/ds_j) = r (g_j - n_j mean(g n))

plus the gradient ds that reaches s along the residual stream itself; x and residual both receive the sum. And
dL/dw_j = sum over rows of dy_j n_j.

Memory traffic in bytes (e a number of x; the weight is read once by each program, and is served by L2):
    forward   e N D (x [+ residual] [+ s] + y) + 4 N          with the sum 4 e N D
    backward  e N D (dy + s [+ ds] + dx) + 4 N                with ds      4 e N D
    dw        4 P D written and read again, P programs
Nothing is computed that takes longer than these bytes do: at 3 TB/s, N = 16,384 and D = 2,048 in bfloat16 the
forward pass with the sum takes 89 us at least.

All arithmetic is in float32; s is rounded to its own dtype before its mean square is taken, so that backward, which
reads it from memory, sees the same numbers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_kernels.engine import Kernel

TILE = 2048  # elements of a tile of short rows: 16 a thread at 4 warps
MAX_WIDTH = 8192  # a row must fit into the registers of one program: at 16,384 the backward pass spills on sm_90
BACKWARD_PROGRAMS = 512  # about four for each multiprocessor of an H100; each writes one row of partial dw


# --- Kernels ----------------------------------------------------------------------------------------------------------


@Kernel
@triton.jit
def rms_norm_forward(x_ptr, residual_ptr, weight_ptr, s_ptr, y_ptr, rstd_ptr, N, D, eps,
                     ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """ROWS rows a program, each whole. residual_ptr and s_ptr are both None or both tensors."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # (ROWS,); N D may pass 2^31
    column = tl.arange(0, BLOCK)  # (BLOCK,)
    at = row[:, None] * D + column[None, :]  # (ROWS, BLOCK)
    inside = (row < N)[:, None] & (column < D)[None, :]
    s = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        s += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
        s = s.to(s_ptr.dtype.element_ty)
        tl.store(s_ptr + at, s, mask=inside)
        s = s.to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(s * s, axis=1) / D + eps)  # (ROWS,)
    weight = tl.load(weight_ptr + column, mask=column < D, other=0.0).to(tl.float32)
    y = s * rstd[:, None] * weight[None, :]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(rstd_ptr + row, rstd, mask=row < N)


@Kernel
@triton.jit
def rms_norm_backward(dy_ptr, ds_ptr, s_ptr, weight_ptr, rstd_ptr, dx_ptr, partial_ptr, N, D, STEPS,
                      ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """STEPS tiles of ROWS rows a program, one after another; dw of all of them stays in registers to the end."""
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)  # (BLOCK,)
    weight = tl.load(weight_ptr + column, mask=column < D, other=0.0).to(tl.float32)
    dweight = tl.zeros((ROWS, BLOCK), tl.float32)
    for step in range(0, STEPS):
        row = (program * STEPS + step) * ROWS + tl.arange(0, ROWS)  # (ROWS,)
        at = row[:, None] * D + column[None, :]  # (ROWS, BLOCK)
        inside = (row < N)[:, None] & (column < D)[None, :]
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, mask=row < N, other=0.0)
        normed = tl.load(s_ptr + at, mask=inside, other=0.0).to(tl.float32) * rstd[:, None]
        g = dy * weight[None, :]
        ds = rstd[:, None] * (g - normed * (tl.sum(g * normed, axis=1) / D)[:, None])
        if ds_ptr is not None:
            ds += tl.load(ds_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + at, ds.to(dx_ptr.dtype.element_ty), mask=inside)
        dweight += dy * normed
    tl.store(partial_ptr + program * D + column, tl.sum(dweight, axis=0), mask=column < D)


# --- Launchers: they allocate, choose the tiles, and launch -----------------------------------------------------------


def tiles(x: Tensor) -> dict[str, int]:
    """ROWS and BLOCK of a program, and its warps, for rows as wide as x's."""
    if x.dtype == torch.float64:
        raise TypeError("rms_norm: the kernel computes in float32; float64 needs the plain definition")
    if not 0 < x.shape[-1] <= MAX_WIDTH:
        raise ValueError(f"rms_norm: rows of {x.shape[-1]} numbers; 1 to {MAX_WIDTH} fit")
    block = triton.next_power_of_2(x.shape[-1])
    return {"ROWS": max(1, TILE // block), "BLOCK": block, "num_warps": min(16, max(4, block // 512))}


def forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor | None, Tensor, Tensor]:
    """(s or None, y, rstd)"""
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: a weight of shape {tuple(weight.shape)} for rows of {x.shape[-1]} numbers")
    if residual is not None and (residual.shape, residual.dtype) != (x.shape, x.dtype):
        raise ValueError(f"rms_norm: x is {tuple(x.shape)} {x.dtype}, residual {tuple(residual.shape)} "
                         f"{residual.dtype}; they must be alike")
    meta, x, weight = tiles(x), x.contiguous(), weight.contiguous()
    rows = x.numel() // x.shape[-1]
    s = torch.empty_like(x) if residual is not None else None
    residual = residual.contiguous() if residual is not None else None
    y, rstd = torch.empty_like(x), torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if rows:
        grid = (triton.cdiv(rows, meta["ROWS"]),)
        rms_norm_forward[grid](x, residual, weight, s, y, rstd, rows, x.shape[-1], eps, **meta)
    return s, y, rstd


def backward(dy: Tensor, ds: Tensor | None, s: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """(dx, dweight)"""
    meta, width = tiles(s), s.shape[-1]
    dy, s, weight = dy.contiguous(), s.contiguous(), weight.contiguous()
    ds = ds.contiguous() if ds is not None else None
    rows = s.numel() // width
    steps = max(1, triton.cdiv(rows, meta["ROWS"] * BACKWARD_PROGRAMS))
    programs = triton.cdiv(rows, meta["ROWS"] * steps)
    dx, partial = torch.empty_like(s), torch.empty(programs, width, dtype=torch.float32, device=s.device)
    if programs:
        rms_norm_backward[(programs,)](dy, ds, s, weight, rstd, dx, partial, rows, width, steps, **meta)
    return dx, partial.sum(0).to(weight.dtype)


# --- Ops: what torch.compile, autograd and checkpointing see ----------------------------------------------------------


@torch.library.custom_op("nanomai::rms_norm", mutates_args=())
def rms_norm_op(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(y, rstd)"""
    return forward(x, None, weight, eps)[1:]


@torch.library.custom_op("nanomai::add_rms_norm", mutates_args=())
def add_rms_norm_op(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(s, y, rstd)"""
    return forward(x, residual, weight, eps)


@torch.library.custom_op("nanomai::rms_norm_backward", mutates_args=())
def rms_norm_backward_op(dy: Tensor, ds: Tensor | None, s: Tensor, weight: Tensor,
                         rstd: Tensor) -> tuple[Tensor, Tensor]:
    """(dx, dweight)"""
    return backward(dy, ds, s, weight, rstd)


def _rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """What the launchers allocate: a contiguous tensor like x, and a float32 for each of its rows."""
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)


rms_norm_op.register_fake(lambda x, weight, eps: _rows(x))
add_rms_norm_op.register_fake(lambda x, residual, weight, eps: (x.new_empty(x.shape), *_rows(x)))
rms_norm_backward_op.register_fake(lambda dy, ds, s, weight, rstd:
                                   (s.new_empty(s.shape), weight.new_empty(weight.shape)))


def _save(ctx, inputs: tuple, output: tuple) -> None:
    ctx.set_materialize_grads(False)  # a result that nobody used costs no zeros to read
    s, weight = (output[0], inputs[2]) if len(output) == 3 else inputs[:2]
    ctx.save_for_backward(s, weight, output[-1])


def _gradients(ctx, dy: Tensor | None, ds: Tensor | None) -> tuple[Tensor, Tensor]:
    s, weight, rstd = ctx.saved_tensors
    return rms_norm_backward_op(torch.zeros_like(s) if dy is None else dy, ds, s, weight, rstd)


def _rms_norm_gradients(ctx, dy: Tensor | None, _drstd: None) -> tuple[Tensor | None, ...]:
    return (*_gradients(ctx, dy, None), None)


def _add_rms_norm_gradients(ctx, ds: Tensor | None, dy: Tensor | None, _drstd: None) -> tuple[Tensor | None, ...]:
    dx, dweight = _gradients(ctx, dy, ds)
    return dx, dx, dweight, None


rms_norm_op.register_autograd(_rms_norm_gradients, setup_context=_save)
add_rms_norm_op.register_autograd(_add_rms_norm_gradients, setup_context=_save)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension: (..., D) -> (..., D)"""
    return rms_norm_op(x, weight, eps)[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(s, rms_norm(s)) with s = x + residual: two of (..., D) -> two of (..., D)"""
    return add_rms_norm_op(x, residual, weight, eps)[:2]
