"""The settings of the parts that a model may have: stretched rotations, sparse layers, experts, latents.

A part that a family leaves out stays at its default, which means "none".
"""

from __future__ import annotations

import math
import operator
import reprlib
from dataclasses import dataclass, fields
from typing import Literal

SPAN = 1e-6, 1e6  # of what numbers may be multiplied by: float32 has room for their squares and sums


class ConfigError(ValueError):
    """A setting that cannot work: one line that names the file, the line, the field, and what to do."""

    def __init__(self, message: str, field: str | None = None):
        super().__init__(message)
        self.field = field  # dotted name, so that the loader can find its line in the file


def check(section, path: str, *rules: tuple[str, object, str]) -> None:
    """ConfigError for the first of the rules (field, whether it is wrong, why) that is broken."""
    for field, wrong, why in rules:
        if wrong:
            value = reprlib.repr(operator.attrgetter(field)(section))  # of a long list, its beginning
            raise ConfigError(f"{field} {value} {why}", f"{path}.{field}")


def positive(section, path: str, names: str) -> None:
    """ConfigError unless each of these fields is above 0 and finite."""
    for name in names.split():
        check(section, path, (name, not 0 < getattr(section, name) < math.inf, "must be above 0 and finite"))


def within(section, path: str, names: str, low: float = 0, high: float = math.inf) -> None:
    """ConfigError unless each of these fields, or each number of a tuple, lies from `low` to `high`, or is None."""
    why = f"must be at least {low:g}" if high == math.inf else f"must be from {low:g} to {high:g}"
    for name in names.split():
        value = getattr(section, name)
        numbers = value if isinstance(value, tuple) else (value,)
        check(section, path, (name, not all(n is None or low <= n <= high for n in numbers), why))


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

    def __post_init__(self):
        within(self, "model.rope_scaling", "factor low_frequency high_frequency short_factors long_factors "
                                           "attention_factor", *SPAN)
        within(self, "model.rope_scaling", "mscale mscale_all_dim", 0, SPAN[1])
        check(self, "model.rope_scaling", ("low_frequency", self.low_frequency >= self.high_frequency,
                                            f"must be below high_frequency {self.high_frequency}"))


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

    def __post_init__(self):
        within(self, "model.sparse", "block vertical_stride")
        within(self, "model.sparse", "local_blocks", low=1)
        within(self, "model.sparse", "dense_every", low=2)  # of 1, no layer would be sparse


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
    router: Literal["softmax", "softmax_of_all", "sparsemixer", "sigmoid"] = "softmax"
    """softmax (Mixtral), softmax_of_all (DeepSeek-V2), sparsemixer (arXiv 2409.12136), sigmoid (DeepSeek-V3)."""
    n_groups: int = 1
    """sigmoid: the experts stand in so many groups ..."""
    groups_per_token: int = 1
    """... and a token chooses from so many of them."""
    weight_scale: float = 1.0
    """sigmoid, softmax_of_all: multiplies the weights; those of sigmoid sum to one before."""
    jitter: float = 0.0
    """sparsemixer: experts whose scores lie further apart than 2 jitter, relatively, do not compete."""
    balance_loss: float = 0.0
    """Weight of the loss that is 1 when all experts are chosen alike (arXiv 2101.03961)."""
    z_loss: float = 0.0
    """Weight of the mean squared log-sum-exp of the router's logits (arXiv 2202.08906)."""
    bias_speed: float = 0.0
    """How far a step moves the selection bias of a busy or idle expert (arXiv 2408.15664); no loss is needed then."""

    def __post_init__(self):
        if self.n_experts:  # else the other settings wait until there are experts
            positive(self, "model.moe", "n_experts experts_per_token d_expert n_groups groups_per_token")
            within(self, "model.moe", "n_shared_experts n_dense_layers")
            within(self, "model.moe", "weight_scale", *SPAN)
            within(self, "model.moe", "jitter balance_loss z_loss bias_speed", 0, SPAN[1])
            check(self, "model.moe", *_rules(self))


ONLY_OF = {"jitter": ("sparsemixer",), "weight_scale": ("sigmoid", "softmax_of_all")} | dict.fromkeys(
    ("n_groups", "groups_per_token", "bias_speed"), ("sigmoid",))


def _rules(m: MoEConfig) -> list[tuple[str, object, str]]:
    at_hand = m.groups_per_token * m.n_experts // m.n_groups
    idle = [f.name for f in fields(m) if m.router not in ONLY_OF.get(f.name, (m.router,)) and
            getattr(m, f.name) != f.default]
    return [
        *((name, True, f"has no effect without router: {' or '.join(ONLY_OF[name])}") for name in idle),
        ("experts_per_token", m.experts_per_token > m.n_experts, f"must be at most n_experts {m.n_experts}"),
        ("experts_per_token", m.router == "sparsemixer" and m.experts_per_token != 2, "must be 2 for sparsemixer"),
        ("jitter", m.router == "sparsemixer" and not m.jitter, "must be above 0: without rivals no router learns"),
        ("n_groups", m.n_experts % m.n_groups, f"must divide n_experts {m.n_experts}"),
        ("groups_per_token", m.groups_per_token > m.n_groups, f"must be at most n_groups {m.n_groups}"),
        ("groups_per_token", at_hand < m.experts_per_token,
         f"must be more: a token meets {m.experts_per_token} experts, and these groups hold {at_hand}"),
    ]


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

    def __post_init__(self):
        within(self, "model.mla", "kv_rank q_rank")
        within(self, "model.mla", "rope_dim v_dim", low=1)
