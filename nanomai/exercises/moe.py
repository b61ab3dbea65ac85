"""Checks of `notebooks/09_moe`."""

import math
from dataclasses import replace

import torch

from nanomai.architecture import ModelConfig, MoEConfig
from nanomai.model import build_model
from nanomai.moe import MoE, router_loss, softmax_route
from nanomai.show import exercise


@exercise
def check_count_drops(answer):
    """`answer(experts, n_experts, factor)`: dropped pairs, and tokens that lose all their experts."""
    generator = torch.Generator().manual_seed(0)
    crowd = torch.tensor([[0, 1]] * 6 + [[2, 0]] * 3)  # all want expert 0; expert 3 is idle
    cases = [(crowd, 4, 1.0), (torch.tensor([[1, 0], [0, 1], [2, 0], [0, 2]]), 3, 0.5), (crowd.flip(0), 4, 0.7)]
    for n, n_experts, k, factor in [(13, 5, 2, 1.0), (13, 5, 3, 0.6), (40, 8, 1, 1.25), (7, 4, 2, 2.0)]:
        cases.append((torch.rand(n, n_experts, generator=generator).topk(k).indices, n_experts, factor))
    for experts, n_experts, factor in cases:
        got = answer(experts.clone(), n_experts, factor)
        assert isinstance(got, tuple) and len(got) == 2, "return a pair: dropped pairs, tokens without an expert"
        capacity = math.ceil(factor * experts.numel() / n_experts)
        used, pairs, tokens = [0] * n_experts, 0, 0
        for chosen in experts.tolist():
            refused = 0
            for expert in chosen:
                refused += used[expert] >= capacity
                used[expert] += 1
            pairs, tokens = pairs + refused, tokens + (refused == len(chosen))
        case = f"{tuple(experts.shape)} choices of {n_experts} experts, factor {factor}, {capacity} slots each"
        assert got[0] == pairs, f"{case}: {pairs} pairs are dropped, not {got[0]}"
        assert got[1] == tokens, f"{case}: {tokens} tokens lose all experts, not {got[1]}"


@exercise
def check_balance_gradient(answer):
    """`answer(logits, experts)`: the gradient of E sum_e f_e P_e with respect to the logits (N, E), by hand."""
    generator = torch.Generator().manual_seed(0)
    for n, n_experts, k in [(6, 4, 2), (9, 5, 1), (5, 7, 3), (16, 3, 2)]:
        logits = torch.randn(n, n_experts, generator=generator, dtype=torch.float64)
        logits[:, 0] += 1.0  # a favourite
        config = MoEConfig(n_experts=n_experts, experts_per_token=k, d_expert=1, balance_loss=1.0)
        leaf = logits.clone().requires_grad_()
        route = softmax_route(leaf, config, None, True)
        (true,) = torch.autograd.grad(router_loss(route, config), leaf)
        with torch.no_grad():
            mine = answer(logits.clone(), route.experts)
        case = f"{n} tokens, {n_experts} experts, k = {k}"
        assert mine.shape == true.shape, f"{case}: shape {tuple(mine.shape)}, not {tuple(true.shape)}"
        # the softmax does not see a common level, so no push may change it
        level = mine.sum(-1).abs().max() / true.abs().max()
        assert level < 1e-5, f"{case}: a token's row of gradients must sum to zero; yours does not"
        off, ratio = (mine - true).norm() / true.norm(), (mine.norm() / true.norm()).item()
        assert off < 1e-5, f"{case}: off by {off:.2g} of its length ({ratio:.2f} times as long)"


@exercise
def check_total_and_active(answer):
    """`answer(config)`: parameters of the whole model, and those that one token meets."""
    experts = MoEConfig(n_experts=6, experts_per_token=2, d_expert=10)
    plain = ModelConfig(n_layers=3, d_model=24, n_heads=4, n_kv_heads=2, head_dim=10, d_ff=50, vocab_size=37,
                        moe=experts)
    for what, config in [
            ("six experts, two for a token", plain),
            ("three for a token", replace(plain, moe=replace(experts, experts_per_token=3))),
            ("two shared experts", replace(plain, moe=replace(experts, n_shared_experts=2))),
            ("a dense first layer", replace(plain, moe=replace(experts, n_dense_layers=1))),
            ("an untied head", replace(plain, tied_embeddings=False)),
            ("GELU, which has no gate", replace(plain, activation="gelu"))]:
        with torch.device("meta"):
            model = build_model(config)
        total = sum(p.numel() for p in model.parameters())
        stacks = [p for m in model.modules() if isinstance(m, MoE) for p in m.experts.parameters()]  # (E, ., .) each
        unmet = sum(p[0].numel() * (len(p) - config.moe.experts_per_token) for p in stacks)
        got = answer(config)
        assert isinstance(got, tuple) and len(got) == 2, "return a pair: total, active"
        assert got[0] == total, f"{what}: {total:,} parameters in total, not {got[0]:,}"
        assert got[1] == total - unmet, f"{what}: {total - unmet:,} are active, not {got[1]:,}"
