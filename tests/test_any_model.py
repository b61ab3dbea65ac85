"""Any settings of a model: they are refused in one line that names the field, or they make a model that keeps what
every model promises. Values that cannot be, alone or together, are among those that are drawn."""

import dataclasses
import math
import random
import re
from types import UnionType
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from random_model import TINY, ids, random_model

from nanomai.architecture import ConfigError, MLAConfig, ModelConfig, MoEConfig, RopeScaling, SparseAttention
from nanomai.model import Transformer, build_model
from nanomai.moe import MoE
from nanomai.rope import beyond
from nanomai.sampling import KVCache

WHOLE = {"n_layers": [1, 2, 3], "d_model": [8, 13], "n_heads": [4, 8], "n_kv_heads": [1, 2, 4], "head_dim": [6, 8],
         "d_ff": [1, 20], "vocab_size": [1, 37], "context_length": [1, 5, 12], "qk_norm": [False, True],
         "parallel_block": [False, True], "rotary_dim": [None, 4], "sliding_window": [None, 1, 3, 40],
         "attention_scale": [None, 0.1], "embedding_scale": [1.0, 3.0], "logit_scale": [1.0, 0.5],
         "biases": [(), ("qkv", "mlp"), ("out", "head")], "tied_embeddings": [False, True], "init_std": [0.02, 0.3]}
PARTS = {"moe": MoEConfig, "mla": MLAConfig, "sparse": SparseAttention, "rope_scaling": RopeScaling}
OF_PARTS = {
    "moe": {"n_experts": [4, 6], "experts_per_token": [1, 2, 3], "d_expert": [1, 5], "n_shared_experts": [0, 2],
            "n_dense_layers": [0, 0, 1], "balance_loss": [0.0, 0.01], "z_loss": [0.0, 0.001]},
    "mla": {"kv_rank": [1, 8], "q_rank": [0, 6], "rope_dim": [2, 4], "v_dim": [1, 7]},
    "sparse": {"block": [1, 2, 30], "local_blocks": [1, 2], "vertical_stride": [0, 1, 3], "dense_every": [2, 3]},
    "rope_scaling": {"original_context": [1, 3, 5], "factor": [0.5, 4.0], "attention_factor": [None, 1.2]}}
OF_ROUTER = {"sparsemixer": {"jitter": [0.1, 0.5], "experts_per_token": [2]},
             "sigmoid": {"n_groups": [2], "groups_per_token": [1, 2], "weight_scale": [2.5], "bias_speed": [0.0, 0.1]}}
WITH_LATENTS = {"position": "rope", "sliding_window": None, "biases": (), "qk_norm": False, "rotary_dim": None,
                "attention_scale": None}
SPOILT = {int: [-3, -1, 0, 1, 3, 7], float: [-1.0, 0.0, 1e-320, 2.0, 1e300, math.inf, math.nan]}


def choices(cls) -> dict[str, tuple]:
    """The fields that take one of a few words, with all the words."""
    return {name: get_args(hint) for name, hint in get_type_hints(cls).items() if get_origin(hint) is Literal}


def numbers(cls) -> dict[str, type]:
    """The fields that take a number, or None in its place, with its type."""
    kinds = {name: set(SPOILT) & {hint, *(get_args(hint) if isinstance(hint, UnionType) else ())}
             for name, hint in get_type_hints(cls).items()}
    return {name: kind.pop() for name, kind in kinds.items() if kind}


def settings_of_some_model(rng: random.Random) -> tuple[dict, dict[str, dict]]:
    """Settings of a model and of its parts that mostly go together; in every second model one of them is spoilt."""
    def pick(cls, values):
        return {name: rng.choice(given) for name, given in (choices(cls) | values).items()}

    model = pick(ModelConfig, WHOLE)
    parts = {name: pick(PARTS[name], values) for name, values in OF_PARTS.items() if rng.random() < 0.5}
    if moe := parts.get("moe"):
        moe |= {name: rng.choice(given) for name, given in OF_ROUTER.get(moe["router"], {}).items()}
    if "sparse" in parts:
        model["sliding_window"] = None
    if "mla" in parts:
        model |= WITH_LATENTS | {"n_kv_heads": model["n_heads"]}
    if model["position"] == "learned":
        model["rotary_dim"] = None
        parts.pop("rope_scaling", None)
    if (scaling := parts.get("rope_scaling")) and scaling["kind"] == "longrope":
        turned = parts["mla"]["rope_dim"] if "mla" in parts else model["rotary_dim"] or model["head_dim"]
        scaling |= {"short_factors": (1.0,) * (turned // 2), "long_factors": (1.7,) * (turned // 2)}
    if rng.random() < 0.5:
        where = rng.choice(["", *parts])
        name, kind = rng.choice([*numbers(PARTS.get(where, ModelConfig)).items()])
        parts.get(where, model)[name] = rng.choice(SPOILT[kind])
    return model, parts


def parameters_are_as_many_as_the_closed_form_says(config: ModelConfig) -> None:
    with torch.device("meta"):
        model = Transformer(config)
    assert sum(p.numel() for p in model.parameters()) == config.n_parameters
    idle = sum(p[0].numel() * (config.moe.n_experts - config.moe.experts_per_token)
               for layer in model.modules() if isinstance(layer, MoE) for p in layer.experts.parameters())
    assert config.n_parameters - idle == config.n_active_parameters


def tokens(config: ModelConfig) -> torch.Tensor:
    return ids(2, config.context_length) % config.vocab_size


def trains(config: ModelConfig) -> None:
    model, x = build_model(config), tokens(config)
    loss = model(x, x)
    loss.backward()
    assert loss.isfinite()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name


@torch.no_grad()
def cached_is_uncached(config: ModelConfig, chunk: int) -> None:
    model, x = random_model(config), tokens(config)
    length = x.shape[1]
    # what LongRoPE's long factors turn is read at once up to where they begin
    first = config.rope_scaling.original_context + 1 if beyond(config, length) else min(chunk, length)
    cache = KVCache(model, 2, length)
    pieces = [x[:, :first], *(x[:, first:].split(chunk, dim=1) if first < length else ())]
    torch.testing.assert_close(torch.cat([model(piece, cache=cache) for piece in pieces], dim=1), model(x))


def test_any_model():
    rng, built, refused = random.Random(0), [], set()
    for _ in range(600):
        model, parts = settings_of_some_model(rng)
        try:
            config = ModelConfig(**model, **{name: PARTS[name](**given) for name, given in parts.items()})
        except ConfigError as error:
            *path, name = error.field.split(".")
            assert path[0] == "model" and name in str(error) and "\n" not in str(error), (str(error), error.field)
            refused.add(error.field)
            continue
        try:
            parameters_are_as_many_as_the_closed_form_says(config)
            trains(config)
            cached_is_uncached(config, rng.randint(1, 3))
        except Exception as error:
            raise AssertionError(f"{config}") from error
        built.append(config)
    assert len(built) > 200 and len(refused) > 25, "too few for a claim"
    assert {config.rope_scaling.kind for config in built} == set(choices(RopeScaling)["kind"])
    assert {config.moe.router for config in built if config.moe.n_experts} == set(choices(MoEConfig)["router"])
    assert any(config.mla.kv_rank and config.sparse.block for config in built)


@pytest.mark.parametrize("name", ["embedding_scale", "logit_scale", "attention_scale", "norm_eps", "init_std",
                                  "rope_theta", "moe.weight_scale", "moe.balance_loss", "moe.z_loss", "moe.bias_speed",
                                  "rope_scaling.factor", "rope_scaling.low_frequency", "rope_scaling.high_frequency"])
def test_at_its_bounds_a_setting_still_trains_and_beyond_them_it_is_refused(name):
    moe = MoEConfig(n_experts=4, d_expert=8, router="sigmoid")
    ntk = RopeScaling("ntk", original_context=8, factor=2.0, low_frequency=1e-6, high_frequency=1e6)
    base, (*part, name) = dataclasses.replace(TINY, moe=moe, rope_scaling=ntk), name.split(".")

    def changed(value: float) -> ModelConfig:
        if not part:
            return dataclasses.replace(base, **{name: value})
        return dataclasses.replace(base, **{part[0]: dataclasses.replace(getattr(base, part[0]), **{name: value})})

    for value in (-1.0, math.inf, math.nan, 1e300):
        with pytest.raises(ConfigError, match="^" + re.escape(f"{name} {value} must be from ")) as caught:
            changed(value)
    low, high = str(caught.value).split(" from ")[1].split(",")[0].split(" to ")
    for value in (float(low), float(high)):
        if name not in ("low_frequency", "high_frequency"):  # one would be beyond the other
            trains(changed(value))
