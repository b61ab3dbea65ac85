"""The training loop: `train(config)`, the same for a notebook, a laptop's terminal and every rank of a torchrun job.

Read `train` for the order of things, `Trainer.step` for the mathematics of one step. Gradients are sums over tokens,
divided once by the global count of valid tokens, so accumulation and ranks change speed and memory, never the result.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from nanomai import checkpoint, machine, runs
from nanomai.config import Config, ConfigError
from nanomai.config_file import load_config
from nanomai.data import Batch, make_key, rank_spans, timed
from nanomai.evaluation import Evaluation, compressed_bits_per_byte, evaluate, validation_text
from nanomai.moe import balance_experts, sum_loads
from nanomai.ops import IGNORE
from nanomai.optim import learning_rate, piecewise, set_learning_rate
from nanomai.parallel import fsdp, limits
from nanomai.parallel.apply import clip_gradients
from nanomai.parallel.launch import StopSignal, process_group
from nanomai.parallel.layout import lay_out
from nanomai.parallel.mesh import Mesh
from nanomai.parallel.watch import Watchdog, slowest
from nanomai.preparation import prepare
from nanomai.report import Report, profiled
from nanomai.sampling import stream_text
from nanomai.show import plot_loss
from nanomai.state import RunState


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
    DataError, CheckpointError or TrainingStopped, each one line that says what to do. Each micro-batch seeds torch's
    generator with its own number.
    """
    device = machine.pick_device(config.train.device)
    with process_group(device.type) as mesh, Report(show and mesh.is_main) as report:
        folder, config = _open(config, device, mesh)
        trace = profiled(config.train.profile_steps, folder / f"trace-{mesh.rank}.json", report)
        with runs.removed_if_unused(folder):
            trainer = Trainer(config, folder, device, mesh, report)
            with trainer.stop, trace as trainer.after_step:
                return trainer.run()


def _open(config: Config, device: torch.device, mesh: Mesh) -> tuple[Path, Config]:
    """The run folder, and the configuration with every `auto` decided, by rank 0 for all but threads, or kept."""
    folder = mesh.from_main(lambda: runs.open_run(config))
    saved = folder / "config.yaml"
    before = mesh.from_main(lambda: load_config(saved) if saved.exists() else None)
    if before is not None and before.model != config.model:
        raise ConfigError(f"{folder} holds another model than {config.name}; resume with the same model settings")
    found = mesh.from_main(lambda: machine.resolve(config, device, mesh.world_size, before))  # machines may differ
    threads = config.train.threads or machine.cores_of_a_rank()
    return folder, replace(found, train=replace(found.train, threads=threads))


class Trainer:
    """One run in one process: its state, and the steps that change it."""

    def __init__(self, config: Config, folder: Path, device: torch.device, mesh: Mesh, report: Report):
        self.config, self.folder, self.device, self.mesh, self.report = config, folder, device, mesh, report
        self.stop, self.after_step = StopSignal(tell=not report.console.quiet), lambda: None
        train = config.train
        self.layout = lay_out(config.parallel, mesh, device.type)
        limits.check(config.model, config.parallel, self.layout.sizes)  # before data is prepared
        machine.prepare_process(train.threads)
        self.peak = machine.matmul_peak(device, getattr(torch, train.dtype))
        self.shown = mesh.from_main(lambda: not report.console.quiet)
        if mesh.is_main:
            report.opening(self.config, self.folder, machine.describe(device), self.peak)
        self.prepared = mesh.from_main(  # the other ranks wait, and find what it made
            lambda: prepare(config.data, config.model.vocab_size, show=not report.console.quiet))
        verify = mesh.local_rank == 0  # one rank reads a machine's data through, and all stop if it is damaged
        self.loader = self.prepared.loader(config.sequence_length, config.data.seed, verify)
        self.validation = self.prepared.validation(config.sequence_length, verify)
        self.recent_seconds: deque[float] = deque(maxlen=16)
        self.recent_waits: deque[float] = deque(maxlen=16)  # of them, for this rank's part of the data
        self.watch = Watchdog(mesh, train.hang_timeout)
        self.state = RunState(config, folder, self.layout, device, self.prepared.tokenizer, self.loader.identity,
                              report, self.watch)
        self.loader.require(self.state.samples + sum(self._batch_samples()))
        list(rank_spans(0, set(self._batch_samples()), 0, self.layout.data_size))  # DataError if they can't share one
        for samples in set(self._batch_samples()):
            limits.check_batch(config, samples // self.layout.data_size)
        mesh.from_main(self._accept)
        self.metrics = runs.Metrics(self.folder / "metrics.jsonl", self.state.steps_done) if mesh.is_main else None
        self.val: Evaluation | None = None

    # --- Setting up ---------------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        """What the run folder says of itself changes only after everything that could refuse the settings."""
        runs.write_config(self.folder, self.config)
        self.prepared.tokenizer.save(self.folder / "tokenizer.json")

    # --- Running ------------------------------------------------------------------------------------------------------

    def run(self) -> RunResult:
        """Steps until the end or a signal; evaluates, samples and saves on the way."""
        train = self.config.train
        batches = self.loader.batches(self.state.samples, self._batch_samples(), self.layout.data_rank,
                                      self.layout.data_size)
        with self.watch, contextlib.closing(batches), self.state.saver:
            for asked_at, batch in timed(batches):
                self.recent_waits.append(time.perf_counter() - asked_at)
                row = self.step(batch, asked_at)
                if row is None:
                    return self._interrupted()
                self.watch.hear(self.state.steps_done)
                self.after_step()
                last = self.state.steps_done == train.steps
                if _due(train.eval_every, self.state.steps_done) and not last:
                    self._evaluate()
                if self.shown and _due(train.sample_every, self.state.steps_done) and not last:
                    self._sample()
                if last or _due(train.checkpoint_every, self.state.steps_done):
                    self.state.save()
                self._progress(row)
            return self._finish()  # whatever happens there, the last step is saved

    def _batch_samples(self) -> Iterator[int]:
        for step in range(self.state.steps_done, self.config.train.steps):
            yield piecewise(self.config.train.batch_tokens, step) // self.config.sequence_length

    def step(self, batch: Batch, asked_at: float) -> dict | None:
        """One optimizer step on this rank's part of the batch; None, and nothing done, if a rank was told to stop.

        Its time runs from `asked_at`, so that waiting for data shows as slowness.
        """
        state, valid = self.state, (batch.targets != IGNORE).sum().item()
        n_valid, stop, n_samples = self.layout.sum(torch.tensor(
            [valid, self.stop.name is not None, len(batch.ids)], dtype=torch.float64)).tolist()
        if stop:
            return None
        loss = self._backward(batch)
        imbalance = sum_loads(state.model, self.mesh.sum)  # asked for before the host waits, read after
        loss = (self.layout.sum(loss) / n_valid).item()
        grad_norm = clip_gradients(state.model, self.config.optim.grad_clip, n_valid).item()
        lr = learning_rate(self.config.optim, state.steps_done, self.config.train.steps)
        reason = state.guard.verdict(loss, grad_norm)
        if reason is None:
            set_learning_rate(state.optimizers, lr)
            for optimizer in state.optimizers:
                optimizer.step()
        balance_experts(state.model, move=reason is None)
        for optimizer in state.optimizers:
            optimizer.zero_grad(set_to_none=True)
        state.steps_done, state.samples = state.steps_done + 1, state.samples + int(n_samples)
        seconds = time.perf_counter() - asked_at
        self.recent_seconds.append(seconds)
        row = {"step": state.steps_done, "loss": loss, "grad_norm": grad_norm, "lr": lr,
               "tokens_per_second": round(n_samples * self.config.sequence_length / seconds, 1)}
        row |= {} if imbalance is None else {"moe/imbalance": imbalance.item()}
        return self._record(row, reason)

    def _backward(self, batch: Batch) -> torch.Tensor:
        """Adds up the gradients of this rank's part of the batch, in micro-batches; returns the sum of the losses."""
        train, model = self.config.train, self.state.model
        if hasattr(model, "pipeline"):
            return model.pipeline.forward_backward(*(x.to(self.device) for x in batch), train.micro_batch)
        loss = torch.zeros((), device=self.device)
        first = self.state.samples + self.layout.data_rank * len(batch.ids)  # this rank's first sample
        part = 0 if (context := self.layout.axis("context")) is None else context.get_local_rank()
        micro_batches = list(zip(*(x.split(train.micro_batch) for x in batch), strict=True))
        for i, micro in enumerate(micro_batches, 1):
            # what a router draws belongs to the samples and positions, whichever rank or session has them
            torch.manual_seed(make_key(train.seed, first + (i - 1) * train.micro_batch).item() + part)
            fsdp.sum_after(model, last=i == len(micro_batches))
            micro_loss = model(*(x.to(self.device, non_blocking=True) for x in micro), reduction="sum")
            micro_loss.backward()
            loss += micro_loss.detach()
        return loss

    def _record(self, row: dict, reason: str | None) -> dict:
        """Logs the step; stops the run if too many in a row were refused."""
        if self.metrics and (reason or row["step"] % self.config.train.log_every == 0):
            self.metrics.add(**row, **({"skipped": reason} if reason else {}))
        if reason:
            self.report.warn(f"step {row['step']} skipped: {reason}")
            if self.state.guard.skipped_in_a_row >= self.config.train.max_skipped:
                self.state.saver.wait()
                good, _ = checkpoint.newest(self.folder / "checkpoints", self.mesh)
                back = f"the last good checkpoint is {good}" if good else "no checkpoint had been saved"
                skipped = self.state.guard.skipped_in_a_row
                raise TrainingStopped(f"{skipped} steps in a row were refused, the last because {reason}; {back}: "
                                      "lower optim.lr, or look at the data, and resume")
        return row

    def _evaluate(self, last: bool = False) -> None:
        """Validation loss, never through the compiled training graph: its shapes are not these."""
        train = self.config.train
        n = max(1, (train.final_eval_tokens if last else train.eval_tokens) // self.config.sequence_length)
        batches = self.validation.batches(train.micro_batch, n, self.layout.data_rank, self.layout.data_size)
        with torch.compiler.set_stance("force_eager"):
            self.val = evaluate(self.state.model, self.prepared.tokenizer, self.watch.each(batches), self.layout.sum)
        fsdp.scatter(self.state.model)
        ranks = self._compare_ranks()
        if self.metrics and not self.metrics.has(self.state.steps_done, "val_loss"):
            self.metrics.add(step=self.state.steps_done, val_loss=self.val.loss, val_bpb=self.val.bits_per_byte,
                             **ranks)

    def _compare_ranks(self) -> dict[str, float]:
        """What the slowest rank costs. The steps of all take the same time, since each waits for the others: so this
        asks what a rank does alone, a matrix product and waiting for its data."""
        if self.mesh.world_size == 1 or not self.recent_waits:
            return {}
        step, peak = statistics.median(self.recent_seconds), machine.matmul_peak(
            self.device, getattr(torch, self.config.train.dtype))
        product, wait = slowest(self.mesh, 1 / peak, statistics.median(self.recent_waits))
        ratio, late = product.value / product.median, (wait.value - wait.median) / step
        if ratio > 1.2:
            self.report.warn(f"rank {product.rank} needs {ratio:.2f} times the median rank's time for a matrix product")
        if late > 0.2:
            self.report.warn(f"rank {wait.rank} waits {wait.value:.2f} s for its data in a step of {step:.2f} s, the "
                             f"median rank {wait.median:.2f} s")
        return {"ranks/slowest_product": round(ratio, 3), "ranks/slowest_product_rank": product.rank,
                "ranks/latest_data": round(late, 3), "ranks/latest_data_rank": wait.rank}

    def _write(self, tokens: int, seed: int) -> str:
        """A sample; all ranks write the same one, since none has the whole model: where their last digits differ, or
        one would stop and the others wait for it, rank 0's choice counts."""
        prompt, tokenizer = self.config.train.sample_prompt, self.prepared.tokenizer
        with torch.compiler.set_stance("force_eager"):
            pieces = stream_text(self.state.model, tokenizer, prompt, tokens, temperature=0.8, top_p=0.95, seed=seed,
                                 agree=self.mesh.same)
            text = "".join(self.watch.each(pieces))
        fsdp.scatter(self.state.model)
        return text

    def _sample(self) -> None:
        text = self._write(64, self.state.steps_done)
        if self.mesh.is_main:
            self.report.sample(self.state.steps_done, self.config.train.sample_prompt, text)

    def _progress(self, row: dict) -> None:
        steps, known = self.config.train.steps, len(self.recent_seconds) > 2  # the first may compile for a minute
        left = (steps - self.state.steps_done) * statistics.median(self.recent_seconds) if known else None
        flops = row["tokens_per_second"] * self.config.model.flops_per_token(self.config.sequence_length)
        mfu, bpb = flops / (self.peak * self.mesh.world_size), self.val and self.val.bits_per_byte
        self.report.progress(self.state.steps_done, steps, row, bpb, mfu, left)

    # --- Ending -------------------------------------------------------------------------------------------------------

    def _interrupted(self) -> RunResult:
        path = self.state.save()
        self.state.saver.wait()
        self.report.interrupted(self.stop.name or "another rank was told to stop", path, self.folder)
        return self._result(finished=False)

    def _finish(self) -> RunResult:
        self._evaluate(last=True)
        text = self.config.train.sample_prompt + self._write(256, 0) + "\n"
        if self.mesh.is_main:
            (self.folder / "sample.txt").write_text(text, encoding="utf-8")
            levels = {}  # what compressors make of the same text; of a part of it there is no file to compress
            if self.config.train.final_eval_tokens >= len(self.validation.windows) * self.config.sequence_length:
                levels = compressed_bits_per_byte(validation_text(self.validation, self.prepared.tokenizer))
            title = f"{self.config.name}: {self.config.model.n_parameters:,} parameters"
            plot_loss(self.metrics.rows, title, self.folder / "loss.png", levels)
            self.report.closing(self.config, self.folder, self.val.loss, self.val.bits_per_byte, levels,
                                self.state.guard.skipped)
        return self._result(finished=True)

    def _result(self, finished: bool) -> RunResult:
        losses = [row["loss"] for row in self.metrics.rows if row.get("loss") is not None] if self.metrics else []
        val = self.val if finished else None
        return RunResult(self.folder, self.state.steps_done, losses, val and val.loss, val and val.bits_per_byte,
                         finished)


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0
