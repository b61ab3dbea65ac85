"""Ranks that do not exist against closed forms, PyTorch's own tracker, a real job of two, and the full golden runs."""

import dataclasses
import functools
import json
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker

import nanomai
from nanomai import cli, ops, simulator
from nanomai.architecture import MoEConfig
from nanomai.config import Config, ConfigError, ModelConfig, OptimConfig, ParallelConfig, TrainConfig
from nanomai.config_file import load_config
from nanomai.model import Transformer
from nanomai.parallel import expert
from nanomai.parallel.apply import parallelize
from nanomai.parallel.launch import launch, process_group
from nanomai.parallel.layout import lay_out
from nanomai.simulator import Observer, simulate

T = 1024
MODEL = ModelConfig(n_layers=4, d_model=256, n_heads=8, n_kv_heads=2, head_dim=32, d_ff=512, vocab_size=1024,
                    context_length=T, tied_embeddings=False)
EXPERTS = dataclasses.replace(MODEL, moe=MoEConfig(n_experts=16, experts_per_token=2, d_expert=128, router="sigmoid"))
MODELS = {"dense": MODEL, "experts": EXPERTS}


def config(model: str = "dense", optimizer: str = "adamw", **parallel) -> Config:
    return Config(model=MODELS[model], train=TrainConfig(batch_tokens=T, dtype="bfloat16"),
                  optim=OptimConfig(name=optimizer), parallel=ParallelConfig(**parallel))


# --- Closed forms


@pytest.mark.parametrize("world_size", [8, 64])
@pytest.mark.parametrize("model", MODELS)
def test_what_every_rank_holds(model, world_size):
    """Each tensor divides by 64 somewhere, so all shares are equal; the optimizer has a count beside each of them."""
    n, tensors = MODELS[model].n_parameters, len(list(meta(model).parameters()))
    assert simulate(config(model), world_size).state == {
        "parameters": 4 * n // world_size, "gradients": 4 * n // world_size,
        "optimizer": 8 * n // world_size + 4 * tensors}


def meta(model: str) -> Transformer:
    with torch.device("meta"):
        return Transformer(MODELS[model])


@pytest.mark.parametrize("keep_gathered", [False, True])
def test_what_fsdp_sends(keep_gathered):
    """Blocks are gathered twice, or once where they are kept, and the rest once, in two bytes; gradients go in four."""
    n = MODEL.n_parameters
    rest = 2 * MODEL.vocab_size * MODEL.d_model + MODEL.d_model
    times = 1 if keep_gathered else 2
    sent = simulate(config(keep_gathered=keep_gathered), 8).collectives
    assert sent["fsdp: all-gather"] == {"calls": times * 4 + 1, "bytes": 2 * (times * (n - rest) + rest)}
    assert sent["fsdp: reduce-scatter"] == {"calls": 4 + 1, "bytes": 4 * n}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("world_size", [1, 8])
def test_flops(model, world_size):
    """6 for each weight of a matrix and token; with recompute 8 in the blocks, but for what no backward asks for."""
    c = MODELS[model]
    head, layers = c.vocab_size * c.d_model, c.n_layers
    norms = (2 * layers + 1) * c.d_model
    blocks = c.n_active_parameters - 2 * head - norms
    attention = c.flops_per_token() - 6 * (blocks + norms - c.d_model + head)  # which counts the norms of blocks
    plain, again = (simulate(config(model, recompute=what), world_size) for what in ("none", "full"))
    assert plain.flops["products"] == T * 6 * (blocks + head)
    # the MLP's last product is not computed again: the backward needs its inputs alone. That of experts is weighted
    unasked = 2 * layers * c.d_ff * c.d_model if model == "dense" else 0
    assert again.flops["products"] == T * (8 * blocks - unasked + 6 * head)
    # a forward is a third of what the closed form gives attention; the backward makes the scores once more
    assert plain.flops["attention"] == T * attention * 3.5 / 3 and again.flops["attention"] == T * attention * 4.5 / 3
    assert plain.flops_per_token * T * world_size == sum(plain.flops.values()) * world_size
