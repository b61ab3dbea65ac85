"""The Transformer: every dense family, from GPT-2 to a 500B proposal, in one file that reads from top to bottom.

Letters: B batch, T sequence, D d_model, H query heads, G key-value heads, K head_dim, F d_ff, L layers, V vocabulary.

The model knows no rank, environment variable or device. Constructors set shapes, so they run on the meta device;
`init_weights` sets values. Weights stay in float32; `compute_dtype` is the dtype of activations, and each projection
casts its weight where it uses it, so bfloat16 arithmetic over float32 master weights needs no second copy of anything.
"""

from __future__ import annotations

import hashlib
import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from nanomai import ops
from nanomai.config import ModelConfig
from nanomai.kernels import parse as parse_kernels


class Part(nn.Module):
    """A module that calls ops for which there is more than one implementation."""

    kernels: frozenset[str] | None = None  # those of kernels.KERNELS to use; None leaves it to each op

    def impl(self, op: str) -> str:
        """What to tell an op: auto, torch or triton."""
        return "auto" if self.kernels is None else "triton" if op in self.kernels else "torch"


class Linear(nn.Linear):
    """A projection that computes in the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class RMSNorm(Part):
    """`ops.rms_norm` with its weight; with a residual, (x + residual, the norm of that)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        if residual is None:
            return ops.rms_norm(x, self.weight, self.eps, self.impl("rms_norm"))
        return ops.add_rms_norm(x, residual, self.weight, self.eps, self.impl("rms_norm"))


class LayerNorm(RMSNorm):
    """`ops.layer_norm` with its weight and bias; with a residual as RMSNorm."""

    def __init__(self, dim: int, eps: float):
        super().__init__(dim, eps)
        self.bias = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        x = x if residual is None else x + residual
        y = ops.layer_norm(x, self.weight, self.bias, self.eps)
        return y if residual is None else (x, y)


NORMS = {"rmsnorm": RMSNorm, "layernorm": LayerNorm}


class Attention(Part):
    """Causal self-attention with grouped key-value heads."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        d, q, kv = config.d_model, config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.head_dim = config.head_dim
        self.wq = Linear(d, q, bias="qkv" in config.biases)
        self.wk = Linear(d, kv, bias="qkv" in config.biases)
        self.wv = Linear(d, kv, bias="qkv" in config.biases)
        self.wo = Linear(q, d, bias="out" in config.biases)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, mask: ops.Mask, cache=None) -> Tensor:
        q = rearrange(self.wq(x), "b t (h k) -> b h t k", k=self.head_dim)  # (B, H, T, K)
        k = rearrange(self.wk(x), "b t (g k) -> b g t k", k=self.head_dim)  # (B, G, T, K)
        v = rearrange(self.wv(x), "b t (g k) -> b g t k", k=self.head_dim)
        if rotary is not None:
            q, k = ops.qk_rotary(q, k, *rotary, self.impl("rotary"))
        if cache is not None:
            k, v = cache.extend(k, v)  # (B, G, S, K): the past and the present
        impl = self.impl("attention") if mask is None else "auto"  # whoever made the mask has chosen
        y = ops.attention(q, k, v, mask, impl)
        return self.wo(rearrange(y, "b h t k -> b t (h k)"))


class MLP(Part):
    """Up, a non-linearity, down. Its three forms: GELU (GPT-2), SwiGLU (arXiv 2002.05202), ReLU² (arXiv 2109.08668)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        d, f, bias = config.d_model, config.d_ff, "mlp" in config.biases
        self.activation = config.activation
        self.w_gate = Linear(d, f, bias=bias) if config.activation == "swiglu" else None
        self.w_up = Linear(d, f, bias=bias)
        self.w_down = Linear(f, d, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.activation == "swiglu":
            h = ops.swiglu(self.w_gate(x), self.w_up(x), self.impl("swiglu"))  # (B, T, F)
        elif self.activation == "gelu":
            h = F.gelu(self.w_up(x), approximate="tanh")
        else:
            h = F.relu(self.w_up(x)).square()
        return self.w_down(h)


class Block(nn.Module):
    """Pre-norm residual block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        norm = NORMS[config.norm]
        self.attention_norm = norm(config.d_model, config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = norm(config.d_model, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, mask: ops.Mask, cache=None) -> Tensor:
        x, h = self.mlp_norm(self.attention(self.attention_norm(x), rotary, mask, cache), residual=x)
        return x + self.mlp(h)


class LinearCrossEntropy(Part):
    """The head and the loss as one module without weights, so that it can be compiled as a block can."""

    def forward(self, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None) -> Tensor:
        return ops.linear_cross_entropy(hidden, weight, targets, bias, self.impl("linear_cross_entropy"))


class Transformer(Part):
    """A decoder-only language model."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.compute_dtype = torch.float32
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        learned = config.position == "learned"
        self.positions = nn.Embedding(config.context_length, config.d_model) if learned else None
        # keyed by the global layer index, so that a pipeline stage holds a slice under the same names
        self.blocks = nn.ModuleDict({str(i): Block(config) for i in range(config.n_layers)})
        self.norm = NORMS[config.norm](config.d_model, config.norm_eps)
        self.loss = LinearCrossEntropy()
        self.head = None  # the embedding serves as the head where they are tied
        if not config.tied_embeddings:
            self.head = Linear(config.d_model, config.vocab_size, "head" in config.biases)

    def set_kernels(self, setting: str) -> None:
        """Says which Triton kernels every part uses: auto, torch, triton, or names with commas (`kernels.py`)."""
        chosen = parse_kernels(setting)
        for part in self.modules():
            if isinstance(part, Part):
                part.kernels = chosen

    def forward(self, ids: Tensor, targets: Tensor | None = None, document_ids: Tensor | None = None,
                reduction: str = "mean", cache=None, last_only: bool = False) -> Tensor:
        """Logits (B, T, V) of `ids` (B, T); or, given `targets` (B, T), the cross-entropy in nats.

        `targets` holds -100 where there is no loss; `reduction` is "mean" over the others, or "sum".
        `document_ids` (B, T) keeps each document from seeing the others in its row.
        `cache` (see `sampling.py`) holds the keys and values of earlier positions; `ids` go on from there.
        `last_only` gives the logits of the last position alone, (B, 1, V): what sampling after a long prompt needs.
        """
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction {reduction!r} must be 'mean' or 'sum'")
        if document_ids is not None and document_ids.shape != ids.shape:
            raise ValueError(f"document_ids {tuple(document_ids.shape)} must have the shape of ids, {tuple(ids.shape)}")
        x, rotary, mask = self._enter(ids, document_ids, cache)
        for i, block in enumerate(self.blocks.values()):
            x = block(x, rotary, mask, None if cache is None else cache.layers[i])
        x = self.norm(x[:, -1:] if last_only else x)
        weight, bias = (self.embed.weight, None) if self.head is None else (self.head.weight, self.head.bias)
        if targets is None:
            logits = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
            return logits.to(torch.promote_types(x.dtype, torch.float32))
        loss = self.loss(x.flatten(0, 1), weight, targets.flatten(), bias)
        return loss if reduction == "sum" else loss / (targets != ops.IGNORE).sum()

    def _enter(self, ids: Tensor, document_ids: Tensor | None, cache):
        """Embeddings, the rotation of every position, and who may look at whom."""
        config, (_, t) = self.config, ids.shape
        keys = torch.arange(t, device=ids.device) if cache is None else cache.key_positions(t)
        positions = keys[..., -t:]  # (T,), or (B, T) where rows of a cache began at different places
        x = self.embed(ids).to(self.compute_dtype)  # (B, T, D)
        if self.positions is not None:
            x = x + self.positions(positions.clamp_min(0)).to(x.dtype)
        rotary = None
        if config.position == "rope":
            cos, sin = ops.rotary_table(positions, config.head_dim, config.rope_theta, x.dtype)
            rotary = (cos, sin) if positions.ndim == 1 else (cos[:, None], sin[:, None])
        if cache is not None:
            mask = cache.mask(positions, keys, config.sliding_window)
        else:
            impl = "torch" if x.dtype == torch.float64 else self.impl("masked_attention")
            mask = ops.training_mask(positions, config.sliding_window, document_ids, config.head_dim, impl)
        return x, rotary, mask


ROWS = 64  # of one independently seeded piece of a matrix


@torch.no_grad()
def init_weights(model: Transformer, seed: int = 1337) -> None:
    """Normal weights of std `init_std`, smaller by sqrt(2 L) where a matrix writes to the residual stream (GPT-2).

    Each block of 64 rows of each matrix has its own generator, keyed by (seed, name, block), so a rank that holds any
    slice of a 500B model can draw its own numbers, and 1 rank or 4,096 begin with the same model.
    """
    config = model.config
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(1.0 if name.endswith("norm.weight") else 0.0)
            continue
        writes_residual = name.endswith(("wo.weight", "w_down.weight"))
        std = config.init_std / math.sqrt(2 * config.n_layers) if writes_residual else config.init_std
        for block, rows in enumerate(parameter.split(ROWS)):
            generator = torch.Generator().manual_seed(_key(f"{seed}/{name}/{block}"))
            rows.copy_(torch.empty(rows.shape).normal_(0.0, std, generator=generator))


def _key(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def build_model(config: ModelConfig, seed: int = 1337) -> Transformer:
    """An initialised model; under `torch.device("meta")`, its shapes alone."""
    model = Transformer(config)
    if not model.embed.weight.is_meta:
        init_weights(model, seed)
    return model
