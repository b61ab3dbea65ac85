"""The files in scale_configs/: exact sizes, recipes that read as many tokens as they say, phases of one model, and the
catalogue."""

import dataclasses
import functools
import importlib.util
import math
from pathlib import Path

import pytest
import torch

from nanomai.architecture import MoEConfig
from nanomai.config import Config, ModelConfig
from nanomai.config_file import CONFIG_FOLDER, load_config, replace
from nanomai.model import Transformer, build_model
from nanomai.moe import MoE
from nanomai.optim import learning_rate, piecewise

TOOL = Path(__file__).resolve().parent.parent / "tools" / "catalogue.py"
spec = importlib.util.spec_from_file_location("catalogue", TOOL)
catalogue = importlib.util.module_from_spec(spec)
spec.loader.exec_module(catalogue)

# All parameters; and, of mixtures of experts, those that one token meets. Where transformers has a class for the model
# its own count is the same integer; the others (GPT-3, T-NLG, MT-NLG, phi-3-small, the proposals) are sums by hand.
MODELS = {
    "nano": 853_120 + (4096 - 512) * 128,
    "nano-moe": (2_036_864 + (4096 - 512) * 128, 857_216 + (4096 - 512) * 128),
    "micro": 5_770_496,
    "micro-moe": (22_310_144, 8_154_368),
    "tiny": 28_320_256,
    "gpt2-124m": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "gpt3-175b": 174_604_259_328,
    "turing-nlg-17b": 17_176_845_728,
    "mt-nlg-530b": 529_581_506_560,
    "phi-1-small": 356_794_368,
    "phi-1": 1_418_270_720,
    "phi-1.5": 1_418_270_720,
    "phi-2": 2_779_683_840,
    "phi-3-mini-4k": 3_821_079_552,
    "phi-3-mini-128k": 3_821_079_552,
    "phi-3.5-mini": 3_821_079_552,
    "phi-3-small-8k": 7_392_272_384,
    "phi-3-medium": 13_960_238_080,
    "phi-3.5-moe": (41_873_153_344, 6_640_999_744),
    "phi-3.5-vision": 3_821_079_552,
    "mistral-7b": 7_241_732_096,
    "mistral-nemo-12b": 12_247_782_400,
    "mn-minitron-8b": 8_414_105_600,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "orca-13b": 13_015_874_560,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "mixtral-8x7b": (46_702_792_704, 12_879_925_248),
    "deepseek-v3": (671_026_404_352, 37_552_282_624),
    "deepseek-v2-lite": (15_706_484_224, 2_661_150_208),
    "gpt4-rumour": (1_751_813_155_840, 279_109_135_360),
    "mai-1-dense": 497_457_285_120,
    "mai-1-moe": (501_469_880_320, 48_485_048_320),
}
# The files of further phases: of which model, and what they may change in it.
LONGER = {"context_length", "rope_scaling"}
PHASES = {
    "phi-1-small-exercises": ("phi-1-small", set()),
    "phi-1-exercises": ("phi-1", set()),
    "phi-3-mini-4k-phase-2": ("phi-3-mini-4k", set()),
    "phi-3-medium-128k": ("phi-3-medium", LONGER | {"sliding_window"}),
    "mn-minitron-8b-teacher": ("mistral-nemo-12b", set()),
    "orca-13b-gpt4": ("orca-13b", set()),
    "llama-3.1-405b-8k": ("llama-3.1-405b", LONGER),
    "deepseek-v3-final": ("deepseek-v3", {"moe"}),
    "deepseek-v3-128k": ("deepseek-v3", LONGER | {"moe"}),
    "mai-1-dense-128k": ("mai-1-dense", LONGER),
    "mai-1-moe-128k": ("mai-1-moe", LONGER),
}
FILES = {path.stem: path for path in sorted(CONFIG_FOLDER.glob("*.yaml"))}

# What was read in training, where it was published, recalled or proposed.
TOKENS = {
    "gpt3-175b": 300e9, "turing-nlg-17b": 300_000 * 512 * 1024, "mt-nlg-530b": 270e9, "phi-1": 36_000 * 1024 * 2048,
    "phi-1.5": 150e9, "phi-2": 1.4e12, "phi-3.5-mini": 3.4e12, "phi-3-small-8k": 4.8e12, "phi-3-medium": 4.8e12,
    "phi-3.5-moe": 4.9e12, "phi-3.5-vision": 500e9, "mn-minitron-8b-teacher": 127e9, "mn-minitron-8b": 380e9,
    "llama-2-7b": 2e12, "llama-2-13b": 2e12, "llama-2-70b": 2e12, "llama-3-8b": 15.6e12, "llama-3-70b": 15.6e12,
    "llama-3.1-405b-8k": 15.6e12, "llama-3.1-405b": 800e9, "deepseek-v3": 14.3e12, "deepseek-v3-final": 500e9,
    "deepseek-v2-lite": 5.7e12,
    "gpt4-rumour": 13e12, "mai-1-dense": 10e12, "mai-1-moe": 15e12, "mai-1-dense-128k": 50e9, "mai-1-moe-128k": 75e9,
}


@functools.cache
def config_of(name: str) -> Config:
    return load_config(name)


def test_every_file_is_in_the_tables():
    assert sorted(FILES) == sorted([*MODELS, *PHASES])


@pytest.mark.parametrize("name", FILES)
def test_exact_sizes(name):
    """By the closed form, and of the tensors of the model that is built."""
    config, expected = config_of(name), MODELS[PHASES[name][0] if name in PHASES else name]
    total, active = expected if isinstance(expected, tuple) else (expected, expected)
    assert config.name == name
    assert (config.model.n_parameters, config.model.n_active_parameters) == (total, active)
    with torch.device("meta"):
        model = Transformer(config.model)
    idle = sum(p.numel() * (1 - layer.config.experts_per_token / layer.config.n_experts)
               for layer in model.modules() if isinstance(layer, MoE) for p in layer.experts.parameters())
    assert sum(p.numel() for p in model.parameters()) == total
    assert total - idle == active


# What no count can see: base of the rotation, numbers of a head that it turns, window, context, eps of the norms.
UNCOUNTED = {
    "phi-1-small": (1e4, 32, None, 2048, 1e-5), "phi-1": (1e4, 32, None, 2048, 1e-5),
    "phi-1.5": (1e4, 32, None, 2048, 1e-5), "phi-2": (1e4, 32, None, 2048, 1e-5),
    "phi-3-mini-4k": (1e4, 96, 2047, 4096, 1e-5), "phi-3-mini-128k": (1e4, 96, None, 131072, 1e-5),
    "phi-3.5-mini": (1e4, 96, None, 131072, 1e-5), "phi-3-small-8k": (1e6, 128, None, 8192, 1e-5),
    "phi-3-medium": (1e4, 128, 2047, 4096, 1e-5), "phi-3-medium-128k": (1e4, 128, None, 131072, 1e-5),
    "phi-3.5-moe": (1e4, 128, None, 131072, 1e-5), "mistral-7b": (1e4, 128, 4096, 32768, 1e-5),
    "mistral-nemo-12b": (1e6, 128, None, 131072, 1e-5), "mn-minitron-8b": (1e6, 128, None, 8192, 1e-5),
    "llama-2-7b": (1e4, 128, None, 4096, 1e-5), "llama-2-13b": (1e4, 128, None, 4096, 1e-5),
    "llama-2-70b": (1e4, 128, None, 4096, 1e-5), "orca-13b": (1e4, 128, None, 2048, 1e-6),
    "llama-3-8b": (5e5, 128, None, 8192, 1e-5), "llama-3-70b": (5e5, 128, None, 8192, 1e-5),
    "llama-3.1-405b": (5e5, 128, None, 131072, 1e-5), "mixtral-8x7b": (1e6, 128, None, 32768, 1e-5),
    "deepseek-v3": (1e4, 64, None, 4096, 1e-6), "mai-1-dense": (5e5, 128, None, 8192, 1e-5),
    "mai-1-moe": (5e5, 128, None, 8192, 1e-5),
}


@pytest.mark.parametrize("name", UNCOUNTED)
def test_what_no_count_can_see(name):
    m = config_of(name).model
    assert (m.rope_theta, m.turned_dim, m.sliding_window, m.context_length, m.norm_eps) == UNCOUNTED[name]


# Nor these settings of routers and of what balances them; those that are not named are at their defaults.
DEEPSEEK = {"router": "sigmoid", "n_groups": 8, "groups_per_token": 4, "weight_scale": 2.5, "balance_loss": 1e-4}
MAI = {"router": "sigmoid", "z_loss": 1e-4, "bias_speed": 0.001}
ROUTERS = {
    "phi-3.5-moe": {"router": "sparsemixer", "jitter": 0.01},
    "mixtral-8x7b": {"router": "softmax", "balance_loss": 0.002},
    "gpt4-rumour": {"router": "softmax", "balance_loss": 0.01},
    "deepseek-v3": DEEPSEEK | {"bias_speed": 0.001}, "deepseek-v3-final": DEEPSEEK,
    "mai-1-moe": MAI, "mai-1-moe-128k": MAI,
}
COUNTED = ("n_experts", "experts_per_token", "d_expert", "n_shared_experts", "n_dense_layers")


@pytest.mark.parametrize("name", ROUTERS)
def test_routers(name):
    moe = config_of(name).model.moe
    assert moe == MoEConfig(**{size: getattr(moe, size) for size in COUNTED} | ROUTERS[name])


def test_nano_moe_is_as_large_as_nano_to_a_token():
    nano, moe = config_of("nano"), config_of("nano-moe")
    routers = moe.model.n_layers * moe.model.d_model * moe.model.moe.n_experts
    assert moe.model.n_active_parameters == nano.model.n_parameters + routers
    assert dataclasses.replace(moe.model, moe=nano.model.moe) == nano.model
    assert (moe.optim, moe.train) == (nano.optim, nano.train)


def test_the_vision_models_language_model_is_the_whole_less_the_tower():
    tower, projection, separators = 303_507_456, 4096 * 3072 + 3072 + 3072 * 3072 + 3072, 2 * 4096
    assert MODELS["phi-3.5-vision"] + tower + projection + separators == 4_146_621_440
    assert config_of("phi-3.5-vision").model == config_of("phi-3.5-mini").model


@pytest.mark.parametrize("name", PHASES)
def test_a_phase_is_of_the_same_model(name):
    whole, may_change = PHASES[name]
    ours, others = (dataclasses.asdict(config_of(n).model) for n in (name, whole))
    assert {key for key in ours if ours[key] != others[key]} == may_change


@pytest.mark.parametrize("name", [name for name in FILES if config_of(name).train.init_from])
def test_a_phase_begins_from_a_run_whose_weights_fit(name):
    before = config_of(name).train.init_from.removeprefix("runs/")
    if before == "llama-13b":  # to be imported
        return
    ours, theirs = config_of(name).model, config_of(before).model
    assert (ours.n_parameters, ours.n_layers, ours.d_model) == (theirs.n_parameters, theirs.n_layers, theirs.d_model)
    assert config_of(name).data.tokenizer.startswith("runs/")


@pytest.mark.parametrize("name", TOKENS)
def test_a_recipe_reads_its_tokens(name):
    assert catalogue.tokens(config_of(name)) == pytest.approx(TOKENS[name], rel=2e-3)


def test_phi_3_mini_reads_its_tokens_in_two_phases():
    phases = catalogue.tokens(config_of("phi-3-mini-4k")) + catalogue.tokens(config_of("phi-3-mini-4k-phase-2"))
    assert phases == pytest.approx(3.3e12, rel=1e-3)


# (tokens in the first batch, in the last, tokens read in between)
RAMPS = {"gpt3-175b": (16 * 2048, 1600 * 2048, 12e9), "mt-nlg-530b": (32 * 2048, 1920 * 2048, 12e9),
         "deepseek-v3": (3072 * 4096, 15360 * 4096, 469e9), "mai-1-moe": (12.6e6, 62.9e6, 469e9),
         "gpt4-rumour": (12.6e6, 60e6, 0.03 * 13e12)}


@pytest.mark.parametrize("name", RAMPS)
def test_batches_grow_in_stairs_around_a_straight_line(name):
    config, (first, last, over) = config_of(name), RAMPS[name]
    steps, sizes = zip(*config.train.batch_tokens.items(), strict=True)
    read = [catalogue.tokens(replace(config, **{"train.steps": step})) if step else 0 for step in steps]
    assert read[-1] == pytest.approx(over, rel=1e-3) and sizes[-1] == pytest.approx(last, rel=0.03)
    for start, end, size in zip(read, read[1:], sizes, strict=False):
        assert size == pytest.approx(first + (start + end) / 2 / over * (last - first), rel=0.02)


@pytest.mark.parametrize("name", ["llama-3.1-405b-8k", "mai-1-dense"])
def test_batches_grow_as_llama_3s_did(name):
    config = config_of(name)
    (_, small), (first, middle), (second, large) = config.train.batch_tokens.items()
    assert (small, middle, large) == (2**22, 2**23, 2**24)
    read = [catalogue.tokens(replace(config, **{"train.steps": step})) for step in (first, second)]
    assert read == pytest.approx([252e6, 2.87e12], rel=2e-3)


# (peak, last share, cosine from so many tokens, to so many)
COSINES = {"gpt3-175b": (6e-5, 0.1, 375e6, 260e9), "mt-nlg-530b": (5e-5, 0.1, 1e9, 340e9),
           "deepseek-v3": (2.2e-4, 0.1, 10e12, 14.3e12)}


@pytest.mark.parametrize("name", COSINES)
def test_knots_follow_the_published_schedule(name):
    """Straight lines between the points miss the cosine by less than 1 % of the peak."""
    config, (peak, low, start, end) = config_of(name), COSINES[name]
    for step in range(config.optim.warmup_steps, config.train.steps, 997):
        read = catalogue.tokens(replace(config, **{"train.steps": step}))
        done = min(1, max(0, (read - start) / (end - start)))
        exact = peak * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * done)))
        assert learning_rate(config.optim, step, config.train.steps) == pytest.approx(exact, abs=0.01 * peak)


LONGROPE = [name for name in FILES if config_of(name).model.rope_scaling.kind == "longrope"]


@pytest.mark.parametrize("name", LONGROPE)
def test_the_proposed_longrope_factors_are_ntk_by_parts(name):
    model = config_of(name).model
    scaling, pairs = model.rope_scaling, model.turned_dim // 2
    longer = model.context_length / scaling.original_context
    assert scaling.short_factors == (1.0,) * pairs
    for pair, factor in enumerate(scaling.long_factors):
        turns = scaling.original_context * model.rope_theta ** (-pair / pairs) / (2 * math.pi)
        kept = min(1, max(0, (turns - 1) / (32 - 1)))
        assert 1 / factor == pytest.approx(kept + (1 - kept) / longer, rel=1e-4)


@pytest.mark.parametrize("name", FILES)
def test_a_file_says_what_it_is_and_how_it_is_spread(name):
    comments = [line for line in FILES[name].read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert comments[0].startswith(f"# {name}: ")
    assert sum(line.startswith("# layout: ") for line in comments) == 1
    assert load_config(name, **{"train.steps": 1}).train.steps == 1


def shrunk(model: ModelConfig) -> ModelConfig:
    """The same switches at a size that runs at once."""
    moe = dataclasses.replace(model.moe, d_expert=8) if model.moe.n_experts else model.moe
    mla = dataclasses.replace(model.mla, kv_rank=16, q_rank=24) if model.mla.kv_rank else model.mla
    context = 64 if model.position == "learned" else model.context_length
    return dataclasses.replace(model, n_layers=model.moe.n_dense_layers + 2, d_model=32, d_ff=48, vocab_size=101,
                               n_heads=2 * model.n_heads // model.n_kv_heads, n_kv_heads=2, context_length=context,
                               moe=moe, mla=mla)


@pytest.mark.parametrize("name", FILES)
def test_every_familys_switches_run_together(name):
    model = build_model(shrunk(config_of(name).model))
    ids = torch.randint(101, (2, 33), generator=torch.Generator().manual_seed(0))
    loss = model(ids[:, :-1], ids[:, 1:])
    loss.backward()
    assert loss.item() == pytest.approx(math.log(101), abs=1.0)
    stuck = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not stuck, stuck


def test_the_catalogue_is_what_the_files_say():
    committed = catalogue.PATH.read_bytes().decode()
    assert committed == catalogue.catalogue(), "python tools/catalogue.py writes it anew"
    assert committed.count("\n| [") == len(FILES)


def test_tokens_of_a_batch_that_changes():
    config = config_of("nano")
    for batch in (4096, {0: 4096, 3: 8192, 5: 256}, {0: 256, 40: 4096}):
        for steps in (1, 3, 4, 7, 40, 41):
            changed = replace(config, **{"train.batch_tokens": batch, "train.steps": steps})
            assert catalogue.tokens(changed) == sum(piecewise(batch, step) for step in range(steps))


@pytest.mark.parametrize("number, text", [(7, "7 "), (999.4, "999 "), (999.7, "1 K"), (12_288, "12.3 K"),
                                          (2_130_000, "2.13 M"), (3.28e8, "328 M")])
def test_numbers_in_three_digits(number, text):
    assert catalogue.short(number, ",K,M") == text


@pytest.mark.parametrize("number, text", [(1000, "1000 B"), (1024, "1 KiB"), (2**30, "1 GiB"), (2**40 - 1, "1 TiB"),
                                          (1000 * 2**20, "1000 MiB"), (1536, "1.5 KiB")])
def test_sizes_in_powers_of_1024(number, text):
    assert catalogue.size(number) == text
