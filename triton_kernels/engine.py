"""One kernel, two engines: tensors on a GPU run it compiled, tensors on the CPU run it in Triton's interpreter.

    @Kernel
    @triton.jit
    def double(x_ptr, y_ptr, n, BLOCK: tl.constexpr): ...

    double[(triton.cdiv(n, 256),)](x, y, n, BLOCK=256, num_warps=4)

Both engines live in one process and need no environment variable, so that a notebook without a GPU, a test and a
training run share one file. The interpreter runs one program after another, each operation as a numpy call on a
whole block (0.3 to 1 ms a small program). What it cannot show: the order of threads inside one program, tf32 products
(they are exact here), inline assembly and libdevice.

Threads: one process-wide lock. A launch on the CPU rewires `triton.language` while it lasts, so a second thread
that launches or compiles waits until the first is done.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.jit import JITFunction  # private: what @triton.jit makes; both engines start from it

from triton_kernels.interpreter import KernelError, Observer, builder, interpret

__all__ = ["LOCK", "Kernel", "KernelError", "architecture", "observing", "recording"]

LOCK = threading.RLock()
# Understood by the compiler and without meaning here. Any other keyword must be a parameter, or a typo would pass.
LAUNCH_OPTIONS = {"num_warps", "num_stages", "num_ctas", "maxnreg", "enable_fp_fusion"}


class Kernel:
    """A kernel that runs where its tensors are. Decorates a @triton.jit function or a plain one.

    `kernel[grid](*arguments, **meta)` as in Triton; grid is a tuple of up to three ints, or a function of the dict of
    arguments that returns one. Helpers that a kernel calls stay plain @triton.jit functions.
    """

    def __init__(self, function: JITFunction | Callable):
        self.jit = function if isinstance(function, JITFunction) else triton.jit(function)
        self.name = self.jit.fn.__name__
        functools.update_wrapper(self, self.jit.fn)

    def __getitem__(self, grid: tuple[int, ...] | Callable) -> Callable[..., None]:
        return functools.partial(self._launch, grid)

    def __call__(self, *args, **kwargs):
        raise TypeError(f"{self.name} is a kernel: say over which programs it runs, {self.name}[grid](...)")

    def arguments(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Parameter name -> value, without the launch options."""
        values = {k: v for k, v in kwargs.items() if k not in LAUNCH_OPTIONS}
        try:
            bound = inspect.signature(self.jit.fn).bind(*args, **values)
        except TypeError as error:
            raise TypeError(f"{self.name}: {error}") from None
        bound.apply_defaults()
        return bound.arguments

    def _launch(self, grid, *args, **kwargs) -> None:
        arguments = self.arguments(args, kwargs)
        place = _place(self.name, arguments)
        with LOCK:
            if place.type == "cuda":
                if builder.observer is not None:
                    raise RuntimeError(f"{self.name}: a Trace watches the CPU only; move the tensors there")
                with torch.cuda.device(place):  # Triton launches on the current GPU, wherever the tensors are
                    self.jit[grid](*args, **kwargs)
            elif builder.recorder is not None:
                builder.recorder(self, args, kwargs)
            elif place.type == "cpu":
                interpret(self.jit, grid, arguments)
            else:
                raise ValueError(f"{self.name}: tensors on {place.type!r} run on no engine; move them to cuda or cpu")


def architecture(x: Tensor) -> str:
    """The line of a table of tiles for the device that x is on."""
    if x.device.type != "cuda":
        return "cpu"
    major = torch.cuda.get_device_capability(x.device)[0]
    return "gfx942" if torch.version.hip else {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


def _place(name: str, arguments: dict[str, Any]) -> torch.device:
    """The device that all tensors are on."""
    tensors = {k: v.device for k, v in arguments.items() if isinstance(v, Tensor)}
    if not tensors:
        raise ValueError(f"{name}: no tensor among the arguments, so nothing says where to run")
    first = next(iter(tensors))
    for other, device in tensors.items():
        if device != tensors[first]:
            raise ValueError(f"{name}: {first} is on {tensors[first]} and {other} on {device}; move one of them")
    return tensors[first]


@contextlib.contextmanager
def observing(observer: Observer) -> Iterator[None]:
    """Every interpreted launch reports to `observer`; other threads' launches wait until the end."""
    with LOCK:
        if builder.observer is not None:
            raise RuntimeError("a Trace is open already; close it before you open another")
        builder.observer = observer
        try:
            yield
        finally:
            builder.observer = None


@contextlib.contextmanager
def recording(recorder: Callable[[Kernel, tuple, dict], None]) -> Iterator[None]:
    """Launches on CPU or meta tensors are handed to `recorder` (kernel, args, kwargs) and not run."""
    with LOCK:
        builder.recorder = recorder
        try:
            yield
        finally:
            builder.recorder = None
