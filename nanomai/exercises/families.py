"""Checks of `notebooks/05b_families`."""

from dataclasses import replace

import torch

from nanomai.architecture import MLAConfig, ModelConfig
from nanomai.config_file import load_config
from nanomai.model import Attention
from nanomai.show import exercise


@exercise
def check_cache_bytes(answer):
    """`answer(config, length)`: bytes of the keys and values in bfloat16 that a text of so many tokens needs."""
    plain = ModelConfig(n_layers=3, d_model=24, n_heads=6, n_kv_heads=6, head_dim=10, context_length=64)
    latent = MLAConfig(kv_rank=14, rope_dim=4, v_dim=8)
    for what, config in [
            ("a cache for every head", plain),
            ("grouped queries", replace(plain, n_kv_heads=2)),
            ("a window of 9", replace(plain, n_kv_heads=3, sliding_window=9)),
            ("latent attention", replace(plain, mla=latent)),
            ("mistral-7b", load_config("mistral-7b").model),
            ("deepseek-v3", load_config("deepseek-v3").model)]:
        for length in (5, 9, 40, 100_000):
            kept = min(length, config.sliding_window or length)
            true, got = kept * config.kv_cache_bytes_per_token(), answer(config, length)
            assert got == true, f"{what}, {length:,} tokens: {true:,} bytes, not {got:,}"


@exercise
def check_swiglu_width(answer):
    """`answer(d_ff, multiple)`: the least multiple that gives a gated MLP at least the weights of an ungated one."""
    for d_ff, multiple in [(512, 1), (512, 8), (4 * 4096, 256), (4 * 5120, 256), (4 * 3072, 256), (99, 3), (96, 64)]:
        got, d = answer(d_ff, multiple), 7
        weights, least = 3 * d * got, 2 * d * d_ff
        case = f"d_ff {d_ff:,}, multiple {multiple}"
        assert isinstance(got, int), f"{case}: the width must be a whole number, not {got!r}"
        assert got % multiple == 0, f"{case}: {got:,} is not a multiple of {multiple}"
        assert weights >= least, f"{case}: {got:,} is too narrow: 3 x {got:,} matrices' rows against 2 x {d_ff:,}"
        assert weights - least < 3 * d * multiple, f"{case}: {got:,} is wider than it need be"


@exercise
def check_split_qkv(answer):
    """`answer(fused, config)`: the rows of a fused weight, queries, keys, values, as (wq, wk, wv)."""
    generator = torch.Generator().manual_seed(0)
    for heads, kv_heads, head_dim in [(4, 4, 6), (6, 2, 4), (3, 1, 8), (2, 1, 10)]:
        config = ModelConfig(d_model=14, n_heads=heads, n_kv_heads=kv_heads, head_dim=head_dim)
        case = f"{heads} heads, {kv_heads} key-value heads of {head_dim}"
        rows = (heads + 2 * kv_heads) * head_dim
        fused = torch.randn(rows, config.d_model, generator=generator)
        parts = answer(fused.clone(), config)
        assert isinstance(parts, tuple) and len(parts) == 3, "return three tensors: queries, keys, values"
        layer = Attention(config)
        there = {"queries": layer.wq, "keys": layer.wk, "values": layer.wv}
        for part, (name, matrix) in zip(parts, there.items(), strict=True):
            assert part.shape == matrix.weight.shape, \
                f"{case}: {name} have shape {tuple(part.shape)}; the model wants {tuple(matrix.weight.shape)}"
        assert torch.equal(torch.cat(parts), fused), f"{case}: the rows come back in another order"
