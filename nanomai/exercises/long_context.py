"""Checks of `notebooks/22_long_context`."""

import math

import torch

from nanomai import ops, rope
from nanomai.architecture import ModelConfig, RopeScaling
from nanomai.show import exercise


@exercise
def check_full_turns(answer):
    """`answer(head_dim, theta, context)`: how many pairs turn at least once in so many tokens."""
    for head_dim, theta, context in [(16, 100.0, 64), (128, 500_000.0, 8192), (96, 10_000.0, 4096), (8, 10.0, 3),
                                     (10, 10_000.0, 200), (4, 2.0, 100)]:
        config = ModelConfig(head_dim=head_dim, rope_theta=theta)
        turns = rope.frequencies(config, context, dtype=torch.float64) * context / (2 * math.pi)
        count = answer(head_dim, theta, context)
        where = f"K = {head_dim}, theta = {theta:,.0f}, {context:,} tokens"
        assert count == int(count), f"{where}: return a count, not {count}"
        expected = int((turns >= 1).sum())
        assert count == expected, f"{where}: {expected} of {head_dim // 2} pairs make a full turn, you say {int(count)}"


@exercise
def check_ntk_theta(answer):
    """`answer(theta, factor, head_dim)`: the theta that leaves the fastest pair and stretches the slowest by factor."""
    for theta, factor, head_dim in [(100.0, 4.0, 16), (10_000.0, 8.0, 128), (500_000.0, 2.0, 96), (10_000.0, 1.0, 64),
                                    (100.0, 3.0, 4)]:
        scaling = RopeScaling("ntk", original_context=64, factor=factor)
        scaled = rope.frequencies(ModelConfig(head_dim=head_dim, rope_theta=theta, rope_scaling=scaling), 64,
                                  dtype=torch.float64)
        slowest = head_dim // 2 - 1
        mine = float(answer(theta, factor, head_dim)) ** (-2 * slowest / head_dim)
        stretch = theta ** (-2 * slowest / head_dim) / mine
        assert math.isclose(mine, float(scaled[-1]), rel_tol=1e-6), \
            (f"theta = {theta:,.0f}, K = {head_dim}: your theta stretches pair {slowest}, the slowest, by "
             f"{stretch:.3f}, not by {factor}")


@exercise
def check_window_reach(answer):
    """`answer(windows, length)`: how many tokens back the last of `length` can be influenced from."""
    for windows, length in [([4], 20), ([4, 4], 20), ([4, 1, 6], 20), ([8] * 3, 100), ([8] * 3, 15), ([1, 1], 5),
                            ([3, None, 3], 30), ([None], 1)]:
        positions = torch.arange(length)
        seen = positions == length - 1  # what the last position has heard of, from layer to layer
        for window in windows:
            seen = (seen[:, None] & ops.attention_mask(positions, positions, window)).any(0)
        expected = length - 1 - int(seen.nonzero().min())
        back = answer(list(windows), length)
        assert back == expected, f"windows {windows} in {length} tokens reach back {expected}, you say {back}"
