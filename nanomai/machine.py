"""What this machine is, and what each `auto` of a configuration becomes on it.

The rules, decided by measurement (benchmarks/LOG.md):

| setting | rule |
|---|---|
| device | cuda if there is one, else mps, else cpu |
| dtype | bfloat16 on a GPU that has it and on a CPU with AMX or AVX512-BF16; float32 otherwise |
| compile | on a GPU; on a CPU with a C++ compiler where the run outlasts the compilation; off otherwise |
| kernels | on a GPU those of `kernels.AUTO` that take this model's shapes; none elsewhere |
| threads | one for each core that this process may use, shared among the ranks of this machine |
| micro_batch | a rank's share of the batch, in as few equal forward passes as stay at or below 16,384 tokens |
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import time
from dataclasses import replace as replace_fields

import torch

from nanomai import kernels
from nanomai.config import Config, ConfigError, factors
from nanomai.optim import piecewise

COMPILE_SECONDS = 60.0  # a run shorter than this, by its FLOPs, would spend more on compiling than it gains


def pick_device(wanted: str) -> torch.device:
    """The device that `train.device` means for this process of a job; ConfigError if it was named and is not there."""
    local_rank, alone = int(os.environ.get("LOCAL_RANK", "0")), os.environ.get("WORLD_SIZE", "1") == "1"
    # no library lets several processes share what an Apple GPU computes
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available() and alone, "cpu": True}
    kind = next(k for k in available if available[k]) if wanted == "auto" else wanted
    if kind not in available:
        raise ConfigError(f"device {wanted!r} is not one of auto, cpu, cuda, mps", "train.device")
    if not available[kind]:
        raise ConfigError(f"device {wanted!r} is not available here; use auto or cpu", "train.device")
    if kind != "cuda":
        return torch.device(kind)
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(f"process {local_rank} of this machine has no GPU: there are {torch.cuda.device_count()}; "
                          "start as many processes as GPUs, or set --train.device cpu", "train.device")
    return torch.device("cuda", local_rank)


KEPT = "dtype", "compile", "kernels", "micro_batch"
"""Settings that were left to the machine and stay as they were when a run is resumed. The number of threads is chosen
anew: with another number of ranks on a machine, each has other cores to itself."""


def resolve(config: Config, device: torch.device, world_size: int = 1, before: Config | None = None) -> Config:
    """The configuration with every `auto` decided; as it was in `before`, where a run is resumed."""
    if before is not None:
        kept = {f: getattr(before.train, f) for f in KEPT if getattr(config.train, f) in ("auto", 0)}
        if kept.get("kernels") == "auto" or device.type != "cuda":  # a run of before there were any; or none runs here
            kept["kernels"] = "torch" if config.train.kernels == "auto" else config.train.kernels
        config = replace_fields(config, train=replace_fields(config.train, **kept))
    train = config.train
    dtype = train.dtype
    if dtype == "auto":
        dtype = "bfloat16" if _has_fast_bfloat16(device) else "float32"
    if train.float8:
        _require_float8(device, dtype)
    threads = train.threads or cores_of_a_rank()
    compile_blocks = train.compile
    if compile_blocks == "auto":
        compile_blocks = "on" if _can_compile(device) and _outlasts_compilation(config, device) else "off"
    sizes = factors(config.parallel, world_size)
    micro_batch = config.micro_batch(sizes["replicas"] * sizes["fsdp"])
    return replace_fields(config, train=replace_fields(train, dtype=dtype, threads=threads, compile=compile_blocks,
                                                       kernels=_kernels(config, device), micro_batch=micro_batch))


def _kernels(config: Config, device: torch.device) -> str:
    try:
        chosen = kernels.parse(config.train.kernels)
        if chosen:
            kernels.require()
            _require_use(config, chosen)
    except (ValueError, ImportError) as error:
        raise ConfigError(str(error), "train.kernels") from None
    if chosen is not None:
        return config.train.kernels
    unfit = _unfit(config)
    taken = [k for k in kernels.AUTO if kernels.uses_triton(k, device.type == "cuda", "auto") and k not in unfit]
    return ",".join(taken) or "torch"


def _unfit(config: Config) -> dict[str, str]:
    """Kernel -> why this model is too large for it."""
    model, unfit = config.model, {}
    if model.head_dim > 128:
        unfit |= dict.fromkeys(("attention", "masked_attention"), f"head_dim {model.head_dim} is above 128")
    if model.d_model > 8192 and model.norm == "rmsnorm":
        unfit["rms_norm"] = f"d_model {model.d_model} is above 8192"
    return unfit


def _require_use(config: Config, chosen: frozenset[str]) -> None:
    """ValueError for a kernel that was asked for and that this model cannot use, or has no use for."""
    model, unfit = config.model, _unfit(config)
    if config.train.kernels.strip() != "triton":  # which is all that there is a use for
        unfit |= {"attention": "in training every sample has documents: choose masked_attention"}
        unfit |= {} if model.norm == "rmsnorm" else {"rms_norm": f"the norm is {model.norm}"}
        unfit |= {} if model.activation == "swiglu" else {"swiglu": f"the activation is {model.activation}"}
        unfit |= {} if model.position == "rope" else {"rotary": f"positions are {model.position}"}
    for name in sorted(chosen & unfit.keys()):
        raise ValueError(f"kernels {name!r} cannot be used: {unfit[name]}")


def _require_float8(device: torch.device, dtype: str) -> None:
    if dtype != "bfloat16":
        raise ConfigError(f"float8 goes with train.dtype bfloat16, and this run's is {dtype}", "train.float8")
    if device.type == "mps" or (device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9)):
        raise ConfigError("float8 needs a GPU that has it (compute capability 8.9: Ada, Hopper or newer), or a CPU",
                          "train.float8")


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


def cores_of_a_rank() -> int:
    """Those of this machine, shared among the ranks that it has."""
    return max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


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


def describe(device: torch.device, world_size: int = 1) -> str:
    """One line that names what a result may depend on in its last digits: hardware, versions, ranks."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{_cpu_name()}, {usable_cores()} cores"
    ranks = f"; {world_size} ranks" if world_size > 1 else ""
    return f"{name}; torch {torch.__version__}, Python {platform.python_version()}, {platform.system()}{ranks}"


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
