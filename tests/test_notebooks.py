"""What nbval cannot see. nbval compares stored outputs with new ones, and so compares nothing for a cell that was never
run, nor any picture; a notebook without outputs, or without a claim, would pass it. These are the guards around it."""

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jupytext
import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))
HALVES = sorted(ROOT.glob("notebooks/*.py"))

# {"19_gpu.ipynb": {7: "the reason"}}: the only code cells, counted from 1, that may tell nbval to look away.
MAY_SKIP: dict[str, dict[int, str]] = {}

MAX_COLUMNS = 78  # longer lines are cut off on the page
MAX_LINES = 30

MARKER = re.compile(r"^\s*#+\s*(NBVAL_\w+|PYTEST_VALIDATE_IGNORE_OUTPUT)\s*$", re.MULTILINE)
MARKER_TAGS = {"nbval-skip", "nbval-ignore-output", "nbval-raises-exception"}
SHOWS = re.compile(r"^\s*(print|display|show|check\w*)\(|plt\.show\(\)", re.MULTILINE)
CLAIMS = re.compile(r"^\s*assert\b|\bassert_close\(|\bcheck\w*\(", re.MULTILINE)
MAGIC = re.compile(r"^\s*[%!]", re.MULTILINE)
UNSTABLE = re.compile(r"0x[0-9a-f]{6,}|\d(\.\d+)?\s?(it/s|ms\b|µs)|/tmp/|/home/|/Users/|\d\d:\d\d:\d\d")
UNROUNDED = re.compile(r"\d\.\d{5,}")


def problems(path: Path) -> Iterator[str]:
    """Everything that is wrong with one notebook, a line each. Cells are counted from 1, as In[1] is."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    yield from notebook_problems(notebook, cells)
    yield from pair_problems(path, notebook)
    for number, cell in enumerate(cells, 1):
        may_skip = number in MAY_SKIP.get(path.name, {})
        for problem in (*source_problems(cell), *output_problems(cell), *tag_problems(cell, may_skip)):
            yield f"cell {number}: {problem}"
        if is_plot(cell) and not any(CLAIMS.search(c.source) for c in cells[number - 1 : number + 1]):
            yield f"cell {number}: a plot without a claim about its numbers, here or in the next code cell"


def notebook_problems(notebook, cells: list) -> Iterator[str]:
    if not cells:
        yield "no code cells"
    if notebook.metadata.get("kernelspec", {}).get("name") != "python3":
        yield "the kernelspec is not python3"
    counts = [cell.execution_count for cell in cells]
    if counts != list(range(1, len(cells) + 1)):
        yield f"not run from top to bottom in a fresh kernel: counts {counts}"
    if not any(text_of(output) for cell in cells for output in cell.outputs):
        yield "no text output is stored: nbval has nothing to compare"
    if not any(CLAIMS.search(cell.source) for cell in cells):
        yield "no assertion: no claim is checked"


def pair_problems(path: Path, notebook) -> Iterator[str]:
    """The .py half is what people edit and review; the .ipynb must hold the very same cells."""
    half = path.with_suffix(".py")
    if not half.exists():
        yield f"no {half.name} beside it"
        return
    edited, executed = ([(cell.cell_type, cell.source, cell.metadata.get("tags", [])) for cell in cells]
                        for cells in (jupytext.read(half, fmt="py:percent").cells, notebook.cells))
    for number, (one, other) in enumerate(zip(edited, executed, strict=False), 1):
        if one != other:
            yield f"not in step with {half.name}, from its cell {number} on ({one[1][:40]!r}): run `make nb`"
            return
    if len(edited) != len(executed):
        yield f"{len(executed)} cells, but {half.name} has {len(edited)}: run `make nb`"


def source_problems(cell) -> Iterator[str]:
    lines = cell.source.splitlines()
    if not lines:
        yield "empty"
    if len(lines) > MAX_LINES:
        yield f"{len(lines)} lines; {MAX_LINES} are allowed"
    if any(len(line) > MAX_COLUMNS for line in lines):
        yield f"a line of code over {MAX_COLUMNS} columns"
    if cell.source.rstrip().endswith(";"):
        yield "ends with ';' (nbval sees the value nevertheless)"
    if MAGIC.search(cell.source):
        yield "a magic or shell line (nbval passes a magic that does not exist)"
        return
    try:
        ast.parse(cell.source)
    except SyntaxError as error:
        yield f"not Python: {error}"


def output_problems(cell) -> Iterator[str]:
    if SHOWS.search(cell.source) and not cell.outputs:
        yield "prints or shows, but no output is stored"
    for output in cell.outputs:
        if output.output_type == "stream" and output.name == "stderr":
            yield "stored stderr (a warning, a progress bar?)"
        text = text_of(output)
        if UNSTABLE.search(text):
            yield f"output that changes from run to run: {text[:60]!r}"
        if UNROUNDED.search(text):
            yield f"a number with five decimals or more, which another machine may not reproduce: {text[:60]!r}"
        if any(len(line) > MAX_COLUMNS for line in text.splitlines()):
            yield f"a line of output over {MAX_COLUMNS} columns"


def tag_problems(cell, may_skip: bool) -> Iterator[str]:
    tags = set(cell.metadata.get("tags", []))
    errors = [output.ename for output in cell.outputs if output.output_type == "error"]
    if (MARKER.search(cell.source) or tags & MARKER_TAGS) and not may_skip:
        yield "an nbval marker that MAY_SKIP in tests/test_notebooks.py does not list"
    if errors and "raises-exception" not in tags:
        yield f"a stored error: {errors[0]}"
    if "raises-exception" in tags and not errors:
        yield "tagged raises-exception, but stores no error"
    if "execution" in cell.metadata:
        yield "timing metadata, which changes with every run"


def text_of(output) -> str:
    return output.get("text", "") + output.get("data", {}).get("text/plain", "")


def is_plot(cell) -> bool:
    return any(kind.startswith("image/") for output in cell.outputs for kind in output.get("data", {}))


def test_there_are_notebooks():
    if not NOTEBOOKS:
        pytest.skip("the first notebooks have not landed yet")
    assert [half.stem for half in HALVES] == [notebook.stem for notebook in NOTEBOOKS], "a half without its other"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_hygiene(path):
    found = list(problems(path))
    assert not found, "\n".join(found)


# The guards themselves: a sound notebook passes, and each fault that is planted in it is named.

HALF = """\
# %% [markdown]
# # A lesson

# %%
import base64
from IPython.display import Image, display

total = 1 + 1
print("one and one is", total)

# %% tags=["raises-exception"]
assert total == 3, "two is not three"

# %%
pixel = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJ"
pixel += "AAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
display(Image(base64.b64decode(pixel)))

# %%
assert total == 2
"""


@pytest.fixture(scope="module")
def lesson(tmp_path_factory) -> Path:
    """A notebook that the project's own tool has executed."""
    half = tmp_path_factory.mktemp("notebooks") / "00_lesson.py"
    half.write_text(HALF)
    tool = [sys.executable, ROOT / "tools" / "execute.py", half]
    subprocess.run(tool, check=True)
    once = half.with_suffix(".ipynb").read_bytes()
    subprocess.run(tool, check=True)
    assert half.with_suffix(".ipynb").read_bytes() == once, "the same code must give the same file"
    return half.with_suffix(".ipynb")


def set_source(number: int, source: str) -> Callable:
    return lambda notebook: notebook.cells[number].update(source=source)


def set_output(text: str) -> Callable:
    return lambda notebook: notebook.cells[1].outputs[0].update(text=text)


def set_tags(number: int, *tags: str) -> Callable:
    return lambda notebook: notebook.cells[number].metadata.update(tags=list(tags))


def clear_all_outputs(notebook) -> None:
    for cell in notebook.cells[1:]:
        cell.update(outputs=[], execution_count=None)


FAULTS = {
    "no code": (lambda notebook: notebook.update(cells=notebook.cells[:1]), "no code cells"),
    "other kernel": (lambda notebook: notebook.metadata.kernelspec.update(name="mine"), "kernelspec is not python3"),
    "cleared": (clear_all_outputs, "not run from top to bottom"),
    "nothing to compare": (clear_all_outputs, "nbval has nothing to compare"),
    "out of order": (lambda notebook: notebook.cells[4].update(execution_count=7), "not run from top to bottom"),
    "no claim": (lambda notebook: notebook.update(cells=notebook.cells[:2]), "no assertion"),
    "output lost": (lambda notebook: notebook.cells[1].update(outputs=[]), "no output is stored"),
    "edited by hand": (set_source(4, "assert total == 2.0"), "not in step with 00_lesson.py, from its cell 5 on"),
    "prose by hand": (set_source(0, "# Another lesson"), "not in step with 00_lesson.py, from its cell 1 on"),
    "tag by hand": (set_tags(4, "hide-cell"), "not in step with 00_lesson.py"),
    "a cell lost": (lambda notebook: notebook.cells.pop(), "4 cells, but 00_lesson.py has 5"),
    "empty": (set_source(4, ""), "cell 4: empty"),
    "long cell": (set_source(4, "x = 1\n" * 31), "cell 4: 31 lines; 30 are allowed"),
    "wide code": (set_source(4, "x = '" + "x" * 78 + "'"), "a line of code over 78 columns"),
    "wide output": (set_output("x" * 79), "a line of output over 78 columns"),
    "semicolon": (set_source(4, "total;"), "ends with ';'"),
    "magic": (set_source(4, "%time x = 1"), "a magic or shell line"),
    "shell": (set_source(4, "!ls"), "a magic or shell line"),
    "not Python": (set_source(4, "def"), "not Python"),
    "warning": (lambda notebook: notebook.cells[1].outputs[0].update(name="stderr"), "stored stderr"),
    "address": (set_output("<object at 0x7f1234567890>"), "changes from run to run"),
    "timing": (set_output("took 12.5 ms"), "changes from run to run"),
    "path": (set_output("/home/me/nanomai"), "changes from run to run"),
    "clock": (set_output("at 12:34:56"), "changes from run to run"),
    "unrounded": (set_output("loss 2.580885"), "five decimals or more"),
    "marker": (set_source(4, "# NBVAL_SKIP\nassert total == 2"), "an nbval marker"),
    "marker tag": (set_tags(4, "nbval-ignore-output"), "an nbval marker"),
    "untagged error": (set_tags(2), "cell 2: a stored error: AssertionError"),
    "tag without error": (set_tags(4, "raises-exception"), "stores no error"),
    "plot without claim": (set_source(4, "pass"), "cell 3: a plot without a claim"),
    "timing metadata": (lambda notebook: notebook.cells[1].metadata.update(execution={}), "timing metadata"),
}


def plant(lesson: Path, folder: Path, fault: Callable) -> Path:
    notebook = nbformat.read(lesson, as_version=4)
    fault(notebook)
    (folder / "00_lesson.py").write_text(HALF)
    nbformat.write(notebook, folder / lesson.name)
    return folder / lesson.name


def test_a_sound_notebook_has_no_problem(lesson):
    assert list(problems(lesson)) == []


@pytest.mark.parametrize("fault, message", FAULTS.values(), ids=FAULTS)
def test_each_fault_is_named(fault, message, lesson, tmp_path):
    found = list(problems(plant(lesson, tmp_path, fault)))
    assert any(message in problem for problem in found), found


def test_a_missing_half_is_named(lesson, tmp_path):
    path = plant(lesson, tmp_path, lambda notebook: None)
    path.with_suffix(".py").unlink()
    assert list(problems(path)) == ["no 00_lesson.py beside it"]


def nbval(path: Path) -> subprocess.CompletedProcess:
    """As `make test` runs it, with the project's own settings."""
    shutil.copy(ROOT / "conftest.py", path.parent)
    return subprocess.run([sys.executable, "-m", "pytest", "-c", ROOT / "pyproject.toml", "--rootdir", path.parent,
                           "-p", "no:cacheprovider", "--nbval", path], capture_output=True, text=True)


def test_nbval_passes_what_was_executed_and_fails_a_corrupted_number(lesson, tmp_path):
    sound, corrupt = nbval(lesson), nbval(plant(lesson, tmp_path, set_output("one and one is 3\n")))
    assert sound.returncode == 0, sound.stdout
    assert corrupt.returncode == 1 and "1 failed, 3 passed" in corrupt.stdout, corrupt.stdout
