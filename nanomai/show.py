"""Plots in one style, and other small helpers of the notebooks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STYLE = {"figure.figsize": (7.0, 4.0), "figure.dpi": 110, "axes.grid": True, "grid.alpha": 0.25,
         "axes.spines.top": False, "axes.spines.right": False, "lines.linewidth": 1.6, "font.size": 10,
         "legend.frameon": False}


def lesson() -> None:
    """The first call of every notebook: one thread, fixed seed, one style, so that its stored outputs hold anywhere."""
    import matplotlib.pyplot as plt
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    plt.rcParams.update(STYLE)


def exercise(check: Callable[[Callable], None]) -> Callable[[Callable], None]:
    """Makes of `check(answer)`, which asserts with a message what is wrong, a check that prints and never raises.

    Prints "not solved yet" for a stub that raises NotImplementedError, "correct", or what is wrong. Returns nothing,
    so that a notebook shows the verdict alone.
    """

    @functools.wraps(check)
    def run(answer: Callable) -> None:
        try:
            check(answer)
        except NotImplementedError:
            print("not solved yet")
        except AssertionError as error:
            print(f"not yet: {error}")
        except Exception as error:  # the answer itself fails: the learner needs to see how
            print(f"not yet: your code raised {type(error).__name__}: {error}")
        else:
            print("correct")

    return run


def plot_loss(rows: Sequence[dict], title: str, path: Path | None = None,
              levels: dict[str, float] | None = None) -> Axes:
    """Training loss and validation bits per byte over the steps of a run, from the rows of its `metrics.jsonl`.

    `levels` draws named horizontal lines on the bits-per-byte axis: what a compressor reaches. Written to `path`, if
    given, without a display.
    """
    import matplotlib.pyplot as plt
    from matplotlib.figure import Figure

    train = [(row["step"], row["loss"]) for row in rows if "loss" in row and "skipped" not in row]
    val = [(row["step"], row["val_loss"], row["val_bpb"]) for row in rows if "val_loss" in row]
    with plt.rc_context(STYLE):
        # a bare Figure draws to files only: no display, and no change to how a notebook shows its own
        figure = (plt.figure if path is None else Figure)(figsize=(11.0, 4.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        left.plot([s for s, _ in train], [x for _, x in train], alpha=0.35, label="train, each step")
        left.plot(*_smoothed(train), color="C0", label="train, running mean")
        if val:
            left.plot([s for s, _, _ in val], [x for _, x, _ in val], "o-", color="C1", ms=3, label="validation")
            right.plot([s for s, _, _ in val], [x for _, _, x in val], "o-", color="C1", ms=3, label="validation")
        for i, (name, level) in enumerate((levels or {}).items()):
            right.axhline(level, color=f"C{2 + i}", ls="--", label=f"{name}: {level:.3f}")
        left.set(xlabel="optimizer step", ylabel="cross-entropy (nats per token)")
        right.set(xlabel="optimizer step", ylabel="validation bits per byte")
        for axes in (left, right):
            if axes.lines:
                axes.legend()
        figure.suptitle(title)
        if path is not None:
            figure.savefig(path)
    return left


def _smoothed(points: list[tuple[int, float]]) -> tuple[list[int], list[float]]:
    """A running mean over a twentieth of the run."""
    n = max(1, len(points) // 20)
    steps = [s for s, _ in points][(n - 1) // 2 : len(points) - n // 2]  # each mean stands at its middle
    means = [sum(x for _, x in points[i - n : i]) / n for i in range(n, len(points) + 1)]
    return steps, means
