"""Cross-entropy of rows that are too long for one block: online softmax, the gradient in place or of its own.

Shapes: logits z (N, V); targets t (N,) int64, IGNORE where there is no loss; bias b (V,), added in float32, or None;
losses and lse (N,) float32; d_logits as logits.

Forward, for each row:    lse = log sum_j exp(z_j + b_j)
                          loss = lse - z_t - b_t,   their sum over the rows that count is L

Online (Milakov & Gimelshein 2018, arXiv 1805.02867): block after block, m is the largest logit so far and
s = sum_j exp(z_j - m) over those seen. A larger m' makes the old sum s exp(m - m'), so one reading of the row gives
both, and lse = m + log s.

Backward. d lse / dz_j = exp(z_j - lse), the softmax p_j, and so

    dL/dz_j = p_j - [j = t]   of a row that counts,   0 of one that is ignored

It needs z and lse, not p: 4 bytes a row are saved, and no second (N, V) tensor lives from forward to backward. As a
float32, lse is exact to |lse| 2^-24: a softmax of logits around 30 to 2e-6.

Memory traffic in bytes (e a logit; an ignored row is not read):
    loss alone            e N V (z)                  + (16 + e) N (t, losses, lse, z_t once more)
    its gradient later    e N V (z + dz)             + 12 N (t, lse)
    both in one launch    e N V (z + z + dz)         + (16 + e) N; L2 serves the second z where rows in flight fit
`cross_entropy` reads, and later reads and writes: 3 e N V, at 3 TB/s 1.65 ms for N = 16,384 and V = 50,304 in
bfloat16. It leaves the caller's logits alone. One launch for both would have to be scaled afterwards, which is 2 e N V
more; it is for who owns the logits and wants their gradient in their place: linear_cross_entropy.py.

A target outside of the V classes makes its row, and with it the loss, NaN: to raise an error, the CPU would have to
wait for the GPU. V should be a multiple of 16 bytes / e, or the rows are unaligned and load number by number.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_kernels.engine import Kernel

IGNORE = -100  # a target that carries no loss
BLOCK = 8192  # logits that a program holds at once: 16 a thread at 16 warps


# --- Kernels: one row a program ---------------------------------------------------------------------------------------


@triton.jit
def load_logits(row_ptr, bias_ptr, column, inside):
    """z + b in float32, -inf where not inside."""
    z = tl.load(row_ptr + column, mask=inside, other=float("-inf")).to(tl.float32)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    return z


@triton.jit
def log_sum_exp(row_ptr, bias_ptr, length, BLOCK: tl.constexpr):
    """lse of the first `length` logits of a row, in one reading."""
    largest = tl.full((), -3.4e38, tl.float32)  # finite: exp(-inf - -inf) is NaN, and a row may begin with -inf
    total = tl.zeros((), tl.float32)
    for start in range(0, length, BLOCK):
        column = start + tl.arange(0, BLOCK)  # (BLOCK,)
        z = load_logits(row_ptr, bias_ptr, column, column < length)
        before = largest
        largest = tl.maximum(before, tl.max(z, axis=0))
        total = total * tl.exp(before - largest) + tl.sum(tl.exp(z - largest), axis=0)
    return largest + tl.log(total)


@triton.jit
def store_gradient(row_ptr, bias_ptr, d_row_ptr, target, lse, scale, length, V, BLOCK: tl.constexpr):
    """(softmax(z) - [j = target]) scale. An ignored row has length 0: z is -inf, no j is its target, so all is 0."""
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)  # (BLOCK,)
        z = load_logits(row_ptr, bias_ptr, column, column < length)
        d = (tl.exp(z - lse) - tl.where(column == target, 1.0, 0.0)) * scale
        tl.store(d_row_ptr + column, d.to(d_row_ptr.dtype.element_ty), mask=column < V)


@Kernel
@triton.jit
def cross_entropy_forward(logits_ptr, bias_ptr, targets_ptr, losses_ptr, lse_ptr, d_logits_ptr, V, stride, d_stride,
                          IGNORE: tl.constexpr, BLOCK: tl.constexpr):
    """d_logits_ptr: None, or where the gradient of the sum goes; the logits' own place is as good as any."""
    row = tl.program_id(0).to(tl.int64)  # N V may pass 2^31
    row_ptr = logits_ptr + row * stride
    target = tl.load(targets_ptr + row)
    counts, exists = target != IGNORE, (target >= 0) & (target < V)
    # before the first store: the reductions in between keep the warps of a program in step
    z_target = load_logits(row_ptr, bias_ptr, target, exists)
    length = tl.where(counts, V, 0)  # an ignored row is not read
    lse = log_sum_exp(row_ptr, bias_ptr, length, BLOCK)
    lse = tl.where(counts, tl.where(exists, lse, float("nan")), 0.0)
    tl.store(lse_ptr + row, lse)
    tl.store(losses_ptr + row, tl.where(counts, lse - z_target, 0.0))
    if d_logits_ptr is not None:
        d_row_ptr = d_logits_ptr + row * d_stride
        store_gradient(row_ptr, bias_ptr, d_row_ptr, target.to(tl.int32), lse, 1.0, length, V, BLOCK)


@Kernel
@triton.jit
def cross_entropy_backward(logits_ptr, targets_ptr, lse_ptr, d_loss_ptr, d_logits_ptr, V, stride, d_stride,
                           IGNORE: tl.constexpr, BLOCK: tl.constexpr):
    """d_loss_ptr: one number on the device, by which the gradient is scaled."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    lse, scale = tl.load(lse_ptr + row), tl.load(d_loss_ptr).to(tl.float32)
    store_gradient(logits_ptr + row * stride, None, d_logits_ptr + row * d_stride, target.to(tl.int32), lse, scale,
                   tl.where(target != IGNORE, V, 0), V, BLOCK)


# --- Launchers --------------------------------------------------------------------------------------------------------


def tiles(logits: Tensor, targets: Tensor) -> dict[str, int]:
    """BLOCK and warps for rows as long as these; refuses what the kernels cannot do."""
    if logits.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"cross_entropy: the kernel computes in float32; {logits.dtype} needs the plain definition")
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(f"cross_entropy: logits of shape {tuple(logits.shape)}; (N, V) with V > 0 is needed")
    if targets.dtype != torch.int64 or targets.shape != logits.shape[:1]:
        raise ValueError(f"cross_entropy: targets {targets.dtype} {tuple(targets.shape)}; "
                         f"int64 ({logits.shape[0]},) is needed, a class for each row of logits")
    block = min(BLOCK, triton.next_power_of_2(logits.shape[1]))
    return {"IGNORE": IGNORE, "BLOCK": block, "num_warps": min(16, max(4, block // 512))}


def forward(logits: Tensor, targets: Tensor, bias: Tensor | None = None,
            d_logits: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(losses, lse), each (N,); fills d_logits, which may be the logits themselves, with the gradient of the sum."""
    meta, (rows, V) = tiles(logits, targets), logits.shape
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    losses, lse = (torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(2))
    if rows:
        cross_entropy_forward[(rows,)](logits, bias, targets.contiguous(), losses, lse, d_logits, V, logits.stride(0),
                                       0 if d_logits is None else d_logits.stride(0), **meta)
    return losses, lse


def backward(logits: Tensor, targets: Tensor, lse: Tensor, d_loss: Tensor) -> Tensor:
    """d_logits (N, V)"""
    meta, (rows, V) = tiles(logits, targets), logits.shape
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    d_logits = torch.empty((rows, V), dtype=logits.dtype, device=logits.device)
    if rows:
        cross_entropy_backward[(rows,)](logits, targets.contiguous(), lse, d_loss, d_logits, V, logits.stride(0),
                                        V, **meta)
    return d_logits


# --- Ops: what torch.compile, autograd and checkpointing see ----------------------------------------------------------


@torch.library.custom_op("nanomai::cross_entropy", mutates_args=())
def cross_entropy_op(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, lse)"""
    losses, lse = forward(logits, targets)
    return losses.sum(), lse


@torch.library.custom_op("nanomai::cross_entropy_backward", mutates_args=())
def cross_entropy_backward_op(logits: Tensor, targets: Tensor, lse: Tensor, d_loss: Tensor) -> Tensor:
    """d_logits"""
    return backward(logits, targets, lse, d_loss)


cross_entropy_op.register_fake(lambda logits, targets: (logits.new_empty((), dtype=torch.float32),
                                                        logits.new_empty(logits.shape[0], dtype=torch.float32)))
cross_entropy_backward_op.register_fake(lambda logits, targets, lse, d_loss: logits.new_empty(logits.shape))


def _save(ctx, inputs: tuple, output: tuple) -> None:
    ctx.set_materialize_grads(False)  # lse has no gradient
    ctx.save_for_backward(*inputs, output[1])


def _gradient(ctx, d_loss: Tensor, _d_lse: None) -> tuple[Tensor, None]:
    return cross_entropy_backward_op(*ctx.saved_tensors, d_loss), None


cross_entropy_op.register_autograd(_gradient, setup_context=_save)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum over rows of -log softmax(logits)[target], in float32: (N, V), (N,) -> ()"""
    return cross_entropy_op(logits, targets)[0]
