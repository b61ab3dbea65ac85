"""What a run is: one frozen tree of settings, and the closed forms that follow from it.

A `Config` is the whole truth of a run: it is saved in the run's folder and in every checkpoint, and can be loaded
alone. This file needs the standard library only, so a 500B configuration can be checked and counted on any machine
in milliseconds; `architecture.py` has the model's part of it, `config_file.py` reads one from YAML.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from nanomai.architecture import ConfigError, ModelConfig, positive

__all__ = ["Config", "ConfigError", "DataConfig", "ModelConfig", "OptimConfig", "TrainConfig"]


@dataclass(frozen=True)
class DataConfig:
    """The text: where it comes from, how it becomes tokens, and what is held out."""

    corpus: str = "stdlib"
    """`stdlib` (the running interpreter's standard library), a file or folder of text, JSONL or Parquet,
    `hf:NAME` (needs the `datasets` extra), or a mixture PATH:WEIGHT[:MAX_EPOCHS],PATH:WEIGHT[:MAX_EPOCHS],..."""
    tokenizer: str = "bpe"
    """`bpe` trains one of model.vocab_size tokens on the corpus; `gpt2`, `cl100k_base`, `o200k_base` by name;
    `bytes` for none; or a saved tokenizer's file."""
    text_field: str = "text"
    """The field of a JSONL or Parquet record that holds the text."""
    val_fraction: float = 0.12
    """The share of documents held out, chosen by a hash of each document's name."""
    folder: str = "data"
    """Where prepared shards are kept, each corpus under its own hash."""
    workers: int = 0
    """Processes that tokenize; 0 takes one for each core."""
    seed: int = 0
    """Of the order in which samples are drawn."""

    def __post_init__(self):
        if not 0 < self.val_fraction < 1:
            raise ConfigError(f"val_fraction {self.val_fraction} must lie between 0 and 1", "data.val_fraction")
        if self.workers < 0:
            raise ConfigError(f"workers {self.workers} must be 0 (one for each core) or more", "data.workers")


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its learning rate."""

    name: Literal["adamw", "muon"] = "adamw"
    """`muon` takes the hidden matrices (arXiv 2502.16982) and AdamW the rest."""
    lr: float | dict[int, float] = 1e-3
    """Peak learning rate under `schedule`; or knots {step: lr}, joined by straight lines, that replace it."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """Linear warm-up, then: cosine to the end; stable and a linear decay (arXiv 2404.06395); or constant."""
    warmup_steps: int = 0
    """Steps in which the learning rate rises from 0 to its peak."""
    decay_fraction: float = 0.2
    """The last share of the steps in which `wsd` decays."""
    min_lr_ratio: float = 0.1
    """The last learning rate as a share of the peak."""
    beta1: float = 0.9
    """AdamW's memory of the gradient."""
    beta2: float = 0.95
    """AdamW's memory of its square."""
    eps: float = 1e-8
    """AdamW's, added to the root of the squares."""
    weight_decay: float = 0.1
    """On matrices only: not on embeddings, norms or biases."""
    momentum: float = 0.95
    """Muon's memory of the gradient."""
    grad_clip: float = 1.0
    """Largest global norm of the gradient; 0 clips nothing."""

    def __post_init__(self):
        positive(self, "optim", "eps")
        for name in ("decay_fraction", "min_lr_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} {getattr(self, name)} must lie between 0 and 1", f"optim.{name}")
        for name in ("beta1", "beta2", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} {getattr(self, name)} must be at least 0 and below 1", f"optim.{name}")
        for name in ("warmup_steps", "weight_decay", "grad_clip"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} {getattr(self, name)} must not be negative", f"optim.{name}")
        _check_knots(self.lr, "optim.lr")


@dataclass(frozen=True)
class TrainConfig:
    """The run: how long, in what batches, on what, and what it writes on the way."""

    steps: int = 100
    """Optimizer steps of the whole run."""
    batch_tokens: int | dict[int, int] = 8192
    """Tokens in one optimizer step, over all ranks; or {step: tokens}, each from its step on."""
    sequence_length: int | None = None
    """Tokens in one training sample; None takes model.context_length."""
    micro_batch: int = 0
    """Sequences in one forward pass of one rank; 0 chooses (see `machine.py`)."""
    seed: int = 1337
    """Of the initial weights."""
    device: str = "auto"
    """auto, cpu, cuda, mps."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of activations and matrix products; the weights that the optimizer keeps are always float32."""
    float8: bool = False
    """Projections of blocks in float8, on GPUs that have it (compute capability 8.9); a CPU is slow at it."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of each block; auto where it pays (see `machine.py`)."""
    kernels: str = "auto"
    """Triton kernels in the model: auto, torch (none), triton (all), or names with commas (see `kernels.py`)."""
    threads: int = 0
    """CPU threads; 0 takes one for each core."""
    run_dir: str | None = None
    """None: runs/NAME, with -2, -3, ... if that exists."""
    resume: bool = False
    """Go on from the newest good checkpoint in run_dir."""
    init_from: str | None = None
    """A run whose weights this one begins with."""
    eval_every: int = 0
    """Steps between evaluations; 0 evaluates at the end only."""
    eval_tokens: int = 65_536
    """Validation tokens of an evaluation on the way, spread evenly over the text."""
    final_eval_tokens: int = 2**24
    """Validation tokens of the last evaluation; a text that is shorter is read whole."""
    sample_every: int = 0
    """Steps between short samples; 0 writes none on the way."""
    sample_prompt: str = ""
    """What the samples on the way and sample.txt begin with."""
    checkpoint_every: int = 0
    """Steps between checkpoints; 0 saves at the end only."""
    keep_checkpoints: int = 2
    """The newest so many stay; older ones are removed."""
    log_every: int = 1
    """Steps between rows of metrics.jsonl."""
    spike_deviations: float = 8.0
    """A step whose loss or gradient norm lies further than this many deviations above the recent ones is skipped."""
    max_skipped: int = 8
    """Skipped steps in a row that stop the run."""
    hang_timeout: float = 1800.0
    """Seconds without the end of a step, or of progress with a save, after which several ranks name the one that hangs,
    and exit; 0 waits on."""
    profile_steps: int = 0
    """Steps to trace with the profiler, from the fourth on; 0 traces none."""

    def __post_init__(self):
        positive(self, "train", "steps keep_checkpoints log_every eval_tokens final_eval_tokens spike_deviations "
                                 "max_skipped")
        if self.sequence_length is not None and self.sequence_length < 1:
            raise ConfigError(f"sequence_length {self.sequence_length} must be at least 1, or null",
                              "train.sequence_length")
        for name in ("eval_every", "sample_every", "checkpoint_every", "hang_timeout", "profile_steps", "micro_batch",
                     "threads"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} {getattr(self, name)} must not be negative", f"train.{name}")
        _check_knots(self.batch_tokens, "train.batch_tokens")


@dataclass(frozen=True)
class ParallelConfig:
    """How one model is laid over many ranks; the product of all factors but expert is their number (`parallel/`)."""

    replicas: int = 1
    """Copies of the model, between which gradients are summed; more than one with fsdp is HSDP."""
    fsdp: int | Literal["auto"] = "auto"
    """Ranks that share the parameters, gradients and optimizer of one copy; auto: all that the others leave."""
    tensor: int = 1
    """Ranks that share every matrix product, and the sequence between them; within a machine."""
    context: int = 1
    """Ranks that share every sequence."""
    context_by: Literal["keys", "heads"] = "keys"
    """What they exchange for attention: `keys` gathers all keys and values (Llama 3); `heads` changes parts of the
    sequence for parts of the heads and back (Ulysses)."""
    expert: int = 1
    """Of the fsdp ranks, those among which the experts are shared out whole."""
    pipeline: int = 1
    """Ranks that each have some of the layers, through which micro-batches go one after another."""
    stages_per_rank: int = 1
    """Of the pipeline: with more, each of fewer layers, ranks wait less and send more."""
    keep_gathered: bool = False
    """Keep a block's gathered parameters between forward and backward: less to send, more memory (ZeRO 2)."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations that the backward computes again: none, the cheap ones, or all inside a block."""

    def __post_init__(self):
        for name in ("replicas", "fsdp", "tensor", "context", "expert", "pipeline", "stages_per_rank"):
            if (value := getattr(self, name)) != "auto" and value < 1:
                raise ConfigError(f"{name} {value} must be at least 1", f"parallel.{name}")
        if self.stages_per_rank > 1 and self.pipeline == 1:
            raise ConfigError(f"stages_per_rank {self.stages_per_rank} needs a pipeline of more than one rank",
                              "parallel.stages_per_rank")


def factors(parallel: ParallelConfig, world_size: int) -> dict[str, int]:
    """Every factor with its number; fsdp `auto` is what the others leave of `world_size`."""
    given = {name: getattr(parallel, name) for name in ("pipeline", "replicas", "context", "tensor")}
    if parallel.fsdp != "auto":
        given["fsdp"] = parallel.fsdp
    product = math.prod(given.values())
    fits = world_size % product == 0 if parallel.fsdp == "auto" else world_size == product
    if not fits:
        _refuse(given, world_size, parallel.fsdp == "auto")
    found = {"fsdp": world_size // product} | given | {"expert": parallel.expert}
    if found["fsdp"] % parallel.expert:
        raise ConfigError(f"parallel expert {parallel.expert} divides no fsdp {found['fsdp']}, whose ranks hold the "
                          f"experts; the nearest that works is {_nearest(parallel.expert, found['fsdp'])}",
                          "parallel.expert")
    return found


def _refuse(given: dict[str, int], world_size: int, rest_is_free: bool) -> None:
    """Names the largest factor that another number could mend, and the nearest such number."""
    product = math.prod(given.values())
    words = " x ".join(f"{name} {number}" for name, number in given.items() if number > 1)
    trouble = f"parallel {words} {'divides no' if rest_is_free else 'is not'} {world_size} ranks"
    for name in sorted(given, key=given.get, reverse=True):
        others = product // given[name]
        if world_size % others == 0:
            room = world_size // others
            nearest = _nearest(given[name], room) if rest_is_free else room
            raise ConfigError(f"{trouble}; the nearest that works is {name} {nearest}", f"parallel.{name}")
    raise ConfigError(f"{trouble}; start a multiple of {product} ranks", f"parallel.{max(given, key=given.get)}")


def _nearest(number: int, whole: int) -> int:
    """The divisor of `whole` that is nearest to `number`."""
    return min((n for n in range(1, whole + 1) if whole % n == 0), key=lambda n: abs(n - number))


MICRO_BATCH_TOKENS = 16_384  # of one forward pass, where the machine chooses


@dataclass(frozen=True)
class Config:
    """A run. `name` is the name of the file it came from."""

    name: str = "run"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self):
        t = self.sequence_length
        if t > self.model.context_length and self.model.position == "learned":
            raise ConfigError(f"sequence_length {t} is longer than context_length {self.model.context_length}, "
                              "and learned positions end there", "train.sequence_length")
        p, twice = self.parallel, 2 if self.parallel.context_by == "keys" and self.parallel.context > 1 else 1
        for axis, pieces in (("context", p.context * twice), ("tensor", p.context * p.tensor)):
            if t % pieces:
                raise ConfigError(f"{axis} needs sequences of n times {pieces} tokens, not {t}", f"parallel.{axis}")
        for tokens in _values(self.train.batch_tokens):
            if tokens % t:
                near = max(1, round(tokens / t)) * t
                raise ConfigError(f"batch_tokens {tokens} is not a multiple of the sequence length {t}; "
                                  f"the nearest is {near}", "train.batch_tokens")

    @property
    def sequence_length(self) -> int:
        return self.train.sequence_length or self.model.context_length

    def micro_batch(self, ranks: int) -> int:
        """Sequences in one forward pass: a rank's share of the smallest batch, in as few equal parts as stay in bounds.

        Where no equal parts do, the last one of a step is shorter, but not in a pipeline. `ranks` are those that read
        different data.
        """
        t = self.sequence_length
        share = max(1, int(min(_values(self.train.batch_tokens))) // t // ranks)
        parts, p = math.ceil(share / max(1, MICRO_BATCH_TOKENS // t)), self.parallel
        if p.pipeline > 1:  # stages exchange equal ones, and as many at least as there are ranks
            multiple = p.pipeline if p.stages_per_rank > 1 else 1
            parts = next((n for n in range(max(parts, p.pipeline), share + 1) if share % n == n % multiple == 0), share)
        return self.train.micro_batch or math.ceil(share / parts)

    @property
    def batches(self) -> list[tuple[int, int]]:
        """(steps, tokens in each) of the parts of a run that have one size of batch."""
        batch, steps = self.train.batch_tokens, self.train.steps
        sizes = batch if isinstance(batch, dict) else {0: batch}
        starts = [min(step, steps) for step in sizes] + [steps]
        spans = zip(starts, starts[1:], sizes.values(), strict=False)
        return [(end - start, tokens) for start, end, tokens in spans if end > start]


def _values(setting: float | dict[int, float]) -> list[float]:
    return list(setting.values()) if isinstance(setting, dict) else [setting]


def _check_knots(setting: float | dict[int, float], path: str) -> None:
    name = path.split(".")[-1]
    if any(not 0 < value < math.inf for value in _values(setting)):
        raise ConfigError(f"{name} {setting} must be above 0 and finite", path)
    if isinstance(setting, dict) and (not setting or min(setting) != 0 or list(setting) != sorted(setting)):
        raise ConfigError(f"{name} {setting} must give its steps in rising order from 0", path)
