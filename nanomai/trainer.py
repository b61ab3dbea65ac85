"""The training loop: `train(config)`, the same for a notebook, a laptop's terminal and every rank of a torchrun job.

Read `train` for the order of things, `Trainer.step` for the mathematics of one step. Gradients are sums over tokens,
divided once by the global count of valid tokens, so accumulation and ranks change speed and memory, never the result.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from nanomai import checkpoint, machine, runs
from nanomai.config import Config, ConfigError
from nanomai.config_file import load_config
from nanomai.data import Batch, rank_spans
from nanomai.evaluation import Evaluation, compressed_bits_per_byte, evaluate, validation_text
from nanomai.guard import SpikeGuard
from nanomai.model import Transformer, build_model
from nanomai.ops import IGNORE
from nanomai.optim import build_optimizers, learning_rate, named_state, piecewise, set_learning_rate
from nanomai.parallel.apply import clip_gradients, parallelize, sum_gradients
from nanomai.parallel.launch import StopSignal, process_group
from nanomai.parallel.mesh import Mesh
from nanomai.preparation import Prepared, prepare
from nanomai.report import Report, profiled
from nanomai.sampling import stream_text
from nanomai.show import plot_loss


class TrainingStopped(RuntimeError):
    """The run cannot go on: too many bad steps in a row. The message says what to do."""


class RunResult(NamedTuple):
    """What came of a run."""

    run_dir: Path
    steps: int  # optimizer steps done, over all sessions of the run
    losses: list[float]  # of each logged step, nats per token
    val_loss: float | None  # None where the run was interrupted
    val_bpb: float | None
    finished: bool


def train(config: Config, show: bool = True) -> RunResult:
    """Trains as `config` says and returns what came of it; the run folder holds everything else.

    Ctrl-C and SIGTERM end the current step, save, and return with `finished=False`. Raises ConfigError, RunError,
    DataError, CheckpointError or TrainingStopped, each one line that says what to do.
    """
    device = machine.pick_device(config.train.device)
    with process_group(device.type) as mesh, Report(show and mesh.is_main) as report:
        if device.type == "cuda":
            device = torch.device("cuda", mesh.local_rank)
        trainer = Trainer(config, device, mesh, report)
        trace = trainer.folder / f"trace-{mesh.rank}.json"
        with trainer.stop, profiled(trainer.config.train.profile_steps, trace, report) as trainer.after_step:
            return trainer.run()


class Trainer:
    """One run in one process: its state, and the steps that change it."""

    def __init__(self, config: Config, device: torch.device, mesh: Mesh, report: Report):
        self.device, self.mesh, self.report = device, mesh, report
        self.stop, self.after_step = StopSignal(), lambda: None
        self.folder, self.config = self._open(config)
        train = self.config.train
        machine.prepare_process(train.threads)
        self.peak = machine.matmul_peak(device, getattr(torch, train.dtype))
        if mesh.is_main:
            report.opening(self.config, self.folder, machine.describe(device), self.peak, config)
        self.prepared = mesh.from_main(self._prepare)  # the others wait, and find what rank 0 made
        self.loader = self.prepared.loader(self.config.sequence_length, self.config.data.seed)
        self.validation = self.prepared.validation(self.config.sequence_length)
        self.checkpoint = self._find_checkpoint()
        self.model = self._build()
        self.optimizers = build_optimizers(self.model, self.config.optim)
        self.guard = SpikeGuard(train.spike_deviations)
        self.steps_done, self.samples, self.seconds = 0, 0, 0.0
        self._restore()
        self.loader.require(self.samples + sum(self._batch_samples()))
        list(rank_spans(0, set(self._batch_samples()), 0, mesh.world_size))  # DataError if ranks cannot share a batch
        mesh.from_main(self._accept)
        parallelize(self.model, mesh, train.compile == "on")
        self.metrics = runs.Metrics(self.folder / "metrics.jsonl", self.steps_done) if mesh.is_main else None
        self.val: Evaluation | None = None
        self.evaluated_at = -1

    # --- Setting up ---------------------------------------------------------------------------------------------------

    def _open(self, config: Config) -> tuple[Path, Config]:
        """The run folder, made by rank 0, and the configuration with every `auto` decided."""
        folder = self.mesh.from_main(lambda: runs.open_run(config))
        saved = folder / "config.yaml"
        before = self.mesh.from_main(lambda: load_config(saved) if saved.exists() else None)
        if before is not None:
            if before.model != config.model:
                raise ConfigError(f"{folder} holds another model than {config.name}; "
                                  "resume with the same model settings")
            decided = {f: getattr(before.train, f) for f in ("dtype", "compile", "threads", "micro_batch")
                       if getattr(config.train, f) in ("auto", 0)}
            config = dataclasses.replace(config, train=dataclasses.replace(config.train, **decided))
        config = machine.resolve(config, self.device, self.mesh.world_size)
        if before is None:
            self.mesh.from_main(lambda: runs.write_config(folder, config))
        return folder, config

    def _accept(self) -> None:
        """What the run folder says of itself changes only after everything that could refuse the settings."""
        runs.write_config(self.folder, self.config)
        self.prepared.tokenizer.save(self.folder / "tokenizer.json")

    def _prepare(self) -> Prepared:
        return prepare(self.config.data, self.config.model.vocab_size, show=not self.report.console.quiet)

    def _build(self) -> Transformer:
        model = build_model(self.config.model, self.config.train.seed)
        model.compute_dtype = getattr(torch, self.config.train.dtype)
        if self.config.train.init_from and self.checkpoint is None:
            source = runs.find_run(self.config.train.init_from)
            theirs = runs.Tokenizer.load(source / "tokenizer.json")
            if theirs.hash != self.prepared.tokenizer.hash:
                raise ConfigError(f"{source} was trained with another tokenizer; set --data.tokenizer "
                                  f"{source / 'tokenizer.json'}", "train.init_from")
            runs.load_weights(model, source)
        return model.to(self.device)

    def _tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor of a checkpoint."""
        optimizer = {f"optimizer/{name}": t for name, t in named_state(self.optimizers, self.model).items()}
        return runs.model_state(self.model) | optimizer | {"rng/cpu": torch.get_rng_state()}

    def _find_checkpoint(self) -> Path | None:
        """The newest good one of a resumed run; damaged ones are named."""
        if not self.config.train.resume:
            return None
        path, complaints = self.mesh.from_main(lambda: checkpoint.newest(self.folder / "checkpoints"))
        for line in complaints:
            self.report.warn(f"{line}; using the one before it")
        if path is None:
            self.report.say("no checkpoint yet: starting at step 0")
        return path

    def _restore(self) -> None:
        """Goes back to that checkpoint, if there is one."""
        path = self.checkpoint
        if path is None:
            return
        state, tensors = checkpoint.read_state(path), self._tensors()
        if state["data"] != self.loader.identity:
            raise ConfigError(f"{path} was trained on other data than data.corpus, data.seed and the sequence length "
                              "give now; resume with the same, or start a run with --train.init-from")
        checkpoint.load(path, tensors, self.mesh)
        torch.set_rng_state(tensors["rng/cpu"])
        self.guard.restore(state["guard"])
        self.steps_done, self.samples, self.seconds = state["step"], state["samples"], state["seconds"]
        if state["machine"] != machine.describe(self.device):
            self.report.warn(f"saved on another machine ({state['machine']}): losses will differ in their last digits")
        self.report.say(f"resuming {path}")

    # --- Running ------------------------------------------------------------------------------------------------------

    def run(self) -> RunResult:
        """Steps until the end or a signal; evaluates, samples and saves on the way."""
        train = self.config.train
        batches = self.loader.batches(self.samples, self._batch_samples(), self.mesh.rank, self.mesh.world_size)
        with contextlib.closing(batches):
            for batch in batches:
                row = self.step(batch)
                if row is None:
                    return self._interrupted()
                self.after_step()
                last = self.steps_done == train.steps
                if last or _due(train.eval_every, self.steps_done):
                    self._evaluate(everything=last)
                if _due(train.sample_every, self.steps_done) and not last:
                    self._sample()
                if last or _due(train.checkpoint_every, self.steps_done):
                    self._save()
                self._progress(row)
        return self._finish()

    def _batch_samples(self) -> Iterator[int]:
        for step in range(self.steps_done, self.config.train.steps):
            yield piecewise(self.config.train.batch_tokens, step) // self.config.sequence_length

    def step(self, batch: Batch) -> dict | None:
        """One optimizer step on this rank's part of the batch; None, and nothing done, if a rank was told to stop."""
        start, train = time.perf_counter(), self.config.train
        valid = (batch.targets != IGNORE).sum().item()
        n_valid, stop, n_samples = self.mesh.sum(torch.tensor(
            [valid, self.stop.name is not None, len(batch.ids)], dtype=torch.float64)).tolist()
        if stop:
            return None
        loss = torch.zeros((), device=self.device)
        for micro in zip(*(x.split(train.micro_batch) for x in batch), strict=True):
            micro_loss = self.model(*(x.to(self.device, non_blocking=True) for x in micro), reduction="sum")
            micro_loss.backward()
            loss += micro_loss.detach()
        sum_gradients(self.model, self.mesh)
        loss = (self.mesh.sum(loss) / n_valid).item()
        grad_norm = clip_gradients(self.model, self.config.optim.grad_clip, n_valid).item()
        lr = learning_rate(self.config.optim, self.steps_done, train.steps)
        reason = self.guard.verdict(loss, grad_norm)
        if reason is None:
            set_learning_rate(self.optimizers, lr)
            for optimizer in self.optimizers:
                optimizer.step()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        self.steps_done, self.samples = self.steps_done + 1, self.samples + int(n_samples)
        seconds = time.perf_counter() - start
        self.seconds += seconds
        row = {"step": self.steps_done, "loss": loss, "grad_norm": grad_norm, "lr": lr,
               "tokens_per_second": round(n_samples * self.config.sequence_length / seconds, 1)}
        return self._record(row, reason)

    def _record(self, row: dict, reason: str | None) -> dict:
        """Logs the step; stops the run if too many in a row were refused."""
        if self.metrics and (reason or row["step"] % self.config.train.log_every == 0):
            self.metrics.add(**row, **({"skipped": reason} if reason else {}))
        if reason:
            self.report.warn(f"step {row['step']} skipped: {reason}")
            if self.guard.skipped_in_a_row >= self.config.train.max_skipped:
                good, _ = checkpoint.newest(self.folder / "checkpoints")
                back = f"the last good checkpoint is {good}" if good else "no checkpoint had been saved"
                raise TrainingStopped(f"{self.guard.skipped_in_a_row} steps in a row were refused, the last because "
                                      f"{reason}; {back}: lower optim.lr, or look at the data, and resume")
        return row

    def _evaluate(self, everything: bool) -> None:
        """Validation loss, never through the compiled training graph: its shapes are not these."""
        n = None if everything else max(1, self.config.train.eval_tokens // self.config.sequence_length)
        batches = self.validation.batches(self.config.train.micro_batch, n, self.mesh.rank, self.mesh.world_size)
        with torch.compiler.set_stance("force_eager"):
            self.val = evaluate(self.model, self.prepared.tokenizer, batches, self.mesh)
        self.evaluated_at = self.steps_done
        if self.metrics and not self.metrics.has(self.steps_done, "val_loss"):
            self.metrics.add(step=self.steps_done, val_loss=self.val.loss, val_bpb=self.val.bits_per_byte)

    def _write(self, tokens: int, seed: int) -> str:
        prompt, tokenizer = self.config.train.sample_prompt, self.prepared.tokenizer
        with torch.compiler.set_stance("force_eager"):
            return "".join(stream_text(self.model, tokenizer, prompt, tokens, temperature=0.7, top_p=0.95, seed=seed))

    def _sample(self) -> None:
        if self.mesh.is_main and not self.report.console.quiet:
            self.report.sample(self.steps_done, self.config.train.sample_prompt, self._write(64, self.steps_done))

    def _progress(self, row: dict) -> None:
        train, speed = self.config.train, row["tokens_per_second"]
        flops = speed * self.config.model.flops_per_token(self.config.sequence_length)
        left = (train.steps - self.steps_done) * self.seconds / max(1, self.steps_done)
        bpb = self.val.bits_per_byte if self.val else None
        self.report.progress(self.steps_done, train.steps, row, bpb, flops / (self.peak * self.mesh.world_size), left)

    def _save(self) -> Path:
        state = {"step": self.steps_done, "samples": self.samples, "seconds": self.seconds, "guard": self.guard.state(),
                 "data": self.loader.identity, "machine": machine.describe(self.device),
                 "config": dataclasses.asdict(self.config)}
        return checkpoint.save(self.folder / "checkpoints", self.steps_done, self._tensors(), state,
                               self.config.train.keep_checkpoints, self.mesh)

    # --- Ending -------------------------------------------------------------------------------------------------------

    def _interrupted(self) -> RunResult:
        path = self._save()
        self.report.interrupted(self.stop.name or "another rank was told to stop", path, self.folder)
        return self._result(finished=False)

    def _finish(self) -> RunResult:
        if self.evaluated_at != self.steps_done:  # a finished run that was resumed with nothing left to do
            self._evaluate(everything=True)
        if self.mesh.is_main:
            prompt = self.config.train.sample_prompt
            (self.folder / "sample.txt").write_text(prompt + self._write(256, 0) + "\n", encoding="utf-8")
            levels = compressed_bits_per_byte(validation_text(self.validation, self.prepared.tokenizer))
            title = f"{self.config.name}: {self.config.model.n_parameters:,} parameters"
            plot_loss(self.metrics.rows, title, self.folder / "loss.png", levels)
            self.report.closing(self.config, self.folder, self.val.loss, self.val.bits_per_byte, levels,
                                self.guard.skipped)
        return self._result(finished=True)

    def _result(self, finished: bool) -> RunResult:
        losses = [row["loss"] for row in self.metrics.rows if row.get("loss") is not None] if self.metrics else []
        val = self.val if finished else None
        return RunResult(self.folder, self.steps_done, losses, val and val.loss, val and val.bits_per_byte, finished)


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0
