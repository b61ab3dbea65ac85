"""QK-norm (optional) and rotary positions in one pass over queries and keys (arXiv 2302.05442; 2104.09864).

Shapes: q (B, H, T, K), k (B, G, T, K); cos, sin (T, K/2), or (B, 1, T, K/2) where rows stand at different positions;
weights (K,) or None. Everything lies in memory as (B, T, H, K), which is how a projection writes it and how attention
for GPUs gives gradients back; what lies otherwise is copied first. The kernels see N = B T tokens of H heads.

Forward, for each head x of each token:    r = (mean(x^2) + eps)^(-1/2)         both only with weights;
                                           n = x r w                            n = x without
                                           y_i       = n_i cos_i - n_(i+K/2) sin_i
                                           y_(i+K/2) = n_(i+K/2) cos_i + n_i sin_i

Backward. A rotation is undone by its transpose, the rotation by the negative angle: dn = turn(dy, cos, -sin). Call
u = x r and g = dn w; as for every RMSNorm (rms_norm.py has the derivation)

    dx = r (g - u mean(g u))        dw = sum over tokens and heads of dn u

r is computed again from x, which is in registers anyway; without weights nothing is kept but cos and sin.

Memory traffic in bytes (e a number of q; X = N (H + G) K numbers in q and k together):
    forward   2 e X (q + k + both results) + 4 N K
    backward  3 e X with weights, 2 e X without, + 4 N K, + 8 P K partial dw written and read again, P programs
A program owns a few tokens and walks through their heads, so cos and sin (float32) cross once for each token and not
once for each head. One after another, two norms and two rotations move 4 e X forward.

All arithmetic is in float32 and each result is rounded once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_kernels.engine import Kernel

TILE = 1024  # pairs that a program holds: 8 a thread at 4 warps, a 128-bit load of each half in bfloat16
MAX_HEAD_DIM = 1024


# --- Kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def turn(a, b, cos, sin):
    """The pairs (a, b), each turned by its angle."""
    return a * cos - b * sin, b * cos + a * sin


@triton.jit
def load_pairs(x_ptr, at, inside, half):
    """(a, b): both halves, in float32."""
    a = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    return a, tl.load(x_ptr + at + half, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store_pairs(x_ptr, at, inside, half, a, b):
    """What load_pairs reads."""
    tl.store(x_ptr + at, a.to(x_ptr.dtype.element_ty), mask=inside)
    tl.store(x_ptr + at + half, b.to(x_ptr.dtype.element_ty), mask=inside)


@triton.jit
def load_angles(cos_ptr, sin_ptr, N, table_rows, half, TOKENS: tl.constexpr, HALF: tl.constexpr):
    """This program's tokens (TOKENS,), pairs (HALF,), which of both exist, and their cos and sin (TOKENS, HALF)."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    pair = tl.arange(0, HALF)
    inside = (token < N)[:, None] & (pair < half)[None, :]
    at = (token % table_rows)[:, None] * half + pair[None, :]
    cos = tl.load(cos_ptr + at, mask=inside, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + at, mask=inside, other=0.0).to(tl.float32)
    return token, pair, inside, cos, sin


@triton.jit
def heads_forward(x_ptr, y_ptr, weight_ptr, heads, token, pair, inside, cos, sin, half, eps):
    """Norm and rotation of all heads of these tokens, head after head."""
    at = token[:, None] * heads * 2 * half + pair[None, :]  # (TOKENS, HALF); N H K may pass 2^31
    if weight_ptr is not None:
        weight_a, weight_b = load_pairs(weight_ptr, pair, pair < half, half)  # (HALF,) each
    for _ in range(0, heads):
        a, b = load_pairs(x_ptr, at, inside, half)
        if weight_ptr is not None:
            rstd = 1.0 / tl.sqrt(tl.sum(a * a + b * b, axis=1) / (2 * half) + eps)  # (TOKENS,)
            a, b = a * rstd[:, None] * weight_a[None, :], b * rstd[:, None] * weight_b[None, :]
        a, b = turn(a, b, cos, sin)
        store_pairs(y_ptr, at, inside, half, a, b)
        at += 2 * half


@triton.jit
def heads_backward(dy_ptr, x_ptr, dx_ptr, weight_ptr, dw_ptr, heads, token, pair, inside, cos, sin, half, eps):
    """dx of all heads of these tokens, and these tokens' part of dw."""
    at = token[:, None] * heads * 2 * half + pair[None, :]  # (TOKENS, HALF)
    if weight_ptr is not None:
        weight_a, weight_b = load_pairs(weight_ptr, pair, pair < half, half)  # (HALF,) each
        dw_a, dw_b = tl.zeros_like(cos), tl.zeros_like(cos)
    for _ in range(0, heads):
        a, b = load_pairs(dy_ptr, at, inside, half)
        a, b = turn(a, b, cos, -sin)  # dn
        if weight_ptr is not None:
            u_a, u_b = load_pairs(x_ptr, at, inside, half)
            rstd = (1.0 / tl.sqrt(tl.sum(u_a * u_a + u_b * u_b, axis=1) / (2 * half) + eps))[:, None]
            u_a, u_b = u_a * rstd, u_b * rstd
            dw_a, dw_b = dw_a + a * u_a, dw_b + b * u_b
            a, b = a * weight_a[None, :], b * weight_b[None, :]  # g
            mean = (tl.sum(a * u_a + b * u_b, axis=1) / (2 * half))[:, None]
            a, b = rstd * (a - u_a * mean), rstd * (b - u_b * mean)
        store_pairs(dx_ptr, at, inside, half, a, b)
        at += 2 * half
    if weight_ptr is not None:
        store_pairs(dw_ptr, pair, pair < half, half, tl.sum(dw_a, axis=0), tl.sum(dw_b, axis=0))


@Kernel
@triton.jit
def qk_forward(q_ptr, k_ptr, cos_ptr, sin_ptr, q_weight_ptr, k_weight_ptr, q_out_ptr, k_out_ptr,
               H, G, N, table_rows, half, eps, TOKENS: tl.constexpr, HALF: tl.constexpr):
    """TOKENS tokens a program, all their heads. Token n stands at row n % table_rows of cos and sin."""
    token, pair, inside, cos, sin = load_angles(cos_ptr, sin_ptr, N, table_rows, half, TOKENS, HALF)
    heads_forward(q_ptr, q_out_ptr, q_weight_ptr, H, token, pair, inside, cos, sin, half, eps)
    heads_forward(k_ptr, k_out_ptr, k_weight_ptr, G, token, pair, inside, cos, sin, half, eps)


@Kernel
@triton.jit
def qk_backward(dq_out_ptr, dk_out_ptr, q_ptr, k_ptr, cos_ptr, sin_ptr, q_weight_ptr, k_weight_ptr, dq_ptr, dk_ptr,
                dwq_ptr, dwk_ptr, H, G, N, table_rows, half, eps, TOKENS: tl.constexpr, HALF: tl.constexpr):
    """As qk_forward. dwq, dwk (programs, K) take each program's part. Without norm q, k, weights and they are None."""
    token, pair, inside, cos, sin = load_angles(cos_ptr, sin_ptr, N, table_rows, half, TOKENS, HALF)
    if dwq_ptr is not None:
        dwq_ptr += tl.program_id(0).to(tl.int64) * 2 * half
        dwk_ptr += tl.program_id(0).to(tl.int64) * 2 * half
    heads_backward(dq_out_ptr, q_ptr, dq_ptr, q_weight_ptr, dwq_ptr, H, token, pair, inside, cos, sin, half, eps)
    heads_backward(dk_out_ptr, k_ptr, dk_ptr, k_weight_ptr, dwk_ptr, G, token, pair, inside, cos, sin, half, eps)


# --- Launchers: they allocate, choose the tiles, and launch -----------------------------------------------------------


def check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor | None, k_weight: Tensor | None) -> None:
    """Says what does not fit."""
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"qk_norm_rope: the kernel computes in float32; {q.dtype} needs the plain definition")
    if q.ndim != 4 or k.ndim != 4 or q.dtype != k.dtype or q[:, 0].shape != k[:, 0].shape:
        raise ValueError(f"qk_norm_rope: q {tuple(q.shape)} {q.dtype}, k {tuple(k.shape)} {k.dtype} must be "
                         "(B, heads, T, K) and differ in heads only")
    batch, _, tokens, width = q.shape
    if width % 2 or not 0 < width <= MAX_HEAD_DIM:
        raise ValueError(f"qk_norm_rope: heads of {width} numbers; even widths from 2 to {MAX_HEAD_DIM} fit")
    tables = (tokens, width // 2), (batch, 1, tokens, width // 2)
    if cos.shape != sin.shape or cos.shape not in tables:
        raise ValueError(f"qk_norm_rope: cos {tuple(cos.shape)}, sin {tuple(sin.shape)}; either {tables[0]} or "
                         f"{tables[1]} fits q {tuple(q.shape)}")
    if (q_weight is None) != (k_weight is None) or not all(
            w is None or w.shape == (width,) for w in (q_weight, k_weight)):
        raise ValueError(f"qk_norm_rope: both weights must be ({width},), or both None")


def tiles(q: Tensor) -> dict[str, int]:
    """TOKENS and HALF of a program, and its warps."""
    half = triton.next_power_of_2(q.shape[3] // 2)
    tokens = triton.next_power_of_2(max(1, q.shape[0] * q.shape[2]))
    return {"TOKENS": min(max(1, TILE // half), tokens), "HALF": half, "num_warps": 4}


def by_token(x: Tensor | None) -> Tensor | None:
    """(B, H, T, K) -> (B, T, H, K), dense: without a copy where x came out of a projection."""
    return None if x is None else x.transpose(1, 2).contiguous()


def forward(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor | None, k_weight: Tensor | None,
            eps: float) -> tuple[Tensor, Tensor]:
    """q and k, normed and turned."""
    check(q, k, cos, sin, q_weight, k_weight)
    meta, half, rows = tiles(q), q.shape[3] // 2, q.shape[0] * q.shape[2]
    q, k, cos, sin = by_token(q), by_token(k), cos.contiguous(), sin.contiguous()
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    if rows:
        qk_forward[(triton.cdiv(rows, meta["TOKENS"]),)](
            q, k, cos, sin, q_weight, k_weight, q_out, k_out, q.shape[2], k.shape[2], rows, cos.numel() // half, half,
            eps, **meta)
    return q_out.transpose(1, 2), k_out.transpose(1, 2)


def backward(dq_out: Tensor, dk_out: Tensor, q: Tensor | None, k: Tensor | None, cos: Tensor, sin: Tensor,
             q_weight: Tensor | None, k_weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dweights): dweights (2, K) in float32, or (0, K) without weights, when q and k are None too."""
    meta, width, rows = tiles(dq_out), dq_out.shape[3], dq_out.shape[0] * dq_out.shape[2]
    dq_out, dk_out, q, k = (by_token(x) for x in (dq_out, dk_out, q, k))
    cos, sin, programs = cos.contiguous(), sin.contiguous(), triton.cdiv(rows, meta["TOKENS"])
    dq, dk = torch.empty_like(dq_out), torch.empty_like(dk_out)
    dw = torch.empty(0 if q is None else 2, programs, width, dtype=torch.float32, device=cos.device)
    if rows:
        qk_backward[(programs,)](
            dq_out, dk_out, q, k, cos, sin, q_weight, k_weight, dq, dk, *((None, None) if q is None else dw),
            dq.shape[2], dk.shape[2], rows, cos.numel() // (width // 2), width // 2, eps, **meta)
    return dq.transpose(1, 2), dk.transpose(1, 2), dw.sum(1)


# --- Ops: what torch.compile, autograd and checkpointing see ----------------------------------------------------------


@torch.library.custom_op("nanomai::qk_norm_rope", mutates_args=())
def qk_norm_rope_op(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor | None, k_weight: Tensor | None,
                    eps: float) -> tuple[Tensor, Tensor]:
    """q and k, normed and turned"""
    return forward(q, k, cos, sin, q_weight, k_weight, eps)


@torch.library.custom_op("nanomai::qk_norm_rope_backward", mutates_args=())
def qk_norm_rope_backward_op(dq_out: Tensor, dk_out: Tensor, q: Tensor | None, k: Tensor | None, cos: Tensor,
                             sin: Tensor, q_weight: Tensor | None, k_weight: Tensor | None,
                             eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dweights)"""
    return backward(dq_out, dk_out, q, k, cos, sin, q_weight, k_weight, eps)


def _like(x: Tensor) -> Tensor:
    """What the launchers allocate: x's shape, in memory (B, T, H, K)."""
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)


qk_norm_rope_op.register_fake(lambda q, k, *rest: (_like(q), _like(k)))
qk_norm_rope_backward_op.register_fake(lambda dq, dk, q, *rest: (
    _like(dq), _like(dk), dq.new_empty(0 if q is None else 2, dq.shape[3], dtype=torch.float32)))


def _save(ctx, inputs: tuple, output: tuple) -> None:
    q, k, *tables, q_weight, k_weight, ctx.eps = inputs
    kept = (None, None) if q_weight is None else (q, k)  # a rotation alone needs only its angles
    ctx.save_for_backward(*kept, *tables, q_weight, k_weight)


def _gradients(ctx, dq_out: Tensor, dk_out: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # asked for once: checkpointing computes them again each time
    dq, dk, dweights = qk_norm_rope_backward_op(dq_out, dk_out, *saved, ctx.eps)
    q_weight, k_weight = saved[4:]
    if q_weight is None:
        return dq, dk, None, None, None, None, None
    return dq, dk, None, None, dweights[0].to(q_weight.dtype), dweights[1].to(k_weight.dtype), None


qk_norm_rope_op.register_autograd(_gradients, setup_context=_save)


def qk_norm_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor | None = None,
                 k_weight: Tensor | None = None, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """rotary(rms_norm(q, q_weight)), rotary(rms_norm(k, k_weight)); no norms without weights. cos, sin: no gradient.

    q (B, H, T, K), k (B, G, T, K), cos and sin as ops.rotary_table makes them -> q and k, in memory (B, T, H, K)
    """
    q_weight, k_weight = (None if w is None else w.contiguous() for w in (q_weight, k_weight))
    return qk_norm_rope_op(q, k, cos, sin, q_weight, k_weight, eps)
