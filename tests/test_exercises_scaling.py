"""The checks of `notebooks/08_scaling_laws` take its own solutions, and reject what a learner may well write."""

import math
import re

import torch
from exercise_checks import NOTEBOOKS, edited_solution, exercise_tests, printed_solutions, run_cell

from nanomai.exercises import scaling as checks

NOTEBOOK = "08_scaling_laws"
NAMES = {"torch": torch, "math": math}
# the notebook's own functions, which a learner may use
(CELL,) = re.findall(r"^def solve\(.*?(?=^# %%)", (NOTEBOOKS / f"{NOTEBOOK}.py").read_text(encoding="utf-8"),
                     re.DOTALL | re.MULTILINE)
run_cell(CELL, NAMES)
SOLVED = printed_solutions(NOTEBOOK, **NAMES)


def edited(name, fault, *edits):
    return edited_solution(NOTEBOOK, name, fault, *edits, **NAMES)


def loss_of_the_nearest_run(runs, n, d):
    return min(runs, key=lambda run: abs(math.log(run[0] / n)) + abs(math.log(run[1] / d)))[2]


def power_of_the_budget(runs, n, d):
    """A straight line through logarithms of loss over budget."""
    x, y = (torch.tensor([f(run) for run in runs], dtype=torch.float64)
            for f in (lambda run: math.log(run[0] * run[1]), lambda run: math.log(run[2])))
    slope = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()
    return math.exp(y.mean() + slope * (math.log(n * d) - x.mean()))


def equal_shortfalls(constants, flops):
    _, big_a, big_b, a, b = constants
    n = (big_a / big_b * (flops / 6) ** b) ** (1 / (a + b))
    return n, flops / 6 / n


def twenty_tokens(constants, flops):
    n = math.sqrt(flops / 120)
    return n, 20 * n


def closed_form_of_all_parameters(constants, whole, low, high):
    *_, a, b = constants
    return b / (a + b)


WRONG = {
    "predict_run": [(edited("predict_run", "without_a_floor", ("fit(*zip(*runs))", "fit(*zip(*runs), floor=False)")),
                     "off the true"),
                    (loss_of_the_nearest_run, "off the true"), (power_of_the_budget, "off the true"),
                    (edited("predict_run", "sizes_exchanged", ("runs)), n, d)", "runs)), d, n)")), "off the true")],
    "compute_optimal": [(equal_shortfalls, "parameters are best"), (twenty_tokens, "parameters are best"),
                        (edited("compute_optimal", "two_flops", ("(flops / 6) ** b", "(flops / 2) ** b"),
                                ("flops / 6 / n", "flops / 2 / n")), "of the budget"),
                        (edited("compute_optimal", "exponents_exchanged", ("** b) **", "** a) **")),
                         "parameters are best")],
    "measured_exponent": [(closed_form_of_all_parameters, "an embedding"),
                          (edited("measured_exponent", "counts_n_alone", ("whole(n) ** a", "n ** a")), "an embedding"),
                          (edited("measured_exponent", "budget_of_all", ("(6 * n)", "(6 * whole(n))")),
                           "an embedding")],
}

TestExercises = exercise_tests(checks, SOLVED, WRONG)
