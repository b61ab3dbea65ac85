"""The text of the lessons: made anew it is the committed file, byte for byte, and it teaches what the lessons need."""

import ast
import importlib.util
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOOL = ROOT / "tools" / "lesson_text.py"
COMMITTED = (ROOT / "notebooks" / "lesson.txt").read_bytes()

spec = importlib.util.spec_from_file_location("lesson_text", TOOL)
lesson_text = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lesson_text)


def test_making_it_anew_gives_the_committed_bytes():
    assert lesson_text.lesson_text().encode() == COMMITTED


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_the_tool_writes_these_bytes_in_any_process(hash_seed, tmp_path):
    """No order of a set may enter, and no locale."""
    copy = tmp_path / "tools" / TOOL.name
    copy.parent.mkdir()
    (tmp_path / "notebooks").mkdir()
    copy.write_bytes(TOOL.read_bytes())
    subprocess.run([sys.executable, copy], check=True, env={"PYTHONHASHSEED": hash_seed, "LC_ALL": "C"})
    assert (tmp_path / "notebooks" / "lesson.txt").read_bytes() == COMMITTED


def test_only_the_method_that_python_keeps_stable_is_used():
    """`choice`, `shuffle` and `sample` may give other numbers in another version; `random()` may not."""
    used = {node.attr for node in ast.walk(ast.parse(TOOL.read_text(encoding="utf-8")))
            if isinstance(node, ast.Attribute) and node.attr in dir(random)}
    assert used == {"Random", "random"}


def test_another_seed_tells_other_stories():
    assert lesson_text.lesson_text(1, 1000) != lesson_text.lesson_text(2, 1000)


def test_it_is_about_120_kb_of_stories_with_an_empty_line_after_each():
    text = COMMITTED.decode()
    assert 120_000 <= len(COMMITTED) < 121_000 and text.endswith("\n\n") and "\r" not in text
    stories = text.split("\n\n")[:-1]
    assert len(stories) > 800 and all(story == story.strip() and "\n" not in story for story in stories)
    assert len(set(stories)) > 0.9 * len(stories)


def test_every_kind_of_story_is_in_it():
    text = COMMITTED.decode()
    signs = ("such an ", "Who knows", "Now ", " more. ", " make ", " €", "bigger than", "thanked", "Tomorrow", " °C",
             "the forest")
    assert [sign for sign in signs if sign not in text] == []


def test_its_grammar_and_its_sums_are_right():
    text = COMMITTED.decode()
    assert not re.search(r"\b[Aa] [aeiou]", text) and not re.search(r"\b[Aa]n [^aeiou]", text)
    sums = re.findall(r"(\d+) \+ (\d+) = (\d+)", text)
    assert sums and all(int(n) + int(m) == int(total) for n, m, total in sums)
    assert not re.search(r"\b1 \w+s\b", text), "one of them is singular"
    assert not re.search(r"[^\s]“|”[^\s]|  ", text)


def test_characters_of_two_and_three_bytes_occur():
    sizes = {len(character.encode()) for character in set(COMMITTED.decode())}
    assert sizes == {1, 2, 3}
