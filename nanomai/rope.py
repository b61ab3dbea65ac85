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
    if scaling.kind == "llama3":
        return _by_wavelength(plain, scaling)
    if scaling.kind == "longrope":
        factors = scaling.long_factors if beyond(config, length) else scaling.short_factors
        return plain / torch.tensor(factors, device=device, dtype=dtype)
    return plain


def _by_wavelength(plain: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1: waves that turn often in the original context stay, slow ones are stretched, between them a ramp."""
    turns = plain * scaling.original_context / (2 * math.pi)
    kept = ((turns - scaling.low_frequency) / (scaling.high_frequency - scaling.low_frequency)).clamp(0, 1)
    return kept * plain + (1 - kept) * plain / scaling.factor


def beyond(config: ModelConfig, length: int) -> bool:
    """Whether LongRoPE turns to its long factors: keys that were cached with the short ones are of no use then."""
    return config.rope_scaling.kind == "longrope" and length > config.rope_scaling.original_context


def attention_factor(config: ModelConfig) -> float:
    """What LongRoPE multiplies cosines and sines by: softmax over more keys needs larger scores (arXiv 2402.13753)."""
    scaling = config.rope_scaling
    if scaling.kind != "longrope":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    longer = config.context_length / scaling.original_context
    return math.sqrt(1 + math.log(longer) / math.log(scaling.original_context))
