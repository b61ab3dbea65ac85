"""Training: resumed is unbroken to the last bit, bad steps leave no trace, and the run folder holds what it should."""

import dataclasses
import json
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from tiny_run import curve, environment, rows, tiny, weights, write_tiny

from nanomai import machine, trainer
from nanomai.checkpoint import CheckpointError
from nanomai.config import ConfigError
from nanomai.config_file import load_config
from nanomai.data import DataError
from nanomai.parallel.launch import StopSignal
from nanomai.runs import RunError, load_run
from nanomai.trainer import Trainer, TrainingStopped, train


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch, request):
    write_tiny(tmp_path)
    monkeypatch.chdir(tmp_path)
    if "whole" not in request.fixturenames:  # what takes most of a tiny run's time, and changes nothing here
        monkeypatch.setattr(machine, "matmul_peak", lambda *_: 1e11)
        monkeypatch.setattr(trainer, "plot_loss", lambda *_: None)
        monkeypatch.setattr(trainer, "stream_text", lambda *_, **__: iter(["text"]))
    return tmp_path


@pytest.fixture
def whole():
    """Asked for by tests of what `here` leaves out."""


@pytest.fixture
def after(monkeypatch):
    """`after(step, action)`: `action(trainer)` happens as soon as that step is done."""
    actions, step = {}, Trainer.step

    def observed(self, *arguments):
        row = step(self, *arguments)
        if row is not None and row["step"] in actions:
            actions.pop(row["step"])(self)
        return row

    monkeypatch.setattr(Trainer, "step", observed)
    return actions.__setitem__


def interrupted(after, step, **settings):
    after(step, lambda _: signal.raise_signal(signal.SIGINT))
    result = train(tiny(**settings), show=False)
    assert not result.finished and result.steps == step
    return result


# --- Resuming ---------------------------------------------------------------------------------------------------------

KINDS = {
    "adamw": {},
    "muon, wsd": {"optim__name": "muon", "optim__schedule": "wsd"},
    "piecewise batch and rate": {"train__batch_tokens": {0: 256, 4: 512, 7: 128}, "optim__lr": {0: 1e-3, 6: 1e-2}},
    "accumulation, gpt-2 like": {"train__micro_batch": 3, "model__norm": "layernorm", "model__position": "learned",
                                 "model__activation": "gelu", "model__biases": ["qkv", "mlp"]},
    "bfloat16": {"train__dtype": "bfloat16"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_is_unbroken(kind, after):
    settings = KINDS[kind]
    train(tiny(train__run_dir="unbroken", **settings), show=False)
    interrupted(after, 5, train__run_dir="broken", **settings)
    interrupted(after, 8, train__run_dir="broken", train__resume=True, **settings)
    result = train(tiny(train__run_dir="broken", train__resume=True, **settings), show=False)
    assert result.finished and result.steps == 12
    assert curve("broken") == curve("unbroken") and len(curve("broken")) == 12
    assert weights("broken") == weights("unbroken")


def test_resumed_is_unbroken_compiled_on_two_threads():
    """The second half is another process, as it would be."""
    script = ("import sys, nanomai, torch; from tiny_run import tiny\n"
              "for run, steps in zip(sys.argv[1::2], sys.argv[2::2]):\n"
              "    nanomai.train(tiny(train__compile='on', train__threads=2, train__dtype='bfloat16',\n"
              "        model__d_model=64, optim__schedule='constant', train__steps=int(steps),\n"
              "        train__run_dir=run, train__resume=True), show=False)\n"
              "assert torch.get_num_threads() == 2")
    for sessions in (["unbroken", "8", "broken", "3"], ["broken", "8"]):
        subprocess.run([sys.executable, "-c", script, *sessions], check=True, timeout=600,
                       env=environment(OMP_NUM_THREADS="2", OMP_WAIT_POLICY="PASSIVE", PYTHONPATH=":".join(sys.path)))
    assert curve("broken") == curve("unbroken") and len(curve("broken")) == 8
    assert weights("broken") == weights("unbroken")


def test_a_second_signal_stops_at_once_but_an_echo_does_not():
    with StopSignal() as stop:
        for _ in range(3):  # torchrun hands on what the terminal has already sent
            signal.raise_signal(signal.SIGINT)
        assert stop.name == "SIGINT"
        stop.asked -= StopSignal.ONE_REQUEST
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("tell", [True, False])
def test_a_signal_is_answered_at_once(capfd, tell):
    with StopSignal(tell):
        signal.raise_signal(signal.SIGINT)
    assert ("finishing this step and saving" in capfd.readouterr().err) == tell


def test_a_finished_run_is_extended():
    settings = {"optim__schedule": "constant"}
    train(tiny(train__run_dir="unbroken", train__steps=9, **settings), show=False)
    train(tiny(train__run_dir="two", train__steps=4, **settings), show=False)
    result = train(tiny(train__run_dir="two", train__steps=9, train__resume=True, **settings), show=False)
    assert result.steps == 9 and len(result.losses) == 9
    assert curve("two") == curve("unbroken") and weights("two") == weights("unbroken")
    assert [row["step"] for row in rows("two") if "val_loss" in row] == [4, 9]


def test_resuming_a_finished_run_changes_nothing():
    first = train(tiny(), show=False)
    before = rows("runs/tiny")
    again = train(tiny(train__resume=True), show=False)
    assert again.finished and (again.val_loss, again.losses) == (first.val_loss, first.losses)
    assert rows("runs/tiny") == before


def test_fewer_steps_than_are_done(capsys):
    train(tiny(train__steps=5), show=False)
    again = train(tiny(train__steps=3, train__resume=True))
    assert again.finished and again.steps == 5 and len(again.losses) == 5
    assert "all its 5 steps are done; a larger --train.steps would train it on" in capsys.readouterr().out


def test_resuming_where_nothing_is_begins():
    result = train(tiny(train__resume=True), show=False)
    assert result.finished and str(result.run_dir) == "runs/tiny"
    assert len(curve("runs/tiny")) == 12


@pytest.mark.usefixtures("whole")
def test_evaluating_sampling_and_saving_leave_the_curve_alone(capsys):
    train(tiny(train__run_dir="quiet"), show=False)
    train(tiny(train__run_dir="busy", train__eval_every=1, train__eval_tokens=64, train__sample_every=2,
               train__checkpoint_every=3), show=True)
    assert curve("busy") == curve("quiet") and weights("busy") == weights("quiet")
    assert capsys.readouterr().out.count("writes ---") == 5  # the last step's sample is sample.txt


def test_a_half_written_last_line_is_cut_off(after, here):
    train(tiny(train__run_dir="unbroken"), show=False)
    interrupted(after, 6, train__run_dir="broken")
    with open("broken/metrics.jsonl", "a") as file:  # what a kill leaves: steps beyond the checkpoint, and half a line
        file.write('{"step": 7, "loss": 1.0, "grad_norm": 1.0, "lr": 0.1}\n{"step": 8, "lo')
    train(tiny(train__run_dir="broken", train__resume=True), show=False)
    assert curve("broken") == curve("unbroken")


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(after, capsys):
    train(tiny(train__run_dir="unbroken"), show=False)
    interrupted(after, 8, train__run_dir="broken", train__checkpoint_every=3)
    newest = next(trainer.Path("broken/checkpoints/step-00000008").glob("*.distcp"))
    newest.write_bytes(newest.read_bytes()[:-1])
    train(tiny(train__run_dir="broken", train__resume=True))
    out = " ".join(capsys.readouterr().out.split())
    assert "warning: broken/checkpoints/step-00000008: __0_0.distcp has" in out
    assert "it is truncated; using the one before it" in out and "resuming broken/checkpoints/step-00000006" in out
    assert curve("broken") == curve("unbroken") and weights("broken") == weights("unbroken")


def test_an_interruption_right_after_a_checkpoint_keeps_it(after):
    result = interrupted(after, 6, train__checkpoint_every=3)
    assert sorted(p.name for p in (result.run_dir / "checkpoints").glob("step-*")) == ["step-00000003", "step-00000006"]


def test_run_folders_are_never_overwritten(here):
    assert [train(tiny(train__steps=1), show=False).run_dir.name for _ in range(3)] == ["tiny", "tiny-2", "tiny-3"]
    with pytest.raises(RunError) as error:
        train(tiny(train__run_dir="runs/tiny"), show=False)
    assert str(error.value) == ("runs/tiny holds a run already; go on with --train.resume, "
                                "or choose another --train.run-dir")


def test_a_refused_resume_leaves_the_run_as_it_was(after, here):
    interrupted(after, 3, data__tokenizer="bpe", model__vocab_size=290)
    files = ("config.yaml", "tokenizer.json", "metrics.jsonl")
    kept = {name: (here / "runs/tiny" / name).read_bytes() for name in files}
    (here / "text" / "new.txt").write_text("quite another text, from which other tokens are learned " * 50)
    with pytest.raises(ConfigError, match=r"^runs/tiny/checkpoints/step-00000003 was trained on other data"):
        train(tiny(data__tokenizer="bpe", model__vocab_size=290, train__resume=True), show=False)
    with pytest.raises(ConfigError, match=r"^runs/tiny holds another model than tiny; resume with the same model"):
        train(tiny(model__d_ff=96, train__resume=True), show=False)
    assert kept == {name: (here / "runs/tiny" / name).read_bytes() for name in kept}


def test_the_choices_of_auto_are_kept(after):
    interrupted(after, 3, train__dtype="bfloat16", train__compile="auto")
    result = train(tiny(train__dtype="auto", train__compile="auto", train__resume=True), show=False)
    assert result.finished and load_config("runs/tiny/config.yaml").train.dtype == "bfloat16"


# --- Beginning from another run ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_muon_multiplies_in_the_runs_dtype(dtype, after):
    seen = []
    after(1, lambda trainer: seen.append(trainer.state.optimizers[1].dtype))
    train(tiny(train__steps=1, train__dtype=dtype, optim__name="muon"), show=False)
    assert seen == [getattr(torch, dtype)]


def test_init_from(after, here):
    source = train(tiny(), show=False)
    began = []
    after(1, lambda t: began.append(t.state.guard.loss.mean))
    first = train(tiny(train__init_from="tiny", train__steps=2), show=False)
    assert first.losses[0] < source.losses[0] - 0.5
    interrupted(after, 1, train__init_from="tiny", train__run_dir="third", train__steps=3)
    shutil.rmtree("runs/tiny")  # a resumed run needs no source
    assert train(tiny(train__init_from="tiny", train__run_dir="third", train__steps=3, train__resume=True),
                 show=False).finished


def test_init_from_another_tokenizer_or_model_is_refused():
    train(tiny(train__steps=1), show=False)
    with pytest.raises(RunError) as error:
        train(tiny(data__tokenizer="bpe", model__vocab_size=290, train__init_from="runs/tiny"), show=False)
    assert str(error.value) == ("runs/tiny was trained with another tokenizer; "
                                "set --data.tokenizer runs/tiny/tokenizer.json")
    with pytest.raises(CheckpointError, match=r"has shape \(64, 32\) there and \(96, 32\) here"):
        train(tiny(model__d_ff=96, train__init_from="runs/tiny", train__run_dir="b"), show=False)
    with pytest.raises(RunError, match=r"^no run 'nothing'; in runs/ there are tiny"):
        train(tiny(train__init_from="nothing"), show=False)


# --- The guard --------------------------------------------------------------------------------------------------------


@pytest.fixture
def poison(monkeypatch):
    """`poison(steps, value)`: the summed gradients of those steps (from 1) are multiplied by it."""
    bad, clip = {}, trainer.clip_gradients
    count = iter(range(1, 10**6))

    def poisoned(model, *rest):
        factor = bad.get(next(count), 1.0)
        for parameter in model.parameters():
            parameter.grad.mul_(factor)
        return clip(model, *rest)

    monkeypatch.setattr(trainer, "clip_gradients", poisoned)
    return lambda steps, value: bad.update(dict.fromkeys(steps, value))


BALANCED = {"model__moe__n_experts": 5, "model__moe__d_expert": 16, "model__moe__router": "sigmoid",
            "model__moe__bias_speed": 0.01}


@pytest.mark.parametrize("settings", [{}, BALANCED], ids=["dense", "experts"])
def test_a_bad_step_never_touches_weights_or_optimizer(settings, poison, after, here, capsys):
    """Nor the selection bias; nor do its choices of experts count in the next step."""
    poison([5], float("nan"))
    seen = []
    for step in (4, 5, 6):
        after(step, lambda t: seen.append({name: x.clone() for name, x in [*t.state.tensors().items(),
                                                                           *t.state.model.named_buffers()]}))
    assert train(tiny(**settings)).finished
    assert all(torch.equal(seen[0][name], seen[1][name]) for name in seen[0])
    assert not torch.equal(seen[1]["model/embed.weight"], seen[2]["model/embed.weight"])
    assert [(row["step"], row["skipped"]) for row in rows("runs/tiny") if "skipped" in row] == [
        (5, "the gradient norm is nan")]
    assert "NaN" not in (here / "runs/tiny/metrics.jsonl").read_text()  # it stays JSON
    out = capsys.readouterr().out
    assert "warning: step 5 skipped: the gradient norm is nan" in out and "skipped steps: 1 (" in out


def test_a_spike_is_refused_and_a_resumed_run_refuses_the_same(poison, after):
    settings = {"train__steps": 32, "train__batch_tokens": 64}
    poison([27, 32 + 27], 1e4)
    train(tiny(train__run_dir="unbroken", **settings), show=False)
    interrupted(after, 25, train__run_dir="broken", **settings)
    train(tiny(train__run_dir="broken", train__resume=True, **settings), show=False)
    refused = [row for row in curve("unbroken") if "skipped" in row]
    assert len(refused) == 1 and re.fullmatch(r"the gradient norm \S+ is \d+ deviations above the recent",
                                              refused[0]["skipped"])
    assert curve("broken") == curve("unbroken")


@pytest.mark.parametrize("saved", [0, 3])
def test_bad_steps_in_a_row_stop_the_run(poison, saved):
    poison(range(5, 12), float("inf"))
    with pytest.raises(TrainingStopped) as error:
        train(tiny(train__checkpoint_every=saved, train__max_skipped=3), show=False)
    good = "the last good checkpoint is runs/tiny/checkpoints/step-00000006"
    back = good if saved else "no checkpoint had been saved"
    assert str(error.value) == (f"3 steps in a row were refused, the last because the gradient norm is inf; {back}: "
                                "lower optim.lr, or look at the data, and resume")
    assert [row["step"] for row in rows("runs/tiny") if "skipped" in row] == [5, 6, 7]


ROUTERS = {"softmax": {}, "sigmoid": {"model__moe__n_groups": 3, "model__moe__groups_per_token": 2},
           "sparsemixer": {"model__moe__jitter": 0.1}}


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("router", ROUTERS)
def test_scores_that_are_no_numbers_still_choose_experts_and_the_guard_speaks(router, value, after):
    """What cannot be ordered is sorted all the same: the step is refused, and nothing breaks on an index."""
    def spoil(t):
        with torch.no_grad():
            t.state.model.blocks["1"].mlp.router.weight[2] = float(value)

    after(2, spoil)
    with pytest.raises(TrainingStopped, match=r"^2 steps in a row were refused, the last because the loss is nan; "):
        train(tiny(train__max_skipped=2, model__moe__n_experts=6, model__moe__d_expert=8, model__moe__router=router,
                   model__moe__balance_loss=0.01, model__moe__z_loss=1e-3, **ROUTERS[router]), show=False)


def test_weights_that_are_not_numbers_are_named(after):
    def spoil(t):
        with torch.no_grad():
            t.state.model.embed.weight[3, 4] = float("nan")
        t.state.save()
        t.state.saver.wait()
        raise KeyboardInterrupt

    after(4, spoil)
    with pytest.raises(KeyboardInterrupt):
        train(tiny(train__checkpoint_every=2), show=False)
    message = ("runs/tiny/checkpoints/step-00000004: model/embed.weight holds numbers that are not finite; "
               "delete this checkpoint to go back to the one before")
    for use in (lambda: train(tiny(train__resume=True), show=False), lambda: load_run("runs/tiny"),
                lambda: train(tiny(train__init_from="tiny"), show=False)):
        with pytest.raises(CheckpointError) as error:
            use()
        assert str(error.value) == message
    shutil.rmtree("runs/tiny/checkpoints/step-00000004")
    assert train(tiny(train__resume=True), show=False).finished


# --- What a run leaves and says ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("whole")
def test_the_run_folder(capsys, here):
    config = tiny(train__steps=9, train__log_every=3, train__eval_every=6, train__sample_prompt="the",
                  train__profile_steps=2)
    result = train(config)
    assert [row["step"] for row in rows(result.run_dir) if "loss" in row] == [3, 6, 9]
    assert [row["step"] for row in rows(result.run_dir) if "val_bpb" in row] == [6, 9]
    assert set(rows(result.run_dir)[0]) == {"step", "loss", "grad_norm", "lr", "tokens_per_second"}
    assert result.losses == [row["loss"] for row in rows(result.run_dir) if "loss" in row]
    assert result.val_bpb == rows(result.run_dir)[-1]["val_bpb"] < 8.1
    assert (result.run_dir / "sample.txt").read_text().startswith("the")
    assert (result.run_dir / "loss.png").read_bytes().startswith(b"\x89PNG")
    saved = load_config(result.run_dir / "config.yaml")
    resolved = dataclasses.replace(config.train, micro_batch=8, kernels="torch")
    assert saved == dataclasses.replace(config, train=resolved)
    trace = json.loads((result.run_dir / "trace-0.json").read_text())
    assert sum(event.get("name", "").startswith("ProfilerStep#") for event in trace["traceEvents"]) >= 2
    assert "ui.perfetto.dev" in capsys.readouterr().out


def test_a_profile_that_never_began_says_so(capsys):
    train(tiny(train__steps=2, train__profile_steps=5))
    assert "profile: the run was too short to trace" in capsys.readouterr().out


@pytest.mark.usefixtures("whole")
def test_the_progress_line(capsys):
    result = train(tiny(train__steps=40, train__eval_every=20))
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("step 40/40"))
    parts = re.fullmatch(r"step 40/40  loss (\S+)  val (\S+) bits/byte  ([\d,]+) tokens/s  MFU (\d+)%  0:00 left", line)
    loss, bpb, speed, mfu = parts.groups()
    on_the_way = next(row["val_bpb"] for row in rows(result.run_dir) if "val_bpb" in row)
    assert (loss, bpb) == (f"{result.losses[-1]:.3f}", f"{on_the_way:.3f}")
    assert float(speed.replace(",", "")) == pytest.approx(rows(result.run_dir)[-2]["tokens_per_second"], abs=1)
    assert int(mfu) >= 0  # above 100 where others slowed the machine while its peak was measured


def test_the_last_evaluation_is_bounded(capsys):
    everything = train(tiny(train__run_dir="whole", train__steps=1))
    assert "gzip -9" in capsys.readouterr().out
    part = train(tiny(train__run_dir="part", train__steps=1, train__final_eval_tokens=64))
    assert "gzip -9" not in capsys.readouterr().out, "compressors would see another text than the model did"
    assert part.losses == everything.losses and part.val_loss != everything.val_loss


def test_a_run_that_waits_for_data_is_slow(monkeypatch):
    make = trainer.rank_spans  # the loader asks it for each batch, four ahead

    def slow(*arguments):
        for span in make(*arguments):
            time.sleep(0.1)
            yield span

    monkeypatch.setattr("nanomai.data.rank_spans", slow)
    result = train(tiny(), show=False)
    assert max(row["tokens_per_second"] for row in rows(result.run_dir)[:6]) < tiny().train.batch_tokens / 0.09


def test_a_kill_in_the_last_evaluation_loses_nothing(monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer, "evaluate", killed)
        train(tiny(), show=False)
    again = train(tiny(train__resume=True), show=False)
    assert again.finished and again.steps == 12 and len(curve("runs/tiny")) == 12


def test_no_terminal_output_where_none_is_wanted(capsys):
    train(tiny(train__steps=1, train__sample_every=1, train__eval_every=1), show=False)
    assert capsys.readouterr() == ("", "")


def test_one_batch_can_be_learned_by_heart(here):
    (here / "one.txt").write_text("It was the best of times, it was the worst of times, it was the age of wisdom. "
                                  "We had everything before us, we had nothing before us; and so on it goes. " * 2)
    result = train(tiny(data__corpus="one.txt", data__val_fraction=0.45, train__steps=150, optim__weight_decay=0.0,
                        train__batch_tokens=160), show=False)
    assert result.losses[-1] < 0.1


# --- What cannot be run -----------------------------------------------------------------------------------------------

LONG_NEED = "the run needs 96 samples and max_epochs allows"
REFUSED = {
    "device": ({"train__device": "gpu"}, ConfigError, "device 'gpu' is not one of auto, cpu, cuda, mps"),
    "epochs": ({"data__corpus": "text:1:0.1"}, DataError, LONG_NEED),
    "sequence": ({"train__sequence_length": 10**5, "train__batch_tokens": 10**5}, DataError,
                 "text has 12875 training tokens, too few for a window of 100001; "
                 "give more text or a shorter train.sequence_length"),
    "vocabulary": ({"model__vocab_size": 200}, ConfigError,
                   "tokenizer 'bytes' has 257 tokens and the model only 200; set model.vocab_size to 257 or more"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_run(what, here):
    settings, kind, message = REFUSED[what]
    with pytest.raises(kind) as error:
        train(tiny(**settings), show=False)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
    assert not list(here.glob("runs/*")), "a refused run leaves no folder"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_cuda_here():
    with pytest.raises(ConfigError, match=r"^device 'cuda' is not available here; use auto or cpu$"):
        train(tiny(train__device="cuda"), show=False)
