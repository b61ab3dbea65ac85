"""Checks of `notebooks/11a_first_kernels`. Each answer is a kernel: it runs under the lens, its programs in any order,
on ragged sizes, into outputs that hold NaN. The picture shows who wrote the first of the outputs."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from nanomai.show import exercise
from triton_kernels.engine import Kernel, KernelError
from triton_kernels.lens import Trace


@exercise
def check_bias_relu(answer):
    """`answer[grid](x, bias, y, N, D, BLOCK)`: y = relu(x + bias) for N numbers, which are rows of D."""
    generator = torch.Generator().manual_seed(0)
    for rows, width, block in [(6, 11, 16), (1, 1, 4), (7, 5, 8), (4, 8, 8), (3, 37, 16)]:
        x = torch.randn(rows, width, generator=generator)
        bias = torch.randn(width, generator=generator)
        told = f"{rows} rows of {width} numbers, {block} a program"
        y, trace = _run(answer, told, (-(-x.numel() // block),), x, bias, x, x.numel(), width, BLOCK=block)
        _compare(told, y, torch.relu(x + bias))
        assert trace.loads["x"] == x.nbytes, f"{told}: x is read {trace.loads['x'] / x.nbytes:.2f} times; once will do"


@exercise
def check_softmin(answer):
    """`answer[(N,)](x, y, D, BLOCK)`: each row's e^-x over its sum; one program a row, BLOCK >= D."""
    generator = torch.Generator().manual_seed(1)
    for rows, width, block, centre, scale in [(5, 11, 16, 3.0, 1.0), (3, 8, 8, 0.0, 1.0), (4, 1, 4, -9.0, 1.0),
                                              (2, 33, 64, -5.0, 1.0), (3, 7, 8, 0.0, 500.0)]:
        x = centre + scale * torch.randn(rows, width, generator=generator)
        told = f"{rows} rows of {width} numbers near {centre:g}, BLOCK = {block}"
        y, trace = _run(answer, told, (rows,), x, None, x, width, BLOCK=block)
        _compare(told, y, (-x).softmax(-1))
        assert trace.loads["x"] == x.nbytes, f"{told}: x is read {trace.loads['x'] / x.nbytes:.2f} times; once will do"


@exercise
def check_transpose(answer):
    """`answer[grid](x, y, N, M, x_row, x_column, y_row, TILE)`: y (M, N) = x (N, M) transposed, tile by tile."""
    for n, m, tile in [(6, 10, 4), (8, 8, 8), (1, 5, 4), (9, 2, 8)]:
        whole = torch.arange(2.0 * n * m).view(n, 2 * m)
        for name, x in (("contiguous", whole[:, :m].contiguous()), ("every second column", whole[:, ::2]),
                        ("a transposed view", whole[:, :m].T.contiguous().T)):
            told = f"x {n} x {m}, {name}, tiles of {tile}"
            grid = (-(-n // tile), -(-m // tile))
            y, trace = _run(answer, told, grid, x, None, x.T, n, m, *x.stride(), n, TILE=tile)
            _compare(told, y, x.T)
            assert (trace.reads("x") == 1).all(), f"{told}: read each number of x once"


def _run(answer, told: str, grid: tuple, x: Tensor, bias: Tensor | None, like: Tensor, *args, **meta):
    """(y, trace) of one launch. What the lens refuses becomes a message; an untouched stub stays one."""
    if not isinstance(answer, Kernel):
        with contextlib.suppress(TypeError):
            answer()
        raise AssertionError("a kernel has @Kernel and @triton.jit above it")
    y = torch.full(like.shape, torch.nan)
    inputs = {"x": x} if bias is None else {"x": x, "bias": bias}
    trace = Trace(**inputs, y=y, shuffle=0)
    try:
        with trace:
            answer[grid](*inputs.values(), y, *args, **meta)
    except KernelError as error:
        if isinstance(error.__cause__, NotImplementedError):
            raise error.__cause__ from None
        _draw_once(answer, trace)
        raise AssertionError(f"{told}: {error}") from None
    _draw_once(answer, trace)
    return y, trace


def _compare(told: str, y: Tensor, spec: Tensor) -> None:
    untouched = int(y.isnan().sum())
    assert not untouched, f"{told}: {untouched} of {y.numel()} numbers of y are NaN: not written, or computed from junk"
    wrong = ~torch.isclose(y, spec, rtol=1e-4, atol=1e-6)
    assert not wrong.any(), f"{told}: {int(wrong.sum())} of {y.numel()} numbers of y are wrong"


def _draw_once(answer: Kernel, trace: Trace) -> None:
    """Who wrote y, on the first of the sizes that this kernel is tried on."""
    import matplotlib.pyplot as plt  # late: an unsolved stub needs no picture

    if not hasattr(answer, "drawn"):
        answer.drawn = True
        trace.draw("y")
        plt.show()
        plt.close()
