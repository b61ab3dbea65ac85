"""The checks of `notebooks/11a_first_kernels` take its own solutions, and reject what a learner may well write instead.

Both engines read a kernel's source, so a wrong answer is an edit of the printed solution.
"""

from functools import partial

import matplotlib.pyplot as plt
import pytest
import triton
import triton.language as tl
from exercise_checks import edited_solution, exercise_tests, printed_solutions

from nanomai.exercises import first_kernels as checks
from triton_kernels.engine import Kernel

NOTEBOOK, NAMES = "11a_first_kernels", {"triton": triton, "tl": tl, "Kernel": Kernel}
SOLVED = printed_solutions(NOTEBOOK, **NAMES)
wrong = partial(edited_solution, NOTEBOOK, **NAMES)

WRONG = {
    "bias_relu": [
        (wrong("bias_relu", "no_mask", (", mask=at < N", "")), "read of 14 elements outside"),
        (wrong("bias_relu", "bias_without_column", ("at % D", "at")), "outside bias_ptr = bias, which has 11"),
        (wrong("bias_relu", "every_program_the_same_tile", ("tl.program_id(0) * BLOCK + ", "")), "after a write of it"),
        (wrong("bias_relu", "programs_one_apart", ("* BLOCK + tl", "+ tl")), "after a write of it"),
        (wrong("bias_relu", "no_relu", ("tl.maximum(x + bias, 0.0)", "x + bias")), "numbers of y are wrong"),
    ],
    "softmin": [
        (wrong("softmin", "absent_is_zero", ('float("inf")', "0.0")), "numbers of y are wrong"),
        (wrong("softmin", "absent_as_in_softmax", ('float("inf")', '-float("inf")')), "of y are NaN"),
        (wrong("softmin", "largest_subtracted", ("tl.min", "tl.max")), "of y are NaN"),
        (wrong("softmin", "nothing_subtracted", ("tl.min(x, axis=0) - x", "-x")), "near 0, BLOCK = 8"),
        (wrong("softmin", "softmax", ('float("inf")', '-float("inf")'),
               ("tl.min(x, axis=0) - x", "x - tl.max(x, axis=0)")), "numbers of y are wrong"),
    ],
    "transpose": [
        (wrong("transpose", "copied_not_turned", ("m * y_row + n", "n * y_row + m")), "after a write of it"),
        (wrong("transpose", "mask_turned", ("(n < N) & (m < M)", "(n < M) & (m < N)")), "outside"),
        (wrong("transpose", "x_taken_for_contiguous", ("n * x_row + m * x_column", "n * M + m")),
         "every second column"),
        (wrong("transpose", "axes_of_the_grid_turned", ("program_id(0)", "program_id(2)"),
               ("program_id(1)", "program_id(0)"), ("program_id(2)", "program_id(1)")), "of y are NaN"),
    ],
}


@pytest.fixture(autouse=True)
def no_window(monkeypatch):
    """The checks draw; here nobody looks."""
    monkeypatch.setattr(plt, "show", lambda: None)


TestExercises = exercise_tests(checks, SOLVED, WRONG)
