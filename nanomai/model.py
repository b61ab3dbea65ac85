"""The Transformer: every family, from GPT-2 to DeepSeek-V3 and a 500B proposal, by configuration alone.

Read `layers.py` first; `moe.py` and `mla.py` hold the parts that take the place of an MLP or of attention.

Letters: B batch, T sequence, D d_model, H query heads, G key-value heads, K head_dim, F d_ff, L layers, V vocabulary.

The model knows no rank, environment variable or device. Constructors set shapes, so they run on the meta device;
`init_weights` sets values. Weights stay in float32; `compute_dtype` is the dtype of activations, and each projection
casts its weight where it uses it, so bfloat16 arithmetic over float32 master weights needs no second copy of anything.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from nanomai import ops, rope
from nanomai.architecture import ConfigError, ModelConfig
from nanomai.float8 import STEP
from nanomai.kernels import parse as parse_kernels
from nanomai.layers import MLP, NORMS, Embedding, Linear, Part, RMSNorm
from nanomai.masks import Mask, block_sparse_mask, training_mask
from nanomai.mla import LatentAttention
from nanomai.moe import MoE


class Attention(Part):
    """Causal self-attention with grouped key-value heads."""

    attend = staticmethod(ops.attention)

    def __init__(self, config: ModelConfig):
        super().__init__()
        d, q, kv = config.d_model, config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.head_dim, self.eps = config.head_dim, config.norm_eps
        # the scores are divided by sqrt(K) where they are made
        self.q_scale = 1.0 if config.attention_scale is None else config.attention_scale * math.sqrt(config.head_dim)
        self.wq = Linear(d, q, bias="qkv" in config.biases)
        self.wk = Linear(d, kv, bias="qkv" in config.biases)
        self.wv = Linear(d, kv, bias="qkv" in config.biases)
        self.wo = Linear(q, d, bias="out" in config.biases)
        self.q_norm, self.k_norm = (RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
                                    for _ in range(2))

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, mask: Mask, cache=None) -> Tensor:
        """x (B, T, D) -> (B, T, D). `rotary`: cosines and sines (T, pairs), or (B, 1, T, pairs); `mask`: see masks.py.

        `cache`, a layer's, is given the keys and values of x and gives back those of the past as well.
        """
        q = rearrange(self.wq(x), "b t (h k) -> b h t k", k=self.head_dim)  # (B, H, T, K)
        k = rearrange(self.wk(x), "b t (g k) -> b g t k", k=self.head_dim)  # (B, G, T, K)
        v = rearrange(self.wv(x), "b t (g k) -> b g t k", k=self.head_dim)
        if rotary is not None:
            weights = (None, None) if self.q_norm is None else (self.q_norm.weight, self.k_norm.weight)
            q, k = ops.qk_rotary(q, k, *rotary, *weights, self.eps, self.impl("rotary"))
        elif self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.q_scale != 1:
            q = q * self.q_scale
        if cache is not None:
            k, v = cache.extend(k, v)  # (B, G, S, K): the past and the present
        impl = self.impl("attention") if mask is None else "auto"  # whoever made the mask has chosen
        y = self.attend(q, k, v, mask, impl)
        return self.wo(rearrange(y, "b h t k -> b t (h k)"))

    def cache_widths(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(heads, width) of the two tensors that a layer's cache holds."""
        heads = self.wk.out_features // self.head_dim
        return (heads, self.head_dim), (heads, self.head_dim)


class Block(nn.Module):
    """Pre-norm residual block: x + attention(norm(x)), then x + mlp(norm(x)); or both at once, from one norm."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        norm = NORMS[config.norm]
        self.attention_norm = norm(config.d_model, config.norm_eps)
        self.attention = (LatentAttention if config.mla.kv_rank else Attention)(config)
        self.mlp_norm = None if config.parallel_block else norm(config.d_model, config.norm_eps)
        self.mlp = MoE(config) if config.has_experts(layer) else MLP(config, config.d_ff, "mlp" in config.biases)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, mask: Mask, cache=None,
                aux_scale: Tensor | None = None) -> Tensor:
        """x (B, T, D) -> (B, T, D); `aux_scale` is for the routers' losses, the rest for attention."""
        aux = (aux_scale,) if isinstance(self.mlp, MoE) else ()
        h = self.attention_norm(x)
        y = self.attention(h, rotary, mask, cache)
        if self.mlp_norm is None:
            return x + y + self.mlp(h, *aux)
        x, h = self.mlp_norm(y, residual=x)
        return x + self.mlp(h, *aux)


class LinearCrossEntropy(Part):
    """The head and the loss as one module without weights, so that it can be compiled as a block can."""

    def forward(self, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None) -> Tensor:
        """hidden (N, D), weight (V, D), targets (N,), bias (V,) -> the sum of the cross-entropies, in nats: ()"""
        return ops.linear_cross_entropy(hidden, weight, targets, bias, self.impl("linear_cross_entropy"))


class Transformer(Part):
    """A decoder-only language model."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.compute_dtype = torch.float32
        self.embed = Embedding(config.vocab_size, config.d_model)
        learned = config.position == "learned"
        self.positions = Embedding(config.context_length, config.d_model) if learned else None
        # keyed by the global layer index, so that a pipeline stage holds a slice under the same names
        self.blocks = nn.ModuleDict({str(i): Block(config, i) for i in range(config.n_layers)})
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

    def use_float8(self, part: Callable[[str, Sequence[int]], Sequence[int]] = lambda name, shape: shape) -> None:
        """From now on projections inside blocks are in float8; ConfigError where one cannot be.

        `part` gives, of a parameter of this name and shape, the shape that one rank computes with.
        """
        for name, module in self.blocks.named_modules():
            if isinstance(module, Linear):
                m, k = part(f"blocks.{name}.weight", whole := module.weight.shape)
                if m % STEP or k % STEP:
                    here = "" if (m, k) == tuple(whole) else " on a rank"
                    raise ConfigError(f"float8 needs multiples of {STEP}, and blocks.{name}.weight is {m} x {k}{here}",
                                      "train.float8")
                module.float8 = True

    def forward(self, ids: Tensor, targets: Tensor | None = None, /, document_ids: Tensor | None = None,
                reduction: str = "mean", cache=None, last_only: bool = False, hidden: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) of `ids` (B, T); or, given `targets` (B, T), the cross-entropy in nats.

        `targets` holds -100 where there is no loss; `reduction` is "mean" over the others, or "sum".
        `document_ids` (B, T) keeps each document from seeing the others in its row.
        `cache` (see `sampling.py`) holds the keys and values of earlier positions; `ids` go on from there.
        `last_only` gives the logits of the last position alone, (B, 1, V): what sampling after a long prompt needs.
        A part of a model goes on from `hidden` (B, T, D) where it has no embedding, and without a norm ends with such.
        """
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction {reduction!r} must be 'mean' or 'sum'")
        if document_ids is not None and document_ids.shape != ids.shape:
            raise ValueError(f"document_ids {tuple(document_ids.shape)} must have the shape of ids, {tuple(ids.shape)}")
        if document_ids is not None and cache is not None:
            raise ValueError("document_ids cannot be given with a cache: each of its rows is one document")
        x, rotary, dense_mask, sparse_mask = self._enter(ids, document_ids, cache, hidden)
        count = None if targets is None else (targets != ops.IGNORE).sum()
        aux_scale = self._aux_scale(count, reduction)
        for i, block in zip(map(int, self.blocks), self.blocks.values(), strict=True):
            mask = sparse_mask if self.config.is_sparse(i) else dense_mask
            x = block(x, rotary, mask, None if cache is None else cache.layers[i], aux_scale)
        if self.norm is None:
            return x
        x = self.norm(x[:, -1:] if last_only else x)
        if self.config.logit_scale != 1:
            x = x * self.config.logit_scale
        weight, bias = (self.embed.weight, None) if self.head is None else (self.head.weight, self.head.bias)
        if targets is None:
            logits = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
            return logits.to(torch.promote_types(x.dtype, torch.float32))
        loss = self.loss(x.flatten(0, 1), weight, targets.flatten(), bias)
        return loss if reduction == "sum" else loss / count

    def _aux_scale(self, count: Tensor | None, reduction: str) -> Tensor | None:
        """What the routers' losses, which are means, are multiplied by: the count of tokens where the loss is a sum."""
        if count is None or not self.training or not self.config.moe.n_experts:
            return None
        return count.float() if reduction == "sum" else torch.ones((), device=count.device)

    def _enter(self, ids: Tensor, document_ids: Tensor | None, cache, hidden: Tensor | None = None):
        """Embeddings (B, T, D), the rotation of every position, and the masks of dense and of sparse layers."""
        config, (_, t) = self.config, ids.shape
        # (T,) and (S,), or (B, T) and (B, S) where rows of a cache began at different places
        positions, keys = (torch.arange(t, device=ids.device),) * 2 if cache is None else cache.positions(t)
        x = hidden if self.embed is None else self.embed(ids).to(self.compute_dtype)  # (B, T, D)
        if config.embedding_scale != 1 and self.embed is not None:
            x = x * config.embedding_scale
        if self.positions is not None:
            if (length := keys.shape[-1]) > config.context_length:
                raise ValueError(f"{length} tokens: learned positions end at context_length {config.context_length}")
            x = x + self.positions(positions.clamp_min(0)).to(x.dtype)
        rotary = None
        if config.position == "rope":
            past = 0 if cache is None else cache.length
            rotary = self._rotary(positions, keys.shape[-1], past, torch.promote_types(x.dtype, torch.float32))
        mask = self.mask(keys, document_ids) if cache is None else cache.mask(positions, keys, config.sliding_window)
        return x, rotary, mask, self._sparse_mask(positions, keys, document_ids, cache)

    def mask(self, positions: Tensor, document_ids: Tensor | None, queries: Tensor | None = None) -> Mask:
        """Of whole sequences, for layers that are not sparse: positions (T,), document_ids (B, T).

        Where not all look, `queries` are the positions of those that do; sparse layers then need a matrix as well.
        """
        config, in_part = self.config, queries is not None
        plain = config.mla.kv_rank or self.compute_dtype == torch.float64 or (config.sparse.block and in_part)
        return training_mask(positions, config.sliding_window, document_ids, config.head_dim,
                             "torch" if plain else self.impl("masked_attention"), queries)

    def _rotary(self, positions: Tensor, length: int, past: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines at `positions` in a text of `length` tokens, of which `past` were turned before."""
        config = self.config
        if past and rope.beyond(config, length) and not rope.beyond(config, past):
            raise ValueError(f"the text outgrows rope_scaling.original_context {config.rope_scaling.original_context}, "
                             "and what is cached was turned by the short factors: read the whole text again")
        cos, sin = ops.cos_sin(positions, rope.frequencies(config, length, positions.device, dtype))
        if (factor := rope.attention_factor(config)) != 1:
            cos, sin = cos * factor, sin * factor
        return (cos, sin) if positions.ndim == 1 else (cos[:, None], sin[:, None])

    def _sparse_mask(self, positions: Tensor, keys: Tensor, document_ids: Tensor | None, cache) -> Tensor | None:
        """For the block-sparse layers, if there are any: what a dense layer may see, less what is far."""
        config, sparse = self.config, self.config.sparse
        if not sparse.block:
            return None
        seen = block_sparse_mask(positions, keys, config.n_heads, sparse.block, sparse.local_blocks,
                                 sparse.vertical_stride)
        dense = self.mask(keys, document_ids, positions) if cache is None else cache.mask(positions, keys, None)
        return seen if dense is None else seen & dense


ROWS = 64  # of one independently seeded piece of a matrix


def whole(parameter: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """All of a parameter, from its first element on: what one process holds."""
    return parameter, (0,) * parameter.ndim


@torch.no_grad()
def init_weights(model: Transformer, seed: int = 1337, share=whole) -> None:
    """Normal weights of std `init_std`, smaller by sqrt(2 L) where a matrix writes to the residual stream (GPT-2).

    Each block of 64 rows of each matrix has its own generator, keyed by (seed, name, expert, block), so a rank that
    holds any slice of a 500B model can draw its own numbers, and 1 rank or 4,096 begin with the same model. `share`
    gives what this rank holds of a parameter, and where in each dimension it begins.
    """
    config = model.config
    for buffer in model.buffers():  # the selection bias and load of a router
        buffer.zero_()
    for name, parameter in model.named_parameters():
        held, begin = share(parameter)
        if parameter.ndim == 1:
            held.fill_(1.0 if name.endswith("norm.weight") else 0.0)
            continue
        writes_residual = name.endswith(("wo.weight", "w_down.weight", "experts.w_down"))
        std = config.init_std / math.sqrt(2 * config.n_layers) if writes_residual else config.init_std
        matrices = held.unbind() if parameter.ndim == 3 else [held]
        for expert, matrix in enumerate(matrices, begin[0]):
            place = f"{seed}/{name}/{expert}" if parameter.ndim == 3 else f"{seed}/{name}"
            _draw(matrix, place, std, begin[-2:], parameter.shape[-2:])


def _draw(matrix: Tensor, place: str, std: float, begin: tuple[int, int], shape: tuple[int, int]) -> None:
    """Fills the rows and columns from `begin` on of a matrix of `shape`, of which `matrix` is a part."""
    (top, left), (height, width) = begin, shape
    for block in range(top // ROWS, -(-(top + len(matrix)) // ROWS)):
        first, last = block * ROWS, min((block + 1) * ROWS, height)
        generator = torch.Generator().manual_seed(_key(f"{place}/{block}"))
        drawn = torch.empty(last - first, width).normal_(0.0, std, generator=generator)
        low, high = max(first, top), min(last, top + len(matrix))
        matrix[low - top : high - top] = drawn[low - first : high - first, left : left + matrix.shape[1]]


def _key(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def build_model(config: ModelConfig, seed: int = 1337) -> Transformer:
    """An initialised model; under `torch.device("meta")`, its shapes alone."""
    model = Transformer(config)
    if not model.embed.weight.is_meta:
        init_weights(model, seed)
    return model
