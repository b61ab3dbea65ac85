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
    for i, (rows, width, block) in enumerate([(6, 11, 16), (1, 1, 4), (7, 5, 8), (4, 8, 8), (3, 37, 16)]):
        x = torch.randn(rows, width, generator=generator)
        bias = torch.randn(width, generator=generator)
        told = f"{rows} rows of {width} numbers, {block} a program"
        y = torch.full_like(x, torch.nan)
        trace = Trace(x=x, bias=bias, y=y, shuffle=0)
        _run(trace, answer, told, i == 0, (-(-x.numel() // block),), x, bias, y, x.numel(), width, BLOCK=block)
        _compare(told, y, torch.relu(x + bias))
        assert trace.loads["x"] == x.nbytes, f"{told}: x is read {trace.loads['x'] / x.nbytes:.2f} times; once will do"


@exercise
def check_softmin(answer):
    """`answer[(N,)](x, y, D, BLOCK)`: each row's e^-x over its sum; one program a row, BLOCK >= D."""
    generator = torch.Generator().manual_seed(1)
    sizes = [(5, 11, 16, 3.0, 1.0), (3, 8, 8, 0.0, 1.0), (4, 1, 4, -9.0, 1.0), (2, 33, 64, -5.0, 1.0),
             (3, 7, 8, 0.0, 500.0)]
    for i, (rows, width, block, centre, scale) in enumerate(sizes):
        x = centre + scale * torch.randn(rows, width, generator=generator)
        told = f"{rows} rows of {width} numbers near {centre:g}, BLOCK = {block}"
        y = torch.full_like(x, torch.nan)
        trace = Trace(x=x, y=y, shuffle=0)
        _run(trace, answer, told, i == 0, (rows,), x, y, width, BLOCK=block)
        _compare(told, y, (-x).softmax(-1))
        assert trace.loads["x"] == x.nbytes, f"{told}: x is read {trace.loads['x'] / x.nbytes:.2f} times; once will do"


@exercise
def check_transpose(answer):
    """`answer[grid](x, y, N, M, x_row, x_column, y_row, TILE)`: y (M, N) = x (N, M) transposed, tile by tile."""
    for i, (n, m, tile) in enumerate([(6, 10, 4), (8, 8, 8), (1, 5, 4), (9, 2, 8)]):
        whole = torch.arange(2.0 * n * m).view(n, 2 * m)
        for name, x in (("contiguous", whole[:, :m].contiguous()), ("every second column", whole[:, ::2]),
                        ("a transposed view", whole[:, :m].T.contiguous().T)):
            told = f"x {n} x {m}, {name}, tiles of {tile}"
            grid = (-(-n // tile), -(-m // tile))
            y = torch.full((m, n), torch.nan)
            trace, first = Trace(x=x, y=y, shuffle=0), i == 0 and name == "contiguous"
            _run(trace, answer, told, first, grid, x, y, n, m, *x.stride(), n, TILE=tile)
            _compare(told, y, x.T)
            assert (trace.reads("x") == 1).all(), f"{told}: read each number of x once"


def _run(trace: Trace, answer, told: str, draw: bool, grid: tuple, *args, **meta) -> None:
    """One launch. What the lens refuses becomes a message; an untouched stub stays one. Draws who wrote y."""
    if not isinstance(answer, Kernel):
        with contextlib.suppress(TypeError):
            answer()
        raise AssertionError("a kernel has @Kernel and @triton.jit above it")
    try:
        with trace:
            answer[grid](*args, **meta)
    except KernelError as error:
        if isinstance(error.__cause__, NotImplementedError):
            raise error.__cause__ from None
        raise AssertionError(f"{told}: {error}") from None
    finally:
        if draw and (trace.owners("y") >= 0).any():
            _draw(trace)


def _compare(told: str, y: Tensor, spec: Tensor) -> None:
    untouched = int(y.isnan().sum())
    assert not untouched, f"{told}: {untouched} of {y.numel()} numbers of y are NaN: not written, or computed from junk"
    wrong = ~torch.isclose(y, spec, rtol=1e-4, atol=1e-6)
    assert not wrong.any(), f"{told}: {int(wrong.sum())} of {y.numel()} numbers of y are wrong"


def _draw(trace: Trace) -> None:
    import matplotlib.pyplot as plt  # late: an unsolved stub needs no picture

    trace.draw("y", "owners")
    plt.show()
    plt.close()
