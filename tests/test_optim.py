"""Optimizers against torch's own, who is decayed, and learning rates at their edges."""

import dataclasses
import math
from itertools import pairwise

import pytest
import torch

from nanomai.config import ModelConfig, OptimConfig
from nanomai.model import build_model
from nanomai.optim import (
    FIVE_ALIKE,
    THREE_GRADED,
    Muon,
    build_optimizers,
    learning_rate,
    named_state,
    orthogonalize,
    piecewise,
    set_learning_rate,
)

CONFIG = ModelConfig(n_layers=2, d_model=24, n_heads=4, n_kv_heads=2, head_dim=6, d_ff=40, vocab_size=61,
                     context_length=16, norm="layernorm", position="learned", tied_embeddings=False,
                     biases=("qkv", "out", "mlp", "head"))
IDS = torch.randint(61, (4, 16), generator=torch.Generator().manual_seed(0))


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def step(model, optimizers, lr=1e-2) -> None:
    set_learning_rate(optimizers, lr)
    model(IDS, IDS.roll(-1, 1)).backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


# --- who gets what


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_groups(name):
    model = build_model(CONFIG)
    optimizers = build_optimizers(model, OptimConfig(name=name, weight_decay=0.1))
    names = {p: n for n, p in model.named_parameters()}
    owner = {names[p]: (type(o).__name__, group["weight_decay"])
             for o in optimizers for group in o.param_groups for p in group["params"]}
    assert sorted(owner) == sorted(names.values()), "every parameter once"
    assert sum(len(g["params"]) for o in optimizers for g in o.param_groups) == len(names)
    hidden = {n for n in owner if n.split(".")[-2] in ("wq", "wk", "wv", "wo", "w_gate", "w_up", "w_down")
              and n.endswith("weight")}
    assert len(hidden) == 14
    for n, (kind, decay) in owner.items():
        assert decay == (0.1 if n in hidden or n == "head.weight" else 0.0), n
        assert kind == ("Muon" if name == "muon" and n in hidden else "AdamW"), n


@pytest.mark.parametrize("tied", [True, False])
def test_adamw_is_torchs(tied):
    config = dataclasses.replace(CONFIG, tied_embeddings=tied, biases=("qkv", "mlp"))
    ours, theirs = build_model(config), build_model(config)
    optimizers = build_optimizers(ours, OptimConfig(weight_decay=0.3, beta1=0.8, beta2=0.9, eps=1e-6))
    decayed = [p for n, p in theirs.named_parameters() if p.ndim == 2 and n not in ("embed.weight", "positions.weight")]
    rest = [p for p in theirs.parameters() if not any(p is q for q in decayed)]
    reference = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.3}, {"params": rest, "weight_decay": 0.0}],
                                  lr=1e-2, betas=(0.8, 0.9), eps=1e-6, foreach=False)
    for _ in range(4):
        step(ours, optimizers)
        step(theirs, [reference])
    for (n, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=lambda m, n=n: f"{n}: {m}")


# --- Muon


ITERATIONS = pytest.mark.parametrize("quintics, smallest, low, high", [(FIVE_ALIKE, 0.0015, 0.67, 1.21),
                                                                       (THREE_GRADED, 0.01, 0.49, 1.51)])


@ITERATIONS
@pytest.mark.parametrize("shape", [(8, 8), (5, 13), (13, 5), (1, 7), (64, 256)])
def test_orthogonalized_singular_values(shape, quintics, smallest, low, high):
    """All pulled to about 1, whatever they were, on both sides; the singular vectors stay."""
    matrix = randn(3, *shape, dtype=torch.float64)
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    s = torch.logspace(0, math.log10(smallest), s.shape[-1], dtype=torch.float64)
    result = orthogonalize(u @ s.expand(3, -1).diag_embed() @ vt, quintics)
    inner = u.mT @ result @ vt.mT
    values = inner.diagonal(dim1=-2, dim2=-1)
    assert result.shape == matrix.shape
    assert (values[:, s / s.norm() > smallest] > low).all() and values.max() < high
    assert (inner - values.diag_embed()).abs().max() < 1e-9
    torch.testing.assert_close(orthogonalize(1e4 * matrix, quintics), orthogonalize(matrix, quintics),
                               rtol=1e-4, atol=1e-5)


@ITERATIONS
def test_what_the_quintics_make_of_a_singular_value(quintics, smallest, low, high):
    x = ends = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    for a, b, c in quintics:
        x = a * x + b * x**3 + c * x**5
    inside = x[ends >= smallest]
    assert low <= inside.min() < low + 0.02 and high - 0.02 < inside.max() <= high
    assert (x[1:] > 0).all() and x.max() <= high, "what is smaller is raised as well, and nothing is thrown over"


@pytest.mark.parametrize("quintics", [FIVE_ALIKE, THREE_GRADED])
def test_iterations_in_bfloat16_stay_bounded(quintics):
    """Where one singular value is the whole norm, a value rounded up past 1 would run away without the margin."""
    alone = randn(64, 48, 1) @ randn(64, 1, 80, seed=1)
    for matrices in (alone, alone + 1e-3 * randn(64, 48, 80, seed=2), torch.eye(48).expand(2, 48, 48),
                     randn(64, 48, 80, seed=3)):
        largest = torch.linalg.matrix_norm(orthogonalize(matrices.bfloat16(), quintics).float(), ord=2)
        assert largest.max() < 1.6


def test_three_iterations_for_a_stack_and_five_for_a_matrix():
    for shape, quintics in (((3, 6, 10), THREE_GRADED), ((6, 10), FIVE_ALIKE)):
        p = torch.nn.Parameter(torch.zeros(shape))
        p.grad = randn(*shape)
        Muon([p], lr=1.0).step()
        expected = orthogonalize(randn(*shape).view(-1, 6, 10), quintics).view(shape)
        torch.testing.assert_close(p.detach(), -0.2 * math.sqrt(10) * expected)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch before 2.9 has no Muon")
def test_muon_is_torchs(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda self: self)  # theirs would round its iterations
    shapes = [(12, 7), (7, 12), (9, 9), (12, 7)]
    ours, theirs = ([torch.nn.Parameter(randn(*s, seed=i)) for i, s in enumerate(shapes)] for _ in range(2))
    optimizer = Muon(ours, momentum=0.9, weight_decay=0.2, lr=0.05)
    reference = torch.optim.Muon(theirs, lr=0.05, weight_decay=0.2, momentum=0.9, nesterov=True,
                                 adjust_lr_fn="match_rms_adamw")
    for i in range(3):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = randn(*p.shape, seed=10 + i)
            q.grad = p.grad.clone()
        optimizer.step()
        reference.step()
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_matrices_of_one_shape_go_together_and_change_nothing():
    together = [torch.nn.Parameter(randn(6, 10, seed=i)) for i in range(3)]
    alone = [torch.nn.Parameter(p.detach().clone()) for p in together]
    optimizers = [Muon(together, lr=0.1), *(Muon([p], lr=0.1) for p in alone)]
    for step_number in range(3):
        for i, p in enumerate([*together, *alone]):
            p.grad = randn(6, 10, seed=100 * step_number + i % 3)
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(together, alone, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_muons_update_has_the_size_of_adamws():
    p = torch.nn.Parameter(torch.zeros(64, 256))
    p.grad = randn(64, 256)
    Muon([p], lr=0.01).step()
    assert p.square().mean().sqrt().item() == pytest.approx(0.2 * 0.01, rel=0.2)


def test_iterations_in_bfloat16():
    """A few hundredths off, as bfloat16 is; and `build_optimizers` hands the choice on."""
    updates = {}
    for dtype in (None, torch.bfloat16):
        p = torch.nn.Parameter(torch.zeros(64, 256))
        p.grad = randn(64, 256)
        Muon([p], lr=1.0, dtype=dtype).step()
        updates[dtype] = p.detach()
    error = (updates[torch.bfloat16] - updates[None]).norm() / updates[None].norm()
    assert 1e-4 < error < 0.05
    assert build_optimizers(build_model(CONFIG), OptimConfig(name="muon"), torch.bfloat16)[1].dtype == torch.bfloat16


def test_a_parameter_without_gradient_stays():
    p, q = (torch.nn.Parameter(randn(4, 4)) for _ in range(2))
    q.grad = randn(4, 4, seed=1)
    Muon([p, q], lr=0.1, weight_decay=0.5).step()
    assert torch.equal(p, randn(4, 4)) and not torch.equal(q, randn(4, 4))


# --- state


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_restored_state_goes_on_bit_for_bit(name):
    config = OptimConfig(name=name)
    model = build_model(CONFIG)
    optimizers = build_optimizers(model, config)
    fresh = named_state(optimizers, model)
    for _ in range(3):
        step(model, optimizers)
    state = {key: value.clone() for key, value in named_state(optimizers, model).items()}
    held = [t for o in optimizers for s in o.state.values() for t in s.values()]
    assert len(state) == len(held) and fresh.keys() == state.keys(), "all there is, allocated from the beginning"
    owners = {key.rsplit("/", 1)[0] for key in state}
    assert owners == {n for n, _ in model.named_parameters()}

    again = build_model(CONFIG, seed=2)
    with torch.no_grad():
        for p, q in zip(again.parameters(), model.parameters(), strict=True):
            p.copy_(q)
    others = build_optimizers(again, config)
    for key, value in named_state(others, again).items():
        value.copy_(state[key])
    for _ in range(2):
        step(model, optimizers)
        step(again, others)
    for p, q in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(p, q)


# --- learning rates


def rates(steps=100, **settings) -> list[float]:
    return [learning_rate(OptimConfig(lr=2.0, **settings), step, steps) for step in range(steps)]


def test_warm_up():
    for schedule in ("cosine", "wsd", "constant"):
        lr = rates(schedule=schedule, warmup_steps=4)
        assert lr[:4] == [0.5, 1.0, 1.5, 2.0] and lr[4] == 2.0
        assert rates(schedule=schedule)[0] == 2.0
    assert rates(3, schedule="cosine", warmup_steps=10) == [0.2, 0.4, pytest.approx(0.6)]


def test_cosine():
    lr = rates(schedule="cosine", warmup_steps=20, min_lr_ratio=0.1)
    assert lr[60] == pytest.approx(1.1), "half way"
    assert lr[40] == pytest.approx(2 * (0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2))
    assert lr[99] == pytest.approx(0.2, rel=0.01)
    assert all(a >= b for a, b in pairwise(lr[20:]))
    config = OptimConfig(lr=2.0, schedule="cosine")
    assert learning_rate(config, 150, 100) == pytest.approx(0.2), "beyond the end it stays low"


def test_warmup_stable_decay():
    lr = rates(schedule="wsd", warmup_steps=5, decay_fraction=0.2, min_lr_ratio=0.0)
    assert set(lr[4:81]) == {2.0}
    assert lr[90] == pytest.approx(1.0) and lr[99] == pytest.approx(0.1)
    assert set(rates(schedule="wsd", decay_fraction=0.0)) == {2.0}
    assert rates(schedule="wsd", decay_fraction=1.0, min_lr_ratio=0.5)[50] == pytest.approx(1.5)
    assert set(rates(schedule="constant")) == {2.0}


def test_knots():
    config = OptimConfig(lr={0: 1.0, 10: 3.0, 20: 0.0 + 1e-9, 21: 5.0}, warmup_steps=7)
    expected = {0: 1.0, 5: 2.0, 9: 2.8, 10: 3.0, 15: 1.5, 20: 1e-9, 21: 5.0, 1000: 5.0}
    assert {s: learning_rate(config, s, 30) for s in expected} == pytest.approx(expected)
    assert learning_rate(OptimConfig(lr={0: 0.5}), 3, 30) == 0.5


def test_piecewise():
    assert [piecewise({0: 64, 5: 128, 6: 256}, s) for s in (0, 4, 5, 6, 99)] == [64, 64, 128, 256, 256]
    assert piecewise(7, 3) == 7
