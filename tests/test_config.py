"""The closed forms against counted tensors and counted FLOPs, and each setting that cannot work with its exact line."""

import math
import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nanomai.config import Config, ConfigError, DataConfig, ModelConfig, OptimConfig, TrainConfig
from nanomai.config_file import CONFIG_FOLDER, load_config
from nanomai.model import Transformer, build_model

GPT2 = {"norm": "layernorm", "activation": "gelu", "position": "learned", "biases": ("qkv", "out", "mlp"),
        "vocab_size": 50257, "context_length": 1024}
LLAMA = {"tied_embeddings": False, "context_length": 8192}


def gpt(n_layers: int, d_model: int, n_heads: int, **changes) -> ModelConfig:
    sizes = {"n_layers": n_layers, "d_model": d_model, "n_heads": n_heads, "n_kv_heads": n_heads,
             "head_dim": d_model // n_heads, "d_ff": 4 * d_model}
    return ModelConfig(**GPT2 | sizes | changes)


def llama(n_layers: int, d_model: int, heads: str, d_ff: int, vocab_size: int, **changes) -> ModelConfig:
    n_heads, n_kv_heads = map(int, heads.split("/"))
    sizes = {"n_layers": n_layers, "d_model": d_model, "n_heads": n_heads, "n_kv_heads": n_kv_heads, "head_dim": 128,
             "d_ff": d_ff, "vocab_size": vocab_size}
    return ModelConfig(**LLAMA | sizes | changes)


def rung(*sizes, **changes) -> ModelConfig:
    return llama(*sizes, head_dim=64, tied_embeddings=True, **changes)


# Integers that transformers' own classes give for the same dimensions, or (GPT-3, T-NLG, MT-NLG, mai-1) sums by hand.
COUNTS = {
    "gpt2": (gpt(12, 768, 12), 124_439_808),
    "gpt2-medium": (gpt(24, 1024, 16), 354_823_168),
    "gpt2-large": (gpt(36, 1280, 20), 774_030_080),
    "gpt2-xl": (gpt(48, 1600, 25), 1_557_611_200),
    "gpt3-175b": (gpt(96, 12288, 96, context_length=2048), 174_604_259_328),
    "turing-nlg-17b": (gpt(78, 4256, 28), 17_176_845_728),
    "mt-nlg-530b": (gpt(105, 20480, 128, context_length=2048), 529_581_506_560),
    "phi-3-mini-4k": (llama(32, 3072, "32/32", 8192, 32064, head_dim=96, sliding_window=2047), 3_821_079_552),
    "phi-3-medium": (llama(40, 5120, "40/10", 17920, 32064), 13_960_238_080),
    "mistral-7b": (llama(32, 4096, "32/8", 14336, 32000, sliding_window=4096), 7_241_732_096),
    "mistral-nemo-12b": (llama(40, 5120, "32/8", 14336, 131072), 12_247_782_400),
    "mn-minitron-8b": (llama(40, 4096, "32/8", 11520, 131072), 8_414_105_600),
    "llama-2-7b": (llama(32, 4096, "32/32", 11008, 32000), 6_738_415_616),
    "llama-2-13b": (llama(40, 5120, "40/40", 13824, 32000), 13_015_864_320),
    "llama-2-70b": (llama(80, 8192, "64/8", 28672, 32000), 68_976_648_192),
    "orca-13b": (llama(40, 5120, "40/40", 13824, 32001), 13_015_874_560),
    "llama-3-8b": (llama(32, 4096, "32/8", 14336, 128256), 8_030_261_248),
    "llama-3-70b": (llama(80, 8192, "64/8", 28672, 128256), 70_553_706_496),
    "llama-3.1-405b": (llama(126, 16384, "128/8", 53248, 128256), 405_853_388_800),
    "mai-1-dense": (llama(120, 18432, "144/8", 61440, 100352), 497_457_285_120),
    "nano, vocabulary 512": (rung(4, 128, "2/1", 384, 512), 853_120),
    "micro": (rung(6, 256, "4/2", 768, 4096), 5_770_496),
    "tiny": (rung(8, 512, "8/2", 1536, 8192), 28_320_256),
}
FILES = {"nano": 853_120 + (4096 - 512) * 128, "micro": 5_770_496, "tiny": 28_320_256, "gpt2-124m": 124_439_808,
         "llama-3-8b": 8_030_261_248, "mai-1-dense": 497_457_285_120}


def counted(config: ModelConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in Transformer(config).parameters())


@pytest.mark.parametrize("name", COUNTS)
def test_published_parameter_counts(name):
    config, published = COUNTS[name]
    assert config.n_parameters == published == counted(config)


@pytest.mark.parametrize("path", sorted(CONFIG_FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_file_in_scale_configs_is_counted(path):
    config = load_config(path)
    assert config.name == path.stem
    assert config.model.n_parameters == counted(config.model)
    if path.stem in FILES:
        assert config.model.n_parameters == FILES[path.stem]


@pytest.mark.parametrize("changes", [
    {"biases": ("qkv", "out", "mlp", "head"), "tied_embeddings": False}, {"biases": ("qkv",), "norm": "layernorm"},
    {"activation": "relu2", "biases": ("mlp",)}, {"position": "learned", "n_kv_heads": 4}], ids=str)
def test_counts_of_every_switch(changes):
    config = ModelConfig(**{"n_layers": 3, "d_model": 40, "n_heads": 4, "n_kv_heads": 2, "head_dim": 6, "d_ff": 52,
                            "vocab_size": 97, "context_length": 31} | changes)
    assert config.n_parameters == counted(config)


@pytest.mark.parametrize("changes", [{}, {"activation": "gelu", "n_kv_heads": 3, "tied_embeddings": False},
                                     {"norm": "layernorm", "biases": ("qkv", "mlp")}], ids=str)
def test_flops_against_torchs_counter(changes):
    """torch counts every product that runs; ours differs from it by two known amounts and nothing else."""
    b, t = 2, 24
    config = ModelConfig(**{"n_layers": 2, "d_model": 24, "n_heads": 3, "n_kv_heads": 1, "head_dim": 8, "d_ff": 40,
                            "vocab_size": 50, "context_length": t} | changes)
    model, ids = build_model(config), torch.randint(50, (b, t))
    with FlopCounterMode(display=False) as counter:
        model(ids, ids, reduction="sum").backward()
    vectors = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 1 and n.startswith("blocks"))
    masked_half = config.n_layers * t * config.n_heads * config.head_dim  # computed and thrown away
    assert counter.get_total_flops() == b * t * (config.flops_per_token() - 6 * vectors + 6 * masked_half)


def test_flops_by_hand():
    config = COUNTS["llama-3.1-405b"][0]
    head, attention = 128256 * 16384, 6 * 126 * 8192 * 128 * 128
    blocks = config.n_parameters - 2 * head - 16384  # less embedding, head and last norm
    assert config.flops_per_token() == 6 * (blocks + head) + attention
    assert config.flops_per_token(4096) == config.flops_per_token() - attention // 2
    assert config.kv_cache_bytes_per_token() == 2 * 126 * 8 * 128 * 2


@pytest.mark.parametrize("window", [1, 5, 16, 17, 40])
def test_flops_of_a_window(window):
    """Against the mean number of keys a query sees, counted one by one: the formula has half a key less, T / 2."""
    t, config = 16, ModelConfig(sliding_window=window)
    seen = sum(min(i + 1, window) for i in range(t)) / t
    attention = config.flops_per_token(t) - 6 * (config.n_parameters - config.d_model)
    keys = attention / (12 * config.n_layers * config.n_heads * config.head_dim)
    assert seen - 0.6 < keys < seen + 0.6


def knots(**changes) -> Config:
    return Config(model=ModelConfig(context_length=64), train=TrainConfig(**changes))


MODEL_ERRORS = [
    ({"n_layers": 0}, "n_layers 0 must be above 0 and finite", "model.n_layers"),
    ({"init_std": math.inf}, "init_std inf must be above 0 and finite", "model.init_std"),
    ({"init_std": float("nan")}, "init_std nan must be above 0 and finite", "model.init_std"),
    ({"n_heads": 4, "n_kv_heads": 3}, "n_heads 4 is not divisible by n_kv_heads 3; every key-value head must serve the "
                                      "same number of query heads", "model.n_kv_heads"),
    ({"head_dim": 7}, "head_dim 7 is odd; rotary positions turn pairs of numbers", "model.head_dim"),
    ({"sliding_window": 0}, "sliding_window 0 must be at least 1, or null", "model.sliding_window"),
    ({"biases": ("head",)}, "a head bias needs tied_embeddings: false", "model.biases"),
]
OTHER_ERRORS = [
    (lambda: DataConfig(val_fraction=1.0), "val_fraction 1.0 must lie between 0 and 1", "data.val_fraction"),
    (lambda: DataConfig(workers=-1), "workers -1 must be 0 (one for each core) or more", "data.workers"),
    (lambda: OptimConfig(eps=0.0), "eps 0.0 must be above 0 and finite", "optim.eps"),
    (lambda: OptimConfig(lr=math.inf), "lr inf must be above 0 and finite", "optim.lr"),
    (lambda: OptimConfig(lr=0.0), "lr 0.0 must be above 0 and finite", "optim.lr"),
    (lambda: OptimConfig(lr={}), "lr {} must give its steps in rising order from 0", "optim.lr"),
    (lambda: OptimConfig(lr={1: 1.0}), "lr {1: 1.0} must give its steps in rising order from 0", "optim.lr"),
    (lambda: OptimConfig(lr={0: 1.0, 9: 1.0, 5: 1.0}),
     "lr {0: 1.0, 9: 1.0, 5: 1.0} must give its steps in rising order from 0", "optim.lr"),
    (lambda: OptimConfig(beta2=1.0), "beta2 1.0 must be at least 0 and below 1", "optim.beta2"),
    (lambda: OptimConfig(min_lr_ratio=1.5), "min_lr_ratio 1.5 must lie between 0 and 1", "optim.min_lr_ratio"),
    (lambda: OptimConfig(warmup_steps=-1), "warmup_steps -1 must not be negative", "optim.warmup_steps"),
    (lambda: TrainConfig(steps=0), "steps 0 must be above 0 and finite", "train.steps"),
    (lambda: TrainConfig(eval_every=-1), "eval_every -1 must not be negative", "train.eval_every"),
    (lambda: TrainConfig(sequence_length=-64), "sequence_length -64 must be at least 1, or null",
     "train.sequence_length"),
    (lambda: knots(batch_tokens={0: 640, 5: 0}), "batch_tokens {0: 640, 5: 0} must be above 0 and finite",
     "train.batch_tokens"),
    (lambda: knots(batch_tokens=100),
     "batch_tokens 100 is not a multiple of the sequence length 64; the nearest is 128", "train.batch_tokens"),
    (lambda: knots(batch_tokens={0: 640, 9: 10}),
     "batch_tokens 10 is not a multiple of the sequence length 64; the nearest is 64", "train.batch_tokens"),
    (lambda: Config(model=ModelConfig(position="learned"), train=TrainConfig(sequence_length=512)),
     "sequence_length 512 is longer than context_length 256, and learned positions end there", "train.sequence_length"),
]


@pytest.mark.parametrize("make, message, field",
                         [(lambda c=c: ModelConfig(**c), m, f) for c, m, f in MODEL_ERRORS] + OTHER_ERRORS)
def test_impossible_settings(make, message, field):
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$") as caught:
        make()
    assert caught.value.field == field


def test_settings_at_their_limits():
    ModelConfig(head_dim=7, position="learned")
    ModelConfig(sliding_window=1)
    OptimConfig(warmup_steps=0, beta1=0.0, grad_clip=0.0, decay_fraction=1.0, min_lr_ratio=0.0, lr={0: 1e-3})
    assert Config().sequence_length == ModelConfig().context_length
    assert knots(sequence_length=128, batch_tokens=256).sequence_length == 128
