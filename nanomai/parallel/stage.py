"""PyTorch's pipeline stage, with room for what it receives only while that is needed.

The library makes room for every micro-batch of a step at the beginning, activations and gradients, and gives none of it
back: three tensors (B, T, D) for each. Of the 480 micro-batches that go through a stage of mai-1-moe on 1,024 ranks,
each with an eighth of a sequence, that would be 24 GB.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.distributed.pipelining import PipelineStage


class Stage(PipelineStage):
    """A stage whose buffers are shapes, but for those of the micro-batches that are on their way through it."""

    def _prepare_forward_infra(self, *inputs, **options):
        return self._as_shapes(super()._prepare_forward_infra, *inputs, **options)

    def _prepare_backward_infra(self, *inputs, **options):
        return self._as_shapes(super()._prepare_backward_infra, *inputs, **options)

    def _as_shapes(self, prepare: Callable, *inputs, **options):
        device, self.device = self.device, torch.device("meta")
        try:
            return prepare(*inputs, **options)
        finally:
            self.device = device

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list:
        """What brings the activations of a micro-batch."""
        self._move(self.args_recv_info[fwd_chunk_id], self.device)
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list:
        """What brings its gradients."""
        self._move(self.grad_recv_info[bwd_chunk_id], self.device)
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def backward_one_chunk(self, bwd_chunk_id: int, *inputs, **options) -> None:
        """After it nothing that was received is needed any more."""
        super().backward_one_chunk(bwd_chunk_id, *inputs, **options)
        self._move((*self.args_recv_info[bwd_chunk_id], *self.grad_recv_info[bwd_chunk_id]), torch.device("meta"))

    @staticmethod
    def _move(messages: tuple, device: torch.device) -> None:
        for message in messages:
            if (buffer := getattr(message, "buffer", None)) is not None:  # the first stage's tokens have none
                message.buffer = torch.empty_like(buffer, device=device, requires_grad=buffer.requires_grad)
