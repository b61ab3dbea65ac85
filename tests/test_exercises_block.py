"""The checks of `notebooks/05_block_and_model` take its own solutions, and reject what a learner may well write."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from nanomai import ops
from nanomai.exercises import block as checks

HALF = Path(__file__).resolve().parent.parent / "notebooks" / "05_block_and_model.py"


def solutions() -> dict:
    """Every function in the fenced blocks of the notebook's `<details>`."""
    prose = "\n".join(line[2:] for line in HALF.read_text(encoding="utf-8").splitlines() if line.startswith("#"))
    names = {"torch": torch, "ops": ops}
    for details in re.findall(r"<details>.*?</details>", prose, re.DOTALL):
        for block in re.findall(r"```python\n(.*?)```", details, re.DOTALL):
            exec(block, names)
    return names


SOLVED = solutions()


def gradient_with_a_constant_root(x, weight, eps, d_y):
    r = (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    return d_y * weight / r, (d_y * x / r).flatten(0, -2).sum(0)


def gradient_without_eps(x, weight, eps, d_y):
    return SOLVED["rms_norm_gradient"](x, weight, 0.0, d_y)


def gradient_that_sums_for_the_mean(x, weight, eps, d_y):
    r = (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    n, d_n = x / r, d_y * weight
    return (d_n - n * (n * d_n).sum(-1, keepdim=True)) / r, (d_y * n).flatten(0, -2).sum(0)


def gradient_of_one_leading_dimension(x, weight, eps, d_y):
    d_x, _ = SOLVED["rms_norm_gradient"](x, weight, eps, d_y)
    r = (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    return d_x, (d_y * x / r).sum(0)


def flops_of_the_formula(config, t):
    return config.flops_per_token(t)  # half of the scores, and norms as if they were matrices


def flops_without_the_tied_head(config, t):
    head = 6 * config.vocab_size * config.d_model
    return SOLVED["flops"](config, t) - (head if config.tied_embeddings else 0)


def flops_with_as_many_keys_as_queries(config, t):
    missing = 6 * config.n_layers * config.d_model * config.head_dim * 2 * (config.n_heads - config.n_kv_heads)
    return SOLVED["flops"](config, t) + missing


def flops_always_with_a_gate(config, t):
    missing = 6 * config.n_layers * config.d_model * config.d_ff
    return SOLVED["flops"](config, t) + (0 if config.activation == "swiglu" else missing)


def flops_with_heads_as_wide_as_the_model(config, t):
    d = config.d_model
    wrong = 12 * config.n_layers * t * (d - config.n_heads * config.head_dim)
    return SOLVED["flops"](config, t) + wrong


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
        x = block(x, rotary, None)
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
    return SOLVED["stream_without_norm"](model, x)[1:]


EXERCISES = {
    "rms_norm_gradient": (checks.check_rms_norm_gradient, [
        gradient_with_a_constant_root, gradient_without_eps, gradient_that_sums_for_the_mean,
        gradient_of_one_leading_dimension]),
    "flops": (checks.check_flops, [
        flops_of_the_formula, flops_without_the_tied_head, flops_with_as_many_keys_as_queries,
        flops_always_with_a_gate, flops_with_heads_as_wide_as_the_model]),
    "stream_without_norm": (checks.check_stream_without_norm, [
        stream_that_keeps_the_mlp_norm, stream_that_breaks_the_model, stream_of_branches_side_by_side,
        stream_in_place, stream_without_its_start]),
}
WRONG = [(check, answer) for check, answers in EXERCISES.values() for answer in answers]


@pytest.mark.parametrize("name", EXERCISES)
def test_the_solution_of_the_notebook_is_taken(name, capsys):
    check, _ = EXERCISES[name]
    assert check(SOLVED[name]), capsys.readouterr().out


@pytest.mark.parametrize("check, answer", WRONG, ids=[answer.__name__ for _, answer in WRONG])
def test_a_wrong_answer_is_rejected_with_a_reason(check, answer, capsys):
    assert not check(answer)
    said = capsys.readouterr().out
    assert said.startswith("not yet: ") and "raised" not in said, said


@pytest.mark.parametrize("name", EXERCISES)
def test_a_stub_is_not_solved_yet(name, capsys):
    def stub(*arguments):
        raise NotImplementedError

    assert not EXERCISES[name][0](stub)
    assert capsys.readouterr().out == "not solved yet\n"
