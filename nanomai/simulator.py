"""A training step on thousands of ranks that do not exist, with every byte, FLOP and message of one of them counted.

The real model, `parallelize`, loss, backward and optimizer run as in a job, in one process and without a GPU: tensors
have shapes and no values (FakeTensorMode), and a process group that sends nothing claims to have all the ranks. What is
seen is the first rank, whose shares are the largest; of a pipeline the first rank of every kind of stage, in the order
of the real schedule. Not seen: an allocator's fragments, the buffers of the network's library, CUDA's own part of the
memory, and what compilation would save.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from unittest import mock

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore

from nanomai import stand_ins
from nanomai.config import Config, ConfigError
from nanomai.model import Transformer
from nanomai.moe import balance_experts, sum_loads
from nanomai.observer import Observer
from nanomai.optim import build_optimizers
from nanomai.parallel import fsdp
from nanomai.parallel.apply import allocate, clip_gradients, parallelize
from nanomai.parallel.layout import Layout, factors, lay_out
from nanomai.parallel.limits import share_layers
from nanomai.parallel.mesh import Mesh
from nanomai.parallel.tensor import part_of


class SimulationError(RuntimeError):
    """What keeps a simulation from running in this process."""


@dataclass(frozen=True)
class Simulation:
    """What one step asks of one rank, in bytes, calls and FLOPs."""

    name: str
    world_size: int
    layout: dict[str, int]
    stage: int  # of the pipeline, which the rank is of: of those simulated, the one that holds most
    stages: dict[int, int]  # the most that a rank of each stage simulated holds; others hold less than one before them
    n_layers: int
    layers_simulated: list[int]  # two depths are continued to `n_layers`
    micro_batches: int
    tokens: int  # of all ranks together
    flops_per_token: float | None  # in all stages; None if one alone was simulated
    state: dict[str, int]  # parameters, gradients, optimizer: held from step to step, but for the gradients
    memory: dict[str, int]  # when most is held, by its cause
    place: str  # where in the step that is
    peaks: dict[str, int]  # the most that is held at each place
    flops: dict[str, int]  # products, attention; of causal attention the half that is not masked
    collectives: dict[str, dict[str, int]]  # of each "axis: kind", the calls and the bytes of their larger side

    @property
    def peak(self) -> int:
        """The most bytes that are held at once."""
        return sum(self.memory.values())

    def headroom(self, capacity: float = 80e9) -> float:
        """The share of `capacity` bytes that is never held."""
        return 1 - self.peak / capacity

    def as_dict(self) -> dict:
        """All of it, for a file."""
        return dataclasses.asdict(self) | {"peak": self.peak, "headroom_of_80GB": self.headroom()}


def simulate(config: Config, world_size: int, layers: int | None = None, micro_batches: int | None = None,
             imbalance: float = 1.0, stage: int | None = None) -> Simulation:
    """One step of `config` on `world_size` ranks, laid out as its parallel settings say.

    `layers` simulates that depth and half of it and continues both in straight lines to the whole depth, each place of
    the step by itself, since a deeper model may hold the most at another one. `micro_batches` go through the model
    before the optimizer does; None is one, or as many as fill a pipeline: in 1F1B more would hold no more. `imbalance`
    is what the experts of this rank get, in even shares of all tokens: no router chooses where numbers have no values.
    `stage` is all of the pipeline that is simulated. What Muon sends is overstated: on CPUs its all-to-alls are
    all-gathers.
    """
    whole, sizes = config.model.n_layers, factors(config.parallel, world_size)
    depths = [whole] if layers is None else [layers // 2, layers]
    p, count = sizes["pipeline"], micro_batches or _enough(config)
    _check(config, layers, count, imbalance, stage)
    alike = [stage] if stage is not None else _alike(config)
    seen = {s: _observe(config, world_size, s, depths, count, imbalance) for s in sorted(set(alike))}
    peaks = {s: {place: sum(causes.values()) for place, causes in found["places"].items()} for s, found in seen.items()}
    held = {s: max(places.values()) for s, places in peaks.items()}
    worst = max(held, key=held.get)
    found, place = seen[worst], max(peaks[worst], key=peaks[worst].get)
    tokens = _sequences(config) * count * sizes["replicas"] * sizes["fsdp"] * config.sequence_length
    flops = sum(sum(seen[s]["flops"].values()) for s in alike) * world_size / p / tokens
    return Simulation(config.name, world_size, sizes, worst, held, whole, depths, count, tokens,
                      None if len(alike) < p else flops, found["state"], found["places"][place], place, peaks[worst],
                      found["flops"], found["collectives"])


def _check(config: Config, layers: int | None, micro_batches: int, imbalance: float, stage: int | None) -> None:
    """ConfigError for what cannot be simulated."""
    whole, p, v = config.model.n_layers, config.parallel.pipeline, config.parallel.stages_per_rank
    # a block has neighbours on both sides, as most blocks have, but for a pipeline, where all stay gathered
    least = 2 * p * v * max(2 if p > 1 else 4, config.model.moe.n_dense_layers + 2)
    if layers is not None and (not least <= layers <= whole or (p > 1 and layers % (2 * p * v))):
        parts = f", and a multiple of {2 * p * v}: half of it must fill the stages evenly" if p > 1 else ""
        raise ConfigError(f"layers {layers} must be {least} at least{parts}; the model has {whole}")
    if imbalance > 1 and config.parallel.expert == 1:
        raise ConfigError("imbalance is between the ranks of an expert axis; set parallel.expert", "parallel.expert")
    if p > 1 and (micro_batches < p or (v > 1 and micro_batches % p)):
        raise ConfigError(f"micro_batches {micro_batches} must be {p} or {'a multiple' if v > 1 else 'more'}, as {p} "
                          "ranks of a pipeline need")
    if stage is not None and not 0 <= stage < p:
        raise ConfigError(f"stage {stage} is none of parallel.pipeline {p}; the last is {p - 1}")
    if dist.is_initialized():
        raise SimulationError("simulate pretends to be a job of many ranks, and cannot run inside a real one")


def _enough(config: Config) -> int:
    """Micro-batches with which a rank of a pipeline holds as many at once as ever, and gradients of earlier ones."""
    p = config.parallel.pipeline
    return 1 if p == 1 else p + 1 if config.parallel.stages_per_rank == 1 else 2 * p


def _layers_of(config: Config, stage: int) -> list[int]:
    """Of a rank of the pipeline."""
    p = config.parallel.pipeline
    return [i for share in share_layers(config.model.n_layers, p * config.parallel.stages_per_rank)[stage::p]
            for i in share]


def _alike(config: Config) -> list[int]:
    """For every rank of the pipeline the first that has as much to compute; it has more micro-batches in flight."""
    p, first = config.parallel.pipeline, {}
    kinds = [(s in (0, p - 1) and s, sorted(map(config.model.has_experts, _layers_of(config, s)))) for s in range(p)]
    return [first.setdefault(str(kind), s) for s, kind in enumerate(kinds)]


def _continued(shallow, deep, ahead: float):
    """Numbers at two depths, in nested dictionaries, continued by `ahead` times the way from the one to the other."""
    if isinstance(deep, dict):
        return {key: _continued(shallow[key], deep[key], ahead) for key in shallow}
    return round(deep + (deep - shallow) * ahead)


def _named(place: tuple[str, int | None], layers: list[int]) -> str:
    what, block = place
    return what if block is None else f"{what} {layers[block]}"


def _sequences(config: Config) -> int:
    """Of one micro-batch: one where the machine is to choose."""
    return config.train.micro_batch or 1


def table(found: Simulation) -> str:
    """A simulation as text."""
    layout = " x ".join(f"{axis} {size}" for axis, size in found.layout.items() if size > 1) or "one process"
    depths, staged = " and ".join(map(str, found.layers_simulated)), found.layout["pipeline"] > 1
    speed = f"{found.flops_per_token:.4g} FLOPs a token" if found.flops_per_token else "one stage alone"
    lines = [f"{found.name}, {found.n_layers} layers ({depths} simulated) on {found.world_size:,} ranks: {layout}",
             f"{found.tokens:,} tokens a step, in {found.micro_batches} micro-batches a rank; {speed}", "",
             f"memory of a rank{f' of stage {found.stage}' if staged else ''}, GiB"]
    rows = [(cause, size) for cause, size in found.memory.items() if size]
    lines += [f"{cause:>14}  {size / 2**30:9.3f}" for cause, size in [*rows, ("in all", found.peak)]]
    fits = f"leaves {found.headroom():.1%} of 80 GB" if found.headroom() >= 0 else "is more than 80 GB"
    lines += [f"most is held in the {found.place}; it {fits}"]
    lines += [f"stage {stage} holds {peak / 2**30:.2f}" for stage, peak in found.stages.items() if stage != found.stage]
    lines += ["", f"{'collectives':>40}  calls        GiB"]
    lines += [f"{name:>40}  {seen['calls']:5,}  {seen['bytes'] / 2**30:9.3f}"
              for name, seen in found.collectives.items()]
    return "\n".join(lines)


# --- The ranks that do not exist --------------------------------------------------------------------------------------


@contextlib.contextmanager
def _fake_ranks(world_size: int, rank: int) -> Iterator[Mesh]:
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        yield Mesh(rank, world_size)
    finally:
        dist.destroy_process_group()
        _clear_sharding_prop_cache()  # it knows groups that are gone, by names that the next ones will have


def _observe(config: Config, world_size: int, stage: int, depths: list[int], micro_batches: int,
             imbalance: float) -> dict:
    """What the first rank of a stage does in a step, at one depth or continued from two; by name."""
    p, layers = config.parallel.pipeline, _layers_of(config, stage)
    with _fake_ranks(world_size, stage * world_size // p) as mesh:
        layout = lay_out(config.parallel, mesh)
        seen = [_observe_one(config, layout, depth, micro_batches, imbalance) for depth in depths]
    ahead = 0.0 if len(seen) == 1 else (len(layers) - depths[1] // p) / (depths[1] // p - depths[0] // p)
    found = {name: _continued(seen[0][name], seen[-1][name], ahead) for name in seen[0]}
    return found | {"places": {_named(place, layers): causes for place, causes in found["places"].items()}}


def _observe_one(config: Config, layout: Layout, depth: int, micro_batches: int, imbalance: float) -> dict:
    """One step of a model of `depth` layers, built as `state.py` builds it."""
    with torch.device("meta"):
        model = Transformer(dataclasses.replace(config.model, n_layers=depth))
    model.compute_dtype = torch.bfloat16 if config.train.dtype == "auto" else getattr(torch, config.train.dtype)
    model.set_kernels("torch")
    if config.train.float8:
        model.use_float8(functools.partial(part_of, layout.sizes["tensor"]))
    # not among fakes: FSDP cuts a tensor into the shares of all ranks, to take one
    parallelize(model, layout, config.parallel)
    tokens = _sequences(config) * config.sequence_length // layout.sizes["context"]
    pairs = tokens * config.model.moe.experts_per_token
    with (FakeTensorMode(allow_non_fake_inputs=True) as fake, Observer(fake, layout, len(model.blocks)) as observer,
          # or DTensor would find the shapes of whole tensors among the fakes that are counted
          mock.patch("torch.distributed.tensor._sharding_prop.detect_fake_mode", return_value=None),
          stand_ins.even_routers(pairs, imbalance), stand_ins.kernels_of_a_gpu(),
          stand_ins.messages() if layout.sizes["pipeline"] > 1 else contextlib.nullcontext()):
        return _step(config, layout, model, observer, micro_batches)


def _step(config: Config, layout: Layout, model: Transformer, observer: Observer, micro_batches: int = 1) -> dict:
    """What `Trainer.step` does, and what was seen of it. On a GPU no mask is made of documents: here there are none."""
    allocate(model, torch.device("cpu"))
    optimizers = build_optimizers(model, config.optim, model.compute_dtype)
    rows, length = _sequences(config), config.sequence_length
    observer.follow(model)
    if hasattr(model, "pipeline"):
        ids, targets = torch.zeros(2, micro_batches * rows, length, dtype=torch.int64).unbind()
        model.pipeline.forward_backward(ids, targets, None, rows)
    for i in range(0 if hasattr(model, "pipeline") else micro_batches):
        ids, targets = torch.zeros(2, rows, length, dtype=torch.int64).unbind()
        fsdp.sum_after(model, last=i == micro_batches - 1)
        observer.at("forward, below the blocks")
        model(ids, targets, reduction="sum").backward()
    observer.at("optimizer")
    sum_loads(model, layout.mesh.sum)
    clip_gradients(model, config.optim.grad_clip)
    for optimizer in optimizers:
        optimizer.step()
    balance_experts(model)
    observer.tell("buffers", list(model.buffers()))
    observer.tell("parameters", list(model.parameters()))
    observer.tell("gradients", [p.grad for p in model.parameters()])
    observer.tell("optimizer", [t for optimizer in optimizers for state in optimizer.state.values()
                                for t in state.values()])
    return observer.seen()
