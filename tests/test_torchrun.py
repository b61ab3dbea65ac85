"""Several ranks under a real torchrun: the same numbers as one, one voice, and no rank that waits for ever."""

import os
import signal
import subprocess
import sys
import time

import pytest
from tiny_run import curve, environment, nanomai, tiny, write_tiny

from nanomai import data, trainer
from nanomai.parallel.launch import launch

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
    job = subprocess.Popen([*TORCHRUN, "train", "tiny.yaml", "--train.steps", "3000", "--optim.schedule", "constant"],
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
    }.items():
        began = time.monotonic()
        failed = torchrun("train", "tiny.yaml", *flags)
        assert failed.returncode != 0 and time.monotonic() - began < 60
        said = [line for line in failed.stderr.splitlines() if line.startswith(("nanomai:", "nanomai ("))]
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


def test_different_token_counts_and_refusals_on_two_ranks(here):
    (here / "hollow").mkdir()
    launch(_use_every_rank, 2)
    _train_masked(0, "one")
    same(curve("two"), curve("one"))
