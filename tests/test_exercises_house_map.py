"""The exercises of notebooks/00_map: the printed solutions pass, wrong answers do not, stubs are met kindly."""

import dataclasses
import re
from pathlib import Path

import pytest

from nanomai.exercises import house_map

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"


def solution(name: str):
    """The function that the notebook's own <details> block defines."""
    prose = "\n".join(line.removeprefix("#").removeprefix(" ")
                      for line in (NOTEBOOKS / "00_map.py").read_text(encoding="utf-8").splitlines())
    [code] = [block for block in re.findall(r"```python\n(.*?)```", prose, re.DOTALL) if f"def {name}(" in block]
    names = {"dataclasses": dataclasses}
    exec(code, names)
    return names[name]


def without_the_head(c):
    return solution("count")(dataclasses.replace(CONFIG, **vars(c) | {"tied_embeddings": True}))


def without_groups(c):
    return solution("count")(dataclasses.replace(CONFIG, **vars(c) | {"n_kv_heads": c.n_heads}))


def two_matrices_in_the_mlp(c):
    return solution("count")(c) - c.n_layers * c.d_model * c.d_ff


def twelve_l_d_squared(c):
    return 12 * c.n_layers * c.d_model**2 + c.vocab_size * c.d_model


def asks_the_package(c):
    return c.n_parameters


def rounds_up(config, budget):
    return dataclasses.replace(solution("widen")(config, budget), d_ff=solution("widen")(config, budget).d_ff + 1)


def forgets_the_layers(config, budget):
    room = budget - config.n_parameters
    return dataclasses.replace(config, d_ff=config.d_ff + room // (3 * config.d_model))


def never_narrower(config, budget):
    return max(config, solution("widen")(config, budget), key=lambda c: c.d_ff)


def changes_the_width_too(config, budget):
    return dataclasses.replace(solution("widen")(config, budget), vocab_size=config.vocab_size - 1)


CONFIG = house_map.SHAPES["a plain one"]
CHECKS = {
    house_map.check_count: ("count", [without_the_head, without_groups, two_matrices_in_the_mlp, twelve_l_d_squared,
                                      asks_the_package]),
    house_map.check_widen: ("widen", [rounds_up, forgets_the_layers, never_narrower, changes_the_width_too]),
}
WRONG = [(check, answer) for check, (_, answers) in CHECKS.items() for answer in answers]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_printed_solution_passes(check, capsys):
    assert check(solution(CHECKS[check][0]))
    assert capsys.readouterr().out == "correct\n"


@pytest.mark.parametrize("check, answer", WRONG, ids=lambda function: function.__name__)
def test_a_wrong_answer_is_rejected(check, answer, capsys):
    assert not check(answer)
    assert capsys.readouterr().out.startswith("not yet: ")


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_a_stub_is_not_solved_yet(check, capsys):
    def stub(*_):
        raise NotImplementedError

    assert not check(stub)
    assert capsys.readouterr().out == "not solved yet\n"


def test_the_map_leads_somewhere():
    """Every file that the prose links to is there, but for the next notebook, which may not have been executed yet."""
    links = re.findall(r"\]\(([^)#]+)\)", (NOTEBOOKS / "00_map.py").read_text(encoding="utf-8"))
    missing = [link for link in links if not link.startswith("http") and not (NOTEBOOKS / link).exists()
               and not (NOTEBOOKS / link).with_suffix(".py").exists()]
    assert links and not missing
