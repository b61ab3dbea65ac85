"""An export is what transformers loads and computes, or one line that names what no class has: random small models."""

import dataclasses
import json
import random
import shutil

import pytest
import torch
import transformers as hf
from random_model import random_model

from nanomai.architecture import ConfigError, MLAConfig, ModelConfig, MoEConfig, RopeScaling, SparseAttention
from nanomai.config_file import load_config
from nanomai.hub import HubError, read_model, to_hf
from nanomai.hub.settings import config_of, settings_of

GPT2 = {"norm": "layernorm", "activation": "gelu", "position": "learned", "biases": ("qkv", "out", "mlp")}
PHI = {"norm": "layernorm", "activation": "gelu", "parallel_block": True, "tied_embeddings": False,
       "biases": ("qkv", "out", "mlp", "head")}
PHI3 = {"head_dim": 8, "rotary_dim": 4}
MIXTRAL = {"moe": MoEConfig(4, d_expert=8)}
PHIMOE = {"norm": "layernorm", "biases": ("qkv", "out"), "moe": MoEConfig(4, 2, 8, router="sparsemixer", jitter=1.0)}
DEEPSEEK = {"n_heads": 2, "n_kv_heads": 2, "norm_eps": 1e-6, "mla": MLAConfig(8, 6, 4, 5), "moe": MoEConfig(
    4, 2, 8, 1, 1, router="sigmoid", n_groups=2, groups_per_token=1, weight_scale=2.0)}
STRAIGHT = DEEPSEEK | {"mla": MLAConfig(8, 0, 4, 5)}


def scalings(pairs):
    return [RopeScaling(), RopeScaling("linear", 8, 2.0), RopeScaling("ntk", 8, 2.0), RopeScaling("llama3", 8, 2.0),
            RopeScaling("yarn", 8, 2.0, high_frequency=32.0, mscale=1.0, mscale_all_dim=0.5),
            RopeScaling("longrope", 8, short_factors=(1.0,) * pairs, long_factors=tuple(range(1, pairs + 1)))]


def random_config(draw):
    """One that can work: a family's, with up to three of its settings changed, or odd ones."""
    pick = draw.choice
    while True:
        heads, head_dim = pick([1, 2, 3]), pick([4, 8])
        values = {"n_layers": 2, "d_model": pick([heads * head_dim, 20]), "n_heads": heads, "n_kv_heads": heads,
                  "head_dim": head_dim, "d_ff": 12, "vocab_size": 29, "context_length": 16}
        values |= pick([{}, GPT2, PHI, PHI3 | {"d_model": 8 * heads}, MIXTRAL, PHIMOE, DEEPSEEK, STRAIGHT])
        turned = 4 if "mla" in values else values.get("rotary_dim", values["head_dim"])
        values["rope_scaling"] = pick([RopeScaling(), pick(scalings(turned // 2))])
        odd = {"rotary_dim": 4, "n_kv_heads": 1, "sliding_window": 5, "tied_embeddings": pick([True, False]),
               "biases": pick([(), ("qkv",), ("qkv", "out"), ("mlp",)]),
               "norm_eps": 1e-6, "qk_norm": True, "norm": "layernorm", "attention_scale": pick([0.3, 0.5]),
               "activation": pick(["relu2", "gegelu", "gelu"]), "logit_scale": 0.5, "rope_theta": 500.0,
               "moe": pick([MoEConfig(), MIXTRAL["moe"], DEEPSEEK["moe"]]), "sparse": SparseAttention(4),
               "mla": pick([MLAConfig(), DEEPSEEK["mla"]])}
        likely = ["rotary_dim", "n_kv_heads", "sliding_window", "tied_embeddings", "biases", "norm_eps", "moe"]
        names = draw.sample(pick([likely, list(odd)]), pick([0, 1, 1, 2, 3]))
        try:
            return ModelConfig(**values | {name: odd[name] for name in names})
        except ConfigError:
            continue


def logits_of_theirs(folder, ids):
    """The folder as transformers loads it, with nothing missing and nothing left over."""
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    theirs, found = getattr(hf, name).from_pretrained(folder, attn_implementation="eager", output_loading_info=True)
    assert not any(found.values()), found
    theirs.set_experts_implementation("eager")
    with torch.no_grad():
        return name, theirs(ids).logits


@pytest.mark.parametrize("seed", range(4))
def test_an_export_is_loaded_strictly_or_refused_by_name(seed, tmp_path):
    draw, seen, refused = random.Random(seed), set(), 0
    torch.manual_seed(seed)
    for _ in range(50):
        config = random_config(draw)
        model = random_model(config, torch.float32)
        try:
            to_hf(model, tmp_path / "out")
        except HubError as error:
            assert str(error).startswith("no class of transformers that nanomai knows"), error
            assert "but for" in str(error) or " has " in str(error), error
            assert "\n" not in str(error) and len(str(error)) < 400
            refused += 1
            continue
        only_short = config.moe.router == "sparsemixer" and config.rope_scaling.kind == "longrope"
        ids = torch.randint(29, (2, 8 if only_short else 13))
        name, theirs = logits_of_theirs(tmp_path / "out", ids)
        seen.add(name)
        assert torch.allclose(model(ids), theirs, rtol=1e-4, atol=1e-4), config
        again = read_model(tmp_path / "out").state_dict()
        assert all(torch.equal(tensor, again[key]) for key, tensor in model.state_dict().items()), config
        shutil.rmtree(tmp_path / "out")
    assert len(seen) > 3 and 3 < refused < 47


SMALL = {"n_layers": 2, "d_model": 16, "n_heads": 2, "n_kv_heads": 2, "head_dim": 8, "d_ff": 8, "vocab_size": 29,
         "context_length": 16}
SIGMOID = MoEConfig(4, d_expert=8, router="sigmoid", n_shared_experts=1)
LONG = RopeScaling("longrope", 8, short_factors=(1.0,) * 4, long_factors=(2.0,) * 4)
UNSAID = [
    ({"moe": SIGMOID}, None, "MixtralForCausalLM would be it but for moe.n_shared_experts 1, moe.router sigmoid"),
    ({"moe": SIGMOID, "norm_eps": 1e-6}, None, "DeepseekV3ForCausalLM would be it but for mla.kv_rank 0"),
    ({"moe": SIGMOID, "norm_eps": 1e-6}, "DeepseekV3ForCausalLM", "but for mla.kv_rank 0"),
    (DEEPSEEK | {"moe": MoEConfig()}, "DeepseekV3ForCausalLM", "but for moe.n_experts 0"),
    (DEEPSEEK | {"moe": dataclasses.replace(SIGMOID, n_shared_experts=0)}, None, "but for moe.n_shared_experts 0"),
    (DEEPSEEK | {"norm_eps": 1e-5}, None, "DeepseekV3ForCausalLM would be it but for norm_eps 1e-05"),
    ({"rotary_dim": 4, "rope_scaling": RopeScaling("linear", 8, 2.0)}, "Phi3ForCausalLM", "rope_scaling.kind linear"),
    ({"rope_scaling": RopeScaling("llama3", 8, 2.0)}, "Phi3ForCausalLM", "but for rope_scaling.kind llama3"),
    ({"rope_scaling": RopeScaling("yarn", 8, 2.0, high_frequency=32.0)}, "Phi3ForCausalLM", "rope_scaling.kind yarn"),
    (PHIMOE | {"rope_scaling": RopeScaling("linear", 8, 2.0)}, None, "PhimoeForCausalLM would be it but for "
                                                                     "rope_scaling.kind linear"),
    ({"d_model": 17}, "LlamaForCausalLM", "but for d_model % n_heads 1"),
    (GPT2 | {"d_model": 17}, None, "GPT2LMHeadModel would be it but for d_model % n_heads 1"),
    ({"rope_scaling": LONG, "d_model": 20}, "Phi3ForCausalLM", "but for head_dim 8"),
    ({"rope_scaling": RopeScaling("ntk", 8, 2.0)}, None, "nanomai knows has rope_scaling.kind ntk"),
    ({"qk_norm": True}, None, "nanomai knows has qk_norm True"), ({"activation": "relu2"}, None, "activation relu2"),
    ({"logit_scale": 0.5}, None, "nanomai knows has logit_scale 0.5"),
    ({"biases": ("qkv",)}, None, "nanomai knows has biases qkv"),
    (GPT2 | {"biases": ()}, None, "GPT2LMHeadModel would be it but for biases none"),
    ({"norm": "layernorm", "qk_norm": True}, None, "knows has qk_norm True; LlamaForCausalLM would be the rest of it "
                                                   "but for norm layernorm"),
]


@pytest.mark.parametrize("changes, architecture, message", UNSAID)
def test_a_model_that_no_class_is(changes, architecture, message):
    with pytest.raises(HubError) as caught:
        settings_of(ModelConfig(**SMALL | changes), architecture)
    assert message in str(caught.value)


@pytest.mark.parametrize("name, message", [
    ("nano-moe", "is this model; MixtralForCausalLM would be it but for moe.n_shared_experts 1, moe.router sigmoid"),
    ("gpt3-175b", "has sparse.block 128"),
    ("gpt4-rumour", "is this model; MixtralForCausalLM would be it but for activation gelu"),
    ("phi-3-small-8k", "has activation gegelu, sparse.block 64, attention_scale 0.0078125, embedding_scale 10.0, "
                       "logit_scale 0.125; LlamaForCausalLM would be the rest of it but for norm layernorm")])
def test_configurations_that_no_class_is(name, message):
    with pytest.raises(HubError) as caught:
        settings_of(load_config(name).model)
    assert str(caught.value) == f"no class of transformers that nanomai knows {message}"


@pytest.mark.parametrize("changes", [{"rope_scaling": RopeScaling(factor=8.0)}, {"attention_scale": 8**-0.5},
                                     {"rope_scaling": RopeScaling(original_context=4)}])
def test_what_changes_nothing_is_no_reason(changes):
    assert settings_of(ModelConfig(**SMALL | changes))["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.parametrize("scaling", [scaling for scaling in scalings(4) if scaling.kind not in ("none", "ntk")],
                         ids=lambda scaling: scaling.kind)
def test_rotations_are_written_for_transformers_4_too(scaling):
    written = settings_of(ModelConfig(**SMALL, rope_theta=500.0, rope_scaling=scaling))
    assert written["rope_theta"] == 500.0 and written["rope_scaling"]["rope_type"] == scaling.kind
    first = config_of({key: value for key, value in written.items() if key != "rope_parameters"})
    assert first == config_of(written)
