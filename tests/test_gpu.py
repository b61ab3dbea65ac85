"""Every kernel on a GPU: against float64, against the interpreter, every row of the tables of tiles, as ops.

    make gpu                                  # on a machine with one: these tests, then all measurements
    pytest -m gpu tests/test_gpu.py           # the tests alone

The rule needs no tolerance that somebody chose: the error against float64 may be twice that of torch's own operations
in the same dtype, and 1e-6. The same code runs in every `make test` at tiny sizes, through the interpreter, so that it
is not the test that fails when a GPU is at hand at last.
"""

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import kernel_cases
from benchmarks.machines import no_synchronization
from triton_kernels import linear_cross_entropy
from triton_kernels.engine import architecture

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")]
CASES = [("cpu", case) for case in kernel_cases.tiny()]
CASES += [("cuda", case) for make in (kernel_cases.tiny, kernel_cases.ragged, kernel_cases.real) for case in make()]
TINY = [(device, case) for device, case in CASES if case.shape == "tiny"]


def parameters(cases, *more):
    """Each (device, case), marked where it needs a GPU; the id begins with the kernel and an @ (see gpu.py)."""
    return [pytest.param(device, case, *rest, id="-".join([case.name, *(str(r).removeprefix("torch.") for r in rest),
                                                           device]), marks=GPU if device == "cuda" else [])
            for device, case in cases for rest in ([(m,) for m in more[0](device, case)] if more else [()])]


def comparable(device, case):
    return case.dtypes


def all_that_run(device, case):
    """On the CPU one is enough to test the test. AdamW rounds bfloat16 by chance: no rule, but the same bits."""
    more = [d for d in case.dtypes if d != torch.bfloat16] if device == "cuda" else []
    return [torch.bfloat16, *more]


@pytest.fixture(autouse=True)
def products_in_full_precision():
    """torch's own float32 products, the other side of the rule, must not take tf32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(autouse=True)
def memory_for_others():
    """Processes share the GPU, and torch keeps what a large test allocated."""
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def prepare(case, dtype, device="cpu"):
    """Inputs; the same for every dtype and device but for their rounding."""
    torch.manual_seed(0)
    return move(case.make(dtype), device)


def move(inputs, device, dtype=None):
    """Copies, each a leaf again; floats may change their dtype."""
    def one(x):
        wide = dtype if dtype and x.is_floating_point() else x.dtype
        return x.detach().to(device, wide, copy=True).requires_grad_(x.requires_grad)

    return tuple(one(x) if isinstance(x, torch.Tensor) else x for x in inputs)


def results(function, inputs):
    """What comes out and, where somebody asks for it, every gradient; the gradients that enter are drawn on the CPU."""
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    leaves = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
    if not leaves or not any(y.requires_grad for y in outputs):
        return outputs
    generator = torch.Generator().manual_seed(1)
    entering = [torch.randn(y.shape, generator=generator).to(leaves[0].dtype).to(y.device, y.dtype) for y in outputs]
    return *outputs, *torch.autograd.grad(outputs, leaves, entering)


def error(got, exact):
    """Relative Frobenius norm, absolute where the truth is zero."""
    norm = exact.double().norm()
    return ((got.double() - exact.double()).norm() / (norm if norm > 1e-12 else 1.0)).item()


def check(case, dtype, device):
    """Ours against the rule."""
    inputs = prepare(case, dtype, device)
    got, eager = (results(f, move(inputs, device)) for f in (case.ours, case.eager))
    truth = results(case.eager, move(inputs, device, torch.float64))
    for i, (ours, theirs, exact) in enumerate(zip(got, eager, truth, strict=True)):
        assert ours.shape == exact.shape and ours.dtype == theirs.dtype, (i, ours.dtype, theirs.dtype)
        assert error(ours, exact) <= 2 * error(theirs, exact) + 1e-6, f"result {i} of {len(got)}"


@pytest.mark.parametrize("dtype", kernel_cases.FLOATS, ids=str)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_addmm_takes_halves_and_adds_up_in_float32(device, dtype):
    """The one call into the library whose CUDA form no CPU runs."""
    torch.manual_seed(0)
    a, b = torch.randn(96, 64).to(device, dtype), torch.randn(64, 48).to(device, dtype)
    total = torch.full((96, 48), torch.nan, device=device)
    linear_cross_entropy.add_product(total, a, b, first=True)
    exact = a.double() @ b.double()
    assert error(total, exact) < 1e-6
    linear_cross_entropy.add_product(total, a, b, first=False)
    assert total.dtype == torch.float32 and error(total, 2 * exact) < 1e-6


@pytest.mark.parametrize("device, case, dtype", parameters(CASES, comparable))
def test_error_is_at_most_twice_that_of_torch(device, case, dtype):
    check(case, dtype, device)


def rows_of_tables():
    """(table, row, case, device), with every case that uses the table."""
    for name, (table, cases) in kernel_cases.TABLES.items():
        for row in table:
            for case in cases:
                yield pytest.param(name, row, case, "cuda", id=f"{case.name}-{row}-cuda", marks=GPU)
        yield pytest.param(name, "sm_90", cases[0], "cpu", id=f"{cases[0].name}-sm_90-cpu")


def fits(row, arch):
    """Whether a GPU has the shared memory for this row: for its own, for sm_80's on any of NVIDIA's, for cpu's."""
    return row in (arch, "cpu") or (row == "sm_80" and arch.startswith("sm_"))


def test_which_rows_fit():
    rows = "sm_80", "sm_90", "sm_100", "gfx942", "cpu"
    assert [row for row in rows if fits(row, "sm_80")] == ["sm_80", "cpu"]
    assert [row for row in rows if fits(row, "sm_90")] == ["sm_80", "sm_90", "cpu"]
    assert [row for row in rows if fits(row, "gfx942")] == ["gfx942", "cpu"]


@pytest.mark.parametrize("name, row, case, device", list(rows_of_tables()))
def test_every_row_of_every_table(name, row, case, device, monkeypatch):
    """Compilers have made wrong code for one width of a tile and right code for all others."""
    table = kernel_cases.TABLES[name][0]
    if device == "cuda" and not fits(row, arch := architecture(torch.empty(0, device=device))):
        pytest.skip(f"{row} is too large for {arch}")
    for other in table:
        monkeypatch.setitem(table, other, table[row])
    check(case, torch.bfloat16, device)


@pytest.mark.parametrize("device, case, dtype", parameters(TINY, all_that_run))
def test_the_gpu_agrees_with_the_interpreter(device, case, dtype):
    inputs = prepare(case, dtype)
    here, there = (results(case.ours, move(inputs, where)) for where in ("cpu", device))
    truth = results(case.eager, move(inputs, "cpu", torch.float64))
    eager = results(case.eager, move(inputs, "cpu"))
    for a, b, exact, theirs in zip(here, there, truth, eager, strict=True):
        if case.kernel == "adamw":  # every operation rounds as IEEE 754 says: the same bits, random ones too
            assert torch.equal(a, b.cpu())
        assert error(b.cpu(), a) <= 4 * error(theirs, exact) + 2e-6  # both keep the rule, on both sides of the truth


@pytest.mark.parametrize("device, case", parameters(TINY))
def test_results_are_the_same_each_time(device, case):
    inputs = prepare(case, torch.bfloat16, device)
    first, second = (results(case.ours, move(inputs, device)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("device, case", parameters(TINY))
def test_the_host_never_waits(device, case):
    def forward_and_backward(inputs):
        outputs = case.ours(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        if any(y.requires_grad for y in outputs):
            torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])

    inputs = prepare(case, torch.bfloat16, device)
    forward_and_backward(inputs)  # compiling may wait
    with no_synchronization(device):
        forward_and_backward(inputs)


@pytest.mark.parametrize("device, case", parameters(TINY))
def test_compiled(device, case):
    """On the CPU without code generation, which the tests of each kernel have."""
    torch._dynamo.reset()
    compiled = torch.compile(case.ours, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    inputs = prepare(case, torch.float32, device)
    for a, b in zip(*(results(f, move(inputs, device)) for f in (compiled, case.ours)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kernel", ["add_rms_norm", "swiglu", "cross_entropy"])
@pytest.mark.parametrize("device, numbers", [("cpu", 999), pytest.param("cuda", 2**31, marks=GPU)])
def test_past_two_to_the_31_numbers(device, numbers, kernel):
    """Offsets of 32 bits would wrap: the last rows of a large tensor are what the same rows are alone."""
    width, tail = (64, 8) if device == "cpu" else (4096, 8)
    rows = numbers // width + tail
    case = getattr(kernel_cases, kernel)("large", rows, width)
    torch.manual_seed(0)
    with torch.device(device):
        whole = case.make(torch.bfloat16)
    last = move([x[-tail:] if len(x) == rows else x for x in whole], device)
    for x in (*whole, *last):
        assert x.device.type == device
    got, want = (gradients_of_rows(case.ours, inputs, n) for inputs, n in ((whole, rows), (last, tail)))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a[-tail:], b)


def gradients_of_rows(function, inputs, rows):
    """Every result and gradient that has a line for each row."""
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    leaves = [x for x in inputs if x.requires_grad]
    gradients = torch.autograd.grad(outputs, leaves, [torch.ones_like(y) for y in outputs])
    return [x for x in (*outputs, *gradients) if x.ndim and len(x) == rows]


def test_the_table_holds_every_kernel():
    """A kernel without a case would never be run on a GPU."""
    import pkgutil

    import triton_kernels

    library = {"aot", "engine", "interpreter", "lens", "lessons", "matmul"}  # and what is never dispatched
    rooms = {m.name for m in pkgutil.iter_modules(triton_kernels.__path__)} - library
    kernels = {case.kernel for case in kernel_cases.tiny()}
    has = {"rms_norm": "add_rms_norm", "flash_attention": "attention", "grouped_gemm": "grouped_swiglu",
           "weight_only": "int4_linear"}
    assert {has.get(room, room) for room in rooms if not room.endswith("_tiles")} <= kernels
    assert {case.kernel for case in kernel_cases.measured()} <= kernels
