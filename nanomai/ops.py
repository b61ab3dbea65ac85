"""The operations a Transformer is made of, each beside its plain definition.

`name` is what the model calls; `name_plain` is the same thing as you would write it on a blackboard, slow and
obvious. Tests hold every pair together, forward and backward, in float64.

Those with a Triton kernel take `impl`, "auto", "torch" or "triton": kernels.py says what each means.

Numbers: products run in the dtype of the activations (bfloat16 in mixed precision); means of squares, softmax,
rotations and losses are computed in float32 at least, because bfloat16 keeps only 8 bits of each number.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nanomai.kernels import uses_triton
from nanomai.masks import FlashMask, Mask, attention_mask, causal_mask, training_mask  # noqa: F401 (handed on)

IGNORE = -100  # a target that carries no loss


def _fits(x: Tensor) -> bool:
    """Whether `auto` may give x to a kernel: they run on GPUs and compute in float32."""
    return x.is_cuda and x.dtype != torch.float64


def _wide(x: Tensor) -> torch.dtype:
    """float32, or float64 where the input already is."""
    return torch.promote_types(x.dtype, torch.float32)


# --- Embeddings -------------------------------------------------------------------------------------------------------


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """weight[ids], of ids (...) and (V, D) -> (..., D). A row's gradient is summed in float32 at least.

    A GPU's `F.embedding` does so; a CPU's adds bfloat16 to bfloat16, and of a frequent token's gradient much is lost.
    """
    return _Embedding.apply(ids, weight)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ids, weight):
        ctx.save_for_backward(ids)
        ctx.rows, ctx.dtype = len(weight), weight.dtype
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx, d_x):
        d_x = d_x.to(_wide(d_x)) if d_x.device.type == "cpu" else d_x
        d_weight = torch.ops.aten.embedding_dense_backward(d_x, ctx.saved_tensors[0], ctx.rows, -1, False)
        return None, d_weight.to(ctx.dtype)


# --- Normalisation ----------------------------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, eps: float, impl: str = "auto") -> Tensor:
    """x / rms(x) * weight over the last dimension (Zhang & Sennrich 2019, arXiv 1910.07467). (..., D) -> (..., D)"""
    if uses_triton("rms_norm", _fits(x), impl):
        from triton_kernels.rms_norm import rms_norm as kernel
        return kernel(x, weight, eps)
    wide = _wide(x)
    return F.rms_norm(x.to(wide), weight.shape, weight.to(wide), eps).to(x.dtype)


def rms_norm_plain(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The definition of `rms_norm`."""
    mean_square = x.pow(2).mean(-1, keepdim=True)
    return x / torch.sqrt(mean_square + eps) * weight


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """(s, rms_norm(s)) with s = x + residual: one pass over memory for what every block does twice."""
    if uses_triton("rms_norm", _fits(x), impl):
        from triton_kernels.rms_norm import add_rms_norm as kernel
        return kernel(x, residual, weight, eps)
    s = x + residual
    return s, rms_norm(s, weight, eps, "torch")


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(x - mean) / std * weight + bias over the last dimension (Ba et al. 2016, arXiv 1607.06450)."""
    return F.layer_norm(x, weight.shape, weight.to(x.dtype), bias.to(x.dtype), eps)


def layer_norm_plain(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """The definition of `layer_norm`."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + eps) * weight + bias


# --- Rotary positions -------------------------------------------------------------------------------------------------


def rotary_table(positions: Tensor, dim: int, theta: float,
                 dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every angle position * theta^(-2i/dim): (..., T) -> two of (..., T, dim/2)."""
    wide = torch.promote_types(dtype, torch.float32)
    return cos_sin(positions, theta ** (-torch.arange(0, dim, 2, device=positions.device, dtype=wide) / dim))


def cos_sin(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every angle: (..., T) and (R/2,) radians a position -> two of (..., T, R/2)."""
    angles = positions.to(frequencies.dtype)[..., None] * frequencies  # (..., T, R/2)
    return angles.cos(), angles.sin()


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each pair (x[i], x[i + K/2]) by its angle (RoPE, Su et al. 2021, arXiv 2104.09864; the halves of Llama).

    x (B, H, T, K); cos, sin (T, K/2), or (B, 1, T, K/2) where rows stand at different positions. With narrower tables,
    (T, R/2), only the first R numbers of a head are turned.
    """
    turned, rest = x.split((2 * cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]), dim=-1)
    a, b = turned.to(cos.dtype).chunk(2, dim=-1)  # (B, H, T, R/2) each
    return torch.cat(((a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype), rest), dim=-1)


def qk_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor | None = None,
              k_weight: Tensor | None = None, eps: float = 1e-6, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """`rotary` of queries (B, H, T, K) and keys (B, G, T, K); with weights (K,), of their `rms_norm`s."""
    if uses_triton("rotary", _fits(q), impl):
        from triton_kernels.qk_norm_rope import qk_norm_rope as kernel
        return kernel(q, k, cos, sin, q_weight, k_weight, eps)
    if q_weight is not None:
        q, k = rms_norm(q, q_weight, eps, "torch"), rms_norm(k, k_weight, eps, "torch")
    return rotary(q, cos, sin), rotary(k, cos, sin)


def rotary_plain(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The definition of `rotary`."""
    r = cos.shape[-1]
    turned = torch.complex(x[..., :r], x[..., r : 2 * r]) * torch.complex(cos, sin)  # a product of complex numbers
    return torch.cat((turned.real, turned.imag, x[..., 2 * r :]), dim=-1)


# --- Attention --------------------------------------------------------------------------------------------------------

# On a CPU the library's flash kernel is slow in the backward pass: at (16, 6, 256, 64) in bfloat16 the plain formula
# takes 0.4 of its time (benchmarks/LOG.md). Above this many scores in one head the memory of (T, S) matrices matters
# more: at T = 1024 they are a fifth of all that a 124M model needs, for 7 % of its speed.
EXPLICIT_SCORES_LIMIT = 512 * 512
# The library's kernels, best first: on an H100 cuDNN's is reported 1.7 to 2.3 times as fast as flash attention 2, which
# the library would take (pytorch/pytorch 142132). It plans anew for each shape, so not where a cache grows by tokens.
LIBRARY_ATTENTION = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION,
                     SDPBackend.MATH]


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | FlashMask | None = None, impl: str = "auto") -> Tensor:
    """softmax(q k^T / sqrt(K)) v for grouped heads (arXiv 1706.03762, 2305.13245).

    q (B, H, T, K); k, v (B, G, S, K) with G dividing H; mask broadcasts to (B, H, T, S), True where a query may
    look, or is a FlashMask; None is causal, the queries being the last T of the S positions. Returns (B, H, T, K).
    """
    if isinstance(mask, FlashMask) or uses_triton("attention", _fits(q), impl):
        if impl == "torch":
            raise TypeError("attention: a FlashMask is for the kernel; training_mask(impl='torch') gives a matrix")
        if isinstance(mask, Tensor):
            raise TypeError("attention: the kernel takes a FlashMask, as training_mask makes it, and no matrix; "
                            "use impl='torch' with this mask")
        from triton_kernels.flash_attention import flash_attention as kernel
        window, reach = mask or (None, None)
        return kernel(q, k, v, window, reach=reach)
    if q.device.type == "cpu" and q.shape[2] * k.shape[2] <= EXPLICIT_SCORES_LIMIT:
        return attention_plain(q, k, v, mask)
    square = q.shape[2] == k.shape[2]
    if mask is None and not square:
        mask = causal_mask(q, k)
    with sdpa_kernel(LIBRARY_ATTENTION if square else LIBRARY_ATTENTION[1:], set_priority=True):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                              enable_gqa=q.shape[1] != k.shape[1])


def attention_plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """The definition of `attention`: every score is a number in memory."""
    repeats = q.shape[1] // k.shape[1]
    if repeats > 1:  # (B, G, S, K) -> (B, H, S, K): each key-value head serves its group of query heads
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    scores = (q @ k.transpose(-1, -2)).to(_wide(q)) / math.sqrt(q.shape[-1])  # (B, H, T, S)
    if q.shape[2] > 1 or mask is not None:  # one last query may look at all there is
        scores = scores.masked_fill(~(causal_mask(q, k) if mask is None else mask), -torch.inf)
    return scores.softmax(-1).to(q.dtype) @ v


# --- The MLP ----------------------------------------------------------------------------------------------------------


def swiglu(gate: Tensor, up: Tensor, impl: str = "auto") -> Tensor:
    """silu(gate) * up (Shazeer 2020, arXiv 2002.05202): two of (...) -> (...)"""
    if uses_triton("swiglu", _fits(gate), impl):
        from triton_kernels.swiglu import swiglu as kernel
        return kernel(gate, up)
    return F.silu(gate) * up


def swiglu_plain(gate: Tensor, up: Tensor) -> Tensor:
    """The definition of `swiglu`."""
    return gate / (1 + torch.exp(-gate)) * up


def gegelu(gate: Tensor, up: Tensor) -> Tensor:
    """phi-3-small's: x sigmoid(1.702 x) of the gate times up + 1, both kept within 20."""
    gate, up = gate.clamp(max=20.0), up.clamp(-20.0, 20.0)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


def activate(name: str, up: Tensor, gate: Tensor | None = None, impl: str = "auto") -> Tensor:
    """The non-linearity of an MLP: `gelu` (GPT-2's tanh), `relu2` (arXiv 2109.08668), or one of those above, gated."""
    if name == "swiglu":
        return swiglu(gate, up, impl)
    if name == "gegelu":
        return gegelu(gate, up)
    return F.gelu(up, approximate="tanh") if name == "gelu" else F.relu(up).square()


# --- The loss ---------------------------------------------------------------------------------------------------------

LOGITS_BYTES = 2**28  # of float32 logits alive at once; smaller chunks add up the weight's gradient more often


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None,
                         impl: str = "auto") -> Tensor:
    """Sum over tokens of -log softmax(hidden weight^T + bias)[target], without ever holding all the logits.

    hidden (N, D), weight (V, D), targets (N,) with IGNORE where there is no loss, bias (V,) or None. At V = 100,352
    the logits of 8,192 tokens are 3.3 GB in float32 and their gradient as much again. Here a chunk of tokens goes
    through logits, loss and both gradients before the next begins (as Liger-Kernel, arXiv 2410.10989, does on a GPU);
    the loss is a plain sum, so the backward pass only has to scale what was stored.
    """
    if uses_triton("linear_cross_entropy", _fits(hidden), impl):
        from triton_kernels.linear_cross_entropy import linear_cross_entropy as kernel
        return kernel(hidden, weight, targets, bias)
    return _LinearCrossEntropy.apply(hidden, weight, targets, bias, torch.is_grad_enabled())


def linear_cross_entropy_plain(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None) -> Tensor:
    """The definition of `linear_cross_entropy`: all logits at once."""
    logits = F.linear(hidden, weight, bias)  # (N, V)
    return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, bias, with_grad):
        # needs_input_grad does not know of torch.no_grad
        wide, needs_grad = _wide(hidden), with_grad and any(ctx.needs_input_grad)
        w, b = weight.to(hidden.dtype), bias
        loss = hidden.new_zeros((), dtype=wide)
        d_hidden = torch.empty_like(hidden) if needs_grad else None
        d_weight = torch.zeros_like(weight, dtype=wide) if needs_grad else None
        d_bias = torch.zeros_like(bias, dtype=wide) if needs_grad and bias is not None else None
        chunk = max(1, LOGITS_BYTES // (4 * weight.shape[0]))
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            logits = F.linear(hidden[rows], w).to(wide)  # (n, V)
            log_p = F.log_softmax(logits if b is None else logits + b, dim=-1)
            valid = (targets[rows] != IGNORE)[:, None]  # (n, 1)
            target = targets[rows, None].masked_fill(~valid, 0)
            # not in place: torch 2.11 compiles a result that was changed in place without its gradient, silently
            loss = loss - (log_p.gather(1, target) * valid).sum()
            if needs_grad:
                d_logits = log_p.exp_()  # softmax minus one at the target is the gradient of the loss
                d_logits.scatter_add_(1, target, d_logits.new_full(target.shape, -1.0))
                if d_bias is not None:
                    d_bias += (d_logits * valid).sum(0)
                d_logits = d_logits.to(hidden.dtype)
                d_hidden[rows] = d_logits @ w * valid  # ignored rows: D numbers to clear, not V
                d_weight += d_logits.T @ (hidden[rows] * valid)
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.dtypes = weight.dtype, bias.dtype if bias is not None else None
        return loss

    @staticmethod
    def backward(ctx, d_loss):
        d_hidden, d_weight, d_bias = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        d_bias = None if d_bias is None else (d_bias * d_loss).to(bias_dtype)
        return (d_hidden * d_loss).to(d_hidden.dtype), (d_weight * d_loss).to(weight_dtype), None, d_bias, None
