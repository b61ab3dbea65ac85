"""The checks of `notebooks/06_training` take its own solutions, and reject what a learner may well write instead."""

import re
from pathlib import Path

import pytest
import torch

from nanomai.exercises import training as checks

HALF = Path(__file__).resolve().parent.parent / "notebooks" / "06_training.py"


def solutions() -> dict:
    """Every function in the fenced blocks of the notebook's `<details>`."""
    prose = "\n".join(line[2:] for line in HALF.read_text(encoding="utf-8").splitlines() if line.startswith("#"))
    names = {"torch": torch}
    for details in re.findall(r"<details>.*?</details>", prose, re.DOTALL):
        for block in re.findall(r"```python\n(.*?)```", details, re.DOTALL):
            exec(block, names)
    return names


SOLVED = solutions()


def means_with_the_constant_formula(values, betas):
    mean, out = 0.0, []
    for t, (value, beta) in enumerate(zip(values, betas, strict=True), 1):
        mean = beta * mean + (1 - beta) * value
        out.append(mean / (1 - beta**t))
    return out


def means_not_corrected(values, betas):
    mean, out = 0.0, []
    for value, beta in zip(values, betas, strict=True):
        mean = beta * mean + (1 - beta) * value
        out.append(mean)
    return out


def means_that_begin_with_the_first_value(values, betas):
    mean, out = values[0], []
    for value, beta in zip(values, betas, strict=True):
        mean = beta * mean + (1 - beta) * value
        out.append(mean)
    return out


def means_that_correct_twice(values, betas):
    mean, weight, out = 0.0, 0.0, []
    for value, beta in zip(values, betas, strict=True):
        weight = beta * weight + (1 - beta)
        mean = (beta * mean + (1 - beta) * value) / weight  # what is kept must stay uncorrected
        out.append(mean)
    return out


def is_matrix(name, p):
    return p.ndim == 2 and name.startswith(("blocks.", "head."))


def decay_through_the_gradient(name, p, lr, weight_decay, adam):
    if is_matrix(name, p):
        p.grad += weight_decay * p
    adam(p)


def decay_without_the_learning_rate(name, p, lr, weight_decay, adam):
    if is_matrix(name, p):
        p.mul_(1 - weight_decay)
    adam(p)


def decay_after_the_step(name, p, lr, weight_decay, adam):
    adam(p)
    if is_matrix(name, p):
        p.mul_(1 - lr * weight_decay)


def decay_of_everything(name, p, lr, weight_decay, adam):
    p.mul_(1 - lr * weight_decay)
    adam(p)


def decay_of_the_embedding_too(name, p, lr, weight_decay, adam):
    if p.ndim == 2:
        p.mul_(1 - lr * weight_decay)
    adam(p)


def decay_of_blocks_only(name, p, lr, weight_decay, adam):
    if p.ndim == 2 and name.startswith("blocks."):
        p.mul_(1 - lr * weight_decay)
    adam(p)


def mean_of_the_means(model, micro_batches):
    for ids, targets in micro_batches:
        (model(ids, targets) / len(micro_batches)).backward()


def sum_never_divided(model, micro_batches):
    for ids, targets in micro_batches:
        model(ids, targets, reduction="sum").backward()


def divided_by_all_targets(model, micro_batches):
    n = sum(targets.numel() for _, targets in micro_batches)
    for ids, targets in micro_batches:
        (model(ids, targets, reduction="sum") / n).backward()


def only_the_last_one(model, micro_batches):
    valid = sum((targets != -100).sum().item() for _, targets in micro_batches)
    for ids, targets in micro_batches:
        model.zero_grad()
        (model(ids, targets, reduction="sum") / valid).backward()


EXERCISES = {
    "running_means": (checks.check_running_means, [
        means_with_the_constant_formula, means_not_corrected, means_that_begin_with_the_first_value,
        means_that_correct_twice]),
    "decayed_step": (checks.check_decayed_step, [
        decay_through_the_gradient, decay_without_the_learning_rate, decay_after_the_step, decay_of_everything,
        decay_of_the_embedding_too, decay_of_blocks_only]),
    "accumulate": (checks.check_accumulate, [
        mean_of_the_means, sum_never_divided, divided_by_all_targets, only_the_last_one]),
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
