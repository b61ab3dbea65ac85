"""Checks of `notebooks/11b_matmul_and_flash_attention`. Answers that are kernels run under the lens, in any order."""

import contextlib

import torch

from nanomai import ops
from nanomai.show import exercise
from triton_kernels.engine import Kernel, KernelError
from triton_kernels.lens import Trace


@exercise
def check_matmul_ragged(answer):
    """`answer[grid](a, b, c, M, N, K, TILE, STEP)`: c = a b for any sizes. Draws where c is wrong."""
    generator = torch.Generator().manual_seed(0)
    for m, n, k in [(16, 16, 16), (16, 16, 48), (1, 1, 1), (21, 37, 19), (33, 17, 40)]:
        a, b = torch.randn(m, k, generator=generator), torch.randn(k, n, generator=generator)
        if m > 1:  # what lies after the end of a row is the next row: here it is poison
            a[-1, 0] = torch.nan
        c = torch.full((m, n), torch.inf)
        sizes = f"M, N, K = {m}, {n}, {k}"
        trace = _launch(answer, sizes, (-(-n // 16), -(-m // 16)), a, b, c, m, n, k, TILE=16, STEP=16)
        wrong = ~torch.isclose(c, a @ b, rtol=1e-4, atol=1e-4, equal_nan=True)
        if wrong.any():
            _draw(wrong, sizes)
        assert not wrong.any(), f"{sizes}: {int(wrong.sum())} of {m * n} numbers of c are wrong"
        read = trace.loads["a_ptr"] // a.nbytes, trace.loads["b_ptr"] // b.nbytes
        assert read == (-(-n // 16), -(-m // 16)), f"{sizes}: a and b are read {read} times; load each tile once"


@exercise
def check_decode(answer):
    """`answer[grid](q, k, v, o, S, scale, K, TILE)`: one query a program over all S keys."""
    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 37, 16, generator=generator)
    q = torch.randn(3, 16, generator=generator)
    rising = (k @ q[0]).argsort()
    far = torch.cat((k[:16] + 400 * q[0], k[16:] - 400 * q[0]))
    cases = [("one tile", k[:16], v[:16]), ("one key", k[:1], v[:1]), ("rising scores", k[rising], v[rising]),
             ("falling scores", k[rising.flip(0)], v[rising.flip(0)]), ("37 keys", k, v), ("scores over 1000", far, v)]
    for name, keys, values in cases:
        o = torch.full_like(q, torch.nan)
        _launch(answer, name, (len(q),), q, keys, values, o, len(keys), 0.25, K=16, TILE=16)
        exact = (q.double() @ keys.double().T / 4).softmax(-1) @ values.double()
        assert not o.isnan().any(), f"{name}: not a number; take exponentials of differences only"
        worst = (o - exact).abs().max().item()
        assert worst < 1e-3, f"{name}: o is off by up to {worst:.2f}"


@exercise
def check_key_tiles(answer):
    """`answer(first, queries, tile, window, keys)`: the tiles of keys, [begin, end), that a tile of queries meets."""
    for queries, tile, window, keys in [(16, 16, 40, 128), (16, 16, 1, 128), (32, 16, 17, 100), (16, 64, 33, 200),
                                        (64, 16, 1000, 150), (16, 16, 16, 67)]:
        for first in range(0, keys, queries):
            positions = torch.arange(keys)
            seen = ops.attention_mask(positions[first:first + queries], positions, window).any(0)  # (keys,)
            met = (seen.nonzero() // tile).unique().tolist()
            found = tuple(int(edge) for edge in answer(first, queries, tile, window, keys))
            assert found == (met[0], met[-1] + 1), (
                f"queries {first} to {min(first + queries, keys) - 1}, a window of {window}, tiles of {tile} keys: "
                f"they meet tiles {met[0]} to {met[-1]}, so ({met[0]}, {met[-1] + 1}), not {found}")


def _launch(answer, where, grid, *args, **meta):
    """The trace of one launch; what the lens refuses becomes a message, an untouched stub stays one."""
    if not isinstance(answer, Kernel):
        with contextlib.suppress(TypeError):
            answer()
        raise AssertionError("a kernel has @Kernel and @triton.jit above it")
    try:
        with Trace(shuffle=0) as trace:
            answer[grid](*args, **meta)
    except KernelError as error:
        if isinstance(error.__cause__, NotImplementedError):
            raise error.__cause__ from None
        raise AssertionError(f"{where}: {error}") from None
    return trace


def _draw(wrong, sizes):
    import matplotlib.pyplot as plt  # late: a right answer needs no picture

    axes = plt.subplots(figsize=(4, 3))[1]
    axes.imshow(wrong.numpy(), cmap="Reds", vmin=0, vmax=1)
    axes.set(xlabel="column of c", ylabel="row of c", title=f"wrong where red: {sizes}")
