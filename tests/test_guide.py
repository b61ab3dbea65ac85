"""The guide for teachers names every notebook and every exercise there is, and no other."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GUIDE = (ROOT / "notebooks" / "README.md").read_text(encoding="utf-8")


def test_every_notebook_is_in_the_guide():
    assert set(re.findall(r"\((\d\d[a-z]?_\w+)\.ipynb\)", GUIDE)) == {half.stem for half in ROOT.glob("notebooks/*.py")}


def test_every_exercise_is_in_the_guide():
    checks = {node.name for path in ROOT.glob("nanomai/exercises/*.py") for node in ast.parse(path.read_text()).body
              if isinstance(node, ast.FunctionDef) and node.name.startswith("check_")}
    assert set(re.findall(r"`(check_\w+)`", GUIDE)) == checks


def test_every_question_is_the_title_of_its_notebook():
    for number, question in re.findall(r"\[(\d\d[a-z]?)_\w+\]\(\S+\) \| (.+?) \|", GUIDE):
        [half] = ROOT.glob(f"notebooks/{number}_*.py")
        assert half.read_text(encoding="utf-8").splitlines()[1] == f"# # {number} · {question}"
