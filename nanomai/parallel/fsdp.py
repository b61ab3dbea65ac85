"""Fully sharded data parallel: each rank keeps a share of every tensor and has a whole block only while it runs.

ZeRO's third stage (arXiv 1910.02054) as PyTorch's FSDP2 does it: a block's parameters are gathered before its forward
and again before its backward, its gradients are summed and scattered after it, and the optimizer sees shares alone.
With a second axis (HSDP) each row of ranks is such a group, and gradients are summed between the rows as well.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from nanomai.parallel.layout import Layout
from nanomai.parallel.pipeline import stages_of


def shard(model: nn.Module, layout: Layout, dtype: torch.dtype, keep_gathered: bool = False) -> None:
    """Shares out each block, and then what is left: embeddings, the last norm, the head.

    Parameters travel as `dtype`, to which every projection would cast them, and norms and routers, which compute in
    float32, see them rounded so, as in torchtitan: gradients are no less exact for it (tests/test_parallel.py). They
    are summed in float32.
    `keep_gathered` spares the second gathering of each block, and the sums of all micro-batches but the last; it costs
    the memory of the whole model, and of its gradients between micro-batches (ZeRO 1 and 2).
    """
    # inputs stay as they are: rotations are float32 on purpose
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    ranks, options = layout.sharding(), {"mp_policy": policy, "reshard_after_forward": not keep_gathered}
    for block in model.blocks.values():
        if layout.axis("expert") is not None and hasattr(block.mlp, "experts"):
            group = layout.sharding(of_experts=True)
            fully_shard(block.mlp.experts, mesh=group, shard_placement_fn=_inside_experts(group), **options)
        fully_shard(block, mesh=ranks, shard_placement_fn=_inside_experts(ranks), **options)
    fully_shard(model, mesh=ranks, mp_policy=policy)  # first and last to run, so it stays gathered in between
    model.sums_once = keep_gathered
    for unit in units(model):
        unit.set_force_sum_reduction_for_comms(True)  # gloo has no other
        unit.set_gradient_divide_factor(1.0)  # gradients are sums over tokens, divided once (`clip_gradients`)


def _inside_experts(ranks: DeviceMesh) -> Callable[[nn.Parameter], Shard | None]:
    """Where ranks outnumber the experts of a stack (E, m, n), each gets rows or columns of all, if they divide evenly.

    Else some ranks get nothing, and are gathered from as if they had as much as the others. A function of the
    parameter, as FSDP wants it; None leaves the first dimension.
    """
    size = ranks["shard"].size()

    def placement(parameter: nn.Parameter) -> Shard | None:
        held = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        inside = [dim for dim in (1, 2) if held.ndim == 3 and len(held) < size and held.shape[dim] % size == 0]
        return Shard(inside[0]) if inside else None

    return placement


def units(model: nn.Module) -> list[FSDPModule]:
    """The modules that are gathered and scattered as one."""
    return [module for stage in stages_of(model) for module in stage.modules() if isinstance(module, FSDPModule)]


def sum_after(model: nn.Module, last: bool) -> None:
    """Before each micro-batch: says which gradients are summed after it.

    Those of one copy of the model are summed and scattered each time, so that no rank holds them whole; where memory is
    given for less to send (`keep_gathered`), after the last one only, as they are between copies.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last or not model.sums_once)
        model.set_requires_all_reduce(last)


def scatter(model: nn.Module) -> None:
    """Back to shares: after a forward pass that no backward follows, the root would stay gathered."""
    for unit in units(model):
        unit.reshard()
