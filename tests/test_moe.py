"""Mixture of experts: dispatch against its definition, routers against slow ones, what balances and what must not move.

The last sections train: on two ranks, and interrupted and resumed.
"""

import dataclasses
import math
import re
import signal
import statistics
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from random_model import random_model
from tiny_run import curve, write_tiny
from tiny_run import tiny as tiny_run

from nanomai.architecture import ConfigError, ModelConfig, MoEConfig
from nanomai.config import OptimConfig
from nanomai.layers import MLP
from nanomai.model import ROWS, Transformer, build_model
from nanomai.moe import (
    ROUTERS,
    MoE,
    Route,
    balance_experts,
    dispatch,
    dispatch_plain,
    router_loss,
    sigmoid_route,
    sparsemixer_route,
    sum_loads,
)
from nanomai.optim import Muon, build_optimizers
from nanomai.parallel.launch import launch, process_group
from nanomai.runs import load_run
from nanomai.trainer import Trainer, train

TINY = ModelConfig(n_layers=2, d_model=24, n_heads=4, n_kv_heads=2, head_dim=6, d_ff=40, vocab_size=97,
                   context_length=16, moe=MoEConfig(n_experts=5, experts_per_token=2, d_expert=12))
SOFTMAX = MoEConfig(n_experts=6, experts_per_token=3, d_expert=8)
SOFTMAX_OF_ALL = dataclasses.replace(SOFTMAX, router="softmax_of_all", weight_scale=2.5)
SIGMOID = dataclasses.replace(SOFTMAX, router="sigmoid", weight_scale=2.5)
SPARSEMIXER = dataclasses.replace(SOFTMAX, router="sparsemixer", experts_per_token=2, jitter=0.2)


def randn(*shape, seed=0, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def tiny(activation="swiglu", **moe) -> ModelConfig:
    return dataclasses.replace(TINY, activation=activation, moe=dataclasses.replace(TINY.moe, **moe))


def ids(b=3, t=11) -> torch.Tensor:
    return torch.randint(97, (b, t), generator=torch.Generator().manual_seed(b * t))


def shaken(config: ModelConfig) -> Transformer:
    """A model that does something, in float64, in training."""
    return random_model(config).train()


def layer(config: ModelConfig, seed=0) -> MoE:
    """One layer of experts with weights of size 1, in float64."""
    moe = MoE(config).double()
    with torch.no_grad():
        for i, p in enumerate(moe.parameters()):
            p.copy_(randn(*p.shape, seed=seed + i) / p.shape[-1] ** 0.5)
    return moe


# --- dispatch

CHOICES = {
    "odd sizes": (7, 5, 2), "one token": (1, 5, 2), "k = 1": (9, 4, 1), "k = E": (6, 3, 3), "one expert": (8, 1, 1),
    "more experts than pairs": (2, 11, 3), "no tokens": (0, 3, 2)}


def experts_of(n: int, e: int, k: int, among: int | None = None) -> torch.Tensor:
    """(N, k) different experts for each token, from the first `among`."""
    return torch.rand(n, among or e, generator=torch.Generator().manual_seed(n + e)).argsort(-1)[:, :k]


def compare(experts: torch.Tensor, e: int, activation: str) -> None:
    n, k = experts.shape
    gated = activation in ("swiglu", "gegelu")
    x, weights = randn(n, 6), randn(n, k, seed=1)
    matrices = [randn(e, 5, 6, seed=2) if gated else None, randn(e, 5, 6, seed=3), randn(e, 6, 5, seed=4)]
    wanting = [t.requires_grad_() for t in (x, weights, *matrices) if t is not None]
    y, z = (f(x, weights, experts, *matrices, activation) for f in (dispatch, dispatch_plain))
    torch.testing.assert_close(y, z)
    dy = randn(n, 6, seed=5)
    got, wanted = (torch.autograd.grad(out, wanting, dy, materialize_grads=True) for out in (y, z))
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("activation", ["swiglu", "gegelu", "gelu", "relu2"])
@pytest.mark.parametrize("case", CHOICES)
def test_dispatch_is_its_definition(case, activation):
    n, e, k = CHOICES[case]
    compare(experts_of(n, e, k), e, activation)


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_idle_experts(activation):
    compare(experts_of(7, 5, 2, among=3), 5, activation)
    compare(torch.full((7, 1), 2), 4, activation)  # all tokens to one


def test_the_definition_is_a_sum_over_each_tokens_experts():
    x, weights, experts = randn(4, 6), randn(4, 2, seed=1), experts_of(4, 3, 2)
    gate, up, down = randn(3, 5, 6, seed=2), randn(3, 5, 6, seed=3), randn(3, 6, 5, seed=4)
    y = dispatch_plain(x, weights, experts, gate, up, down, "swiglu")
    for t in range(4):
        outputs = [w * (down[e] @ (F.silu(gate[e] @ x[t]) * (up[e] @ x[t])))
                   for w, e in zip(weights[t], experts[t], strict=True)]
        torch.testing.assert_close(y[t], sum(outputs))


def test_dispatch_in_bfloat16():
    n, e, k = 64, 5, 2
    x, weights = randn(n, 32), randn(n, k, seed=1).softmax(-1)
    matrices = [randn(e, *shape, seed=i) / 6 for i, shape in enumerate([(48, 32), (48, 32), (32, 48)])]
    rounded = [t.bfloat16() for t in (x, *matrices)]
    y = dispatch(rounded[0], weights, experts_of(n, e, k), *rounded[1:], "swiglu")
    exact = dispatch_plain(rounded[0].double(), weights, experts_of(n, e, k), *(m.double() for m in rounded[1:]),
                           "swiglu")
    assert y.dtype == torch.bfloat16 and (y - exact).norm() < 0.01 * exact.norm()


def test_no_token_is_dropped_and_no_batch_changes_a_token():
    """A token's output depends on nobody else in the batch."""
    moe, x = layer(TINY).eval(), randn(1, 9, 24)
    together = moe(x)
    for i in range(9):
        torch.testing.assert_close(moe(x[:, i : i + 1]), together[:, i : i + 1])


@pytest.mark.parametrize("k", [1, 3, 5])
def test_the_layer_is_a_sum_over_all_experts_that_are_not_masked(k):
    """Sparse equals dense-masked: every expert computes everything, and most weights are 0."""
    moe, x = layer(tiny(experts_per_token=k, n_shared_experts=2)), randn(2, 7, 24)
    y, route = moe(x), moe.route(x.flatten(0, 1))
    every = torch.stack([F.linear(F.silu(F.linear(x, g)) * F.linear(x, u), d) for g, u, d in zip(
        moe.experts.w_gate, moe.experts.w_up, moe.experts.w_down, strict=True)], dim=-1)  # (B, T, D, E)
    weights = torch.zeros(14, 5, dtype=torch.float64).scatter(1, route.experts, route.weights).view(2, 7, 1, 5)
    torch.testing.assert_close(y, (every * weights).sum(-1) + moe.shared(x))


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_one_expert_is_the_dense_mlp(activation):
    config = tiny(activation, n_experts=1, experts_per_token=1)
    moe, mlp = layer(config), MLP(config, 12).double()
    with torch.no_grad():
        for name in ("w_gate", "w_up", "w_down"):
            if getattr(mlp, name) is not None:
                getattr(mlp, name).weight.copy_(getattr(moe.experts, name)[0])
    x = randn(2, 7, 24).requires_grad_()
    y, z = moe(x), mlp(x)
    torch.testing.assert_close(y, z)
    torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), x) for out in (y, z)))


def test_shared_experts_are_one_mlp():
    moe, x = layer(tiny(n_shared_experts=3)), randn(1, 5, 24)
    assert moe.shared.w_up.weight.shape == (36, 24)
    without = layer(TINY)
    without.load_state_dict({n: t for n, t in moe.state_dict().items() if not n.startswith("shared")})
    torch.testing.assert_close(moe(x), without(x) + moe.shared(x))


def test_float64_gradients_against_differences():
    """Of the whole model with the routers' losses, every parameter, along one random direction.

    The choice of experts is a step function: its steps are further away than the differences reach.
    """
    model = shaken(tiny(n_shared_experts=1, n_dense_layers=1)).train()
    x, named = ids(1, 5), dict(model.named_parameters())
    gradients = torch.autograd.grad(model(x, x), [*named.values()])
    assert {"blocks.0.mlp.w_up.weight", "blocks.1.mlp.experts.w_up", "blocks.1.mlp.router.weight"} < named.keys()
    for i, ((name, p), gradient) in enumerate(zip(named.items(), gradients, strict=True)):
        direction = randn(*p.shape, seed=100 + i)
        with torch.no_grad():
            high, low = (torch.func.functional_call(model, {name: p + e * direction}, (x, x)) for e in (1e-6, -1e-6))
        expected = ((high - low) / 2e-6).item()
        assert (gradient * direction).sum().item() == pytest.approx(expected, rel=1e-5, abs=1e-7), name


# --- routers: each token by itself, in plain Python


def check(route: Route, slow, logits: torch.Tensor) -> None:
    for t, row in enumerate(logits.tolist()):
        expected = slow(row)
        assert dict(zip(route.experts[t].tolist(), route.weights[t].tolist(), strict=True)) == pytest.approx(expected)
    torch.testing.assert_close(route.scores.sum(-1), torch.ones(len(logits), dtype=logits.dtype))
    assert torch.equal(route.logits, logits)


def softmax(row: list[float]) -> list[float]:
    total = sum(map(math.exp, row))
    return [math.exp(x) / total for x in row]


@pytest.mark.parametrize("of_all", [False, True])
@pytest.mark.parametrize("k", [1, 3, 6])
def test_softmax_router(k, of_all):
    config, logits = dataclasses.replace(SOFTMAX_OF_ALL if of_all else SOFTMAX, experts_per_token=k), randn(40, 6)

    def slow(row):
        p = softmax(row)
        best = sorted(range(6), key=lambda i: -p[i])[:k]
        return {i: 2.5 * p[i] if of_all else p[i] / sum(p[j] for j in best) for i in best}

    route = ROUTERS[config.router](logits, config, None, True)
    check(route, slow, logits)
    torch.testing.assert_close(route.scores, logits.softmax(-1))


@pytest.mark.parametrize("n_groups, groups", [(1, 1), (2, 1), (3, 2), (3, 3), (6, 4)])
@pytest.mark.parametrize("biased", [False, True])
def test_sigmoid_router(n_groups, groups, biased):
    k = 3 if n_groups < 6 else 2
    config = dataclasses.replace(SIGMOID, n_groups=n_groups, groups_per_token=groups, experts_per_token=k)
    if groups * (6 // n_groups) < k:
        config = dataclasses.replace(config, experts_per_token=groups * (6 // n_groups))
    logits, bias = randn(60, 6), randn(6, seed=3) if biased else None
    size, k = 6 // n_groups, config.experts_per_token

    def slow(row):
        affinity = [1 / (1 + math.exp(-x)) for x in row]
        choice = [a + (bias[i].item() if biased else 0) for i, a in enumerate(affinity)]
        in_group = [sorted(choice[g * size : (g + 1) * size], reverse=True)[:2] for g in range(n_groups)]
        taken = sorted(range(n_groups), key=lambda g: -sum(in_group[g]))[:groups]
        allowed = [i for i in range(6) if i // size in taken]
        best = sorted(allowed, key=lambda i: -choice[i])[:k]
        return {i: 2.5 * affinity[i] / sum(affinity[j] for j in best) for i in best}

    check(sigmoid_route(logits, config, bias, True), slow, logits)


def test_hopeless_logits_are_numbers():
    """Where every sigmoid rounds to 0, weights and scores are 0 and not 0 / 0."""
    route = sigmoid_route(torch.full((2, 6), -200.0), SIGMOID, None, True)
    assert not route.weights.any() and not route.scores.any()


def test_the_bias_is_in_the_choice_alone():
    logits, bias = randn(50, 6), torch.zeros(6, dtype=torch.float64)
    bias[4] = 10.0  # expert 4 is taken by all
    with_bias, without = (sigmoid_route(logits, SIGMOID, b, True) for b in (bias, None))
    assert (with_bias.experts == 4).any(-1).all() and not (without.experts == 4).any(-1).all()
    affinity = logits.sigmoid().gather(1, with_bias.experts)
    torch.testing.assert_close(with_bias.weights, 2.5 * affinity / affinity.sum(-1, keepdim=True))
    assert torch.equal(with_bias.scores, without.scores)


def near(row: list[float], gone: int | None) -> dict[int, float]:
    """Softmax over the experts that compete with the best one."""
    there = [i for i in range(6) if i != gone]
    best = max(row[i] for i in there)
    rivals = [i for i in there if (best - row[i]) / max(abs(row[i]), best) <= 2 * SPARSEMIXER.jitter]
    return dict(zip(rivals, softmax([row[i] for i in rivals]), strict=True))


def test_sparsemixer_in_use():
    logits = randn(200, 6)

    def slow(row):
        first = max(range(6), key=lambda i: row[i])
        second = max((i for i in range(6) if i != first), key=lambda i: row[i])
        return {first: near(row, None)[first], second: near(row, first)[second]}

    route = sparsemixer_route(logits, SPARSEMIXER, None, False)
    check(route, slow, logits)
    assert not torch.isclose(route.weights.sum(-1), torch.ones(200, dtype=torch.float64)).all()
    assert torch.equal(route.experts[:, 0], logits.argmax(-1)), "the best one first"


ROW = [1.0, 0.9, 0.8, -3.0, 0.7, 0.3]  # experts 3 and 5 are too far from the best to compete
DRAWS = 200_000


def drawn(seed=0) -> tuple[Route, torch.Tensor]:
    torch.manual_seed(seed)
    logits = torch.tensor([ROW], dtype=torch.float64).expand(DRAWS, -1).clone().requires_grad_()
    return sparsemixer_route(logits, SPARSEMIXER, None, True), logits


def test_sparsemixer_draws_from_its_softmax():
    """Both experts: the first from its rivals, the second from the rivals of the best that is left."""
    route, _ = drawn()
    first, second = route.experts.T
    p = near(ROW, None)
    assert set(p) == {0, 1, 2, 4}
    for i in range(6):
        share, expected = (first == i).double().mean().item(), p.get(i, 0.0)
        assert share == pytest.approx(expected, abs=5 * math.sqrt(expected / DRAWS)), i
        q, after = near(ROW, i), second[first == i]
        for j in range(6) if i in p else ():
            expected = q.get(j, 0.0)
            assert (after == j).double().mean().item() == pytest.approx(
                expected, abs=5 * math.sqrt(expected / len(after))), (i, j)


def test_sparsemixer_weighs_an_unlikely_draw_by_a_third_three_times_out_of_four():
    route, _ = drawn()
    p, first, weight = near(ROW, None), route.experts[:, 0], route.weights[:, 0]
    assert torch.allclose(weight[first == 0], torch.tensor(p[0], dtype=torch.float64))
    for i in (1, 2, 4):
        shares = weight[first == i] / p[i]
        whole = torch.isclose(shares, torch.ones(()).double())
        assert torch.isclose(shares[~whole], torch.tensor(1 / 3).double(), rtol=1e-6).all()
        assert whole.double().mean().item() == pytest.approx(0.25, abs=5 * 0.5 / math.sqrt(len(shares)))


def test_sparsemixers_gradient_of_a_draw():
    """Upstream times p_drawn (1_drawn - p), whichever share of the weight was used; experts out of reach get none."""
    route, logits = drawn()
    upstream = randn(DRAWS, 1, seed=3)
    (got,) = torch.autograd.grad(route.weights[:, :1], logits, upstream)
    p = torch.tensor([near(ROW, None).get(i, 0.0) for i in range(6)], dtype=torch.float64)
    one_hot = F.one_hot(route.experts[:, 0], 6).double()
    torch.testing.assert_close(got, upstream * (p * one_hot).sum(-1, keepdim=True) * (one_hot - p))


def test_sparsemixers_second_gradient_leaves_the_first_expert_out():
    route, logits = drawn()
    (got,) = torch.autograd.grad(route.weights[:, 1].sum(), logits)
    assert not got.gather(1, route.experts[:, :1]).any()
    assert got.gather(1, route.experts[:, 1:]).any()


def test_sparsemixer_estimates_the_gradient_of_the_choice():
    """In the mean over draws: d/dlogits of sum_i p_i L_i(p_i), the L_i held, exactly so for a cubic L of unlikely ones.

    Heun's rule evaluates L' at p (once in four) and at p / 3; times p that is L(p) - L(0) for every cubic L. The
    likeliest expert is evaluated at p alone: Euler's rule, which is exact where L is linear.
    """
    a = torch.tensor([0.0, 2.0, -1.0, 0.0, 3.0, 0.0], dtype=torch.float64)  # L_i(w) = a w^3 + b w^2 + c w
    b = torch.tensor([0.0, 1.0, 4.0, 0.0, -2.0, 0.0], dtype=torch.float64)
    c = torch.tensor([1.0, -1.0, 0.5, 0.0, 2.0, 0.0], dtype=torch.float64)
    route, logits = drawn(seed=1)
    first, w = route.experts[:, 0], route.weights[:, 0]
    loss = (a[first] * w**3 + b[first] * w**2 + c[first] * w).sum()
    (each,) = torch.autograd.grad(loss, logits)
    row = torch.tensor(ROW, dtype=torch.float64).requires_grad_()
    reach = torch.tensor([i in near(ROW, None) for i in range(6)])
    p = row.masked_fill(~reach, -torch.inf).softmax(-1)
    held = (a * p**3 + b * p**2 + c * p).detach()
    (wanted,) = torch.autograd.grad((p * held).sum(), row)
    error = each.std(0) / math.sqrt(DRAWS)
    assert ((each.mean(0) - wanted).abs() <= 5 * error + 1e-12).all(), (each.mean(0), wanted, error)
    assert (wanted.abs() > 20 * error)[[0, 1, 2, 4]].all(), "a wrong share would show"


@pytest.mark.parametrize("name", ROUTERS)
def test_in_use_a_router_draws_nothing(name):
    config = tiny(router=name, **({"jitter": 0.3} if name == "sparsemixer" else {}))
    model, x = shaken(config).eval(), ids()
    before = torch.get_rng_state()
    assert torch.equal(model(x), model(x))
    assert torch.equal(before, torch.get_rng_state())


def test_routers_compute_in_float32():
    """A rounded logit sends a token elsewhere."""
    moe = layer(TINY).float()
    x = randn(50, 24, dtype=torch.bfloat16)
    logits = moe.route(x).logits
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, x.float() @ moe.router.weight.T)
    assert layer(TINY).route(x.double()).logits.dtype == torch.float64
    assert moe.route(x.double()).logits.dtype == torch.float64, "over float32 weights too"


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("training", [True, False])
def test_a_compiled_block_is_the_eager_one(name, training):
    """In one graph, with the routers' losses and the count of choices."""
    config = tiny(router=name, balance_loss=0.1, z_loss=0.1, n_shared_experts=1,
                  **({"jitter": 1e-9} if name == "sparsemixer" else {}))  # nobody competes: the draw is certain
    model = shaken(config).train(training)
    block, rotary = model.blocks["1"], model._enter(ids(), None, None)[1]
    x, scale = randn(3, 11, 24).requires_grad_(), torch.tensor(33.0) if training else None
    wanting = [x, *block.parameters()]
    outcomes = []
    for run in ("eager", "compiled"):
        if run == "compiled":
            block.compile(fullgraph=True, dynamic=False, backend="aot_eager")
        block.mlp.load.zero_()
        y = block(x, rotary, None, None, scale)
        outcomes.append((y, torch.autograd.grad(y.square().sum(), wanting, materialize_grads=True),
                         block.mlp.load.clone()))
    torch.testing.assert_close(outcomes[1], outcomes[0])
    assert outcomes[0][2].sum() == (66 if training else 0)


@pytest.mark.parametrize("name", ROUTERS)
def test_the_host_never_waits_for_a_router(name):
    """On the meta device nothing has a value: forward, losses and backward ask for none."""
    own = {"sparsemixer": {"jitter": 0.1}, "sigmoid": {"n_experts": 6, "n_groups": 3, "groups_per_token": 2}}
    config = tiny(router=name, balance_loss=0.1, z_loss=0.1, n_shared_experts=1, **own.get(name, {}))
    with torch.device("meta"):
        moe, x = MoE(config), torch.empty(2, 8, 24, dtype=torch.bfloat16, requires_grad=True)
        moe(x, torch.ones(())).sum().backward()
    assert x.grad.is_meta and moe.experts.w_up.grad.is_meta and moe.router.weight.grad.is_meta


# --- losses of the router


def route_to(experts: list[list[int]], scores: torch.Tensor, logits: torch.Tensor | None = None) -> Route:
    experts = torch.tensor(experts)
    return Route(torch.ones(experts.shape), experts, scores, scores.log() if logits is None else logits)


BALANCE, Z = (dataclasses.replace(SOFTMAX, n_experts=4, experts_per_token=1, **loss)
              for loss in ({"balance_loss": 1.0}, {"z_loss": 1.0}))


def test_balance_loss_is_1_of_all_alike_and_e_of_one_alone():
    uniform = torch.full((8, 4), 0.25)
    assert router_loss(route_to([[i % 4] for i in range(8)], uniform), BALANCE).item() == pytest.approx(1.0)
    one = torch.eye(4)[[2] * 8]
    assert router_loss(route_to([[2]] * 8, one, torch.zeros(8, 4)), BALANCE).item() == pytest.approx(4.0)
    k2 = dataclasses.replace(BALANCE, experts_per_token=2)
    assert router_loss(route_to([[0, 1], [2, 3]], uniform[:2]), k2).item() == pytest.approx(1.0)


def test_balance_loss_by_hand():
    scores = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.4, 0.3, 0.2, 0.1]])
    route = route_to([[0], [1]], scores)  # f = 1/2, 1/2, 0, 0; p = 0.55, 0.2, 0.15, 0.1
    config = dataclasses.replace(BALANCE, balance_loss=0.5)
    assert router_loss(route, config).item() == pytest.approx(0.5 * 4 * (0.5 * 0.55 + 0.5 * 0.2))


def test_z_loss_by_hand():
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [math.log(2)] * 4])
    route = route_to([[0], [1]], logits.softmax(-1), logits)
    config = dataclasses.replace(Z, z_loss=0.1)
    assert router_loss(route, config).item() == pytest.approx(0.1 * (math.log(4) ** 2 + math.log(8) ** 2) / 2)


def router_gradients(model: Transformer, x: torch.Tensor, reduction: str) -> dict[str, torch.Tensor]:
    names = [n for n, _ in model.named_parameters()]
    return dict(zip(names, torch.autograd.grad(model(x, x.roll(-1, 1), reduction=reduction), [*model.parameters()]),
                    strict=True))


def pair(**losses) -> tuple[Transformer, Transformer]:
    """The same model with those losses and without."""
    return shaken(tiny(**losses)), shaken(TINY)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_loss_stays_the_cross_entropy_and_routers_learn_from_both(reduction):
    (with_losses, without), x = pair(balance_loss=0.3, z_loss=0.2), ids()
    losses = [m(x, x, reduction=reduction) for m in (with_losses, without)]
    assert torch.equal(*losses)
    got, plain = (router_gradients(m, x, reduction) for m in (with_losses, without))
    # the same losses written down: what the routers of a forward pass say, added to the loss
    seen = []
    for block in without.blocks.values():
        block.mlp.register_forward_hook(lambda m, args, _: seen.append(m.route(args[0].flatten(0, 1))))
    loss = without(x, x.roll(-1, 1), reduction=reduction)
    scale = 33 if reduction == "sum" else 1
    loss = loss + scale * sum(router_loss(route, with_losses.config.moe) for route in seen)
    wanted = torch.autograd.grad(loss, [*without.parameters()])
    torch.testing.assert_close([*got.values()], [*wanted])
    for name in ("blocks.0.mlp.router.weight", "blocks.1.mlp.router.weight", "embed.weight"):
        assert not torch.allclose(got[name], plain[name]), name


def test_micro_batches_add_up_to_the_batch():
    """The z-loss is a mean over tokens and adds up; the balance loss is a product of two means, so each micro-batch is
    balanced by itself, and only alike ones add up."""
    x = ids(4, 8)
    model = shaken(tiny(z_loss=0.3))
    whole, halves = router_gradients(model, x, "sum"), [router_gradients(model, h, "sum") for h in x.split(2)]
    torch.testing.assert_close({n: halves[0][n] + halves[1][n] for n in whole}, whole)
    model = shaken(tiny(balance_loss=0.3))
    whole, halves = router_gradients(model, x, "sum"), [router_gradients(model, h, "sum") for h in x.split(2)]
    name = "blocks.1.mlp.router.weight"
    assert not torch.allclose(halves[0][name] + halves[1][name], whole[name], rtol=1e-3)
    twice = router_gradients(model, torch.cat((x, x)), "sum")
    torch.testing.assert_close({n: 2 * whole[n] for n in whole}, twice)


def test_targets_without_loss_count_for_the_routers_share():
    """The scale of a sum is the count of targets with a loss, by which the trainer divides."""
    model, x = shaken(tiny(z_loss=0.3)), ids()
    targets = x.clone()
    targets[:, 6:] = -100
    named = [*model.parameters()]
    total, mean = (torch.autograd.grad(model(x, targets, reduction=r), named) for r in ("sum", "mean"))
    torch.testing.assert_close(total, tuple(g * 18 for g in mean))


# --- balance by the selection bias


def biased(speed=0.02, seed=0, **changes) -> MoE:
    """A layer whose router likes two of its experts far too much, because all tokens have something in common."""
    return layer(tiny(n_experts=8, router="sigmoid", bias_speed=speed, **changes), seed)


def lopsided(seed: int) -> torch.Tensor:
    return randn(4, 64, 24, seed=seed) + 2 * randn(24, seed=99)


def test_the_bias_balances_a_lopsided_router():
    moe = biased()
    spread = []
    for step in range(120):
        with torch.no_grad():
            moe(lopsided(step), torch.ones(()))
        assert moe.load.sum() == 4 * 64 * 2
        spread.append((moe.load.max() / moe.load.mean()).item())
        balance_experts(moe)
        assert not moe.load.any()
    assert spread[0] > 3 and statistics.mean(spread[-20:]) < 1.6, (spread[0], spread[-20:])


def test_one_step_of_the_bias():
    moe = biased(speed=0.5)
    moe.load.copy_(torch.tensor([10.0, 0, 5, 5, 5, 5, 5, 5]))
    balance_experts(moe)
    assert moe.selection_bias.tolist() == [-0.5, 0.5] + [0.0] * 6


def test_imbalance_is_the_busiest_experts_share_of_the_mean_in_the_worst_layer():
    model = build_model(TINY)
    for block, load in zip(model.blocks.values(), ([3.0, 1, 2, 2, 2], [0.0, 5, 0, 0, 5]), strict=True):
        block.mlp.load.copy_(torch.tensor(load))
    assert sum_loads(model).item() == 2.5
    assert sum_loads(build_model(dataclasses.replace(TINY, moe=MoEConfig()))) is None


def test_nothing_moves_in_use_or_without_targets():
    model = shaken(tiny(router="sigmoid", bias_speed=0.1, balance_loss=0.1))
    before = {n: b.clone() for n, b in model.named_buffers()}
    model(ids())  # no targets: no aux
    model.eval()
    model(ids(), ids())
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())
    balance_experts(model)
    assert not any(b.any() for n, b in model.named_buffers() if n.endswith("selection_bias")), "all loads are alike: 0"
    model.train()
    model(ids(), ids())
    assert all(b.sum() == 66 for n, b in model.named_buffers() if n.endswith("load"))


def test_micro_batches_are_counted_together():
    model, x = shaken(tiny(router="sigmoid", bias_speed=0.1)), ids(4, 8)
    model(x, x)
    whole = [b.mlp.load.clone() for b in model.blocks.values()]
    for block in model.blocks.values():
        block.mlp.load.zero_()
    for half in x.split(2):
        model(half, half, reduction="sum")
    assert all(torch.equal(b.mlp.load, load) for b, load in zip(model.blocks.values(), whole, strict=True))


def test_without_a_speed_the_bias_stays():
    model = shaken(tiny(router="sigmoid"))
    model(ids(), ids())
    balance_experts(model)
    assert not any(b.mlp.selection_bias.any() or b.mlp.load.any() for b in model.blocks.values())


def test_only_the_selection_bias_is_saved():
    for router, kept in (("sigmoid", True), ("softmax", False)):
        names = [n for n in build_model(tiny(router=router)).state_dict() if "bias" in n or "load" in n]
        assert names == (["blocks.0.mlp.selection_bias", "blocks.1.mlp.selection_bias"] if kept else [])


# --- layers, counts, weights


def test_the_first_layers_are_dense():
    model = build_model(tiny(n_dense_layers=1))
    assert [type(b.mlp) for b in model.blocks.values()] == [MLP, MoE]
    assert model.blocks["0"].mlp.w_up.out_features == 40


@pytest.mark.parametrize("changes", [{}, {"n_shared_experts": 2}, {"n_dense_layers": 1, "router": "sigmoid"},
                                     {"activation": "gelu", "n_shared_experts": 1}], ids=str)
def test_counts(changes):
    config = tiny(**changes)
    model = build_model(config)
    assert config.n_parameters == sum(p.numel() for p in model.parameters())
    idle = sum(p[: 5 - 2].numel() for p in model.parameters() if p.ndim == 3)
    assert config.n_active_parameters == config.n_parameters - idle


def test_experts_begin_alike_whichever_slice_is_drawn():
    """By (seed, name, expert, block): more experts, or wider ones, leave the old ones' numbers where they are."""
    config = tiny(n_experts=3, d_expert=2 * ROWS)
    small = dict(build_model(config, seed=5).named_parameters())
    more = dict(build_model(tiny(n_experts=5, d_expert=2 * ROWS), seed=5).named_parameters())
    wider = dict(build_model(tiny(n_experts=3, d_expert=3 * ROWS), seed=5).named_parameters())
    stacks = [n for n, p in small.items() if p.ndim == 3]
    assert len(stacks) == 6
    for name in stacks:
        assert torch.equal(more[name][:3], small[name])
        if not name.endswith("w_down"):
            assert torch.equal(wider[name][:, : 2 * ROWS], small[name])
    pieces = [piece for name in stacks for matrix in small[name] for piece in matrix.split(ROWS)]
    assert len({piece.flatten()[0].item() for piece in pieces}) == len(pieces), "no two blocks share their numbers"


def test_experts_begin_as_wide_as_an_mlp():
    model = build_model(tiny(n_experts=16, d_expert=64))
    experts = model.blocks["0"].mlp.experts
    for name, std in (("w_gate", 0.02), ("w_up", 0.02), ("w_down", 0.02 / math.sqrt(4))):
        p = getattr(experts, name)
        assert p.std().item() == pytest.approx(std, rel=6 / math.sqrt(2 * p.numel())), name


def test_muon_takes_each_expert_by_itself():
    stack = torch.nn.Parameter(randn(5, 12, 24, dtype=torch.float32))
    alone = [torch.nn.Parameter(m[None].clone()) for m in stack.detach()]
    optimizers = [Muon([stack], lr=0.1, weight_decay=0.1), *(Muon([p], lr=0.1, weight_decay=0.1) for p in alone)]
    for i in range(3):
        stack.grad = randn(5, 12, 24, seed=i + 1, dtype=torch.float32) * torch.logspace(-2, 2, 5)[:, None, None]
        for p, gradient in zip(alone, stack.grad, strict=True):
            p.grad = gradient[None].clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(stack.detach(), torch.cat([p.detach() for p in alone]), rtol=1e-4, atol=1e-5)


def test_who_trains_what():
    model = build_model(tiny(n_shared_experts=1))
    adamw, muon = build_optimizers(model, OptimConfig(name="muon", weight_decay=0.1))
    names = {p: n for n, p in model.named_parameters()}
    owner = {names[p]: (type(o).__name__, g["weight_decay"]) for o in (adamw, muon) for g in o.param_groups
             for p in g["params"]}
    assert owner["blocks.0.mlp.experts.w_up"] == ("Muon", 0.1)
    assert owner["blocks.0.mlp.shared.w_up.weight"] == ("Muon", 0.1)
    assert owner["blocks.0.mlp.router.weight"] == ("AdamW", 0.1)


@pytest.mark.parametrize("name", ROUTERS)
def test_it_learns_one_batch_by_heart(name):
    torch.manual_seed(0)
    config = tiny(router=name, **({"jitter": 0.1} if name == "sparsemixer" else {}))
    model, x = build_model(config), ids(2, 12)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    for _ in range(200):
        loss = model(x[:, :-1], x[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    assert model(x[:, :-1], x[:, 1:]).item() < 0.05
    assert torch.equal(model(x[:, :-1]).argmax(-1), x[:, 1:])


# --- runs


def on_each_rank(rank: int, folder) -> None:
    with process_group() as mesh:
        model, imbalance = shaken(tiny(router="sigmoid", bias_speed=0.05)), []
        for x in (ids(4, 8), ids(4, 9), ids(4, 10)):  # what a step chooses depends on the biases of the one before
            mine = x.chunk(mesh.world_size)[mesh.rank]
            model(mine, mine, reduction="sum")
            imbalance.append(sum_loads(model, mesh.sum))
            balance_experts(model)
        found = [torch.stack(imbalance), *(b.mlp.selection_bias for b in model.blocks.values())]
        torch.save(found, folder / f"{mesh.world_size}-{rank}.pt")


def test_two_ranks_agree_on_the_bias(tmp_path, monkeypatch):
    """And on how busy experts are: with each other, and with one rank that has the whole batch."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    on_each_rank(0, tmp_path)
    launch(on_each_rank, 2, tmp_path)
    alone, first, second = (torch.load(tmp_path / name) for name in ("1-0.pt", "2-0.pt", "2-1.pt"))
    for a, b, c in zip(alone, first, second, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
        assert len(a.unique()) > 1, "some were chosen more, some less"


ROUTED = {"model__moe__n_experts": 5, "model__moe__d_expert": 16, "model__moe__z_loss": 1e-3}
RUNS = {"bias, micro-batches": {"model__moe__router": "sigmoid", "model__moe__bias_speed": 0.01,
                                "train__micro_batch": 3},
        "muon, shared experts": {"optim__name": "muon", "model__moe__n_shared_experts": 1,
                                 "model__moe__balance_loss": 0.01},
        "sparsemixer": {"model__moe__router": "sparsemixer", "model__moe__jitter": 0.1}}


def state(folder: str) -> dict[str, bytes]:
    """Every weight and saved buffer of a run."""
    return {n: t.numpy().tobytes() for n, t in load_run(folder).model.state_dict().items()}


@pytest.mark.parametrize("kind", RUNS)
def test_resumed_is_unbroken(kind, tmp_path, monkeypatch):
    """To the last bit: the weights, the selection bias, and what is drawn."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Trainer, "_write", lambda *_: "")
    write_tiny(tmp_path)
    settings = ROUTED | RUNS[kind]
    torch.manual_seed(0)
    train(tiny_run(train__run_dir="unbroken", **settings), show=False)
    step = Trainer.step

    def interrupted(trainer, *arguments):
        if trainer.state.steps_done == 5 and trainer.config.train.resume is False:
            signal.raise_signal(signal.SIGINT)
        return step(trainer, *arguments)

    monkeypatch.setattr(Trainer, "step", interrupted)
    torch.manual_seed(1)  # what was drawn before the run is no part of it
    assert train(tiny_run(train__run_dir="broken", **settings), show=False).steps == 5
    torch.manual_seed(2)
    assert train(tiny_run(train__run_dir="broken", train__resume=True, **settings), show=False).finished
    assert curve("broken") == curve("unbroken") and len(curve("broken")) == 12
    got, expected = state("broken"), state("unbroken")
    assert got == expected
    if "bias" in kind:
        biases = [torch.frombuffer(bytearray(b), dtype=torch.float32) for n, b in got.items() if "selection" in n]
        assert len(biases) == 2 and all(b.abs().max() > 0.02 for b in biases)


def train_and_note_seeds(rank: int, run: str) -> None:
    """Writes the seed of each micro-batch to `run-rank`."""
    seeds, forward = [], Transformer.forward

    def noted(model, *arguments, **options):
        if model.training:
            seeds.append(str(torch.initial_seed()))
        return forward(model, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Transformer, "forward", noted)
        patch.setattr(Trainer, "_write", lambda *_: "")
        train(tiny_run(train__run_dir=run, train__steps=4, train__micro_batch=4, **ROUTED, **RUNS["sparsemixer"]),
              show=False)
    Path(f"{run}-{rank}").write_text("\n".join(seeds))


def test_two_ranks_draw_what_one_would(tmp_path, monkeypatch):
    """Each for its own samples, by what they are; so the run is the same on one rank or two."""
    monkeypatch.chdir(tmp_path)
    write_tiny(tmp_path)
    train_and_note_seeds(0, "one")
    launch(train_and_note_seeds, 2, "two")
    one, first, second = (Path(name).read_text().split() for name in ("one-0", "two-0", "two-1"))
    assert len(set(one)) == len(one) == 2 * 4
    assert (first, second) == (one[::2], one[1::2])
    for key in ("loss", "grad_norm"):
        losses = [[row[key] for row in curve(run)] for run in ("one", "two")]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_run_s_loss_is_the_cross_entropy(tmp_path, monkeypatch):
    """The first logged loss, whatever the weight of the routers' losses."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Trainer, "_write", lambda *_: "")
    write_tiny(tmp_path)
    runs = [train(tiny_run(train__steps=2, model__moe__balance_loss=weight, train__run_dir=str(weight), **ROUTED),
                  show=False) for weight in (0.0, 10.0)]
    assert runs[0].losses[0] == runs[1].losses[0]
    assert runs[0].losses[1] != runs[1].losses[1]


def test_a_run_tells_how_uneven_its_experts_are(tmp_path, monkeypatch):
    """Of all micro-batches of the step, in its row; and a dense run has no such number."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Trainer, "_write", lambda *_: "")
    write_tiny(tmp_path)
    train(tiny_run(train__steps=2, train__run_dir="dense"), show=False)
    assert all("moe/imbalance" not in row for row in curve("dense"))
    for micro in (8, 3):
        train(tiny_run(train__steps=2, train__micro_batch=micro, train__run_dir=str(micro), **ROUTED), show=False)
    whole, parts = ([row["moe/imbalance"] for row in curve(run)] for run in ("8", "3"))
    assert whole == parts and all(1 < x <= 5 / 2 for x in whole)


# --- settings that cannot work

GROUPED = {"router": "sigmoid"}
ERRORS = [
    ({"experts_per_token": 0}, "experts_per_token 0 must be above 0 and finite", "experts_per_token"),
    ({"d_expert": 0}, "d_expert 0 must be above 0 and finite", "d_expert"),
    ({"n_experts": -1}, "n_experts -1 must be above 0 and finite", "n_experts"),
    ({"n_shared_experts": -1}, "n_shared_experts -1 must be at least 0", "n_shared_experts"),
    ({"n_dense_layers": -1}, "n_dense_layers -1 must be at least 0", "n_dense_layers"),
    ({"n_groups": 0}, "n_groups 0 must be above 0 and finite", "n_groups"),
    ({"groups_per_token": 0}, "groups_per_token 0 must be above 0 and finite", "groups_per_token"),
    ({"weight_scale": math.inf}, "weight_scale inf must be from 1e-06 to 1e+06", "weight_scale"),
    ({"experts_per_token": 5}, "experts_per_token 5 must be at most n_experts 4", "experts_per_token"),
    ({"router": "sparsemixer", "experts_per_token": 1, "jitter": 0.1},
     "experts_per_token 1 must be 2 for sparsemixer", "experts_per_token"),
    ({"router": "sparsemixer"},
     "jitter 0.0 must be above 0: without rivals no router learns", "jitter"),
    (GROUPED | {"n_groups": 3}, "n_groups 3 must divide n_experts 4", "n_groups"),
    (GROUPED | {"n_groups": 2, "groups_per_token": 3}, "groups_per_token 3 must be at most n_groups 2",
     "groups_per_token"),
    (GROUPED | {"n_groups": 4}, "groups_per_token 1 must be more: a token meets 2 experts, and these groups hold 1",
     "groups_per_token"),
    ({"z_loss": -1.0}, "z_loss -1.0 must be from 0 to 1e+06", "z_loss"),
    ({"balance_loss": 1e300}, "balance_loss 1e+300 must be from 0 to 1e+06", "balance_loss"),
    ({"bias_speed": 0.1}, "bias_speed 0.1 has no effect without router: sigmoid", "bias_speed"),
    ({"n_groups": 2}, "n_groups 2 has no effect without router: sigmoid", "n_groups"),
    ({"weight_scale": 2.5}, "weight_scale 2.5 has no effect without router: sigmoid or softmax_of_all",
     "weight_scale"),
    (GROUPED | {"jitter": 0.1}, "jitter 0.1 has no effect without router: sparsemixer", "jitter"),
]


@pytest.mark.parametrize("changes, message, field", ERRORS)
def test_impossible_settings(changes, message, field):
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$") as caught:
        MoEConfig(**{"n_experts": 4, "experts_per_token": 2, "d_expert": 8} | changes)
    assert caught.value.field == f"model.moe.{field}"


def test_without_experts_nothing_is_asked():
    assert MoEConfig(d_expert=0, experts_per_token=99).n_experts == 0
