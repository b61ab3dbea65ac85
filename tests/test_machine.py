"""Each rule of the table in machine.py, on machines that this one is not."""

import dataclasses
import re

import pytest
import torch

from nanomai import machine
from nanomai.config import Config, ConfigError, ModelConfig, ParallelConfig, TrainConfig
from nanomai.machine import describe, matmul_peak, pick_device, prepare_process, resolve, usable_cores
from nanomai.parallel.limits import check_batch

CPU, CUDA, MPS = (torch.device(name) for name in ("cpu", "cuda", "mps"))


def config(steps=10, batch_tokens=8192, d_model=128, **train) -> Config:
    settings = TrainConfig(steps=steps, batch_tokens=batch_tokens, **train)
    return Config(model=ModelConfig(d_model=d_model), train=settings)


@pytest.fixture
def pretend(monkeypatch):
    """pretend(cuda=True, bf16=True, ...) makes the library say so."""
    def change(cuda=False, mps=False, bf16=False, compiler=True, cores=4, ranks_here=None):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: int(cuda))
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16)
        for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
            monkeypatch.setattr(torch.cpu, name, lambda: bf16, raising=False)
        monkeypatch.setattr(machine.shutil, "which", lambda name: "/usr/bin/" + name if compiler else None)
        monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
        if ranks_here:
            monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks_here))
        else:
            monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    change()
    return change


# --- device


@pytest.mark.parametrize("there, expected", [({}, "cpu"), ({"mps": True}, "mps"), ({"cuda": True}, "cuda:0"),
                                             ({"cuda": True, "mps": True}, "cuda:0")], ids=str)
def test_the_best_device_there_is(pretend, there, expected):
    pretend(**there)
    assert str(pick_device("auto")) == expected
    assert str(pick_device("cpu")) == "cpu"


def test_each_process_of_a_machine_has_its_own_gpu(pretend, monkeypatch):
    pretend(cuda=True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert str(pick_device("auto")) == str(pick_device("cuda")) == "cuda:1"
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ConfigError, match=r"^process 2 of this machine has no GPU: there are 2; start as many "):
        pick_device("auto")
    assert str(pick_device("cpu")) == "cpu"


def test_several_processes_do_not_share_an_apple_gpu(pretend, monkeypatch):
    pretend(mps=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert str(pick_device("auto")) == "cpu"
    with pytest.raises(ConfigError, match=r"^device 'mps' is not available here"):
        pick_device("mps")


@pytest.mark.parametrize("wanted, message", [
    ("cuda", "device 'cuda' is not available here; use auto or cpu"),
    ("mps", "device 'mps' is not available here; use auto or cpu"),
    ("tpu", "device 'tpu' is not one of auto, cpu, cuda, mps")])
def test_a_device_that_was_asked_for_is_never_replaced(pretend, wanted, message):
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$") as caught:
        pick_device(wanted)
    assert caught.value.field == "train.device"


# --- the automatic settings


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
@pytest.mark.parametrize("bf16", [False, True])
def test_dtype(pretend, device, bf16):
    pretend(bf16=bf16)
    assert resolve(config(d_model=512), device).train.dtype == ("bfloat16" if bf16 else "float32")
    assert resolve(config(d_model=512), MPS).train.dtype == "float32"
    for asked in ("float32", "bfloat16"):
        assert resolve(config(dtype=asked), device).train.dtype == asked


def test_a_torch_without_the_cpu_checks(pretend, monkeypatch):
    pretend(bf16=True)
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.delattr(torch.cpu, name, raising=False)
    assert resolve(config(d_model=512), CPU).train.dtype == "float32"


def test_compile(pretend):
    long, short = config(d_model=512, steps=10**6), config(d_model=512, steps=1)
    assert resolve(long, CPU).train.compile == "on"
    assert resolve(short, CPU).train.compile == "off", "over before it pays"
    assert resolve(short, CUDA).train.compile == "on"
    assert resolve(long, MPS).train.compile == "off"
    pretend(compiler=False)
    assert resolve(long, CPU).train.compile == "off"
    assert resolve(short, CUDA).train.compile == "on", "triton brings its own compiler"
    for asked in ("on", "off"):
        assert resolve(config(compile=asked), CPU).train.compile == asked


@pytest.mark.parametrize("cores, ranks, threads", [(1, None, 1), (6, None, 6), (6, 2, 3), (6, 4, 1), (2, 8, 1)])
def test_threads(pretend, cores, ranks, threads):
    pretend(cores=cores, ranks_here=ranks)
    assert resolve(config(), CPU).train.threads == threads
    assert resolve(config(threads=5), CPU).train.threads == 5


@pytest.mark.parametrize("batch_tokens, world_size, micro_batch", [
    (8192, 1, 32),                     # 32 sequences of 256: all at once
    (16384, 1, 64), (32768, 1, 64),    # 16,384 tokens at most
    (256 * 130, 1, 44),                # 44, 44 and 42
    (256 * 67, 1, 34),                 # a prime: 34 and 33
    (32768, 4, 32), (256 * 12, 4, 3),  # of each rank's own share
    ({0: 256 * 12, 5: 256 * 18}, 1, 12), ({0: 256 * 64, 5: 256 * 128}, 2, 32)], ids=str)
def test_micro_batch(pretend, batch_tokens, world_size, micro_batch):
    resolved = resolve(config(batch_tokens=batch_tokens), CPU, world_size)
    assert resolved.train.micro_batch == micro_batch
    assert resolve(config(batch_tokens=batch_tokens, micro_batch=2), CPU, world_size).train.micro_batch == 2


@pytest.mark.parametrize("sequences, micro_batch", [(8, 4), (130 * 2, 52), (67 * 2, 2)])
def test_the_micro_batches_of_a_pipeline_are_equal(pretend, sequences, micro_batch):
    pipeline = dataclasses.replace(config(batch_tokens=256 * sequences), parallel=ParallelConfig(pipeline=2))
    assert resolve(pipeline, CPU, 2).train.micro_batch == micro_batch
    check_batch(resolve(pipeline, CPU, 2), sequences)


def test_a_sequence_longer_than_the_bound_goes_alone(pretend):
    long = Config(train=TrainConfig(sequence_length=20_000, batch_tokens=80_000))
    assert resolve(long, CPU).train.micro_batch == 1


def test_resolving_again_changes_nothing(pretend):
    pretend(bf16=True)
    once = resolve(config(d_model=512, steps=10**6), CPU)
    assert "auto" not in (once.train.dtype, once.train.compile)
    pretend(cores=1, compiler=False)
    assert resolve(once, CPU, 1) == once, "a resumed run keeps what was decided, on any machine"


# --- this machine


def test_usable_cores(pretend, monkeypatch):
    pretend(cores=3)
    assert usable_cores() == 3
    monkeypatch.delattr(machine.os, "sched_getaffinity")
    assert usable_cores() == machine.os.cpu_count()


def test_prepare_process():
    prepare_process(2)
    assert torch.get_num_threads() == 2
    assert torch.ones(2**22).sum() == 2**22, "memory can still be had"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matmul_peak(dtype):
    assert 1e8 < matmul_peak(CPU, dtype, seconds=0.0) < 1e15


def test_describe(monkeypatch):
    assert re.fullmatch(r".+, \d+ cores; torch \S+, Python 3\.\d+\.\d+\S*, \w+", describe(CPU))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    assert describe(CUDA).startswith("NVIDIA H100; torch ")
