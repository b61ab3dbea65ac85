"""What this machine is, and what each `auto` of a configuration becomes on it.

The rules, decided by measurement (benchmarks/LOG.md):

| setting | rule |
|---|---|
| device | cuda if there is one, else mps, else cpu |
| dtype | bfloat16 on a GPU that has it and on a CPU with AMX or AVX512-BF16; float32 otherwise |
| compile | on a GPU; on a CPU with a C++ compiler where the run outlasts the compilation; off otherwise |
| threads | one for each core that this process may use, shared among the ranks of this machine |
| micro_batch | as many sequences as keep a forward pass at or below 16,384 tokens, and share the batch evenly |
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import time
from dataclasses import replace as replace_fields

import torch

from nanomai.config import Config, ConfigError
from nanomai.optim import piecewise

COMPILE_SECONDS = 60.0  # a run shorter than this, by its FLOPs, would spend more on compiling than it gains
MICRO_BATCH_TOKENS = 16_384


def pick_device(wanted: str, local_rank: int = 0) -> torch.device:
    """The device that `train.device` means here; ConfigError if it was named and is not there."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = next(k for k in available if available[k]) if wanted == "auto" else wanted
    if kind not in available:
        raise ConfigError(f"device {wanted!r} is not one of auto, cpu, cuda, mps", "train.device")
    if not available[kind]:
        raise ConfigError(f"device {wanted!r} is not available here; use auto or cpu", "train.device")
    return torch.device(kind, local_rank) if kind == "cuda" else torch.device(kind)


def resolve(config: Config, device: torch.device, world_size: int = 1) -> Config:
    """The configuration with every `auto` decided. A resumed run passes through here with nothing left to decide."""
    train = config.train
    dtype = train.dtype
    if dtype == "auto":
        dtype = "bfloat16" if _has_fast_bfloat16(device) else "float32"
    threads = train.threads or max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    compile_blocks = train.compile
    if compile_blocks == "auto":
        compile_blocks = "on" if _can_compile(device) and _outlasts_compilation(config, device) else "off"
    micro_batch = train.micro_batch or _micro_batch(config, world_size)
    return replace_fields(config, train=replace_fields(train, dtype=dtype, threads=threads, compile=compile_blocks,
                                                       micro_batch=micro_batch))


def _has_fast_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
        return any(getattr(torch.cpu, name, lambda: False)() for name in checks)
    return False


def _can_compile(device: torch.device) -> bool:
    if device.type == "cuda":
        return True
    return device.type == "cpu" and any(shutil.which(c) for c in (os.environ.get("CXX", "g++"), "clang++"))


def _outlasts_compilation(config: Config, device: torch.device) -> bool:
    tokens = config.train.steps * piecewise(config.train.batch_tokens, 0)
    flops = tokens * config.model.flops_per_token(config.sequence_length)
    return device.type != "cpu" or flops / 2e11 > COMPILE_SECONDS  # 200 GFLOP/s: a laptop's training speed


def _micro_batch(config: Config, world_size: int) -> int:
    """The largest number of sequences that divides each rank's share of every batch and stays within bounds."""
    t, settings = config.sequence_length, config.train.batch_tokens
    largest = max(1, MICRO_BATCH_TOKENS // t)
    shares = [tokens // t // world_size for tokens in (settings.values() if isinstance(settings, dict) else [settings])]
    return max((n for n in range(1, largest + 1) if all(share and share % n == 0 for share in shares)), default=1)


def usable_cores() -> int:
    """The cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def prepare_process(threads: int) -> None:
    """Sets this process's threads, and has it keep the memory that it frees.

    glibc hands each large freed activation back to the kernel, and the next step pays for every page of it again.
    """
    torch.set_num_threads(threads)
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        m_trim_threshold, m_mmap_max = -1, -4
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


def matmul_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """FLOP/s of a large matrix product here and now: the ceiling that MFU is a share of."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=torch.float32).to(dtype)
    b = a.T.contiguous()
    best, deadline = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < deadline or not best:
        _synchronize(device)
        start = time.perf_counter()
        a @ b
        _synchronize(device)
        best = max(best, 2 * n**3 / (time.perf_counter() - start))
    return best


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def describe(device: torch.device) -> str:
    """One line that names the hardware and the versions, for logs and benchmark results."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{_cpu_name()}, {usable_cores()} cores"
    return f"{name}; torch {torch.__version__}, Python {platform.python_version()}, {platform.system()}"


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
