"""The guard: what it refuses, what it lets through, and that a restored one judges alike."""

import json
import math
import random
import statistics

import pytest

from nanomai.guard import LEAST_DEVIATION, SETTLING, RunningStatistics, SpikeGuard


def calm(n: int, seed: int = 0, noise: float = 0.1) -> list[tuple[float, float]]:
    draw = random.Random(seed)
    return [(5.0 * math.exp(draw.gauss(0, noise)), 0.7 * math.exp(draw.gauss(0, noise))) for _ in range(n)]


def settled(n: int = 60, limit: float = 8.0) -> SpikeGuard:
    guard = SpikeGuard(limit)
    assert [guard.verdict(*step) for step in calm(n)] == [None] * n
    return guard


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["loss", "gradient norm"])
@pytest.mark.parametrize("guard", [SpikeGuard(8.0), settled()], ids=["first step", "settled"])
def test_what_is_not_finite_is_refused(guard, name, value):
    step = (value, 1.0) if name == "loss" else (5.0, value)
    before = json.dumps([guard.state()[k] for k in ("loss", "grad_norm")])
    assert guard.verdict(*step) == f"the {name} is {value}"
    assert json.dumps([guard.state()[k] for k in ("loss", "grad_norm")]) == before, "it must not enter the statistics"


@pytest.mark.parametrize("step, said", [((50.0, 0.7), "the loss 50 is"), ((5.0, 70.0), "the gradient norm 70 is")])
def test_a_spike_is_refused(step, said):
    reason = settled().verdict(*step)
    assert reason.startswith(said) and reason.endswith("deviations above the recent")


def test_a_fall_is_welcome_and_a_slow_rise_too():
    guard = settled()
    assert guard.verdict(0.01, 0.001) is None and guard.verdict(0.0, 0.0) is None
    guard, level = settled(), 5.0
    for _ in range(200):
        level *= 1.02
        assert guard.verdict(level, 0.7) is None


def test_the_first_steps_are_not_judged():
    guard = SpikeGuard(8.0)
    for i in range(SETTLING):
        assert guard.verdict(11.0 * 10.0 ** (i % 2), 1.0) is None


@pytest.mark.parametrize("deviations, refused", [(7.9, False), (8.1, True)])
def test_a_run_without_noise_has_a_least_deviation(deviations, refused):
    guard = SpikeGuard(8.0)
    for _ in range(SETTLING):
        assert guard.verdict(5.0, 1.0) is None
    assert bool(guard.verdict(5.0 * math.exp(deviations * LEAST_DEVIATION), 1.0)) == refused


def test_the_limit_is_the_configurations():
    spike = (5.0 * math.exp(0.5), 0.7)  # about five deviations of 0.1
    assert settled(limit=8.0).verdict(*spike) is None
    assert settled(limit=3.0).verdict(*spike) is not None


def test_counts():
    guard = settled()
    for n in range(1, 4):
        guard.verdict(math.nan, 1.0)
        assert (guard.skipped, guard.skipped_in_a_row) == (n, n)
    guard.verdict(5.0, 0.7)
    guard.verdict(math.nan, 1.0)
    assert (guard.skipped, guard.skipped_in_a_row) == (4, 1)


def test_statistics_are_the_plain_ones_at_first_and_forget_later():
    recent, values = RunningStatistics(), [loss for loss, _ in calm(40)]
    for value in values:
        recent.add(value)
    logs = [math.log(v) for v in values]
    assert recent.mean == pytest.approx(statistics.fmean(logs))
    assert recent.variance == pytest.approx(statistics.pvariance(logs))
    for _ in range(500):
        recent.add(1.0)
    assert recent.mean == pytest.approx(0.0, abs=1e-3)


def test_a_restored_guard_judges_alike():
    guard = settled()
    guard.verdict(math.nan, 1.0)
    state = json.loads(json.dumps(guard.state()))
    kept = guard.state()
    after = [*calm(30, seed=1), (500.0, 1.0), *calm(5, seed=2)]
    expected = [guard.verdict(*step) for step in after]
    for saved in (state, kept):  # also one that never left memory: a state is a copy
        other = SpikeGuard(8.0)
        other.restore(saved)
        assert [other.verdict(*step) for step in after] == expected
        assert other.state() == guard.state()
    assert any(expected) and guard.skipped == 1 + sum(map(bool, expected))
