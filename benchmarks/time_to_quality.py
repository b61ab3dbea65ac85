"""CPU-seconds to a quality: a model of characters as small as nanoGPT's CPU example, on the same text and split.

    python benchmarks/time_to_quality.py --text shakespeare.txt                     # ours
    python benchmarks/time_to_quality.py --text shakespeare.txt --peer ../nanoGPT   # and nanoGPT's README run

Ours is a `nanomai train` of one byte a token with the last tenth of the text held out, which is nanoGPT's split. The
peer runs the command of its README for CPUs; its checkout must hold the prepared `data/shakespeare_char`. CPU-seconds
count everything: imports, preparation, compilation, evaluation. Losses are nats per character.
"""

from __future__ import annotations

import argparse
import re
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

OURS = """--data.tokenizer bytes --data.val_fraction 0.1 --model.vocab_size 257 --model.n_kv_heads 2 --model.d_ff 352
--model.context_length 128 --train.batch_tokens 4096 --train.steps 240 --train.sample_every 0 --train.eval_every 0
--train.checkpoint_every 0 --train.sample_prompt ROMEO: --train.compile off --train.threads 1""".split()
PEER = """train.py config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=100
--block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000
--dropout=0.0""".split()


def run(command: list[str], folder: str) -> tuple[str, float]:
    """Output and CPU-seconds of a command, its children included."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    output = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if output.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{output.stderr}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return output.stdout, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--peer", type=Path, help="a checkout of nanoGPT to measure beside")
    parser.add_argument("flags", nargs="*", help="further flags of `nanomai train`, after --")
    arguments = parser.parse_args()
    print("| run | validation loss | CPU-seconds |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--data.corpus", str(arguments.text.resolve()), *OURS, *arguments.flags]
        text, seconds = run([sys.executable, "-m", "nanomai", "train", "nano", *flags], folder)
        print(f"| nanomai | {re.search(r'validation: ([0-9.]+)', text)[1]} | {seconds:.0f} |", flush=True)
    if arguments.peer:
        text, seconds = run([sys.executable, *PEER], str(arguments.peer))
        print(f"| nanoGPT, its README's run for CPUs | {re.findall(r'val loss ([0-9.]+)', text)[-1]} | {seconds:.0f} |")


if __name__ == "__main__":
    main()
