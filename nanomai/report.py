"""What a person sees of a run: the opening, a live line, samples on the way, and what to do next."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from nanomai.config import Config

PLAIN_LINE_SECONDS = 5.0  # between lines where there is no terminal to redraw


class _Console(Console):
    """Training goes on when nobody reads its output any more: the run folder holds everything."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())  # so that no later flush fails


class Report:
    """Prints for rank 0 of a run, or not at all (`show=False`)."""

    def __init__(self, show: bool = True):
        # stdout, as a log file or a pipe wants the same words; commands to copy must not be broken at its width
        self.console = _Console(file=sys.stdout, quiet=not show, highlight=False, soft_wrap=True)
        self.live = None
        if self.console.is_terminal:
            self.live = Live(console=self.console, refresh_per_second=4, transient=True)
        self.shown = 0.0

    def __enter__(self) -> Report:
        return self

    def __exit__(self, *_) -> None:
        if self.live is not None:
            self.live.stop()

    def opening(self, config: Config, folder: Path, machine: str, peak: float) -> None:
        """Size, cost, and what can be left to `auto`, with what it became."""
        model, train = config.model, config.train
        self.say(f"{config.name}: {model.n_parameters:,} parameters, {model.n_layers} layers of {model.d_model}, "
                 f"{model.flops_per_token(config.sequence_length) / 1e6:.1f} MFLOP a token")
        self.say(f"on {machine}; matrix products reach {peak / 1e9:,.0f} GFLOP/s")
        dtype = f"{train.dtype}, projections float8" if train.float8 else train.dtype
        self.say(f"dtype {dtype}, compile {train.compile}, kernels {train.kernels}, threads {train.threads}, "
                 f"micro_batch {train.micro_batch}")
        self.say(f"writing to {folder}\n")

    def progress(self, step: int, steps: int, row: dict, val_bpb: float | None, mfu: float,
                 seconds_left: float | None) -> None:
        """The live line."""
        left = " - " if seconds_left is None else _clock(seconds_left)
        bpb = f"{val_bpb:.3f}" if val_bpb is not None else "  -  "
        line = (f"step {step:>{len(str(steps))}}/{steps}  loss {row['loss']:.3f}  val {bpb} bits/byte  "
                f"{row['tokens_per_second']:,.0f} tokens/s  MFU {mfu:.0%}  {left} left")
        now = time.monotonic()
        if self.live is not None and not self.console.quiet:
            self.live.start()
            self.live.update(Text(line, style="bold", no_wrap=True, overflow="ellipsis"))
        elif now - self.shown > PLAIN_LINE_SECONDS or step == steps:
            self.say(line)
            self.shown = now

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def warn(self, text: str) -> None:
        self.console.print(f"warning: {text}", style="yellow", markup=False)

    def sample(self, step: int, prompt: str, text: str) -> None:
        """A short text that the model wrote on the way."""
        if self.live is not None:
            body = Text(prompt, style="dim") + Text(text)
            self.console.print(Panel(body, title=f"step {step} writes", title_align="left", border_style="cyan"))
        else:
            self.say(f"--- step {step} writes ---\n{prompt}{text}\n---")

    def interrupted(self, reason: str, saved: Path, folder: Path) -> None:
        """Where to go on."""
        self.say(f"\n{reason}: saved {saved}\ngo on with\n  nanomai train {shlex.quote(str(folder))} --train.resume")

    def closing(self, config: Config, folder: Path, val_loss: float, val_bpb: float, levels: dict[str, float],
                skipped: int) -> None:
        """How it went, beside what compressors reach on the same text, and the three commands to try next."""
        beside = ", ".join(f"{name} {level:.3f}" for name, level in levels.items())
        self.say(f"\nvalidation: {val_loss:.3f} nats/token, {val_bpb:.3f} bits/byte" + f" ({beside})" * bool(levels))
        if skipped:
            self.say(f"skipped steps: {skipped} (see the `skipped` rows of metrics.jsonl)")
        self.say(f"curve: {folder / 'loss.png'}   sample: {folder / 'sample.txt'}\n\nnext:")
        run = shlex.quote(str(folder))
        # the run folder, not a name: it holds what was changed on the command line
        more = f"nanomai train {run} --train.resume --train.steps {2 * config.train.steps}"
        prompt = f" --prompt {shlex.quote(config.train.sample_prompt)}" if config.train.sample_prompt else ""
        as_it_ships = config.name == "nano" and config.data.corpus == "stdlib"
        for command, why in ((f"nanomai sample {run}{prompt}", "let it write"),
                             (f"nanomai eval {run}", "measure it again, or on a text of yours"),
                             ("nanomai train micro", "the next size up: about ten minutes") if as_it_ships else
                             (more, "train it on")):
            self.say(f"  {command:<52} # {why}")


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


@contextlib.contextmanager
def profiled(n_steps: int, path: Path, report: Report) -> Iterator[Callable[[], None]]:
    """Traces `n_steps` steps, after three that warm up, to `path`. Yields what to call after each step."""
    if not n_steps:
        yield lambda: None
        return
    profiler = torch.profiler.profile(schedule=torch.profiler.schedule(wait=2, warmup=1, active=n_steps, repeat=1),
                                      on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(path)))
    with profiler:
        yield profiler.step
    report.say(f"profile: {path} (open it at ui.perfetto.dev or chrome://tracing)" if path.exists() else
               "profile: the run was too short to trace")
