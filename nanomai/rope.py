"""How fast each pair of a head turns, for contexts as long as the first training's and for longer ones.

A pair turns by position * frequency. Beyond the original context of n positions the slow pairs reach angles that
training never saw; each method below stretches wavelengths so that they don't, at some price for near positions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nanomai.architecture import ModelConfig, RopeScaling


def frequencies(config: ModelConfig, length: int, device: torch.device | str | None = None,
                dtype: torch.dtype = torch.float32) -> Tensor:
    """Radians a position that each pair turns by, in a text of `length` tokens: (turned_dim / 2,)"""
    scaling, dim, theta = config.rope_scaling, config.turned_dim, config.rope_theta
    if scaling.kind == "ntk":  # the fastest pair stays, the slowest is stretched by the factor
        theta = theta * scaling.factor ** (dim / (dim - 2))
    plain = theta ** (-torch.arange(0, dim, 2, device=device, dtype=dtype) / dim)
    if scaling.kind == "linear":
        return plain / scaling.factor
    if scaling.kind in ("llama3", "yarn"):
        return _by_wavelength(plain, config)
    if scaling.kind == "longrope":
        factors = scaling.long_factors if beyond(config, length) else scaling.short_factors
        return plain / torch.tensor(factors, device=device, dtype=dtype)
    return plain


def _by_wavelength(plain: Tensor, config: ModelConfig) -> Tensor:
    """Waves that turn often in the original context stay, slow ones are stretched, between them a ramp."""
    scaling, pairs = config.rope_scaling, len(plain)
    often, seldom = scaling.high_frequency, scaling.low_frequency
    if scaling.kind == "llama3":  # a straight line over the turns that a wave makes
        turns = plain * scaling.original_context / (2 * math.pi)
        kept = (turns - seldom) / (often - seldom)
    else:  # yarn: over the pairs, from the last that turns `often` to the first that turns `seldom`
        first, last = (pairs * math.log(scaling.original_context / (2 * math.pi * turns), config.rope_theta)
                       for turns in (often, seldom))
        if scaling.whole_pairs:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, 2 * pairs - 1)  # bounds, and the 0.001, of the authors' code
        kept = 1 - (torch.arange(pairs, device=plain.device, dtype=plain.dtype) - first) / (last - first or 0.001)
    kept = kept.clamp(0, 1)
    return kept * plain + (1 - kept) * plain / scaling.factor


def beyond(config: ModelConfig, length: int) -> bool:
    """Whether LongRoPE turns to its long factors: keys that were cached with the short ones are of no use then."""
    return config.rope_scaling.kind == "longrope" and length > config.rope_scaling.original_context


def attention_factor(config: ModelConfig) -> float:
    """What LongRoPE and YaRN multiply cosines and sines by: softmax over more keys needs larger scores."""
    scaling = config.rope_scaling
    if scaling.kind not in ("longrope", "yarn"):
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.kind == "yarn":
        both = scaling.mscale and scaling.mscale_all_dim
        return _m(scaling, scaling.mscale) / _m(scaling, scaling.mscale_all_dim) if both else _m(scaling, 1.0)
    longer = config.context_length / scaling.original_context
    return math.sqrt(1 + math.log(longer) / math.log(scaling.original_context))


def latent_factor(config: ModelConfig) -> float:
    """What YaRN multiplies the scores of latent attention by, where cosines and sines reach a part of a head only."""
    scaling = config.rope_scaling
    return _m(scaling, scaling.mscale_all_dim) ** 2 if scaling.kind == "yarn" else 1.0


def _m(scaling: RopeScaling, weight: float) -> float:
    """YaRN's m(weight), as `RopeScaling` has it."""
    return 1 + 0.1 * weight * math.log(max(1.0, scaling.factor))
