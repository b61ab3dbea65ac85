"""The layers that stand in more than one kind of block: projections, norms, the MLP."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanomai import float8, ops
from nanomai.architecture import ModelConfig


class Part(nn.Module):
    """A module that calls ops for which there is more than one implementation."""

    kernels: frozenset[str] | None = None  # those of kernels.KERNELS to use; None leaves it to each op

    def impl(self, op: str) -> str:
        """What to tell an op: auto, torch or triton."""
        return "auto" if self.kernels is None else "triton" if op in self.kernels else "torch"


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Routers choose without drawing and balance nothing, as in use; afterwards the model is in the mode it was in."""
    if not model.training:  # walking over all modules takes a while
        yield
        return
    model.eval()
    try:
        yield
    finally:
        model.train()


class Linear(nn.Linear):
    """A projection that computes in the dtype of its input, or in float8."""

    float8 = False

    def forward(self, x: Tensor) -> Tensor:
        if self.float8:
            return float8.linear(x, self.weight, self.bias)
        bias = self.bias if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class Embedding(nn.Embedding):
    """`ops.embedding` with its weight."""

    def forward(self, ids: Tensor) -> Tensor:
        return ops.embedding(ids, self.weight)


class RMSNorm(Part):
    """`ops.rms_norm` with its weight; with a residual, (x + residual, the norm of that)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """x (..., D), and residual like it -> (..., D), or two of them."""
        if residual is None:
            return ops.rms_norm(x, self.weight, self.eps, self.impl("rms_norm"))
        return ops.add_rms_norm(x, residual, self.weight, self.eps, self.impl("rms_norm"))


class LayerNorm(RMSNorm):
    """`ops.layer_norm` with its weight and bias; with a residual as RMSNorm."""

    def __init__(self, dim: int, eps: float):
        super().__init__(dim, eps)
        self.bias = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        x = x if residual is None else x + residual
        y = ops.layer_norm(x, self.weight, self.bias, self.eps)
        return y if residual is None else (x, y)


NORMS = {"rmsnorm": RMSNorm, "layernorm": LayerNorm}


class MLP(Part):
    """Up, a non-linearity, down; with a gate beside the up where the activation has one."""

    def __init__(self, config: ModelConfig, d_ff: int, bias: bool = False):
        super().__init__()
        self.activation = config.activation
        self.w_gate = Linear(config.d_model, d_ff, bias=bias) if config.gated else None
        self.w_up = Linear(config.d_model, d_ff, bias=bias)
        self.w_down = Linear(d_ff, config.d_model, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate = None if self.w_gate is None else self.w_gate(x)  # (B, T, F)
        return self.w_down(ops.activate(self.activation, self.w_up(x), gate, self.impl("swiglu")))
