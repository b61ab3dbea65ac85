"""The closed forms against counted tensors and counted FLOPs, and each setting that cannot work with its exact line."""

import math
import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nanomai.architecture import MLAConfig, MoEConfig, SparseAttention
from nanomai.config import Config, ConfigError, DataConfig, ModelConfig, OptimConfig, ParallelConfig, TrainConfig
from nanomai.config_file import load_config
from nanomai.model import Transformer, build_model


def counted(config: ModelConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in Transformer(config).parameters())


@pytest.mark.parametrize("changes", [
    {"biases": ("qkv", "out", "mlp", "head"), "tied_embeddings": False}, {"biases": ("qkv",), "norm": "layernorm"},
    {"activation": "relu2", "biases": ("mlp",)}, {"position": "learned", "n_kv_heads": 4},
    {"parallel_block": True, "norm": "layernorm"}, {"qk_norm": True, "biases": ("qkv", "out")},
    {"mla": MLAConfig(kv_rank=11, rope_dim=4, v_dim=5), "n_kv_heads": 4},
    {"mla": MLAConfig(kv_rank=11, q_rank=13, rope_dim=4, v_dim=5), "n_kv_heads": 4},
    {"moe": MoEConfig(n_experts=5, d_expert=7), "biases": ("mlp",)},
    {"moe": MoEConfig(n_experts=5, d_expert=7, n_shared_experts=2, n_dense_layers=1), "activation": "gelu"}], ids=str)
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
    config = load_config("llama-3.1-405b-8k").model
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
    ({"init_std": 1.5}, "init_std 1.5 must be from 1e-06 to 1", "model.init_std"),
    ({"init_std": float("nan")}, "init_std nan must be from 1e-06 to 1", "model.init_std"),
    ({"norm_eps": 0.0}, "norm_eps 0.0 must be from 1e-12 to 1", "model.norm_eps"),
    ({"logit_scale": 1e7}, "logit_scale 10000000.0 must be from 1e-06 to 1e+06", "model.logit_scale"),
    ({"embedding_scale": -1.0}, "embedding_scale -1.0 must be from 1e-06 to 1e+06", "model.embedding_scale"),
    ({"attention_scale": 0.0}, "attention_scale 0.0 must be from 1e-06 to 1e+06", "model.attention_scale"),
    ({"n_heads": 4, "n_kv_heads": 3}, "n_kv_heads 3 must divide n_heads 4: each serves as many query heads",
     "model.n_kv_heads"),
    ({"head_dim": 7}, "head_dim 7 is odd; rotary positions turn pairs of numbers", "model.head_dim"),
    ({"sliding_window": 0}, "sliding_window 0 must be at least 1, or null", "model.sliding_window"),
    ({"sparse": SparseAttention(block=2), "sliding_window": 4},
     "sliding_window 4 must be null in a model with sparse layers", "model.sliding_window"),
    ({"moe": MoEConfig(n_experts=4, d_expert=8, n_dense_layers=4)},
     "moe.n_dense_layers 4 must be below n_layers 4, or no layer has experts", "model.moe.n_dense_layers"),
    ({"biases": ("head",)}, "biases ('head',) need tied_embeddings: false for that of the head", "model.biases"),
]
OTHER_ERRORS = [
    (lambda: SparseAttention(block=-1), "block -1 must be at least 0", "model.sparse.block"),
    (lambda: SparseAttention(vertical_stride=-1), "vertical_stride -1 must be at least 0",
     "model.sparse.vertical_stride"),
    (lambda: SparseAttention(local_blocks=0), "local_blocks 0 must be at least 1", "model.sparse.local_blocks"),
    (lambda: SparseAttention(dense_every=1), "dense_every 1 must be at least 2", "model.sparse.dense_every"),
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
    (lambda: ParallelConfig(stages_per_rank=2), "stages_per_rank 2 needs a pipeline of more than one rank",
     "parallel.stages_per_rank"),
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
