"""Run folders: never overwritten, found by name, loaded whole, and metrics without a double step."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from nanomai import checkpoint
from nanomai.checkpoint import CheckpointError
from nanomai.config import Config, ModelConfig, TrainConfig
from nanomai.config_file import load_config
from nanomai.model import build_model
from nanomai.runs import (
    Metrics,
    RunError,
    find_run,
    load_run,
    load_weights,
    model_state,
    open_run,
    read_metrics,
    removed_if_unused,
    write_config,
)
from nanomai.tokenizer import TokenizerError, get_tokenizer

MODEL = ModelConfig(n_layers=1, d_model=16, n_heads=2, n_kv_heads=1, head_dim=8, d_ff=24, vocab_size=257,
                    context_length=16)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config(name="first", **train) -> Config:
    return Config(name=name, model=MODEL, train=TrainConfig(**train))


def made(config: Config) -> Path:
    folder = open_run(config)
    write_config(folder, config)
    return folder


# --- making one


def test_a_name_that_is_taken_gets_a_number():
    assert [str(made(config())) for _ in range(3)] == ["runs/first", "runs/first-2", "runs/first-3"]
    assert str(made(config("second"))) == "runs/second"
    assert str(made(config(resume=True))) == "runs/first", "to resume is to go on in the same folder"


def test_a_home_folder_is_found(monkeypatch, here):
    monkeypatch.setenv("HOME", str(here))
    assert made(config(run_dir="~/mine")) == here / "mine" == find_run("~/mine")


def test_runs_that_start_at_once_take_different_folders():
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: open_run(config()), range(24)))
    assert len(set(folders)) == 24


def test_a_run_that_fails_before_its_first_step_leaves_nothing():
    folder = open_run(config())
    with pytest.raises(KeyError), removed_if_unused(folder):
        raise KeyError
    assert not folder.exists()


@pytest.mark.parametrize("file", ["metrics.jsonl", "checkpoints/step-00000001", "tokenizer.json", "notes.txt"])
def test_a_failed_run_keeps_what_it_did_and_what_is_not_ours(file):
    folder = open_run(config())
    (folder / file).touch()
    with pytest.raises(KeyError), removed_if_unused(folder):
        raise KeyError
    assert (folder / file).exists()


@pytest.mark.parametrize("file", ["checkpoints/step-1000/weights", "metrics.jsonl", "tokenizer.json"])
def test_what_another_program_wrote_is_never_overwritten(file):
    path = Path("mine") / file
    path.parent.mkdir(parents=True)
    path.write_text("theirs")
    with pytest.raises(RunError, match=rf"^mine holds {file.split('/')[0]} already, and a run would overwrite it; "):
        open_run(config(run_dir="mine"))
    assert path.read_text() == "theirs"
    Path("logs").mkdir()
    Path("logs/job.out").touch()
    assert open_run(config(run_dir="logs")) == Path("logs"), "other files may lie beside"


def test_a_run_that_ends_well_keeps_its_folder():
    folder = made(config())
    with removed_if_unused(folder):
        pass
    assert (folder / "config.yaml").exists()


def test_a_folder_that_was_asked_for_is_never_overwritten():
    assert str(made(config(run_dir="mine/run"))) == "mine/run"
    with pytest.raises(RunError) as caught:
        open_run(config(run_dir="mine/run"))
    assert str(caught.value) == ("mine/run holds a run already; go on with --train.resume, "
                                 "or choose another --train.run-dir")
    assert open_run(config(run_dir="mine/run", resume=True)) == Path("mine/run")
    assert [p.name for p in Path("mine/run").iterdir() if p.name != "checkpoints"] == ["config.yaml"]


def test_a_folder_that_cannot_be_made():
    Path("file").write_text("")
    with pytest.raises(RunError, match=r"^file/run cannot be written: Not a directory; choose another --train\.run"):
        open_run(config(run_dir="file/run"))


def test_the_configuration_comes_back():
    asked = config(run_dir="here", batch_tokens={0: 256, 5: 512}, sample_prompt="def 東(")
    assert load_config(made(asked) / "config.yaml") == asked
    write_config(Path("here"), config())
    assert load_config("here/config.yaml") == config()
    assert not list(Path("here").glob("*.writing"))


# --- finding and loading one


def test_finding():
    folder = made(config())
    assert find_run("first") == find_run("runs/first") == find_run(folder) == folder
    assert find_run(folder.resolve()) == folder.resolve()
    made(config("second"))
    with pytest.raises(RunError, match=r"^no run 'third'; in runs/ there are first, second$"):
        find_run("third")


def test_finding_nothing():
    with pytest.raises(RunError, match=r"^no run 'first'; train one with `nanomai train nano`$"):
        find_run("first")


def trained(seeds=(1, 2)) -> Path:
    """A finished run, as the trainer leaves it, with a checkpoint for each seed."""
    folder = made(config())
    get_tokenizer("bytes").save(folder / "tokenizer.json")
    for step, seed in enumerate(seeds, 1):
        checkpoint.save(folder / "checkpoints", step, model_state(build_model(MODEL, seed)), {"step": step})
    return folder


def equal(model, seed: int) -> bool:
    expected = build_model(MODEL, seed).parameters()
    return all(torch.equal(p, q) for p, q in zip(model.parameters(), expected, strict=True))


def test_loading():
    folder = trained()
    model, tokenizer, found = load_run("first")
    assert equal(model, 2) and found == config() and tokenizer.hash == get_tokenizer("bytes").hash
    assert not model.training and all(p.dtype == torch.float32 and p.requires_grad for p in model.parameters())
    assert load_weights(build_model(MODEL), folder) == folder / "checkpoints" / "step-00000002"


def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before():
    folder = trained()
    (folder / "checkpoints/step-00000002/__0_0.distcp").write_bytes(b"")
    assert equal(load_run(folder).model, 1)


@pytest.mark.parametrize("harm, error, message", [
    (lambda run: [(p / "manifest.json").unlink() for p in run.glob("checkpoints/step-*")], RunError,
     "runs/first has no usable checkpoint"
     "; runs/first/checkpoints/step-00000002: manifest.json is missing or unreadable; the checkpoint is incomplete"
     "; runs/first/checkpoints/step-00000001: manifest.json is missing or unreadable; the checkpoint is incomplete"),
    (lambda run: (run / "checkpoints").rename("elsewhere"), RunError, "runs/first has no usable checkpoint"),
    (lambda run: (run / "tokenizer.json").unlink(), TokenizerError, None),
    (lambda run: write_config(run, Config(model=ModelConfig(d_model=32))), CheckpointError, None)])
def test_a_run_that_lacks_something(harm, error, message):
    harm(trained())
    with pytest.raises(error) as caught:
        load_run("first")
    assert "\n" not in str(caught.value) and message in (None, str(caught.value))


# --- metrics


def test_metrics_are_cut_back_when_a_run_goes_on():
    path = Path("metrics.jsonl")
    first = Metrics(path)
    for step in range(1, 6):
        first.add(step=step, loss=1.0 / step)
    first.add(step=3, val_loss=0.5, val_bpb=0.7)
    again = Metrics(path, 3)
    assert again.rows == read_metrics(path) == [{"step": s, "loss": 1 / s} for s in (1, 2, 3)] + [
        {"step": 3, "val_loss": 0.5, "val_bpb": 0.7}]
    again.add(step=4, loss=9.0)
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 3, 4]
    assert again.has(3, "val_loss") and not again.has(4, "val_loss") and not again.has(9, "loss")
    assert Metrics(path).rows == read_metrics(path) == [], "a new run begins with none"


@pytest.mark.parametrize("cut", range(0, 20, 3))
def test_a_line_that_a_kill_cut_short(cut):
    path, rows = Path("metrics.jsonl"), [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}]
    lines = [json.dumps(row) + "\n" for row in rows]
    path.write_text(lines[0] + lines[1][:cut])
    assert read_metrics(path) == rows[:1]
    Metrics(path, 9).add(**rows[1])
    assert path.read_text() == "".join(lines)


def test_numbers_that_json_does_not_have():
    metrics = Metrics(Path("metrics.jsonl"))
    metrics.add(step=1, loss=float("nan"), grad_norm=float("inf"), skipped="the loss is nan")
    line = Path("metrics.jsonl").read_text()
    assert not re.search("NaN|Infinity", line)
    assert json.loads(line) == {"step": 1, "loss": None, "grad_norm": None, "skipped": "the loss is nan"}


def test_metrics_that_cannot_be_written():
    metrics = Metrics(Path("metrics.jsonl"))
    Path("metrics.jsonl").unlink()
    Path("metrics.jsonl").mkdir()
    with pytest.raises(RunError, match=r"^metrics\.jsonl cannot be written: Is a directory; free some space"):
        metrics.add(step=1)


def test_no_metrics_yet():
    assert read_metrics(Path("none.jsonl")) == []
