"""Writes scale_configs/README.md, the table of every model that a file describes: `python tools/catalogue.py`.

All of it follows from the YAML files; nothing is built, so 1.75 trillion parameters take no longer than one million.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a checkout without installation

from nanomai.config import Config  # noqa: E402
from nanomai.config_file import CONFIG_FOLDER, load_config  # noqa: E402

PATH = ROOT / "scale_configs" / "README.md"
HEAD = """\
# The models

One complete, commented YAML for each, from the smallest to the largest; `nanomai train NAME` trains it. A file whose
name goes on (`-exercises`, `-phase-2`, `-128k`, ...) is another phase of the same model and says after which run.
`python tools/catalogue.py` writes this page from the files; a test compares.

- **parameters**: every trainable number; *active*: those that one token meets, embeddings included.
- **tokens**: what the recipe trains on, and the *length* of its sequences.
- **FLOPs/token**: of training, forward and backward, at that length. Attention is causal; a block-sparse layer is
  counted as if dense.
- **weights**, **KV cache**: in bfloat16; the cache of one sequence, for one token, 8,192 (8k) and the whole context. A
  sliding window could forget what lies behind it; `sampling.py` does not, and so neither does this table.

1 GiB is 2^30 bytes.

| model | parameters | active | tokens | length | FLOPs/token | weights | KV cache | at 8k | context | at all of it |
|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|
"""


def tokens(config: Config) -> int:
    """What the recipe trains on; the batch may change on the way."""
    steps, batch = config.train.steps, config.train.batch_tokens
    batches = batch if isinstance(batch, dict) else {0: batch}
    starts = [min(step, steps) for step in batches] + [steps]
    return sum((end - start) * n for start, end, n in zip(starts, starts[1:], batches.values(), strict=False))


def short(number: float, units: str, base: int = 1000) -> str:
    """Three digits and a unit: short(12288, " ,K,M") is 12.3 K."""
    power = 0
    while round(number / base**power) >= base:
        power += 1
    digits = number / base**power
    return f"{digits:.0f} {units.split(',')[power]}" if digits >= 100 else f"{digits:.3g} {units.split(',')[power]}"


def size(number: int) -> str:
    return short(number, "B,KiB,MiB,GiB,TiB", 1024)


def row(config: Config) -> str:
    """One line of the table."""
    model, length = config.model, config.sequence_length
    cached, context = model.kv_cache_bytes_per_token(), model.context_length
    cells = [f"[{config.name}]({config.name}.yaml)", f"{model.n_parameters:,}",
             f"{model.n_active_parameters:,}" if model.moe.n_experts else "all",
             short(tokens(config), ",K,M,B,T"), f"{length:,}", short(model.flops_per_token(length), ",K,M,G,T"),
             size(2 * model.n_parameters), size(cached), size(8192 * cached) if context >= 8192 else "-",
             f"{context:,}", size(context * cached)]
    return f"| {' | '.join(cells)} |\n"


def catalogue() -> str:
    """The whole page."""
    configs = [load_config(path) for path in CONFIG_FOLDER.glob("*.yaml")]
    configs.sort(key=lambda c: (c.model.n_parameters, c.model.context_length, c.name))
    return HEAD + "".join(map(row, configs))


if __name__ == "__main__":
    PATH.write_bytes(catalogue().encode())  # bytes: no system may turn the line ends into its own
