"""Ranks that die, hang or lag under a real torchrun: the run goes on from its last checkpoint, as if unbroken."""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from tiny_run import ROOT, curve, environment, rows, tiny, write_tiny
from torch.multiprocessing import ProcessExitedException

from nanomai import checkpoint, data, machine, trainer
from nanomai.parallel.launch import launch

STEPS, EVERY = 60, 3
COMMAND = re.search(r"^torchrun --nproc_per_node=2 --max-restarts.*", (ROOT / "README.md").read_text(), re.M)[0]
KEEP_ALL = ["--train.checkpoint-every", str(EVERY), "--train.keep-checkpoints", "100"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    write_tiny(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Job:
    """The README's torchrun of a few ranks, whose output is collected while it runs."""

    def __init__(self, ranks, *flags, restarts=0):
        here = {"torchrun": f"{sys.executable} -m torch.distributed.run", "--nproc_per_node=2":
                f"--nproc_per_node={ranks}", "--max-restarts=3": f"--max-restarts={restarts}", "nano": "tiny.yaml"}
        command = " ".join(here.get(word, word) for word in COMMAND.split()).split()
        self.n, self.lines = ranks, []
        self.process = subprocess.Popen([*command, *flags], text=True, env=environment(PYTHONUNBUFFERED="1"),
                                        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.reader = threading.Thread(target=lambda: self.lines.extend(iter(self.process.stdout.readline, "")))
        self.reader.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in [*self.ranks(), self.process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self.process.wait()
        self.reader.join()

    @property
    def output(self):
        return "".join(self.lines)

    def ranks(self):
        """The processes that torchrun has started, which have not ended."""
        listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,stat="], capture_output=True, text=True, check=True)
        found = [line.split() for line in listed.stdout.splitlines()]
        return [int(pid) for pid, parent, state in found if parent == str(self.process.pid) and state[0] != "Z"]

    def until(self, happens, seconds=120):
        deadline = time.monotonic() + seconds
        while not (found := happens()):
            assert time.monotonic() < deadline and self.process.poll() is None, self.output
            time.sleep(0.002)
        return found

    def ended(self, seconds=240):
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still there:\n{self.output}")
        self.reader.join()
        return code


def logged(run):
    """How many lines of metrics there are."""
    path = Path(run, "metrics.jsonl")
    return path.read_text().count("\n") if path.exists() else 0


def contents(run):
    """The checksums of every rank's tensors in every checkpoint, after each has been verified."""
    found = {}
    for path in sorted(Path(run, "checkpoints").glob("step-*")):
        checkpoint.verify(path)
        files = json.loads((path / "manifest.json").read_text())["files"]
        found[path.name] = {name: entry for name, entry in files.items() if name.endswith(".distcp")}
    return found


def alive(pid):
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return state not in ("", "Z")


# --- Killed -----------------------------------------------------------------------------------------------------------


def kill(job, what, draw, killed):
    """Kills `what` at a random instant of the steps, or while a checkpoint is being written; returns the ranks."""
    ranks = job.until(lambda: len(found := job.ranks()) == job.n and not killed & set(found) and found)
    begun, left = logged("broken"), being_written()
    job.until(lambda: logged("broken") != begun)  # it is cut back by a start, and grows with the steps
    if what == "saving":
        job.until(lambda: being_written() - left)
        time.sleep(draw.uniform(0, 0.02))
    else:
        time.sleep(draw.uniform(0, 0.4))
    os.kill(job.process.pid if what == "launcher" else draw.choice(ranks), signal.SIGKILL)
    return set(ranks)


def being_written():
    with contextlib.suppress(FileNotFoundError):  # it is whole by now
        return {(path.name, path.stat().st_ino) for path in Path("broken/checkpoints").glob(".writing-*")}
    return set()


def kill_and_resume(kills, seed, steps=STEPS):
    """Four ranks, started again only where their launcher was killed; every checkpoint is as if nothing was."""
    draw, size = random.Random(seed), ["--train.steps", str(steps)]
    with Job(4, "--train.run-dir", "unbroken", *KEEP_ALL, *size) as job:
        assert job.ended() == 0, job.output
    left = list(kills)
    while True:
        with Job(4, "--train.run-dir", "broken", *KEEP_ALL, *size, restarts=len(kills)) as job:
            killed = set()
            while left:
                killed |= (orphans := kill(job, what := left.pop(0), draw, killed))
                if what == "launcher":
                    deadline = time.monotonic() + 10
                    while any(map(alive, orphans)):
                        assert time.monotonic() < deadline, "ranks that outlive torchrun write into the next one's run"
                        time.sleep(0.1)
                    break
            else:
                assert job.ended() == 0, job.output
                break
        contents("broken")
    assert curve("broken") == curve("unbroken")
    assert contents("broken") == contents("unbroken")
    assert not list(Path("broken/checkpoints").glob(".writing-*"))


def test_kill_9_of_a_rank_while_saving_and_of_the_launcher():
    kill_and_resume(kills=["rank", "saving", "launcher"], seed=1)


@pytest.mark.soak
@pytest.mark.parametrize("seed", [2, 3, 4, 5])
def test_kill_9_at_many_random_instants(seed):
    kills = ["rank", "saving", "launcher", "rank", "saving"]
    random.Random(seed).shuffle(kills)
    kill_and_resume(kills, seed, steps=2 * STEPS)


def test_a_restart_that_would_begin_anew_is_refused():
    with Job(2, "--train.no-resume", restarts=1) as job:
        assert job.ended() != 0
    said = [line for line in job.lines if line.startswith("nanomai")]
    assert set(said) - {"nanomai FAILED\n"} == {
        "nanomai: torchrun --max-restarts would begin this run anew after a failure; add --train.resume, which goes on "
        "from the newest checkpoint and begins where there is none\n"}, job.output


# --- Late -------------------------------------------------------------------------------------------------------------


def test_a_rank_that_stands_still_is_named_and_the_run_goes_on():
    """Stopped, it cannot even say that it hangs. It comes to itself, but only torchrun's restart helps the others."""
    with Job(2, *KEEP_ALL, "--train.steps", str(STEPS), "--train.hang-timeout", "3", restarts=1) as job:
        job.until(lambda: [*Path("runs/tiny/checkpoints").glob("step-*")])  # one that is whole
        stopped = max(job.ranks())
        os.kill(stopped, signal.SIGSTOP)
        line = job.until(lambda: [line for line in job.lines if "train.hang_timeout" in line])[0]
        os.kill(stopped, signal.SIGCONT)
        assert job.ended() == 0, job.output
    assert re.match(r"nanomai: no step has ended for 3 s \(train.hang_timeout\): rank [01]: gives no sign of life; "
                    r"rank [01]: waits for other ranks in \w+\.py:\d+ \(\w+\) after step \d+$", line), line
    assert "resuming runs/tiny/checkpoints/step-" in job.output
    assert [row["step"] for row in curve("runs/tiny")] == list(range(1, STEPS + 1))


def _train_late(rank):
    """Rank 1 is slow at products and slow with its data, and at the seventh batch it never ends."""
    make_batch, batches = data.make_batch, []

    def late(*arguments):
        batches.append(time.sleep(0.4 * rank))
        if rank and len(batches) == 7:
            time.sleep(100)
        return make_batch(*arguments)

    data.make_batch, machine.matmul_peak = late, lambda *_: 1e11 / (1 + rank)
    trainer.train(tiny(train__run_dir="late", train__eval_every=4, train__hang_timeout=3))


def test_ranks_that_are_late_are_measured_and_named(capfd):
    with pytest.raises(ProcessExitedException):
        launch(_train_late, 2)
    out, err = capfd.readouterr()
    assert "warning: rank 1 needs 1.33 times the median rank's time for a matrix product" in out
    assert re.search(r"warning: rank 1 waits 0\.\d\d s for its data in a step of 0\.\d\d s, the median", out), out
    measured = next(row for row in rows("late") if "val_loss" in row)
    assert measured["ranks/slowest_product"] == 1.333 and measured["ranks/slowest_product_rank"] == 1
    assert measured["ranks/latest_data"] > 0.2 and measured["ranks/latest_data_rank"] == 1
    said = [line for line in err.splitlines() if line.startswith("nanomai")]
    assert len(said) == 1 and re.match(
        r"nanomai: no step has ended for 3 s \(train.hang_timeout\): rank 1: is in data\.py:\d+ \(\w+\) after step "
        r"(\d); rank 0: waits for other ranks in trainer\.py:\d+ \(step\) after step \1$", said[0]), err


def _train_quickly(run):
    """Only the disk takes long."""
    trainer.plot_loss, trainer.Trainer._write = lambda *_: None, lambda *_: ""
    trainer.train(tiny(train__run_dir=run, train__hang_timeout=4, train__checkpoint_every=6), show=False)


def _slow_disk(rank):
    """Summing up what rank 1 wrote takes longer than the watchdog waits, and gets on all the while."""
    entry = checkpoint._entry

    def slowly(path):
        for _ in range(40 * rank):
            time.sleep(0.2)
        return entry(path)

    checkpoint._entry = slowly
    _train_quickly("slow")


def _dead_disk(rank):
    """The first save of rank 1 never comes to its end."""
    fsync = os.fsync
    os.fsync = lambda file: time.sleep(100 * rank) or fsync(file)
    _train_quickly("dead")


def test_a_slow_disk_is_waited_for_and_a_dead_one_is_named(capfd):
    launch(_slow_disk, 2)
    assert [*contents("slow")] == ["step-00000006", "step-00000012"]
    with pytest.raises(ProcessExitedException):
        launch(_dead_disk, 2)
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("nanomai")]
    assert len(said) == 1 and re.match(
        r"nanomai: no step has ended for 4 s \(train.hang_timeout\): rank 1: is in checkpoint\.py:(\d+) \(_write\) "
        r"after step 12; rank 0: waits for other ranks in checkpoint\.py:\1 \(_write\) after step 12$", said[0]), said
