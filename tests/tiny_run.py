"""A run that takes seconds, for every test of training: a small corpus, a model of two layers, and the command line."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

from nanomai.config_file import load_config

ROOT = Path(__file__).resolve().parent.parent

TINY = """\
model: {n_layers: 2, d_model: 32, n_heads: 2, n_kv_heads: 1, head_dim: 16, d_ff: 64, vocab_size: 257,
        context_length: 32}
data: {corpus: text, tokenizer: bytes}
optim: {lr: 1e-2, warmup_steps: 2}
train: {steps: 12, batch_tokens: 256, threads: 1, device: cpu, dtype: float32, compile: "off"}
"""


def write_tiny(folder, documents=24):
    """`tiny.yaml` and the folder `text` that it trains on."""
    words = "the cat sat on a mat and ran to its home big 12 def f(x): return".split()
    draw = random.Random(0)
    (folder / "text").mkdir()
    for i in range(documents):
        (folder / "text" / f"{i}.txt").write_text(" ".join(draw.choices(words, k=150)))
    (folder / "tiny.yaml").write_text(TINY)


def tiny(**overrides):
    """The configuration, with sections joined by two underscores: tiny(train__steps=3)."""
    return load_config("tiny.yaml", **{name.replace("__", "."): value for name, value in overrides.items()})


def environment(**more):
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def nanomai(*arguments, cwd, **more):
    """The command line in its own process, ended."""
    command = [sys.executable, "-m", "nanomai", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment(**more), capture_output=True, text=True, timeout=300)


def rows(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def curve(folder):
    """Everything of the training rows that must be the same in every run; no step stands in it twice."""
    found = [{key: value for key, value in row.items() if key != "tokens_per_second"}
             for row in rows(folder) if "lr" in row]
    steps = [row["step"] for row in found]
    assert steps == sorted(set(steps)), steps
    evaluated = [row["step"] for row in rows(folder) if "val_loss" in row]
    assert evaluated == sorted(set(evaluated)), evaluated
    return found


def weights(folder):
    """The bytes of every weight of a run's newest checkpoint."""
    from nanomai.runs import load_run

    return {name: weight.detach().numpy().tobytes() for name, weight in load_run(folder).model.named_parameters()}
