"""What a run is: one frozen tree of settings, and the closed forms that follow from it.

A `Config` is the whole truth of a run: it is saved in the run's folder and in every checkpoint, and can be loaded
alone. This file needs the standard library only, so a 500B configuration can be checked and counted on any machine
in milliseconds; `config_file.py` reads one from YAML.

Letters used here and in every file: B batch, T sequence length, D `d_model`, H `n_heads`, G `n_kv_heads`,
K `head_dim`, F `d_ff`, L `n_layers`, V `vocab_size`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal


class ConfigError(ValueError):
    """A setting that cannot work: one line that names the file, the line, the field, and what to do."""

    def __init__(self, message: str, field: str | None = None):
        super().__init__(message)
        self.field = field  # dotted name, so that the loader can find its line in the file


@dataclass(frozen=True)
class ModelConfig:
    """The architecture. Families differ by these values alone; `model.py` has no branch on a family's name."""

    n_layers: int = 4
    """L: blocks of attention and MLP."""
    d_model: int = 128
    """D: numbers that stand for one token between the blocks."""
    n_heads: int = 2
    """H: query heads."""
    n_kv_heads: int = 1
    """Fewer than n_heads is grouped-query attention (Ainslie et al. 2023, arXiv 2305.13245)."""
    head_dim: int = 64
    """K: numbers in a query, key or value of one head."""
    d_ff: int = 384
    """F: width of the MLP inside a block."""
    vocab_size: int = 512
    """V: tokens that the embedding and the output know; at least the tokenizer's."""
    context_length: int = 256
    """The longest sequence the model is built for, in tokens."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """Before attention, before the MLP and at the end."""
    norm_eps: float = 1e-5
    """Added to the mean square, or variance, under the root."""
    activation: Literal["swiglu", "gelu", "relu2"] = "swiglu"
    """Of the MLP; `swiglu` has a third matrix, the gate."""
    position: Literal["rope", "learned"] = "rope"
    """`rope` turns queries and keys; `learned` adds a table of context_length vectors."""
    rope_theta: float = 10_000.0
    """Base of the rotation's wavelengths; larger for longer contexts."""
    sliding_window: int | None = None
    """Position i sees position j only if 0 <= i - j < sliding_window. None: all of the past."""
    biases: tuple[Literal["qkv", "out", "mlp", "head"], ...] = ()
    """Which projections carry a bias. LayerNorm always has one, RMSNorm never."""
    tied_embeddings: bool = True
    """The output head is the embedding, transposed."""
    init_std: float = 0.02
    """Of the normal distribution that initial weights are drawn from."""

    def __post_init__(self):
        _positive(self, "model", "n_layers d_model n_heads n_kv_heads head_dim d_ff vocab_size context_length norm_eps "
                                 "init_std rope_theta")
        if self.n_heads % self.n_kv_heads:
            raise ConfigError(f"n_heads {self.n_heads} is not divisible by n_kv_heads {self.n_kv_heads}; "
                              f"every key-value head must serve the same number of query heads", "model.n_kv_heads")
        if self.position == "rope" and self.head_dim % 2:
            raise ConfigError(f"head_dim {self.head_dim} is odd; rotary positions turn pairs of numbers",
                              "model.head_dim")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ConfigError(f"sliding_window {self.sliding_window} must be at least 1, or null",
                              "model.sliding_window")
        if self.tied_embeddings and "head" in self.biases:
            raise ConfigError("a head bias needs tied_embeddings: false", "model.biases")

    @property
    def parameters_per_layer(self) -> int:
        d, norm = self.d_model, self.d_model * (2 if self.norm == "layernorm" else 1)
        q, kv = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        attention = d * q + 2 * d * kv + q * d + (q + 2 * kv) * ("qkv" in self.biases) + d * ("out" in self.biases)
        n_in = 2 if self.activation == "swiglu" else 1  # gate and up, or up alone
        mlp = (n_in + 1) * d * self.d_ff + (n_in * self.d_ff + d) * ("mlp" in self.biases)
        return attention + mlp + 2 * norm

    @property
    def n_parameters(self) -> int:
        """Every trainable number, exactly; a tied embedding is counted once."""
        d, v = self.d_model, self.vocab_size
        head = 0 if self.tied_embeddings else v * d + v * ("head" in self.biases)
        positions = self.context_length * d if self.position == "learned" else 0
        final_norm = d * (2 if self.norm == "layernorm" else 1)
        return v * d + head + positions + final_norm + self.n_layers * self.parameters_per_layer

    def flops_per_token(self, sequence_length: int | None = None) -> int:
        """FLOPs of one training token, forward and backward: 6 for each weight it meets, plus causal attention.

        The embedding look-up costs nothing; the output head costs 6 V D even when it is tied. Attention over a
        causal sequence meets (T + 1) / 2 keys on average, taken as T / 2: 6 L T H K a token (12 when the masked
        half is counted too, as some publications do). Norms, softmax and the optimizer are left out.
        """
        t = sequence_length or self.context_length
        window = min(t, self.sliding_window or t)
        seen = 2 * window - window * window // t  # twice the mean number of keys: t without a window
        matmul = self.n_layers * self.parameters_per_layer + self.vocab_size * self.d_model
        return 6 * matmul + 6 * self.n_layers * seen * self.n_heads * self.head_dim

    def kv_cache_bytes_per_token(self, bytes_per_value: int = 2) -> int:
        """Bytes that one more token adds to the key-value cache, all layers together."""
        return 2 * self.n_layers * self.n_kv_heads * self.head_dim * bytes_per_value


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
        _positive(self, "optim", "eps")
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
    profile_steps: int = 0
    """Steps to trace with the profiler, from the fourth on; 0 traces none."""

    def __post_init__(self):
        _positive(self, "train", "steps keep_checkpoints log_every eval_tokens final_eval_tokens spike_deviations "
                                 "max_skipped")
        if self.sequence_length is not None and self.sequence_length < 1:
            raise ConfigError(f"sequence_length {self.sequence_length} must be at least 1, or null",
                              "train.sequence_length")
        for name in ("eval_every", "sample_every", "checkpoint_every", "profile_steps", "micro_batch", "threads"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} {getattr(self, name)} must not be negative", f"train.{name}")
        _check_knots(self.batch_tokens, "train.batch_tokens")


@dataclass(frozen=True)
class Config:
    """A run. `name` is the name of the file it came from."""

    name: str = "run"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self):
        t = self.sequence_length
        if t > self.model.context_length and self.model.position == "learned":
            raise ConfigError(f"sequence_length {t} is longer than context_length {self.model.context_length}, "
                              "and learned positions end there", "train.sequence_length")
        for tokens in _values(self.train.batch_tokens):
            if tokens % t:
                near = max(1, round(tokens / t)) * t
                raise ConfigError(f"batch_tokens {tokens} is not a multiple of the sequence length {t}; "
                                  f"the nearest is {near}", "train.batch_tokens")

    @property
    def sequence_length(self) -> int:
        return self.train.sequence_length or self.model.context_length


def _positive(section, path: str, names: str) -> None:
    for name in names.split():
        if not 0 < getattr(section, name) < math.inf:
            raise ConfigError(f"{name} {getattr(section, name)} must be above 0 and finite", f"{path}.{name}")


def _values(setting: float | dict[int, float]) -> list[float]:
    return list(setting.values()) if isinstance(setting, dict) else [setting]


def _check_knots(setting: float | dict[int, float], path: str) -> None:
    name = path.split(".")[-1]
    if any(not 0 < value < math.inf for value in _values(setting)):
        raise ConfigError(f"{name} {setting} must be above 0 and finite", path)
    if isinstance(setting, dict) and (not setting or min(setting) != 0 or list(setting) != sorted(setting)):
        raise ConfigError(f"{name} {setting} must give its steps in rising order from 0", path)
