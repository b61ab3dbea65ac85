"""What every test shares: one CPU thread, so that tests that run side by side do not wait for one another."""

import importlib.util
import os
import sys

# Read when torch is first imported, here and in every process that a test starts.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest

# Triton has wheels for Linux only.
NEED_TRITON = ["test_triton_*.py", "test_exercises_first_kernels.py", "test_exercises_matmul_flash.py",
               "test_exercises_fused_cross_entropy.py"]
collect_ignore_glob = [] if importlib.util.find_spec("triton") else NEED_TRITON


@pytest.fixture(autouse=True)
def one_thread():
    """Training sets torch's threads for the whole process; the next test must not inherit them."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="module")
def graphs_of_this_file():
    """What other files have compiled in this process counts against the limit of graphs for one piece of code."""
    if dynamo := sys.modules.get("torch._dynamo"):
        dynamo.reset()


@pytest.fixture(scope="session")
def dynamo_knows_torch():
    """The first compilation of a process lists torch's functions, once for all; what is patched then stays unknown."""
    import torch

    torch.compile(lambda x: x + 1, backend="eager")(torch.zeros(1))


@pytest.fixture
def poisoned(dynamo_knows_torch, monkeypatch):
    """What a kernel's launcher allocates holds NaN, so that an element that no program writes shows."""
    import torch

    for name in ("empty", "empty_like"):
        plain = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, plain=plain, **k: plain(*a, **k).fill_(torch.nan))
