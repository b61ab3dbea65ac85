"""What `make eval-harness` asks a run, and how it compares; lm-eval itself is not needed here, and is not installed."""

import json
import math
import stat
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tiny_run import tiny, write_tiny

from benchmarks import eval_data, eval_harness
from nanomai import trainer
from nanomai.corpus import documents
from nanomai.data import IGNORE
from nanomai.preparation import prepare
from nanomai.tokenizer import get_tokenizer

ROOT = Path(__file__).resolve().parent.parent
TASKS = [yaml.safe_load(path.read_text()) for path in sorted(ROOT.glob("benchmarks/eval_tasks/*.yaml"))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where one run lies, in runs/tiny; its texts have lines and an indentation."""
    folder = tmp_path_factory.mktemp("harness")
    write_tiny(folder)
    for path in folder.glob("text/*.txt"):
        words = path.read_text().split()
        lines = [" ".join(words[i : i + 6]) for i in range(0, 60, 6)]
        path.write_text("\n".join(("    " if i % 2 else "") + line + " é" for i, line in enumerate(lines)) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        trainer.train(tiny(train__steps=3), show=False)
    return folder


@pytest.fixture
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return folder


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["eval_harness.py", *map(str, arguments)])
    eval_harness.main()


# --- The data ---------------------------------------------------------------------------------------------------------


def test_the_documents_are_those_that_training_never_saw(here):
    config = tiny(data__val_fraction=0.3)
    prepared = prepare(config.data, config.model.vocab_size, shard_bytes=900, show=False)
    texts = eval_data.held_out_documents(prepared.validation(32), prepared.tokenizer)
    split = {part: [d.text for d in documents(prepared.sources[0], config.data) if d.split == part]
             for part in ("train", "val")}
    assert texts == split["val"] and len(texts) > 3 and not {*texts} & {*split["train"]}
    assert len(list(prepared.folder.glob("val-*.bin"))) > 1


PYTHON = ["\n".join(f"{' ' * (i % 3)}line number {i} of text {text}" for i in range(40)) for text in range(3)]


def test_one_of_four_lines_comes_next():
    questions = eval_data.next_line_questions(PYTHON, count=50)
    assert len(questions) == 50
    for question in questions:
        right = question["choices"][question["answer"]]
        assert sum(f"{question['context']}\n{right}" in text for text in PYTHON) == 1
        assert len({*question["choices"]}) == 4
        assert len({len(line) - len(line.lstrip()) for line in question["choices"]}) == 1
        assert question["context"].count("\n") < eval_data.CONTEXT
    assert {question["answer"] for question in questions} == {0, 1, 2, 3}
    assert questions == eval_data.next_line_questions(PYTHON, count=50)
    assert questions != eval_data.next_line_questions(PYTHON, count=50, seed=1)


def test_there_may_be_fewer_lines_or_none():
    assert len(eval_data.next_line_questions(PYTHON[:1])) == 39  # the first line has nothing before it
    assert eval_data.next_line_questions(["x = 1\ny = 2\n" * 9, "one long line " * 99]) == []
    assert eval_data.next_line_questions(["a line that is alone\nand another line\nand a third line\n"]) == []


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task["task"])
def test_each_task_names_a_file_and_columns_that_are_written(task):
    columns = {"documents.jsonl": {"text"}, "next_line.jsonl": {"context", "choices", "answer"}}
    file = task["dataset_kwargs"]["data_files"][task["test_split"]]
    asked = {task[key] for key in ("doc_to_text", "doc_to_choice", "doc_to_target") if task.get(key)}
    assert task["dataset_path"] == "json" and asked == columns[file]


# --- The comparison ---------------------------------------------------------------------------------------------------


def test_the_windows_of_the_harness():
    """By hand, of texts of ten bytes and of one: windows of four, the last one moved back."""
    tokenizer = get_tokenizer("bytes")
    end = tokenizer.end_of_text
    (batch,) = eval_harness.harness_windows([bytes(range(10)).decode(), "\7"], tokenizer, 4)
    assert batch.ids.tolist() == [[end, 0, 1, 2], [3, 4, 5, 6], [5, 6, 7, 8], [end, end, end, end]]
    assert batch.targets.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [IGNORE, IGNORE, 8, 9],
                                      [7, IGNORE, IGNORE, IGNORE]]


def independent_bits_per_byte(python, tasks):
    """As lm_eval means it, one token at a time, with transformers: a token sees what its window holds before it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert sorted(tasks) == [task["task"] for task in TASKS]
    model, reader = (kind.from_pretrained("build/eval-harness/model") for kind in (AutoModelForCausalLM, AutoTokenizer))
    t, nats, size = model.config.max_position_embeddings, 0.0, 0
    for line in Path("build/eval-harness/documents.jsonl").read_text().splitlines():
        text = json.loads(line)["text"]
        ids = [reader.eos_token_id, *reader(text).input_ids]
        size += len(text.encode())
        for at in range(1, len(ids)):
            first = (at - 1) // t * t  # of its window
            if first + t >= len(ids) - 1:
                first = max(0, len(ids) - 1 - t)
            with torch.no_grad():
                nats -= model(torch.tensor([ids[first:at]])).logits[0, -1].double().log_softmax(-1)[ids[at]].item()
    return {"nanomai_bits_per_byte": {"bits_per_byte,none": nats / math.log(2) / size}}


def test_the_whole_of_it_but_for_lm_eval(here, monkeypatch, capfd):
    Path("build/eval-harness/model/left").mkdir(parents=True)  # by an earlier call
    monkeypatch.setattr(eval_harness, "harness", independent_bits_per_byte)
    monkeypatch.setattr(eval_harness, "OTHER_WINDOWS", 1.0)  # these texts are hardly longer than the context
    call(monkeypatch, "runs/tiny", "--python", sys.executable)
    out = capfd.readouterr().out
    assert "LlamaForCausalLM" in out and "same greedy tokens as nanomai after 8 prompts" in out
    assert "in the same windows" in out and "by `nanomai eval`" in out


def test_figures_that_are_not_the_same(capsys):
    eval_harness.compare(1.23, 1.23 * (1 + 9e-6), 1.23 * 1.009)
    assert capsys.readouterr().out.splitlines()[0] == "bits per byte: 1.23000 by lm_eval"
    for figures, message in (((1.23, 1.2301, 1.23), "1.23010 in the same windows and 1.23000 are more than 1e-05"),
                             ((1.23, 1.23, 1.3), "1.30000 by `nanomai eval` and 1.23000 are more than 0.01"),
                             ((math.nan, 1.23, 1.23), "in the same windows and nan")):
        with pytest.raises(SystemExit, match=message):
            eval_harness.compare(*figures)


def test_another_model_writes_other_tokens(here, tmp_path):
    from nanomai.hub import to_hf
    from nanomai.runs import load_run

    run = load_run("runs/tiny")
    prompts = ["the cat", "ran to\n", "x" * 99]
    assert eval_harness.greedy_difference(run, to_hf(run.model, tmp_path / "a", run.tokenizer), prompts) is None
    with torch.no_grad():
        run.model.embed.weight.copy_(run.model.embed.weight.flip(0))
    folder = to_hf(run.model, tmp_path / "b", run.tokenizer)
    assert eval_harness.greedy_difference(load_run("runs/tiny"), folder, prompts) == "the cat"


# --- Errors -----------------------------------------------------------------------------------------------------------


def fails(monkeypatch, capfd, *arguments):
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, *arguments)
    said = [stop.value.code] if isinstance(stop.value.code, str) else capfd.readouterr().err.splitlines()
    assert stop.value.code and len(said) == 1, said
    return said[0]


def test_what_is_missing_is_one_line(here, monkeypatch, capfd):
    assert fails(monkeypatch, capfd, "runs/tiny") == (
        "eval-harness: there is no .venv-eval/bin/python; `make eval-harness` makes it and installs lm-eval")
    line = fails(monkeypatch, capfd, "runs/absent", "--python", sys.executable)
    assert line == "nanomai: no run 'runs/absent'; in runs/ there are tiny"
    monkeypatch.setattr(eval_data, "LENGTHS", range(0))
    line = fails(monkeypatch, capfd, "runs/tiny", "--python", sys.executable)
    assert line == "eval-harness: the validation split has no lines to ask about: all are too short or too long"


def program(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    return path


def test_lm_eval_is_run_offline_and_its_failure_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("build/eval-harness").mkdir(parents=True)
    good = program(tmp_path / "good", """mkdir -p results/model; echo "hf (...)"; echo "|table $HF_HUB_OFFLINE|"
        echo '{"results": {"a": {"told": "'$*'"}}}' > results/model/results_now.json""")
    assert "--model hf --model_args pretrained=model" in eval_harness.harness(good, ["a"])["a"]["told"]
    assert capsys.readouterr().out == "|table 1|\n"
    bad = program(tmp_path / "bad", "echo Traceback >&2; echo 'ValueError: no such thing' >&2; echo >&2; exit 3")
    with pytest.raises(SystemExit) as stop:
        eval_harness.harness(bad, ["a"])
    assert stop.value.code == ("eval-harness: lm_eval failed with status 3: ValueError: no such thing (all of it: "
                               "build/eval-harness/lm_eval.log)")
