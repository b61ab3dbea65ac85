"""Activation checkpointing: keep less of the forward pass, and compute it again in the backward.

`full` keeps the input of each block alone (arXiv 1604.06174): a block's activations exist while its backward runs, for
a third more arithmetic. `selective` keeps the results of matrix products and of attention, which cost the most to make,
and computes again what lies between them: norms, rotations, gates.
"""

from __future__ import annotations

import functools
import types

import torch
from torch import nn
from torch.utils.checkpoint import SAC_IGNORED_OPS, CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

aten = torch.ops.aten
# Ours, by name, since not all are registered everywhere; those of norms, rotations and gates are computed again.
OURS = {"grouped_products", "grouped_linear", "flash_attention", "linear_cross_entropy"}
KEPT = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten._grouped_mm.default, aten._scaled_mm.default,
        aten._scaled_dot_product_flash_attention.default, aten._scaled_dot_product_cudnn_attention.default,
        aten._scaled_dot_product_efficient_attention.default, aten._scaled_dot_product_flash_attention_for_cpu.default}

# Experts that FSDP gathers by themselves get another number of labels for the profiler the second time.
SAC_IGNORED_OPS.update({torch.ops.profiler._record_function_enter_new.default,
                        torch.ops.profiler._record_function_exit._RecordFunction})


def recompute(model: nn.Module, what: str, compile_inside: bool = False) -> None:
    """Lays `what` (none, selective, full) over every block; `compile_inside` it, where a block is more than a graph."""
    if what == "none":
        return
    options = {}
    if what == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _keep)
    forward = torch.compile(_forward, dynamic=False) if compile_inside else _forward
    for block in model.blocks.values():
        block.recomputes = forward, options
        block.forward = types.MethodType(_recomputed, block)


def _recomputed(block: nn.Module, *inputs):
    """A frame of our own with the block as an argument: compiled, one graph serves every layer."""
    forward, options = block.recomputes
    return checkpoint(forward, block, *inputs, use_reentrant=False, **options)


def _forward(block: nn.Module, *inputs):
    return type(block).forward(block, *inputs)


def _keep(context, op, *args, **kwargs) -> CheckpointPolicy:
    keep = op in KEPT or (op.namespace == "nanomai" and op.name().split("::")[1] in OURS)
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE
