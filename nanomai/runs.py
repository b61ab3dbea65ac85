"""Run folders: how one is made, found, written to and loaded.

    runs/nano/
        config.yaml       the whole configuration, every `auto` decided
        tokenizer.json    so that the folder needs nothing else
        metrics.jsonl     one object a line
        loss.png  sample.txt
        checkpoints/
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from nanomai import checkpoint
from nanomai.config import Config
from nanomai.config_file import load_config, to_yaml
from nanomai.files import write_atomically
from nanomai.model import Transformer
from nanomai.parallel.launch import may_restart
from nanomai.parallel.mesh import Mesh
from nanomai.pretrained import PretrainedTokenizer, load_tokenizer
from nanomai.tokenizer import Tokenizer


class RunError(RuntimeError):
    """A run that cannot be found, loaded or continued: one line that names it and says what to do."""


def open_run(config: Config) -> Path:
    """The folder of this run, made if need be. A folder that holds a run is only used by `train.resume`."""
    wanted, resume = config.train.run_dir, config.train.resume
    if may_restart() and not resume:
        raise RunError("torchrun --max-restarts would begin this run anew after a failure; add --train.resume, which "
                       "goes on from the newest checkpoint and begins where there is none")
    folder = Path(wanted or f"runs/{config.name}").expanduser()
    if wanted and not resume:
        _require_free(folder)
    try:
        if not wanted and not resume:
            folder = _make_numbered(folder)
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
    except OSError as error:
        raise RunError(f"{folder} cannot be written: {error.strerror}; choose another --train.run-dir") from None
    return folder


def _require_free(folder: Path) -> None:
    """Nothing that a run writes may be there already, be it ours or another program's; other files may."""
    if (folder / "config.yaml").exists():
        raise RunError(f"{folder} holds a run already; go on with --train.resume, or choose another --train.run-dir")
    for name in ("checkpoints", "metrics.jsonl", "tokenizer.json"):
        if (folder / name).exists():
            raise RunError(f"{folder} holds {name} already, and a run would overwrite it; choose another "
                           "--train.run-dir")


def _make_numbered(folder: Path) -> Path:
    """Makes `folder`, or the first of folder-2, folder-3, ... that is free; `mkdir` settles who came first."""
    for number in itertools.count(1):
        candidate = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        with contextlib.suppress(FileExistsError):
            candidate.mkdir(parents=True)
            return candidate


@contextlib.contextmanager
def removed_if_unused(folder: Path) -> Iterator[None]:
    """Takes away the folder of a run that fails before it wrote anything: refused settings leave nothing behind."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # a folder that holds anything stays
            (folder / "checkpoints").rmdir()
            folder.rmdir()
        raise


def write_config(folder: Path, config: Config) -> None:
    """The resolved configuration, as `config.yaml`."""
    write_atomically(folder / "config.yaml", to_yaml(config).encode())


def find_run(name: str | Path) -> Path:
    """The run folder that `name` means: a path, or a name in `runs/`. RunError if there is none."""
    for folder in (Path(name).expanduser(), Path("runs") / name):
        if (folder / "config.yaml").is_file():
            return folder
    known = sorted(p.parent.name for p in Path("runs").glob("*/config.yaml"))
    there = f"; in runs/ there are {', '.join(known)}" if known else "; train one with `nanomai train nano`"
    raise RunError(f"no run {str(name)!r}{there}")


class LoadedRun(NamedTuple):
    """All that is needed to use a trained model."""

    model: Transformer
    tokenizer: Tokenizer | PretrainedTokenizer
    config: Config


def load_run(name: str | Path, device: str | torch.device = "cpu") -> LoadedRun:
    """Model, tokenizer and configuration of a run, from its newest good checkpoint, in float32."""
    folder = find_run(name)
    config = load_config(folder / "config.yaml")
    model = Transformer(config.model)
    load_weights(model, folder)
    return LoadedRun(model.to(device).eval(), load_tokenizer(folder / "tokenizer.json"), config)


def load_weights(model: Transformer, folder: Path, mesh: Mesh = checkpoint.ALONE) -> Path:
    """Reads the weights of a run's newest good checkpoint into `model`; returns the checkpoint."""
    path, complaints = checkpoint.newest(folder / "checkpoints", mesh)
    if path is None:
        raise RunError(f"{folder} has no usable checkpoint" + "".join(f"; {line}" for line in complaints))
    checkpoint.load(path, model_state(model), mesh)
    return path


def begin_from(model: Transformer, name: str | Path, tokenizer: Tokenizer | PretrainedTokenizer,
               mesh: Mesh = checkpoint.ALONE) -> None:
    """Reads the weights of another run into a model that is to be trained on `tokenizer`'s ids."""
    source = find_run(name)
    if load_tokenizer(source / "tokenizer.json").hash != tokenizer.hash:
        raise RunError(f"{source} was trained with another tokenizer; set --data.tokenizer {source / 'tokenizer.json'}")
    load_weights(model, source, mesh)


def model_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights, and the buffers that training changes, under the names that checkpoints use."""
    return {f"model/{name}": tensor for name, tensor in model.state_dict().items()}


class Metrics:
    """`metrics.jsonl`: appended to as the run goes, and cut back to the checkpoint when it is resumed."""

    def __init__(self, path: Path, resume_step: int = 0):
        self.path, self.rows = path, [row for row in read_metrics(path) if row["step"] <= resume_step]
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in self.rows).encode())

    def add(self, **row) -> None:
        """Appends a row. A number that is not finite becomes null, since JSON has no other way to say it."""
        row = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}
        self.rows.append(row)
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise RunError(f"{self.path} cannot be written: {error.strerror}; free some space, then go on with "
                           f"`nanomai train {self.path.parent} --train.resume`") from None

    def has(self, step: int, key: str) -> bool:
        """Whether a row of this step holds `key`."""
        return any(row["step"] == step and key in row for row in reversed(self.rows))


def read_metrics(path: str | Path) -> list[dict]:
    """The rows of a metrics file; a last line that a kill cut short is left out."""
    path, rows = Path(path), []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows
