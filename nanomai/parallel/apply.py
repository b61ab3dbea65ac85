"""The order in which parallelism is laid over a model, outside the model.

Today: compile each block and the loss, then replicate over the ranks. The full order that this file will grow into is
pipeline split, tensor (with sequence) parallel, expert parallel, context parallel, activation checkpointing, compile,
FSDP2.
"""

from __future__ import annotations

import torch
from torch import nn

from nanomai.parallel.mesh import Mesh


def parallelize(model: nn.Module, mesh: Mesh, compile_blocks: bool) -> nn.Module:
    """Lays the transforms over `model` in place. Every rank has drawn the same initial weights (`init_weights`)."""
    if compile_blocks:
        for module in (*model.blocks.values(), model.loss):  # one graph serves every layer, however many there are
            module.compile(fullgraph=True, dynamic=False)
    return model


def sum_gradients(model: nn.Module, mesh: Mesh) -> None:
    """Plain data parallelism: every rank ends with the sum of all gradients, sent as one flat tensor per dtype."""
    if mesh.world_size == 1:
        return
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    for dtype in dict.fromkeys(g.dtype for g in gradients):  # not a set: all ranks in one order
        same = [g for g in gradients if g.dtype == dtype]
        flat = mesh.sum(torch.cat([g.flatten() for g in same]))
        for g, summed in zip(same, flat.split([g.numel() for g in same]), strict=True):
            g.copy_(summed.view_as(g))


def clip_gradients(model: nn.Module, max_norm: float, divide_by: float = 1.0) -> torch.Tensor:
    """Divides the summed gradients by the count of tokens, then scales them to a global norm of at most `max_norm`.

    Returns the norm before clipping, of the divided gradients. max_norm 0 clips nothing. One pass over the memory.
    """
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.stack(torch._foreach_norm(gradients)).norm() / divide_by
    scale = 1.0 / divide_by
    if max_norm > 0:
        scale = scale * torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    torch._foreach_mul_(gradients, scale)
    return norm
