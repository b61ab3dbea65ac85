"""The checks of `notebooks/03_attention` take its own solutions, and reject what a learner may well write instead."""

import re
from pathlib import Path

import pytest
import torch

from nanomai.exercises import attention as checks

HALF = Path(__file__).resolve().parent.parent / "notebooks" / "03_attention.py"


def solutions() -> dict:
    """Every function in the fenced blocks of the notebook's `<details>`."""
    prose = "\n".join(line[2:] for line in HALF.read_text(encoding="utf-8").splitlines() if line.startswith("#"))
    names = {"torch": torch}
    for details in re.findall(r"<details>.*?</details>", prose, re.DOTALL):
        for block in re.findall(r"```python\n(.*?)```", details, re.DOTALL):
            exec(block, names)
    return names


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
    return -solutions()["alibi_bias"](n_heads, length)


def alibi_with_ratio_one_half(n_heads, length):
    slope = 2.0 ** -torch.arange(1, n_heads + 1)  # right for eight heads only
    position = torch.arange(length)
    return -slope[:, None, None] * (position[:, None] - position)


def permute_without_the_output(wq, wk, wv, wo, order):
    *rows, _ = solutions()["permute_heads"](wq, wk, wv, wo, order)
    return *rows, wo


def permute_by_the_inverse(wq, wk, wv, wo, order):
    inverse = torch.tensor(order).argsort().tolist()
    return solutions()["permute_heads"](wq, wk, wv, wo, inverse)


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


@pytest.mark.parametrize("name", WRONG)
def test_the_printed_solution_is_taken(name, capsys):
    assert getattr(checks, f"check_{name}")(solutions()[name])
    assert capsys.readouterr().out == "correct\n"


@pytest.mark.parametrize("name, answer, message", [(name, *wrong) for name in WRONG for wrong in WRONG[name]])
def test_a_wrong_answer_is_rejected(name, answer, message, capsys):
    assert not getattr(checks, f"check_{name}")(answer)
    said = capsys.readouterr().out
    assert said.startswith("not yet: ") and message in said, said


@pytest.mark.parametrize("name", WRONG)
def test_a_stub_is_not_solved_yet(name, capsys):
    def stub(*arguments):
        raise NotImplementedError

    assert not getattr(checks, f"check_{name}")(stub)
    assert capsys.readouterr().out == "not solved yet\n"
