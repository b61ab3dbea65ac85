"""Optimizers and schedules: who gets weight decay, AdamW, Muon, and how fast they go.

Muon takes the hidden matrices and AdamW the rest (embeddings, head, norms, biases). Both change a weight by about
0.2 lr per element and step, so one learning rate serves both (arXiv 2502.16982).
"""

from __future__ import annotations

import math
from collections import defaultdict

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from nanomai.config import OptimConfig
from nanomai.parallel.collectives import gathered, swap


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """A projection inside a block, or a stack of one for each expert, and no router: what Muon orthogonalises."""
    return parameter.ndim >= 2 and ".blocks." in f".{name}" and not name.endswith("router.weight")


def is_decayed(name: str, parameter: Tensor) -> bool:
    """Weight decay is for matrices that multiply: not for embeddings, norms or biases."""
    return is_hidden_matrix(name, parameter) or name == "head.weight" or name.endswith("router.weight")


def build_optimizers(model: nn.Module, config: OptimConfig, dtype: torch.dtype | None = None) -> list[Optimizer]:
    """The optimizers of `config.name`, their state already allocated, so that a checkpoint can be read into it.

    `dtype` is that of Muon's matrix products; None keeps the gradients' own.
    """
    named = dict(model.named_parameters())
    muon = [p for n, p in named.items() if config.name == "muon" and is_hidden_matrix(n, p)]
    others = {n: p for n, p in named.items() if not any(p is q for q in muon)}
    groups = [
        {"params": [p for n, p in others.items() if is_decayed(n, p)], "weight_decay": config.weight_decay},
        {"params": [p for n, p in others.items() if not is_decayed(n, p)], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=(config.beta1, config.beta2),
                              eps=config.eps, fused=True)
    for p in others.values():
        adamw.state[p] = {"step": torch.zeros((), device=p.device),
                          "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    return [adamw] + ([Muon(muon, config.momentum, config.weight_decay, dtype=dtype)] if muon else [])


# Coefficients of quintics x -> a x + b x^3 + c x^5 that pull every singular value towards 1, one for each iteration.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
FIVE_ALIKE = (NEWTON_SCHULZ,) * 5  # Jordan et al. 2024: what lies above 0.0015 of the norm ends in [0.68, 1.21]
# Each next one the best for what the one before leaves (Polar Express, arXiv 2505.16932, for values from 0.005 on, with
# 2 % to spare for rounding): what lies above 0.01 of the norm ends in [0.49, 1.51], and what is smaller grows 96-fold.
THREE_GRADED = ((7.9923, -21.8726, 15.4142), (3.8328, -2.7326, 0.5017), (3.1273, -2.2540, 0.4521))


def orthogonalize(matrices: Tensor, quintics: tuple[tuple[float, float, float], ...] = FIVE_ALIKE) -> Tensor:
    """The nearest semi-orthogonal matrix of each, nearly: (N, m, n) -> (N, m, n), all singular values about 1.

    Newton-Schulz iterations use products only, so they run in bfloat16 where the hardware is fast at it.
    """
    x = matrices / (torch.linalg.matrix_norm(matrices, keepdim=True) + 1e-7)  # all singular values at most 1
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x  # the Gram matrix below is then the smaller one
    for a, b, c in quintics:
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # b G + c G G
        x = torch.baddbmm(x, polynomial, x, beta=a)  # a x + (b G + c G G) x
    return x.mT if tall else x


def _orthogonalize_all(directions: list[Tensor], quintics: tuple) -> list[Tensor]:
    """What this rank holds of the orthogonalised matrix of each direction (m, n), or matrices of each (E, m, n).

    Ranks that hold parts of the same matrices take some of them whole each, so none is orthogonalised twice: there and
    back, two all-to-alls for each axis of ranks along which matrices are cut, in which a rank sends what it holds.
    Rows and columns of zeros, with which uneven parts are filled up, change nothing and stay zeros.
    """
    x = torch.stack([d.to_local() if isinstance(d, DTensor) else d for d in directions])
    shape, x = x.shape, x.flatten(0, -3)  # (N, m', n')
    sharing = _sharing(directions[0])
    n_matrices, lengths = len(x), []
    x = _filled_up(x, 0, n_matrices + -n_matrices % math.prod(group.size() for group, _, _ in sharing))
    for group, dim, length in sharing:
        if dim is None:
            x = x.chunk(group.size())[group.rank()]
            continue
        lengths.append(x.shape[dim])
        x = swap(_filled_up(x, dim, length), 0, dim, group)
    x = orthogonalize(x, quintics)
    for group, dim, _ in reversed(sharing):
        x = gathered(x, 0, group) if dim is None else _filled_up(swap(x, dim, 0, group), dim, lengths.pop())
    return list(x[:n_matrices].view(shape).unbind())


def _filled_up(x: Tensor, dim: int, length: int) -> Tensor:
    """(N, m, n) with zeros after what it has of `dim`, up to `length`, or without those that were filled in before."""
    missing = length - x.shape[dim]
    return F.pad(x, (0, 0) * (2 - dim) + (0, missing)) if missing else x  # which would be copied


def _sharing(parameter: Tensor) -> list[tuple[dist.ProcessGroup, int | None, int]]:
    """Each axis of ranks that hold parts of the same matrices, or the same parts: its group; which dimension of
    (N, m, n) it cuts, None if none; and the length of the parts. What was cut last, by FSDP, comes first."""
    if not isinstance(parameter, DTensor):
        return []
    found, left = [], list(parameter.shape)
    for axis, placement in reversed(list(enumerate(parameter.placements))):
        group, dim = parameter.device_mesh.get_group(axis), None
        if not placement.is_replicate():
            left[placement.dim] = -(-left[placement.dim] // group.size())
            dim = placement.dim - parameter.ndim + 3
        if dim != 0:  # cut between the matrices of a stack, each is whole
            found.append((group, dim, 0 if dim is None else left[placement.dim]))
    return found[::-1]


class Muon(Optimizer):
    """Momentum, orthogonalised (Jordan et al. 2024; scaled as in arXiv 2502.16982).

    The update of an (m, n) matrix is 0.2 sqrt(max(m, n)) times its orthogonalised Nesterov momentum, which has the
    root mean square of an AdamW update. Matrices of one shape go through Newton-Schulz together, as do those of a
    stack (E, m, n) of experts, each by itself. A stack has more of them than its tokens pay for, so it gets three
    iterations where a matrix that every token meets gets five.
    """

    def __init__(self, parameters: list[Tensor], momentum: float = 0.95, weight_decay: float = 0.0,
                 lr: float = 0.0, dtype: torch.dtype | None = None):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype  # of the iterations; None keeps the gradients' own
        for p in parameters:
            self.state[p] = {"momentum": torch.zeros_like(p)}

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            alike = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    alike[p.shape, getattr(p, "placements", None)].append(p)  # a square one may be cut either way
            for (shape, _), parameters in alike.items():
                directions = [self._nesterov(p, group["momentum"]).to(self.dtype or p.dtype) for p in parameters]
                updates = _orthogonalize_all(directions, THREE_GRADED if len(shape) > 2 else FIVE_ALIKE)
                scale = 0.2 * math.sqrt(max(shape[-2:]))
                for p, update in zip(parameters, updates, strict=True):
                    held = p.to_local() if isinstance(p, DTensor) else p
                    held.mul_(1 - group["lr"] * group["weight_decay"])
                    held.add_(update.to(p.dtype), alpha=-group["lr"] * scale)

    def _nesterov(self, p: Tensor, momentum: float) -> Tensor:
        buffer = self.state[p]["momentum"].lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(buffer, momentum)


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """The learning rate of `step` (from 0) in a run of `steps`."""
    if isinstance(config.lr, dict):
        return _interpolate(config.lr, step)
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    low = config.min_lr_ratio
    if config.schedule == "cosine":
        done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
        return config.lr * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))
    if config.schedule == "wsd" and config.decay_fraction > 0:
        left = (steps - step) / (steps * config.decay_fraction)
        return config.lr * (low + (1 - low) * max(0.0, min(1.0, left)))
    return config.lr


def _interpolate(knots: dict[int, float], step: int) -> float:
    before = max(s for s in knots if s <= step)
    after = min((s for s in knots if s > step), default=None)
    if after is None:
        return knots[before]
    share = (step - before) / (after - before)
    return knots[before] * (1 - share) + knots[after] * share


def piecewise(setting: int | dict[int, int], step: int) -> int:
    """The value in force at `step` of a setting that may be {step: value}, each from its step on."""
    return setting[max(s for s in setting if s <= step)] if isinstance(setting, dict) else setting


def set_learning_rate(optimizers: list[Optimizer], lr: float) -> None:
    """One learning rate for every group."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr


def named_state(optimizers: list[Optimizer], model: nn.Module) -> dict[str, Tensor]:
    """Every tensor that the optimizers keep, under its parameter's name: `blocks.0.mlp.w_up.weight/exp_avg`."""
    names = {p: n for n, p in model.named_parameters()}
    return {f"{names[p]}/{key}": value for optimizer in optimizers
            for p, state in optimizer.state.items() for key, value in state.items()}
