"""The checks of `notebooks/22_long_context` take its own solutions, and reject what a learner may well write."""

import math

from exercise_checks import exercise_tests, printed_solutions

from nanomai.exercises import long_context as checks

SOLVED = printed_solutions("22_long_context", math=math)


def turns_in_radians(head_dim, theta, context):
    return sum(context * theta ** (-2 * pair / head_dim) >= 1 for pair in range(head_dim // 2))


def turns_with_half_the_exponent(head_dim, theta, context):
    return sum(context * theta ** (-pair / head_dim) >= 2 * math.pi for pair in range(head_dim // 2))


def turns_of_every_number(head_dim, theta, context):
    return 2 * SOLVED.full_turns(head_dim, theta, context)


def theta_times_factor(theta, factor, head_dim):
    return theta * factor


def theta_with_the_exponent_upside_down(theta, factor, head_dim):
    return theta * factor ** ((head_dim - 2) / head_dim)


def theta_of_pairs(theta, factor, head_dim):
    return theta * factor ** (head_dim / (head_dim - 1))


def reach_of_whole_windows(windows, length):
    return min(sum(length if w is None else w for w in windows), length - 1)


def reach_of_one_layer(windows, length):
    return min(max(length if w is None else w - 1 for w in windows), length - 1)


def reach_beyond_the_text(windows, length):
    return sum(length - 1 if w is None else w - 1 for w in windows)


WRONG = {
    "full_turns": [(turns_in_radians, "5 of 8 pairs"), (turns_with_half_the_exponent, "5 of 8 pairs"),
                   (turns_of_every_number, "you say 10")],
    "ntk_theta": [(theta_times_factor, "pair 7"), (theta_with_the_exponent_upside_down, "pair 7"),
                  (theta_of_pairs, "pair 7")],
    "window_reach": [(reach_of_whole_windows, "windows [4] in 20 tokens reach back 3, you say 4"),
                     (reach_of_one_layer, "[4, 4] in 20 tokens reach back 6"),
                     (reach_beyond_the_text, "in 15 tokens reach back 14")],
}

TestExercises = exercise_tests(checks, SOLVED, WRONG)
