"""What can be shared among how many ranks: the rules of the other files, for whoever only plans and needs no torch."""

from __future__ import annotations

import itertools

from nanomai.config import Config, ConfigError, ModelConfig, ParallelConfig


def check(model: ModelConfig, parallel: ParallelConfig, sizes: dict[str, int]) -> None:
    """ConfigError unless axes of these sizes can share this model."""
    check_tensor(model, sizes["tensor"])
    if sizes["context"] > 1:
        check_context(model, sizes["context"], parallel.context_by, sizes["tensor"])
    if sizes["expert"] > 1:
        check_expert(model, sizes["expert"])
    if sizes["pipeline"] > 1:
        check_pipeline(model, sizes["pipeline"] * parallel.stages_per_rank)


def check_tensor(config: ModelConfig, size: int) -> None:
    """ConfigError unless `size` ranks can share this model."""
    moe = config.moe
    shared = {"n_heads": config.n_heads, "n_kv_heads": config.n_kv_heads, "vocab_size": config.vocab_size,
              "d_ff": config.d_ff if moe.n_dense_layers or not moe.n_experts else size,
              "moe.d_expert": moe.d_expert if moe.n_experts else size}
    for name, number in shared.items():
        if number % size:
            fitting = max(n for n in range(1, size) if all(x % n == 0 for x in shared.values() if x != size))
            raise ConfigError(f"parallel tensor {size} cannot share {name} {number}; the nearest that works is "
                              f"{fitting}", "parallel.tensor")
    if config.sparse.block and size > 1:
        raise ConfigError("parallel tensor needs dense attention: heads of sparse layers see different keys",
                          "parallel.tensor")


def check_expert(config: ModelConfig, size: int) -> None:
    """ConfigError unless `size` ranks can share out the experts of this model."""
    n = config.moe.n_experts
    if n == 0:
        raise ConfigError(f"parallel expert {size} needs a model with experts", "parallel.expert")
    if n % size:
        fitting = max(f for f in range(1, size) if n % f == 0)
        raise ConfigError(f"parallel expert {size} cannot share out {n} experts; the nearest that works is {fitting}",
                          "parallel.expert")


def check_context(config: ModelConfig, size: int, by: str, tensor: int = 1) -> None:
    """ConfigError unless `size` ranks can share the sequences of this model, of whose heads each has 1 / tensor."""
    if by == "keys":
        return
    heads = config.n_heads // tensor
    if heads % size:
        fitting = max(n for n in range(1, size) if heads % n == 0)
        raise ConfigError(f"parallel context {size} by heads cannot share {heads} heads; the nearest that works is "
                          f"{fitting}, or context_by keys", "parallel.context")
    if config.sparse.block:
        raise ConfigError("parallel context_by heads needs dense attention: heads of sparse layers see different keys; "
                          "context_by keys does not", "parallel.context_by")


def check_pipeline(config: ModelConfig, n_stages: int) -> None:
    """ConfigError unless this model can be cut into `n_stages`."""
    trouble = None
    if n_stages > config.n_layers:
        trouble = f"makes {n_stages} stages of {config.n_layers} layers; at most {config.n_layers} can be"
    elif config.tied_embeddings:
        trouble = "needs model.tied_embeddings false: the embedding is in the first stage, and the head in the last"
    elif config.moe.n_experts and config.moe.router == "sparsemixer":
        trouble = "needs a router that draws nothing: sparsemixer's draws go on from one layer to the next"
    if trouble:
        raise ConfigError(f"parallel pipeline {trouble}", "parallel.pipeline")


def check_batch(config: Config, rows: int) -> None:
    """ConfigError unless `rows` sequences make as many micro-batches as the pipeline needs to be full."""
    p, micro_batch = config.parallel.pipeline, config.train.micro_batch
    interleaved = config.parallel.stages_per_rank > 1

    def fits(size: int) -> bool:
        n = rows // size
        return rows % size == 0 and n >= p and not (interleaved and n % p)

    if p == 1 or fits(micro_batch):
        return
    nearest = min(filter(fits, range(1, rows + 1)), key=lambda size: abs(size - micro_batch), default=None)
    mend = f"the nearest that works is {nearest}" if nearest else f"give each step a multiple of {p}"
    raise ConfigError(f"micro_batch {micro_batch} cuts the {rows} sequences of a step into no {p} "
                      f"{'times n' if interleaved else 'or more'} equal micro-batches, as {p} ranks of a pipeline "
                      f"need; {mend}", "train.micro_batch")


def share_layers(n_layers: int, n_stages: int) -> list[range]:
    """The layers of each stage, as even as can be. The last has the head as well and the first the embedding, so what
    is left over goes to the others."""
    even, left = divmod(n_layers, n_stages)
    larger = [*range(1, n_stages - 1), 0, n_stages - 1][:left]
    ends = itertools.accumulate((even + (stage in larger) for stage in range(n_stages)), initial=0)
    return [range(*pair) for pair in itertools.pairwise(ends)]
