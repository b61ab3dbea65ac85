"""What every `test_exercises_*.py` asks of the checks of a notebook: they take its own solutions, reject what a learner
may well write instead, and meet a stub kindly. A check returns nothing: what it says is in what it prints."""

import linecache
import re
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"


def printed_blocks(notebook: str) -> list[str]:
    """The fenced blocks of the notebook's `<details>`."""
    half = (NOTEBOOKS / f"{notebook}.py").read_text(encoding="utf-8")
    prose = "\n".join(line[2:] for line in half.splitlines() if line.startswith("#"))
    return [block for details in re.findall(r"<details>.*?</details>", prose, re.DOTALL)
            for block in re.findall(r"```python\n(.*?)```", details, re.DOTALL)]


def run_cell(source: str, names: dict) -> None:
    """Runs `source` as a cell of a notebook: its lines can be read again, as Triton reads those of a kernel."""
    file = f"<cell {hash(source)}>"
    linecache.cache[file] = len(source), None, source.splitlines(keepends=True), file
    exec(compile(source, file, "exec"), names)


def printed_solutions(notebook: str, **names) -> SimpleNamespace:
    """All that the notebook's solutions define; `names` is what it had imported for them."""
    for block in printed_blocks(notebook):
        run_cell(block, names)
    return SimpleNamespace(**names)


def edited_solution(notebook: str, name: str, fault: str, *edits: tuple[str, str], **names):
    """The printed solution called `name` with each (sound, broken) of `edits`, as a function called `fault`."""
    (source,) = (block for block in printed_blocks(notebook) if re.search(rf"^def {name}\b", block, re.MULTILINE))
    for sound, broken in edits:
        assert sound in source, f"{name} has no {sound!r}"
        source = source.replace(sound, broken)
    run_cell(source, names)
    names[name].__name__ = fault
    return names[name]


def exercise_tests(checks: ModuleType, solved: SimpleNamespace, wrong: dict[str, list[tuple]]) -> type:
    """The tests of `checks`, a class for pytest to collect.

    `wrong[name]` lists wrong answers to `check_name`, each with a part of what the check must say to it, so that it is
    rejected for its own fault.
    """
    rejected = [pytest.param(name, *pair, id=pair[0].__name__) for name, pairs in wrong.items() for pair in pairs]

    def verdict(name, answer, capsys):
        assert getattr(checks, f"check_{name}")(answer) is None
        return capsys.readouterr().out

    class Tests:
        def test_every_check_has_two_wrong_answers(self):
            there = {name.removeprefix("check_") for name in vars(checks) if name.startswith("check_")}
            assert there == {name for name, pairs in wrong.items() if len(pairs) >= 2}, there

        @pytest.mark.parametrize("name", wrong)
        def test_the_printed_solution_is_taken(self, name, capsys):
            said = verdict(name, getattr(solved, name), capsys)
            assert said == "correct\n", said

        @pytest.mark.parametrize("name, answer, message", rejected)
        def test_a_wrong_answer_is_rejected(self, name, answer, message, capsys):
            said = verdict(name, answer, capsys)
            assert said.startswith("not yet: ") and message in said, said

        @pytest.mark.parametrize("name", wrong)
        def test_a_stub_is_not_solved_yet(self, name, capsys):
            def stub(*arguments):
                raise NotImplementedError

            said = verdict(name, stub, capsys)
            assert said == "not solved yet\n", said

    return Tests
