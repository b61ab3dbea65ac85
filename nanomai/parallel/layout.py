"""Which rank does what: the factors of `parallel` as a grid of ranks.

Neighbours in the last axis talk most, so they are the ranks of one machine. An expert group is made of ranks that share
parameters (fsdp), and the ranks of a context are taken to share them too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from nanomai.config import ConfigError, ParallelConfig
from nanomai.parallel.mesh import Mesh

FACTORS = ("replicas",)  # beside fsdp, which may take what they leave


@dataclass(frozen=True)
class Layout:
    """The grid, and this rank's place in it."""

    mesh: Mesh = field(default_factory=Mesh)
    replicas: int = 1
    fsdp: int = 1
    grid: DeviceMesh | None = None  # None: one process

    @property
    def data_rank(self) -> int:
        """Which part of each batch this rank reads, of `data_size`."""
        return self.mesh.rank

    @property
    def data_size(self) -> int:
        return self.replicas * self.fsdp

    @property
    def sharding(self) -> DeviceMesh | None:
        """The ranks that hold one model together, (fsdp,), or (replicas, fsdp); None: each holds its own."""
        if self.grid is None:
            return None
        return self.grid if self.replicas > 1 else self.grid["fsdp"]


def lay_out(parallel: ParallelConfig, mesh: Mesh, device_type: str = "cpu") -> Layout:
    """The grid for the ranks that there are, or ConfigError naming the factor that does not fit."""
    sizes = factors(parallel, mesh.world_size)
    if mesh.world_size == 1:
        return Layout(mesh)
    return Layout(mesh, **sizes, grid=init_device_mesh(device_type, tuple(sizes.values()),
                                                       mesh_dim_names=tuple(sizes)))


def factors(parallel: ParallelConfig, world_size: int) -> dict[str, int]:
    """Every factor with its number, outermost first; fsdp `auto` is what the others leave of `world_size`."""
    given = {name: getattr(parallel, name) for name in FACTORS}
    if parallel.fsdp != "auto":
        given["fsdp"] = parallel.fsdp
    product = math.prod(given.values())
    fits = world_size % product == 0 if parallel.fsdp == "auto" else world_size == product
    if not fits:
        _refuse(given, world_size, parallel.fsdp == "auto")
    return {name: given[name] for name in FACTORS} | {"fsdp": given.get("fsdp", world_size // product)}


def _refuse(given: dict[str, int], world_size: int, rest_is_free: bool) -> None:
    """Names the largest factor that another number could mend, and the nearest such number."""
    product = math.prod(given.values())
    words = " x ".join(f"{name} {number}" for name, number in given.items() if number > 1)
    trouble = f"parallel {words} {'divides no' if rest_is_free else 'is not'} {world_size} ranks"
    for name in sorted(given, key=given.get, reverse=True):
        others = product // given[name]
        if world_size % others == 0:
            room = world_size // others
            fitting = [n for n in range(1, room + 1) if room % n == 0] if rest_is_free else [room]
            nearest = min(fitting, key=lambda n: abs(n - given[name]))
            raise ConfigError(f"{trouble}; the nearest that works is {name} {nearest}", f"parallel.{name}")
    raise ConfigError(f"{trouble}; start a multiple of {product} ranks", f"parallel.{next(iter(given))}")
