"""The last linear layer and the cross-entropy after it, without ever holding all the logits.

Shapes: hidden h (N, D); weight w (V, D); targets t (N,) int64, IGNORE where there is no loss; bias b (V,) or None;
the loss is a float32 scalar, the sum over tokens. A chunk is n of the N tokens.

Forward, chunk after chunk, all in one buffer of (n, V):

    z = h w^T                    a product of the library, at the speed of the matrix units
    z <- softmax(z + b) - [t]    cross_entropy.py, in place: what were logits are now d_logits; the loss on the way
    dh = z w                     the chunk's rows, complete
    dw += z^T h                  in float32, as db += the sum over rows of z, which has the dtype of h

Backward. The loss is a plain sum, so d_logits need nothing that comes later: whatever is made of the loss, its
gradient is what was stored times one number. The GPU multiplies by it in backward; the CPU never waits for it.
Chunks of the loss are Liger-Kernel's idea (arXiv 2410.10989).

Peak memory in bytes besides the inputs (e an activation's number; e V D more if the weight has another dtype):
    eager    12 N V: float32 log-softmax, the gradient that reaches it, and the gradient of the logits
    here     e n V + 4 V D (dw) + e N D (dh),   e n V <= LOGITS_BYTES;   2 (4 V D + e N D) while backward scales
At N = 16,384, D = 768, V = 50,304 in bfloat16: eager 9.89e9, 9.2 GiB; here, with n = 4096, 0.41e9 + 0.15e9 + 0.03e9 =
0.59e9, 0.55 GiB: a seventeenth.

Time there: three products of 2 N V D, 3.80e12 operations, 4.8 ms at 798 TFLOP/s, and cross_entropy.py's 3 e N V bytes,
1.65 ms at 3 TB/s. What chunks cost: each but the first reads and writes dw, 8 V D bytes beside the 2 n V D operations
of its product, 1060 / n of that product's time at those rates if nothing overlaps: a quarter at n = 4096, all of it at
1024. Hence chunks as large as the memory allows, all of one size.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from triton_kernels import cross_entropy

LOGITS_BYTES = 2**29  # of logits alive at once: about 5,300 tokens at V = 50,304 in bfloat16
ROWS = 128  # a chunk is a multiple of it where that fits: whole tiles for the products


# --- Launcher: products are the library's, between them the kernel of cross_entropy.py --------------------------------


def check(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> None:
    """Refuses shapes that do not fit."""
    shapes = [None if t is None else tuple(t.shape) for t in (hidden, weight, targets, bias)]
    if hidden.ndim == weight.ndim == 2:
        (N, D), V = hidden.shape, weight.shape[0]
        if V and shapes[1:] in ([(V, D), (N,), None], [(V, D), (N,), (V,)]):
            return
    raise ValueError("linear_cross_entropy: hidden (N, D), weight (V, D), targets (N,), bias (V,) or None are needed; "
                     "these are {}, {}, {}, {}".format(*shapes))


def chunk_rows(tokens: int, row_bytes: int) -> int:
    """Tokens of a chunk: as many as LOGITS_BYTES hold, evened out over the chunks that are needed."""
    most, tokens = max(1, LOGITS_BYTES // row_bytes), max(1, tokens)
    even = triton.cdiv(tokens, triton.cdiv(tokens, most))
    return min(most, triton.cdiv(even, ROWS) * ROWS)


def add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total += a b, all in float32 but for a and b themselves; the first overwrites what total held."""
    beta = 0 if first else 1
    if a.dtype == torch.float32:
        torch.addmm(total, a, b, beta=beta, out=total)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=torch.float32, beta=beta, out=total)
    else:  # the CPU's products are as narrow as their factors
        torch.addmm(total, a.float(), b.float(), beta=beta, out=total)


def allocate(hidden: Tensor, weight: Tensor, bias: Tensor | None, with_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    """d_hidden, and d_weight and d_bias in float32; of size 0 what nobody needs."""
    shapes = [hidden.shape, weight.shape, 0 if bias is None else bias.shape] if with_grad else [0, 0, 0]
    dtypes = hidden.dtype, torch.float32, torch.float32
    return tuple(torch.empty(s, dtype=d, device=hidden.device) for s, d in zip(shapes, dtypes, strict=True))


def forward(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None,
            with_grad: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, d_hidden, d_weight, d_bias)"""
    check(hidden, weight, targets, bias)
    (N, _), V, w = hidden.shape, weight.shape[0], weight.to(hidden.dtype)
    rows = chunk_rows(N, V * hidden.element_size())
    buffer = torch.empty((min(rows, N), V), dtype=hidden.dtype, device=hidden.device)
    loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
    d_hidden, d_weight, d_bias = allocate(hidden, weight, bias, with_grad)
    d_bias.zero_()
    if N == 0:  # no first chunk comes to fill it
        d_weight.zero_()
    for start in range(0, N, rows):
        h, t = hidden[start:start + rows], targets[start:start + rows]  # (n, D), (n,)
        logits = torch.mm(h, w.T, out=buffer[:len(h)])  # (n, V); with out=, autocast leaves the dtypes alone
        loss += cross_entropy.forward(logits, t, bias, logits if with_grad else None)[0].sum()
        if with_grad:
            torch.mm(logits, w, out=d_hidden[start:start + rows])
            add_product(d_weight, logits.T, h, first=start == 0)
        if with_grad and bias is not None:
            d_bias += logits.sum(0, dtype=torch.float32)
    return loss, d_hidden, d_weight, d_bias


# --- Op: what torch.compile, autograd and checkpointing see -----------------------------------------------------------


@torch.library.custom_op("nanomai::linear_cross_entropy", mutates_args=())
def linear_cross_entropy_op(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None,
                            with_grad: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, d_hidden, d_weight, d_bias); without with_grad the loss alone"""
    return forward(hidden, weight, targets, bias, with_grad)


linear_cross_entropy_op.register_fake(lambda hidden, weight, targets, bias, with_grad: (
    hidden.new_empty((), dtype=torch.float32), *allocate(hidden, weight, bias, with_grad)))


@register_flop_formula(torch.ops.nanomai.linear_cross_entropy)
def flops(hidden_shape, weight_shape, targets_shape, bias_shape, with_grad, *, out_shape=None) -> int:
    """Of the products: one for the logits, one for each gradient; torch's counter does not look into an op."""
    return (3 if with_grad else 1) * 2 * hidden_shape[0] * weight_shape[0] * weight_shape[1]


def _save(ctx, inputs: tuple, output: tuple) -> None:
    ctx.set_materialize_grads(False)  # nothing is differentiated twice
    ctx.save_for_backward(*output[1:])
    ctx.dtypes = inputs[1].dtype, None if inputs[3] is None else inputs[3].dtype


def _gradients(ctx, d_loss: Tensor, *_none) -> tuple[Tensor | None, ...]:
    d_hidden, d_weight, d_bias = ctx.saved_tensors
    weight_dtype, bias_dtype = ctx.dtypes
    return (d_hidden * d_loss, (d_weight * d_loss).to(weight_dtype), None,
            None if bias_dtype is None else (d_bias * d_loss).to(bias_dtype), None)


linear_cross_entropy_op.register_autograd(_gradients, setup_context=_save)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None) -> Tensor:
    """Sum over tokens of -log softmax(hidden weight^T + bias)[target]: (N, D), (V, D), (N,), (V,) or None -> ()"""
    needs = [t.requires_grad for t in (hidden, weight, bias) if t is not None]
    return linear_cross_entropy_op(hidden, weight, targets, bias, torch.is_grad_enabled() and any(needs))[0]
