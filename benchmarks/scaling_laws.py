"""How the loss falls with parameters and tokens, at sizes that a laptop trains.

    python benchmarks/scaling_laws.py                # everything, three seeds: about ten minutes of one free core
    python benchmarks/scaling_laws.py --only rates   # one part of it anew: iso_flop, held_out, rates

`iso_flop`: under each budget of training FLOPs, models from small to large, each with the tokens that the budget pays
for. L = E + A / N^a + B / D^b is fitted to all of them. `held_out`: runs of four times the largest budget, whose
predicted losses are written down before they are trained. `rates`: whether the learning rate suits small and large.

A seed draws the initial weights and the order of the text, which all runs of a seed share. The text is the standard
library of the running Python, by bytes as tokens; no run reads any of it twice. `notebooks/08_scaling_laws` reads what
this writes.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from dataclasses import asdict, replace
from pathlib import Path

import torch

from nanomai import optim
from nanomai.architecture import ModelConfig
from nanomai.config import DataConfig, OptimConfig
from nanomai.evaluation import evaluate
from nanomai.machine import describe
from nanomai.model import build_model
from nanomai.parallel.apply import clip_gradients
from nanomai.preparation import Prepared, prepare

RESULTS = Path(__file__).resolve().parent / "results"
ROWS, LENGTH = 8, 64  # of a batch
BATCH = ROWS * LENGTH
EVALUATED = 512  # held-out windows

MUON = OptimConfig(name="muon", lr=0.02, schedule="wsd", warmup_steps=10, decay_fraction=0.5, min_lr_ratio=0.05)
WIDTHS = {2e10: [8, 16, 24, 32, 48], 6e10: [16, 24, 32, 48, 64], 1.8e11: [24, 32, 48, 64, 96]}
HELD_OUT = {96: 448_000, 48: 1_540_000}  # width: tokens; four times the largest budget
RATES = (16, 2e10, (0.005, 0.01, 0.02, 0.04)), (64, 6e10, (0.005, 0.01, 0.02, 0.04))  # width, budget, rates



def model_of(width: int) -> ModelConfig:
    """Two layers with heads of 8: only the width grows."""
    return ModelConfig(n_layers=2, d_model=width, n_heads=width // 8, n_kv_heads=width // 8, head_dim=8,
                       d_ff=3 * width, vocab_size=257, context_length=LENGTH)


def train(config: ModelConfig, prepared: Prepared, recipe: OptimConfig, steps: int, seed: int) -> float:
    """Held-out loss in nats a byte, each step made as `nanomai.train` makes it."""
    model = build_model(config, seed)
    optimizers = optim.build_optimizers(model, recipe)
    for step, batch in enumerate(prepared.loader(LENGTH, seed, verify=False).batches(0, [ROWS] * steps)):
        model(*batch, reduction="sum").backward()
        clip_gradients(model, recipe.grad_clip, batch.targets.numel())
        optim.set_learning_rate(optimizers, optim.learning_rate(recipe, step, steps))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return evaluate(model, prepared.tokenizer, prepared.validation(LENGTH, verify=False).batches(64, EVALUATED)).loss


def described(width: int, steps: int) -> dict:
    """What a run costs."""
    config = model_of(width)
    embedding = config.vocab_size * width
    return {"width": width, "parameters": config.n_parameters, "without_embedding": config.n_parameters - embedding,
            "flops_per_token": config.flops_per_token(), "steps": steps, "tokens": steps * BATCH}


# --- The fit ----------------------------------------------------------------------------------------------------------


def fit(runs: list[dict], losses: list[float]) -> dict[str, float]:
    """E, A, B, a, b of least relative squares. For given a and b the rest is linear; those two are searched."""
    n, d = (torch.tensor([run[key] for run in runs], dtype=torch.float64) for key in ("parameters", "tokens"))
    y = torch.tensor(losses, dtype=torch.float64)

    def linear(a: float, b: float) -> tuple[float, torch.Tensor]:
        x = torch.stack([torch.ones_like(y), n**-a, d**-b], dim=1) / y[:, None]
        found = torch.linalg.lstsq(x, torch.ones_like(y)[:, None], driver="gelsd").solution[:, 0]
        error = (x @ found - 1).square().mean().item()
        return (error if found.min() >= 0 else math.inf), found

    a = b = 0.6
    step = 0.5
    while step > 1e-4:
        tried = [(a + i * step / 5, b + j * step / 5) for i in range(-5, 6) for j in range(-5, 6)]
        a, b = min((pair for pair in tried if min(pair) > 0.02), key=lambda pair: linear(*pair)[0])
        step *= 0.6
    error, (e, big_a, big_b) = linear(a, b)
    return {"E": float(e), "A": float(big_a), "B": float(big_b), "a": a, "b": b, "rms": math.sqrt(error)}


def predict(law: dict[str, float], n: float, d: float) -> float:
    return law["E"] + law["A"] / n ** law["a"] + law["B"] / d ** law["b"]


# --- The parts --------------------------------------------------------------------------------------------------------


def iso_flop(result: dict, prepared: Prepared, seeds: list[int]) -> None:
    runs = []
    for budget, widths in WIDTHS.items():
        for width in widths:
            steps = round(budget / (model_of(width).flops_per_token() * BATCH))
            row = described(width, steps) | {"budget": budget, "loss": []}
            for seed in seeds:
                row["loss"].append(round(train(model_of(width), prepared, MUON, steps, seed), 5))
            runs.append(row)
            print(f"{budget:.1e}  width {width:3}  {steps:5} steps  {row['loss']}", flush=True)
    result["runs"] = runs
    result["fit"] = fit(runs, [statistics.mean(run["loss"]) for run in runs])
    result["fits"] = [fit(runs, [run["loss"][i] for run in runs]) for i in range(len(seeds))]
    print(result["fit"], flush=True)


def held_out(result: dict, prepared: Prepared, seeds: list[int], out: Path) -> None:
    result["held_out"] = [described(width, round(tokens / BATCH)) for width, tokens in HELD_OUT.items()]
    for row in result["held_out"]:
        row["predicted"] = predict(result["fit"], row["parameters"], row["tokens"])
    write(result, out)  # before they are trained
    for row in result["held_out"]:
        row["loss"] = [round(train(model_of(row["width"]), prepared, MUON, row["steps"], seed), 5) for seed in seeds]
        print(f"held out: predicted {row['predicted']:.4f}, measured {row['loss']}", flush=True)


def rates(result: dict, prepared: Prepared) -> None:
    result["rates"] = {}
    for width, budget, tried in RATES:
        steps = round(budget / (model_of(width).flops_per_token() * BATCH))
        for lr in tried:
            found = train(model_of(width), prepared, replace(MUON, lr=lr), steps, 0)
            result["rates"].setdefault(str(width), {})[f"{lr:g}"] = round(found, 5)
        print(width, result["rates"][str(width)], flush=True)


def write(result: dict, out: Path) -> None:
    (out / "scaling_laws.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", choices=["iso_flop", "held_out", "rates"], help="keeps the other parts")
    parser.add_argument("--corpus", default="stdlib")
    parser.add_argument("--data", default="data", help="where prepared text is kept")
    parser.add_argument("--out", type=Path, default=RESULTS, help="scaling_laws.json goes here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    file = arguments.out / "scaling_laws.json"
    result = json.loads(file.read_text(encoding="utf-8")) if arguments.only and file.exists() else {}
    result |= {"machine": f"{describe(torch.device('cpu'))}; one thread", "seeds": arguments.seeds,
               "batch_tokens": BATCH, "recipe": asdict(MUON)}
    data = DataConfig(corpus=arguments.corpus, tokenizer="bytes", folder=arguments.data)
    prepared = prepare(data, 257, show=False)
    parts = {"iso_flop": lambda: iso_flop(result, prepared, arguments.seeds),
             "held_out": lambda: held_out(result, prepared, arguments.seeds, arguments.out),
             "rates": lambda: rates(result, prepared)}
    for name, part in parts.items():
        if arguments.only in (None, name):
            part()
            write(result, arguments.out)


if __name__ == "__main__":
    main()
