"""Checks of `notebooks/06_training`."""

import copy
import math

import torch

from nanomai.config import ModelConfig, OptimConfig
from nanomai.model import build_model
from nanomai.ops import IGNORE
from nanomai.optim import build_optimizers, is_decayed, set_learning_rate
from nanomai.show import exercise


@exercise
def check_running_means(answer):
    """`answer(values, betas)`: the corrected running mean after each value, where beta may change at every step."""
    cases = [([3.0, 3.0, 3.0, 3.0], [0.9, 0.9, 0.9, 0.9]), ([2.0, 5.0, -1.0], [0.5, 0.5, 0.5]),
             ([4.0, 1.0, 7.0, 2.0, 2.0], [0.2, 0.95, 0.5, 0.99, 0.7]), ([1.0, 2.0, 6.0], [0.0, 0.0, 0.9])]
    for values, betas in cases:
        means = answer(list(values), list(betas))
        assert len(means) == len(values), f"{len(values)} values give {len(values)} means, not {len(means)}"
        assert abs(means[0] - values[0]) < 1e-9, f"the mean of one value is the value: {values[0]}, not {means[0]:.4g}"
        low, high = min(values), max(values)
        assert all(low - 1e-9 <= m <= high + 1e-9 for m in means), f"a mean of {values} cannot leave {low} to {high}"
        for t, mean in enumerate(means, 1):
            # what each value weighs: its own 1 - beta, times every later beta
            weights = [(1 - betas[i]) * math.prod(betas[i + 1 : t]) for i in range(t)]
            true = sum(w * v for w, v in zip(weights, values, strict=False)) / sum(weights)
            assert abs(mean - true) < 1e-9, f"values {values[:t]} with betas {betas[:t]}: {true:.4f}, not {mean:.4f}"


@exercise
def check_decayed_step(answer):
    """`answer(name, p, lr, weight_decay, adam)`: an AdamW step of p, in place; `adam(p)` does the one without decay."""
    sizes = {"n_layers": 1, "d_model": 12, "n_heads": 2, "n_kv_heads": 1, "head_dim": 6, "d_ff": 10, "vocab_size": 7}
    config = OptimConfig(weight_decay=0.5, eps=1e-12)
    for changes in ({}, {"tied_embeddings": False, "norm": "layernorm", "biases": ("qkv", "mlp")}):
        generator = torch.Generator().manual_seed(0)
        theirs = build_model(ModelConfig(**sizes, **changes)).double()
        with torch.no_grad():
            for p in theirs.parameters():
                p.normal_(generator=generator)
        mine, (optimizer,) = copy.deepcopy(theirs), build_optimizers(theirs, config)
        adams = {name: _Adam(config) for name, _ in mine.named_parameters()}
        for lr in (0.1, 0.03, 0.3):
            set_learning_rate([optimizer], lr)
            for (name, p), other in zip(mine.named_parameters(), theirs.parameters(), strict=True):
                p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
                other.grad, adams[name].lr = p.grad.clone(), lr
                with torch.no_grad():
                    answer(name, p, lr, config.weight_decay, adams[name])
            optimizer.step()
            for (name, p), other in zip(mine.named_parameters(), theirs.parameters(), strict=True):
                off = (p - other).abs().max().item()
                decays = "decays" if is_decayed(name, p) else "does not decay"
                assert off < 1e-9, f"{name}, which {decays} in the package, is off by {off:.2g} at lr {lr}"


class _Adam:
    """Steps of one parameter without decay, in place."""

    def __init__(self, config):
        self.config, self.t, self.m, self.v = config, 0, 0.0, 0.0

    def __call__(self, p):
        b1, b2 = self.config.beta1, self.config.beta2
        self.t, self.m, self.v = self.t + 1, b1 * self.m + (1 - b1) * p.grad, b2 * self.v + (1 - b2) * p.grad**2
        m, v = self.m / (1 - b1**self.t), self.v / (1 - b2**self.t)
        p -= self.lr * m / (v.sqrt() + self.config.eps)


@exercise
def check_accumulate(answer):
    """`answer(model, micro_batches)`: leaves the gradient of the mean over all valid tokens of all micro-batches."""
    config = ModelConfig(n_layers=1, d_model=16, n_heads=2, n_kv_heads=1, head_dim=8, d_ff=24, vocab_size=11)
    generator = torch.Generator().manual_seed(0)
    for rows, without in [((2, 2, 2), (0, 0, 0)), ((3, 1), (9, 2)), ((1, 4, 2), (7, 30, 0)), ((1, 2), (8, 3))]:
        model = build_model(config)
        ids = torch.randint(11, (sum(rows), 8), generator=generator)
        targets = torch.randint(11, (sum(rows), 8), generator=generator)
        micro_batches = list(zip(ids.split(rows), targets.split(rows), strict=True))
        for (_, some), n in zip(micro_batches, without, strict=True):
            some.view(-1)[:n] = IGNORE  # a view: `targets` sees it too
        big = copy.deepcopy(model)
        big(ids, targets).backward()
        answer(model, micro_batches)
        counts = [(some != IGNORE).sum().item() for _, some in micro_batches]
        for (name, p), other in zip(model.named_parameters(), big.parameters(), strict=True):
            assert p.grad is not None, f"{name} has no gradient: call backward"
            off = (p.grad - other.grad).norm() / other.grad.norm()
            ratio = (p.grad.norm() / other.grad.norm()).item()
            assert off < 1e-4, (f"micro-batches with {counts} valid tokens: the gradient of {name} is {off:.2g} off "
                                f"that of one big batch ({ratio:.2f} times as long)")
