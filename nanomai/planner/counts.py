"""What a rank holds, sends and computes in a step: our own code's habits as closed forms.

Everything is of one rank of one pipeline stage. `s` are the sizes of the axes (`config.factors`); letters as in
`architecture.py`. What is meant by each number stands where the code that makes it so is: `parallel/fsdp.py`,
`tensor.py`, `context.py`, `expert.py`, `recompute.py`, `ops.py` for the loss, `optim.py`.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

from nanomai.config import Config, ModelConfig
from nanomai.parallel.limits import share_layers

LOGITS_BYTES = 2**28  # of float32 logits alive at once in the loss
COPIES = {"swiglu": 4, "gegelu": 7, "gelu": 2, "relu2": 2}  # of an MLP's hidden units, which its forward leaves


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
    """Layers of one rank of a pipeline: without experts, and with."""
    layers = [i for share in share_layers(model.n_layers, ranks * stages_per_rank)[rank::ranks] for i in share]
    mixed = sum(map(model.has_experts, layers))
    return len(layers) - mixed, mixed


def root_part(model: ModelConfig, stages: int, stage: int, tensor: int) -> Part:
    """Embeddings on the first stage, norm and head on the last."""
    table = model.vocab_size * model.d_model / tensor
    first = table + (model.context_length * model.d_model if model.position == "learned" else 0)
    last = model.norm_parameters(model.d_model) + model.vocab_size * ("head" in model.biases) / tensor
    last += table if stages > 1 or not model.tied_embeddings else 0
    return Part(first * (stage == 0) + last * (stage == stages - 1))


def kept_bytes(model: ModelConfig, experts: bool, s: dict, what: str, width: int = 2, by: str = "keys") -> float:
    """Bytes that a block's forward pass leaves for its backward, for each token of this rank, in eager mode on a GPU.

    Under tensor parallel the inputs of attention and MLP are gathered, so each rank keeps all of them. Keys and values
    are those of the whole sequence, of all heads or, where context ranks share `by` heads, of some, each as often as it
    takes to share them out. A compiled block keeps less.
    """
    t, c, d, m, moe = s["tensor"], s["context"], model.d_model, model.mla, model.moe
    h, q, kv = model.n_heads, model.n_heads * model.head_dim, 2 * model.n_kv_heads * model.head_dim
    g, y, latents, made_kv = model.n_kv_heads // t, q, 0, kv
    times = c if by == "keys" else math.lcm(g, c) / g  # what attention has, over a rank's own
    if m.kv_rank:
        y, latents, made_kv = h * m.v_dim, m.q_rank + m.kv_rank, h * (model.head_dim - m.rope_dim + m.v_dim)
        # keys are put together from two parts, values are where they were made: out of the latents of all
        kv, made_kv = q + made_kv, made_kv * times
    residual, hidden, routed = width * d / t, _hidden(model, experts) / t, moe.experts_per_token * d * experts
    if what == "full":
        return residual
    if what == "selective":  # results of products and of attention
        products = (q + made_kv + y) / t + latents + (2 if model.gated else 1) * hidden + 2 * d + routed
        return residual + width * products + 4 * h / t
    norm = 4 if model.norm == "rmsnorm" else width  # RMSNorm keeps its input in float32; latents and queries have one
    norms = norm * (1 if model.parallel_block else 2) * d / t + 4 * (latents + model.qk_norm * (q + kv / 2) / t)
    inputs = (1 if model.parallel_block and t == 1 else 2) * d + latents
    attention = (q + kv * times + 2 * y) / t  # y as attention leaves it, and with its heads in a row
    router = (4 * d + 8 * moe.n_experts) * experts
    return norms + width * (inputs + attention + COPIES[model.activation] * hidden + 2 * routed) + 4 * h / t + router


def _hidden(model: ModelConfig, experts: bool) -> int:
    """Hidden units that one token meets in a layer."""
    moe = model.moe
    return (moe.experts_per_token + moe.n_shared_experts) * moe.d_expert if experts else model.d_ff


class Held(NamedTuple):
    """What a rank of one stage has a part in: parameters, before they are sharded but for `share`."""

    groups: list[tuple[int, bool]]  # layers, and whether they have experts
    blocks: Part
    root: Part
    largest: float  # block
    share: float  # what this rank keeps


def held_by(config: Config, s: dict[str, int], stage: int) -> Held:
    """The parameters of a stage, and of one rank of it."""
    model, t, e, shards = config.model, s["tensor"], s["expert"], s["fsdp"] * s["context"]
    sizes = blocks_of(model, s["pipeline"], stage, config.parallel.stages_per_rank)
    groups = [(n, experts) for n, experts in zip(sizes, (False, True), strict=True) if n]
    parts = [block_part(model, experts, t, e) for _, experts in groups]
    blocks = sum((part * n for part, (n, _) in zip(parts, groups, strict=True)), Part())
    root = root_part(model, s["pipeline"], stage, t)
    share = (blocks.dense + root.dense) / shards + blocks.experts / (shards / e)
    return Held(groups, blocks, root, max(part.all for part in parts), share)


# --- Memory -----------------------------------------------------------------------------------------------------------


def memory_of(config: Config, s: dict[str, int], micro: int, count: int, stage: int) -> dict[str, float]:
    """Bytes by part on a rank of one stage, at the worst of four moments of a step.

    Those are the loss, the backward of the last block, when all activations are there, that of the first, when nearly
    all gradients are, and the end, when embeddings and head are reduced (in a pipeline, before all others). `count`
    micro-batches of `micro` sequences make a step.
    """
    model, p, stages, t = config.model, config.parallel, s["pipeline"], s["tensor"]
    width, shards = 4 if config.train.dtype == "float32" else 2, s["fsdp"] * s["context"]
    tokens = micro * config.sequence_length / s["context"]
    sharded = shards * s["replicas"] * t * stages > 1
    groups, blocks, root, largest, held = held_by(config, s, stage)
    state = 4 * (held + root.dense / shards) if config.optim.name == "muon" else 8 * held  # one momentum for matrices
    layers, flying, kept = _activations(config, s, groups, count, stage, width)
    activations = tokens * flying * kept
    if (v := p.stages_per_rank) > 1:  # what has been sent is kept to the end of the step, and of it some above as well
        activations += max(0.0, count * _messages(s, v, stage) - 2 * v * flying) * tokens * width * model.d_model / t
    head = model.vocab_size * model.d_model / t * (stage == stages - 1)
    everything = p.keep_gathered or stages > 1
    resident = width * (root.all + (blocks.all if everything else largest))
    gathered = resident + width * largest * (not everything)
    if not sharded:  # each product casts its weight, and keeps the copy for its backward
        gathered = resident = 0 if width == 4 else width * (largest if p.recompute == "full" else blocks.all)
    whole = 4 * (blocks.all + root.all)
    earlier = (whole if everything and sharded else 4 * held) * (count > 1)  # summed at the end, or after each
    # a block at work, gradients of another that are on their way in float32, but for a pipeline, and those of the head
    work = max(_work(config, s, experts, tokens, width) for _, experts in groups)
    work += 4 * largest * (sharded and stages == 1) + width * head
    whole = 4 * tokens * model.vocab_size / t
    chunk = min(LOGITS_BYTES, whole)  # two and a half such beside a product, four where one more begins
    # the head's gradient in float32, twice while it is scaled, and in the dtype of products; hidden states and theirs
    logits = 4 * head + max(4 * chunk * (chunk < whole), 2.5 * chunk + width * head, (4 + width) * head)
    logits += (4 / t + 2 * width) * tokens * model.d_model
    moments = [
        (earlier, resident, activations, logits * (stage == stages - 1), 0.0),
        (earlier, gathered, activations, 0.0, work),
        (4 * held, gathered - width * root.all * sharded, activations / layers / flying, 0.0, work),
        (4 * held, 0.0, 0.0, 0.0, (4 + width) * root.all * sharded)]
    if stages > 1:
        moments[2:] = [(whole, gathered - width * root.all, 0.0, 0.0, 4 * root.all)]
    return {"weights": 4 * held, "optimizer": state} | dict(zip(
        ("gradients", "gathered", "activations", "logits", "work"), max(moments, key=sum), strict=True))


def _activations(config: Config, s: dict[str, int], groups: list[tuple[int, bool]], count: int, stage: int,
                 width: int) -> tuple[int, float, float]:
    """Layers of a rank, micro-batches in flight, and the bytes that all layers keep for each token."""
    model, p, stages = config.model, config.parallel, s["pipeline"]
    v, layers = p.stages_per_rank, sum(n for n, _ in groups)  # with v > 1 what is in flight is v-ths of a rank's layers
    flying = min(count, stages - stage if v == 1 else ((v - 1) * stages + 2 * (stages - 1 - stage) + 1) / v)
    kept = sum(n * kept_bytes(model, experts, s, p.recompute, width, p.context_by) for n, experts in groups)
    if stages > 1:  # what it sent is kept as well, as the end of what its backward goes through
        kept += (v - (stage == stages - 1)) * width * model.d_model / s["tensor"]
    return layers, flying, kept


def _work(config: Config, s: dict[str, int], experts: bool, tokens: float, width: int) -> float:
    """Bytes in the backward of a block beside what its forward has left, at the worst of three moments.

    Those are where results of experts are weighted, the non-linearity, when the last product has its gradient, and
    the inputs of the MLP, when all its products have theirs.
    """
    model, p, moe, d, t = config.model, config.parallel, config.model.moe, config.model.d_model, s["tensor"]
    hidden, routed = width * _hidden(model, experts) / t, width * moe.experts_per_token * d * experts
    units = moe.d_expert * (moe.n_experts / s["expert"] + moe.n_shared_experts) if experts else model.d_ff
    matrix, n = width * d * units / t, 3 if model.gated else 2
    again = [kept_bytes(model, experts, s, what, width, p.context_by) for what in ("none", p.recompute)]
    moments = (tokens * (2 + (s["expert"] > 1)) * routed,
               tokens * ((n - 1) * hidden - routed) + matrix,
               tokens * (routed - (COPIES[model.activation] - 1) * hidden + 2 * width * d) + n * matrix)
    return tokens * (again[0] - again[1] + 2 * width * d / t) + max(moments)


# --- Traffic and time -------------------------------------------------------------------------------------------------


def traffic_of(config: Config, s: dict[str, int], micro: int, count: int, stage: int) -> dict[str, float]:
    """Bytes that one rank of a stage sends in a step, by axis."""
    model, p, t, c, e = config.model, config.parallel, s["tensor"], s["context"], s["expert"]
    groups, blocks, root, _, held = held_by(config, s, stage)
    layers, mixed, shards = sum(n for n, _ in groups), sum(n for n, experts in groups if experts), s["fsdp"] * c
    tokens, others = micro * config.sequence_length / c, lambda ranks: (ranks - 1) / ranks
    gathers = 1 if s["pipeline"] > 1 else count * (1 if p.keep_gathered else 2)  # of a block, in a step
    root_gathers = 1 if s["pipeline"] > 1 else count
    sums = 1 if p.keep_gathered or s["pipeline"] > 1 else count  # of gradients
    dense = 2 * (blocks.dense * gathers + root.all * root_gathers) + 4 * (blocks.dense + root.all) * sums
    again = p.recompute != "none"
    row = 2 * tokens * model.d_model * count  # bytes of the residual stream, all micro-batches
    return {
        "fsdp": others(shards) * dense,
        "fsdp of experts": others(shards / e) * (2 * gathers + 4 * sums) * blocks.experts,
        "replicas": 2 * others(s["replicas"]) * 4 * held,
        "tensor": others(t) * row * (layers * (11 if again else 8) + 2 * (stage == 0) + 2 * (stage > 0)),
        "context": others(c) * _for_attention(model, p.context_by, c, t) * 2 * tokens * count * layers * (2 + again),
        "expert": others(e) * row * model.moe.experts_per_token * mixed * (6 if again else 4),
        "pipeline": row / t * _messages(s, p.stages_per_rank, stage)}


def _messages(s: dict[str, int], v: int, stage: int) -> int:
    """Tensors that a rank sends for each micro-batch: every stage its result, and the gradient of its input."""
    return (s["pipeline"] > 1) * (2 * v - (stage == 0) - (stage == s["pipeline"] - 1))


def _for_attention(model: ModelConfig, by: str, c: int, t: int) -> float:
    """Numbers that go between context ranks in one forward pass of a layer, for each token that a rank has."""
    if by == "keys":  # it gets those of all
        return c * model.kv_cache_bytes_per_token() / model.n_layers / 2 / (1 if model.mla.kv_rank else t)
    values = model.mla.v_dim if model.mla.kv_rank else model.head_dim
    return (model.n_heads / t + math.lcm(model.n_kv_heads // t, c)) * (model.head_dim + values)


@lru_cache(maxsize=256)
def flops_of(model: ModelConfig, length: int, recompute: str, sharing_keys: int = 0) -> dict[str, float]:
    """FLOPs for one token, over all stages: what the model asks for, and what is computed, some of it twice.

    Under `full` the last product of an MLP is not computed again, but with experts it is: its result is weighted. Nor
    is the head. Flash attention's backward is 2.5 of its forwards: it computes the scores again itself. Ranks that
    share keys compute what the mask shows, or, of heads that our kernel does not take, all up to a piece's end; and if
    what they share is latents, each makes the keys and values of all.
    """
    blocks, head, full = model.layer_parameters(active=True), model.vocab_size * model.d_model, recompute == "full"
    wanted, m, others = model.flops_per_token(length), model.mla, max(0, sharing_keys - 1)
    attention = wanted - 6 * (blocks + head)
    last = model.d_model * model.d_ff * blocks_of(model, 1, 0)[0]
    made = model.n_layers * m.kv_rank * model.n_heads * (model.head_dim - m.rope_dim + m.v_dim) * others
    hidden = 1 / (2 * sharing_keys) if others and (m.kv_rank or model.head_dim > 128) else 0.0
    return {"wanted": wanted, "blocks": 6 * (blocks + made) + 2 * (blocks + made - last) * full,
            "head": 6 * head, "attention": attention * (4.5 if full else 3.5) / 3 * (1 + hidden)}


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
