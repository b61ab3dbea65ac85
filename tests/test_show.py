"""Plots with named axes and units, written without a display; and checks of exercises that never raise."""

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from nanomai.show import STYLE, exercise, lesson, plot_loss

ROWS = [{"step": s, "loss": 5.0 / s, "lr": 1e-3} for s in range(1, 41)]
ROWS[20:20] = [{"step": 20, "val_loss": 0.5, "val_bpb": 1.2}]
ROWS += [{"step": 40, "val_loss": 0.3, "val_bpb": 0.9}, {"step": 41, "loss": None, "skipped": "the loss is nan"}]


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def test_the_file(tmp_path):
    path = tmp_path / "loss.png"
    before = matplotlib.get_backend(), plt.get_fignums(), dict(plt.rcParams)
    plot_loss(ROWS, "a run", path, {"gzip -9": 1.9})
    assert (matplotlib.get_backend(), plt.get_fignums(), dict(plt.rcParams)) == before, "a notebook's own plots go on"
    assert path.read_bytes().startswith(b"\x89PNG")
    image = plt.imread(path)
    height, width, _ = image.shape
    assert width > 2 * height > 500
    dark = (image[..., :3].mean(-1) < 0.6).mean(0)  # ink in each column
    assert dark[: width // 2].sum() > 0 and dark[width // 2 :].sum() > 0, "both halves have something in them"


def test_what_is_drawn():
    left = plot_loss(ROWS, "a run", levels={"gzip -9": 1.9})
    figure = left.figure
    right = figure.axes[1]
    assert figure.get_suptitle() == "a run"
    assert left.get_xlabel() == right.get_xlabel() == "optimizer step"
    assert left.get_ylabel() == "cross-entropy (nats per token)"
    assert right.get_ylabel() == "validation bits per byte"
    lines = {line.get_label(): line for line in left.lines}
    assert list(lines) == ["train, each step", "train, running mean", "validation"]
    assert list(lines["train, each step"].get_xdata()) == list(range(1, 41)), "a skipped step is not drawn"
    x, y = lines["train, running mean"].get_data()
    assert list(x) == list(range(1, 40)), "the mean of two steps stands at the first"
    np.testing.assert_allclose(y, [(5 / s + 5 / (s + 1)) / 2 for s in x])
    assert [list(map(float, data)) for data in lines["validation"].get_data()] == [[20, 40], [0.5, 0.3]]
    assert list(right.lines[0].get_ydata()) == [1.2, 0.9] and list(right.lines[1].get_ydata()) == [1.9, 1.9]
    texts = [text.get_text() for text in right.get_legend().get_texts()]
    assert texts == ["validation", "gzip -9: 1.900"]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("rows", [[], ROWS[:1], ROWS[:3], ROWS[20:21]], ids=["none", "one", "three", "validation"])
def test_a_run_that_has_hardly_begun(tmp_path, rows):
    plot_loss(rows, "a run", tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_lesson(monkeypatch):
    monkeypatch.setattr(plt, "rcParams", plt.rcParams.copy())
    torch.manual_seed(5)
    lesson()
    first = torch.rand(1)
    lesson()
    assert torch.equal(torch.rand(1), first) and torch.get_num_threads() == 1
    assert {name: plt.rcParams[name] for name in STYLE if name != "figure.figsize"} == {
        name: value for name, value in STYLE.items() if name != "figure.figsize"}


@exercise
def check_double(answer):
    """Doubles."""
    if answer(2) != 4:  # pytest would add its own words to an assert
        raise AssertionError("2 doubled is 4")


def unsolved(x):
    raise NotImplementedError


@pytest.mark.parametrize("answer, said", [
    (lambda x: 2 * x, "correct"), (lambda x: x, "not yet: 2 doubled is 4"), (unsolved, "not solved yet"),
    (lambda x: x.double, "not yet: your code raised AttributeError: 'int' object has no attribute 'double'")])
def test_exercise(capsys, answer, said):
    assert check_double(answer) is None, "a notebook would show the value below the verdict"
    assert capsys.readouterr().out == said + "\n"


def test_an_exercise_keeps_its_name():
    assert check_double.__name__ == "check_double" and check_double.__doc__ == "Doubles."
