"""Checks of `notebooks/11c_fused_cross_entropy`."""

import math

import torch

from nanomai.ops import IGNORE
from nanomai.show import exercise


@exercise
def check_merge_shards(answer):
    """`answer(maxima, sums, target_logits)`, each (R, N): the loss of each token, from R shards of the vocabulary."""
    generator = torch.Generator().manual_seed(0)
    for sizes, n, scale, what in [((5, 3), 4, 1.0, "two shards"), ((7,), 3, 1.0, "one shard"),
                                  ((4, 1, 6, 2), 5, 3.0, "four shards of different sizes"),
                                  ((3, 8), 6, 1e4, "logits of size 1e4"), ((6, 0, 2), 2, 1.0, "a shard without rows")]:
        logits = scale * torch.randn(n, sum(sizes), generator=generator, dtype=torch.float64)  # (N, V)
        targets = torch.randint(sum(sizes), (n,), generator=generator)
        parts, start = [], 0
        for size in sizes:
            z, local = logits[:, start : start + size], targets - start
            largest = z.amax(-1) if size else torch.full((n,), -torch.inf, dtype=z.dtype)
            inside = (local >= 0) & (local < size)
            target = z[torch.arange(n), local.clamp(0, size - 1)] if size else torch.zeros_like(largest)
            parts.append((largest, (z - largest[:, None]).exp().sum(-1), target.where(inside, 0.0)))
            start += size
        given = [torch.stack(part) for part in zip(*parts, strict=True)]
        losses = answer(*(g.clone() for g in given))
        true = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        assert tuple(losses.shape) == (n,), f"{what}: one loss a token, ({n},), not {tuple(losses.shape)}"
        assert losses.isfinite().all(), f"{what}: a loss is not finite"
        off = (losses - true).abs().max().item()
        assert off < 1e-9 * max(1.0, scale), f"{what}: off by {off:.3g}"


@exercise
def check_gradient_in_place(answer):
    """`answer(logits, targets)`: puts the gradient of the summed loss where the logits were; returns that loss."""
    generator = torch.Generator().manual_seed(1)
    for (n, v), scale, ignored, what in [((4, 7), 1.0, (), "a small chunk"), ((5, 33), 2.0, (1, 4), "ignored targets"),
                                         ((3, 129), 1e4, (0,), "logits of size 1e4"), ((1, 1), 1.0, (), "one class"),
                                         ((2, 9), 1.0, (0, 1), "no target that counts")]:
        logits = scale * torch.randn(n, v, generator=generator)
        targets = torch.randint(v, (n,), generator=generator)
        targets[list(ignored)] = IGNORE
        _compare(answer, logits, targets, what, rounding=1e-6)
    sure = torch.zeros(2, 512)
    sure[[0, 1], [3, 400]] = 12.75  # p = 0.9985: bfloat16 has no number between 0.9961 and 1
    _compare(answer, sure.bfloat16(), torch.tensor([3, 400]), "bfloat16, a target of probability 0.9985", 4e-3)


def _compare(answer, logits, targets, what, rounding):
    """Holds an answer against autograd in float64; `rounding` is what a number of the result may lose."""
    exact = logits.detach().double().requires_grad_()
    true = torch.nn.functional.cross_entropy(exact, targets, ignore_index=IGNORE, reduction="sum")
    (gradient,) = torch.autograd.grad(true, exact)
    place, given = logits.data_ptr(), logits.clone()
    loss = answer(logits, targets)
    assert logits.data_ptr() == place and logits.dtype == given.dtype, f"{what}: the logits moved to another place"
    assert not logits.equal(given) or gradient.equal(given.double()), f"{what}: the logits are still there"
    rows = (targets == IGNORE).nonzero().flatten().tolist()
    assert not logits[rows].any(), f"{what}: an ignored token has a gradient"
    off = (logits.double() - gradient).abs() - rounding * gradient.abs()
    worst = off.argmax()  # a NaN, if there is one
    got, want = (d.flatten()[worst].item() for d in (logits, gradient))
    assert off.flatten()[worst] <= 1e-6, f"{what}: a gradient is {got:.4g} and should be {want:.4g}"
    loss, true = float(loss), true.item()
    assert abs(loss - true) <= 1e-4 * max(1.0, true), f"{what}: the loss is {loss:.5g} and should be {true:.5g}"


@exercise
def check_largest_chunk(answer):
    """`answer(budget, N, V, D, e)`: the most tokens of a chunk, so that the forward pass keeps to the budget."""
    for n_tokens, v, d, e in [(16_384, 50_304, 768, 2), (8_192, 128_256, 4_096, 2), (37, 101, 8, 4), (1, 7, 3, 4)]:
        fixed = 4 * v * d + e * n_tokens * d
        for budget in [fixed - 1, fixed + e * v - 1, fixed + e * v, fixed + 3 * e * v - 1, fixed + 20 * e * v,
                       fixed + e * v * n_tokens, 2 * (fixed + e * v * n_tokens)]:
            n = answer(budget, n_tokens, v, d, e)
            at = f"budget {budget:,}, N = {n_tokens:,}, V = {v:,}, D = {d:,}, e = {e}"
            assert n == math.floor(n), f"{at}: {n} is not a number of tokens"
            assert 0 <= n <= n_tokens, f"{at}: {n:,} tokens; there are {n_tokens:,}, and 0 says that it does not fit"
            needed = fixed + e * v * n
            assert n == 0 or needed <= budget, f"{at}: {n:,} tokens need {needed:,} bytes"
            assert n == n_tokens or needed + e * v > budget, f"{at}: a chunk of {n + 1:,} tokens would fit too"
