"""Expert parallel: each rank holds some experts whole, and tokens travel to them and back (arXiv 2006.16668).

The (token, expert) pairs of a rank are sorted by expert, as in `moe.py`, and so by the rank that has it. No token is
dropped, so ranks first tell each other how many are to come. One all-to-all brings the rows, the experts that are here
run on all that have come, and a second one brings the results back, as it does gradients. Letters as in `moe.py`.
"""

from __future__ import annotations

import functools

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard

from nanomai.grouped import sort_pairs, to_experts, to_tokens
from nanomai.moe import Experts
from nanomai.parallel.collectives import exchange, exchanged
from nanomai.parallel.shares import cut, see_own_parts
from nanomai.parallel.tensor import placement


def share_experts(model: nn.Module, ranks: DeviceMesh) -> None:
    """Gives each rank its part of every layer's experts. `ranks` is (expert,); (expert, tensor) cuts each as well."""
    group = ranks.get_group("expert")
    for block in model.blocks.values():
        if (experts := getattr(block.mlp, "experts", None)) is not None:
            for name, _ in list(experts.named_parameters(recurse=False)):
                cut(experts, name, ranks, *(Shard(0), placement(f"experts.{name}"))[: ranks.ndim])
            see_own_parts(experts)
            experts.forward = functools.partial(torch.compiler.disable(_forward), experts, group)


def _forward(experts: Experts, group: dist.ProcessGroup, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    """x (N, D), weights and chosen (N, k) -> (N, D), as `Experts.forward`."""
    size, here = group.size(), len(experts.w_up)
    pairs = sort_pairs(chosen, size * here)
    counts = pairs.ends.diff(prepend=pairs.ends.new_zeros(1)).view(size, here)
    coming, sent, received = traffic(counts, group)
    rows = exchange(to_experts(x, pairs), received, sent, group)  # (M, D), by rank, then by expert
    experts_of_rows = torch.arange(here, device=x.device).repeat(size).repeat_interleave(
        coming.flatten(), output_size=len(rows))
    ones = torch.ones_like(experts_of_rows, dtype=weights.dtype)
    y = Experts.forward(experts, rows, ones[:, None], experts_of_rows[:, None])
    y = to_tokens(exchange(y, sent, received, group), pairs)  # (N, k, D)
    return (y * weights[..., None].to(x.dtype)).sum(1)


def traffic(counts: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, list[int], list[int]]:
    """Of counts (R, E / R), rows for each rank's experts: those that come here, and what goes to and comes from a rank.

    The host waits here; the simulator, whose counts have no values, has its own function in this place.
    """
    coming = exchanged(counts, [1] * group.size(), [1] * group.size(), group)  # (R, E / R), by the rank they come from
    return coming, counts.sum(1).tolist(), coming.sum(1).tolist()
