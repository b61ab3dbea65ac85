"""Multi-head latent attention: against one query at a time, its cache, its counts, its gradients."""

import dataclasses
import math
import re

import pytest
import torch
from random_model import CONTEXT, TINY, V, greedy, ids, random_model

from nanomai import ops
from nanomai.architecture import ConfigError, MLAConfig, ModelConfig
from nanomai.mla import LatentAttention
from nanomai.model import build_model
from nanomai.sampling import KVCache, generate

LATENT = dataclasses.replace(TINY, n_kv_heads=4, head_dim=10,
                             mla=MLAConfig(kv_rank=8, q_rank=12, rope_dim=4, v_dim=6))
KINDS = {"latent queries": {}, "plain queries": {"q_rank": 0}, "wide values": {"v_dim": 14},
         "all turned": {"rope_dim": 10}}


def config(**mla) -> ModelConfig:
    return dataclasses.replace(LATENT, mla=dataclasses.replace(LATENT.mla, **mla))


def rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean() + 1e-5).sqrt() * weight


def turn(x: torch.Tensor, position: int) -> torch.Tensor:
    half = len(x) // 2
    angles = position * 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    z = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones(half, dtype=torch.float64), angles)
    return torch.cat((z.real, z.imag))


def definition(a: LatentAttention, x: torch.Tensor) -> torch.Tensor:
    """One sequence x (T, D), one query and one head at a time."""
    m, heads, out = a.mla, a.n_heads, []
    down = [a.wkv_down.weight @ row for row in x]
    latents = [rms(row[: m.kv_rank], a.kv_norm.weight) for row in down]
    shared = [turn(row[m.kv_rank :], j) for j, row in enumerate(down)]
    for i, row in enumerate(x):
        source = rms(a.wq_down.weight @ row, a.q_norm.weight) if m.q_rank else row
        values = []
        for w_q, w_kv in zip(a.wq.weight.chunk(heads), a.wkv.weight.chunk(heads), strict=True):
            q = w_q @ source
            q_plain, q_turned = q[: a.plain_dim], turn(q[a.plain_dim :], i)
            kv = [w_kv @ latent for latent in latents[: i + 1]]
            scores = [(q_plain @ pair[: a.plain_dim] + q_turned @ shared[j]) / math.sqrt(len(q))
                      for j, pair in enumerate(kv)]
            p = torch.stack(scores).softmax(0)
            values.append(sum(w * pair[a.plain_dim :] for w, pair in zip(p, kv, strict=True)))
        out.append(a.wo.weight @ torch.cat(values))
    return torch.stack(out)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("limit", [0, 2**25], ids=["library", "explicit"])
def test_the_definition(kind, limit, monkeypatch):
    monkeypatch.setattr(ops, "EXPLICIT_SCORES_LIMIT", limit)
    c = config(**KINDS[kind])
    attention = random_model(c).blocks["0"].attention
    x = torch.randn(2, 9, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = attention(x, ops.rotary_table(torch.arange(9), c.mla.rope_dim, 10_000.0, torch.float64), None)
    z = torch.stack([definition(attention, row) for row in x])
    torch.testing.assert_close(y, z)
    wanting = [x, *attention.parameters()]
    got, wanted = (torch.autograd.grad((out * torch.linspace(-1, 1, 24)).sum(), wanting) for out in (y, z))
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_float64_gradients_against_differences(kind):
    """Of the whole model, every parameter, along one random direction."""
    model, x = random_model(config(**KINDS[kind])), ids(1, 5)
    named = dict(model.named_parameters())
    gradients = torch.autograd.grad(model(x, x), [*named.values()])
    for i, ((name, p), gradient) in enumerate(zip(named.items(), gradients, strict=True)):
        direction = torch.randn(p.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(i))
        with torch.no_grad():
            high, low = (torch.func.functional_call(model, {name: p + e * direction}, (x, x)) for e in (1e-5, -1e-5))
        assert ((high - low) / 2e-5).item() == pytest.approx((gradient * direction).sum().item(), rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunks", [[1] * 12, [5, 1, 1, 5], [12]], ids=str)
@torch.no_grad()
def test_cached_is_uncached(kind, chunks):
    model, x = random_model(config(**KINDS[kind])), ids(3, 12)
    cache = KVCache(model, 3, CONTEXT)
    cached = torch.cat([model(part, cache=cache) for part in x.split(chunks, dim=1)], dim=1)
    torch.testing.assert_close(cached, model(x))


def test_generation_is_that_without_a_cache():
    model, prompts = random_model(LATENT), [ids(n, seed=n).tolist() for n in (2, 9, 5)]
    assert generate(model, prompts, 10) == [greedy(model, prompt, 10) for prompt in prompts]


@pytest.mark.parametrize("kind", KINDS)
def test_the_cache_holds_one_latent_and_one_key_a_token(kind):
    c = config(**KINDS[kind])
    cache = KVCache(build_model(c), 2, 7)
    layer = cache.layers[0]
    assert layer.keys.shape == (2, 1, 7, 8) and layer.values.shape == (2, 1, 7, c.mla.rope_dim)
    held = sum(t.numel() * t.element_size() for x in cache.layers for t in (x.keys, x.values))
    assert held == 2 * 7 * c.kv_cache_bytes_per_token(bytes_per_value=4)


def test_deepseek_v3s_cache():
    """(512 + 64) numbers in each of 61 layers."""
    c = ModelConfig(n_layers=61, n_heads=128, n_kv_heads=128, head_dim=192, mla=MLAConfig(512, 1536, 64, 128))
    assert c.kv_cache_bytes_per_token() == 61 * 576 * 2


@pytest.mark.parametrize("kind", KINDS)
def test_counts(kind):
    c = config(**KINDS[kind])
    model = build_model(c)
    assert c.n_parameters == sum(p.numel() for p in model.parameters())
    assert c.attention_parameters == sum(p.numel() for p in model.blocks["0"].attention.parameters())


def test_documents_are_alone():
    model, x, documents = random_model(LATENT), ids(1, 11), torch.tensor([[0] * 5 + [1] * 6])
    changed = x.clone()
    changed[:, :5] = (changed[:, :5] + 1) % V
    before, after = (model(i, document_ids=documents) for i in (x, changed))
    assert torch.equal(before[:, 5:], after[:, 5:]) and not torch.isclose(before[:, :5], after[:, :5]).all()
    torch.testing.assert_close(before[:, 5:], model(x[:, 5:]))


def test_a_compiled_block_is_the_eager_one():
    model = random_model(LATENT)
    block, rotary = model.blocks["0"], model._enter(ids(2, 8), None, None)[1]
    x = torch.randn(2, 8, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    wanting = [x, *block.parameters()]
    eager = block(x, rotary, None)
    expected = torch.autograd.grad(eager.square().sum(), wanting)
    block.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    compiled = block(x, rotary, None)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(torch.autograd.grad(compiled.square().sum(), wanting), expected)


@pytest.mark.parametrize("name, value, wanted", [
    ("n_kv_heads", 2, 4), ("sliding_window", 4, "null"), ("biases", ("qkv",), ()), ("qk_norm", True, False),
    ("position", "learned", "rope"), ("attention_scale", 0.1, "null"), ("rotary_dim", 4, "null")])
def test_what_it_cannot_be_put_together_with(name, value, wanted):
    message = f"{name} {value!r} must be {wanted} in a model with latent attention"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$") as caught:
        dataclasses.replace(LATENT, **{name: value})
    assert caught.value.field == f"model.{name}"


@pytest.mark.parametrize("name, value, why", [
    ("rope_dim", 12, "mla.rope_dim 12 must lie above 0, up to head_dim 10"),
    ("rope_dim", 3, "mla.rope_dim 3 is odd; rotary positions turn pairs of numbers"),
    ("rope_dim", -2, "rope_dim -2 must be at least 1"), ("v_dim", 0, "v_dim 0 must be at least 1"),
    ("kv_rank", -8, "kv_rank -8 must be at least 0"), ("q_rank", -1, "q_rank -1 must be at least 0")])
def test_impossible_settings(name, value, why):
    with pytest.raises(ConfigError, match=f"^{re.escape(why)}$") as caught:
        config(**{name: value})
    assert caught.value.field == f"model.mla.{name}"
