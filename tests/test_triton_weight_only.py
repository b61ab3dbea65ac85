"""Weight-only int8 and int4: against float64, under the lens, byte for byte, as ops, and compiled without spills."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from triton_kernels import aot
from triton_kernels import weight_only as kernels
from triton_kernels.lens import Trace

# A result is rounded once: by at most 2^-11 of itself in float16, 2^-8 in bfloat16.
BOUND = {torch.float32: 1e-5, torch.float16: 5e-4, torch.bfloat16: 4e-3}
# shape of x, F
INT8 = [((1, 1), 1), ((1, 64), 31), ((7, 123), 33), ((2, 3, 256), 1), ((9, 509), 40), ((17, 257), 65), ((33, 31), 5)]
# shape of x, F, group
INT4 = [((1, 64), 1, 64), ((1, 128), 31, 128), ((7, 192), 33, 64), ((2, 3, 640), 40, 128), ((9, 1152), 1, 128),
        ((17, 512), 65, 256), ((33, 448), 5, 64)]


def weights(rows, width, group=None, seed=0):
    """(q, scale) of int8, or (packed, scale) of int4, of rows of very different size."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=generator) * torch.logspace(-3, 3, rows)[:, None]
    return kernels.quantize_int8(weight) if group is None else kernels.quantize_int4(weight, group)


def inputs(shape, dtype=torch.float32, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def call(x, weight, scale):
    return (kernels.int8_linear if weight.dtype == torch.int8 else kernels.int4_linear)(x, weight, scale)


def plain(weight, scale, dtype=torch.float64):
    """W, number by number."""
    if weight.dtype == torch.int8:
        return weight.to(dtype) * scale.to(dtype)[:, None]
    rows, groups = scale.shape
    group, dense = 2 * weight.shape[1] // groups, torch.empty(rows, 2 * weight.shape[1], dtype=dtype)
    for d in range(dense.shape[1]):
        quarter, t = divmod(d % group, group // 4)
        byte = weight[:, d // group * (group // 2) + 2 * t + quarter // 2].long()
        dense[:, d] = ((byte >> 4 * (quarter % 2)) % 16 - 8).to(dtype) * scale[:, d // group].to(dtype)
    return dense


def error(got, exact):
    """Relative Frobenius norm."""
    return ((got.double() - exact).norm() / exact.norm().clamp(min=1e-30)).item()


def row_errors(got, exact):
    """The largest of all columns: rows of W with large numbers must not hide those with small ones."""
    return max(error(a, b) for a, b in zip(got.flatten(0, -2).T, exact.flatten(0, -2).T, strict=True))


# --- Quantisation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("group", [None, 64, 128, 256])
def test_no_weight_is_further_off_than_half_its_scale(group, dtype):
    weight = (torch.randn(13, 768) * torch.logspace(-2, 2, 13)[:, None]).to(dtype)
    weight[3], weight[5, 1], weight[7] = 0, 50, weight[7].abs()
    if group is None:
        q, scale = kernels.quantize_int8(weight)
        back, steps = kernels.dequantize_int8(q, scale), scale[:, None]
        assert (q.dtype, scale.dtype) == (torch.int8, torch.float32)
        assert q.abs().amax(1).tolist() == [127] * 3 + [0] + [127] * 9
    else:
        q, scale = kernels.quantize_int4(weight, group)
        back, steps = kernels.dequantize_int4(q, scale), scale.float().repeat_interleave(group, dim=1)
        assert (q.dtype, scale.dtype) == (torch.uint8, torch.bfloat16)
        assert (q.shape, scale.shape) == ((13, 384), (13, 768 // group))
    assert back.shape == weight.shape and back.dtype == torch.float32
    assert ((back - weight.float()).abs() <= 0.5 * (1 + 1e-5) * steps).all()
    assert not back[3].any()
    torch.testing.assert_close(back.double(), plain(q, scale), rtol=1e-6, atol=0)


def test_what_is_on_the_grid_stays():
    n = torch.randint(-7, 8, (3, 256)).float()
    n[:, ::64] = 7
    packed, scale = kernels.quantize_int4(n.T.contiguous().T * 0.25, 64)
    assert torch.equal(kernels.dequantize_int4(packed, scale), n * 0.25) and (scale == 0.25).all()
    n[:, 0] = -127
    q, scale = kernels.quantize_int8(n * 0.5)
    assert torch.equal(kernels.dequantize_int8(q, scale), n * 0.5) and torch.equal(q, n.to(torch.int8))


@pytest.mark.parametrize("value", [1e-45, 1e-38, 3e38])
def test_the_smallest_and_the_largest_numbers(value):
    weight = torch.full((1, 64), value)
    q, scale = kernels.quantize_int8(weight)
    packed, scales = kernels.quantize_int4(weight, 64)
    for back, step in (kernels.dequantize_int8(q, scale), scale), (kernels.dequantize_int4(packed, scales), scales):
        assert back.isfinite().all() and ((back.double() - weight.double()).abs() <= 0.501 * step.double()).all()


def test_what_cannot_be_quantised_is_refused():
    weight = torch.randn(4, 192)
    for quantize in (kernels.quantize_int8, kernels.quantize_int4):
        for dtype in (torch.float64, torch.int8):
            with pytest.raises(TypeError, match=f"a weight of {dtype}; float32, float16 and bfloat16 can be quantised"):
                quantize(weight.to(dtype))
        for other in (weight[0], weight[:0], weight[:, :0], weight[None]):
            with pytest.raises(ValueError, match=r"it must be \(F, D\), and not empty"):
                quantize(other)
        for value in (torch.inf, torch.nan):
            with pytest.raises(ValueError, match="the weight holds infinities or NaN"):
                quantize(torch.where(weight == weight[2, 7], value, weight))
    for group in (128, 32, 0):
        with pytest.raises(ValueError, match=rf"rows of 192 in groups of {group}; it must divide them, of \(64, 128"):
            kernels.quantize_int4(weight, group)


# --- The products -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("shape, rows, group", [(*case, None) for case in INT8] + INT4)
def test_linear(shape, rows, group, dtype, poisoned):
    weight, scale = weights(rows, shape[-1], group)
    x = inputs(shape, dtype)
    with Trace(x=x, scale=scale, shuffle=rows):
        y = call(x, weight, scale)
    assert y.shape == (*shape[:-1], rows) and y.dtype == dtype and y.is_contiguous()
    exact = x.detach().double() @ plain(weight, scale).T
    assert row_errors(y, exact) < BOUND[dtype]
    dy = inputs(y.shape, dtype, seed=2).detach()
    (dx,) = torch.autograd.grad(y, x, dy)
    assert dx.dtype == dtype and error(dx, dy.double() @ plain(weight, scale)) < BOUND[dtype]


@pytest.mark.parametrize("group", [None, 64, 256])
def test_it_moves_the_bytes_it_must(group):
    """The roofline as a unit test: up to 16 rows of x, each byte of W crosses once."""
    rows = 70
    weight, scale = weights(rows, 768, group)
    for m, times in ((1, 1), (8, 1), (16, 1), (17, 2)):
        x = inputs((m, 768), torch.bfloat16)
        with Trace(x=x, scale=scale) as t:
            y = call(x, weight, scale)
        words = "q_ptr" if group is None else "words_ptr"
        assert t.loads == {words: times * weight.nbytes, "scale": times * scale.nbytes, "x": 3 * x.nbytes, "y_ptr": 0}
        assert {name: moved for name, moved in t.stores.items() if moved} == {"y_ptr": y.nbytes}


@pytest.mark.parametrize("group", [None, 128])
def test_each_row_is_independent_of_how_many_there_are(group):
    weight, scale = weights(40, 1024, group)
    x = inputs((17, 1024), torch.bfloat16).detach()
    y = call(x, weight, scale)
    assert torch.equal(call(x.view(17, 1, 1024), weight, scale), y[:, None])
    for m in (1, 8, 9):
        torch.testing.assert_close(call(x[:m], weight, scale), y[:m])


@pytest.mark.parametrize("group", [None, 64])
def test_layouts(group):
    weight, scale = weights(6, 128, group)
    x = inputs((5, 128))
    want = call(x, weight, scale)
    for w, s in ((weight.T.contiguous().T, scale), (weight, torch.stack([scale, scale], -1)[..., 0])):
        assert torch.equal(call(x.T.contiguous().T, w, s), want)
    empty = torch.zeros(2, 0, 128, requires_grad=True)
    y = call(empty, weight, scale)
    assert y.shape == (2, 0, 6)
    y.sum().backward()
    assert empty.grad.shape == (2, 0, 128)
    assert call(x[0], weight, scale).shape == (6,)


@pytest.mark.parametrize("group", [None, 64])
def test_what_does_not_fit_is_refused(group):
    weight, scale = weights(6, 192, group)
    x = inputs((5, 192))
    for bad in ((x.double(), weight, scale), (x, weight.to(torch.int16), scale), (x, weight, scale.half())):
        with pytest.raises(TypeError, match=f"x must be float32, float16 or bfloat16, the others {weight.dtype} and"):
            call_as(group, *bad)
    for bad in ((x[:, :191], weight, scale), (x, weight[:5], scale), (x, weight[:0], scale[:0]), (x, weight[0], scale),
                (x, weight, scale[0] if group else scale[:, None]), (x.new_zeros(()), weight, scale)):
        with pytest.raises(ValueError, match="do not fit one another"):
            call_as(group, *bad)
    scale.requires_grad_()
    with pytest.raises(ValueError, match="the weight is frozen, only x gets a gradient"):
        call_as(group, x, weight, scale)
    with torch.no_grad():
        call_as(group, x, weight, scale)


def call_as(group, *args):
    return (kernels.int8_linear if group is None else kernels.int4_linear)(*args)


def test_groups_that_do_not_fit_are_refused():
    packed, scale = weights(6, 192, 64)
    for other in (scale[:, :2], scale[:, :1], scale[:, :0], scale.repeat(1, 2)):
        with pytest.raises(ValueError, match=rf"{other.shape[1]} scales for rows of 192; groups have \(64, 128, 256\)"):
            kernels.int4_linear(inputs((5, 192)), packed, other)


# --- As ops, and for GPUs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [None, 64])
def test_opcheck(group):
    op = kernels.int8_linear_op if group is None else kernels.int4_linear_op
    torch.library.opcheck(op, (inputs((2, 3, 128)), *weights(5, 128, group)))


def test_compiled_and_checkpointed():
    """Low-rank adapters on a frozen base: what dx is for."""
    x, first, second = inputs((4, 128)), weights(128, 128), weights(128, 128, 64)
    a, b = inputs((128, 3), seed=3), inputs((3, 128), seed=4)

    def block(x):
        h = kernels.int8_linear(x, *first) * 1e-3 + x @ a @ b
        return kernels.int4_linear(torch.tanh(h), *second)

    def gradients(f):
        return torch.autograd.grad(f(x).square().sum(), (x, a, b))

    want = gradients(block)
    for f in (torch.compile(block, fullgraph=True), lambda x: checkpoint(block, x, use_reentrant=False)):
        for got, wanted in zip(gradients(f), want, strict=True):
            assert error(got, wanted.double()) < 1e-5


def binary(arch, group, rows, dtype=torch.bfloat16):
    """The kernel that a linear layer of 4096 x 4096 would launch."""
    def empty(*shape, dtype):
        return torch.empty(*shape, dtype=dtype, device="meta")

    x = empty(rows, 4096, dtype=dtype)
    if group is None:
        args = kernels.int8_launch, x, empty(4096, 4096, dtype=torch.int8), empty(4096, dtype=torch.float32)
    else:
        packed = empty(4096, 2048, dtype=torch.uint8)
        args = kernels.int4_launch, x, packed, empty(4096, 4096 // group, dtype=torch.bfloat16)
    (made,) = aot.compile_launches(arch, *args, arch)
    return made


@pytest.mark.parametrize("group, rows", [(None, 1), (None, 16), (64, 1), (128, 1), (128, 16), (256, 16)])
def test_sm_90_neither_spills_nor_loads_narrowly(group, rows, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    made = binary("sm_90", group, rows)
    assert made.spilled == 0 and made.shared <= 99 * 1024, made
    assert sum(made.tensor_core.values()) > 0, made
    # Narrow are scales, and x where a quarter of a group of 64, 32 bytes of each row, is shared out to 256 threads.
    assert made.loads - made.wide_loads <= (14 if group == 64 else 4), made


@pytest.mark.parametrize("arch", ["sm_80", "sm_100", "gfx942"])
def test_other_gpus_do_not_spill(arch, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    made = binary(arch, 128, 16)
    assert made.spilled == 0 and made.shared <= min(99 * 1024, aot.SHARED_LIMIT[arch]) and made.tensor_core, made


def test_float32_is_multiplied_in_full(tmp_path, monkeypatch):
    """Tensor cores would round x to tf32, which keeps 11 bits of 24."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    made = binary("sm_90", 64, 16, torch.float32)
    assert made.spilled == 0 and made.shared <= 99 * 1024 and not made.tensor_core, made


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_unpacking_takes_two_numbers_at_a_time(dtype, tmp_path, monkeypatch):
    """The loop of sm_90: no conversions of single integers, and half a subtraction for each of its 128 numbers."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assembly = binary("sm_90", 128, 1, dtype).assembly
    assert "I2F" not in assembly and "PRMT" not in assembly.split("HMMA")[1]
    assert assembly.count("HADD2") + assembly.count("HFMA2") in range(64, 72)
