"""The checks of `notebooks/11b_matmul_and_flash_attention` take its own solutions, and reject what a learner may well
write. Both engines read a kernel's source, so a slip is an edit of the printed solution.
"""

import inspect
import re

import matplotlib.pyplot as plt
import pytest
import triton
import triton.language as tl
from exercise_checks import NOTEBOOKS, edited_solution, exercise_tests, printed_solutions, run_cell

from nanomai.exercises import matmul_flash as checks
from triton_kernels.engine import Kernel

NOTEBOOK, NAMES = "11b_matmul_and_flash_attention", {"triton": triton, "tl": tl, "Kernel": Kernel}
SOLVED = printed_solutions(NOTEBOOK, **NAMES)

SLIPS = {
    "matmul_ragged": [
        ("a runs on into the next row", "mask=(row < M)[:, None] & (k < K)[None, :]",
         "mask=row[:, None] * K + k[None, :] < M * K", "21, 37, 19: 37 of"),
        ("b has no mask along K", "(k < K)[:, None] & ", "", "outside b_ptr"),
        ("rows of a without a mask", "(row < M)[:, None] & (k < K)[None, :]", "(k < K)[None, :]", "outside a_ptr"),
        ("columns of b without a mask", " & (column < N)[None, :], other", ", other", "outside b_ptr"),
        ("only the last step counts", "tl.dot(a, b, c,", "tl.dot(a, b,", "16, 16, 48: 256 of 256"),
        ("rows of b are K long", "k[:, None] * N", "k[:, None] * K", "16, 16, 48: "),
        ("a is read transposed", "row[:, None] * K + k[None, :]", "row[:, None] + k[None, :] * M", "of c are wrong"),
    ],
    "decode": [
        ("no correction", "tl.exp(top - higher)", "1.0", "rising scores: o is off"),
        ("only the sum is corrected", "acc = acc * keep", "acc = acc", "rising scores: o is off"),
        ("the tile's own maximum", "tl.maximum(top, tl.max(s, axis=0))", "tl.max(s, axis=0)", "over 1000: not a"),
        ("top stays", "        top = higher\n", "", "o is off"),
        ("no maximum", "tl.maximum(top, tl.max(s, axis=0))", "tl.max(s, axis=0) * 0", "scores over 1000: not a"),
        ("corrected upside down", "tl.exp(top - higher)", "tl.exp(higher - top)", "not a number"),
    ],
    "key_tiles": [
        ("a window of one more", "first - window + 1", "first - window", "so (1, 2), not (0, 2)"),
        ("the last query's window", "first - window + 1", "first + queries - window", "they meet"),
        ("keys before the text", "max(first - window + 1, 0)", "first - window + 1", "not (-"),
        ("the last tile left out", "last // tile + 1", "last // tile", "they meet"),
        ("past the last key", "min(first + queries, keys)", "(first + queries)", "they meet"),
        ("the first query's end", "min(first + queries, keys) - 1", "first", "they meet"),
    ],
}


WRONG = {name: [(edited_solution(NOTEBOOK, name, fault, edit, **NAMES), message) for fault, *edit, message in slips]
         for name, slips in SLIPS.items()}


@pytest.fixture(autouse=True)
def no_display():
    """A wrong product is drawn."""
    plt.switch_backend("Agg")
    yield
    plt.close("all")


TestExercises = exercise_tests(checks, SOLVED, WRONG)


@pytest.mark.parametrize("name", ["matmul_ragged", "decode"])
def test_the_notebook_s_own_stub_is_not_solved_yet(name, capsys):
    half = (NOTEBOOKS / f"{NOTEBOOK}.py").read_text(encoding="utf-8")
    (cell,) = re.findall(rf"^(@Kernel\n@triton.jit\ndef {name}\(.*?)\n\n\n", half, re.MULTILINE | re.DOTALL)
    names = dict(NAMES)
    run_cell(cell, names)
    getattr(checks, f"check_{name}")(names[name])
    assert capsys.readouterr().out == "not solved yet\n"


def test_a_function_is_no_kernel(capsys):
    checks.check_decode(inspect.unwrap(SOLVED.decode))
    assert "has @Kernel and @triton.jit above it" in capsys.readouterr().out


def test_a_wrong_product_is_drawn():
    checks.check_matmul_ragged(SOLVED.matmul_ragged)
    assert plt.get_fignums() == []
    checks.check_matmul_ragged(WRONG["matmul_ragged"][0][0])
    assert len(plt.get_fignums()) == 1
