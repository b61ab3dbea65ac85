"""The exercises of notebooks/00_map: the printed solutions pass, wrong answers do not, stubs are met kindly."""

import dataclasses
import re

from exercise_checks import NOTEBOOKS, exercise_tests, printed_solutions

from nanomai.exercises import house_map as checks

SOLVED = printed_solutions("00_map", dataclasses=dataclasses)
CONFIG = checks.SHAPES["a plain one"]


def without_the_head(c):
    return SOLVED.count(dataclasses.replace(CONFIG, **vars(c) | {"tied_embeddings": True}))


def without_groups(c):
    return SOLVED.count(dataclasses.replace(CONFIG, **vars(c) | {"n_kv_heads": c.n_heads}))


def two_matrices_in_the_mlp(c):
    return SOLVED.count(c) - c.n_layers * c.d_model * c.d_ff


def twelve_l_d_squared(c):
    return 12 * c.n_layers * c.d_model**2 + c.vocab_size * c.d_model


def asks_the_package(c):
    return c.n_parameters


def rounds_up(config, budget):
    return dataclasses.replace(SOLVED.widen(config, budget), d_ff=SOLVED.widen(config, budget).d_ff + 1)


def forgets_the_layers(config, budget):
    room = budget - config.n_parameters
    return dataclasses.replace(config, d_ff=config.d_ff + room // (3 * config.d_model))


def never_narrower(config, budget):
    return max(config, SOLVED.widen(config, budget), key=lambda c: c.d_ff)


def changes_the_width_too(config, budget):
    return dataclasses.replace(SOLVED.widen(config, budget), vocab_size=config.vocab_size - 1)


WRONG = {
    "count": [(without_the_head, "with untied embeddings"), (without_groups, "with fewer key-value heads"),
              (two_matrices_in_the_mlp, "a plain one"), (twelve_l_d_squared, "a plain one"),
              (asks_the_package, "your code raised AttributeError")],
    "widen": [(rounds_up, "more than the budget"), (forgets_the_layers, "more than the budget"),
              (never_narrower, "more than the budget"), (changes_the_width_too, "only d_ff may change")],
}

TestExercises = exercise_tests(checks, SOLVED, WRONG)


def test_the_map_leads_somewhere():
    """Every file that the prose links to is there, but for the next notebook, which may not have been executed yet."""
    links = re.findall(r"\]\(([^)#]+)\)", (NOTEBOOKS / "00_map.py").read_text(encoding="utf-8"))
    missing = [link for link in links if not link.startswith("http") and not (NOTEBOOKS / link).exists()
               and not (NOTEBOOKS / link).with_suffix(".py").exists()]
    assert links and not missing
