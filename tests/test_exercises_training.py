"""The checks of `notebooks/06_training` take its own solutions, and reject what a learner may well write instead."""

import torch
from exercise_checks import exercise_tests, printed_solutions

from nanomai.exercises import training as checks

SOLVED = printed_solutions("06_training", torch=torch)


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


WRONG = {
    "running_means": [(means_with_the_constant_formula, "cannot leave 1.0 to 7.0"),
                      (means_not_corrected, "the mean of one value is the value"),
                      (means_that_begin_with_the_first_value, "values [2.0, 5.0] with betas [0.5, 0.5]"),
                      (means_that_correct_twice, "cannot leave 3.0 to 3.0")],
    "decayed_step": [(decay_through_the_gradient, "which decays"), (decay_without_the_learning_rate, "which decays"),
                     (decay_after_the_step, "which decays"),
                     (decay_of_everything, "embed.weight, which does not decay"),
                     (decay_of_the_embedding_too, "embed.weight, which does not decay"),
                     (decay_of_blocks_only, "head.weight, which decays")],
    "accumulate": [(mean_of_the_means, "with [15, 6] valid tokens"), (sum_never_divided, "48.00 times as long"),
                   (divided_by_all_targets, "with [15, 6] valid tokens"),
                   (only_the_last_one, "with [16, 16, 16] valid tokens")],
}

TestExercises = exercise_tests(checks, SOLVED, WRONG)
