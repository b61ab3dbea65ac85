"""Checks of `notebooks/15_planning_a_500b_run`."""

import math
from dataclasses import replace

from nanomai.config import ConfigError, ParallelConfig
from nanomai.config_file import load_config
from nanomai.planner import plan
from nanomai.show import exercise

FEWEST, MOST, DAYS = 7_200, 8_000, 200


@exercise
def check_layout(answer):
    """`answer()`: a number of H100s and settings of `parallel` with which mai-1-dense fits, in time."""
    got = answer()
    assert isinstance(got, tuple) and len(got) == 2 and isinstance(got[1], dict), \
        "return a pair: the number of GPUs, and a dictionary of settings of `parallel`"
    gpus, settings = got
    assert gpus <= MOST, f"{gpus:,} GPUs: there are only {MOST:,}"
    assert gpus >= FEWEST, f"{gpus:,} GPUs leave more than a tenth of {MOST:,} idle"
    config = load_config("mai-1-dense")
    try:
        parallel = ParallelConfig(**settings)
        found = plan(replace(config, parallel=parallel, train=replace(config.train, micro_batch=1)), gpus)
    except ConfigError as error:
        raise AssertionError(f"the planner refuses it: {error}") from None
    assert found.fits, f"it does not fit: {found.memory['peak'] / 1e9:.0f} GB of 80, and a tenth must stay free"
    assert found.run["days"] < DAYS, f"it fits, but takes {found.run['days']:.0f} days: not less than {DAYS}"


@exercise
def check_gpus_for(answer):
    """`answer(flops, days, mfu, peak, goodput)`: the fewest GPUs, in machines of eight; `mfu` is a function of them."""
    h100 = 989.4e12
    for flops, days, mfu, peak, goodput in [
            (3e25, 90, lambda n: 0.4, h100, 0.9), (3e25, 90, lambda n: 0.5 - 0.02 * math.log2(n / 8), h100, 0.9),
            (3e25, 60, lambda n: 0.5 - 0.02 * math.log2(n / 8), h100, 0.8),
            (5e24, 14, lambda n: 0.3 / (1 + n / 50_000), h100, 0.95), (8e21, 10, lambda n: 0.45, 312e12, 1.0),
            (1e18, 30, lambda n: 0.4, h100, 0.9)]:
        got = answer(flops, days, mfu, peak, goodput)
        case = f"{flops:.0e} FLOPs in {days} days, goodput {goodput}"
        assert got == int(got) and got > 0 and got % 8 == 0, f"{case}: {got} are no whole machines of eight"
        takes, fewer = (flops / (n * peak * mfu(n) * goodput) / 86_400 if n else math.inf for n in (got, got - 8))
        assert takes <= days * (1 + 1e-9), f"{case}: {got:,} GPUs take {takes:.2f} days, at {mfu(got):.1%} MFU"
        assert fewer > days, f"{case}: {got:,} GPUs are more than are needed: {got - 8:,} take {fewer:.2f} days"


@exercise
def check_carbon_price(answer):
    """`answer(here, there)`: dollars for a tonne of CO2 at which the cleaner site costs the same."""
    for here, there in [((0.05, 1.2, 0.4), (0.08, 1.2, 0.03)), ((0.05, 1.5, 0.4), (0.08, 1.1, 0.03)),
                        ((0.06, 1.1, 0.7), (0.07, 1.4, 0.05)), ((0.05, 1.4, 0.3), (0.05, 1.2, 0.3)),
                        ((0.09, 1.2, 0.4), (0.05, 1.2, 0.02)), ((0.04, 1.2, 0.45), (0.12, 1.1, 0.0))]:
        got, case = answer(here, there), f"{here} against {there}"
        want = max(0.0, (there[0] * there[1] - here[0] * here[1]) / (here[2] * here[1] - there[2] * there[1]) * 1000)
        assert got >= 0, f"{case}: the cleaner site is the cheaper one already, so no price is needed; not {got:.2f}"
        assert math.isclose(got, want, rel_tol=1e-6, abs_tol=1e-9), \
            f"{case}: at {got:,.2f} dollars a tonne a kWh of the machines costs {_cost(here, got):.4f} here and " \
            f"{_cost(there, got):.4f} there"


def _cost(site: tuple[float, float, float], price: float) -> float:
    """Dollars for a kWh that reaches the machines."""
    dollars, pue, kilograms = site
    return pue * (dollars + kilograms * price / 1000)
