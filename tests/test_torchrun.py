"""Several ranks under a real torchrun: the same numbers as one, one voice, and no rank that waits for ever."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from tiny_run import curve, environment, nanomai, rows, tiny, write_tiny

from nanomai import checkpoint, data, generate, load_config, load_run, machine, trainer
from nanomai.model import build_model
from nanomai.parallel.launch import launch, process_group

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "nanomai"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    write_tiny(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def torchrun(*arguments):
    return subprocess.run([*TORCHRUN, *arguments], env=environment(), capture_output=True, text=True, timeout=120)


def same(ours, theirs, keys=("loss", "grad_norm")):
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for key in keys:
        assert [row[key] for row in ours] == pytest.approx([row[key] for row in theirs], rel=1e-5)


def test_two_ranks_are_one(here):
    both = torchrun("train", "tiny.yaml", "--train.run-dir", "two", "--train.eval-every", "5")
    assert both.returncode == 0, both.stderr
    for line in ("writing to two", "step 12/12", "next:"):  # one rank speaks
        assert both.stdout.count(line) == 1
    one = trainer.train(tiny(train__run_dir="one", train__eval_every=5), show=False)
    same(curve("two"), curve("one"))
    assert f"validation: {one.val_loss:.3f} nats/token, {one.val_bpb:.3f} bits/byte" in both.stdout


def _train_masked(rank, run):
    """Trains where every third token has no target, so that the ranks count different numbers of tokens."""
    make_batch = data.make_batch

    def masked(rows, end_of_text):
        batch = make_batch(rows, end_of_text)
        batch.targets[batch.ids % 3 == 0] = data.IGNORE
        return batch

    data.make_batch = masked
    try:
        trainer.train(tiny(train__run_dir=run, train__steps=5, train__batch_tokens=128), show=False)
    finally:
        data.make_batch = make_batch


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_all_ranks_and_one_goes_on(number, here):
    """SIGTERM goes to torchrun alone, as from a scheduler; Ctrl-C reaches every process of the terminal."""
    job = subprocess.Popen([*TORCHRUN, "train", "tiny.yaml", "--train.steps", "3000", "--optim.schedule", "constant",
                            "--train.checkpoint-every", "2"],  # so that one is being written when the signal comes
                           env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                           start_new_session=True)
    while not job.stdout.readline().startswith("step "):
        assert job.poll() is None, job.stderr.read()
    began = time.monotonic()
    (os.killpg if number == signal.SIGINT else os.kill)(job.pid, number)
    out, err = job.communicate(timeout=60)
    assert time.monotonic() - began < 25  # torchrun would kill what is still there after 30 s
    assert f"{number.name}: saved runs/tiny/checkpoints/step-" in out and "runs/tiny --train.resume" in out
    assert "nanomai/trainer.py" not in err, err
    done = len(curve("runs/tiny"))
    assert 1 <= done < 3000
    resumed = nanomai("train", "runs/tiny", "--train.resume", "--train.steps", done + 5, cwd=here)
    assert resumed.returncode == 0, resumed.stderr
    trainer.train(tiny(train__run_dir="whole", train__steps=done + 5, optim__schedule="constant"), show=False)
    assert [row["step"] for row in curve("runs/tiny")] == list(range(1, done + 6))
    same(curve("runs/tiny")[:10], curve("whole")[:10])
    assert curve("runs/tiny")[-1]["loss"] == pytest.approx(curve("whole")[-1]["loss"], rel=0.05)


def test_what_fails_on_one_rank_ends_all(here):
    (here / "blocked" / "metrics.jsonl").mkdir(parents=True)
    for flags, message in {
        ("--train.run-dir", "tiny.yaml/run"):  # before the ranks first meet
            "nanomai: tiny.yaml/run cannot be written: Not a directory; choose another --train.run-dir",
        ("--train.run-dir", "blocked", "--train.resume"):  # while the other rank waits in a step
            "nanomai: blocked/metrics.jsonl: Is a directory",
        # what every rank refuses is said once, by whichever is first
        ("--train.stepz", "5"): "nanomai: Unrecognized options: --train.stepz, 5; did you mean --train.steps?",
        ("--parallel.tensor", "2"): "nanomai: parallel tensor 2 cannot share n_kv_heads 1; the nearest that works is 1",
    }.items():
        began = time.monotonic()
        failed = torchrun("train", "tiny.yaml", *flags)
        assert failed.returncode != 0 and time.monotonic() - began < 60
        said = [re.sub(r" \(rank 1\)", "", line) for line in failed.stderr.splitlines()
                if line.startswith(("nanomai:", "nanomai ("))]
        assert said == [message], failed.stderr
        assert "nanomai/trainer.py" not in failed.stderr, failed.stderr


def _use_every_rank(rank):
    _train_masked(rank, "two")
    with pytest.raises(Exception, match=r"^(rank 0 failed: )?corpus 'hollow' holds no text"):
        trainer.train(tiny(data__corpus="hollow"), show=False)
    with pytest.raises(data.DataError) as error:  # before the run begins
        trainer.train(tiny(train__batch_tokens={0: 64, 10**3: 96}, train__steps=2000), show=False)
    assert str(error.value) == ("a batch of 3 samples cannot be shared by 2 ranks; "
                                "make train.batch_tokens a multiple of 2 sequences")


def _write_one_text(rank):
    """Each rank would draw tokens of its own."""
    with process_group() as mesh:
        model = build_model(load_config("tiny.yaml").model)
        mine, ours = (generate(model, [1], 8, temperature=1.0, seed=rank, **options)
                      for options in ({}, {"agree": mesh.same}))
        texts = [None, None]
        torch.distributed.all_gather_object(texts, (mine, ours))
        assert texts[0][0] != texts[1][0] and texts[0][1] == texts[1][1] == texts[0][0]


def _train_on_two_kinds(rank):
    """What `auto` becomes is rank 0's to say, or one would send bfloat16 where the other waits for float32."""
    machine._has_fast_bfloat16 = lambda device: rank == 0
    trainer.train(tiny(train__run_dir="kinds", train__steps=2, train__dtype="auto"), show=False)


def test_different_token_counts_and_refusals_on_two_ranks(here):
    (here / "hollow").mkdir()
    launch(_use_every_rank, 2)
    launch(_write_one_text, 2)
    launch(_train_on_two_kinds, 2)
    assert "dtype: bfloat16" in (here / "kinds" / "config.yaml").read_text()
    _train_masked(0, "one")
    same(curve("two"), curve("one"))


WIDE = {"model__n_heads": 4, "model__n_kv_heads": 2, "model__head_dim": 8, "model__vocab_size": 260,
        "model__tied_embeddings": False, "optim__name": "muon", "train__batch_tokens": 256,
        "train__sample_prompt": "the"}
EXPERTS = {"model__moe__n_experts": 4, "model__moe__d_expert": 32, "model__moe__router": "sigmoid",
           "model__moe__bias_speed": 0.01}


def _train_laid_out(rank, layouts):
    for name, settings in layouts.items():
        trainer.train(tiny(train__run_dir=name, train__steps=6, **WIDE, **settings), show=False)


def test_a_run_is_the_same_however_it_is_laid_out(here, capfd):
    """The trainer's whole way: counts, accumulation, evaluation, a sample, a checkpoint that one process reads."""
    two = {"tensor": {"parallel__tensor": 2}, "context": {"parallel__context": 2, "train__micro_batch": 3},
           "experts": {"parallel__expert": 2, "parallel__recompute": "full", **EXPERTS},
           "pipeline": {"parallel__pipeline": 2, "train__micro_batch": 2},
           "pipeline-experts": {"parallel__pipeline": 2, **EXPERTS}}
    four = {"hsdp": {"parallel__replicas": 2}, "fsdp-tensor": {"parallel__tensor": 2}}
    launch(_train_laid_out, 2, two, timeout_s=300)
    launch(_train_laid_out, 4, four, timeout_s=300)
    assert "torch" not in capfd.readouterr().err  # its library's advice, which is not for who trains
    _train_laid_out(0, {"one": {}, "one-of-experts": EXPERTS})
    for name in (*two, *four):
        one = "one-of-experts" if "experts" in name else "one"
        same(curve(name), curve(one))
        assert rows(name)[-1]["val_loss"] == pytest.approx(rows(one)[-1]["val_loss"], rel=1e-5)
        assert (here / name / "sample.txt").read_text() == (here / one / "sample.txt").read_text()
        ours, theirs = (load_run(run).model.state_dict() for run in (name, one))
        for parameter, tensor in theirs.items():
            torch.testing.assert_close(ours[parameter], tensor, rtol=1e-3, atol=1e-5)


def _begin_from(rank):
    """Each rank reads its share of the files through."""
    entry, read = checkpoint._entry, []
    checkpoint._entry = lambda path: read.append(path) or entry(path)
    trainer.train(tiny(train__run_dir="after", train__init_from="before", train__steps=1, train__batch_tokens=64),
                  show=False)
    theirs = {path.name for path in read if "before" in path.parts}
    assert theirs == [{"__0_0.distcp", "state.json"}, {".metadata"}][rank], theirs


def test_a_checkpoint_is_read_through_by_all_ranks_together(here):
    trainer.train(tiny(train__run_dir="before", train__steps=1), show=False)
    launch(_begin_from, 2)


def _train_on(rank, steps, settings):
    trainer.train(tiny(train__run_dir="moved", train__steps=steps, train__resume=steps > 3, optim__schedule="constant",
                       **WIDE, **settings), show=False)


def test_a_run_moves_between_layouts(here):
    """Saved on four ranks, resumed on two, one and four again, with optimizer state, in other layouts."""
    for world_size, steps, settings in ((4, 3, {"parallel__tensor": 2}), (2, 6, {"parallel__pipeline": 2}), (1, 9, {}),
                                        (4, 12, {"parallel__replicas": 2})):
        if world_size == 1:
            _train_on(0, steps, settings)
        else:
            launch(_train_on, world_size, steps, settings, timeout_s=300)
    trainer.train(tiny(train__run_dir="still", train__steps=12, optim__schedule="constant", **WIDE), show=False)
    same(curve("moved"), curve("still"))
