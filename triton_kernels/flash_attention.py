"""Causal flash attention, forward and backward (Dao et al. 2022, arXiv 2205.14135; Dao 2023, arXiv 2307.08691).

Shapes: q, o (B, H, T, K); k, v (B, G, S, K), G dividing H: query head h reads key head h // (H / G); the queries are
the last T of the S positions; lse, delta (B, H, T) float32. A query at position t sees the keys s <= t, with
t - s < window, in its own document: attention_mask of nanomai/ops.py.

Forward. The scores s_ij = q_i k_j / sqrt(K) never reach memory: a program holds one tile of queries and walks over
tiles of keys with three running values a row, the largest score m, l = sum of exp(s - m), and acc = sum of
exp(s - m) v. When a tile raises m to m', l and acc are first multiplied by exp(m - m'). At the end

    o = acc / l,    lse = m + log l    (then p_ij = exp(s_ij - lse_i) can be had again from q and k)

Backward. With dp_ij = do_i v_j, through the softmax of a row:

    ds_ij = p_ij (dp_ij - sum_k p_ik dp_ik) = p_ij (dp_ij - delta_i),    delta_i = sum_k p_ik (do_i v_k) = do_i o_i
    dq_i = sum_j ds_ij k_j / sqrt(K),    dk_j = sum_i ds_ij q_i / sqrt(K),    dv_j = sum_i p_ij do_i

One kernel walks over keys for dq and leaves delta for the next, which walks over the queries of all heads that share
a key head for dk and dv. Nothing is added by atomics: the same numbers come each time.

Memory traffic in bytes, e a number; N tiles of BLOCK_Q queries by BLOCK_K keys hold a visible pair, all heads counted:
    forward   e B H T K (q + o) + 4 B H T + 2 e N BLOCK_K K          (N BLOCK_Q BLOCK_K is about B H T S / 2)
    dq        e B H T K (q + o + do + dq) + 8 B H T + 2 e N BLOCK_K K
    dk, dv    e B G S K (k + v + dk + dv) + N BLOCK_Q (2 e K + 8)
Caches serve most of it; the limit is 2 B H T S K floating point operations forward and 3.5 times that backward: at
B 4, H 16, T 4096, K 128 forward takes 0.34 ms or more at 800 TFLOP/s.
Tiles without a visible pair are never read, and those whose pairs are all visible take a loop without a mask. All is
float32 but the operands of products.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from triton_kernels.engine import Kernel
from triton_kernels.flash_tiles import constants

LOG2E = tl.constexpr(1.4426950408889634)  # scores are kept in base 2: exp2 is what a GPU has


@triton.jit
def _load(matrix_ptr, start, stride, count, ROWS: tl.constexpr, K: tl.constexpr):
    """Rows from `start` on of a matrix of `count` rows; zeros past its end. (ROWS, K)"""
    row, column = tl.arange(0, ROWS), tl.arange(0, K)
    matrix_ptr += tl.cast(start, tl.int64) * stride
    return tl.load(matrix_ptr + row[:, None] * stride + column[None, :], mask=(start + row < count)[:, None], other=0.0)


@triton.jit
def _store(matrix_ptr, block, start, stride, count, ROWS: tl.constexpr, K: tl.constexpr):
    row, column = tl.arange(0, ROWS), tl.arange(0, K)
    matrix_ptr += tl.cast(start, tl.int64) * stride
    at = matrix_ptr + row[:, None] * stride + column[None, :]
    tl.store(at, block.to(matrix_ptr.dtype.element_ty), mask=(start + row < count)[:, None])


@triton.jit
def _visible(position, key, reach_ptr, S, window):
    """True where a query at `position` sees `key`: (BLOCK_Q, 1) and (1, BLOCK_K), or (1, BLOCK_Q) and (BLOCK_K, 1)."""
    seen = key <= position  # a key past S is ahead of every query
    if window is not None:
        seen = seen & (position - key < window)
    if reach_ptr is not None:  # one document, one first position
        first = tl.load(reach_ptr + position, mask=position < S, other=-1)
        seen = seen & (first == tl.load(reach_ptr + key, mask=key < S, other=-1))
    return seen


@triton.jit
def _keys_of(position, reach_ptr, S, window, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """The keys that BLOCK_Q queries from `position` on see, by the edges of three parts; part 1 needs no mask."""
    begin, inside = 0, 0
    if window is not None:
        begin = tl.maximum(position - window + 1, 0)
        inside = tl.cdiv(tl.maximum(position + BLOCK_Q - window, 0), BLOCK_K) * BLOCK_K
    diagonal = tl.maximum((position + 1) // BLOCK_K * BLOCK_K, inside)
    if reach_ptr is not None:  # a document may begin anywhere: all is part 2
        at = position + tl.arange(0, BLOCK_Q)
        begin = tl.maximum(begin, tl.min(tl.load(reach_ptr + at, mask=at < S, other=S), axis=0))
        diagonal = begin // BLOCK_K * BLOCK_K
    return begin // BLOCK_K * BLOCK_K, inside, diagonal, tl.minimum(position + BLOCK_Q, S)


@triton.jit
def _queries_of(key, reach_ptr, T, S, window, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """The rows of q that see BLOCK_K keys from `key` on, by the edges of three parts; part 1 needs no mask."""
    row, past = key - (S - T), key + BLOCK_K - 1 - (S - T)  # the rows at the positions of the first key and the last
    end, beyond = T, T
    if window is not None:
        end = tl.minimum(T, past + window)
        beyond = tl.maximum(row + window, 0) // BLOCK_Q * BLOCK_Q
    inside = tl.cdiv(tl.maximum(past, 0), BLOCK_Q) * BLOCK_Q
    if reach_ptr is not None:  # a document may end anywhere: all is part 0
        at = key + tl.arange(0, BLOCK_K)
        end = tl.minimum(end, tl.max(tl.load(reach_ptr + S + at, mask=at < S, other=-1), axis=0) + 1 - (S - T))
        inside = end
    return tl.maximum(row, 0) // BLOCK_Q * BLOCK_Q, inside, tl.maximum(inside, beyond), end


# --- Kernels ----------------------------------------------------------------------------------------------------------


@Kernel
@triton.jit
def flash_forward(q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, reach_ptr, T, S, scale, window, q_b, q_h, q_t,
                  k_b, k_h, k_s, o_b, o_h, o_t, GROUP: tl.constexpr, PARTS: tl.constexpr, K: tl.constexpr,
                  BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """A program: BLOCK_Q queries of one head. Those with the most keys come first, lest they finish alone."""
    first_row = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_Q
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    k_at = batch * k_b + head // GROUP * k_h
    if reach_ptr is not None:
        reach_ptr += batch * 2 * S
    row = first_row + tl.arange(0, BLOCK_Q)  # (BLOCK_Q,)
    q = _load(q_ptr + batch * q_b + head * q_h, first_row, q_t, T, BLOCK_Q, K)
    acc, total = tl.zeros((BLOCK_Q, K), tl.float32), tl.zeros((BLOCK_Q,), tl.float32)
    top = tl.full((BLOCK_Q,), -1e30, tl.float32)  # finite: a row may see nothing of its first tiles
    edges = _keys_of(S - T + first_row, reach_ptr, S, window, BLOCK_Q, BLOCK_K)
    for part in tl.static_range(3 - PARTS, 3):
        for start in tl.range(edges[part], tl.minimum(edges[part + 1], edges[3]), BLOCK_K):
            k = _load(k_ptr + k_at, start, k_s, S, BLOCK_K, K)  # (BLOCK_K, K)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # (BLOCK_Q, BLOCK_K)
            if part != 1:
                key = start + tl.arange(0, BLOCK_K)
                seen = _visible((S - T + row)[:, None], key[None, :], reach_ptr, S, window)
                scores = tl.where(seen, scores, float("-inf"))
            higher = tl.maximum(top, tl.max(scores, axis=1) * (scale * LOG2E))  # (BLOCK_Q,)
            p = tl.exp2(scores * (scale * LOG2E) - higher[:, None])
            shrink = tl.exp2(top - higher)
            total = total * shrink + tl.sum(p, axis=1)
            v = _load(v_ptr + k_at, start, k_s, S, BLOCK_K, K)
            acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
            top = higher
    _store(o_ptr + batch * o_b + head * o_h, acc / total[:, None], first_row, o_t, T, BLOCK_Q, K)
    row_at = (batch * tl.num_programs(1) + head) * T + row
    tl.store(lse_ptr + row_at, (top + tl.log2(total)) / LOG2E, mask=row < T)


@Kernel
@triton.jit
def flash_dq(q_ptr, k_ptr, v_ptr, o_ptr, do_ptr, lse_ptr, dq_ptr, delta_ptr, reach_ptr, T, S, scale,
             window, q_b, q_h, q_t, k_b, k_h, k_s, o_b, o_h, o_t, GROUP: tl.constexpr, PARTS: tl.constexpr,
             K: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """A program: dq and delta of BLOCK_Q queries of one head. o, do and dq have the same strides."""
    first_row = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_Q
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    k_at, o_at = batch * k_b + head // GROUP * k_h, batch * o_b + head * o_h
    if reach_ptr is not None:
        reach_ptr += batch * 2 * S
    row = first_row + tl.arange(0, BLOCK_Q)  # (BLOCK_Q,)
    row_at = (batch * tl.num_programs(1) + head) * T + row
    q = _load(q_ptr + batch * q_b + head * q_h, first_row, q_t, T, BLOCK_Q, K)
    do = _load(do_ptr + o_at, first_row, o_t, T, BLOCK_Q, K)
    delta = tl.sum(_load(o_ptr + o_at, first_row, o_t, T, BLOCK_Q, K).to(tl.float32) * do.to(tl.float32), axis=1)
    tl.store(delta_ptr + row_at, delta, mask=row < T)
    lse = tl.load(lse_ptr + row_at, mask=row < T, other=float("inf")) * LOG2E  # past the end p = 0
    dq = tl.zeros((BLOCK_Q, K), tl.float32)
    edges = _keys_of(S - T + first_row, reach_ptr, S, window, BLOCK_Q, BLOCK_K)
    for part in tl.static_range(3 - PARTS, 3):
        for start in tl.range(edges[part], tl.minimum(edges[part + 1], edges[3]), BLOCK_K):
            k = _load(k_ptr + k_at, start, k_s, S, BLOCK_K, K)  # (BLOCK_K, K)
            v = _load(v_ptr + k_at, start, k_s, S, BLOCK_K, K)
            p = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E) - lse[:, None])
            if part != 1:
                key = start + tl.arange(0, BLOCK_K)
                p = tl.where(_visible((S - T + row)[:, None], key[None, :], reach_ptr, S, window), p, 0.0)
            ds = p * (tl.dot(do, tl.trans(v), input_precision="ieee") - delta[:, None])  # (BLOCK_Q, BLOCK_K)
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    _store(dq_ptr + o_at, dq * scale, first_row, o_t, T, BLOCK_Q, K)


@Kernel
@triton.jit
def flash_dkdv(q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, reach_ptr, T, S, scale,
               window, q_b, q_h, q_t, k_b, k_h, k_s, o_b, o_h, o_t, dk_b, dk_h, dk_s, GROUP: tl.constexpr,
               PARTS: tl.constexpr, K: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """A program: dk and dv of BLOCK_K keys, from the GROUP query heads that read them; its blocks lie transposed."""
    first_key = tl.program_id(0) * BLOCK_K  # the first keys are seen by the most queries
    group, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    k_at, dk_at = batch * k_b + group * k_h, batch * dk_b + group * dk_h
    if reach_ptr is not None:
        reach_ptr += batch * 2 * S
    key = first_key + tl.arange(0, BLOCK_K)  # (BLOCK_K,)
    k = _load(k_ptr + k_at, first_key, k_s, S, BLOCK_K, K)
    v = _load(v_ptr + k_at, first_key, k_s, S, BLOCK_K, K)
    dk, dv = tl.zeros((BLOCK_K, K), tl.float32), tl.zeros((BLOCK_K, K), tl.float32)
    edges = _queries_of(first_key, reach_ptr, T, S, window, BLOCK_Q, BLOCK_K)
    for part in tl.static_range(0, PARTS):
        count = tl.cdiv(tl.maximum(tl.minimum(edges[part + 1], edges[3]) - edges[part], 0), BLOCK_Q)
        for step in tl.range(0, count * GROUP):  # one loop, not one in another: it keeps fewer registers
            head, start = group * GROUP + step // count, edges[part] + step % count * BLOCK_Q
            row = start + tl.arange(0, BLOCK_Q)
            row_at = (batch * tl.num_programs(1) * GROUP + head) * T + row
            q = _load(q_ptr + batch * q_b + head * q_h, start, q_t, T, BLOCK_Q, K)  # (BLOCK_Q, K)
            do = _load(do_ptr + batch * o_b + head * o_h, start, o_t, T, BLOCK_Q, K)
            lse = tl.load(lse_ptr + row_at, mask=row < T, other=float("inf")) * LOG2E
            delta = tl.load(delta_ptr + row_at, mask=row < T, other=0.0)
            p = tl.exp2(tl.dot(k, tl.trans(q), input_precision="ieee") * (scale * LOG2E) - lse[None, :])
            if part != 1:
                p = tl.where(_visible((S - T + row)[None, :], key[:, None], reach_ptr, S, window), p, 0.0)
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
            ds = p * (tl.dot(v, tl.trans(do), input_precision="ieee") - delta[None, :])  # (BLOCK_K, BLOCK_Q)
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    _store(dk_ptr + dk_at, dk * scale, first_key, dk_s, S, BLOCK_K, K)
    _store(dv_ptr + dk_at, dv, first_key, dk_s, S, BLOCK_K, K)


# --- Launchers: they allocate, choose the tiles, and launch -----------------------------------------------------------
def forward(q: Tensor, k: Tensor, v: Tensor, reach: Tensor | None, window: int | None, scale: float,
            arch: str | None = None) -> tuple[Tensor, Tensor]:
    """(o, lse)"""
    (batch, heads, length), keys = q.shape[:3], k.shape[2]
    o, lse = torch.empty_like(q), torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    strides = [n for x in (q, k, o) for n in x.stride()[:3]]
    meta = constants(0, q, k, window, reach, arch)
    if q.numel():
        flash_forward[(triton.cdiv(length, meta["BLOCK_Q"]), heads, batch)](
            q, k, v, o, lse, reach, length, keys, scale, window, *strides, **meta)
    return o, lse


def backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, reach: Tensor | None,
             window: int | None, scale: float, arch: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv)"""
    (batch, heads, length), (groups, keys) = q.shape[:3], k.shape[1:3]
    do = do if do.stride() == o.stride() else torch.empty_like(o).copy_(do)
    dq, dk, dv, delta = (torch.empty_like(x) for x in (o, k, k, lse))
    strides = [n for x in (q, k, o, dk) for n in x.stride()[:3]]
    meta = constants(1, q, k, window, reach, arch)
    if q.numel():
        flash_dq[(triton.cdiv(length, meta["BLOCK_Q"]), heads, batch)](
            q, k, v, o, do, lse, dq, delta, reach, length, keys, scale, window, *strides[:9], **meta)
    meta = constants(2, q, k, window, reach, arch)
    if k.numel():
        flash_dkdv[(triton.cdiv(keys, meta["BLOCK_K"]), groups, batch)](
            q, k, v, do, lse, delta, dk, dv, reach, length, keys, scale, window, *strides, **meta)
    return dq, dk, dv


# --- Ops: what torch.compile, autograd and checkpointing see ----------------------------------------------------------

flash_attention_op = torch.library.custom_op("nanomai::flash_attention", forward, mutates_args=())
flash_attention_backward_op = torch.library.custom_op("nanomai::flash_attention_backward", backward, mutates_args=())
flash_attention_op.register_fake(lambda q, *_: (torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)))
flash_attention_backward_op.register_fake(lambda do, q, k, *_: tuple(torch.empty_like(x) for x in (q, k, k)))


def _save(ctx, inputs: tuple, output: tuple) -> None:
    q, k, v, reach, *ctx.rest = inputs
    ctx.save_for_backward(q, k, v, *output, reach)


def _gradients(ctx, do: Tensor, _dlse: Tensor) -> tuple[Tensor | None, ...]:
    return *flash_attention_backward_op(do, *ctx.saved_tensors, *ctx.rest), None, None, None, None


flash_attention_op.register_autograd(_gradients, setup_context=_save)


def document_reach(document_ids: Tensor) -> Tensor:
    """Of each position the first and the last position of its document, whatever the order: (B, S) -> (B, 2, S)."""
    ids, position = (document_ids := document_ids.contiguous()).sort(dim=1, stable=True)
    slots = [torch.searchsorted(ids, document_ids, right=right) - int(right) for right in (False, True)]
    return torch.stack([position.gather(1, slot) for slot in slots], 1).int()


def flash_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None = None, document_ids: Tensor | None = None,
                    reach: Tensor | None = None) -> Tensor:
    """Causal softmax(q k^T / sqrt(K)) v: (B, H, T, K) and two of (B, G, S, K) -> (B, H, T, K).

    document_ids (B, S): integers in any order, of all S positions even where T < S; or their `document_reach`.
    """
    width, keys = q.shape[-1], k.shape[2]
    _check(q, k, v, window, document_ids, reach)
    if (padded := max(16, triton.next_power_of_2(width))) > width:  # zeros change no product
        q, k, v = (F.pad(x, (0, padded - width)) for x in (q, k, v))
    if not q.stride(-1) == k.stride(-1) == 1 or k.stride() != v.stride():
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    if reach is None and document_ids is not None:
        reach = document_reach(document_ids)
    window = None if window is None or window >= keys else window
    return flash_attention_op(q, k, v, reach, window, width ** -0.5)[0][..., :width]


def _check(q: Tensor, k: Tensor, v: Tensor, window: int | None, document_ids: Tensor | None, reach: Tensor | None):
    (batch, heads, length, width), (groups, keys) = q.shape, k.shape[1:3]
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"flash_attention: {q.dtype}, {k.dtype}, {v.dtype}; one of float32, bfloat16, float16 for all")
    if k.shape != v.shape or k.shape[::3] != (batch, width) or heads % groups or length > keys or width > 128:
        raise ValueError(f"flash_attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}; must be "
                         "(B, H, T, K) and two of (B, G, S, K), G dividing H, T at most S, K at most 128")
    if window is not None and window < 1:
        raise ValueError(f"flash_attention: a window of {window}; a query sees one key at least, its own")
    for name, x, shape in (("document_ids", document_ids, (batch, keys)), ("reach", reach, (batch, 2, keys))):
        if x is not None and x.shape != shape:
            raise ValueError(f"flash_attention: {name} {tuple(x.shape)}; must be {shape}")
