"""What a person sees: in a pipe plain lines, on a terminal a live one, with show=False nothing."""

import dataclasses
import io
import shlex
import sys
from pathlib import Path

import pytest

from nanomai import report as module
from nanomai.config import Config, ModelConfig, TrainConfig
from nanomai.report import Report, profiled

CONFIG = Config(name="nano", model=ModelConfig(),
                train=TrainConfig(steps=100, dtype="float32", compile="off", threads=2, micro_batch=32,
                                  sample_prompt="def f("))
ROW = {"loss": 1.23456, "tokens_per_second": 12345.6}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def tell(report: Report) -> None:
    """A whole short run."""
    with report:
        report.opening(CONFIG, Path("runs/nano"), "a CPU", 2e11)
        report.progress(1, 100, ROW, None, 0.4321, None)
        report.sample(50, "def ", "main(): [bold]pass")
        report.warn("step 7 skipped: the loss is nan")
        report.progress(100, 100, ROW, 1.5, 0.5, 0.0)
        report.closing(CONFIG, Path("runs/nano"), 2.5, 1.75, {"gzip -9": 1.963}, 3)


def test_in_a_pipe(capsys):
    tell(Report())
    assert capsys.readouterr().out == """\
nano: 853,120 parameters, 4 layers of 128, 5.9 MFLOP a token
on a CPU; matrix products reach 200 GFLOP/s
dtype float32, compile off, kernels auto, threads 2, micro_batch 32
writing to runs/nano

step   1/100  loss 1.235  val   -   bits/byte  12,346 tokens/s  MFU 43%   -  left
--- step 50 writes ---
def main(): [bold]pass
---
warning: step 7 skipped: the loss is nan
step 100/100  loss 1.235  val 1.500 bits/byte  12,346 tokens/s  MFU 50%  0:00 left

validation: 2.500 nats/token, 1.750 bits/byte (gzip -9 1.963)
skipped steps: 3 (see the `skipped` rows of metrics.jsonl)
curve: runs/nano/loss.png   sample: runs/nano/sample.txt

next:
  nanomai sample runs/nano --prompt 'def f('           # let it write
  nanomai eval runs/nano                               # measure it again, or on a text of yours
  nanomai train micro                                  # the next size up: about ten minutes
"""


def test_on_a_terminal(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    tell(Report())
    said = terminal.getvalue()
    assert "step 50 writes" in said and "main(): [bold]pass" in said, "text of the model is never markup"
    assert "loss 1.235" in said
    assert "\x1b[?25l" in said and said.rindex("\x1b[?25h") > said.rindex("\x1b[?25l"), "the cursor comes back"


def test_nothing(capsys):
    tell(Report(show=False))
    assert capsys.readouterr() == ("", "")


def test_plain_lines_come_at_intervals(capsys, monkeypatch):
    clock = iter([100.0, 101.0, 104.0, 105.5, 106.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    with Report() as report:
        for step in (1, 2, 3, 4, 100):
            report.progress(step, 100, ROW, None, 0.1, 1.0)
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ["1/100", "4/100", "100/100"]


def test_hours_left(capsys):
    Report().progress(5, 100, ROW, None, 0.4321, 3723.0)
    assert capsys.readouterr().out.endswith("MFU 43%  1:02:03 left\n")


def commands(text: str) -> list[list[str]]:
    return [shlex.split(line, comments=True) for line in text.splitlines() if line.startswith("  nanomai")]


def test_commands_can_be_pasted(capsys):
    folder = Path("my runs/it's")
    config = dataclasses.replace(CONFIG, name="other")
    Report().closing(config, folder, 2.5, 1.75, {}, 0)
    Report().interrupted("SIGTERM", folder / "checkpoints/step-00000005", folder)
    said = capsys.readouterr().out
    assert "skipped" not in said and "SIGTERM: saved my runs/it's/checkpoints/step-00000005" in said
    assert commands(said) == [
        ["nanomai", "sample", str(folder), "--prompt", "def f("], ["nanomai", "eval", str(folder)],
        ["nanomai", "train", str(folder), "--train.resume", "--train.steps", "200"],
        ["nanomai", "train", str(folder), "--train.resume"]]


@pytest.mark.parametrize("steps, said", [(6, "profile: {}"), (2, "profile: the run was too short to trace")])
def test_profiled(tmp_path, capsys, steps, said):
    path = tmp_path / "trace.json"
    with profiled(2, path, Report()) as after_step:
        for _ in range(steps):
            sum(range(1000))
            after_step()
    assert capsys.readouterr().out.replace("\n", "").startswith(said.format(path))
    assert path.exists() == (steps == 6)


def test_not_profiled(tmp_path, capsys):
    with profiled(0, tmp_path / "trace.json", Report()) as after_step:
        after_step()
    assert not list(tmp_path.iterdir()) and capsys.readouterr().out == ""
