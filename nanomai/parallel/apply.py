"""The order in which parallelism is laid over a model, outside the model: pipeline, and over each stage context,
expert, tensor, recompute, compile, FSDP.

The model arrives on the meta device, as shapes; its values come last, so that no rank ever holds a whole one.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from nanomai.config import ParallelConfig
from nanomai.parallel import context, expert, fsdp, limits, tensor
from nanomai.parallel.layout import Layout
from nanomai.parallel.pipeline import Pipeline, stages_of
from nanomai.parallel.recompute import recompute


def parallelize(model: nn.Module, layout: Layout | None = None, parallel: ParallelConfig | None = None,
                compile_blocks: bool = False) -> nn.Module:
    """Lays the transforms over `model` in place; ConfigError if it cannot be shared so.

    A compiled block is one graph, with what is computed again and the collectives of tensor and context ranks, but
    without FSDP's; where experts live elsewhere it is several.
    """
    layout, parallel = layout or Layout(), parallel or ParallelConfig()
    limits.check(model.config, parallel, layout.sizes)
    if layout.axis("pipeline") is not None:
        Pipeline(model, layout, parallel.stages_per_rank)
    for stage in stages_of(model):
        _transform(stage, layout, parallel, compile_blocks)
    return model


def _transform(model: nn.Module, layout: Layout, parallel: ParallelConfig, compile_blocks: bool) -> None:
    if (ranks := layout.axis("context")) is not None:
        context.share_sequences(model, ranks, parallel.context_by)
    if (ranks := layout.axis("expert")) is not None:
        cuts_each = layout.axis("tensor") is not None
        expert.share_experts(model, layout.sparse["expert", "tensor"] if cuts_each else ranks)
    if (ranks := layout.axis("tensor")) is not None:
        tensor.share_products(model, ranks)
    in_one = layout.axis("expert") is None  # else the host asks how many tokens come for experts here
    inside = compile_blocks and not in_one and parallel.recompute != "none"  # dynamo compiles nothing around a break
    recompute(model, parallel.recompute, inside)
    if compile_blocks:
        for module in (*(() if inside else model.blocks.values()), model.loss):  # one graph serves every layer
            module.compile(fullgraph=in_one, dynamic=False)
    if layout.grid is not None:
        # between the micro-batches of a pipeline nothing is summed, and so nothing need be gathered again
        fsdp.shard(model, layout, model.compute_dtype, parallel.keep_gathered or parallel.pipeline > 1)


def allocate(model: nn.Module, device: torch.device) -> nn.Module:
    """Gives a model that was made on the meta device its memory; parameters are garbage, buffers zero."""
    for stage in stages_of(model):
        stage.to_empty(device=device)
    for buffer in model.buffers():
        buffer.zero_()
    return model


def share(parameter: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """What this rank holds of a parameter, and where in each dimension it begins (see `model.init_weights`)."""
    if not isinstance(parameter, DTensor):
        return parameter, (0,) * parameter.ndim
    _, begin = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return parameter.to_local(), begin


def clip_gradients(model: nn.Module, max_norm: float, divide_by: float = 1.0) -> Tensor:
    """Divides the summed gradients by the count of tokens, then scales them to a global norm of at most `max_norm`.

    Returns the norm before clipping, of the divided gradients. max_norm 0 clips nothing. One pass over the memory.
    """
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    here = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
    if any(isinstance(g, DTensor) for g in gradients):
        norm = _norm_over_ranks(here, _copies(model, gradients)) / divide_by
    else:
        norm = torch.stack(torch._foreach_norm(here)).norm() / divide_by
    scale = 1.0 / divide_by
    if max_norm > 0:
        scale = scale * torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    torch._foreach_mul_(here, scale)
    return norm


def _copies(model: nn.Module, gradients: list[DTensor]) -> list[int]:
    """How many ranks hold the same part of each gradient, as this one does: those of its stage, by the parts cut."""
    n_stages = model.pipeline.p if hasattr(model, "pipeline") else 1
    ranks = dist.get_world_size() // n_stages
    return [ranks // math.prod(size for size, placement in zip(g.device_mesh.shape, g.placements, strict=True)
                               if not placement.is_replicate()) for g in gradients]


def _norm_over_ranks(parts: list[Tensor], copies: list[int]) -> Tensor:
    """From one sum over all ranks, so the same in every bit: scaled by another number, copies would drift apart."""
    squares = torch.stack(torch._foreach_norm(parts)).square() / torch.tensor(copies, device=parts[0].device)
    total = squares.sum()
    dist.all_reduce(total)
    return total.sqrt()
