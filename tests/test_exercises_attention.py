"""The checks of `notebooks/03_attention` take its own solutions, and reject what a learner may well write instead."""

import torch
from exercise_checks import exercise_tests, printed_solutions

from nanomai.exercises import attention as checks

SOLVED = printed_solutions("03_attention", torch=torch)


def window_includes_its_edge(query, key, window):
    distance = query[:, None] - key[None, :]
    return (distance >= 0) & (distance <= window)


def window_to_both_sides(query, key, window):
    return (query[:, None] - key[None, :]).abs() < window


def window_from_indices(query, key, window):
    ones = torch.ones(len(query), len(key)).bool()
    return ones.tril() & ones.triu(1 - window)


def alibi_with_slope_from_one(n_heads, length):
    slope = 2.0 ** (-8 * torch.arange(n_heads) / n_heads)
    position = torch.arange(length)
    return -slope[:, None, None] * (position[:, None] - position)


def alibi_that_rewards_distance(n_heads, length):
    return -SOLVED.alibi_bias(n_heads, length)


def alibi_with_ratio_one_half(n_heads, length):
    slope = 2.0 ** -torch.arange(1, n_heads + 1)  # right for eight heads only
    position = torch.arange(length)
    return -slope[:, None, None] * (position[:, None] - position)


def permute_without_the_output(wq, wk, wv, wo, order):
    *rows, _ = SOLVED.permute_heads(wq, wk, wv, wo, order)
    return *rows, wo


def permute_by_the_inverse(wq, wk, wv, wo, order):
    inverse = torch.tensor(order).argsort().tolist()
    return SOLVED.permute_heads(wq, wk, wv, wo, inverse)


def permute_nothing(wq, wk, wv, wo, order):
    return wq, wk, wv, wo


WRONG = {
    "window_mask": [(window_includes_its_edge, "or more back is seen"), (window_to_both_sides, "comes after"),
                    (window_from_indices, "own position")],
    "alibi_bias": [(alibi_with_slope_from_one, "head 1 of 8"), (alibi_that_rewards_distance, "check the sign"),
                   (alibi_with_ratio_one_half, "head 1 of 2")],
    "permute_heads": [(permute_without_the_output, "wo must follow"), (permute_by_the_inverse, "wq: its head h"),
                      (permute_nothing, "wq: its head h")],
}

TestExercises = exercise_tests(checks, SOLVED, WRONG)
