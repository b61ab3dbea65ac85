"""Parameters of which each rank of a line has a part, and computes with that part as if it were all there is."""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement


def cut(module: nn.Module, name: str, ranks: DeviceMesh, *placements: Placement) -> None:
    """Makes a parameter on the meta device a DTensor, cut (Shard) or whole (Replicate) along each axis of `ranks`."""
    local = module.get_parameter(name).detach()
    if not local.is_meta:  # each rank would take the same part of it
        raise ValueError(f"{name} has values already; make a model that ranks are to share under torch.device('meta')")
    for axis, placement in enumerate(placements):
        if placement.is_shard():
            local = local.chunk(ranks.size(axis), placement.dim)[0]
    local = local.new_empty(local.shape)  # in a row in memory, as FSDP wants it
    module.register_parameter(name, nn.Parameter(DTensor.from_local(local, ranks, placements, run_check=False)))


def see_own_parts(module: nn.Module, change: dict[str, Callable[[Tensor], Tensor]] | None = None) -> None:
    """From now on `module.weight` is this rank's part, a plain tensor, whoever asks; `change` changes it on the way.

    What is whole on every rank takes part in another sum on each, so its gradient is the sum of theirs.
    """
    parts = tuple((name, parameter.device_mesh.ndim, (change or {}).get(name))
                  for name, parameter in module.named_parameters(recurse=False))
    if parts:
        module.__class__ = _class(type(module), parts)


@functools.cache  # modules of one kind have one class: else each layer would be compiled anew
def _class(kind: type[nn.Module], parts: tuple) -> type[nn.Module]:
    return type(kind.__name__, (kind,), {part[0]: _part(*part) for part in parts})


def _part(name: str, ndim: int, change: Callable[[Tensor], Tensor] | None) -> property:
    def get(module: nn.Module) -> Tensor:
        parameter = nn.Module.__getattr__(module, name)
        if parameter.device_mesh.ndim > ndim:
            return parameter  # it is FSDP that asks, and computes nothing with it
        whole = all(placement.is_replicate() for placement in parameter.placements)
        part = parameter.to_local(grad_placements=[Partial()] * ndim if whole else None)
        return change(part) if change else part

    return property(get)
