"""Triton's interpreter, made honest: bfloat16 right, accesses reported, its rewiring undone after each launch.

bfloat16: the stock interpreter keeps its bits in uint16 arrays and computes with those as if they were numbers. Ours
widens to float32, computes, and rounds the result to nearest even, as the GPU does; a product of blocks (tl.dot) and
a reduction are summed in float32 and rounded once.

All that we lean on of Triton's private parts is in this file (tested on 3.6.0 and 3.9.0), each with its reason. The
caller holds engine.LOCK: `triton.language` is rewired while a launch lasts.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as stock  # private: the interpreter has no public entry but an environment variable
from torch import Tensor
from triton.runtime.jit import JITFunction  # private: what @triton.jit makes

Index = tuple[int, int, int]  # of a program in its grid: (x, y, z)


class KernelError(Exception):
    """What went wrong in a kernel on the CPU, with the kernel and the program instance where it happened."""


class Observer(Protocol):
    """Who watches interpreted launches: lens.Trace."""

    def launch(self, kernel: str, tensors: dict[str, Tensor], grid: Index) -> list[Index]:
        """A launch begins; returns all its programs in the order in which they shall run."""

    def program(self, index: Index) -> None:
        """The program (x, y, z) begins."""

    def access(self, kind: str, addresses: np.ndarray, size: int, parameter: str | None) -> None:
        """A "read", "write" or "atomic" of `size` bytes at each address, reached through that parameter if known."""


# --- A launch --------------------------------------------------------------------------------------------------------


def interpret(kernel: JITFunction, grid: tuple | Callable, arguments: dict[str, Any]) -> None:
    """Runs all programs of the grid, one after another. Raises KernelError naming kernel and program."""
    grid = tuple(grid(arguments) if callable(grid) else grid)
    grid += (1,) * (3 - len(grid))
    programs = [(x, y, z) for z in range(grid[2]) for y in range(grid[1]) for x in range(grid[0])]
    tensors = {k: v for k, v in arguments.items() if isinstance(v, Tensor)}
    if builder.observer is not None:
        programs = builder.observer.launch(kernel.fn.__name__, tensors, grid)
    constants = {p.name for p in kernel.params if p.is_constexpr}
    # a masked-off lane may divide by zero; the GPU does not tell either
    with _interpreted_language(), np.errstate(all="ignore"):
        values = {k: v if k in constants else _value(k, v) for k, v in arguments.items()}
        function = _rewritten(kernel.fn)
        builder.set_grid_dim(*grid)
        for index in programs:
            builder.set_grid_idx(*index)
            if builder.observer is not None:
                builder.observer.program(index)
            try:
                function(**values)
            except KernelError:
                raise
            except Exception as error:
                raise KernelError(f"{kernel.fn.__name__}, program {index}: {type(error).__name__}: {error}") from error


def _value(name: str, value: Any) -> Any:
    """An argument as the kernel sees it: pointers know their parameter's name, a float is a float32 as on the GPU."""
    if isinstance(value, float):
        return tl.tensor(stock.TensorHandle(np.array([value], np.float32), tl.float32), tl.float32)
    if isinstance(value, bool):  # 3.6 would take it for an int
        return tl.tensor(stock.TensorHandle(np.array([value]), tl.int1), tl.int1)
    value = stock._implicit_cvt(value)  # private: ints, tensors (to pointers), tuples and descriptors
    if isinstance(value, tl.tensor) and value.dtype.is_ptr():
        value.handle.attr["parameter"] = name
    return value


@functools.cache
def _rewritten(function: Callable) -> Callable:
    """`function` with its assignments made into blocks, as the interpreter needs it: `x = 1` must give a tensor."""
    lines, first = inspect.getsourcelines(function)
    tree = ast.parse(textwrap.dedent("".join(lines)))
    tree.body[0].decorator_list = []
    # private: the rewriting itself; its own driver takes any last line that begins with "def" for the kernel's
    tree = ast.increment_lineno(ast.fix_missing_locations(stock.ASTTransformer().visit(tree)), first - 1)
    names = function.__globals__
    if function.__closure__:  # a kernel inside a function: the compiler looks there too
        names = {**names, **inspect.getclosurevars(function).nonlocals}
    names["interpreter_semantic"] = semantic  # what the rewritten lines call
    if hasattr(stock, "_InterpreterComparison"):  # since 3.9, for a < b < c
        names["_InterpreterComparison"] = stock._InterpreterComparison
    made: dict[str, Callable] = {}
    exec(compile(tree, inspect.getsourcefile(function), "exec", dont_inherit=True), names, made)
    return made[function.__name__]


@contextlib.contextmanager
def _interpreted_language() -> Iterator[None]:
    """While it lasts, `triton.language` computes with numpy, through our builder."""
    saved = stock.interpreter_builder, stock.interpreter_semantic
    # private: the patch takes both from its module at the time of each call
    stock.interpreter_builder, stock.interpreter_semantic = builder, semantic
    # private: it patches the modules that it finds among a function's globals; helpers of tl.standard use tl.core
    scope = stock._patch_lang(_Globals)
    try:
        # 3.6 asks int() of an array with one dimension, which numpy refuses since 2.4
        scope.set_attr(tl.tensor, "__index__", lambda self: int(np.asarray(self.handle.data).squeeze()))
        for module in (tl, tl.core):
            scope.set_attr(module, "reduce", _in_float32(module.reduce))
            scope.set_attr(module, "associative_scan", _in_float32(module.associative_scan))
        # private: a @triton.jit helper (tl.sum and the like are such) refuses to be called outside of a compilation
        scope.set_attr(JITFunction, "__call__", lambda self, *a, **k: _rewritten(self.fn)(*a, **k))
        scope.set_attr(JITFunction, "__get__", _bind)
        yield
    finally:
        scope.restore()
        stock.interpreter_builder, stock.interpreter_semantic = saved


class _Globals:
    __globals__ = {"tl": tl, "core": tl.core}


def _bind(helper: JITFunction, owner: Any, _type: type | None = None) -> Any:
    """`x.sum(0)` is `tl.sum(x, 0)`: the compiler binds a helper to its block, Python must be told."""
    return functools.partial(helper, owner) if isinstance(owner, tl.tensor) else helper


# --- bfloat16 ---------------------------------------------------------------------------------------------------------

Handle = stock.TensorHandle  # private: a numpy array and its Triton type; bfloat16 is a uint16 array


def _is_bf16(handle: Handle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _widen(handle: Handle) -> Handle:
    """bfloat16 -> float32, exactly: its bits are the upper half. Other types pass."""
    if not _is_bf16(handle):
        return handle
    return Handle((np.asarray(handle.data).astype(np.uint32) << 16).view(np.float32), tl.float32)


def _narrow(handle: Handle, nearest: bool = True) -> Handle:
    """Any number -> bfloat16, to nearest even (or towards zero); NaN stays NaN."""
    wide = np.asarray(handle.data, dtype=np.float32, order="C")
    bits = wide.view(np.uint32)
    carry = 0x7FFF + ((bits >> 16) & 1) if nearest else 0  # a half, less one bit if that half would round to odd
    rounded = np.where(np.isnan(wide), np.uint32(0x7FC0), (bits + np.asarray(carry, np.uint32)) >> 16)
    return Handle(rounded.astype(np.uint16), tl.bfloat16)


def _in_float32(reduce: Callable) -> Callable:
    """tl.reduce or tl.associative_scan that sums bfloat16 in float32 and rounds once."""

    def convert(block: tl.tensor, change: Callable, scalar: tl.dtype) -> tl.tensor:
        shape = list(block.shape)
        return tl.tensor(change(block.handle), tl.block_type(scalar, shape) if shape else scalar)

    def reduced(blocks, *args, **kwargs):
        several = blocks if isinstance(blocks, tuple) else (blocks,)
        narrow = [_is_bf16(b.handle) for b in several]
        wide = tuple(convert(b, _widen, tl.float32) if n else b for b, n in zip(several, narrow, strict=True))
        results = reduce(wide, *args, **kwargs)
        results = tuple(convert(r, _narrow, tl.bfloat16) if n else r for r, n in zip(results, narrow, strict=True))
        return results if isinstance(blocks, tuple) else results[0]

    return reduced


class Builder(stock.InterpreterBuilder):  # private: one method for each operation of Triton's IR
    """The stock interpreter's operations, with bfloat16 made right and every access to memory reported."""

    observer: Observer | None = None
    recorder: Callable | None = None

    def _compute(self, operation: Callable, *handles: Handle) -> Handle:
        """`operation` in float32 where a handle is bfloat16, its result rounded (unless it is a comparison's)."""
        if not any(_is_bf16(h) for h in handles):
            return operation(*handles)
        result = operation(*(_widen(h) for h in handles))
        return _narrow(result) if result.data.dtype == np.float32 else result

    def binary_op(self, lhs, rhs, op):
        result = self._compute(lambda a, b: super(Builder, self).binary_op(a, b, op), lhs, rhs)
        # stock leaves the operands' type on a comparison's booleans, and a broadcast would make numbers of them
        return Handle(result.data, tl.int1) if result.data.dtype == np.bool_ else result

    def unary_op(self, arg, op):
        return self._compute(lambda a: super(Builder, self).unary_op(a, op), arg)

    def ternary_op(self, lhs, rhs, other, op):
        return self._compute(lambda a, b, c: super(Builder, self).ternary_op(a, b, c, op), lhs, rhs, other)

    def create_fma(self, x, y, z):
        return self._compute(super().create_fma, x, y, z)

    def create_rsqrt(self, arg):
        return self._compute(super().create_rsqrt, arg)

    def create_erf(self, arg):
        return self._compute(super().create_erf, arg)

    def create_dot(self, a, b, d, *rest):
        return super().create_dot(_widen(a), _widen(b), d, *rest)

    def cast_impl(self, src, dst_type):
        if dst_type.scalar == tl.bfloat16:
            return src if _is_bf16(src) else _narrow(src)
        return super().cast_impl(_widen(src), dst_type)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        wide = _widen(src)
        if dst_type.scalar != tl.bfloat16:
            same = dst_type.scalar == wide.dtype.scalar
            return wide if same else super().create_fp_to_fp(wide, dst_type, rounding_mode)
        if wide.dtype.scalar.is_fp8():
            wide = super().create_fp_to_fp(wide, tl.float32, rounding_mode)
        return _narrow(wide, nearest=rounding_mode != stock._ir.ROUNDING_MODE.RTZ)

    def get_bf16(self, value):
        return _narrow(Handle(np.array([value], np.float32), tl.float32))

    # Memory

    def create_masked_load(self, ptrs, mask, other, *rest, **named):
        self._report("read", ptrs, mask)
        return super().create_masked_load(ptrs, mask, other, *rest, **named)

    def create_masked_store(self, ptrs, value, mask, *rest):
        self._report("write", ptrs, mask)
        return super().create_masked_store(ptrs, value, mask, *rest)

    def create_atomic_rmw(self, op, ptr, val, mask, *rest):
        if _is_bf16(val):
            raise NotImplementedError("an atomic on bfloat16 does not run on the interpreter; keep sums in float32")
        self._report("atomic", ptr, mask)
        return super().create_atomic_rmw(op, ptr, val, mask, *rest)

    def create_atomic_cas(self, ptr, cmp, val, *rest):
        self._report("atomic", ptr, None)
        return super().create_atomic_cas(ptr, cmp, val, *rest)

    def _report(self, kind: str, pointers: Handle, mask: Handle | None) -> None:
        if self.observer is None:
            return
        addresses, active = np.broadcast_arrays(pointers.data, True if mask is None else mask.data)
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        self.observer.access(kind, addresses[active], size, pointers.attr.get("parameter"))


def _keeping_parameter(name: str) -> Callable:
    """The operation, with the pointers it makes still knowing of which parameter they come."""
    operation = getattr(stock.InterpreterBuilder, name)

    def kept(self, *args):
        result = operation(self, *args)
        for arg in args:
            if isinstance(arg, Handle) and "parameter" in arg.attr:
                result.attr["parameter"] = arg.attr["parameter"]
        return result

    return kept


for _name in ("addptr", "splat", "unsplat", "broadcast", "expand_dims", "reshape", "trans", "bitcast"):
    setattr(Builder, f"create_{_name}", _keeping_parameter(f"create_{_name}"))

builder = Builder()
semantic = type(stock.interpreter_semantic)(builder)  # private: Triton's rules of types and broadcasting
