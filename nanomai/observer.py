"""What a training step holds, computes and sends, operation by operation: the eyes of the simulator.

They see a real step as well as one whose tensors are fakes.
"""

from __future__ import annotations

import functools
import gc
import weakref
from collections import Counter, defaultdict

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from nanomai import grouped  # noqa: F401 (whose operations are counted)
from nanomai.parallel.layout import Layout

CAUSES = ("parameters", "gradients", "optimizer", "gathered", "scattered", "activations", "received", "temporaries",
          "buffers")
# the first that is part of an operation's name
KINDS = {"gather": "all-gather", "reduce_scatter": "reduce-scatter", "all_to_all": "all-to-all",
         "alltoall": "all-to-all", "allreduce": "all-reduce", "all_reduce": "all-reduce",
         "send": "send", "recv": "receive"}


def _kind(name: str) -> str | None:
    return next((kind for part, kind in KINDS.items() if part in name), None)


def _attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, widths: tuple[int, int]) -> int:
    """Of so many products over the width of a key, and of a value; what a causal mask hides is never computed."""
    (batch, heads, t, width), s = q.shape, k.shape[2]
    return batch * heads * (2 * t * s - causal * t * t) * (widths[0] * width + widths[1] * v.shape[3])


aten = torch.ops.aten
ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu:
        lambda q, k, v, dropout=0.0, causal=False: _attention(q, k, v, causal=causal, widths=(1, 1)),
    aten._scaled_dot_product_efficient_attention:
        lambda q, k, v, bias, sums, dropout=0.0, causal=False: _attention(q, k, v, causal=causal, widths=(1, 1)),
    # scores once more, and the gradients of q and k; of v and of the scores
    aten._scaled_dot_product_flash_attention_for_cpu_backward:
        lambda dy, q, k, v, y, sums, dropout, causal: _attention(q, k, v, causal=causal, widths=(3, 2)),
    aten._scaled_dot_product_efficient_attention_backward:
        lambda dy, q, k, v, bias, y, sums, seed, offset, dropout, wanted, causal=False:
            _attention(q, k, v, causal=causal, widths=(3, 2)),
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
    takes it, `received` where another stage fills it; at the end what it turns out to be.
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
        self.collects = gc.isenabled()
        gc.disable()  # when Python looks for circles depends on what the process did before: here, never
        return super().__enter__()

    def __exit__(self, *problem):
        torch.UntypedStorage.resize_ = self.resize
        if self.collects:
            gc.enable()
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

    def follow(self, model: nn.Module) -> None:
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
        elif space in ("c10d", "_c10d_functional", "_dtensor") and (kind := _kind(name)):
            names = [argument.name for argument in op._schema.arguments]
            group = inputs[names.index("process_group" if space == "c10d" else "group_name")]
            group = group if isinstance(group, str) else dist.ProcessGroup.unbox(group).group_name
            seen = self.collectives[f"{self.axes[group]}: {kind}"]
            seen["calls"] += 1
            seen["bytes"] += max(t.nbytes for t in tensors)
        if space == "fsdp" or name in ("_allgather_base_", "_reduce_scatter_base_"):
            self.tell("scattered" if "chunk_cat" in name or "reduce" in name else "gathered", tensors)
        if name == "recv_":
            self.tell("received", tensors)

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


def _axes(layout: Layout) -> dict[str, str]:
    """The axis of each group of ranks, by the group's name; one process has none."""
    if layout.grid is None:
        return {}
    views = (layout.sparse, {"shard": "fsdp of experts"}), (layout.grid, {}), (layout.dense, {"shard": "fsdp"})
    names = {view.get_group(axis).group_name: new.get(axis, axis)
             for view, new in views for axis in view.mesh_dim_names}
    return {dist.group.WORLD.group_name: "all"} | names  # one that is all of them goes by its axis
