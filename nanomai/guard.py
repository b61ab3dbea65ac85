"""The guard that stands between a bad step and the weights."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

MEMORY = 0.98  # how much of the running statistics survives a step: they look back about 50 steps
SETTLING = 20  # accepted steps before deviations are judged; the first losses fall too fast to be a measure
LEAST_DEVIATION = 0.05  # of a logarithm: in a calm run 5 % must not count as many deviations


@dataclass
class RunningStatistics:
    """Exponentially weighted mean and variance of the logarithm of a positive number."""

    mean: float = 0.0
    variance: float = 0.0
    count: int = 0

    def deviations(self, value: float) -> float:
        """How many standard deviations `value` lies above the mean."""
        return (math.log(max(value, 1e-30)) - self.mean) / max(math.sqrt(self.variance), LEAST_DEVIATION)

    def add(self, value: float) -> None:
        self.count += 1
        weight = max(1 - MEMORY, 1 / self.count)  # a plain average until there is enough to forget
        change = math.log(max(value, 1e-30)) - self.mean
        self.mean += weight * change
        self.variance = (1 - weight) * (self.variance + weight * change**2)


@dataclass
class SpikeGuard:
    """Refuses a step whose loss or gradient norm is not finite, or lies too far above the recent ones.

    Its statistics are part of a checkpoint, so a resumed run refuses exactly the steps that the unbroken one would.
    Every rank sees the same global numbers and so comes to the same verdict.
    """

    limit: float
    loss: RunningStatistics = field(default_factory=RunningStatistics)
    grad_norm: RunningStatistics = field(default_factory=RunningStatistics)
    skipped_in_a_row: int = 0
    skipped: int = 0

    def verdict(self, loss: float, grad_norm: float) -> str | None:
        """None to let the step through, or the reason to skip it; remembers the step either way."""
        reason = None
        for name, value, recent in (("loss", loss, self.loss), ("gradient norm", grad_norm, self.grad_norm)):
            if not math.isfinite(value):
                reason = reason or f"the {name} is {value}"
            elif recent.count >= SETTLING and recent.deviations(value) > self.limit:
                far = f"{recent.deviations(value):.0f} deviations above the recent"
                reason = reason or f"the {name} {value:.3g} is {far}"
        if reason:
            self.skipped += 1
            self.skipped_in_a_row += 1
            return reason
        self.skipped_in_a_row = 0
        self.loss.add(loss)
        self.grad_norm.add(grad_norm)
        return None

    def state(self) -> dict:
        return {"loss": dict(vars(self.loss)), "grad_norm": dict(vars(self.grad_norm)),
                "skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row}

    def restore(self, state: dict) -> None:
        self.loss, self.grad_norm = RunningStatistics(**state["loss"]), RunningStatistics(**state["grad_norm"])
        self.skipped, self.skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]
