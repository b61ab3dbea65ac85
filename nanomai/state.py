"""A run between two steps: model, optimizers, guard and counts; built over the ranks, saved, and found again."""

from __future__ import annotations

import functools
from dataclasses import asdict
from pathlib import Path

import torch

from nanomai import checkpoint, machine, runs
from nanomai.config import Config, ConfigError
from nanomai.guard import SpikeGuard
from nanomai.model import Transformer, init_weights
from nanomai.optim import build_optimizers, named_state
from nanomai.parallel.apply import allocate, parallelize, share
from nanomai.parallel.layout import Layout
from nanomai.parallel.tensor import part_of
from nanomai.parallel.watch import Watchdog
from nanomai.pretrained import PretrainedTokenizer
from nanomai.report import Report
from nanomai.tokenizer import Tokenizer


class RunState:
    """What the steps of a run change. `data` names what it trains on: (manifest, seed, sequence length)."""

    def __init__(self, config: Config, folder: Path, layout: Layout, device: torch.device,
                 tokenizer: Tokenizer | PretrainedTokenizer, data: list, report: Report, watch: Watchdog):
        self.config, self.folder, self.layout, self.device, self.data = config, folder, layout, device, data
        self.machine = machine.describe(device, layout.mesh.world_size)
        found = self._find(report)
        self.model = self._build(found is None, tokenizer)
        self.optimizers = build_optimizers(self.model, config.optim, getattr(torch, config.train.dtype))
        self.guard = SpikeGuard(config.train.spike_deviations)
        self.steps_done, self.samples = 0, 0
        if found is not None:
            self._restore(found, report)
        self.saver = checkpoint.Saver(folder / "checkpoints", config.train.keep_checkpoints, layout.mesh, watch, device)

    def _find(self, report: Report) -> Path | None:
        """The newest good checkpoint of a resumed run; damaged ones are named."""
        if not self.config.train.resume:
            return None
        path, complaints = checkpoint.newest(self.folder / "checkpoints", self.layout.mesh)
        for line in complaints:
            report.warn(f"{line}; using the one before it")
        if path is None:
            report.say("no checkpoint yet: starting at step 0")
        return path

    def _build(self, fresh: bool, tokenizer: Tokenizer | PretrainedTokenizer) -> Transformer:
        """As shapes first, then laid over the ranks, then with values: no rank needs memory for more than its share."""
        train = self.config.train
        with torch.device("meta"):
            model = Transformer(self.config.model)
        model.compute_dtype = getattr(torch, train.dtype)
        model.set_kernels(train.kernels)
        if train.float8:
            model.use_float8(functools.partial(part_of, self.layout.sizes["tensor"]))
        parallelize(model, self.layout, self.config.parallel, train.compile == "on")
        allocate(model, self.device)
        if fresh:
            init_weights(model, train.seed, share)
            if train.init_from:
                runs.begin_from(model, train.init_from, tokenizer, self.layout.mesh)
        return model

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor of a checkpoint."""
        optimizer = {f"optimizer/{name}": t for name, t in named_state(self.optimizers, self.model).items()}
        return runs.model_state(self.model) | optimizer

    def _restore(self, path: Path, report: Report) -> None:
        saved = checkpoint.read_state(path)
        if saved["data"] != self.data:
            raise ConfigError(f"{path} was trained on other data than data.corpus, data.seed and the sequence length "
                              "give now; resume with the same, or start a run with --train.init-from")
        checkpoint.load(path, self.tensors(), self.layout.mesh)
        self.guard.restore(saved["guard"])
        self.steps_done, self.samples = saved["step"], saved["samples"]
        if saved["machine"] != self.machine:
            report.warn(f"saved on {saved['machine']}: losses here will differ in their last digits")
        report.say(f"resuming {path}")
        if self.steps_done >= self.config.train.steps:
            report.warn(f"all its {self.steps_done} steps are done; a larger --train.steps would train it on")

    def save(self) -> Path:
        """Begins to write a checkpoint; it is whole after `saver.wait()`. Collective."""
        saved = {"step": self.steps_done, "samples": self.samples, "data": self.data, "guard": self.guard.state(),
                 "config": asdict(self.config), "machine": self.machine}
        return self.saver.save(self.steps_done, self.tensors(), saved)
