"""The scripts in scale_configs/launch/: what they ask of a cluster, and their command lines, run here on two ranks."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny_run import ROOT, curve, environment, write_tiny

SLURM = ROOT / "scale_configs/launch/slurm.sh"
PYTORCHJOB = ROOT / "scale_configs/launch/pytorchjob.yaml"


@pytest.fixture(autouse=True)
def path(tmp_path, monkeypatch):
    """A PATH whose torchrun is this Python's, with Slurm's two commands as one machine has them."""
    write_tiny(tmp_path)
    monkeypatch.chdir(tmp_path)
    for name, line in {"torchrun": f'exec "{sys.executable}" -m torch.distributed.run "$@"', "srun": 'exec "$@"',
                       "scontrol": 'if [ "$1" = show ]; then echo localhost; else echo "$@" > requeued; fi'}.items():
        (tmp_path / "bin" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    return f"{tmp_path / 'bin'}:{os.environ['PATH']}"


def test_slurm(path):
    """Out of time, it saves and queues itself again; the second time it ends by itself."""
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?", SLURM.read_text(), re.M))
    seconds = int(re.fullmatch(r"B:TERM@(\d+)", asked["signal"])[1])
    assert asked["ntasks-per-node"] == "1" and {"requeue", "nodes", "gpus-per-node", "time"} <= asked.keys()
    assert int(re.search(r"SHUTDOWN_TIMEOUT=(\d+)", SLURM.read_text())[1]) < seconds
    given = environment(PATH=path, SLURM_JOB_ID=str(os.getpid()), SLURM_JOB_NODELIST="here", SLURM_NNODES="1",
                        SLURM_GPUS_ON_NODE="2")
    for steps, restarts in (("3000", "0"), (None, "1")):
        if steps is None:
            steps = str(len(curve("run")) + 5)
        flags = f"--train.run-dir run --optim.schedule constant --train.steps {steps}".split()
        script = subprocess.Popen(
            ["bash", SLURM, "tiny.yaml", *flags],
            env=given | {"SLURM_RESTART_COUNT": restarts}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if restarts == "0":
            while not re.match(r"\[default0\]:step ", script.stdout.readline()):
                assert script.poll() is None
            script.send_signal(signal.SIGTERM)
        out = script.communicate(timeout=90)[0]
        assert Path("requeued").exists() and (script.returncode == 0) == (restarts == "1"), out
    assert Path("requeued").read_text() == f"requeue {os.getpid()}\n"
    assert "resuming run/checkpoints/step-" in out
    assert [row["step"] for row in curve("run")] == list(range(1, int(steps) + 1))
    assert any("resuming" in log.read_text() for log in Path("logs", str(os.getpid())).rglob("0/stdout.log"))


def test_pytorchjob(path):
    """The command that each pod runs, with what the operator derives from the rest of the file."""
    job = yaml.safe_load(PYTORCHJOB.read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    policy, worker = job["spec"]["elasticPolicy"], job["spec"]["pytorchReplicaSpecs"]["Worker"]
    assert policy["minReplicas"] <= worker["replicas"] <= policy["maxReplicas"]
    [pod] = worker["template"]["spec"]["containers"]
    given = {entry["name"]: entry["value"] for entry in pod["env"]}
    assert int(given["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < worker["template"]["spec"]["terminationGracePeriodSeconds"]
    assert f"--nproc-per-node={pod['resources']['limits']['nvidia.com/gpu']}" in pod["command"]
    given |= {"PET_NNODES": "1:1", "PET_RDZV_BACKEND": policy["rdzvBackend"],
              "PET_RDZV_ENDPOINT": "localhost:0", "PET_MAX_RESTARTS": str(policy["maxRestarts"])}
    here = {"llama-3-8b": "tiny.yaml", "--nproc-per-node=8": "--nproc-per-node=2"}
    command = [here.get(word, word) for word in pod["command"]]
    done = subprocess.run(command, env=environment(PATH=path, **given), capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(curve("runs/llama-3-8b")) == 12 and done.stdout.count("[default0]:step 12/12") == 1
    assert {log.parent.name for log in Path("logs").rglob("stdout.log")} == {"0", "1"}
