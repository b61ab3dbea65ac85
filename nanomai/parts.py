"""The settings of the parts that a model may have: stretched rotations, sparse layers, experts, latents.

A part that a family leaves out stays at its default, which means "none".
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


class ConfigError(ValueError):
    """A setting that cannot work: one line that names the file, the line, the field, and what to do."""

    def __init__(self, message: str, field: str | None = None):
        super().__init__(message)
        self.field = field  # dotted name, so that the loader can find its line in the file


def positive(section, path: str, names: str) -> None:
    """ConfigError unless each of these fields is above 0 and finite."""
    for name in names.split():
        if not 0 < (value := getattr(section, name)) < math.inf:
            raise ConfigError(f"{name} {value} must be above 0 and finite", f"{path}.{name}")


@dataclass(frozen=True)
class RopeScaling:
    """How rotary positions are stretched over contexts longer than the first training's; see `rope.py`."""

    kind: Literal["none", "linear", "ntk", "llama3", "yarn", "longrope"] = "none"
    """linear (arXiv 2306.15595), ntk (a larger theta), llama3 (by wavelength), yarn (arXiv 2309.00071), longrope (arXiv
    2402.13753)."""
    original_context: int = 0
    """The context of the first training, in tokens."""
    factor: float = 1.0
    """How many times longer; all but longrope."""
    low_frequency: float = 1.0
    """llama3, yarn: waves that turn less often than this in the original context are stretched by the whole factor."""
    high_frequency: float = 4.0
    """llama3, yarn (32 in its paper): waves that turn more often stay; between the two the stretch is interpolated."""
    whole_pairs: bool = True
    """yarn: the ramp between the two begins and ends at a pair, rounded outwards."""
    mscale: float = 0.0
    """yarn: cosine and sine are multiplied by m(mscale) / m(mscale_all_dim), where m(x) = 1 + 0.1 x ln factor ..."""
    mscale_all_dim: float = 0.0
    """... or by m(1) if one of the two is 0. The scores of latent attention are multiplied by m(mscale_all_dim)^2."""
    short_factors: tuple[float, ...] = ()
    """longrope, one for each pair: of the wavelengths while the text fits into the original context."""
    long_factors: tuple[float, ...] = ()
    """longrope, one for each pair: beyond it."""
    attention_factor: float | None = None
    """longrope, yarn: multiplies cosine and sine; None: as above, and in longrope sqrt(1 + ln s / ln original), s being
    context_length / original."""


@dataclass(frozen=True)
class SparseAttention:
    """Layers that see only near blocks of keys and every so many-th far one, taking turns with dense layers."""

    block: int = 0
    """Positions in a block; 0: all layers are dense."""
    local_blocks: int = 1
    """The nearest blocks that a query sees, its own included."""
    vertical_stride: int = 0
    """Every so many-th block is seen from everywhere after it, another one in each head; 0: none."""
    dense_every: int = 2
    """Every so many-th layer is dense: of 2, the layers 1, 3, 5, ..."""


@dataclass(frozen=True)
class MoEConfig:
    """Mixture of experts: MLPs of which each token meets a few (arXiv 1701.06538)."""

    n_experts: int = 0
    """E: routed experts in each such layer; 0: every MLP is dense."""
    experts_per_token: int = 2
    """Routed experts that one token meets."""
    d_expert: int = 0
    """Width of one expert, as d_ff is of a dense MLP."""
    n_shared_experts: int = 0
    """Experts that every token meets beside the routed ones; together one MLP of n_shared_experts d_expert."""
    n_dense_layers: int = 0
    """The first so many layers keep a dense MLP of width d_ff."""
    router: Literal["softmax", "sparsemixer", "sigmoid"] = "softmax"
    """softmax (Mixtral), sparsemixer (arXiv 2409.12136), sigmoid with a selection bias (DeepSeek-V3)."""
    n_groups: int = 1
    """sigmoid: the experts stand in so many groups ..."""
    groups_per_token: int = 1
    """... and a token chooses from so many of them."""
    weight_scale: float = 1.0
    """sigmoid: multiplies the weights, which sum to one."""
    jitter: float = 0.0
    """sparsemixer: experts whose scores lie further apart than 2 jitter, relatively, do not compete."""
    balance_loss: float = 0.0
    """Weight of the loss that is 1 when all experts are chosen alike (arXiv 2101.03961)."""
    z_loss: float = 0.0
    """Weight of the mean squared log-sum-exp of the router's logits (arXiv 2202.08906)."""
    bias_speed: float = 0.0
    """How far a step moves the selection bias of a busy or idle expert (arXiv 2408.15664); no loss is needed then."""

    def __post_init__(self):
        if not self.n_experts:
            return
        positive(self, "model.moe", "n_experts experts_per_token d_expert n_groups groups_per_token weight_scale")
        if self.experts_per_token > self.n_experts:
            raise ConfigError(f"experts_per_token {self.experts_per_token} of n_experts {self.n_experts}: a token can "
                              "meet each once", "model.moe.experts_per_token")
        if self.router == "sparsemixer" and (self.experts_per_token != 2 or self.jitter <= 0):
            raise ConfigError(f"sparsemixer chooses 2 experts among rivals within jitter above 0, not "
                              f"{self.experts_per_token} within {self.jitter}", "model.moe.experts_per_token")
        if (self.n_experts % self.n_groups or self.groups_per_token > self.n_groups
                or self.groups_per_token * self.n_experts // self.n_groups < self.experts_per_token):
            raise ConfigError(f"{self.n_experts} experts in {self.n_groups} groups, {self.groups_per_token} for a "
                              "token: the groups must be alike, and so many, and hold enough", "model.moe.n_groups")
        if min(self.balance_loss, self.z_loss, self.bias_speed) < 0:
            raise ConfigError("balance_loss, z_loss and bias_speed must not be negative", "model.moe.balance_loss")
        if self.bias_speed and self.router != "sigmoid":
            raise ConfigError("bias_speed moves the selection bias of the sigmoid router; "
                              f"{self.router} has none", "model.moe.bias_speed")


@dataclass(frozen=True)
class MLAConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): keys and values come from one short vector."""

    kv_rank: int = 0
    """Numbers of the latent that a token leaves in the cache; 0: plain attention."""
    q_rank: int = 0
    """Numbers of the queries' latent; 0: queries straight from the input."""
    rope_dim: int = 64
    """Numbers of a head that are turned by position; all heads share those of the key."""
    v_dim: int = 128
    """Numbers of a value in one head; head_dim - rope_dim numbers of a key are not turned."""
