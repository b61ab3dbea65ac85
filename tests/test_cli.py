"""The command line: help worth reading, one line for every mistake, and streams that end well."""

import dataclasses
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys

import pytest
from tiny_run import environment, nanomai, tiny, write_tiny

from nanomai import cli, machine, trainer
from nanomai.cli import main
from nanomai.config import Config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where one run lies, in runs/tiny."""
    folder, before = tmp_path_factory.mktemp("cli"), os.getcwd()
    os.chdir(folder)
    write_tiny(folder)
    trainer.train(tiny(), show=False)
    os.chdir(before)
    return folder


@pytest.fixture(autouse=True)
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(machine, "matmul_peak", lambda *_: 1e11)
    return folder


def output(capsys, *arguments):
    assert main(list(arguments)) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


# --- Help -------------------------------------------------------------------------------------------------------------


def help_of(capsys, *command):
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert not stop.value.code
    return capsys.readouterr().out


def test_help_names_every_command(capsys):
    for arguments in ([], ["--help"], ["-h"], ["help"]):
        usage = output(capsys, *arguments)
        assert all(re.search(rf"^  {command} ", usage, re.MULTILINE) for command in cli.COMMANDS)


def described(text, flag):
    """The words that follow a flag and what it takes, without its default."""
    found = re.search(rf"--{re.escape(flag)}[ ,]+\S+(.*?)(?=\n\W*--|╰|\Z)", text, re.DOTALL)
    assert found, f"--{flag} is missing"
    return re.sub(r"\(default:.*", "", " ".join(found[1].replace("│", " ").split())).strip()


def flags(kind, name):
    """The flags of a section and of the sections in it."""
    for field in dataclasses.fields(kind):
        inner = field.default_factory
        if dataclasses.is_dataclass(inner):
            yield from flags(inner, f"{name}.{field.name}")
        else:
            yield f"{name}.{field.name}".replace("_", "-")


@pytest.mark.parametrize("command", ["train", "prepare"])
def test_every_setting_has_its_help(command, capsys):
    text = help_of(capsys, command, "tiny.yaml")
    for section in dataclasses.fields(Config):
        if section.name == "name":
            continue
        for flag in flags(section.default_factory, section.name):
            assert len(described(text, flag)) > 8, f"--{flag} has no help"
    assert "(default: 12)" in text  # the file's own value


@pytest.mark.parametrize("command, kind", [("sample", cli.Sample), ("eval", cli.Eval)])
def test_every_option_has_its_help(command, kind, capsys):
    text = help_of(capsys, command)
    assert "A run folder, or a name in runs/" in text
    for field in dataclasses.fields(kind):
        if field.name != "run":
            assert len(described(text, field.name.replace("_", "-"))) > 8, f"--{field.name} has no help"


def test_help_and_mistakes_need_no_torch():
    script = ("import sys, nanomai\n"
              "from nanomai.cli import main\n"
              "for arguments in ('--help', 'train --help', 'sample --help', 'trian', 'train nano --x', 'eval',\n"
              "                  'sample x --top-p 2'):\n"
              "    try:\n"
              "        main(arguments.split())\n"
              "    except SystemExit:\n"
              "        pass\n"
              "print({'torch', 'numpy', 'tiktoken'} & set(sys.modules))")
    done = subprocess.run([sys.executable, "-c", script], env=environment(), capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "set()", done.stderr


def test_threads_do_not_spin(monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    main(["--help"])
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    main(["--help"])
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"  # who asks for it gets it


# --- train and prepare ------------------------------------------------------------------------------------------------


def test_knots_through_flags(capsys):
    output(capsys, *"train tiny.yaml --train.steps 4 --train.batch-tokens 0 256 2 512 --optim.lr 0 1e-3 3 1e-2".split())
    saved = trainer.load_config("runs/tiny-2/config.yaml")
    assert (saved.train.batch_tokens, saved.optim.lr) == ({0: 256, 2: 512}, {0: 1e-3, 3: 1e-2})


def test_prepare(capsys):
    first, second = (output(capsys, *"prepare tiny.yaml --data.val-fraction 0.2".split()) for _ in range(2))
    assert re.fullmatch(r"data/text-\w{12}: tokenizer of 257 tokens, [\d,]{5,} train tokens, [\d,]{5,} val tokens",
                        first.splitlines()[-1])
    assert second == first.splitlines()[-1] + "\n"  # found, without a progress bar


def test_the_commands_that_a_run_prints_work_as_printed(here, tmp_path):
    """From a run with changed settings and a blank in its folder's name, in a shell, with `nanomai` in the PATH."""
    shim = tmp_path / "nanomai"
    shim.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m nanomai "$@"\n')
    shim.chmod(0o755)
    flags = ["--train.run-dir", "my run", "--train.steps", "3", "--data.val-fraction", "0.3"]
    done = nanomai("train", "tiny.yaml", *flags, cwd=here)
    assert done.returncode == 0, done.stderr
    commands = [line.partition("  #")[0].strip() for line in done.stdout.partition("next:\n")[2].splitlines()]
    assert [command.split()[1] for command in commands] == ["sample", "eval", "train"]
    for command in commands:
        next_one = subprocess.run(command, shell=True, cwd=here, capture_output=True, text=True,
                                  env=environment(PATH=f"{tmp_path}:{os.environ['PATH']}"))
        assert next_one.returncode == 0, (command, next_one.stderr)
    assert len((here / "my run" / "metrics.jsonl").read_text().splitlines()) == 6 + 2


# --- sample and eval --------------------------------------------------------------------------------------------------


def test_samples_repeat_by_their_seed(capsys):
    ask = ["sample", "tiny", "--prompt", "the cat", "--max-tokens", "12"]
    first = output(capsys, *ask, "--seed", "3")
    assert first.startswith("the cat") and output(capsys, *ask, "--seed", "3") == first
    assert output(capsys, *ask, "--seed", "4") != first
    two = output(capsys, *ask, "--seed", "3", "--samples", "2")
    assert two.startswith(f"--- 1 ---\n{first}--- 2 ---\nthe cat")
    greedy = [output(capsys, *ask, "--temperature", "0") for _ in range(2)]
    assert greedy[0] == greedy[1]
    assert output(capsys, *ask[:1], *ask[2:], "runs/tiny", "--seed", "3") == first  # options may come first


def test_a_prompt_longer_than_the_context_is_announced(capsys):
    assert main(["sample", "tiny", "--prompt", "x" * 40, "--max-tokens", "3"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("x" * 40)
    assert err == "nanomai: the prompt has 41 tokens and the context 32: its end is used\n"


def test_eval(capsys, here):
    table = json.loads(output(capsys, "eval", "runs/tiny", "--json"))
    assert set(table) == {"loss", "bits_per_byte", "tokens", "bytes", "gzip -9", "xz -9"}
    last = json.loads((here / "runs/tiny/metrics.jsonl").read_text().splitlines()[-1])
    assert table["loss"] == pytest.approx(last["val_loss"], rel=1e-6)
    printed = output(capsys, "eval", "tiny")
    assert f"bits_per_byte  {table['bits_per_byte']:.4f}" in printed and f"tokens  {table['tokens']:,}" in printed


def test_eval_of_a_text(capsys, here):
    (here / "a.txt").write_text("the cat sat on a mat " * 5)
    table = json.loads(output(capsys, "eval", "tiny", "--text", "a.txt", "--json"))
    assert (table["tokens"], table["bytes"]) == (105, 105) and 0 < table["bits_per_byte"] < 8.1
    (here / "b.txt").write_bytes(b"caf\xe9")
    (here / "c.txt").write_bytes(b"")
    for message in ("b.txt is not UTF-8 text (byte 3)", "c.txt is empty: there is nothing to measure",
                    "d.txt: No such file or directory"):
        assert main(["eval", "tiny", "--text", message[:5]]) == 1
        assert capsys.readouterr().err == f"nanomai: {message}\n"


@pytest.mark.parametrize("tokenizer", ["bpe", "bytes"])
def test_eval_where_the_corpus_has_changed(capsys, here, tokenizer):
    output(capsys, *f"train tiny.yaml --train.steps 1 --train.run-dir {tokenizer}".split(),
           *f"--data.tokenizer {tokenizer} --model.vocab-size 290".split())
    (here / "text/more.txt").write_text("quite other words, from which other tokens are learned " * 99)
    try:
        assert main(["eval", tokenizer]) == 1
    finally:
        (here / "text/more.txt").unlink()
    assert capsys.readouterr().err.splitlines()[-1] == (
        "nanomai: corpus 'text' has changed since this run; measure on --text FILE")


# --- Streams that end -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command, inside", [
    ("train tiny.yaml", "nanomai.trainer.prepare"), ("prepare tiny.yaml", "nanomai.preparation.prepare"),
    ("sample tiny", "nanomai.runs.load_run"), ("eval tiny", "nanomai.runs.load_run")])
def test_ctrl_c_is_one_line(command, inside, capsys, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(inside, stop)
    assert main(command.split()) == 130
    assert capsys.readouterr().err == "nanomai: stopped\n"


def start_sample(**more):
    command = [sys.executable, "-m", "nanomai", "sample", "tiny", "--prompt", "é", "--max-tokens", "1000000"]
    # a suite that runs in the background of a shell has inherited an ignored Ctrl-C; a person at a terminal has not
    return subprocess.Popen(command, env=environment(**more), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


def test_sample_streams_until_ctrl_c():
    process = start_sample(PYTHONIOENCODING="ascii")
    assert process.stdout.read(20).startswith(b"?")  # it comes while the rest is being written; é cannot be shown
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, b"nanomai: stopped\n") and out.isascii()


def test_a_closed_pipe_ends_a_sample_quietly():
    process = start_sample()
    process.stdout.read(5)
    process.stdout.close()
    assert (process.stderr.read(), process.wait(timeout=60)) == (b"", 0)


def test_a_closed_pipe_does_not_end_training(here):
    command = [sys.executable, *"-u -m nanomai train tiny.yaml --train.run-dir unheard --train.sample-every 1".split()]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert (process.stderr.read(), process.wait(timeout=120)) == (b"", 0)
    assert (here / "unheard/sample.txt").exists()


def test_training_speaks_to_a_terminal_without_utf8(capsys, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert main("train tiny.yaml --train.run-dir plain --train.sample-every 4 --train.sample-prompt é".split()) == 0
    terminal.flush()
    assert b"step 4 writes" in terminal.buffer.getvalue() and b"\n?" in terminal.buffer.getvalue()
