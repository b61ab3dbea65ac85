"""What each step from GPT-2 to MAI-1 does to the loss at equal compute: one difference of the configuration at a time.

    python benchmarks/families.py                # all rungs, five seeds each: about 25 minutes of one free core
    python benchmarks/families.py --rates        # other learning rates instead, at both ends of the ladder

Every rung differs from the one before it by the fields that stand in LADDER, and gets the same training FLOPs by the
closed form: where a token costs more, there are fewer steps. A seed draws the initial weights, which two rungs share
where their matrices have the same names and shapes, and the order of the text, which all rungs share; so differences
are taken seed by seed. The measure is bits per byte of one held-out text, which no vocabulary can flatter.

The text is the standard library of the running Python. `notebooks/05b_families` reads what this writes.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import asdict, replace
from pathlib import Path

import torch

import nanomai
from nanomai import optim
from nanomai.architecture import ModelConfig
from nanomai.config import DataConfig, OptimConfig
from nanomai.evaluation import evaluate_text, validation_text
from nanomai.machine import describe
from nanomai.model import build_model
from nanomai.moe import balance_experts
from nanomai.parallel.apply import clip_gradients
from nanomai.preparation import Prepared, prepare

RESULTS = Path(__file__).resolve().parent / "results"

SIZE = {"n_layers": 4, "d_model": 128, "n_heads": 4, "n_kv_heads": 4, "head_dim": 32, "d_ff": 512, "vocab_size": 512,
        "context_length": 128}
EXPERTS = {"n_experts": 8, "experts_per_token": 2, "d_expert": 168, "balance_loss": 0.01}
SHARED = {"n_experts": 8, "experts_per_token": 2, "d_expert": 112, "n_shared_experts": 1, "router": "sigmoid",
          "bias_speed": 0.01}
# (what changes, a family of scale_configs/ that has it so, the fields); MLPs keep their size within 2 %
LADDER = [
    ("GPT-2", "gpt2-124m", {}),
    ("parallel block", "phi-1.5", {"parallel_block": True}),
    ("RoPE, half of a head", "phi-1.5", {"position": "rope", "rotary_dim": 16}),
    ("RoPE, all of a head", "llama-2-7b", {"rotary_dim": None}),
    ("MLP after attention", "llama-2-7b", {"parallel_block": False}),
    ("RMSNorm", "llama-2-7b", {"norm": "rmsnorm"}),
    ("no biases", "llama-2-7b", {"biases": ()}),
    ("SwiGLU", "llama-2-7b", {"activation": "swiglu", "d_ff": 336}),
    ("untied head", "llama-2-7b", {"tied_embeddings": False}),
    ("grouped queries", "llama-2-70b", {"n_kv_heads": 2}),
    ("window of 32", "mistral-7b", {"sliding_window": 32}),
    ("fewer, wider heads", "mistral-nemo-12b", {"n_heads": 2, "n_kv_heads": 1, "head_dim": 64}),
    ("4 x the vocabulary", "mistral-nemo-12b", {"vocab_size": 2048}),
    ("no window", "mai-1-dense", {"sliding_window": None}),
    ("experts", "mixtral-8x7b", {"moe": EXPERTS}),
    ("a shared expert, a bias", "mai-1-moe", {"moe": SHARED}),
    ("latent attention", "deepseek-v3", {"n_kv_heads": 2, "mla": {"kv_rank": 64, "rope_dim": 16, "v_dim": 64}}),
]

BATCH = 1024  # tokens in a step
RECIPE = OptimConfig(name="adamw", lr=2e-3, schedule="wsd", warmup_steps=20, decay_fraction=0.5, min_lr_ratio=0.05,
                     weight_decay=0.1)
EVALUATED = 2**17  # bytes of the held-out text
RATE_SEED = 0


def rungs() -> list[tuple[str, str, dict, ModelConfig]]:
    """(name, family, changed fields, the whole configuration) of each."""
    config, found = replace(nanomai.load_config("gpt2-124m").model, **SIZE), []
    for name, family, changes in LADDER:
        parts = {key: replace(getattr(config, key), **value) for key, value in changes.items()
                 if isinstance(value, dict)}
        config = replace(config, **changes | parts)
        found.append((name, family, changes, config))
    return found


def steps_of(config: ModelConfig, flops: float) -> int:
    return round(flops / (config.flops_per_token() * BATCH))


def train(config: ModelConfig, prepared: Prepared, text: str, recipe: OptimConfig, flops: float, seed: int) -> float:
    """Bits per byte of `text` after training on so many FLOPs, each step as `nanomai.train` makes it."""
    model, steps = build_model(config, seed), steps_of(config, flops)
    model.compute_dtype = torch.bfloat16
    optimizers = optim.build_optimizers(model, recipe)
    counts = [BATCH // config.context_length] * steps
    for step, batch in enumerate(prepared.loader(config.context_length, seed, verify=False).batches(0, counts)):
        model(*batch, reduction="sum").backward()
        clip_gradients(model, recipe.grad_clip, batch.targets.numel())
        optim.set_learning_rate(optimizers, optim.learning_rate(recipe, step, steps))
        for optimizer in optimizers:
            optimizer.step()
        balance_experts(model)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
    return evaluate_text(model, prepared.tokenizer, text, batch_size=64).bits_per_byte


def corpus(arguments: argparse.Namespace) -> tuple[dict[int, Prepared], str]:
    """The text under each size of vocabulary, and the held-out text that all are measured on."""
    data = DataConfig(corpus=arguments.corpus, folder=arguments.data)
    prepared = {size: prepare(data, size, show=False) for size in {config.vocab_size for *_, config in rungs()}}
    some = prepared[SIZE["vocab_size"]]
    text = validation_text(some.validation(SIZE["context_length"]), some.tokenizer)
    return prepared, text[:EVALUATED].decode("utf-8", errors="ignore")


def sweep(arguments: argparse.Namespace, result: dict) -> None:
    """Every rung with every seed, all rungs of a seed in turn."""
    prepared, text = corpus(arguments)
    result["seeds"] = arguments.seeds
    result["rungs"] = [{"name": name, "family": family, "changes": changes, "parameters": config.n_parameters,
                        "active": config.n_active_parameters, "flops": config.flops_per_token(),
                        "kv_bytes": config.kv_cache_bytes_per_token(), "steps": steps_of(config, arguments.flops),
                        "bits_per_byte": []} for name, family, changes, config in rungs()]
    for seed in arguments.seeds:
        for row, (name, *_, config) in zip(result["rungs"], rungs(), strict=True):
            row["bits_per_byte"].append(
                round(train(config, prepared[config.vocab_size], text, RECIPE, arguments.flops, seed), 5))
            print(f"seed {seed}  {name:24} {row['bits_per_byte'][-1]:.4f}", flush=True)


def rates(arguments: argparse.Namespace, result: dict) -> None:
    """The first and the last rung under the recipe's learning rate, halved and doubled twice."""
    prepared, text = corpus(arguments)
    for name, *_, config in (rungs()[0], rungs()[-1]):
        for factor in (0.25, 0.5, 1, 2, 4):
            recipe = replace(RECIPE, lr=RECIPE.lr * factor)
            found = train(config, prepared[config.vocab_size], text, recipe, arguments.flops, RATE_SEED)
            result.setdefault("rates", {}).setdefault(name, {})[f"{recipe.lr:g}"] = round(found, 5)
            print(f"{name:24} {recipe.lr:g} {found:.4f}", flush=True)


HEADER = """\
# What each step from GPT-2 to MAI-1 does to the loss at equal compute

`python benchmarks/families.py --seeds {chosen}`. Each run gets {training_flops:.3g} training FLOPs by the closed form,
in steps of {batch_tokens:,} tokens; AdamW, peak rate {lr:g}, bfloat16. Bits per byte of the first {evaluated:,}
held-out bytes of the standard library. A difference is to the rung above, seed by seed; below 0 is better. It is
separated from noise if it has one sign in all seeds and its mean is larger than its range, greatest less least.

{machine}

| rung | as in | parameters | MFLOP a token | KV bytes | steps | bits a byte | mean difference | range | separated |
|---|---|---|---|---|---|---|---|---|---|
"""


def separated(gaps: list[float]) -> bool:
    """Whether the seeds agree, and by more than they differ."""
    return min(gaps) * max(gaps) > 0 and abs(statistics.mean(gaps)) > max(gaps) - min(gaps)


def table(result: dict) -> str:
    """The results as Markdown."""
    before, lines = None, []
    for row in result["rungs"]:
        difference = "| | | |"
        if before:
            gaps = [now - then for now, then in zip(row["bits_per_byte"], before, strict=True)]
            difference = (f"| {statistics.mean(gaps):+.3f} | {min(gaps):+.3f} to {max(gaps):+.3f} "
                          f"| {'yes' if separated(gaps) else 'no'} |")
        before = row["bits_per_byte"]
        lines.append(f"| {row['name']} | {row['family']} | {row['parameters']:,} | {row['flops'] / 1e6:.2f} "
                     f"| {row['kv_bytes']:,} | {row['steps']} | {statistics.mean(before):.3f} {difference}")
    if "rates" in result:
        names, found = list(result["rates"]), list(result["rates"].values())
        lines += ["", f"Bits per byte under other peak rates (`--rates`), at the ends of the ladder, seed {RATE_SEED}:",
                  "", f"| rate | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|",
                  *(f"| {rate} | " + " | ".join(f"{one[rate]:.3f}" for one in found) + " |" for rate in found[0])]
    chosen = " ".join(map(str, result["seeds"]))
    return HEADER.format(lr=RECIPE.lr, evaluated=EVALUATED, chosen=chosen, **result) + "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--flops", type=float, default=1.5e12, help="of each run's training")
    parser.add_argument("--corpus", default="stdlib")
    parser.add_argument("--data", default="data", help="where prepared text is kept")
    parser.add_argument("--out", type=Path, default=RESULTS, help="families.json and families.md go here")
    parser.add_argument("--rates", action="store_true", help="other learning rates; keeps the rungs' results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    file = arguments.out / "families.json"
    result = json.loads(file.read_text(encoding="utf-8")) if arguments.rates and file.exists() else {}
    result |= {"machine": f"{describe(torch.device('cpu'))}; one thread", "training_flops": arguments.flops,
               "batch_tokens": BATCH, "size": SIZE, "recipe": asdict(RECIPE)}
    (rates if arguments.rates else sweep)(arguments, result)
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if "rungs" in result:
        (arguments.out / "families.md").write_text(table(result), encoding="utf-8")


if __name__ == "__main__":
    main()
