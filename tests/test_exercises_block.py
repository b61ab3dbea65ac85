"""The checks of `notebooks/05_block_and_model` take its own solutions, and reject what a learner may well write."""

import torch
from exercise_checks import exercise_tests, printed_solutions
from torch import nn

from nanomai import ops
from nanomai.exercises import block as checks

SOLVED = printed_solutions("05_block_and_model", torch=torch, ops=ops)


def gradient_with_a_constant_root(x, weight, eps, d_y):
    r = (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    return d_y * weight / r, (d_y * x / r).flatten(0, -2).sum(0)


def gradient_without_eps(x, weight, eps, d_y):
    return SOLVED.rms_norm_gradient(x, weight, 0.0, d_y)


def gradient_that_sums_for_the_mean(x, weight, eps, d_y):
    r = (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    n, d_n = x / r, d_y * weight
    return (d_n - n * (n * d_n).sum(-1, keepdim=True)) / r, (d_y * n).flatten(0, -2).sum(0)


def gradient_of_one_leading_dimension(x, weight, eps, d_y):
    d_x, _ = SOLVED.rms_norm_gradient(x, weight, eps, d_y)
    r = (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    return d_x, (d_y * x / r).sum(0)


def flops_of_the_formula(config, t):
    return config.flops_per_token(t)  # half of the scores, and norms as if they were matrices


def flops_without_the_tied_head(config, t):
    head = 6 * config.vocab_size * config.d_model
    return SOLVED.flops(config, t) - (head if config.tied_embeddings else 0)


def flops_with_as_many_keys_as_queries(config, t):
    missing = 6 * config.n_layers * config.d_model * config.head_dim * 2 * (config.n_heads - config.n_kv_heads)
    return SOLVED.flops(config, t) + missing


def flops_always_with_a_gate(config, t):
    missing = 6 * config.n_layers * config.d_model * config.d_ff
    return SOLVED.flops(config, t) + (0 if config.activation == "swiglu" else missing)


def flops_with_heads_as_wide_as_the_model(config, t):
    d = config.d_model
    wrong = 12 * config.n_layers * t * (d - config.n_heads * config.head_dim)
    return SOLVED.flops(config, t) + wrong


def stream_that_keeps_the_mlp_norm(model, x):
    rotary = ops.rotary_table(torch.arange(x.shape[1]), model.config.head_dim, model.config.rope_theta)
    stds = [x.std().item()]
    for block in model.blocks.values():
        x = x + block.attention(x, rotary, None)
        x = x + block.mlp(block.mlp_norm(x))
        stds.append(x.std().item())
    return stds


def stream_that_breaks_the_model(model, x):
    rotary = ops.rotary_table(torch.arange(x.shape[1]), model.config.head_dim, model.config.rope_theta)
    stds = [x.std().item()]
    for block in model.blocks.values():
        block.attention_norm = block.mlp_norm = nn.Identity()
        x = x + block.attention(block.attention_norm(x), rotary, None)
        x = x + block.mlp(block.mlp_norm(x))
        stds.append(x.std().item())
    return stds


def stream_of_branches_side_by_side(model, x):
    rotary = ops.rotary_table(torch.arange(x.shape[1]), model.config.head_dim, model.config.rope_theta)
    stds = [x.std().item()]
    for block in model.blocks.values():
        x = x + block.attention(x, rotary, None) + block.mlp(x)
        stds.append(x.std().item())
    return stds


def stream_in_place(model, x):
    rotary = ops.rotary_table(torch.arange(x.shape[1]), model.config.head_dim, model.config.rope_theta)
    stds = [x.std().item()]
    for block in model.blocks.values():
        x += block.attention(x, rotary, None).detach()
        x += block.mlp(x).detach()
        stds.append(x.std().item())
    return stds


def stream_without_its_start(model, x):
    return SOLVED.stream_without_norm(model, x)[1:]


WRONG = {
    "rms_norm_gradient": [(gradient_with_a_constant_root, "d_x is off"), (gradient_without_eps, "d_x is off"),
                          (gradient_that_sums_for_the_mean, "d_x is off"),
                          (gradient_of_one_leading_dimension, "d_weight has shape (3, 5), not (5,)")],
    "flops": [(flops_of_the_formula, "one plain layer"), (flops_without_the_tied_head, "one plain layer"),
              (flops_with_as_many_keys_as_queries, "share one key-value head"),
              (flops_always_with_a_gate, "a GELU MLP"),
              (flops_with_heads_as_wide_as_the_model, "wider than d_model")],
    "stream_without_norm": [(stream_that_keeps_the_mlp_norm, "after block 1 the std"),
                            (stream_that_breaks_the_model, "leave its norms where they are"),
                            (stream_of_branches_side_by_side, "the std is"),
                            (stream_in_place, "x itself was changed"),
                            (stream_without_its_start, "1 blocks give 2 numbers, not 1")],
}

TestExercises = exercise_tests(checks, SOLVED, WRONG)
