"""Checks of `notebooks/08_scaling_laws`."""

import math

import torch

from nanomai.show import exercise

LAWS = [(1.82, 482.0, 2085.4, 0.348, 0.366), (0.3, 30.0, 900.0, 0.35, 0.6), (0.9, 60.0, 150.0, 0.5, 0.3)]  # E A B a b


def _loss(law: tuple, n: float, d: float) -> float:
    floor, big_a, big_b, a, b = law
    return floor + big_a / n**a + big_b / d**b


@exercise
def check_predict_run(answer):
    """`answer(runs, n, d)`: from runs (n, d, loss), the loss of a larger run, within 5 %."""
    generator = torch.Generator().manual_seed(0)
    for law in LAWS:
        for noise in (0.0, 0.003):
            runs = []
            for budget in (1e10, 4e10, 1.6e11):
                for n in (3e3, 1e4, 2e4, 4e4, 1e5):
                    error = 1 + noise * torch.randn((), generator=generator).item()
                    runs.append((n, budget / 6 / n, error * _loss(law, n, budget / 6 / n)))
            for n, d in ((4e5, 1e6), (3e4, 2e7), (2e6, 3e6)):
                got, true = float(answer(list(runs), n, d)), _loss(law, n, d)
                what = f"15 runs with {noise:.1%} noise; {n:.0e} parameters, {d:.0e} tokens"
                off = abs(got / true - 1)
                assert off < 0.05, f"{what}: {got:.3f} is {off:.0%} off the true {true:.3f}"


@exercise
def check_compute_optimal(answer):
    """`answer(law, flops)`: parameters and tokens of least loss where 6 n d = flops; law is (E, A, B, a, b)."""
    for law in LAWS:
        for flops in (1e12, 3e18, 1e25):
            got = answer(law, flops)
            assert isinstance(got, tuple) and len(got) == 2, "return a pair: parameters, tokens"
            n, d = map(float, got)
            what = f"A = {law[1]:g}, B = {law[2]:g}, a = {law[3]:g}, b = {law[4]:g}, {flops:.0e} FLOPs"
            spent = 6 * n * d / flops
            assert abs(spent - 1) < 1e-3, f"{what}: 6 n d is {spent:.3g} of the budget"
            sizes = torch.logspace(0, 25, 250_001, dtype=torch.float64)
            best = sizes[_loss(law, sizes, flops / 6 / sizes).argmin()].item()
            assert abs(math.log(n / best)) < 0.01, f"{what}: {best:.3g} parameters are best, not {n:.3g}"


@exercise
def check_measured_exponent(answer):
    """`answer(law, whole, low, high)`: the exponent of the best n in a budget 6 n d; `whole(n)` are all parameters."""
    counts = {"n is all there is": lambda n: n, "an embedding": lambda n: n + 5e4 * n ** (1 / 3),
              "as many again": lambda n: 2 * n, "a constant": lambda n: n + 1e6}
    for law in LAWS:
        for what, whole in counts.items():
            low, high = 1e14, 1e18
            sizes, best = torch.logspace(1, 15, 280_001, dtype=torch.float64), []
            for flops in (low, high):
                best.append(sizes[_loss(law, whole(sizes), flops / 6 / sizes).argmin()].item())
            true = math.log(best[1] / best[0]) / math.log(high / low)
            got = float(answer(law, whole, low, high))
            case = f"{what}, a = {law[3]:g}, b = {law[4]:g}"
            assert abs(got - true) < 0.005, f"{case}: exponent {true:.3f}, not {got:.3f}"
