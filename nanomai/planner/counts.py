"""What a rank holds, sends and computes in a step: our own code's habits as closed forms.

Everything is of one rank of one pipeline stage. `s` are the sizes of the axes (`config.factors`); letters as in
`architecture.py`. What is meant by each number stands where the code that makes it so is: `parallel/fsdp.py`,
`tensor.py`, `context.py`, `expert.py`, `recompute.py`, `ops.py` for the loss, `optim.py`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from nanomai.config import Config, ModelConfig

LOGITS_BYTES = 2**28  # of float32 logits alive at once in the loss


class Part(NamedTuple):
    """Parameters of one rank's part of something, before they are sharded: cut by tensor, experts also by expert."""

    dense: float = 0.0
    experts: float = 0.0

    def __add__(self, other: Part) -> Part:  # type: ignore[override]
        return Part(self.dense + other.dense, self.experts + other.experts)

    def __mul__(self, n: float) -> Part:  # type: ignore[override]
        return Part(self.dense * n, self.experts * n)

    @property
    def all(self) -> float:
        return self.dense + self.experts


@lru_cache(maxsize=4096)
def block_part(model: ModelConfig, experts: bool, tensor: int = 1, expert: int = 1) -> Part:
    """One block. Norms, routers, latents' projections and biases of sums are whole on every rank."""
    d, m, moe = model.d_model, model.mla, model.moe
    layer = model.n_layers - 1 if experts else 0
    norms = (1 if model.parallel_block else 2) * model.norm_parameters(d)
    whole = 2 * model.head_dim * model.qk_norm + d * ("out" in model.biases)
    if m.kv_rank:
        whole = d * (m.q_rank + m.kv_rank + m.rope_dim) + m.q_rank + m.kv_rank
    mlp, routed = model.mlp_parameters(layer), 0
    if experts:
        routed = moe.n_experts * (3 if model.gated else 2) * d * moe.d_expert
        whole += d * moe.n_experts
        mlp -= routed + d * moe.n_experts
    elif "mlp" in model.biases:
        whole, mlp = whole + d, mlp - d
    cut = model.attention_parameters + mlp - (whole - d * moe.n_experts * experts - d * ("mlp" in model.biases))
    return Part(whole + norms + cut / tensor, routed / tensor / expert)


@lru_cache(maxsize=4096)
def blocks_of(model: ModelConfig, ranks: int, rank: int, stages_per_rank: int = 1) -> tuple[int, int]:
    """Layers of one rank of a pipeline: without experts, and with.

    What an even division leaves over goes to the stages in the middle, as in `parallel/pipeline.py`.
    """
    stages = ranks * stages_per_rank
    even, left = divmod(model.n_layers, stages)
    larger = [*range(1, stages - 1), 0, stages - 1][:left]
    sizes = [even + (stage in larger) for stage in range(stages)]
    starts = [sum(sizes[:stage]) for stage in range(rank, stages, ranks)]
    layers = [i for start, size in zip(starts, sizes[rank::ranks], strict=True) for i in range(start, start + size)]
    mixed = sum(map(model.has_experts, layers))
    return len(layers) - mixed, mixed


def root_part(model: ModelConfig, stages: int, stage: int, tensor: int) -> Part:
    """Embeddings on the first stage, norm and head on the last."""
    table = model.vocab_size * model.d_model / tensor
    first = table + (model.context_length * model.d_model if model.position == "learned" else 0)
    last = model.norm_parameters(model.d_model) + model.vocab_size * ("head" in model.biases) / tensor
    last += table if stages > 1 or not model.tied_embeddings else 0
    return Part(first * (stage == 0) + last * (stage == stages - 1))


def kept_bytes(model: ModelConfig, experts: bool, s: dict[str, int], what: str, width: int = 2) -> float:
    """Bytes that a block's forward pass leaves for its backward, for each token of this rank, in eager mode on a GPU.

    Under tensor parallel the inputs of attention and MLP are gathered, so each rank keeps all of them; keys and values
    are those of the whole sequence, gathered from the context ranks. A compiled block keeps less.
    """
    t, c, d, m, moe = s["tensor"], s["context"], model.d_model, model.mla, model.moe
    h, q, kv = model.n_heads, model.n_heads * model.head_dim, 2 * model.n_kv_heads * model.head_dim
    y, latents, made_kv = q, 0, kv
    if m.kv_rank:
        y, latents, made_kv = h * m.v_dim, m.q_rank + m.kv_rank, h * (model.head_dim - m.rope_dim + m.v_dim)
        kv = q + made_kv  # keys are put together from two parts, values are where they were made
    residual, hidden, routed = width * d / t, _hidden(model, experts) / t, moe.experts_per_token * d * experts
    if what == "full":
        return residual
    if what == "selective":  # results of products and of attention
        products = (q + made_kv + y) / t + latents + (2 if model.gated else 1) * hidden + 2 * d + routed
        return residual + width * products + 4 * h / t
    norm = 4 if model.norm == "rmsnorm" else width  # RMSNorm keeps its input in float32; latents and queries have one
    norms = norm * (1 if model.parallel_block else 2) * d / t + 4 * (latents + model.qk_norm * (q + kv / 2) / t)
    inputs = (1 if model.parallel_block and t == 1 else 2) * d + latents
    attention = (q + kv * c + 2 * y) / t  # y as attention leaves it, and with its heads in a row
    copies = {"swiglu": 4, "gegelu": 7, "gelu": 2, "relu2": 2}[model.activation]
    router = (4 * d + 8 * moe.n_experts) * experts
    return norms + width * (inputs + attention + copies * hidden + 2 * routed) + 4 * h / t + router


def _hidden(model: ModelConfig, experts: bool) -> int:
    """Hidden units that one token meets in a layer."""
    moe = model.moe
    return (moe.experts_per_token + moe.n_shared_experts) * moe.d_expert if experts else model.d_ff


# --- Memory -----------------------------------------------------------------------------------------------------------


def memory_of(config: Config, s: dict[str, int], micro: int, count: int, stage: int) -> dict[str, float]:
    """Bytes by part on a rank of one stage, at the worst of four moments of a step.

    Those are the loss, the backward of the last block, when all activations are there, that of the first, when nearly
    all gradients are, and the end, when embeddings and head are reduced. `count` micro-batches of `micro` sequences
    make a step.
    """
    model, p, stages, t = config.model, config.parallel, s["pipeline"], s["tensor"]
    width = 4 if config.train.dtype == "float32" else 2
    tokens = micro * config.sequence_length / s["context"]
    shards = s["fsdp"] * s["context"]
    sharded = shards * s["replicas"] * t * stages > 1
    sizes = blocks_of(model, stages, stage, p.stages_per_rank)
    groups = [(n, experts) for n, experts in zip(sizes, (False, True), strict=True) if n]
    part = {experts: block_part(model, experts, t, s["expert"]) for _, experts in groups}
    blocks = sum((part[experts] * n for n, experts in groups), Part())
    root = root_part(model, stages, stage, t)
    largest = max((part[experts] for _, experts in groups), key=lambda x: x.all).all
    held = (blocks.dense + root.dense) / shards + blocks.experts / (shards / s["expert"])
    state = 8 * held
    if config.optim.name == "muon":  # one momentum for hidden matrices
        state -= 4 * (blocks.dense / shards + blocks.experts / (shards / s["expert"]))
    layers, flying, kept, work = _activations(config, s, groups, count, stage, width)
    activations, work = tokens * flying * kept, tokens * work
    head = model.vocab_size * model.d_model / t * (stage == stages - 1)
    everything = p.keep_gathered or stages > 1
    gathered = width * (root.all + (blocks.all if everything else 2 * largest))
    if not sharded:  # each product casts its weight, and keeps the copy for its backward
        gathered = 0 if width == 4 else width * (largest if p.recompute == "full" else blocks.all)
    whole = (4 * (blocks.all + root.all) if sharded else 4 * held) * (count > 1)  # summed between ranks at the end
    layer = largest * (width + (4 if sharded else 0))  # a block's gradients, and another's on their way in float32
    base = {"weights": 4 * held, "optimizer": state}
    chunks = 3 * min(LOGITS_BYTES, 4 * tokens * model.vocab_size / t)
    # the head's gradient in float32, twice while it is scaled, and in the dtype of products; hidden states and theirs
    logits = 4 * head + max(chunks, (4 + width) * head) + (4 + 2 * width) * tokens * model.d_model
    resident = width * (root.all + (blocks.all if everything else largest)) if sharded else gathered
    moments = [
        base | {"gradients": whole, "gathered": resident, "activations": activations,
                "logits": logits * (stage == stages - 1), "work": 0.0},
        base | {"gradients": whole, "gathered": gathered, "activations": activations, "logits": 0.0,
                "work": work + layer + width * head},
        base | {"gradients": 4 * held, "gathered": gathered - width * root.all * sharded, "logits": 0.0,
                "activations": activations / layers / flying, "work": work + layer + width * head},
        base | {"gradients": 4 * held, "gathered": 0.0, "activations": 0.0, "logits": 0.0,
                "work": (4 + width) * root.all * sharded}]
    return max(moments, key=lambda parts: sum(parts.values()))


def _activations(config: Config, s: dict[str, int], groups: list[tuple[int, bool]], count: int, stage: int,
                 width: int) -> tuple[int, float, float, float]:
    """Layers of a rank, micro-batches in flight, and for each token: bytes kept by all layers, bytes at work in one."""
    model, p, stages = config.model, config.parallel, s["pipeline"]
    v, layers = p.stages_per_rank, sum(n for n, _ in groups)  # with v > 1 what is in flight is v-ths of a rank's layers
    flying = min(count, stages - stage if v == 1 else ((v - 1) * stages + 2 * (stages - 1 - stage) + 1) / v)
    kept = sum(n * kept_bytes(model, experts, s, p.recompute, width) for n, experts in groups)
    again = max(kept_bytes(model, experts, s, "none", width) for _, experts in groups) - kept / layers
    gradients = width * (3 * max(_hidden(model, experts) for _, experts in groups) / s["tensor"] + 2 * model.d_model)
    return layers, flying, kept, max(0.0, again) + gradients


# --- Traffic and time -------------------------------------------------------------------------------------------------


def traffic_of(config: Config, s: dict[str, int], micro: int, count: int, stage: int) -> dict[str, float]:
    """Bytes that one rank of a stage sends in a step, by axis."""
    model, p, t, c, e = config.model, config.parallel, s["tensor"], s["context"], s["expert"]
    plain, mixed = blocks_of(model, s["pipeline"], stage, p.stages_per_rank)
    blocks = block_part(model, False, t, e) * plain + (block_part(model, True, t, e) * mixed if mixed else Part())
    root = root_part(model, s["pipeline"], stage, t)
    shards = s["fsdp"] * c
    tokens, others = micro * config.sequence_length / c, lambda ranks: (ranks - 1) / ranks
    gathers = 1 if s["pipeline"] > 1 else count * (1 if p.keep_gathered else 2)  # of a block, in a step
    root_gathers = 1 if s["pipeline"] > 1 else count
    dense = 2 * (blocks.dense * gathers + root.all * root_gathers) + 4 * (blocks.dense + root.all)
    again = p.recompute != "none"
    held = (blocks.dense + root.all) / shards + blocks.experts / (shards / e)
    edges = (s["pipeline"] > 1) * (2 if 0 < stage < s["pipeline"] - 1 else 1)
    row = 2 * tokens * model.d_model * count  # bytes of the residual stream, all micro-batches
    keys = 2 * micro * config.sequence_length * model.kv_cache_bytes_per_token() / model.n_layers / 2 * count
    return {
        "fsdp": others(shards) * dense,
        "fsdp of experts": others(shards / e) * (2 * gathers + 4) * blocks.experts,
        "replicas": 2 * others(s["replicas"]) * 4 * held,
        "tensor": others(t) * row * ((plain + mixed) * (11 if again else 8) + 2 * (stage == 0) + 2 * (stage > 0)),
        "context": others(c) * keys / (1 if model.mla.kv_rank else t) * (plain + mixed) * (3 if again else 2),
        "expert": others(e) * row * model.moe.experts_per_token * mixed * (6 if again else 4),
        "pipeline": row / t * (2 * p.stages_per_rank - 2 + edges)}


@lru_cache(maxsize=256)
def flops_of(model: ModelConfig, length: int, recompute: str) -> dict[str, float]:
    """FLOPs for one token, over all stages: what the model asks for, and what is computed, some of it twice.

    Under `full` a block's last product is not computed again, nor the head. Flash attention's backward is 2.5 of its
    forwards: it computes the scores again itself.
    """
    blocks, head, full = model.layer_parameters(active=True), model.vocab_size * model.d_model, recompute == "full"
    wanted = model.flops_per_token(length)
    attention = wanted - 6 * (blocks + head)
    last = model.d_model * sum(_hidden(model, model.has_experts(i)) for i in range(model.n_layers))
    return {"wanted": wanted, "blocks": 6 * blocks + 2 * (blocks - last) * full, "head": 6 * head,
            "attention": attention * (4.5 if full else 3.5) / 3}


@lru_cache(maxsize=256)
def routed_share(model: ModelConfig) -> float:
    """Of the products in blocks, those with routed experts."""
    moe, mixed = model.moe, blocks_of(model, 1, 0)[1]
    routed = mixed * moe.experts_per_token * (3 if model.gated else 2) * model.d_model * moe.d_expert
    return routed / model.layer_parameters(active=True) if mixed else 0.0


@lru_cache(maxsize=256)
def swept_bytes(model: ModelConfig, recompute: str) -> tuple[float, float]:
    """Bytes that norms, gates and residuals move through memory for one token: in all blocks, and at the head.

    26 D + 8 F numbers in a block, forward and backward, is a count of reads and writes of fused operations.
    """
    hidden = sum(_hidden(model, model.has_experts(i)) for i in range(model.n_layers))
    blocks = 2 * (26 * model.n_layers * model.d_model + 8 * hidden) * (1.25 if recompute == "full" else 1.0)
    return blocks, 18 * model.vocab_size
