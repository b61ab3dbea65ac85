"""A training step on thousands of ranks that do not exist, with every byte, FLOP and message of one of them counted.

The real model, `parallelize`, loss, backward and optimizer run as in a job, in one process and without a GPU: tensors
have shapes and no values (FakeTensorMode), and a process group that sends nothing claims to have all the ranks. What is
seen is rank 0, whose shares are the largest. Not seen: an allocator's fragments, the buffers of the network's library,
CUDA's own part of the memory, and what compilation would save.
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
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore

from nanomai import ops
from nanomai.config import Config, ConfigError
from nanomai.model import Transformer
from nanomai.moe import balance_experts, sum_loads
from nanomai.observer import Observer
from nanomai.optim import build_optimizers
from nanomai.parallel import expert, fsdp
from nanomai.parallel.apply import allocate, clip_gradients, parallelize
from nanomai.parallel.collectives import exchanged
from nanomai.parallel.layout import Layout, factors, lay_out
from nanomai.parallel.mesh import Mesh


class SimulationError(RuntimeError):
    """What keeps a simulation from running in this process."""


@dataclass(frozen=True)
class Simulation:
    """What one step asks of rank 0, in bytes, calls and FLOPs."""

    name: str
    world_size: int
    layout: dict[str, int]
    n_layers: int
    layers_simulated: list[int]  # two depths are continued to `n_layers`
    tokens: int  # of all ranks together
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

    @property
    def flops_per_token(self) -> float:
        return sum(self.flops.values()) * self.world_size / self.tokens

    def headroom(self, capacity: float = 80e9) -> float:
        """The share of `capacity` bytes that is never held."""
        return 1 - self.peak / capacity

    def as_dict(self) -> dict:
        """All of it, for a file."""
        derived = {"peak": self.peak, "headroom_of_80GB": self.headroom(), "flops_per_token": self.flops_per_token}
        return dataclasses.asdict(self) | derived


def simulate(config: Config, world_size: int, layers: int | None = None, micro_batches: int = 1,
             imbalance: float = 1.0) -> Simulation:
    """One step of `config` on `world_size` ranks, laid out as its parallel settings say.

    `layers` simulates that depth and half of it and continues both in straight lines to the whole depth, each place of
    the step by itself, since a deeper model may hold the most at another one. `micro_batches` go through the model
    before the optimizer does. `imbalance` is what the experts of this rank get, in even shares of all tokens: no router
    chooses where numbers have no values. What Muon sends is overstated: on CPUs its all-to-alls are all-gathers.
    """
    whole, first = config.model.n_layers, config.model.moe.n_dense_layers
    depths = [whole] if layers is None else [layers // 2, layers]
    least = max(4, first + 2)  # with so many a block has neighbours on both sides, as most blocks have
    if layers is not None and not 2 * least <= layers <= whole:
        raise ConfigError(f"layers {layers} must be {2 * least} at least; the model has {whole}")
    if config.parallel.pipeline > 1:
        raise ConfigError("simulate has no pipeline stages yet; set parallel.pipeline 1", "parallel.pipeline")
    if imbalance > 1 and config.parallel.expert == 1:
        raise ConfigError("imbalance is between the ranks of an expert axis; set parallel.expert", "parallel.expert")
    if dist.is_initialized():
        raise SimulationError("simulate pretends to be a job of many ranks, and cannot run inside a real one")
    with _fake_ranks(world_size) as mesh:
        layout = lay_out(config.parallel, mesh)
        seen = [_observe(config, layout, depth, micro_batches, imbalance) for depth in depths]
        ahead = 0.0 if layers is None else (whole - layers) / (layers - depths[0])
        tokens = _sequences(config) * micro_batches * layout.data_size * config.sequence_length
    found = {name: _continued(seen[0][name], seen[-1][name], ahead) for name in seen[0]}
    held = {_named(place, whole): causes for place, causes in found["places"].items()}
    peaks = {place: sum(causes.values()) for place, causes in held.items()}
    place = max(peaks, key=peaks.get)
    return Simulation(config.name, world_size, factors(config.parallel, world_size), whole, depths, tokens,
                      found["state"], held[place], place, peaks, found["flops"], found["collectives"])


def _continued(shallow, deep, ahead: float):
    """Numbers at two depths, in nested dictionaries, continued by `ahead` times the way from the one to the other."""
    if isinstance(deep, dict):
        return {key: _continued(shallow[key], deep[key], ahead) for key in shallow}
    return round(deep + (deep - shallow) * ahead)


def _named(place: tuple[str, int | None], depth: int) -> str:
    what, block = place
    return what if block is None else f"{what} {block % depth}"


def _sequences(config: Config) -> int:
    """Of one micro-batch: one where the machine is to choose."""
    return config.train.micro_batch or 1


def table(found: Simulation) -> str:
    """A simulation as text."""
    layout = " x ".join(f"{axis} {size}" for axis, size in found.layout.items() if size > 1) or "one process"
    depths = " and ".join(map(str, found.layers_simulated))
    lines = [f"{found.name}, {found.n_layers} layers ({depths} simulated) on {found.world_size:,} ranks: {layout}",
             f"{found.tokens:,} tokens a step, {found.flops_per_token:.4g} FLOPs a token", "", "memory of rank 0, GiB"]
    rows = [(cause, size) for cause, size in found.memory.items() if size]
    lines += [f"{cause:>14}  {size / 2**30:9.3f}" for cause, size in [*rows, ("in all", found.peak)]]
    fits = f"leaves {found.headroom():.1%} of 80 GB" if found.headroom() >= 0 else "is more than 80 GB"
    lines += [f"most is held in the {found.place}; it {fits}", "", f"{'collectives':>40}  calls        GiB"]
    lines += [f"{name:>40}  {seen['calls']:5,}  {seen['bytes'] / 2**30:9.3f}"
              for name, seen in found.collectives.items()]
    return "\n".join(lines)


# --- The ranks that do not exist --------------------------------------------------------------------------------------


@contextlib.contextmanager
def _fake_ranks(world_size: int) -> Iterator[Mesh]:
    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    try:
        yield Mesh(0, world_size)
    finally:
        dist.destroy_process_group()
        _clear_sharding_prop_cache()  # it knows groups that are gone, by names that the next ones will have


def _even_traffic(counts: Tensor, group: dist.ProcessGroup, pairs: int, imbalance: float):
    """`expert.traffic` where every rank sends each the same number of its `pairs`, and this one gets `imbalance` so."""
    coming = exchanged(counts, [1] * group.size(), [1] * group.size(), group)
    sent = [pairs // group.size() + (rank < pairs % group.size()) for rank in range(group.size())]
    return coming, sent, [round(sent[0] * imbalance)] * group.size()


def _observe(config: Config, layout: Layout, depth: int, micro_batches: int, imbalance: float) -> dict:
    """One step of a model of `depth` layers, built as `state.py` builds it; what was seen, by name."""
    with torch.device("meta"):
        model = Transformer(dataclasses.replace(config.model, n_layers=depth))
    model.compute_dtype = torch.bfloat16 if config.train.dtype == "auto" else getattr(torch, config.train.dtype)
    model.set_kernels("torch")
    # not among fakes: FSDP cuts a tensor into the shares of all ranks, to take one
    parallelize(model, layout, config.parallel)
    tokens = _sequences(config) * config.sequence_length // layout.sizes["context"]
    pairs = tokens * config.model.moe.experts_per_token
    with (FakeTensorMode(allow_non_fake_inputs=True) as fake, Observer(fake, layout, depth) as observer,
          # or DTensor would find the shapes of whole tensors among the fakes that are counted
          mock.patch("torch.distributed.tensor._sharding_prop.detect_fake_mode", return_value=None),
          mock.patch.object(expert, "traffic", functools.partial(_even_traffic, pairs=pairs, imbalance=imbalance)),
          mock.patch.object(ops, "EXPLICIT_SCORES_LIMIT", 0)):  # attention as on a GPU
        return _step(config, layout, model, observer, micro_batches)


def _step(config: Config, layout: Layout, model: Transformer, observer: Observer, micro_batches: int = 1) -> dict:
    """What `Trainer.step` does, and what was seen of it. On a GPU no mask is made of documents: here there are none."""
    allocate(model, torch.device("cpu"))
    optimizers = build_optimizers(model, config.optim, model.compute_dtype)
    ids, targets = torch.zeros(2, _sequences(config), config.sequence_length, dtype=torch.int64).unbind()
    observer.follow(model)
    for i in range(micro_batches):
        fsdp.sum_after(model, last=i == micro_batches - 1)
        observer.at("forward, below the blocks")
        model(ids, targets, reduction="sum").backward()
    observer.at("optimizer")
    sum_loads(model, layout.mesh.sum)
    clip_gradients(model, config.optim.grad_clip, 1.0)
    for optimizer in optimizers:
        optimizer.step()
    balance_experts(model)
    observer.tell("buffers", list(model.buffers()))
    observer.tell("parameters", list(model.parameters()))
    observer.tell("gradients", [p.grad for p in model.parameters()])
    observer.tell("optimizer", [t for optimizer in optimizers for state in optimizer.state.values()
                                for t in state.values()])
    return observer.seen()
