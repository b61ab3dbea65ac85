"""The measuring scripts run from end to end on the CPU, so that their first run on a GPU is not their first run."""

import gc
import json
import os
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import gpu, kernel_cases, kernel_report, kernels, scale_gpu, train_gpu, train_step

ROOT = Path(__file__).resolve().parent.parent


def test_kernels_measures_every_case(tmp_path):
    command = [sys.executable, "benchmarks/kernels.py", "--device", "cpu", "--tiny", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    rows = json.loads((tmp_path / "kernels-cpu-tiny.json").read_text())["rows"]
    measured = {(r["kernel"], r["column"]) for r in rows if r.get("ms", 0) > 0}
    assert measured >= {(c.kernel, column) for c in kernel_cases.tiny() for column in ("eager", "compiled", "ours")}
    assert {r["column"] for r in rows if "error" in r} <= {"varlen_attn"}  # that one has no CPU form


def test_out_of_time_is_said(tmp_path):
    done = subprocess.run([sys.executable, "benchmarks/kernels.py", "--device", "cpu", "--tiny", "--out", str(tmp_path),
                           "--seconds", "0"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "could not be measured" in done.stdout


def test_only_some_cases(tmp_path, monkeypatch, capsys):
    """They must not replace the results of all; and what is no case's name is an error that tells the names."""
    def measure_all(arguments, names, write):
        assert names == ["swiglu@tiny"]
        write({"bytes": 1, "operations": 1, "facts": {"name": "CPU"}}, kernels.error_rows(names[0], "not measured"))

    command = ["kernels.py", "--device", "cpu", "--tiny", "--out", str(tmp_path), "--only", "swiglu"]
    monkeypatch.setattr(kernels, "measure_all", measure_all)
    monkeypatch.setattr(sys, "argv", command)
    assert kernels.main() == 1
    assert {path.name for path in tmp_path.iterdir()} == {f"kernels-cpu-tiny-partial.{kind}" for kind in ("md", "json")}
    monkeypatch.setattr(sys, "argv", [*command, "nonsense"])
    with pytest.raises(SystemExit, match="2"):
        kernels.main()
    assert "no case begins with nonsense; there are: add_rms_norm@tiny; swiglu@tiny" in capsys.readouterr().err


def test_where_documents_end_is_sent_to_a_device_once(monkeypatch):
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    seen = []
    monkeypatch.setattr(varlen, "varlen_attn", lambda q, k, v, ends, *rest, **options: seen.append(ends) or q)
    attention = kernel_cases.varlen(torch.tensor([0, 3, 5]), 3)
    q = torch.empty(1, 2, 5, 4, device="meta")
    assert all(attention(q, q, q, None).shape == q.shape for _ in range(2))
    assert seen[0] is seen[1] and seen[0].device == q.device


def test_training_on_a_gpu_but_for_the_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(train_gpu, "RUNS", [("tiny", "causal"), ("tiny", "documents")])
    monkeypatch.setitem(train_gpu.VARIANTS, "documents", {"documents": (40, 24)})
    row = train_gpu.measure(train_gpu.SHAPES["tiny"], train_gpu.VARIANTS["documents"], "cpu", 0.0)
    assert row["steps"] >= 3 and row["tokens_per_second"] > 0
    assert train_gpu.run("", ["causal"], 100, tmp_path, "cpu") == 0
    text = (tmp_path / "train_step-cpu-partial.md").read_text()
    assert "| tiny | causal |" in text and "without document ids" in text
    assert train_gpu.run("", [""], 0, tmp_path, "cpu") == 1
    assert (tmp_path / "train_step-gpu.md").exists()  # all of the runs, and none of them said what it ran on


SMALL = {"train.micro_batch": 2, "train.sequence_length": 32, "model.n_layers": 1, "model.d_model": 32,
         "model.n_heads": 2, "model.n_kv_heads": 1, "model.head_dim": 16, "model.d_ff": 64, "model.vocab_size": 64}


def test_scale_on_a_gpu_but_for_the_gpu(tmp_path):
    variants = {name: scale_gpu.VARIANTS[name] for name in ("plain", "FSDP2, float8")}
    assert scale_gpu.run("cpu", 100, tmp_path, {"tiny": SMALL}, ("tiny",), variants) == 0
    rows = json.loads((tmp_path / "scale-cpu.json").read_text())
    assert rows["speed"]["tiny"].keys() == variants.keys() and rows["memory"]["tiny"]["seconds"] > 0
    row = rows["memory"]["tiny"] | {"peak": rows["memory"]["tiny"]["plan"]}  # as CUDA would count it
    assert "(+0.0%)" in scale_gpu.memory_line("tiny", row)
    assert scale_gpu.run("cpu", 0, tmp_path, {"tiny": SMALL}, ("tiny",), variants) == 1
    assert (tmp_path / "scale-gpu.md").read_text().count("no time left") == 3


def test_shapes_that_nobody_has(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_step.py", "--only", "nonsense"])
    with pytest.raises(SystemExit, match="2"):
        train_step.main()
    assert "no shape begins with nonsense; there are: shakespeare-0.8M, nano, " in capsys.readouterr().err


def test_training_runs_that_nobody_has(tmp_path, capsys):
    assert train_gpu.run("nonsense", [""], 100, tmp_path) == train_gpu.run("124M", ["nonsense"], 100, tmp_path) == 1
    assert "there are: 124M causal; 124M documents; " in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_model_that_did_not_fit_is_freed_before_the_next(monkeypatch):
    class Model:
        def __init__(self):
            self.itself = self  # as hooks do

    models = []

    def our_step(shape, *_, **__):
        assert not models or models[-1]() is None
        model = Model()
        models.append(weakref.ref(model))

        def step(model=model):
            if shape[7] > 1:
                raise torch.OutOfMemoryError

        return step, 1, None

    monkeypatch.setattr(train_step, "our_step", our_step)
    gc.disable()  # or chance may free it
    try:
        row = train_gpu.measure((*train_gpu.SHAPES["tiny"][:7], 4), {}, "cpu", 0.0)
    finally:
        gc.enable()
    assert len(models) == 3 and row["micro_batch"] == 1


def test_bars():
    def row(kernel, shape, column, which, ms, rate=1.0, unit="bytes", mib=1.0):
        return {"kernel": kernel, "shape": shape, "column": column, "pass": which, "ms": ms, "rate": rate,
                "unit": unit, "peak_mib": mib, "p20": ms, "p80": ms}

    rows = [row("swiglu", "Llama-3-8B", "ours", "forward", 1.0, rate=90.0),
            row("attention", "124M", "ours", "forward", 2.0), row("attention", "124M", "cuDNN", "forward", 1.0),
            row("linear_cross_entropy", "124M", "ours", "both", 1.0, mib=1.0),
            row("linear_cross_entropy", "124M", "eager", "both", 1.0, mib=8.0)]
    text = kernel_report.bars_table(kernel_report.Results({"bytes": 100.0, "operations": 100.0}, rows))
    assert "swiglu Llama-3-8B forward: share of the copy ceiling | 0.85 | 0.90 | met" in text
    assert "cuDNN's time / ours | 0.60 | 0.50 | missed by 17%" in text
    assert "eager's peak memory / ours | 4.00 | 8.00 | met" in text and "not measured" in text


def test_the_tests_for_a_gpu_are_found():
    """With the options of pyproject.toml put aside, as where its plugins are not installed."""
    groups = gpu.groups()
    assert {"attention 1", "attention 2", "adamw 1", "linear_cross_entropy 1", "others 1"} <= groups.keys()
    assert all("cuda" in test for group in groups.values() for test in group)
    assert max(map(len, groups.values())) <= gpu.TESTS


def test_what_needs_all_of_the_memory_runs_alone_at_the_end(tmp_path, monkeypatch):
    finished = []

    def run(tests, deadline):
        finished.append(tests[0])
        if finished.count("full") == 1 and tests == ["full"]:
            return "E torch.OutOfMemoryError: CUDA out of memory\n1 failed", 1
        return ("1 failed", 1) if tests == ["wrong"] else ("1 passed", 0)

    monkeypatch.setattr(gpu, "run", run)
    monkeypatch.setattr(gpu, "groups", lambda: {"others 1": ["large"], "swiglu 1": ["full"], "adamw 1": ["wrong"]})
    assert gpu.test(tmp_path, 0.0) == ["tests of adamw 1: 1 failed"]
    assert sorted(finished[:2]) == ["full", "wrong"] and finished[2:] == ["large", "full"]
    assert "== tests of swiglu 1: 1 passed" in (tmp_path / "gpu-tests.txt").read_text()


def test_a_run_of_tests_has_a_status_unless_time_is_up(monkeypatch):
    monkeypatch.setattr(gpu, "PYTEST", [sys.executable, "-c"])
    deadline = time.monotonic() + 60
    assert gpu.run(["print('said'); raise SystemExit(3)"], deadline) == ("said\n", 3)
    assert gpu.run(["import time; time.sleep(60)"], 0.0)[1] is None


def test_the_whole_of_it_without_a_gpu(tmp_path, monkeypatch, capsys):
    """Every part has its share of the time, and only what this run wrote is named."""
    results, calls = tmp_path / "benchmarks" / "results", []
    results.mkdir(parents=True)
    (results / "kernels-old.md").touch()
    os.utime(results / "kernels-old.md", (0, 0))

    def test(folder, deadline):
        (folder / "gpu-tests.txt").touch()
        return []

    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "test", test)
    monkeypatch.setattr(gpu.subprocess, "run", lambda command, **_: calls.append(command) or
                        subprocess.CompletedProcess(command, 0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--seconds", "58"])
    assert gpu.main() == 0
    assert [command[-1] for command in calls] == ["19.0", "12.0", "13.0"]
    assert "in benchmarks/results/gpu-tests.txt; all well" in capsys.readouterr().out
    for options in (["--help"], ["--nonsense"]):
        monkeypatch.setattr(sys, "argv", ["gpu.py", *options])
        with pytest.raises(SystemExit):
            gpu.main()
    assert len(calls) == 3
