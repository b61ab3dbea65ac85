"""Checks of `notebooks/05_block_and_model`."""

import copy

import torch
from torch.utils.flop_counter import FlopCounterMode

from nanomai.config import ModelConfig
from nanomai.model import build_model
from nanomai.ops import rms_norm_plain, rotary_table
from nanomai.show import exercise


@exercise
def check_rms_norm_gradient(answer):
    """`answer(x, weight, eps, d_y)`: the gradients with respect to x and to the weight, without autograd."""
    generator = torch.Generator().manual_seed(0)
    for shape, size, eps in [((4, 6), 1.0, 1e-5), ((2, 3, 5), 0.01, 1e-3), ((7, 1), 2.0, 0.5)]:
        x = (size * torch.randn(shape, generator=generator, dtype=torch.float64)).requires_grad_()
        weight = torch.randn(shape[-1], generator=generator, dtype=torch.float64).requires_grad_()
        d_y = torch.randn(shape, generator=generator, dtype=torch.float64)
        true_x, true_weight = torch.autograd.grad(rms_norm_plain(x, weight, eps), (x, weight), d_y)
        with torch.no_grad():
            gradients = answer(x.detach(), weight.detach(), eps, d_y)
        assert isinstance(gradients, tuple) and len(gradients) == 2, "return a pair: d_x, d_weight"
        for name, mine, true in zip(("d_x", "d_weight"), gradients, (true_x, true_weight), strict=True):
            assert mine.shape == true.shape, f"{name} has shape {tuple(mine.shape)}, not {tuple(true.shape)}"
            off = (mine - true).abs().max() / true.abs().max()
            assert off < 1e-9, f"{name} is off by {off:.2g} of its largest number at eps {eps}, x of shape {shape}"


@exercise
def check_flops(answer):
    """`answer(config, t)`: matrix-product FLOPs of one training token in a row of t, no score of a pair left out."""
    sizes = {"n_layers": 1, "d_model": 24, "n_heads": 2, "n_kv_heads": 2, "head_dim": 12, "d_ff": 40, "vocab_size": 50}
    for what, changes, t in [("one plain layer", {}, 8),
                             ("three layers and a longer row", {"n_layers": 3}, 17),
                             ("two query heads that share one key-value head", {"n_kv_heads": 1}, 8),
                             ("heads that together are wider than d_model", {"head_dim": 20}, 8),
                             ("a GELU MLP, which has no gate", {"activation": "gelu"}, 8),
                             ("an untied head", {"tied_embeddings": False}, 8)]:
        config = ModelConfig(**{**sizes, **changes})
        ids = torch.arange(2 * t).view(2, t) % config.vocab_size
        with FlopCounterMode(display=False) as counter:
            build_model(config)(ids, ids).backward()
        counted = counter.get_total_flops() // ids.numel()
        got = answer(config, t)
        assert got == counted, f"{what}: PyTorch counts {counted} FLOPs a token, you {got}"


@exercise
def check_stream_without_norm(answer):
    """`answer(model, x)`: std of the stream x (B, T, D) as it enters, and after each block with its norms left out."""
    generator = torch.Generator().manual_seed(0)
    for n_layers, size in [(1, 10.0), (3, 300.0), (5, 1000.0)]:
        model = build_model(ModelConfig(n_layers=n_layers, d_model=32, n_heads=2, head_dim=8, d_ff=48, vocab_size=20))
        before = copy.deepcopy(model)
        x = size * torch.randn(2, 9, 32, generator=generator)
        entering = x.clone()
        got = answer(model, x)
        assert torch.equal(x, entering), "x itself was changed: add out of place"
        assert _same(model, before), "the model is not the one that came in: leave its norms where they are"
        assert len(got) == n_layers + 1, f"{n_layers} blocks give {n_layers + 1} numbers, not {len(got)}"
        expected = _stream_without_norm(before, x)
        for i, (mine, true) in enumerate(zip(got, expected, strict=True)):
            where = f"after block {i}" if i else "on entering"
            assert abs(mine - true) < 1e-4 * true, f"{where} the std is {true:.6g}, not {mine:.6g}"


def _stream_without_norm(model, x):
    rotary = rotary_table(torch.arange(x.shape[1]), model.config.head_dim, model.config.rope_theta)
    stds = [x.std().item()]
    with torch.no_grad():
        for block in model.blocks.values():
            x = x + block.attention(x, rotary, None)
            x = x + block.mlp(x)
            stds.append(x.std().item())
    return stds


def _same(model, other):
    mine, theirs = model.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
