"""What goes wrong from outside: kills, full disks, damaged and hostile files, and settings that cannot work.

Whatever happens, a checkpoint that was saved stays good, the resumed run is the unbroken one bit for bit, and the
person at the terminal reads one line that says what to do.
"""

import contextlib
import json
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import time
from hashlib import blake2b
from pathlib import Path

import pytest
from tiny_run import curve, environment, tiny, weights, write_tiny

from nanomai import checkpoint, machine, state, trainer
from nanomai.cli import main
from nanomai.trainer import train

STEPS, EVERY = 60, 3
FLAGS = f"--train.steps {STEPS} --train.checkpoint-every {EVERY} --train.run-dir broken --train.resume".split()


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    write_tiny(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine, "matmul_peak", lambda *_: 1e11)
    monkeypatch.setattr(trainer, "plot_loss", lambda *_: None)
    return tmp_path


def said(capsys):
    """The one line of an error."""
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    lines = err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("nanomai: "), err
    return lines[0].removeprefix("nanomai: ")


# --- Stopped ----------------------------------------------------------------------------------------------------------


def start(*flags):
    return subprocess.Popen([sys.executable, "-u", "-m", "nanomai", "train", "tiny.yaml", *flags], text=True,
                            env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_saves_and_says_how_to_go_on(number):
    train(tiny(train__run_dir="unbroken", train__steps=STEPS), show=False)
    process = start(*FLAGS)
    while not process.stdout.readline().startswith("step "):
        assert process.poll() is None, process.stderr.read()
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    done = len(curve("broken"))
    assert process.returncode == 130 and done < STEPS
    assert err == "\nfinishing this step and saving; once more stops at once, without saving\n"
    assert out.splitlines()[-3:] == [f"{number.name}: saved broken/checkpoints/step-{done:08d}", "go on with",
                                     "  nanomai train broken --train.resume"]
    assert main(["train", "broken", "--train.resume"]) == 0
    assert curve("broken") == curve("unbroken") and weights("broken") == weights("unbroken")


def kill_and_resume(seed, kills):
    """kill -9 at random instants: of loading, preparing, training and saving."""
    draw = random.Random(seed)
    train(tiny(train__run_dir="unbroken", train__steps=STEPS), show=False)
    folder = ["--data.folder", f"data-{seed}"]  # prepared anew, so that kills meet that too
    for number in range(kills):
        process = start(*FLAGS, *folder)
        if number:  # the first kill falls anywhere from the start on
            while process.poll() is None and not process.stdout.readline().startswith("writing to"):
                pass
        time.sleep(draw.uniform(0, 2.5 if number == 0 else 1.2))
        process.kill()
        process.communicate()
        if Path("broken/metrics.jsonl").exists():
            saved, complaints = checkpoint.newest(Path("broken/checkpoints"))
            logged = [line for line in Path("broken/metrics.jsonl").read_text().split("\n")[:-1] if '"lr"' in line]
            lost = len(logged) - (int(saved.name[5:]) if saved else 0)
            assert complaints == [] and lost <= 2 * EVERY - 1  # all between two, where the second was being saved
    assert main(["train", "tiny.yaml", *FLAGS, *folder]) == 0
    assert curve("broken") == curve("unbroken") and weights("broken") == weights("unbroken")
    assert not list(Path("broken/checkpoints").glob(".writing*"))


def test_kill_9_at_random_instants():
    kill_and_resume(seed=1, kills=3)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(2, 6))
def test_kill_9_at_many_random_instants(seed):
    kill_and_resume(seed, kills=5)


KILL_POINTS = {  # what is being called, on what, and the step that survives
    "after the tensors": ("torch.distributed.checkpoint.FileSystemWriter.finish", ".writing-step-00000004", 2),
    "before the manifest": ("nanomai.checkpoint.write_atomically", ".writing-step-00000004/manifest.json", 2),
    "before the rename": ("os.rename", ".writing-step-00000004", 2),
    "before the one that is superseded goes": ("shutil.rmtree", "step-00000002", 6),
}


@pytest.mark.parametrize("point", KILL_POINTS)
def test_kill_9_while_saving(point):
    name, on, survives = KILL_POINTS[point]
    home, _, function = name.rpartition(".")
    script = (f"import nanomai.checkpoint, os, shutil, signal, torch.distributed.checkpoint\n"
              f"from tiny_run import tiny\n"
              f"real = {name}\n"
              f"def deadly(*arguments, **options):\n"
              f"    if {on!r} in ' '.join(str(getattr(a, 'path', a)) for a in arguments):\n"
              f"        os.kill(os.getpid(), signal.SIGKILL)\n"
              f"    return real(*arguments, **options)\n"
              f"{home}.{function} = deadly\n"
              f"nanomai.train(tiny(train__run_dir='broken', train__checkpoint_every=2), show=False)")
    killed = subprocess.run([sys.executable, "-c", script], env=environment(PYTHONPATH=":".join(sys.path)))
    assert killed.returncode == -signal.SIGKILL
    path, complaints = checkpoint.newest(Path("broken/checkpoints"))
    assert (path.name, complaints) == (f"step-{survives:08d}", [])
    train(tiny(train__run_dir="unbroken"), show=False)
    train(tiny(train__run_dir="broken", train__resume=True), show=False)
    assert curve("broken") == curve("unbroken") and weights("broken") == weights("unbroken")


# --- A disk that fills ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def largest_file(n_bytes):
    """Every write beyond fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_fills_while_preparing(capsys):
    with largest_file(8192):
        assert main(["prepare", "tiny.yaml"]) == 1
    assert said(capsys).endswith("/train-0-00000.bin cannot be written: File too large")
    assert main(["prepare", "tiny.yaml"]) == 0


def test_a_disk_that_fills_while_saving(capsys):
    train(tiny(train__run_dir="unbroken"), show=False)
    train(tiny(train__run_dir="broken", train__steps=4, optim__schedule="constant"), show=False)
    before = checkpoint.newest(Path("broken/checkpoints"))
    capsys.readouterr()
    with largest_file(150_000):
        assert main(["train", "tiny.yaml", "--train.run-dir", "broken", "--train.resume"]) == 1
    message = said(capsys)
    assert message.startswith("broken/checkpoints/step-00000012 cannot be written: ")
    assert message.endswith("; what was saved before is good")
    assert checkpoint.newest(Path("broken/checkpoints")) == before
    assert main(["train", "tiny.yaml", "--train.run-dir", "broken", "--train.resume"]) == 0


def test_a_disk_that_fills_while_logging(capsys, monkeypatch):
    train(tiny(train__run_dir="unbroken"), show=False)
    evaluate, limits = trainer.evaluate, contextlib.ExitStack()

    def fill_up(*arguments):  # at step 6, so that step 7 is written in part
        limits.enter_context(largest_file(Path("broken/metrics.jsonl").stat().st_size + 150))
        return evaluate(*arguments)

    with limits, monkeypatch.context() as patches:
        patches.setattr(trainer, "evaluate", fill_up)
        flags = "--train.run-dir broken --train.checkpoint-every 4 --train.eval-every 6"
        assert main(["train", "tiny.yaml", *flags.split()]) == 1
    assert said(capsys) == ("broken/metrics.jsonl cannot be written: File too large; free some space, then go on with "
                            "`nanomai train broken --train.resume`")
    assert Path("broken/metrics.jsonl").read_text()[-1] != "\n"  # the half line
    assert main(["train", "broken", "--train.resume"]) == 0
    assert curve("broken") == curve("unbroken")


# --- Files that are not what they seem --------------------------------------------------------------------------------


class Hostile:
    """Unpickled, it runs a command."""

    def __reduce__(self):
        return os.system, ("touch executed",)


def reseal(path):
    """Makes the manifest agree with what is there, as somebody who means harm would."""
    files = {p.name: {"bytes": p.stat().st_size, "blake2b": blake2b(p.read_bytes(), digest_size=16).hexdigest()}
             for p in path.iterdir() if p.name != "manifest.json"}
    (path / "manifest.json").write_text(json.dumps({"files": files}))


@pytest.mark.parametrize("file, sealed, message", [
    (".metadata", False, "runs/tiny has no usable checkpoint; runs/tiny/checkpoints/step-00000001: .metadata has"),
    (".metadata", True, "runs/tiny/checkpoints/step-00000001: .metadata is not a checkpoint's: it wants to run "
                        "posix.system"),
    ("__0_0.distcp", True, "runs/tiny/checkpoints/step-00000001 cannot be read: "),
])
def test_a_hostile_pickle_is_not_run(file, sealed, message, here, capsys):
    folder = train(tiny(train__steps=1), show=False).run_dir / "checkpoints/step-00000001"
    size = (folder / file).stat().st_size
    (folder / file).write_bytes(pickle.dumps(Hostile()).ljust(size if sealed else 0, b"."))
    if sealed:
        reseal(folder)
    for command in (["sample", "runs/tiny"], ["eval", "runs/tiny"],
                    ["train", "tiny.yaml", "--train.init-from", "runs/tiny"]):
        assert main(command) == 1
        assert said(capsys).startswith(message)
    assert not (here / "executed").exists()


def test_a_checkpoint_that_is_not_finite(capsys, monkeypatch):
    monkeypatch.setattr(trainer, "stream_text", lambda *_, **__: iter(["text"]))
    init = state.init_weights

    def spoiled(model, *arguments):
        init(model, *arguments)
        model.norm.weight.data[0] = float("inf")

    monkeypatch.setattr(state, "init_weights", spoiled)
    assert main(["train", "tiny.yaml", "--train.max-skipped", "2"]) == 1
    assert "2 steps in a row were refused, the last because the loss is nan; no checkpoint had been saved" in (
        capsys.readouterr().err)
    monkeypatch.setattr(state.SpikeGuard, "verdict", lambda *_: "as if it had let them through")
    assert main(["train", "tiny.yaml", "--train.steps", "1"]) == 0
    capsys.readouterr()
    for command in (["sample", "tiny-2"], ["eval", "tiny-2"], ["train", "runs/tiny-2", "--train.resume"]):
        assert main(command) == 1
        line = capsys.readouterr().err.splitlines()[-1]
        assert line == ("nanomai: runs/tiny-2/checkpoints/step-00000001: model/norm.weight holds numbers that are not "
                        "finite; delete this checkpoint to go back to the one before")


# --- The table of bad inputs ------------------------------------------------------------------------------------------


def yaml_with(old, new):
    text = Path("tiny.yaml").read_text()
    assert old in text
    Path("bad.yaml").write_text(text.replace(old, new))


BAD_YAML = {  # what is written in place of what, and the line that follows
    "wrong type": ("steps: 12", "steps: twelve", "bad.yaml:5: train.steps: 'twelve' is not a whole number"),
    "duplicate key": ("steps: 12", "steps: 12, steps: 13", "bad.yaml:5: train.steps is given twice (first on line 5)"),
    "unknown key": ("steps: 12", "stepz: 12", "bad.yaml:5: unknown setting 'train.stepz'; did you mean 'steps'?"),
    "heads": ("n_heads: 2, n_kv_heads: 1", "n_heads: 3, n_kv_heads: 2",
              "bad.yaml:1: model.n_kv_heads: n_kv_heads 2 must divide n_heads 3: each serves as many query heads"),
    "batch": ("batch_tokens: 256", "batch_tokens: 250", "bad.yaml:5: train.batch_tokens: batch_tokens 250 is not a "
              "multiple of the sequence length 32; the nearest is 256"),
}


@pytest.mark.parametrize("what", BAD_YAML)
def test_a_file_that_cannot_work(what, capsys):
    old, new, message = BAD_YAML[what]
    yaml_with(old, new)
    assert main(["train", "bad.yaml"]) == 1
    assert said(capsys) == message


BAD_COMMANDS = {
    "no such configuration": ("train nanoo", "no configuration 'nanoo': neither a .yaml file nor one of the "),
    "no such corpus": ("train tiny.yaml --data.corpus nowhere",
                       "corpus 'nowhere' does not exist; give `stdlib`, a file, a folder or hf:NAME"),
    "empty corpus": ("train tiny.yaml --data.corpus hollow",
                     "corpus 'hollow' holds no text; a folder is searched for "),
    "wrong type": ("train tiny.yaml --train.steps abc",
                   "--train.steps: invalid literal for int() with base 10: 'abc'"),
    "wrong choice": ("train tiny.yaml --train.dtype float16",
                     "invalid choice 'float16' for argument '--train.dtype'. "),
    "typo": ("train tiny.yaml --train.stepz 3", "Unrecognized options: --train.stepz, 3; did you mean --train.steps?"),
    "shorter typo": ("train tiny.yaml --train.step 3",
                     "Unrecognized options: --train.step, 3; did you mean --train.steps?"),
    "typo of an option": ("sample runs/tiny --tempreature 1",
                          "Unrecognized options: --tempreature, 1; did you mean --temperature?"),
    "typo of a command": ("trian nano", "no command 'trian'; did you mean 'train'?"),
    "heads": ("train tiny.yaml --model.n-kv-heads 3", "model: n_kv_heads 3 must divide n_heads 2: "),
    "batch": ("train tiny.yaml --train.batch-tokens 250",
              "batch_tokens 250 is not a multiple of the sequence length 32"),
    "knots": ("train tiny.yaml --train.batch-tokens 5 512 9 256",
              "train: batch_tokens {5: 512, 9: 256} must give its steps in rising order from 0"),
    "unwritable run folder": ("train tiny.yaml --train.run-dir tiny.yaml/run",
                              "tiny.yaml/run cannot be written: Not a directory; choose another --train.run-dir"),
    "unwritable data folder": ("train tiny.yaml --data.folder tiny.yaml/data",
                               "tiny.yaml/data/text-"),
    "vocabulary": ("train tiny.yaml --model.vocab-size 200",
                   "tokenizer 'bytes' has 257 tokens and the model only 200; set model.vocab_size to 257 or more"),
    "tokenizer": ("train tiny.yaml --data.tokenizer byte",
                  "unknown tokenizer 'byte'; did you mean 'bytes'? valid are bpe, bytes, "),
    "device": ("train tiny.yaml --train.device gpu", "device 'gpu' is not one of auto, cpu, cuda, mps"),
    "sequence": ("train tiny.yaml --train.sequence-length 99999 --train.batch-tokens 99999", "text has "),
    "epochs": ("train tiny.yaml --data.corpus text:1:0.1", "the run needs 96 samples and max_epochs allows "),
    "no such run": ("sample nothing", "no run 'nothing'; in runs/ there are bare"),
    "a run without a checkpoint": ("sample bare", "runs/bare has no usable checkpoint"),
    "which run": ("eval", "which run? `nanomai eval runs/nano`"),
    "which configuration": ("train", "which configuration? `nanomai train nano`, or a YAML file"),
    "out of range": ("sample bare --temperature=-1", "temperature -1.0 is out of range; see `nanomai sample --help`"),
    "a run that exists": ("train tiny.yaml --train.run-dir runs/bare", "runs/bare holds a run already; go on with "),
    "an unreadable config": ("sample torn", "runs/torn/config.yaml:2: not YAML: "),
}


@pytest.mark.parametrize("what", BAD_COMMANDS)
def test_a_command_that_cannot_work(what, capsys, here):
    command, message = BAD_COMMANDS[what]
    (here / "hollow").mkdir()
    (here / "runs/bare").mkdir(parents=True)
    (here / "runs/bare/config.yaml").write_text((here / "tiny.yaml").read_text())
    if what == "an unreadable config":
        (here / "runs/torn").mkdir(parents=True)
        (here / "runs/torn/config.yaml").write_text("model:\n  n_layers: {2")
    assert main(command.split()) == 1
    assert said(capsys).startswith(message)
