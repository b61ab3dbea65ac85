"""Compile kernels for GPUs that are not there, and read what the compiler made of them.

    for binary in compile_launches("sm_90", launcher, *meta_tensors):
        print(binary)      # rms_norm_forward sm_90: 45 registers, 0 spilled, 4096 B shared, 128-bit loads 8 of 8

A launcher is called with tensors on the meta device (shapes without memory); each kernel that it would launch is
compiled with those very arguments, so that what CI holds against its limits is what a GPU will run. The arguments
are specialised as Triton's own launcher does it: pointers and ints that 16 divides say so (without it a kernel
loads scalars: 6 wide loads of an RMSNorm became 32 narrow ones), an int of 1 becomes a constant.

The assembler and the disassembler lie inside the triton wheel.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource  # private in name only: a kernel and the types of its arguments

from triton_kernels.engine import LAUNCH_OPTIONS, LOCK, Kernel, recording

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Bytes of shared memory that one program may have. NVIDIA: CUDA C++ programming guide, table "Technical
# specifications per compute capability" (163 and 227 KB); gfx942: CDNA 3 ISA guide (64 KB of LDS).
SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}

DTYPES = {
    torch.float32: "fp32", torch.float64: "fp64", torch.float16: "fp16", torch.bfloat16: "bf16",
    torch.int8: "i8", torch.uint8: "u8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64", torch.bool: "i1",
}

# Matrix units: wgmma (sm_90), mma (sm_80 on), tcgen05 (sm_100), and AMD's; then loads, of them the widest.
TENSOR_CORE = re.compile(r"\b(HGMMA|QGMMA|IGMMA|HMMA|IMMA|QMMA|UTC\wMMA|v_mfma\w*)\b")
LOAD = re.compile(r"\b(?:LDG\b[.\w]*|LDGSTS\b[.\w]*|(?:global|buffer)_load_\w+)")
WIDE_LOAD = re.compile(r"\.128|dwordx4")


@dataclass(frozen=True)
class Binary:
    """What one kernel became on one target."""

    kernel: str
    target: str
    registers: int  # a thread
    spilled: int  # bytes of stack a thread (NVIDIA), registers (AMD): anything but 0 costs memory traffic
    shared: int  # bytes a program
    tensor_core: dict[str, int]  # instruction -> how many
    loads: int  # instructions that load from global memory
    wide_loads: int  # of them, those that load 128 bits a thread
    assembly: str = field(repr=False)

    def __str__(self) -> str:
        units = "".join(f", {n} {name}" for name, n in self.tensor_core.items())
        return (f"{self.kernel} {self.target}: {self.registers} registers, {self.spilled} spilled, "
                f"{self.shared} B shared, 128-bit loads {self.wide_loads} of {self.loads}{units}")


def compile_launches(target: str, launcher: Callable, *args, **kwargs) -> list[Binary]:
    """Calls `launcher` with (meta) tensors and compiles each launch that it makes, in order, instead of running it."""
    launches: list[tuple[Kernel, tuple, dict[str, Any]]] = []
    with recording(lambda *launch: launches.append(launch)):
        launcher(*args, **kwargs)
    return [compile_kernel(kernel, target, *args, **meta) for kernel, args, meta in launches]


def compile_kernel(kernel: Kernel, target: str, *args, **meta) -> Binary:
    """Compiles `kernel` for these arguments, given as to a launch: `kernel[grid](*args, **meta)`."""
    if target not in TARGETS:
        raise ValueError(f"no target {target!r}; there are {', '.join(TARGETS)}")
    options = {"enable_fp_fusion": True} | {k: v for k, v in meta.items() if k in LAUNCH_OPTIONS}  # 3.9 warns without
    source = _source(kernel, kernel.arguments(args, meta))
    with LOCK:
        compiled = triton.compile(source, target=TARGETS[target], options=options)
    read = _read_amd if target.startswith("gfx") else _read_nvidia
    registers, spilled, assembly = read(compiled.asm)
    loads = LOAD.findall(assembly)
    return Binary(kernel.name, target, registers, spilled, compiled.metadata.shared,
                  dict(Counter(TENSOR_CORE.findall(assembly))), len(loads),
                  sum(bool(WIDE_LOAD.search(load)) for load in loads), assembly)


def _source(kernel: Kernel, arguments: dict[str, Any]) -> ASTSource:
    constant = {p.name for p in kernel.jit.params if p.is_constexpr}
    constant |= {k for k, v in arguments.items() if v is None or (type(v) is int and v == 1)}
    signature = {k: "constexpr" if k in constant else _type(k, v) for k, v in arguments.items()}
    divisible = [i for i, (k, v) in enumerate(arguments.items()) if k not in constant and _divisible(v)]
    return ASTSource(kernel.jit, signature, constexprs={k: arguments[k] for k in arguments if k in constant},
                     attrs={(i,): [["tt.divisibility", 16]] for i in divisible})


def _type(name: str, value: Any) -> str:
    if isinstance(value, Tensor):
        return "*" + DTYPES[value.dtype]
    if isinstance(value, bool):
        return "u1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    if isinstance(value, float):
        return "fp32"
    raise TypeError(f"{name}: no type of Triton's for {value!r}")


def _divisible(value: Any) -> bool:
    """torch allocates at multiples of 64 bytes or more; a launcher that passes odd views is the exception."""
    if isinstance(value, Tensor):
        return value.storage_offset() * value.element_size() % 16 == 0
    return type(value) is int and value % 16 == 0


def _read_nvidia(asm: dict[str, Any]) -> tuple[int, int, str]:
    """(registers, bytes of stack, SASS) of a cubin."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage, sass = (subprocess.check_output([tools / tool, flag, file.name], text=True)
                       for tool, flag in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c")))
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    return registers, stack, sass


def _read_amd(asm: dict[str, Any]) -> tuple[int, int, str]:
    """(vector registers, spilled registers, assembly) of AMD's text."""
    text = asm["amdgcn"]
    count = {name: int(n) for name, n in re.findall(r"\.(vgpr_count|[vs]gpr_spill_count):\s+(\d+)", text)}
    return count["vgpr_count"], count["vgpr_spill_count"] + count["sgpr_spill_count"], text
