"""The checks of `notebooks/10_mixed_precision` take its own solutions, and reject what a learner may well write."""

import math

import torch
from exercise_checks import edited_solution, exercise_tests, printed_solutions

from nanomai.exercises import mixed_precision as checks

NOTEBOOK = "10_mixed_precision"
SOLVED = printed_solutions(NOTEBOOK, torch=torch, math=math)


def edited(name, fault, *edits):
    return edited_solution(NOTEBOOK, name, fault, *edits, torch=torch, math=math)


def distance_after_one(x, dtype):
    return torch.finfo(dtype).eps


def distance_after_x(x, dtype):
    return torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(x))


def half_the_distance(x, dtype):
    return distance_after_x(x, dtype) / 2


def relative_distance(x, dtype):
    return torch.finfo(dtype).eps * x


def plain_sum(values):
    total = torch.zeros_like(values[0])
    for v in values:
        total = total + v
    return total


def pytorch_sum(values):
    return values.sum()


def python_sum(values):
    return torch.tensor(sum(v.item() for v in values)).bfloat16()


def wide_sum(values):
    return values.float().sum().bfloat16()


def kahan_sum(values):
    """Right where the total is larger than the next value."""
    total = lost = torch.zeros_like(values[0])
    for v in values:
        y = v - lost
        t = total + y
        lost, total = (t - total) - y, t
    return total


def neumaier_sum(values):
    """What is lost is collected apart, and stops growing as well."""
    total = lost = torch.zeros_like(values[0])
    for v in values:
        t = total + v
        larger, smaller = (total, v) if total.abs() >= v.abs() else (v, total)
        lost, total = lost + ((larger - t) + smaller), t
    return total + lost


def softmax_one_by_one(scores):
    e = (scores - scores.max()).exp()
    total = torch.zeros_like(e[0])
    for x in e:
        total = total + x
    return e / total


def softmax_of_pytorch(scores):
    return scores.softmax(-1)


def softmax_in_float32(scores):
    e = (scores.float() - scores.float().max()).exp()
    return e.bfloat16()


WRONG = {
    "smallest_step": [(distance_after_one, "1.00781 in bfloat16"), (distance_after_x, "1.00781 in bfloat16"),
                      (half_the_distance, "1 in bfloat16: 2^-8 changes nothing"),
                      (relative_distance, "no power of two"),
                      (edited("smallest_step", "one_too_far", ("return step", "return step / 2")),
                       "1 in bfloat16: 2^-8 changes nothing")],
    "compensated_sum": [(plain_sum, "1,000 ones: 1000, not 256"), (pytorch_sum, "sum sums in float32"),
                        (python_sum, "stay in tensors"), (wide_sum, "only bfloat16 is allowed"),
                        (kahan_sum, "1, 4096, 1, -4096, 0.5"),
                        (neumaier_sum, "1,000 ones: 1000, not 512"),
                        (edited("compensated_sum", "forgets_the_old_loss", ("lost + left", "left")),
                         "1,000 ones: 1000, not 256"),
                        (edited("compensated_sum", "the_smaller_first", (">=", "<")), "1,000 ones: 1000, not 258")],
    "narrow_softmax": [(softmax_one_by_one, "4,096 equal scores"),
                       (softmax_of_pytorch, "_softmax sums in float32"),
                       (softmax_in_float32, "only bfloat16 is allowed"),
                       (edited("narrow_softmax", "without_the_largest", ("(scores - scores.max())", "scores")),
                        "scores near 200: some probabilities are not finite"),
                       (edited("narrow_softmax", "odd_one_dropped", ("torch.cat([total, torch.zeros_like(total[:1])])",
                                                                    "total[:-1]")), "seven scores")],
}

TestExercises = exercise_tests(checks, SOLVED, WRONG)
