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
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from nanomai import ops
from nanomai.config import Config, ConfigError
from nanomai.model import Transformer
from nanomai.moe import balance_experts, sum_loads
from nanomai.optim import build_optimizers
from nanomai.parallel import expert, fsdp
from nanomai.parallel.apply import allocate, clip_gradients, parallelize
from nanomai.parallel.collectives import exchanged
from nanomai.parallel.layout import Layout, lay_out
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

    `layers` simulates that depth and half of it and continues both in straight lines to the whole depth: seconds in
    place of minutes. `micro_batches` go through the model before the optimizer does. `imbalance` is what the experts of
    this rank get, in even shares of all tokens: no router chooses where numbers have no values.
    """
    whole, first = config.model.n_layers, config.model.moe.n_dense_layers
    depths = [whole] if layers is None else [layers // 2, layers]
    least = max(4, first + 2)  # with so many a block has neighbours on both sides, as most blocks have
    if layers is not None and not 2 * least <= layers <= whole:
        raise ConfigError(f"layers {layers} must be {2 * least} at least, and at most {whole}")
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
    place = max(found["places"], key=lambda place: sum(found["places"][place].values()))
    peaks = {_named(p, whole): sum(causes.values()) for p, causes in found["places"].items()}
    return Simulation(config.name, world_size, layout.sizes, whole, depths, tokens, found["state"],
                      found["places"][place], _named(place, whole), peaks, found["flops"], found["collectives"])


def _continued(shallow, deep, ahead: float):
    """Numbers at two depths, in nested dictionaries, continued by `ahead` times the way from the one to the other."""
    if isinstance(deep, dict):
        return {key: _continued(shallow[key], deep[key], ahead) for key in shallow}
    return round(deep + (deep - shallow) * ahead)


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
        _step(config, layout, model, observer, micro_batches)
        return observer.seen()


def _step(config: Config, layout: Layout, model: Transformer, observer: Observer, micro_batches: int) -> None:
    """What `Trainer.step` does, with no values. On a GPU no mask is made of documents, so there are none here."""
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


def _axes(layout: Layout) -> dict[str, str]:
    """The axis of each group of ranks, by the group's name."""
    views = (layout.sparse, {"shard": "fsdp of experts"}), (layout.grid, {}), (layout.dense, {"shard": "fsdp"})
    names = {view.get_group(axis).group_name: new.get(axis, axis)
             for view, new in views if view is not None for axis in view.mesh_dim_names}
    return {dist.group.WORLD.group_name: "all"} | names  # one that is all of them goes by its axis


# --- Seeing -----------------------------------------------------------------------------------------------------------

CAUSES = ("parameters", "gradients", "optimizer", "gathered", "scattered", "activations", "temporaries", "buffers")
# the first that is part of an operation's name
KINDS = {"gather": "all-gather", "reduce_scatter": "reduce-scatter", "all_to_all": "all-to-all",
         "alltoall": "all-to-all", "allreduce": "all-reduce", "all_reduce": "all-reduce"}


def _attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, widths: tuple[int, int]) -> int:
    """Of so many products over the width of a key, and of a value; half of a causal one is never computed."""
    products = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * (widths[0] * k.shape[3] + widths[1] * v.shape[3])
    return 2 * products // (2 if causal else 1)


aten = torch.ops.aten
ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu:
        lambda q, k, v, dropout=0.0, causal=False: _attention(q, k, v, causal=causal, widths=(1, 1)),
    # scores once more, and the gradients of q and k; of v and of the scores
    aten._scaled_dot_product_flash_attention_for_cpu_backward:
        lambda dy, q, k, v, y, sums, dropout, causal: _attention(q, k, v, causal=causal, widths=(3, 2)),
}
PRODUCTS = flop_registry | {
    torch.ops.nanomai.grouped_products:
        lambda x, weight, ends, out_val: 2 * x.shape[0] * weight.shape[1] * weight.shape[2],
    torch.ops.nanomai.grouped_outer_products: lambda dy, x, ends, out_val: 2 * len(x) * dy.shape[1] * x.shape[1],
}


class Observer(TorchDispatchMode):
    """Notes every change of memory, every product and every collective of what runs inside.

    Each storage keeps the cause it was given last: at first where it was made, `activations` in a forward pass and
    `temporaries` later (what is computed again, gradients of activations); then `gathered` and `scattered` where FSDP
    takes it; at the end what it turns out to be.
    """

    def __init__(self, fake: FakeTensorMode | None, layout: Layout, depth: int):
        super().__init__()
        self.fake, self.axes, self.depth = fake, _axes(layout), depth
        self.alive: dict[int, tuple[int, weakref.ref]] = {}  # the number of each storage that there is, by its address
        self.sizes: list[int] = []  # by number
        self.causes: list[str] = []
        self.changes: list[tuple[tuple, int, int]] = []  # place, number, bytes
        self.place, self.cause = ("the beginning", None), "temporaries"
        self.flops = Counter(products=0, attention=0)
        self.collectives: dict[str, Counter] = defaultdict(Counter)

    def __enter__(self):
        self.resize = torch.UntypedStorage.resize_  # FSDP frees and gets memory by it, and no operation tells
        observer = self

        def resize_(storage, size):
            observer.resize(storage, size)
            observer.change(storage)

        torch.UntypedStorage.resize_ = resize_
        return super().__enter__()

    def __exit__(self, *problem):
        torch.UntypedStorage.resize_ = self.resize
        return super().__exit__(*problem)

    def __torch_dispatch__(self, op, types, inputs=(), options=None):
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # what it does with this rank's part comes by as well
        options = options or {}
        y = op(*inputs, **options)
        waits = op is torch.ops._c10d_functional.wait_tensor.default
        y = inputs[0] if waits else y  # waiting makes nothing new; a fake's does
        tensors = [t for t in tree_leaves((y, inputs, options)) if isinstance(t, Tensor)]
        ours = all(getattr(t, "fake_mode", self.fake) is self.fake and t.device.type != "meta" for t in tensors)
        if ours and not waits and op.namespace != "prim":
            for tensor in tree_leaves(y):
                if isinstance(tensor, Tensor):
                    self.change(tensor.untyped_storage())
            self.count(op, inputs, options, y, tensors)
        return y

    # --- Memory

    def change(self, storage: torch.UntypedStorage) -> None:
        """Notes a storage that is new, or may have another size now."""
        address = storage._cdata
        if address not in self.alive:
            gone = weakref.ref(storage, lambda _: self.note(self.alive.pop(address)[0], 0))
            self.alive[address] = len(self.sizes), gone
            self.sizes.append(0)
            self.causes.append(self.cause)
        self.note(self.alive[address][0], storage.nbytes())

    def note(self, number: int, size: int) -> None:
        if size != self.sizes[number]:
            self.changes.append((self.place, number, size - self.sizes[number]))
            self.sizes[number] = size

    def tell(self, cause: str, tensors: list[Tensor | None]) -> None:
        """Says what tensors are for."""
        for tensor in tensors:
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            if local is not None and (found := self.alive.get(local.untyped_storage()._cdata)):
                self.causes[found[0]] = cause

    def at(self, what: str, block: int | None = None) -> None:
        """Says which part of the step begins. Blocks of the second half are counted from the end."""
        if block is not None and block >= self.depth // 2:
            block -= self.depth
        self.place = what, block
        self.cause = "activations" if what.startswith("forward") else "temporaries"

    def follow(self, model: Transformer) -> None:
        """Has every block say when its forward begins, and its backward."""
        def begin(i, block, inputs):
            if i == 0:
                inputs[0].register_hook(lambda _: self.at("backward, below the blocks"))
            self.at("forward of block", i)

        def end(i, block, inputs, y):
            y.register_hook(lambda _: self.at("backward of block", i))
            if i == self.depth - 1:
                self.at("forward, above the blocks")

        for i, block in enumerate(model.blocks.values()):
            block.register_forward_pre_hook(functools.partial(begin, i))
            block.register_forward_hook(functools.partial(end, i))

    # --- FLOPs and collectives

    def count(self, op, inputs: tuple, options: dict, y, tensors: list[Tensor]) -> None:
        """Notes what an operation computes and sends, and what FSDP takes into its hands."""
        packet, space, name = op._overloadpacket, op.namespace, op._schema.name.split("::")[1]
        if packet in ATTENTION:
            self.flops["attention"] += ATTENTION[packet](*inputs)
        elif packet in PRODUCTS:
            self.flops["products"] += PRODUCTS[packet](*inputs, **options, out_val=y)
        elif space in ("c10d", "_c10d_functional", "_dtensor"):
            names = [argument.name for argument in op._schema.arguments]
            group = inputs[names.index("process_group" if space == "c10d" else "group_name")]
            group = group if isinstance(group, str) else dist.ProcessGroup.unbox(group).group_name
            kind = next(kind for part, kind in KINDS.items() if part in name)
            seen = self.collectives[f"{self.axes[group]}: {kind}"]
            seen["calls"] += 1
            seen["bytes"] += max(t.nbytes for t in tensors)
        if space == "fsdp" or name in ("_allgather_base_", "_reduce_scatter_base_"):
            self.tell("scattered" if "chunk_cat" in name or "reduce" in name else "gathered", tensors)

    # --- Afterwards

    def seen(self) -> dict[str, dict]:
        """The most that each place held, by cause; what is left by cause; FLOPs; collectives."""
        held, places = Counter(), {}
        for place, number, change in self.changes:
            held[self.causes[number]] += change
            total = held.total()
            if total > places.get(place, (0,))[0]:
                places[place] = total, dict(held)
        left = Counter()
        for number, _ in self.alive.values():
            left[self.causes[number]] += self.sizes[number]
        return {"places": {place: {cause: causes.get(cause, 0) for cause in CAUSES}
                           for place, (_, causes) in places.items()},
                "state": {cause: left[cause] for cause in CAUSES[:3]}, "flops": dict(self.flops),
                "collectives": {name: dict(seen) for name, seen in self.collectives.items()}}


def _named(place: tuple[str, int | None], depth: int) -> str:
    what, block = place
    return what if block is None else f"{what} {block % depth}"
