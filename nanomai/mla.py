"""Multi-head latent attention (DeepSeek-V2 and V3, arXiv 2405.04434): keys and values out of one short vector.

What a token leaves in the cache is a latent of kv_rank numbers and one key of rope_dim numbers that all heads share,
because a rotation between the latent and the keys could not be undone once for all positions.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from nanomai import ops, rope
from nanomai.architecture import ModelConfig
from nanomai.layers import Linear, Part, RMSNorm


class LatentAttention(Part):
    """Stands where `Attention` would. Letters as there; R is kv_rank, P rope_dim, v_dim the width of a value."""

    attend = staticmethod(ops.attention)

    def __init__(self, config: ModelConfig):
        super().__init__()
        d, h, self.mla = config.d_model, config.n_heads, config.mla
        self.n_heads, self.plain_dim = h, config.head_dim - self.mla.rope_dim
        self.q_scale = rope.latent_factor(config)
        if self.mla.q_rank:
            self.wq_down = Linear(d, self.mla.q_rank, bias=False)
            self.q_norm = RMSNorm(self.mla.q_rank, config.norm_eps)
        self.wq = Linear(self.mla.q_rank or d, h * config.head_dim, bias=False)
        self.wkv_down = Linear(d, self.mla.kv_rank + self.mla.rope_dim, bias=False)
        self.kv_norm = RMSNorm(self.mla.kv_rank, config.norm_eps)
        self.wkv = Linear(self.mla.kv_rank, h * (self.plain_dim + self.mla.v_dim), bias=False)
        self.wo = Linear(h * self.mla.v_dim, d, bias=False)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None, cache=None) -> Tensor:
        """x (B, T, D) -> (B, T, D), as in `Attention`; the cache takes latents and turned keys."""
        plain, turned = self.plain_dim, self.mla.rope_dim
        latent = self.q_norm(self.wq_down(x)) if self.mla.q_rank else x
        q = rearrange(self.wq(latent), "b t (h k) -> b h t k", h=self.n_heads)  # (B, H, T, K)
        q = torch.cat((q[..., :plain], ops.rotary(q[..., plain:], *rotary)), dim=-1)
        if self.q_scale != 1:
            q = q * self.q_scale
        latent, shared = self.wkv_down(x)[:, None].split((self.mla.kv_rank, turned), dim=-1)
        latent, shared = self.kv_norm(latent), ops.rotary(shared, *rotary)  # (B, 1, T, R), (B, 1, T, P)
        if cache is not None:
            latent, shared = cache.extend(latent, shared)
        k, v = rearrange(self.wkv(latent[:, 0]), "b s (h k) -> b h s k", h=self.n_heads).split(
            (plain, self.mla.v_dim), dim=-1)
        k = torch.cat((k, shared.expand(-1, self.n_heads, -1, -1)), dim=-1)  # (B, H, S, K)
        return self.wo(rearrange(self.attend(q, k, v, mask, "torch"), "b h t k -> b t (h k)"))

    def cache_widths(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(heads, width) of the two tensors that a layer's cache holds."""
        return (1, self.mla.kv_rank), (1, self.mla.rope_dim)
