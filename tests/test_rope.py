"""Rotary positions for long contexts: each stretching against its definition, and what LongRoPE's switch does."""

import dataclasses
import math
import re

import pytest
import torch
from random_model import CONTEXT, TINY, greedy, ids, random_model

from nanomai import ops, rope
from nanomai.architecture import ConfigError, ModelConfig, RopeScaling
from nanomai.model import Transformer
from nanomai.sampling import KVCache, generate

ORIGINAL = 8
QUICK = dataclasses.replace(TINY, rope_theta=100.0)
LONGROPE = RopeScaling("longrope", original_context=ORIGINAL, short_factors=(1.0, 1.1, 1.3),
                       long_factors=(1.2, 2.5, 4.0))


def scaled(kind="none", head_dim=64, context=8192, **changes) -> ModelConfig:
    """A configuration like Llama's."""
    pairs = {"short_factors": (1.0,) * (head_dim // 2), "long_factors": (2.0,) * (head_dim // 2)}
    scaling = RopeScaling(kind, **({"original_context": 1024} if kind != "none" else {}) | (
        pairs if kind == "longrope" else {}) | changes)
    return ModelConfig(head_dim=head_dim, context_length=context, rope_theta=5e5, rope_scaling=scaling)


def frequencies(config: ModelConfig, length: int = 1) -> list[float]:
    return rope.frequencies(config, length, dtype=torch.float64).tolist()


def build(**changes) -> Transformer:
    return random_model(dataclasses.replace(QUICK, **changes))


# --- each method against its definition

PLAIN = [5e5 ** (-2 * i / 64) for i in range(32)]


def test_unscaled():
    assert frequencies(scaled()) == pytest.approx(PLAIN)
    partial = dataclasses.replace(scaled(), rotary_dim=16)
    assert frequencies(partial) == pytest.approx([5e5 ** (-2 * i / 16) for i in range(8)])


def test_linear_is_positions_closer_together():
    config, positions = scaled("linear", factor=4.0), torch.arange(50, dtype=torch.float64)
    turned = ops.cos_sin(positions, rope.frequencies(config, 50, dtype=torch.float64))
    expected = ops.cos_sin(positions / 4, torch.tensor(PLAIN, dtype=torch.float64))
    torch.testing.assert_close(turned, expected)


def test_ntk_keeps_the_fastest_pair_and_stretches_the_slowest_by_the_factor():
    got = frequencies(scaled("ntk", factor=4.0))
    assert got[0] == 1.0 and got[-1] == pytest.approx(PLAIN[-1] / 4)
    stretch = [p / g for p, g in zip(PLAIN, got, strict=True)]
    assert stretch == pytest.approx([4 ** (i / 31) for i in range(32)]), "between them, evenly in the exponent"


@pytest.mark.parametrize("low, high", [(1.0, 4.0), (0.5, 9.0)])
def test_llama_3_stretches_by_wavelength(low, high):
    got = frequencies(scaled("llama3", factor=8.0, low_frequency=low, high_frequency=high))
    kinds = set()
    for f, g in zip(PLAIN, got, strict=True):
        wavelength = 2 * math.pi / f
        if wavelength < 1024 / high:
            expected, kind = f, "kept"
        elif wavelength > 1024 / low:
            expected, kind = f / 8, "stretched"
        else:
            smooth = (1024 / wavelength - low) / (high - low)
            expected, kind = (1 - smooth) * f / 8 + smooth * f, "between"
        assert g == pytest.approx(expected)
        kinds.add(kind)
    assert kinds == {"kept", "stretched", "between"}


@pytest.mark.parametrize("original, whole, fast, slow", [
    (4096, True, 32.0, 1.0), (4096, False, 32.0, 1.0), (1024, True, 9.0, 0.5), (7, True, 32.0, 1.0)])
def test_yarn_is_a_ramp_over_pairs(original, whole, fast, slow):
    config = scaled("yarn", factor=40.0, original_context=original, low_frequency=slow, high_frequency=fast,
                    whole_pairs=whole)
    got = frequencies(config)

    def pair(turns):
        """Where a wave makes so many turns: theta^(-pair / 32) original = 2 pi turns."""
        return 32 * math.log(original / (2 * math.pi * turns)) / math.log(5e5)

    first, last = max(pair(fast), 0), pair(slow)
    if whole:
        first, last = math.floor(first), math.ceil(last)
    for i, (f, g) in enumerate(zip(PLAIN, got, strict=True)):
        kept = 1.0 if i <= first else 0.0 if i >= last else (last - i) / (last - first)
        assert g == pytest.approx(kept * f + (1 - kept) * f / 40)
    assert got[0] == 1.0 and got[-1] == pytest.approx(PLAIN[-1] / 40)


def test_longrope_takes_short_factors_up_to_the_original_context_and_long_ones_beyond():
    short, long = [1 + i / 10 for i in range(32)], [2.0 + i for i in range(32)]
    config = scaled("longrope", short_factors=tuple(short), long_factors=tuple(long))
    for length, factors in ((1, short), (1024, short), (1025, long), (8192, long)):
        expected = [f / s for f, s in zip(PLAIN, factors, strict=True)]
        assert frequencies(config, length) == pytest.approx(expected, rel=1e-6)
        assert rope.beyond(config, length) == (length > 1024)
    assert not rope.beyond(scaled("linear"), 8192)


@pytest.mark.parametrize("kind", ["none", "linear", "ntk", "llama3", "yarn", "longrope"])
def test_frequencies_have_the_dtype_and_length_asked_for(kind):
    for dtype in (torch.float32, torch.float64):
        f = rope.frequencies(scaled(kind), 1, "cpu", dtype)
        assert f.dtype == dtype and f.shape == (32,) and f.isfinite().all()


def test_attention_factor():
    phi3 = scaled("longrope", 96, 131072, original_context=4096)
    assert rope.attention_factor(phi3) == pytest.approx(1.19024, abs=5e-6), "what Phi-3-mini-128k's file says"
    assert rope.attention_factor(phi3) == math.sqrt(1 + math.log(32) / math.log(4096))
    assert rope.attention_factor(scaled("longrope", attention_factor=1.243163)) == 1.243163
    assert rope.attention_factor(scaled("longrope", context=1024)) == 1.0, "no longer than before"
    for kind in ("none", "linear", "ntk", "llama3"):
        assert rope.attention_factor(scaled(kind)) == 1.0


def test_factors_of_yarn():
    m = 0.1 * math.log(40) + 1
    assert m == pytest.approx(1.36889, abs=5e-6)
    for mscales, table, scores in (({}, m, 1), ({"mscale": 1.0, "mscale_all_dim": 1.0}, 1, m * m),
                                   ({"mscale": 0.5}, m, 1), ({"mscale_all_dim": 1.0}, m, m * m),
                                   ({"mscale": 1.0, "mscale_all_dim": 0.5}, m / (0.5 + m / 2), (0.5 + m / 2) ** 2),
                                   ({"attention_factor": 1.3, "mscale": 1.0, "mscale_all_dim": 1.0}, 1.3, m * m)):
        config = scaled("yarn", factor=40.0, **mscales)
        assert rope.attention_factor(config) == pytest.approx(table), mscales
        assert rope.latent_factor(config) == pytest.approx(scores), mscales
    shorter = scaled("yarn", factor=0.5, mscale=1.0, mscale_all_dim=2.0)
    assert (rope.attention_factor(shorter), rope.latent_factor(shorter)) == (1.0, 1.0), "no longer than before"
    assert rope.latent_factor(scaled("llama3", factor=40.0, mscale_all_dim=1.0)) == 1.0


# --- inside the model


def test_the_attention_factor_multiplies_every_score():
    """By its square, since cosine and sine of both queries and keys have it: the same as larger queries."""
    x, long = ids(2, 7), dataclasses.replace(LONGROPE, attention_factor=1.5)
    plain = dataclasses.replace(LONGROPE, attention_factor=1.0)
    torch.testing.assert_close(build(rope_scaling=long)(x),
                               build(rope_scaling=plain, attention_scale=1.5**2 / math.sqrt(6))(x))


def test_which_factors_a_text_meets():
    """Short ones of 1 are no scaling; long ones of s are linear scaling by s; one token more, and all keys turn."""
    scaling = dataclasses.replace(LONGROPE, short_factors=(1.0,) * 3, long_factors=(3.0,) * 3, attention_factor=1.0)
    model, x = build(rope_scaling=scaling), ids(2, ORIGINAL + 1)
    linear = build(rope_scaling=RopeScaling("linear", original_context=ORIGINAL, factor=3.0))
    torch.testing.assert_close(model(x[:, :-1]), build()(x[:, :-1]))
    torch.testing.assert_close(model(x), linear(x))
    assert not torch.allclose(model(x)[:, :-1], model(x[:, :-1]))


@pytest.mark.parametrize("kind", ["none", "linear", "ntk", "llama3", "yarn"])
def test_scores_stay_relative(kind):
    """One layer alone sees distances: a text at other positions gives the same."""
    config = dataclasses.replace(QUICK, n_layers=1) if kind == "none" else dataclasses.replace(
        QUICK, n_layers=1, rope_scaling=RopeScaling(kind, original_context=ORIGINAL, factor=3.0))
    f = rope.frequencies(config, CONTEXT, dtype=torch.float64)
    q, k = torch.randn(2, 1, 1, 1, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def score(at_q, at_k):
        turned = [ops.rotary(x, *ops.cos_sin(torch.tensor([at]), f)) for x, at in ((q, at_q), (k, at_k))]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score(5, 2), score(20, 17))
    assert not torch.isclose(score(5, 2), score(5, 3))


def test_partial_rotation_leaves_the_rest_of_a_head_where_it_is():
    x = torch.randn(2, 3, 5, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    cos, sin = ops.rotary_table(torch.arange(5), 4, 100.0, torch.float64)
    y, z = ops.rotary(x, cos, sin), ops.rotary_plain(x, cos, sin)
    assert torch.equal(y[..., 4:], x[..., 4:]) and not torch.isclose(y[:, :, 1:, :4], x[:, :, 1:, :4]).all()
    torch.testing.assert_close(y[..., :4], ops.rotary(x[..., :4], cos, sin))
    torch.testing.assert_close(y, z)
    torch.testing.assert_close(*(torch.autograd.grad(out.square().sum() + out[..., 1].sum(), x) for out in (y, z)))


# --- the cache

SCALINGS = {"linear": RopeScaling("linear", original_context=ORIGINAL, factor=3.0),
            "ntk": RopeScaling("ntk", original_context=ORIGINAL, factor=3.0),
            "llama3": RopeScaling("llama3", original_context=ORIGINAL, factor=3.0),
            "yarn": RopeScaling("yarn", original_context=ORIGINAL, factor=3.0), "longrope": LONGROPE}


@pytest.mark.parametrize("kind", SCALINGS)
def test_generation_across_the_original_context_is_that_without_a_cache(kind):
    model = build(rope_scaling=SCALINGS[kind])
    for n in (3, ORIGINAL - 1, ORIGINAL, ORIGINAL + 1):
        prompt = ids(n, seed=n).tolist()
        assert generate(model, prompt, CONTEXT - n) == greedy(model, prompt, CONTEXT - n), n


@pytest.mark.parametrize("original", [CONTEXT // 3, CONTEXT // 2, 16, CONTEXT - 1, CONTEXT])
def test_a_text_that_was_cut_crosses_the_original_context_again(original):
    """The full cache is cut to its last half, which is read by the short factors if it fits; grown beyond the original
    context, it is read again, with nothing that was cut: token by token the same as that rule spelled out."""
    model = build(rope_scaling=dataclasses.replace(LONGROPE, original_context=original))
    assert generate(model, ids(5).tolist(), 3 * CONTEXT) == greedy(model, ids(5).tolist(), 3 * CONTEXT)


@torch.no_grad()
def test_keeping_the_short_keys_would_write_something_else(monkeypatch):
    """The negative control of the test above."""
    model, prompt = build(rope_scaling=LONGROPE), ids(3, seed=3).tolist()
    right = generate(model, prompt, CONTEXT - 3)
    monkeypatch.setattr("nanomai.sampling._outgrows", lambda *_: False)
    monkeypatch.setattr(model, "_rotary", lambda positions, length, new, dtype: Transformer._rotary(
        model, positions, length, length, dtype))
    assert generate(model, prompt, CONTEXT - 3) != right


@torch.no_grad()
def test_a_cache_of_short_keys_is_refused_beyond():
    model, x = build(rope_scaling=LONGROPE), ids(1, CONTEXT)
    cache = KVCache(model, 1, CONTEXT)
    model(x[:, :ORIGINAL], cache=cache)
    message = ("the text outgrows rope_scaling.original_context 8, and what is cached was turned by the short factors: "
               "read the whole text again")
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        model(x[:, ORIGINAL : ORIGINAL + 1], cache=cache)
    cache = KVCache(model, 1, CONTEXT)  # beyond from the beginning: it goes on
    chunks = [model(part, cache=cache) for part in x.split([ORIGINAL + 1, 1, CONTEXT - ORIGINAL - 2], dim=1)]
    torch.testing.assert_close(chunks[-1], model(x)[:, ORIGINAL + 2 :])


# --- settings that cannot work

LINEAR, LONG = {"kind": "linear", "original_context": ORIGINAL}, dataclasses.asdict(LONGROPE)
ERRORS = [  # of the scaling, of the model
    (LINEAR | {"original_context": 0}, {},
     "rope_scaling.original_context 0 must lie above 0, up to context_length 24", "rope_scaling.original_context"),
    (LINEAR | {"original_context": 25}, {},
     "rope_scaling.original_context 25 must lie above 0, up to context_length 24", "rope_scaling.original_context"),
    (LINEAR | {"factor": -1.0}, {}, "factor -1.0 must be from 1e-06 to 1e+06", "rope_scaling.factor"),
    (LINEAR | {"kind": "ntk", "factor": 1e300}, {}, "factor 1e+300 must be from 1e-06 to 1e+06", "rope_scaling.factor"),
    (LINEAR | {"kind": "ntk"}, {"rotary_dim": 2}, "rope_scaling.kind 'ntk' needs 4 numbers of a head to turn, not 2",
     "rope_scaling.kind"),
    (LINEAR | {"kind": "yarn", "low_frequency": 32.0}, {}, "low_frequency 32.0 must be below high_frequency 4.0",
     "rope_scaling.low_frequency"),
    (LINEAR | {"kind": "llama3", "low_frequency": 4.0}, {}, "low_frequency 4.0 must be below high_frequency 4.0",
     "rope_scaling.low_frequency"),
    (LINEAR | {"kind": "yarn", "mscale": -1.0}, {}, "mscale -1.0 must be from 0 to 1e+06", "rope_scaling.mscale"),
    (LINEAR | {"kind": "yarn"}, {"rope_theta": 1.0},
     "rope_theta 1.0 must be above 1 for yarn: it counts the pairs from fast to slow", "rope_theta"),
    (LONG | {"long_factors": (1.0, 2.0)}, {},
     "rope_scaling.long_factors (1.0, 2.0) must be 3 numbers, one for each pair that turns",
     "rope_scaling.long_factors"),
    (LONG, {"rotary_dim": 4},
     "rope_scaling.short_factors (1.0, 1.1, 1.3) must be 2 numbers, one for each pair that turns",
     "rope_scaling.short_factors"),
    (LONG | {"short_factors": (1.0, 0.0, 1.0)}, {}, "short_factors (1.0, 0.0, 1.0) must be from 1e-06 to 1e+06",
     "rope_scaling.short_factors"),
    (LONG | {"attention_factor": 0.0}, {}, "attention_factor 0.0 must be from 1e-06 to 1e+06",
     "rope_scaling.attention_factor"),
    (LONG | {"original_context": 1}, {}, "rope_scaling.attention_factor None must be given where original_context is 1",
     "rope_scaling.attention_factor"),
    (LINEAR, {"position": "learned"}, "rope_scaling.kind 'linear' has no effect without position: rope",
     "rope_scaling.kind"),
    ({}, {"position": "learned", "rotary_dim": 4}, "rotary_dim 4 has no effect without position: rope", "rotary_dim"),
    ({}, {"rotary_dim": 5}, "rotary_dim 5 is odd; rotary positions turn pairs of numbers", "rotary_dim"),
    ({}, {"rotary_dim": 8}, "rotary_dim 8 must lie above 0, up to head_dim 6", "rotary_dim"),
    ({}, {"rotary_dim": 0}, "rotary_dim 0 must lie above 0, up to head_dim 6", "rotary_dim"),
    ({}, {"rope_theta": 0.0}, "rope_theta 0.0 must be from 1 to 1e+12", "rope_theta"),
]


@pytest.mark.parametrize("scaling, changes, message, field", ERRORS)
def test_impossible_settings(scaling, changes, message, field):
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$") as caught:
        dataclasses.replace(QUICK, rope_scaling=RopeScaling(**scaling), **changes)
    assert caught.value.field == f"model.{field}"
