"""The options of the commands that are not settings of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nanomai.config import ConfigError


@dataclass(frozen=True)
class Sample:
    """Let a trained model write. Text goes to the terminal as it is chosen."""

    run: str
    """A run folder, or a name in runs/."""
    prompt: str = ""
    """What the text begins with; longer than the model's context, its end is used."""
    max_tokens: int = 256
    """Tokens to write at most; the model may end before."""
    temperature: float = 0.8
    """0 always takes the likeliest token; above 1 is wilder."""
    top_k: int = 0
    """Draw from the k likeliest tokens only; 0 for all."""
    top_p: float = 0.95
    """Draw from the fewest tokens whose probabilities reach this sum."""
    min_p: float = 0.0
    """Drop tokens with less than this share of the likeliest one's probability."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that stand in the text already become less likely."""
    samples: int = 1
    """How many texts to write."""
    seed: int | None = None
    """Fix it to get the same text again."""
    device: str = "auto"
    """auto, cpu, cuda, mps."""

    def __post_init__(self):
        possible = {"max_tokens": self.max_tokens >= 0, "temperature": self.temperature >= 0, "top_k": self.top_k >= 0,
                    "top_p": 0 < self.top_p <= 1, "min_p": 0 <= self.min_p <= 1, "samples": self.samples > 0,
                    "repetition_penalty": self.repetition_penalty > 0}
        for name in (name for name in possible if not possible[name]):
            raise ConfigError(f"{name} {getattr(self, name)} is out of range; see `nanomai sample --help`")


@dataclass(frozen=True)
class Eval:
    """Measure a trained model: nats per token, and bits per byte beside what compressors reach on the same text."""

    run: str
    """A run folder, or a name in runs/."""
    text: Path | None = None
    """A UTF-8 text to measure on, in place of the run's validation split."""
    device: str = "auto"
    """auto, cpu, cuda, mps."""
    json: bool = False
    """Print one JSON object in place of the table."""


@dataclass(frozen=True)
class Import:
    """Make a run of a Hugging Face folder: config.json, safetensors, tokenizer.json."""

    dir: str
    """The folder to read."""
    out: str
    """The run folder to make."""


@dataclass(frozen=True)
class Export:
    """Make a Hugging Face folder of a run, for transformers and whatever loads its models."""

    run: str
    """A run folder, or a name in runs/."""
    out: str
    """The folder to make."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the numbers in the files; a run holds float32."""
    architecture: str | None = None
    """A class of transformers, such as MistralForCausalLM; None takes the first that is this model."""


@dataclass(frozen=True)
class Plan:
    """What a run takes before it is started: memory, traffic, time, money, and every assumption. CONFIG comes first.

    Settings of the configuration are flags here too, such as --parallel.tensor 8.
    """

    gpus: int = 1
    """How many."""
    gpu: str = "h100"
    """a100-40, a100, h100, h200, b200, mi300x, maia100, rtx4090, or cpu: this machine, measured now."""
    price: float | None = None
    """US dollars an hour for one; None takes the table's, which is an assumption."""
    search: bool = False
    """Try layouts, show the best few that fit, and say why the others do not."""
    largest: bool = False
    """Without CONFIG: the largest model that these GPUs can train, of scale_configs/ and of a plain shape."""
    json: bool = False
    """Print one JSON object, in bytes, seconds and FLOPs, in place of the page."""

    def __post_init__(self):
        if self.gpus < 1:
            raise ConfigError(f"gpus {self.gpus} must be at least 1")
        if self.price is not None and self.price < 0:
            raise ConfigError(f"price {self.price} must not be negative")


@dataclass(frozen=True)
class Simulate:
    """Run a training step on ranks that do not exist: memory by cause, FLOPs, and what is sent. CONFIG comes first.

    Settings of the configuration are flags here too, such as --parallel.tensor 8.
    """

    world_size: int = 1
    """Ranks to pretend."""
    layers: int | None = None
    """Simulate this depth and half of it, and continue to the whole: seconds in place of minutes."""
    micro_batches: int | None = None
    """Forward and backward passes before the optimizer's step, of --train.micro-batch sequences (0: one). None is one,
    or as many as fill a pipeline."""
    imbalance: float = 1.0
    """Tokens that this rank's experts get, in even shares."""
    stage: int | None = None
    """The only one of the pipeline to simulate; None takes one of each kind, and tells of the one that holds most."""
    json: bool = False
    """Print one JSON object, with all in bytes, in place of the tables."""

    def __post_init__(self):
        for name in ("world_size", "micro_batches", "imbalance"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{name} {value} must be at least 1")
