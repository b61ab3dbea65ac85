"""What a rung learns under different settings: one short run for each line of overrides, and a table.

    python benchmarks/tune.py nano "" "--optim.lr 5e-3" "--model.d_model 192 --model.n_heads 3 --train.steps 400"

Every run reads the same corpus and is scored on the same validation text, in bits per byte, which no choice of
vocabulary can flatter. Settings under test keep their own number of steps: compare runs that take the same time.
"""

import argparse
import shlex
import tempfile

import torch

import nanomai
from nanomai.machine import describe


def overrides(line: str) -> dict[str, str]:
    words = shlex.split(line)
    return {name.removeprefix("--"): value for name, value in zip(words[::2], words[1::2], strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="+", help="flags of `nanomai train` for one run each, as one word")
    arguments = parser.parse_args()
    print(f"{describe(torch.device('cpu'))}\n")
    print("| settings | parameters | tokens | median tokens/s | bits per byte |\n|---|---|---|---|---|", flush=True)
    for line in arguments.overrides:
        with tempfile.TemporaryDirectory() as folder:
            config = nanomai.load_config(arguments.config, **overrides(line) | {"train.run_dir": f"{folder}/run"})
            result = nanomai.train(config, show=False)
            speeds = sorted(row["tokens_per_second"] for row in nanomai.read_metrics(result.run_dir / "metrics.jsonl")
                            if "loss" in row)
            tokens = config.train.batch_tokens * result.steps
            print(f"| `{line or 'as it stands'}` | {config.model.n_parameters:,} | {tokens:,} | "
                  f"{speeds[len(speeds) // 2]:,.0f} | {result.val_bpb:.4f} |", flush=True)


if __name__ == "__main__":
    main()
