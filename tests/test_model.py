"""The Transformer: what makes it causal, what a document sees, how it begins. Other families: test_model_parity.py."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from nanomai.architecture import MoEConfig
from nanomai.config import ModelConfig
from nanomai.model import ROWS, Transformer, build_model, init_weights
from nanomai.sampling import KVCache

TINY = ModelConfig(n_layers=2, d_model=24, n_heads=4, n_kv_heads=2, head_dim=6, d_ff=40, vocab_size=97,
                   context_length=16)
SWITCHES = {
    "llama": {}, "window": {"sliding_window": 3}, "relu2": {"activation": "relu2"},
    "gpt2": {"norm": "layernorm", "activation": "gelu", "position": "learned", "n_kv_heads": 4,
             "biases": ("qkv", "out", "mlp")},
    "untied": {"tied_embeddings": False, "biases": ("head",)}}


def tiny(name="llama", **changes) -> ModelConfig:
    return dataclasses.replace(TINY, **SWITCHES[name] | changes)


def ids(b=3, t=11, v=97) -> torch.Tensor:
    return torch.randint(v, (b, t), generator=torch.Generator().manual_seed(b * t))


def shaken(config: ModelConfig, seed: int = 1) -> Transformer:
    """A model whose biases and norms also do something, and whose attention is far from even."""
    model, generator = build_model(config), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.3)
    return model


# --- who sees what


@pytest.mark.parametrize("name", SWITCHES)
def test_no_position_sees_the_future(name):
    model, x = shaken(tiny(name)), ids()
    before, changed = model(x), x.clone()
    changed[:, 6] = (changed[:, 6] + 1) % 97
    after = model(changed)
    assert torch.equal(before[:, :6], after[:, :6])
    assert not torch.isclose(before[:, 6], after[:, 6]).all()
    if name != "window":
        assert not torch.isclose(before[:, -1], after[:, -1]).all()


def test_a_window_ends():
    """Two layers of a window of 3 reach 2 + 2 positions back and no further."""
    model, x = shaken(tiny("window")), ids()
    before, changed = model(x), x.clone()
    changed[:, 2] = (changed[:, 2] + 1) % 97
    after = model(changed)
    assert not torch.isclose(before[:, 6], after[:, 6]).all()
    assert torch.equal(before[:, 7:], after[:, 7:])


@pytest.mark.parametrize("name", SWITCHES)
def test_documents_are_alone(name):
    model, x = shaken(tiny(name)), ids()
    documents = torch.tensor([0] * 5 + [1] * 6).expand(3, -1)
    before, changed = model(x, document_ids=documents), x.clone()
    changed[:, :5] = (changed[:, :5] + 1) % 97
    after = model(changed, document_ids=documents)
    assert torch.equal(before[:, 5:], after[:, 5:])
    assert not torch.isclose(model(x)[:, 5:], before[:, 5:]).all(), "without the ids the first document is seen"
    if name != "gpt2":  # rotary positions are relative, so the second document reads as if it came first
        torch.testing.assert_close(before[:, 5:], model(x[:, 5:]), rtol=1e-4, atol=1e-4)


def test_ids_and_targets_have_places():
    """Ranks that share sequences look for them there; by name they would be overlooked."""
    with pytest.raises(TypeError, match="positional-only"):
        shaken(tiny("llama"))(ids(), targets=ids())


# --- what comes out


@pytest.mark.parametrize("name", SWITCHES)
def test_the_loss_is_the_cross_entropy_of_the_logits(name):
    model, x, targets = shaken(tiny(name)), ids(), ids().roll(-1, 1)
    targets[:, -1] = targets[0, 3] = -100
    expected = F.cross_entropy(model(x).flatten(0, 1), targets.flatten(), ignore_index=-100)
    torch.testing.assert_close(model(x, targets), expected)
    torch.testing.assert_close(model(x, targets, reduction="sum"), expected * (targets != -100).sum())
    got, wanted = (torch.autograd.grad(y, [*model.parameters()]) for y in (model(x, targets), expected))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


def test_another_reduction_is_refused():
    model, x = build_model(ModelConfig()), torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"^reduction 'none' must be 'mean' or 'sum'$"):
        model(x, x, reduction="none")


@torch.no_grad()
def test_more_than_a_table_of_positions_holds_is_refused():
    model = build_model(tiny("gpt2"))
    cache = KVCache(model, 1, 20)
    model(ids(1, 16), cache=cache)
    for call in (lambda: model(ids(1, 17)), lambda: model(ids(1, 1), cache=cache)):
        with pytest.raises(ValueError, match=r"^17 tokens: learned positions end at context_length 16$"):
            call()


def test_documents_in_a_cache_are_refused():
    model, x = build_model(TINY), ids(1, 4)
    with pytest.raises(ValueError, match=r"^document_ids cannot be given with a cache: each of its rows is one "):
        model(x, document_ids=torch.zeros_like(x), cache=KVCache(model, 1, 4))


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_qk_norm_makes_the_length_of_queries_and_keys_of_no_account(name):
    """Whether they are turned afterwards or not; and its weights are part of the scores."""
    config = tiny(name, qk_norm=True, biases=())
    model, x = shaken(config), ids()
    before = model(x)
    for block in model.blocks.values():
        block.attention.wq.weight.mul_(4.0)
        block.attention.wk.weight.mul_(3.0)
    torch.testing.assert_close(model(x), before, rtol=1e-3, atol=1e-3)
    model.blocks["0"].attention.k_norm.weight.mul_(2.0)
    assert not torch.isclose(model(x), before, rtol=1e-3, atol=1e-3).all()


@torch.no_grad()
def test_the_last_logits_alone():
    model, x = shaken(tiny()), ids()
    last = model(x, last_only=True)
    assert last.shape == (3, 1, 97)
    torch.testing.assert_close(last, model(x)[:, -1:])


@pytest.mark.parametrize("name", SWITCHES)
def test_dtypes(name):
    model, x = shaken(tiny(name)), ids()
    single = model(x)
    model.compute_dtype = torch.bfloat16
    half, loss = model(x), model(x, x)
    loss.backward()
    assert single.dtype == half.dtype == loss.dtype == torch.float32
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters()), "the weights stay in float32"
    assert 0 < (half - single).norm() < 0.05 * single.norm()
    model.double().compute_dtype = torch.float64
    double = model(x)
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), single, rtol=1e-4, atol=1e-4)


def test_float64_gradients_against_differences():
    """Every parameter, along one random direction."""
    model, x = shaken(tiny(n_layers=1)).double(), ids(1, 5)
    model.compute_dtype = torch.float64
    named = dict(model.named_parameters())
    gradients = torch.autograd.grad(model(x, x), [*named.values()])
    for (name, p), gradient in zip(named.items(), gradients, strict=True):
        direction = torch.randn(p.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(name)))
        with torch.no_grad():
            high, low = (torch.func.functional_call(model, {name: p + e * direction}, (x, x)) for e in (1e-5, -1e-5))
        assert ((high - low) / 2e-5).item() == pytest.approx((gradient * direction).sum().item(), rel=1e-5, abs=1e-8)


# --- how it begins


def test_the_meta_device_gives_shapes_alone():
    with torch.device("meta"):
        model = build_model(dataclasses.replace(TINY, n_layers=3, vocab_size=10**7, d_ff=10**6))
    assert all(p.is_meta for p in model.parameters())
    assert list(model.blocks) == ["0", "1", "2"]
    model = build_model(TINY)
    assert not any(p.is_meta for p in model.parameters())


def test_initial_statistics():
    config = dataclasses.replace(TINY, n_layers=8, d_model=128, d_ff=512, vocab_size=1024, norm="layernorm",
                                 biases=("qkv", "out", "mlp"), init_std=0.03)
    for name, p in build_model(config).named_parameters():
        if p.ndim == 1:
            assert (p == (1 if name.endswith("norm.weight") else 0)).all(), name
            continue
        std = 0.03 / math.sqrt(16) if name.endswith(("wo.weight", "w_down.weight")) else 0.03
        assert p.std().item() == pytest.approx(std, rel=6 / math.sqrt(2 * p.numel())), name
        assert abs(p.mean().item()) < 5 * std / math.sqrt(p.numel()), name


def test_the_first_loss_is_that_of_a_guess():
    assert build_model(TINY)(ids(), ids().roll(-1, 1)).item() == pytest.approx(math.log(97), rel=0.01)


def test_initial_weights_depend_on_seed_name_and_block_alone():
    config = dataclasses.replace(TINY, vocab_size=3 * ROWS, d_ff=2 * ROWS, n_layers=2)
    small = dict(build_model(config, seed=5).named_parameters())
    wider = dict(build_model(dataclasses.replace(config, vocab_size=5 * ROWS + 7), seed=5).named_parameters())
    assert torch.equal(wider["embed.weight"][: 3 * ROWS], small["embed.weight"])
    deeper = dict(build_model(dataclasses.replace(config, n_layers=3), seed=5).named_parameters())
    unscaled = {name: p for name, p in small.items() if not name.endswith(("wo.weight", "w_down.weight"))}
    assert all(torch.equal(deeper[name], p) for name, p in unscaled.items())
    torch.manual_seed(99)
    assert all(torch.equal(p, small[name]) for name, p in build_model(config, seed=5).named_parameters())
    pieces = [piece for p in small.values() if p.ndim == 2 for piece in p.split(ROWS)]
    assert len({piece.flatten()[0].item() for piece in pieces}) == len(pieces), "no two blocks share their numbers"
    other = dict(build_model(config, seed=6).named_parameters())
    assert not any(torch.equal(other[name], p) for name, p in small.items() if p.ndim == 2)


def test_init_leaves_nothing_to_chance():
    """Neither in parameters nor in buffers: `to_empty` hands out whatever stood in memory."""
    config = tiny(moe=MoEConfig(n_experts=4, d_expert=8, router="sigmoid"))
    with torch.device("meta"):
        model = Transformer(config)
    model.to_empty(device="cpu")
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.fill_(torch.nan)
    init_weights(model)
    assert "blocks.0.mlp.selection_bias" in tensors
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    expected = build_model(config).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_init_leaves_the_global_generator_alone():
    model, before = Transformer(TINY), torch.get_rng_state()
    init_weights(model)
    assert torch.equal(before, torch.get_rng_state())


# --- it learns, and it compiles


@pytest.mark.parametrize("name", ["llama", "gpt2", "relu2"])
def test_it_learns_one_batch_by_heart(name):
    model, x = build_model(tiny(name)), ids(2, 12)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    for _ in range(120):
        loss = model(x[:, :-1], x[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.02
    assert torch.equal(model(x[:, :-1]).argmax(-1), x[:, 1:])


@pytest.mark.parametrize("part", ["block", "loss"])
def test_a_compiled_part_is_the_eager_one(part):
    """As `parallelize` compiles them: the whole graph or an error."""
    model = shaken(tiny(n_layers=1))
    x = torch.randn(2, 8, 24, generator=torch.Generator().manual_seed(0)).requires_grad_()
    if part == "block":
        run, inputs = model.blocks["0"], (x, model._enter(ids(2, 8), None, None)[1], None)
    else:
        run, inputs = model.loss, (x.flatten(0, 1), model.embed.weight, ids(2, 8).flatten(), None)
    wanting = [x, *(run.parameters() if part == "block" else [model.embed.weight])]
    eager = run(*inputs)
    expected = torch.autograd.grad(eager.square().sum(), wanting)
    run.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    compiled = run(*inputs)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(torch.autograd.grad(compiled.square().sum(), wanting), expected, rtol=1e-4, atol=1e-5)
