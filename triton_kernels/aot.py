"""Compile kernels for GPUs that are not there, and read what the compiler made of them.

    for binary in compile_launches("sm_90", launcher, *meta_tensors):
        print(binary)      # rms_norm_forward sm_90: 45 registers, 0 spilled, 4096 B shared, 128-bit loads 8 of 8

A launcher is called with tensors on the meta device (shapes without memory); each kernel that it would launch is
compiled with those very arguments, so that what CI holds against its limits is what a GPU will run. The arguments
are specialised as Triton's own launcher does it: pointers and ints that 16 divides say so (without it a kernel
loads scalars: 6 wide loads of an RMSNorm became 32 narrow ones), an int of 1 becomes a constant, unless the kernel
says do_not_specialize; AMD's compiler is also told which tensors fit 32-bit offsets.

A fingerprint is a hash of all that a binary is made of but the compiler: what has the same one need not be compiled
again. The assembler and the disassembler lie inside the triton wheel.
"""

from __future__ import annotations

import ast
import hashlib
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
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource  # private in name only: a kernel and the types of its arguments
from triton.runtime.jit import JITFunction

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
TENSOR_MEMORY_LIMIT = 512  # columns of sm_100's memory for accumulators; no other target has any

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
    spilled: int  # bytes of stack a thread, to which registers go that do not fit: memory traffic that nobody wrote
    shared: int  # bytes a program
    tensor_memory: int  # columns a program
    tensor_core: dict[str, int]  # instruction -> how many
    loads: int  # instructions that load from global memory
    wide_loads: int  # of them, those that load 128 bits a thread
    assembly: str = field(repr=False)  # SASS, or AMD's text
    ptx: str = field(repr=False)  # NVIDIA's portable assembly; AMD has none

    def __str__(self) -> str:
        units = "".join(f", {n} {name}" for name, n in self.tensor_core.items())
        return (f"{self.kernel} {self.target}: {self.registers} registers, {self.spilled} spilled, "
                f"{self.shared} B shared, 128-bit loads {self.wide_loads} of {self.loads}{units}")

    def faults(self) -> list[str]:
        """A line for each limit that it breaks: what spills is slow, what asks for too much memory cannot start."""
        limits = (("bytes of spilled registers a thread", self.spilled, 0),
                  ("bytes of shared memory a program", self.shared, SHARED_LIMIT[self.target]),
                  ("columns of tensor memory a program", self.tensor_memory, TENSOR_MEMORY_LIMIT))
        return [f"{self.kernel} {self.target}: {value} {what}; {most} is the most that is allowed"
                for what, value, most in limits if value > most]


def compile_launches(target: str, launcher: Callable, *args, **kwargs) -> list[Binary]:
    """Calls `launcher` with (meta) tensors and compiles each launch that it makes, in order, instead of running it."""
    return [compile_kernel(kernel, target, *args, **meta) for kernel, args, meta in launches(launcher, *args, **kwargs)]


def launches(launcher: Callable, *args, **kwargs) -> list[tuple[Kernel, tuple, dict[str, Any]]]:
    """(kernel, arguments, meta) of each launch that `launcher` makes; nothing runs."""
    made: list[tuple[Kernel, tuple, dict[str, Any]]] = []
    with recording(lambda *launch: made.append(launch)):
        launcher(*args, **kwargs)
    return made


def compile_kernel(kernel: Kernel, target: str, *args, **meta) -> Binary:
    """Compiles `kernel` for these arguments, given as to a launch: `kernel[grid](*args, **meta)`."""
    source, options = _source(kernel, target, args, meta)
    with LOCK:
        compiled = triton.compile(source, target=TARGETS[target], options=options)
    read = _read_amd if target.startswith("gfx") else _read_nvidia
    registers, spilled, assembly = read(compiled.asm)
    loads = LOAD.findall(assembly)
    return Binary(kernel.name, target, registers, spilled, compiled.metadata.shared,
                  getattr(compiled.metadata, "tmem_size", None) or 0, dict(Counter(TENSOR_CORE.findall(assembly))),
                  len(loads), sum(bool(WIDE_LOAD.search(load)) for load in loads), assembly,
                  compiled.asm.get("ptx", ""))


def fingerprint(kernel: Kernel, target: str, *args, **meta) -> str:
    """12 hex digits: the code of the kernel and of all that it calls, the types of its arguments, the options.

    Comments, docstrings and where the code stands in its file do not count.
    """
    source, options = _source(kernel, target, args, meta)
    code: dict[str, str] = {}
    _collect(kernel.jit, code)
    parts = sorted(code.items()), sorted(source.signature.items()), sorted(source.constants.items()), \
        sorted(source.attrs.items()), sorted(options.items())
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def _collect(function: JITFunction, code: dict[str, str]) -> None:
    """Puts into `code` what `function` is made of, and the functions and constants that it names, less Triton's own."""
    tree, scope = ast.parse(function.src), function.fn.__globals__
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    code[f"{function.__module__}.{function.__name__}"] = ast.unparse(tree)  # without comments
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            value = scope.get(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            value = getattr(scope.get(node.value.id), node.attr, None)
        else:
            continue
        if isinstance(value, JITFunction):
            if f"{value.__module__}.{value.__name__}" not in code and not value.__module__.startswith("triton."):
                _collect(value, code)
        elif isinstance(value, tl.constexpr | int | float | str):
            code[f"{function.__module__}.{ast.unparse(node)}"] = str(value)


def _source(kernel: Kernel, target: str, args: tuple, meta: dict[str, Any]) -> tuple[ASTSource, dict[str, Any]]:
    """What is compiled, and the options of the compiler."""
    if target not in TARGETS:
        raise ValueError(f"no target {target!r}; there are {', '.join(TARGETS)}")
    arguments = kernel.arguments(args, meta)
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.jit.params):
        name, value = parameter.name, arguments[parameter.name]
        specialise = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialise and type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        signature[name] = _type(name, value)
        if specialise and _divisible(value) and not parameter.do_not_specialize_on_alignment:
            attributes[(i,)] = [["tt.divisibility", 16]]
        small = isinstance(value, Tensor) and value.untyped_storage().size() < 2**31
        if specialise and small and target.startswith("gfx"):
            attributes[(i,)] = [*attributes.get((i,), []), ["tt.pointer_range", 32]]
    options = {"enable_fp_fusion": True} | {k: v for k, v in meta.items() if k in LAUNCH_OPTIONS}  # 3.9 warns without
    return ASTSource(kernel.jit, signature, constexprs=constants, attrs=attributes), options


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
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage, sass = _tool("cuobjdump", "-res-usage", file.name), _tool("nvdisasm", "-c", file.name)
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    return registers, stack, sass


def _tool(name: str, *arguments: str) -> str:
    """What a tool of the wheel prints. What it warns of is shown only if it fails."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    done = subprocess.run([path, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} failed: {done.stderr}")
    return done.stdout


def _read_amd(asm: dict[str, Any]) -> tuple[int, int, str]:
    """(vector registers, bytes of stack, assembly) of AMD's text.

    Its counts of spilled registers are no measure: scalar ones go to lanes of vector registers, vector ones to the
    accumulation registers first, and neither leaves the core. Only the stack (scratch) is memory.
    """
    text = asm["amdgcn"]
    count = dict(re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s+(\d+)", text))
    return int(count["vgpr_count"]), int(count["private_segment_fixed_size"]), text
