"""Linear layers of a mixture of experts: one product for all experts, the gather of tokens and SwiGLU inside it.

Shapes: T tokens x (T, D); N = T k (token, expert) pairs, sorted by expert; index (N,) the token of each pair; ends (E,)
int32 on the device, not decreasing, at most N: expert e has rows [ends[e - 1], ends[e]), or none. Weights (E, F, D).
Rows from ends[-1] on belong to nobody: their results and gradients are zeros, and what they hold is never used.

    grouped_linear    y_i = x_i W_e^T                                          (N, D) -> (N, F)
    grouped_swiglu    g_i = x_index(i) G_e^T,  u_i = x_index(i) U_e^T          (T, D) -> (N, F)
                      h_i = silu(g_i) u_i      (the gathered rows of x, e N D bytes, never lie in memory)

Which expert has how many rows, the CPU never knows. The grid is for the worst case: cdiv(N, BLOCK_M) + E tiles of rows,
since each of the E + 1 parts (nobody's rows are one) but one can cost a tile that is not full. A program loads `ends`,
counts the tiles of all experts at once and finds its own; programs that are left over find no rows.

Backward of the linear layer. dx_i = dy_i W_e is the same kernel with two strides of the weight exchanged;
dW_e = sum of dy_i^T x_i over the rows of e, each tile of one expert in one program's registers.

Backward of SwiGLU. swiglu.py makes dg_i, du_i of dh_i, g_i, u_i. dG_e and dU_e are as dW_e, the rows of x gathered
again. A pair's row of dx is dg_i G_e + du_i U_e, one sum in registers; dx_t adds up the rows of token t in float32, in
the order of the experts, as a stable sort of `index` lists them: no atomics, so the same bits each time.

Should g and u be kept for it, or computed again? Again: 4 D operations for each number of h, D / 200 ps at 800 TFLOP/s.
Kept: each is written once and read once, 4 e bytes, 2.7 ps at 3 TB/s in bfloat16; less from D = 530 on, an eighth at
D = 4096. So they are kept, 2 e N F bytes, and whoever needs that memory checkpoints the layer.

Operations: the linear layer 2 N D F forward, 4 N D F backward; SwiGLU twice that.
Memory traffic in bytes, e a number; M tiles of rows are some expert's, P programs; caches serve most of it:
    linear          e D (N cdiv(F, BLOCK_N) + M F) + e N F + 8 E P          (dx: D and F exchanged)
    SwiGLU          e D (N cdiv(F, BLOCK_N) + 2 M F) + e N F (h [+ g + u]) + index N cdiv(F, BLOCK_N) + 8 E P
    dW              e N (F cdiv(D, BLOCK_N) + D cdiv(F, BLOCK_M)) + E F D
    sum of pairs    e D (N + T) + its lists, once for each BLOCK of D
Operands of products have x's dtype, sums are float32. A weight in another dtype is rounded for it; its gradient is not.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from triton_kernels import swiglu
from triton_kernels.engine import Kernel
from triton_kernels.grouped_tiles import constants, rows_of, tile_of

SUM_BLOCK = 1024  # numbers of a token's row that one program sums: 8 a thread, one 128-bit load in bfloat16


@triton.jit
def _add_product(acc, a_ptr, w_ptr, a_at, w_at, inside, bounded, K, w_k, BLOCK_K: tl.constexpr):
    """acc + a w, over K. What moves is a scalar of 64 bits; the offsets inside a block, a_at and w_at, have 32."""
    k = tl.arange(0, BLOCK_K)
    for start in tl.range(0, K, BLOCK_K):
        a = tl.load(a_ptr + a_at, mask=inside & (k < K - start)[None, :], other=0.0)  # (BLOCK_M, BLOCK_K)
        w = tl.load(w_ptr + w_at, mask=bounded & (k < K - start)[:, None], other=0.0)  # (BLOCK_K, BLOCK_N)
        acc = tl.dot(a, w, acc, input_precision="ieee")
        a_ptr += BLOCK_K
        w_ptr += BLOCK_K * w_k
    return acc


# --- Kernels ----------------------------------------------------------------------------------------------------------


@Kernel
@triton.jit
def grouped_product(a_ptr, b_ptr, w_ptr, v_ptr, y_ptr, ends_ptr, N, K, C, E, w_e, w_c, w_k, PARTS: tl.constexpr,
                    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """A program: a tile of y (N, C) = a (N, K) times w[e] (K, C); plus b times v[e] where there is a b."""
    strips = tl.cdiv(C, BLOCK_N)
    tile, strip = tile_of(tl.program_id(0), tl.num_programs(0) // strips, strips, GROUP)
    expert, first, end = rows_of(ends_ptr, tile, N, E, PARTS, BLOCK_M)
    m, n, k = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    inside, bounded = first + m < end, (strip * BLOCK_N + n < C)[None, :]
    a_first, w_first = first * K, expert * w_e + strip.to(tl.int64) * BLOCK_N * w_c
    a_at, w_at = m * K + k[None, :], n[None, :] * w_c + k[:, None] * w_k
    depth = tl.where(expert < E, K, 0)  # nobody's rows stay zeros
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc = _add_product(acc, a_ptr + a_first, w_ptr + w_first, a_at, w_at, inside, bounded, depth, w_k, BLOCK_K)
    if b_ptr is not None:
        acc = _add_product(acc, b_ptr + a_first, v_ptr + w_first, a_at, w_at, inside, bounded, depth, w_k, BLOCK_K)
    y_ptr += first * C + strip * BLOCK_N
    tl.store(y_ptr + m * C + n[None, :], acc.to(y_ptr.dtype.element_ty), mask=inside & bounded)


@Kernel
@triton.jit
def grouped_swiglu_forward(x_ptr, index_ptr, w_ptr, v_ptr, h_ptr, gate_ptr, up_ptr, ends_ptr, N, D, F, E,
                           PARTS: tl.constexpr, GROUP: tl.constexpr,
                           BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """A program: a tile of h (N, F), and of gate and up unless they are None. w, v: the weights of gate and up."""
    strips = tl.cdiv(F, BLOCK_N)
    tile, strip = tile_of(tl.program_id(0), tl.num_programs(0) // strips, strips, GROUP)
    expert, first, end = rows_of(ends_ptr, tile, N, E, PARTS, BLOCK_M)
    m, n, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    inside, bounded = (first + m < end)[:, None], (strip * BLOCK_N + n < F)[None, :]
    token = tl.load(index_ptr + first + m, mask=first + m < end, other=0).to(tl.int64)
    x_at, w_at = token[:, None] * D + k[None, :], n[None, :] * D + k[:, None]
    w_first = (expert * F + strip * BLOCK_N) * D
    gate, up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32), tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in tl.range(0, tl.where(expert < E, D, 0), BLOCK_K):
        of_w = bounded & (k < D - start)[:, None]
        x = tl.load(x_ptr + start + x_at, mask=inside & (k < D - start)[None, :], other=0.0)  # (BLOCK_M, BLOCK_K)
        w = tl.load(w_ptr + w_first + start + w_at, mask=of_w, other=0.0)  # (BLOCK_K, BLOCK_N)
        v = tl.load(v_ptr + w_first + start + w_at, mask=of_w, other=0.0)
        gate = tl.dot(x, w, gate, input_precision="ieee")
        up = tl.dot(x, v, up, input_precision="ieee")
    at, inside = m[:, None] * F + n[None, :], inside & bounded
    h_ptr += first * F + strip * BLOCK_N
    tl.store(h_ptr + at, (gate * up / (1.0 + tl.exp(-gate))).to(h_ptr.dtype.element_ty), mask=inside)
    if gate_ptr is not None:
        gate_ptr += first * F + strip * BLOCK_N
        up_ptr += first * F + strip * BLOCK_N
        tl.store(gate_ptr + at, gate.to(gate_ptr.dtype.element_ty), mask=inside)
        tl.store(up_ptr + at, up.to(up_ptr.dtype.element_ty), mask=inside)


@Kernel
@triton.jit
def grouped_dw(dy_ptr, x_ptr, index_ptr, dw_ptr, ends_ptr, F, D, GROUP: tl.constexpr,
               BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """A program: a tile (BLOCK_M, BLOCK_N) of one expert's dw (F, D), over its rows of dy and x."""
    i, j = tile_of(tl.program_id(0), tl.cdiv(F, BLOCK_M), tl.cdiv(D, BLOCK_N), GROUP)
    expert = tl.program_id(1).to(tl.int64)
    f, d, k = i * BLOCK_M + tl.arange(0, BLOCK_M), j * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    begin = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends_ptr + expert)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in tl.range(begin, end, BLOCK_K):
        row, inside = tl.cast(start, tl.int64) + k, (start + k < end)[:, None]
        dy = tl.load(dy_ptr + row[:, None] * F + f[None, :], mask=inside & (f < F)[None, :], other=0.0)
        if index_ptr is not None:
            row = tl.load(index_ptr + row, mask=start + k < end, other=0).to(tl.int64)
        x = tl.load(x_ptr + row[:, None] * D + d[None, :], mask=inside & (d < D)[None, :], other=0.0)
        acc = tl.dot(tl.trans(dy), x, acc, input_precision="ieee")
    at = (expert * F + f)[:, None] * D + d[None, :]
    tl.store(dw_ptr + at, acc.to(dw_ptr.dtype.element_ty), mask=(f < F)[:, None] & (d < D)[None, :])


@Kernel
@triton.jit
def sum_of_pairs(rows_ptr, order_ptr, starts_ptr, y_ptr, D, BLOCK: tl.constexpr):
    """A program: BLOCK numbers of y[t] = the sum of rows[order[i]] over starts[t] <= i < starts[t + 1]."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for i in tl.range(tl.load(starts_ptr + token), tl.load(starts_ptr + token + 1)):
        row = tl.load(order_ptr + i)
        acc += tl.load(rows_ptr + row * D + column, mask=column < D, other=0.0).to(tl.float32)
    tl.store(y_ptr + token * D + column, acc.to(y_ptr.dtype.element_ty), mask=column < D)


# --- Launchers: they allocate, choose the tiles, and launch -----------------------------------------------------------


def product(a: Tensor, w: Tensor, ends: Tensor, b: Tensor | None = None, v: Tensor | None = None,
            arch: str | None = None) -> Tensor:
    """a w[e]^T + b v[e]^T: a, b (N, K); w, v (E, C, K), alike in their strides -> (N, C)"""
    (rows, depth), (experts, columns) = a.shape, w.shape[:2]
    y, meta = torch.empty(rows, columns, dtype=a.dtype, device=a.device), constants("product", a, columns, arch)
    if y.numel():
        tiles = triton.cdiv(rows, meta["BLOCK_M"]) + experts
        grouped_product[(tiles * triton.cdiv(columns, meta["BLOCK_N"]),)](
            a, b, w, v, y, ends, rows, depth, columns, experts, *w.stride(),
            PARTS=triton.next_power_of_2(experts + 1), **meta)
    return y


def weight_gradient(dy: Tensor, x: Tensor, weight: Tensor, ends: Tensor, index: Tensor | None = None,
                    arch: str | None = None) -> Tensor:
    """dw (E, F, D), in the weight's dtype; zeros for an expert without rows"""
    experts, F, D = weight.shape
    meta = constants("dw" if index is None else "gathered dw", x, F, arch)
    dw = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    if dw.numel():
        tiles = triton.cdiv(F, meta["BLOCK_M"]) * triton.cdiv(D, meta["BLOCK_N"])
        grouped_dw[(tiles, experts)](dy, x, index, dw, ends, F, D, **meta)
    return dw


def linear_forward(x: Tensor, weight: Tensor, ends: Tensor, arch: str | None = None) -> Tensor:
    """y (N, F)"""
    return product(x.contiguous(), weight.to(x.dtype).contiguous(), ends, arch=arch)


def linear_backward(dy: Tensor, x: Tensor, weight: Tensor, ends: Tensor,
                    arch: str | None = None) -> tuple[Tensor, Tensor]:
    """(dx, dw)"""
    dy, x, w = dy.contiguous(), x.contiguous(), weight.to(x.dtype).contiguous()
    return product(dy, w.transpose(1, 2), ends, arch=arch), weight_gradient(dy, x, weight, ends, arch=arch)


def swiglu_forward(x: Tensor, w_gate: Tensor, w_up: Tensor, ends: Tensor, index: Tensor, with_gradients: bool,
                   arch: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(h, gate, up); gate and up of size 0 where no gradients are wanted"""
    x, w, v = x.contiguous(), w_gate.to(x.dtype).contiguous(), w_up.to(x.dtype).contiguous()
    (rows,), (experts, F, D) = index.shape, w.shape
    meta = constants("swiglu", x, F, arch)
    kept = (rows, F) if with_gradients else 0
    h, gate, up = (torch.empty(shape, dtype=x.dtype, device=x.device) for shape in ((rows, F), kept, kept))
    if h.numel():
        tiles = triton.cdiv(rows, meta["BLOCK_M"]) + experts
        grouped_swiglu_forward[(tiles * triton.cdiv(F, meta["BLOCK_N"]),)](
            x, index.contiguous(), w, v, h, *((gate, up) if with_gradients else (None, None)), ends, rows, D, F,
            experts, PARTS=triton.next_power_of_2(experts + 1), **meta)
    return h, gate, up


def swiglu_backward(dh: Tensor, x: Tensor, w_gate: Tensor, w_up: Tensor, gate: Tensor, up: Tensor, ends: Tensor,
                    index: Tensor, arch: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dw_gate, dw_up)"""
    x, index = x.contiguous(), index.contiguous()
    w, v = (weight.to(x.dtype).contiguous().transpose(1, 2) for weight in (w_gate, w_up))
    dgate, dup = swiglu.backward(dh, gate, up)
    of_pairs = product(dgate, w, ends, dup, v, arch=arch)
    tokens, order = index.sort(stable=True)
    starts = torch.searchsorted(tokens, torch.arange(x.shape[0] + 1, dtype=index.dtype, device=index.device))
    dx = torch.empty_like(x)
    if dx.numel():
        grid = x.shape[0], triton.cdiv(x.shape[1], SUM_BLOCK)
        sum_of_pairs[grid](of_pairs, order, starts, dx, x.shape[1], BLOCK=SUM_BLOCK, num_warps=4)
    return (dx, weight_gradient(dgate, x, w_gate, ends, index, arch),
            weight_gradient(dup, x, w_up, ends, index, arch))


# --- Ops: what torch.compile, autograd and checkpointing see ----------------------------------------------------------

linear_op = torch.library.custom_op("nanomai::grouped_linear", linear_forward, mutates_args=())
linear_backward_op = torch.library.custom_op("nanomai::grouped_linear_backward", linear_backward, mutates_args=())
swiglu_op = torch.library.custom_op("nanomai::grouped_swiglu", swiglu_forward, mutates_args=())
swiglu_backward_op = torch.library.custom_op("nanomai::grouped_swiglu_backward", swiglu_backward, mutates_args=())


def _like(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in tensors)


linear_op.register_fake(lambda x, weight, ends, arch=None: x.new_empty(x.shape[0], weight.shape[1]))
linear_backward_op.register_fake(lambda dy, x, weight, ends, arch=None: _like(x, weight))
swiglu_backward_op.register_fake(lambda dh, x, w_gate, w_up, *_: _like(x, w_gate, w_up))


@swiglu_op.register_fake
def _(x, w_gate, w_up, ends, index, with_gradients, arch=None):
    h = x.new_empty(index.shape[0], w_gate.shape[1])
    return (h, *_like(h, h)) if with_gradients else (h, x.new_empty(0), x.new_empty(0))


# Operations of the products. How many of the N rows are somebody's, the CPU does not know: all are counted.
register_flop_formula(torch.ops.nanomai.grouped_linear)(lambda x, w, *_, **__: 2 * x[0] * w[1] * w[2])
register_flop_formula(torch.ops.nanomai.grouped_linear_backward)(lambda dy, x, w, *_, **__: 4 * x[0] * w[1] * w[2])
register_flop_formula(torch.ops.nanomai.grouped_swiglu)(lambda x, w, v, ends, i, *_, **__: 4 * i[0] * w[1] * w[2])
register_flop_formula(torch.ops.nanomai.grouped_swiglu_backward)(lambda dh, x, w, *_, **__: 8 * dh[0] * w[1] * w[2])


def _save_linear(ctx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])


def _save_swiglu(ctx, inputs: tuple, output: tuple) -> None:
    ctx.set_materialize_grads(False)  # nobody differentiates gate and up
    x, w_gate, w_up, ends, index, *_ = inputs
    ctx.save_for_backward(x, w_gate, w_up, *output[1:], ends, index)


linear_op.register_autograd(lambda ctx, dy: (*linear_backward_op(dy, *ctx.saved_tensors), None, None),
                            setup_context=_save_linear)
swiglu_op.register_autograd(
    lambda ctx, dh, *_: (*swiglu_backward_op(dh, *ctx.saved_tensors), None, None, None, None),
    setup_context=_save_swiglu)


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Each row through its expert's linear layer: (N, D), (E, F, D), (E,) -> (N, F)"""
    _check("grouped_linear", x, weight, weight, ends)
    return linear_op(x, weight, ends.contiguous())


def grouped_swiglu(x: Tensor, w_gate: Tensor, w_up: Tensor, ends: Tensor, index: Tensor) -> Tensor:
    """silu(x[index] w_gate[e]^T) * (x[index] w_up[e]^T): (T, D), two of (E, F, D), (E,), (N,) -> (N, F)"""
    _check("grouped_swiglu", x, w_gate, w_up, ends)
    if index.ndim != 1 or index.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"grouped_swiglu: index {tuple(index.shape)} {index.dtype}; (N,) of int32 or int64 is needed")
    needs = any(t.requires_grad for t in (x, w_gate, w_up))
    return swiglu_op(x, w_gate, w_up, ends.contiguous(), index, torch.is_grad_enabled() and needs)[0]


def _check(name: str, x: Tensor, weight: Tensor, second: Tensor, ends: Tensor) -> None:
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"{name}: the kernel computes in float32; {x.dtype} needs the plain definition")
    if (x.ndim != 2 or weight.ndim != 3 or weight.shape[2] != x.shape[1] or second.shape != weight.shape
            or ends.shape != weight.shape[:1] or ends.dtype != torch.int32 or not len(ends)):
        shapes = ", ".join(str(tuple(t.shape)) for t in (x, weight, second, ends))
        raise ValueError(f"{name}: x (rows, D), weights (E, F, D) and ends (E,) in int32, E at least 1, are needed; "
                         f"these are {shapes} in {ends.dtype}")
