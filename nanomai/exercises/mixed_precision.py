"""Checks of `notebooks/10_mixed_precision`."""

import math

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nanomai.show import exercise


@exercise
def check_smallest_step(answer):
    """`answer(x, dtype)`: the smallest power of two that changes x when it is added and the sum is rounded to dtype."""
    cases = [(1.0, torch.bfloat16), (1 + 2**-7, torch.bfloat16), (1.0, torch.float16), (1.0, torch.float32),
             (0.75, torch.bfloat16), (256.0, torch.bfloat16), (255.0, torch.bfloat16), (3 * 2.0**-12, torch.float16),
             (1 + 2**-23, torch.float32), (1.0, torch.float8_e4m3fn), (13.0, torch.float8_e4m3fn),
             (1.25, torch.float8_e5m2), (6.0, torch.float8_e5m2), (1024.0, torch.float32)]
    for x, dtype in cases:
        got = answer(x, dtype)
        what = f"{x:g} in {str(dtype).removeprefix('torch.')}"
        assert isinstance(got, float) and got > 0 and math.frexp(got)[0] == 0.5, (
            f"{what}: {got!r} is no power of two as a float")
        for step, changes in ((got, True), (got / 2, False)):
            total = torch.tensor(x + step, dtype=torch.float64).to(dtype).double().item()
            assert (total != x) == changes, (f"{what}: 2^{int(math.log2(step))} "
                                             + ("changes nothing" if changes else "changes it too, and is smaller"))


class _Narrow(TorchDispatchMode):
    """Refuses numbers wider than bfloat16, and functions whose insides are float32."""

    SUMS = {"sum", "mean", "cumsum", "_softmax", "_log_softmax", "logsumexp", "mm", "bmm", "dot", "mv", "addmv",
            "addmm", "norm", "linalg_vector_norm"}

    def __torch_dispatch__(self, op, types, inputs=(), options=None):
        name = op._overloadpacket.__name__
        assert name not in self.SUMS, f"{name} sums in float32 inside: add up yourself"
        leaves = name in ("_local_scalar_dense", "item") and inputs[0].is_floating_point()
        assert not leaves, "a number left bfloat16 for Python's float64: stay in tensors"
        y = op(*inputs, **(options or {}))
        for made in y if isinstance(y, tuple | list) else [y]:
            if isinstance(made, Tensor) and made.is_floating_point():
                assert made.dtype == torch.bfloat16, f"{name} made {made.dtype}; only bfloat16 is allowed"
        return y


@exercise
def check_compensated_sum(answer):
    """`answer(values)`: the sum of a bfloat16 vector (n,) as a bfloat16 number, without a wider number."""
    generator = torch.Generator().manual_seed(0)
    small_and_large = torch.tensor([1.0, 2.0**12, 1.0, -(2.0**12), 0.5])
    cases = {"1,000 ones": torch.ones(1000), "a thousandth, 700 times": torch.full((700,), 1e-3),
             "1, 4096, 1, -4096, 0.5": small_and_large, "one number": torch.tensor([3.0]),
             "256 and 300 halves": torch.cat([torch.tensor([256.0]), torch.full((300,), 0.5)]),
             "random numbers": torch.rand(500, generator=generator)}
    for what, values in cases.items():
        values = values.bfloat16()
        with _Narrow():
            got = answer(values.clone())
        assert isinstance(got, Tensor) and got.dtype == torch.bfloat16, f"{what}: return a bfloat16 tensor"
        assert got.shape == (), f"{what}: return one number, not a shape {tuple(got.shape)}"
        true = values.double().sum().item()
        assert abs(got.double().item() - true) <= 2**-7 * abs(true), f"{what}: {true:.5g}, not {got.item():.5g}"


@exercise
def check_narrow_softmax(answer):
    """`answer(scores)`: the softmax of a bfloat16 vector (n,), in bfloat16 alone, within 3 %."""
    generator = torch.Generator().manual_seed(0)
    cases = {"one score": torch.tensor([2.0]), "seven scores": torch.randn(7, generator=generator),
             "4,096 equal scores": torch.zeros(4096), "scores near 200": 200 + torch.randn(50, generator=generator),
             "5,000 scores": torch.randn(5000, generator=generator), "scores near -300": torch.full((33,), -300.0)}
    for what, scores in cases.items():
        scores = scores.bfloat16()
        with _Narrow():
            got = answer(scores.clone())
        assert isinstance(got, Tensor) and got.dtype == torch.bfloat16, f"{what}: return a bfloat16 tensor"
        assert got.shape == scores.shape, f"{what}: shape {tuple(got.shape)}, not {tuple(scores.shape)}"
        assert got.isfinite().all(), f"{what}: some probabilities are not finite"
        off = (got.double() / scores.double().softmax(-1) - 1).abs().max().item()
        assert off < 0.03, f"{what}: a probability is off by {off:.0%}"
