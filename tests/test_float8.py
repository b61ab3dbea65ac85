"""Products in float8 against what they say they are: products of rounded factors, in float64."""

import dataclasses
import functools

import pytest
import torch
import torch.nn.functional as F

from nanomai import float8, machine
from nanomai.architecture import ConfigError, MoEConfig
from nanomai.config import Config, ModelConfig, TrainConfig
from nanomai.config_file import load_config
from nanomai.layers import Linear
from nanomai.model import Transformer, build_model
from nanomai.parallel.tensor import part_of

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
CONFIG = ModelConfig(n_layers=2, d_model=32, n_heads=2, n_kv_heads=1, head_dim=16, d_ff=48, vocab_size=64,
                     context_length=16)


def drawn(*shape, seed=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return x.mul_(torch.linspace(0.1, 10, shape[-1])).bfloat16()


def rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The plain twin of `quantize`: the nearest value of the format, step by step from its definition."""
    x = x.double()
    x, largest = x / x.abs().max(), {E4M3: 448, E5M2: 57344}[dtype]
    bits, lowest = {E4M3: (3, -6), E5M2: (2, -14)}[dtype]
    exponent = (x * largest).abs().clamp_min(1e-30).log2().floor().clamp_min(lowest)
    step = 2.0 ** (exponent - bits)
    return (x * largest / step).round() * step


@pytest.mark.parametrize("rows, copies", [(32, 0), (33, 1)])
def test_activations_are_padded_only_where_rows_are_missing(monkeypatch, rows, copies):
    pad, padded = F.pad, []
    monkeypatch.setattr(F, "pad", lambda *given: padded.append(given) or pad(*given))
    assert float8.linear(drawn(rows, 48), drawn(16, 48, seed=1)).shape == (rows, 16)
    assert len(padded) == copies


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_quantized_is_the_nearest_value(dtype):
    x = drawn(64, 48)
    q, scale = float8.quantize(x, dtype)
    assert scale.item() == pytest.approx(x.abs().max().item() / torch.finfo(dtype).max)
    found, expected = q.double(), rounded(x, dtype)
    differs = found != expected
    assert differs.float().mean() < 0.005  # x / scale is itself rounded, and a tie may then go the other way
    torch.testing.assert_close(found, expected, rtol=0.26, atol=1e-6)


def test_nothing_but_zeros_stays_so():
    q, scale = float8.quantize(torch.zeros(16, 16, dtype=torch.bfloat16), E4M3)
    assert not q.double().any() and scale > 0


@pytest.mark.parametrize("rows", [(32,), (2, 16), (3, 7), (1,)])
@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients_are_those_of_rounded_factors(rows, bias):
    x, weight = drawn(*rows, 48).requires_grad_(), drawn(64, 48, seed=1).float().requires_grad_()
    b = torch.linspace(-1, 1, 64).requires_grad_() if bias else None
    d_y = drawn(*rows, 64, seed=2)
    y = float8.linear(x, weight, b)
    y.backward(d_y)

    def value(tensor, dtype):
        q, scale = float8.quantize(tensor.detach(), dtype)
        return q.double() * scale.double()

    x8, w8, d8 = value(x, E4M3), value(weight, E4M3), value(d_y, E5M2)
    expected = x8 @ w8.T if b is None else x8 @ w8.T + b.detach().double()
    flat = lambda t: t.flatten(0, -2)  # noqa: E731
    for name, found, wanted in (("y", y, expected), ("d_x", x.grad, d8 @ w8),
                                ("d_weight", weight.grad, flat(d8).T @ flat(x8))):
        error = (found.double() - wanted).norm() / wanted.norm()
        assert error < 4e-3, f"{name} differs by {error:.1e}: more than rounding to bfloat16"
    assert y.dtype == x.grad.dtype == torch.bfloat16 and weight.grad.dtype == torch.float32
    if b is not None:
        torch.testing.assert_close(b.grad, flat(d_y).float().sum(0), rtol=1e-2, atol=1e-2)


def test_it_is_near_the_product_itself():
    x, weight = drawn(64, 48), drawn(64, 48, seed=1)
    y, exact = float8.linear(x, weight).double(), F.linear(x.double(), weight.double())
    assert 0.005 < (y - exact).norm() / exact.norm() < 0.05  # it would be 0.003 in bfloat16


def test_one_byte_is_kept_of_each_input():
    kept = []
    x, weight = drawn(64, 48).requires_grad_(), drawn(64, 48).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        float8.linear(x, weight)
    assert sorted(t.nbytes for t in kept if t is not weight and t.numel() > 1) == [64 * 48]


@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_learns_in_it(compiled):
    """Which of its products are in float8: all projections of blocks, and neither head nor router."""
    moe = MoEConfig(n_experts=4, experts_per_token=2, d_expert=16, n_shared_experts=1, n_dense_layers=1)
    model = build_model(dataclasses.replace(CONFIG, moe=moe, tied_embeddings=False))
    model.compute_dtype = torch.bfloat16
    model.use_float8()
    chosen = {name for name, part in model.named_modules() if isinstance(part, Linear) and part.float8}
    assert "blocks.0.mlp.w_down" in chosen and "blocks.1.attention.wq" in chosen
    assert "head" not in chosen and not any("router" in name for name in chosen)
    if compiled:
        for block in model.blocks.values():
            block.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids = torch.randint(64, (2, 17), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(30):
        loss = model(ids[:, :-1], ids[:, 1:])
        loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1


@pytest.mark.parametrize("changes, ranks, line", [
    ({"d_ff": 40}, 1, "float8 needs multiples of 16, and blocks.0.mlp.w_gate.weight is 40 x 32"),
    ({}, 2, "float8 needs multiples of 16, and blocks.0.attention.wk.weight is 8 x 32 on a rank")])
def test_a_matrix_that_does_not_fit_is_named(changes, ranks, line):
    with pytest.raises(ConfigError) as error:
        build_model(dataclasses.replace(CONFIG, **changes)).use_float8(functools.partial(part_of, ranks))
    assert str(error.value) == line and error.value.field == "train.float8"


def test_what_no_rank_cuts_need_not_be_a_multiple_for_each():
    """DeepSeek's latents of 576 numbers are whole on every rank."""
    with torch.device("meta"):
        model = Transformer(dataclasses.replace(load_config("deepseek-v3").model, n_layers=4))
    model.use_float8(functools.partial(part_of, 8))


@pytest.mark.parametrize("device, dtype, capability, line", [
    ("cpu", "float32", None, "float8 goes with train.dtype bfloat16, and this run's is float32"),
    ("cuda", "bfloat16", (8, 0), "float8 needs a GPU that has it "), ("mps", "bfloat16", None, "float8 needs a GPU ")])
def test_where_it_cannot_be_it_is_refused(device, dtype, capability, line, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    config = Config(model=CONFIG, train=TrainConfig(float8=True, dtype=dtype))
    with pytest.raises(ConfigError) as error:
        machine.resolve(config, torch.device(device))
    assert str(error.value).startswith(line) and error.value.field == "train.float8"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_where_it_can_be_it_is_taken(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    config = Config(model=CONFIG, train=TrainConfig(float8=True, dtype="bfloat16", compile="off"))
    assert machine.resolve(config, torch.device(device)).train.float8
