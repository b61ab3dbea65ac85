"""What a model is: its dimensions and switches, and how many parameters and FLOPs follow from them.

Families differ by these values alone; `parts.py` has those of the parts that only some have.

Letters used here and in every file: B batch, T sequence length, D `d_model`, H `n_heads`, G `n_kv_heads`,
K `head_dim`, F `d_ff`, L `n_layers`, V `vocab_size`, E `moe.n_experts`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from nanomai.parts import SPAN, ConfigError, MLAConfig, MoEConfig, RopeScaling, SparseAttention, check, positive, within

__all__ = ["ConfigError", "MLAConfig", "MoEConfig", "ModelConfig", "RopeScaling", "SparseAttention", "positive"]


@dataclass(frozen=True)
class ModelConfig:
    """The architecture. `model.py` has no branch on a family's name."""

    n_layers: int = 4
    """L: blocks of attention and MLP."""
    d_model: int = 128
    """D: numbers that stand for one token between the blocks."""
    n_heads: int = 2
    """H: query heads."""
    n_kv_heads: int = 1
    """Fewer than n_heads is grouped-query attention (Ainslie et al. 2023, arXiv 2305.13245)."""
    head_dim: int = 64
    """K: numbers in a query, key or value of one head."""
    d_ff: int = 384
    """F: width of the MLP inside a block."""
    vocab_size: int = 512
    """V: tokens that the embedding and the output know; at least the tokenizer's."""
    context_length: int = 256
    """The longest sequence the model is built for, in tokens."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """Before attention, before the MLP and at the end."""
    norm_eps: float = 1e-5
    """Added to the mean square, or variance, under the root."""
    qk_norm: bool = False
    """RMSNorm of every query and key before they are turned (arXiv 2302.05442)."""
    parallel_block: bool = False
    """Attention and MLP read one norm and are added together (GPT-J, phi-1 to phi-2)."""
    activation: Literal["swiglu", "gelu", "relu2", "gegelu"] = "swiglu"
    """Of the MLP; `swiglu` and `gegelu` have a third matrix, the gate."""
    position: Literal["rope", "learned"] = "rope"
    """`rope` turns queries and keys; `learned` adds a table of context_length vectors."""
    rope_theta: float = 10_000.0
    """Base of the rotation's wavelengths; larger for longer contexts."""
    rotary_dim: int | None = None
    """The first so many numbers of a head are turned; None: all."""
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    """For contexts beyond the first training's."""
    sliding_window: int | None = None
    """Position i sees position j only if 0 <= i - j < sliding_window. None: all of the past."""
    sparse: SparseAttention = field(default_factory=SparseAttention)
    """Layers that see less."""
    attention_scale: float | None = None
    """Multiplies the scores; None: 1 / sqrt(K)."""
    embedding_scale: float = 1.0
    """Multiplies the embeddings (muP, arXiv 2203.03466)."""
    logit_scale: float = 1.0
    """Multiplies the logits (muP)."""
    biases: tuple[Literal["qkv", "out", "mlp", "head"], ...] = ()
    """Which projections carry a bias; experts never do. LayerNorm always has one, RMSNorm never."""
    tied_embeddings: bool = True
    """The output head is the embedding, transposed."""
    init_std: float = 0.02
    """Of the normal distribution that initial weights are drawn from."""
    moe: MoEConfig = field(default_factory=MoEConfig)
    """Experts in place of the MLP."""
    mla: MLAConfig = field(default_factory=MLAConfig)
    """Latents in place of keys and values."""

    def __post_init__(self):
        positive(self, "model", "n_layers d_model n_heads n_kv_heads head_dim d_ff vocab_size context_length")
        within(self, "model", "attention_scale embedding_scale logit_scale", *SPAN)
        within(self, "model", "norm_eps", 1e-12, 1)
        within(self, "model", "init_std", SPAN[0], 1)
        within(self, "model", "rope_theta", 1, 1e12)
        check(self, "model", *_rules(self), *_rules_of_positions(self))

    @property
    def gated(self) -> bool:
        return self.activation in ("swiglu", "gegelu")

    @property
    def turned_dim(self) -> int:
        """Numbers of a head that rotary positions turn."""
        if self.mla.kv_rank:
            return self.mla.rope_dim
        return self.head_dim if self.rotary_dim is None else self.rotary_dim

    def has_experts(self, layer: int) -> bool:
        """Whether that layer's MLP is a mixture of experts."""
        return self.moe.n_experts > 0 and layer >= self.moe.n_dense_layers

    def is_sparse(self, layer: int) -> bool:
        return self.sparse.block > 0 and (layer + 1) % self.sparse.dense_every != 0

    def norm_parameters(self, dim: int) -> int:
        return dim * (2 if self.norm == "layernorm" else 1)

    @property
    def attention_parameters(self) -> int:
        """Of the attention of one layer."""
        d, h, k, m = self.d_model, self.n_heads, self.head_dim, self.mla
        if m.kv_rank:
            q = d * m.q_rank + m.q_rank + m.q_rank * h * k if m.q_rank else d * h * k
            latent = d * (m.kv_rank + m.rope_dim) + m.kv_rank
            return q + latent + m.kv_rank * h * (k - m.rope_dim + m.v_dim) + h * m.v_dim * d
        q, kv, bias = h * k, self.n_kv_heads * k, self.biases
        norms = 2 * k * self.qk_norm
        return d * q + 2 * d * kv + q * d + (q + 2 * kv) * ("qkv" in bias) + d * ("out" in bias) + norms

    def mlp_parameters(self, layer: int, active: bool = False) -> int:
        """Of the MLP of one layer; `active` counts only the experts that one token meets."""
        d, m, n_in = self.d_model, self.moe, 2 if self.gated else 1
        if not self.has_experts(layer):
            return (n_in + 1) * d * self.d_ff + (n_in * self.d_ff + d) * ("mlp" in self.biases)
        met = (m.experts_per_token if active else m.n_experts) + m.n_shared_experts
        return d * m.n_experts + met * (n_in + 1) * d * m.d_expert

    def _count(self, active: bool) -> int:
        d, v = self.d_model, self.vocab_size
        head = 0 if self.tied_embeddings else v * d + v * ("head" in self.biases)
        positions = self.context_length * d if self.position == "learned" else 0
        final_norm = self.norm_parameters(d)
        return v * d + head + positions + final_norm + self.layer_parameters(active)

    def layer_parameters(self, active: bool) -> int:
        """Of all layers together: without embeddings, the last norm and the head."""
        norms = (1 if self.parallel_block else 2) * self.norm_parameters(self.d_model)
        mlps = sum(self.mlp_parameters(i, active) for i in range(self.n_layers))
        return mlps + self.n_layers * (self.attention_parameters + norms)

    @property
    def n_parameters(self) -> int:
        """Every trainable number, exactly; a tied embedding is counted once. The selection bias is not trained."""
        return self._count(active=False)

    @property
    def n_active_parameters(self) -> int:
        """Those that one token meets: all but the experts that it is not sent to."""
        return self._count(active=True)

    def flops_per_token(self, sequence_length: int | None = None) -> int:
        """FLOPs of one training token, forward and backward: 6 for each weight it meets, plus causal attention.

        The embedding look-up costs nothing; the output head costs 6 V D even when it is tied. Attention over a
        causal sequence meets (T + 1) / 2 keys on average, taken as T / 2: 6 L T H K a token (12 when the masked
        half is counted too, as some publications do); a sparse layer is counted as if dense. Norms, softmax and the
        optimizer are left out.
        """
        t = sequence_length or self.context_length
        window = min(t, self.sliding_window or t)
        seen = 2 * window - window * window // t  # twice the mean number of keys: t without a window
        matmul = self.layer_parameters(active=True) + self.vocab_size * self.d_model
        widths = self.head_dim + (self.mla.v_dim if self.mla.kv_rank else self.head_dim)  # q k^T, and p v
        return 6 * matmul + 3 * self.n_layers * seen * self.n_heads * widths

    def kv_cache_bytes_per_token(self, bytes_per_value: int = 2) -> int:
        """Bytes that one more token adds to the key-value cache, all layers together."""
        m = self.mla
        values = m.kv_rank + m.rope_dim if m.kv_rank else 2 * self.n_kv_heads * self.head_dim
        return self.n_layers * values * bytes_per_value


def _rules(c: ModelConfig) -> list[tuple[str, object, str]]:
    """(field, whether it is wrong, why) of what cannot go together."""
    with_latents = {"position": "rope", "n_kv_heads": c.n_heads, "sliding_window": None, "biases": (),
                    "qk_norm": False, "rotary_dim": None, "attention_scale": None}
    return [
        ("n_kv_heads", c.n_heads % c.n_kv_heads, f"must divide n_heads {c.n_heads}: each serves as many query heads"),
        ("sliding_window", c.sliding_window is not None and c.sliding_window < 1, "must be at least 1, or null"),
        ("sliding_window", c.sliding_window and c.sparse.block, "must be null in a model with sparse layers"),
        ("biases", c.tied_embeddings and "head" in c.biases, "need tied_embeddings: false for that of the head"),
        ("moe.n_dense_layers", c.moe.n_experts and c.moe.n_dense_layers >= c.n_layers,
         f"must be below n_layers {c.n_layers}, or no layer has experts"),
        *((name, c.mla.kv_rank and getattr(c, name) != value,
           f"must be {'null' if value is None else value} in a model with latent attention")
          for name, value in with_latents.items()),
    ]


def _rules_of_positions(c: ModelConfig) -> list[tuple[str, object, str]]:
    s, turned, learned = c.rope_scaling, c.turned_dim, c.position == "learned"
    name = "mla.rope_dim" if c.mla.kv_rank else "head_dim" if c.rotary_dim is None else "rotary_dim"
    return [
        ("rotary_dim", learned and c.rotary_dim is not None, "has no effect without position: rope"),
        ("rope_scaling.kind", learned and s.kind != "none", "has no effect without position: rope"),
        (name, not learned and turned % 2, "is odd; rotary positions turn pairs of numbers"),
        (name, not 0 < turned <= c.head_dim, f"must lie above 0, up to head_dim {c.head_dim}"),
        ("rope_scaling.original_context", s.kind != "none" and not 0 < s.original_context <= c.context_length,
         f"must lie above 0, up to context_length {c.context_length}"),
        ("rope_scaling.kind", s.kind == "ntk" and turned < 4, f"needs 4 numbers of a head to turn, not {turned}"),
        ("rope_theta", s.kind == "yarn" and c.rope_theta <= 1,
         "must be above 1 for yarn: it counts the pairs from fast to slow"),
        ("rope_scaling.attention_factor", s.kind == "longrope" and s.attention_factor is None
         and s.original_context < 2, "must be given where original_context is 1"),
        *((f"rope_scaling.{factors}", s.kind == "longrope" and len(getattr(s, factors)) != turned // 2,
           f"must be {turned // 2} numbers, one for each pair that turns")
          for factors in ("short_factors", "long_factors")),
    ]
