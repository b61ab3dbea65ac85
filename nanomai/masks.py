"""Who may look at whom: the masks of attention, as matrices and as the flash kernel takes them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nanomai.kernels import uses_triton


def attention_mask(query_positions: Tensor, key_positions: Tensor, window: int | None = None,
                   query_documents: Tensor | None = None, key_documents: Tensor | None = None) -> Tensor:
    """True where a query may look: not ahead, not beyond the window, not into another document.

    positions (T,), (S,) or (B, T), (B, S); documents (B, T), (B, S). Returns (T, S) or (B, 1, T, S).
    """
    distance = query_positions[..., :, None] - key_positions[..., None, :]
    allowed = distance >= 0
    if window is not None:
        allowed = allowed & (distance < window)
    if query_documents is not None:
        allowed = allowed & (query_documents[:, :, None] == key_documents[:, None, :])
    return allowed[:, None] if allowed.ndim == 3 else allowed


def causal_mask(q: Tensor, k: Tensor) -> Tensor:
    """(T, S) for queries that are the last T of S positions."""
    positions = torch.arange(k.shape[2], device=q.device)
    return attention_mask(positions[-q.shape[2]:], positions)


def block_sparse_mask(query_positions: Tensor, key_positions: Tensor, n_heads: int, block: int, local_blocks: int,
                      vertical_stride: int) -> Tensor:
    """True where a query of a sparse layer may look: causal, and near, or in one of its head's far columns of blocks.

    positions (T,), (S,) or (B, T), (B, S). Returns (T, S), or (..., H, T, S) where heads differ: (B, H, T, S) or
    (H, T, S). The near blocks are Sparse Transformers' (arXiv 1904.10509); the columns are phi-3-small's, which begin
    at another block in each head.
    """
    queries, keys = query_positions[..., None, :, None], key_positions[..., None, None, :]  # (.., 1, T | 1, S | 1)
    q_block, k_block = queries // block, keys // block
    allowed = q_block - k_block < local_blocks
    if vertical_stride:
        heads = torch.arange(n_heads, device=queries.device)[:, None, None]  # (H, 1, 1)
        shift = heads * max(1, vertical_stride // n_heads)
        allowed = allowed | ((k_block + shift + 1) % vertical_stride == 0)
    return allowed & (queries >= keys)


class FlashMask(NamedTuple):
    """A mask that never exists as a matrix: causal, within a window, within a document."""

    window: int | None
    reach: Tensor | None  # (B, 2, S): first and last position of each position's document


Mask = Tensor | FlashMask | None


def training_mask(positions: Tensor, window: int | None, documents: Tensor | None, head_dim: int,
                  impl: str = "auto", queries: Tensor | None = None) -> Mask:
    """The mask of whole sequences for `attention`, made once for all layers. positions (T,), documents (B, T).

    Where not all look, `queries` are the positions of those that do; `prefix` then gives each stretch of them its part.
    """
    # wider heads than the kernel's are left to torch
    by_kernel = (head_dim <= 128 or impl != "auto") and uses_triton("masked_attention", positions.is_cuda, impl)
    if window is None and documents is None and not (by_kernel and queries is not None):
        return None
    if by_kernel:
        from triton_kernels.flash_attention import document_reach
        return FlashMask(window, None if documents is None else document_reach(documents))
    queries = positions if queries is None else queries
    return attention_mask(queries, positions, window, None if documents is None else documents[:, queries], documents)


def prefix(mask: Mask, rows: slice, end: int) -> Mask:
    """The part of a mask for these rows, of consecutive positions, and the `end` keys up to the last of them."""
    if isinstance(mask, FlashMask):
        return mask if mask.reach is None else mask._replace(reach=mask.reach[..., :end].contiguous())
    return None if mask is None else mask[..., rows, :end]
