"""The lens: exact bytes, bounds, races, the order of programs, maps and pictures; faults that it must find."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from triton_kernels.engine import Kernel
from triton_kernels.interpreter import builder
from triton_kernels.lens import OutOfBounds, Race, Trace


@Kernel
@triton.jit
def copy(x_ptr, y_ptr, n, x_stride, y_stride, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n if MASKED else at >= 0
    tl.store(y_ptr + at * y_stride, tl.load(x_ptr + at * x_stride, mask=mask), mask=mask)


@Kernel
@triton.jit
def neighbours(x_ptr, y_ptr, n, OFFSET: tl.constexpr, BLOCK: tl.constexpr):
    """y = x, after a look at what stands OFFSET further in y: a race wherever that is another program's."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    other = tl.load(y_ptr + at + OFFSET, mask=(at + OFFSET < n) & (at + OFFSET >= 0), other=0.0)
    tl.store(y_ptr + at, tl.load(x_ptr + at, mask=at < n) + 0.0 * other, mask=at < n)


@Kernel
@triton.jit
def total(x_ptr, out_ptr, n, BLOCK: tl.constexpr, ATOMIC: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.sum(tl.load(x_ptr + at, mask=at < n, other=0.0), 0)
    if ATOMIC:
        tl.atomic_add(out_ptr, x)
    else:
        tl.store(out_ptr, tl.load(out_ptr) + x)


@Kernel
@triton.jit
def order(out_ptr, count_ptr):
    """Writes down when this program ran: a race on purpose."""
    now = tl.load(count_ptr)
    tl.store(out_ptr + tl.program_id(0) + tl.num_programs(0) * tl.program_id(1), now)
    tl.store(count_ptr, now + 1)


def run(x, y, n=None, masked=True, strides=(1, 1), block=16):
    n = x.numel() if n is None else n
    copy[(triton.cdiv(n, block),)](x, y, n, *strides, BLOCK=block, MASKED=masked)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.int64, torch.bool])
@pytest.mark.parametrize("n", [1, 16, 37])
def test_bytes_are_exact(n, dtype):
    x = torch.arange(n).to(dtype)
    y = torch.zeros_like(x)
    with Trace(x=x, y=y, shuffle=n) as t:
        run(x, y)
        run(x, y)
    assert torch.equal(x, y) and t.launches == 2
    assert t.loads == {"x": 2 * x.nbytes, "y": 0} and t.stores == {"x": 0, "y": 2 * x.nbytes}
    assert t.reads("x").tolist() == [2] * n and t.reads("y").tolist() == [0] * n
    assert t.owners("y").tolist() == [i // 16 for i in range(n)] and (t.owners("x") == -1).all()
    run(x, y)  # the trace is closed
    assert t.loads["x"] == 2 * x.nbytes


@pytest.mark.parametrize("n", [1, 37])
def test_a_forgotten_mask_is_found(n):
    x, y = torch.zeros(n), torch.zeros(n)
    last = (n - 1) // 16
    with Trace(x=x), pytest.raises(OutOfBounds, match=rf"copy, program \({last}, 0, 0\): read of {-n % 16} elements "
                                                      rf"outside x_ptr = x, which has {n}; is a mask missing"):
        run(x, y, masked=False)


def test_bounds_are_those_of_the_tensor_that_the_pointer_came_from():
    """Beyond the end of q lies k, in the same memory."""
    qk = torch.zeros(2, 32)
    q, k = qk
    with Trace(q=q, k=k), pytest.raises(OutOfBounds, match=r"read of 16 elements outside x_ptr = q, which has 32"):
        run(q, torch.zeros(48), n=48)
    with Trace(x=qk, y=(y := torch.zeros(64))) as t:  # a part of a named tensor is counted as the whole's
        run(q, y)
    assert t.loads == {"x": q.nbytes, "y": 0} and t.reads("x").tolist() == [[1] * 32, [0] * 32]
    with Trace(), pytest.raises(OutOfBounds, match="write of 16 elements outside y_ptr, which has 16"):
        run(qk[0], torch.zeros(16))


def test_views_have_their_own_elements():
    base = torch.arange(64.0).view(8, 8)
    column, y = base[:, 3], torch.zeros(8)
    with Trace(column=column, y=y) as t:
        run(column, y, strides=(8, 1))
    assert torch.equal(y, column) and t.loads["column"] == 32 and t.reads("column").tolist() == [1] * 8
    with Trace(column=column, y=y), pytest.raises(OutOfBounds, match="read of 7 elements outside x_ptr = column"):
        run(column, y)  # forgets the stride, and reads the memory between
    with Trace(x=base.T, y=(flat := torch.zeros(64))) as t:
        run(base.T, flat)
    assert t.reads("x").shape == (8, 8) and t.owners("y").tolist() == [i // 16 for i in range(64)]
    one = torch.ones(1).expand(5)
    with Trace(one=one, y=y) as t:
        run(one, y, strides=(0, 1))
    assert t.loads["one"] == 20 and t.reads("one").tolist() == [5] * 5
    with pytest.raises(ValueError, match=r"x: its strides .* put two elements at one address"):
        Trace(x=torch.zeros(8).as_strided((3, 3), (1, 1)))
    with pytest.raises(ValueError, match="b and a share memory: name the larger of the two"):
        Trace(a=base[0], b=base)


@pytest.mark.parametrize("rows", [slice(None), slice(1, 3)], ids=["the whole", "a part"])
def test_a_view_in_a_wider_dtype_counts_as_the_elements_that_it_covers(rows):
    packed, y = torch.arange(64, dtype=torch.uint8).view(4, 16), torch.zeros(4, 16, dtype=torch.uint8)
    words, out = (t[rows].view(torch.int32).view(-1) for t in (packed, y))
    with Trace(packed=packed, y=y) as t:
        run(words, out)
    assert torch.equal(out, words)
    assert t.loads == {"packed": 4 * words.numel(), "y": 0} and t.stores == {"packed": 0, "y": 4 * words.numel()}
    read = np.zeros((4, 16), int)
    read[rows] = 1
    assert (t.reads("packed") == read).all() and ((t.owners("y") != -1) == read).all()
    with Trace(packed=packed, y=y), pytest.raises(OutOfBounds, match=rf"x_ptr = packed, which has {words.numel()}"):
        run(words, out, n=words.numel() + 1)


def test_races_through_a_view_in_a_wider_dtype_are_found():
    y = torch.zeros(192, dtype=torch.uint8)
    with Trace(y=y), pytest.raises(Race, match=r"read of y\[0\] after a write of it by program number 0"):
        neighbours[(3,)](torch.zeros(48), y.view(torch.float32), 48, OFFSET=-16, BLOCK=16)
    with Trace(halves=y.view(torch.int16), flat=(flat := torch.zeros(192, dtype=torch.uint8))) as t:
        run(y, flat)  # narrower: two bytes of each element, on their own
    assert t.loads["halves"] == 192 and t.reads("halves").tolist() == [2] * 96
    with pytest.raises(ValueError, match="words and y share memory"):
        Trace(y=y, words=y.view(torch.int32))
    columns = y.view(12, 16)[:, :4]
    with Trace(columns=columns), pytest.raises(ValueError, match="x_ptr and columns share memory"):
        run(y.view(torch.int32), torch.zeros(48, dtype=torch.int32))  # reaches past what is watched


@pytest.mark.parametrize("offset", [16, -16], ids=["read before write", "read after write"])
@pytest.mark.parametrize("shuffle", [None, 0, 1])
def test_a_race_of_reads_and_writes_is_found_in_any_order(offset, shuffle):
    x, y = torch.zeros(48), torch.zeros(48)
    with Trace(x=x, y=y, shuffle=shuffle), pytest.raises(Race, match=r"neighbours, program \(\d, 0, 0\): "
                                                                     r"(read|write) of y\[\d+\] after a (read|write)"):
        neighbours[(3,)](x, y, 48, OFFSET=offset, BLOCK=16)
    with Trace(x=x, y=y, shuffle=shuffle):  # its own elements a program may read
        neighbours[(3,)](x, y, 48, OFFSET=0, BLOCK=16)


def test_a_race_of_writes_is_found_and_atomics_are_none():
    x, out = torch.ones(40), torch.zeros(1)
    with Trace(x=x, out=out) as t:
        total[(3,)](x, out, 40, BLOCK=16, ATOMIC=True)
    assert out.item() == 40 and t.loads["out"] == t.stores["out"] == 12
    with Trace(x=x, out=out), pytest.raises(Race, match=r"total, program \(1, 0, 0\): read of out\[0\] after a "
                                                        r"write of it by program number 0, in one launch"):
        total[(3,)](x, out, 40, BLOCK=16, ATOMIC=False)
    with Trace(y=out), pytest.raises(Race, match=r"write of y\[0\] after a write of it by program number 0"):
        run(torch.ones(48), out, n=48, strides=(1, 0))
    with Trace(races=False):
        total[(3,)](x, out, 40, BLOCK=16, ATOMIC=False)


def test_the_order_of_programs():
    def ran(shuffle):
        out, count = torch.zeros(3, 4, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        with Trace(out=out, shuffle=shuffle, races=False) as t:
            order[(4, 3)](out, count)
        assert t.owners("out").tolist() == np.arange(12).reshape(3, 4).tolist()
        assert sorted(out.flatten().tolist()) == list(range(12))
        return out.flatten().tolist()

    assert ran(None) == list(range(12)) and ran(1) == ran(1) != ran(2) and ran(1) != ran(None)


def test_tensors_without_a_name_get_their_parameters():
    x = torch.ones(16)
    with Trace() as t:
        run(x, torch.zeros(16))
        run(torch.ones(16), torch.zeros(16))
    assert t.loads == {"x_ptr": 64, "y_ptr": 0, "x_ptr_2": 64, "y_ptr_2": 0}
    lines = str(t).splitlines()
    assert len(lines) == 5 and lines[1].split() == ["x_ptr", "(16,)", "64", "(1.00x)", "0", "(0.00x)"]
    with pytest.raises(KeyError, match="no tensor 'z' in this trace; there are x_ptr"):
        t.owners("z")


def test_one_trace_at_a_time_and_on_the_cpu():
    with Trace(), pytest.raises(RuntimeError, match="a Trace is open already"), Trace():
        pass
    with Trace():
        pass
    with pytest.raises(ValueError, match="x is on meta: a Trace watches the CPU only"):
        Trace(x=torch.zeros(1, device="meta"))


def test_pictures(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    import matplotlib.pyplot as plt

    x, y = torch.ones(4, 8), torch.zeros(4, 8)
    with Trace(x=x, y=y) as t:
        run(x, y)
    axes = t.draw("y")
    assert axes.get_title() == "y (4, 8): program that wrote it"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("column", "row")
    assert [text.get_text() for text in axes.texts] == ["0"] * 16 + ["1"] * 16
    assert axes.images[0].get_array().tolist() == t.owners("y").tolist()
    again = t.draw("x", ax=plt.subplots()[1])
    assert again.get_title().endswith("times read") and {text.get_text() for text in again.texts} == {"1"}
    axes.figure.canvas.draw()
    plt.close("all")


def test_an_open_trace_keeps_watching_when_it_is_opened_again():
    x = torch.zeros(4)
    with Trace(x=x) as trace:
        with pytest.raises(RuntimeError, match="a Trace is open already"), trace:
            pass
        assert builder.observer is trace
    assert builder.observer is None
