"""Which rank does what: the factors of `parallel` as a grid of ranks.

    pipeline   stages of blocks, one after another                       talks least: activations of a micro-batch
    replicas   copies of the model; gradients are summed between them
    fsdp       ranks that share one copy; each reads its own part of the batch
    context    ranks that share a sequence, and share parameters as fsdp's do
    expert     some of the fsdp ranks: each holds its share of the experts whole, and tokens travel to them
    tensor     ranks that share each matrix product                      talks most: all of a block's activations

Ranks are counted along the last axis first, so neighbours, who are in one machine, talk most.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from nanomai.config import ParallelConfig, factors
from nanomai.parallel.mesh import Mesh

# `outer` is what of fsdp is not expert: the product of the two is fsdp.
AXES = ("pipeline", "replicas", "outer", "context", "expert", "tensor")


@dataclass(frozen=True)
class Layout:
    """The grid, and this rank's place in it."""

    mesh: Mesh = field(default_factory=Mesh)
    sizes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(AXES, 1))
    grid: DeviceMesh | None = None  # None: one process
    dense: DeviceMesh | None = None  # with all that share parameters in one axis
    sparse: DeviceMesh | None = None  # with all that share experts in one axis

    def axis(self, name: str) -> DeviceMesh | None:
        """This rank's line of the grid along one axis; None where the axis has one rank."""
        if self.sizes[name] == 1:
            return None
        return next(view[name] for view in (self.dense, self.sparse, self.grid) if name in view.mesh_dim_names)

    @property
    def data_size(self) -> int:
        """Parts into which each batch is cut."""
        return self.sizes["replicas"] * self.sizes["outer"] * self.sizes["expert"]

    @property
    def data_rank(self) -> int:
        """The part that this rank reads."""
        rank = 0
        for name in ("replicas", "outer", "expert") if self.grid else ():
            rank = rank * self.sizes[name] + self.grid.get_local_rank(name)
        return rank

    def sum(self, x: Tensor) -> Tensor:
        """`x`, which counts something of this rank's part of the batch, over the whole batch. In place."""
        same = self.sizes["tensor"] * self.sizes["context"] * self.sizes["pipeline"]  # ranks that read the same part
        return self.mesh.sum(x).div_(same)

    def sharding(self, of_experts: bool = False) -> DeviceMesh | None:
        """The ranks that share parameters, (shard,), or (replicas, shard); None in one process.

        Experts that live on an expert axis are shared by the ranks that hold the same ones.
        """
        if self.grid is None:
            return None
        view = self.sparse if of_experts else self.dense
        return view["replicas", "shard"] if self.sizes["replicas"] > 1 else view["shard"]


def lay_out(parallel: ParallelConfig, mesh: Mesh, device_type: str = "cpu") -> Layout:
    """The grid for the ranks that there are, or ConfigError naming the factor that does not fit."""
    found = factors(parallel, mesh.world_size)
    if mesh.world_size == 1:
        return Layout(mesh)
    sizes = {name: found.get(name, found["fsdp"] // found["expert"]) for name in AXES}
    world = init_device_mesh(device_type, (mesh.world_size,), mesh_dim_names=("world",))
    outer, inner = sizes["outer"] * sizes["context"], sizes["expert"]
    before, tensor = (sizes["pipeline"], sizes["replicas"]), sizes["tensor"]

    def view(axes: tuple[str, ...], *shape: int) -> DeviceMesh:
        # only tensors of the GPU travel along an axis: gloo would connect every pair of its ranks for nothing
        backend = dict.fromkeys(axes, "nccl") if device_type == "cuda" else None
        return world._unflatten(0, shape, axes, backend)

    # three views of the same ranks, for three ways to cut what replicas and tensor leave
    return Layout(mesh, sizes, view(AXES, *sizes.values()),
                  view(("pipeline", "replicas", "shard", "tensor"), *before, outer * inner, tensor),
                  view(("pipeline", "replicas", "shard", "expert", "tensor"), *before, outer, inner, tensor))
