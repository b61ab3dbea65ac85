"""Mixture of experts: a router that sends each token to a few MLPs, and the experts themselves.

No token is dropped: the (token, expert) pairs are sorted by expert, each expert's rows go through one group of a
grouped matrix product, and the results go back to their tokens, weighted. Letters: N tokens, E experts, k for a token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanomai import ops
from nanomai.architecture import ModelConfig, MoEConfig
from nanomai.grouped import grouped_linear, grouped_swiglu, sort_pairs, to_experts, to_tokens
from nanomai.layers import MLP, Part


class Route(NamedTuple):
    """Where tokens go."""

    weights: Tensor  # (N, k) float32
    experts: Tensor  # (N, k) int64
    scores: Tensor  # (N, E) float32: what balance is measured by; they sum to 1
    logits: Tensor  # (N, E) float32


# --- Routers: logits (N, E) -> Route ----------------------------------------------------------------------------------


def softmax_route(logits: Tensor, config: MoEConfig, bias: Tensor | None, training: bool) -> Route:
    """The k likeliest experts, their probabilities made to sum to one (Mixtral, arXiv 2401.04088)."""
    scores = logits.softmax(-1)
    weights, experts = scores.topk(config.experts_per_token, dim=-1)
    return Route(weights / weights.sum(-1, keepdim=True), experts, scores, logits)


def softmax_of_all_route(logits: Tensor, config: MoEConfig, bias: Tensor | None, training: bool) -> Route:
    """The k likeliest experts, with the probabilities that they have among all (DeepSeek-V2, arXiv 2405.04434)."""
    scores = logits.softmax(-1)
    weights, experts = scores.topk(config.experts_per_token, dim=-1)
    return Route(weights * config.weight_scale, experts, scores, logits)


def sigmoid_route(logits: Tensor, config: MoEConfig, bias: Tensor | None, training: bool) -> Route:
    """DeepSeek-V3 (arXiv 2412.19437): a bias takes part in the choice and not in the weights.

    A token first takes the groups of experts whose two best scores sum highest, then the best experts in them.
    """
    affinity = logits.sigmoid()
    choice = affinity if bias is None else affinity + bias  # (N, E)
    if config.n_groups > 1:
        groups = choice.unflatten(-1, (config.n_groups, -1))  # (N, groups, E / groups)
        best = groups.topk(min(2, groups.shape[-1]), dim=-1).values.sum(-1)
        taken = torch.zeros_like(best, dtype=torch.bool).scatter(
            -1, best.topk(config.groups_per_token, dim=-1).indices, True)
        choice = groups.masked_fill(~taken[..., None], -torch.inf).flatten(-2)
    experts = choice.topk(config.experts_per_token, dim=-1).indices
    weights = affinity.gather(-1, experts)
    weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * config.weight_scale
    return Route(weights, experts, affinity / (affinity.sum(-1, keepdim=True) + 1e-20), logits)


def sparsemixer_route(logits: Tensor, config: MoEConfig, bias: Tensor | None, training: bool) -> Route:
    """SparseMixer-v2 of GRIN and Phi-3.5-MoE (arXiv 2409.12136): two experts, chosen one after the other.

    Each has the weight that a softmax over its near competitors gives it; the two do not sum to one. In training the
    expert is drawn, and the gradient is estimated as if the draw could have fallen otherwise.
    """
    chosen, weights, rest = [], [], logits
    for _ in range(2):
        best = rest.detach().amax(-1, keepdim=True)
        far = (best - logits.detach()) / logits.detach().abs().maximum(best) > 2 * config.jitter
        near = rest.masked_fill(far, -torch.inf)
        weight, expert = (_draw if training else _take)(rest, near)
        chosen.append(expert)
        weights.append(weight)
        rest = logits.scatter(-1, torch.cat(chosen, -1), -torch.inf)
    return Route(torch.cat(weights, -1), torch.cat(chosen, -1), logits.softmax(-1), logits)


def _take(rest: Tensor, near: Tensor) -> tuple[Tensor, Tensor]:
    """The likeliest expert, and its weight among its rivals: two of (N, E) -> two of (N, 1)"""
    expert = rest.argmax(-1, keepdim=True)
    return near.softmax(-1).gather(-1, expert), expert


def _draw(rest: Tensor, near: Tensor) -> tuple[Tensor, Tensor]:
    """An expert drawn from softmax(near), and its weight with the estimator's gradient."""
    expert = (near - torch.empty_like(near).exponential_().log()).argmax(-1, keepdim=True)  # the Gumbel trick
    p = near.softmax(-1)
    likeliest = expert == p.argmax(-1, keepdim=True)
    # Heun's third-order rule: an unlikely draw is evaluated at a third of its weight three times out of four
    whole = likeliest | (torch.rand_like(p[:, :1]) > 0.75)
    return _HeunWeight.apply(rest, p.gather(-1, expert), expert, p, torch.where(whole, 1.0, 1 / 3)), expert


class _HeunWeight(torch.autograd.Function):
    """weight share, with the gradient of softmax at the drawn expert: logits, p (N, E); all others (N, 1) -> (N, 1)"""

    @staticmethod
    def forward(ctx, logits, weight, expert, p, share):
        ctx.save_for_backward(weight, expert, p)
        return weight * share

    @staticmethod
    def backward(ctx, d_weight):
        weight, expert, p = ctx.saved_tensors
        d = d_weight * weight  # of softmax at the drawn expert: weight (onehot - p)
        return (-p * d).scatter_add(-1, expert, d), None, None, None, None


ROUTERS = {"softmax": softmax_route, "softmax_of_all": softmax_of_all_route, "sigmoid": sigmoid_route,
           "sparsemixer": sparsemixer_route}


# --- Experts ----------------------------------------------------------------------------------------------------------


class Experts(Part):
    """E MLPs as three (or two) stacked matrices."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        e, d, f = config.moe.n_experts, config.d_model, config.moe.d_expert
        self.activation = config.activation
        self.w_gate = nn.Parameter(torch.empty(e, f, d)) if config.gated else None
        self.w_up = nn.Parameter(torch.empty(e, f, d))
        self.w_down = nn.Parameter(torch.empty(e, d, f))

    def forward(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """x (N, D), weights and experts (N, k) -> (N, D)"""
        matrices = [None if w is None else w.to(x.dtype) for w in (self.w_gate, self.w_up, self.w_down)]
        return dispatch(x, weights, experts, *matrices, self.activation, self.impl("grouped_gemm"))


def dispatch(x: Tensor, weights: Tensor, experts: Tensor, w_gate: Tensor | None, w_up: Tensor, w_down: Tensor,
             activation: str, impl: str = "auto") -> Tensor:
    """The weighted sum over each token's experts, by sorting: (N, D), two of (N, k), (E, F, D), ... -> (N, D)"""
    pairs = sort_pairs(experts, len(w_up))
    if activation == "swiglu":
        h = grouped_swiglu(x, w_gate, w_up, pairs, impl)  # (N k, F)
    else:
        rows = to_experts(x, pairs)
        gate = None if w_gate is None else grouped_linear(rows, w_gate, pairs.ends, impl)
        h = ops.activate(activation, grouped_linear(rows, w_up, pairs.ends, impl), gate)
    y = to_tokens(grouped_linear(h, w_down, pairs.ends, impl), pairs)  # (N, k, D)
    return (y * weights[..., None].to(x.dtype)).sum(1)


def dispatch_plain(x: Tensor, weights: Tensor, experts: Tensor, w_gate: Tensor | None, w_up: Tensor, w_down: Tensor,
                   activation: str) -> Tensor:
    """The definition of `dispatch`: each expert takes its tokens, one expert after another."""
    y = torch.zeros_like(x)
    for e in range(len(w_up)):
        token, slot = torch.where(experts == e)
        gate = None if w_gate is None else x[token] @ w_gate[e].T
        h = ops.activate(activation, x[token] @ w_up[e].T, gate)
        y = y.index_add(0, token, (h @ w_down[e].T) * weights[token, slot, None].to(x.dtype))
    return y


# --- The layer --------------------------------------------------------------------------------------------------------


class MoE(nn.Module):
    """Stands where a dense MLP would: routed experts, and shared ones that every token meets."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = moe = config.moe
        self.router = nn.Linear(config.d_model, moe.n_experts, bias=False)
        self.experts = Experts(config)
        self.shared = MLP(config, moe.n_shared_experts * moe.d_expert) if moe.n_shared_experts else None
        biased = moe.router == "sigmoid"
        self.register_buffer("selection_bias", torch.zeros(moe.n_experts) if biased else None)
        self.register_buffer("load", torch.zeros(moe.n_experts), persistent=False)  # choices since the last balancing

    def route(self, x: Tensor) -> Route:
        """x (N, D); in float32 at least, because a rounded logit sends a token elsewhere."""
        wide = torch.promote_types(x.dtype, torch.float32)
        logits = F.linear(x.to(wide), self.router.weight.to(wide))
        return ROUTERS[self.config.router](logits, self.config, self.selection_bias, self.training)

    def forward(self, x: Tensor, aux_scale: Tensor | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D). `aux_scale` multiplies the gradient of the router's losses; None leaves them out."""
        flat = x.flatten(0, 1)
        route = self.route(flat)
        y = self.experts(flat, route.weights, route.experts)
        if self.shared is not None:
            y = y + self.shared(flat)
        if aux_scale is not None:
            self._count(route)
            y = _WithLoss.apply(y, router_loss(route, self.config) * aux_scale)
        return y.view_as(x)

    @torch.no_grad()
    def _count(self, route: Route) -> None:
        self.load.add_(F.one_hot(route.experts, self.config.n_experts).sum((0, 1)))


def router_loss(route: Route, config: MoEConfig) -> Tensor:
    """balance_loss E sum_e f_e p_e + z_loss mean(lse^2): f_e the share of choices, p_e the mean score of expert e."""
    choices = F.one_hot(route.experts, config.n_experts).to(route.scores.dtype).mean((0, 1))  # (E,), sums to 1
    balance = config.n_experts * (choices * route.scores.mean(0)).sum()
    return config.balance_loss * balance + config.z_loss * route.logits.logsumexp(-1).square().mean()


class _WithLoss(torch.autograd.Function):
    """x, unchanged, with a loss at its side: whoever takes the gradient of x takes that of the loss as well.

    So a block returns one tensor, and the loss that is logged stays the cross-entropy.
    """

    @staticmethod
    def forward(ctx, x, loss):
        ctx.like = loss.dtype, loss.device
        return x.view_as(x)

    @staticmethod
    def backward(ctx, d_x):
        dtype, device = ctx.like
        return d_x, torch.ones((), dtype=dtype, device=device)


@torch.no_grad()
def sum_loads(model: nn.Module, sum_over_ranks=lambda x: x) -> Tensor | None:
    """Makes each layer's counts of choices those of all ranks; returns how far the worst layer is from balance.

    That is its busiest expert's count over the mean: 1 is even, E / k is as bad as can be. None without experts.
    """
    found = {name: block.mlp.load for name, block in model.blocks.items() if isinstance(block.mlp, MoE)}
    config = model.config
    layers = [i for i in range(config.n_layers) if config.has_experts(i)]
    if not layers:
        return None
    elsewhere = torch.zeros(config.moe.n_experts, device=next(model.parameters()).device)  # of layers another rank has
    loads = [found.get(str(i), elsewhere) for i in layers]
    together = sum_over_ranks(torch.stack(loads))  # (layers, E): one message
    torch._foreach_copy_(loads, together.unbind())
    return (together.amax(-1) / together.mean(-1)).max()


@torch.no_grad()
def balance_experts(model: nn.Module, move: bool = True) -> None:
    """Moves each selection bias by `bias_speed`: up for experts that were chosen too rarely, down for busy ones.

    Called after each optimizer step (arXiv 2408.15664); no gradient has to fight over balance then. After a step that
    was refused nothing moves, and its choices are forgotten with it.
    """
    for layer in model.modules():
        if isinstance(layer, MoE):
            load = layer.load
            if move and layer.config.bias_speed:
                layer.selection_bias += layer.config.bias_speed * (load.mean() - load).sign()
            load.zero_()
