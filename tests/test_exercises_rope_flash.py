"""The checks of `notebooks/04_rope_gqa_flash` take its own solutions, and reject what a learner may well write."""

import torch
from exercise_checks import exercise_tests, printed_solutions

from nanomai.exercises import rope_flash as checks

SOLVED = printed_solutions("04_rope_gqa_flash", torch=torch)


def score_turned_the_wrong_way(q, k, distance, theta):
    return SOLVED.score_from_distance(q, k, -distance, theta)


def score_of_neighbouring_pairs(q, k, distance, theta):
    order = [*range(0, len(q), 2), *range(1, len(q), 2)]
    return SOLVED.score_from_distance(q[order], k[order], distance, theta)


def score_at_one_speed(q, k, distance, theta):
    half = len(q) // 2
    turn = torch.polar(torch.ones(half), torch.full((half,), float(distance)))
    return (torch.complex(q[:half], q[half:]) * torch.complex(k[:half], k[half:]).conj() * turn).real.sum()


def update_without_correction(state, scores, values):
    m, z, o = state
    m = torch.maximum(m, scores.max())
    p = (scores - m).exp()
    return m, z + p.sum(), o + p @ values


def update_of_the_sum_alone(state, scores, values):
    m, z, o = state
    new = torch.maximum(m, scores.max())
    p = (scores - new).exp()
    return new, z * (m - new).exp() + p.sum(), o + p @ values


def update_with_the_tile_s_own_maximum(state, scores, values):
    m, z, o = state
    new = scores.max()
    keep, p = (m - new).exp(), (scores - new).exp()
    return new, z * keep + p.sum(), o * keep + p @ values


def update_without_a_maximum(state, scores, values):
    m, z, o = state
    p = scores.exp()
    return torch.maximum(m, scores.max()), z + p.sum(), o + p @ values


def merge_by_the_mean(o1, log1, o2, log2):
    return (o1 + o2) / 2, torch.logaddexp(log1, log2)


def merge_with_plain_exponentials(o1, log1, o2, log2):
    z1, z2 = log1.exp(), log2.exp()
    return (z1[:, None] * o1 + z2[:, None] * o2) / (z1 + z2)[:, None], (z1 + z2).log()


def merge_without_weights(o1, log1, o2, log2):
    return o1 + o2, torch.logaddexp(log1, log2)


def merge_that_adds_logarithms(o1, log1, o2, log2):
    o, _ = SOLVED.merge_partials(o1, log1, o2, log2)
    return o, log1 + log2


WRONG = {
    "score_from_distance": [(score_turned_the_wrong_way, "your distance of"), (score_of_neighbouring_pairs, "K = 8"),
                            (score_at_one_speed, "K = 8")],
    "online_update": [(update_without_correction, "rising scores: z must"),
                      (update_of_the_sum_alone, "rising scores: o / z"),
                      (update_with_the_tile_s_own_maximum, "falling scores: m must"),
                      (update_without_a_maximum, "one tile: z must")],
    "merge_partials": [(merge_by_the_mean, "3 + 3 keys: the output"), (merge_with_plain_exponentials, "near 500"),
                       (merge_without_weights, "3 + 3 keys: the output"),
                       (merge_that_adds_logarithms, "3 + 3 keys: the log-sum-exp")],
}

TestExercises = exercise_tests(checks, SOLVED, WRONG)
