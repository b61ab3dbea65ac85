"""Do others measure in a run what we measure? It is exported, and lm-evaluation-harness asks it about held-out text.

    make eval-harness RUN=runs/nano    # on the CPU, without a network

1. `nanomai export` writes the run as `transformers` loads it; both must write the same greedy tokens.
2. `lm_eval`, from a virtual environment of its own, runs the tasks of `eval_tasks/` on the data of `eval_data.py`;
   what it read and wrote stays in build/eval-harness/.
3. Its bits per byte must be ours, twice. In the windows that the harness cuts they must be equal but for rounding:
   the weights, the tokens and the bytes are the same. Those of `nanomai eval` are within a hundredth. It runs through
   all documents in one row of windows, and pays for the token that ends a document; the harness begins a window with
   each document and moves its last one back until it is full, so that a token has more text before it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch loads: threads that wait must not spin
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.eval_data import held_out_documents, next_line_questions, write_lines
from nanomai import cli
from nanomai.data import IGNORE, Batch
from nanomai.evaluation import evaluate
from nanomai.preparation import prepare
from nanomai.runs import LoadedRun, load_run
from nanomai.sampling import generate
from nanomai.tokenizer import Tokenizer

WORK = Path("build/eval-harness")
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
PROMPTS, BATCH = 8, 16
SAME_WINDOWS, OTHER_WINDOWS = 1e-5, 1e-2
"""By how much two figures may differ, as a part of ours: sums of float32 in another order, and other windows."""


def nanomai(*arguments: str | Path) -> str:
    """What a command of ours prints. It has said in one line why it failed, if it did."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        if status := cli.main([*map(str, arguments)]):
            sys.exit(status)
    return out.getvalue()


def harness(python: Path, tasks: list[str]) -> dict[str, dict]:
    """Runs lm_eval on the exported model, prints its table, and returns its results."""
    options = (f"--model hf --model_args pretrained=model,dtype=float32 --tasks {','.join(tasks)} --device cpu "
               f"--batch_size {BATCH} --output_path results --include_path").split()
    command, log = [python.absolute(), "-m", "lm_eval", *options, ROOT / "benchmarks/eval_tasks"], WORK / "lm_eval.log"
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run(command, cwd=WORK, stdout=subprocess.PIPE, stderr=file, text=True,
                              env=os.environ | OFFLINE | {"HF_HOME": str(WORK.absolute() / "cache")})
    found = sorted(WORK.glob("results/**/results_*.json"))
    if done.returncode or not found:
        last = [line for line in log.read_text(encoding="utf-8").splitlines() if line.strip()][-1:]
        sys.exit(f"eval-harness: lm_eval failed with status {done.returncode}: {''.join(last)} (all of it: {log})")
    print(*(line for line in done.stdout.splitlines() if line.startswith("|")), sep="\n")
    return json.loads(found[-1].read_text(encoding="utf-8"))["results"]


def greedy_difference(run: LoadedRun, folder: Path, prompts: list[str]) -> str | None:
    """The first prompt after which `transformers` and we write other tokens, or read other ones, if there is one."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    theirs, reader = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    theirs.generation_config.eos_token_id = None  # neither of the two stops at the end of a text
    count = min(64, run.config.model.context_length // 4)
    for prompt in prompts:
        ids = run.tokenizer.encode(prompt)
        start = [run.tokenizer.end_of_text, *ids[-2 * count :]]
        written = theirs.generate(torch.tensor([start]), max_new_tokens=count, do_sample=False)[0, len(start) :]
        if reader(prompt).input_ids != ids or generate(run.model, start, count) != written.tolist():
            return prompt
    return None



def harness_windows(texts: list[str], tokenizer: Tokenizer, t: int) -> Iterator[Batch]:
    """Windows of t tokens as the harness cuts them: each token of a text is predicted once, and the last window of a
    text is moved back until it is full, with no target where the window before it had one."""
    rows = []
    for text in texts:
        ids = [tokenizer.end_of_text, *tokenizer.encode(text)]
        for start in range(0, len(ids) - 1, t):
            end = min(start + t, len(ids) - 1)
            first = max(0, end - t)
            targets = [IGNORE] * (start - first) + ids[start + 1 : end + 1]
            fill = t - len(targets)
            rows.append((ids[first:end] + [tokenizer.end_of_text] * fill, targets + [IGNORE] * fill))
    for i in range(0, len(rows), BATCH):
        ids, targets = torch.tensor(rows[i : i + BATCH]).unbind(1)
        yield Batch(ids, targets, torch.zeros_like(ids, dtype=torch.int32))  # a row is of one document


def compare(theirs: float, same: float, ours: float) -> None:
    """Prints our two figures below that of lm_eval; ends the program where one is too far from it."""
    print(f"bits per byte: {theirs:.5f} by lm_eval")
    for what, value, allowed, cause in (
            ("in the same windows", same, SAME_WINDOWS, "weights, tokens or bytes are not the same"),
            ("by `nanomai eval`", ours, OTHER_WINDOWS, "documents shorter than the context can do that")):
        difference = abs(theirs / value - 1)
        print(f"               {value:.5f} {what}, {difference:.1e} of it apart", flush=True)
        if not difference <= allowed:  # nor is NaN
            sys.exit(f"eval-harness: {value:.5f} {what} and {theirs:.5f} are more than {allowed:g} apart: {cause}")


def main() -> None:
    """Ends with a status other than 0, and one line, at the first thing that is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--python", type=Path, default=".venv-eval/bin/python", help="the one that has lm_eval")
    arguments = parser.parse_args()
    if not arguments.python.exists():
        sys.exit(f"eval-harness: there is no {arguments.python}; `make eval-harness` makes it and installs lm-eval")
    shutil.rmtree(WORK, ignore_errors=True)
    print(nanomai("export", arguments.run, WORK / "model"), end="")
    ours = json.loads(nanomai("eval", arguments.run, "--device", "cpu", "--json"))["bits_per_byte"]
    run = load_run(arguments.run)
    prepared = prepare(run.config.data, run.config.model.vocab_size, show=False)
    texts = held_out_documents(prepared.validation(run.config.sequence_length), run.tokenizer)
    questions = next_line_questions(texts)
    if not questions:
        sys.exit("eval-harness: the validation split has no lines to ask about: all are too short or too long")
    write_lines(WORK / "documents.jsonl", [{"text": text} for text in texts])
    write_lines(WORK / "next_line.jsonl", questions)
    prompts = [question["context"] for question in questions[:PROMPTS]]
    if differs := greedy_difference(run, WORK / "model", prompts):
        sys.exit(f"eval-harness: transformers and nanomai do not write the same tokens after {differs!r}")
    print(f"transformers writes the same greedy tokens as nanomai after {len(prompts)} prompts\n"
          f"lm_eval reads {len(texts)} documents and {len(questions)} questions ...", flush=True)
    theirs = harness(arguments.python, ["nanomai_bits_per_byte", "nanomai_next_line"])
    same = evaluate(run.model, run.tokenizer, harness_windows(texts, run.tokenizer, run.config.model.context_length))
    compare(theirs["nanomai_bits_per_byte"]["bits_per_byte,none"], same.bits_per_byte, ours)


if __name__ == "__main__":
    main()
