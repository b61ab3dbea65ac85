"""Checks of `notebooks/04_rope_gqa_flash`."""

import torch

from nanomai import ops
from nanomai.show import exercise


@exercise
def check_score_from_distance(answer):
    """`answer(q, k, distance, theta)`: the dot product of rotated q at m and rotated k at m - distance."""
    generator = torch.Generator().manual_seed(0)
    for head_dim, theta in [(2, 10_000.0), (8, 10_000.0), (6, 100.0)]:
        q, k = torch.randn(2, head_dim, generator=generator)
        for m, n in [(4, 4), (5, 4), (12, 5), (40, 33), (5, 12)]:
            turned_q, turned_k = (ops.rotary(x.view(1, 1, 1, -1), *ops.rotary_table(torch.tensor([p]), head_dim, theta))
                                  for x, p in ((q, m), (k, n)))
            expected, score = (turned_q * turned_k).sum(), torch.as_tensor(answer(q, k, m - n, theta)).float()
            assert score.numel() == 1, f"return one number, not a tensor of shape {tuple(score.shape)}"
            close = torch.allclose(score.flatten(), expected.flatten(), atol=1e-4)
            assert close, (f"with K = {head_dim} and theta = {theta:,.0f}, positions m = {m} and n = {n} give "
                           f"{expected:.3f}, your distance of {m - n} gives {score.item():.3f}")


@exercise
def check_online_update(answer):
    """`answer((m, z, o), scores, values)`: the state after one more tile."""
    generator = torch.Generator().manual_seed(0)
    scores, values = 5 * torch.randn(12, generator=generator), torch.randn(12, 3, generator=generator)
    rising = scores.sort().values
    hidden = torch.cat([scores[:4], torch.full((3,), -torch.inf), scores[7:]])
    cases = [("one tile", scores, [12]), ("falling scores", rising.flip(0), [5, 4, 3]),
             ("rising scores", rising, [5, 4, 3]), ("a tile for each score", scores, [1] * 12),
             ("scores near 1000", scores + 1000, [4, 8]), ("a tile that is all masked", hidden, [4, 3, 5])]
    for name, s, sizes in cases:
        state = torch.tensor(-torch.inf), torch.tensor(0.0), torch.zeros(3)
        for part, v in zip(s.split(sizes), values.split(sizes), strict=True):
            state = answer(state, part, v)
            assert isinstance(state, tuple | list) and len(state) == 3, "return the new state (m, z, o)"
        m, z, o = state
        assert torch.equal(torch.as_tensor(m), s.max()), f"{name}: m must be the largest score so far"
        sum_is_right = torch.allclose(torch.as_tensor(z), (s - s.max()).exp().sum(), rtol=1e-4)
        assert sum_is_right, f"{name}: z must be the sum of exp(s - m) over all tiles"
        assert torch.allclose(o / z, s.softmax(-1) @ values, atol=1e-4), f"{name}: o / z is not softmax(s) @ v"


@exercise
def check_merge_partials(answer):
    """`answer(o1, log1, o2, log2)`: output and log-sum-exp over the keys of both parts."""
    generator = torch.Generator().manual_seed(0)
    for n_keys, cut, shift in [(6, 3, 0.0), (7, 1, 0.0), (5, 2, 500.0), (5, 2, -500.0)]:
        s, v = 3 * torch.randn(4, n_keys, generator=generator) + shift, torch.randn(n_keys, 2, generator=generator)
        parts = [(x.softmax(-1) @ y, x.logsumexp(-1)) for x, y in ((s[:, :cut], v[:cut]), (s[:, cut:], v[cut:]))]
        where = f"{cut} + {n_keys - cut} keys" + (f", scores near {shift:.0f}" if shift else "")
        _same(answer(*parts[0], *parts[1]), s.softmax(-1) @ v, s.logsumexp(-1), where)
        nothing = torch.zeros(4, 2), torch.full((4,), -torch.inf)
        _same(answer(*parts[0], *nothing), *parts[0], "a second part without keys")


def _same(merged, o, log, where):
    assert isinstance(merged, tuple | list) and len(merged) == 2, "return the output and its log-sum-exp"
    assert merged[0].shape == o.shape and merged[1].shape == log.shape, \
        f"the shapes are {tuple(merged[0].shape)} and {tuple(merged[1].shape)}, not those of the parts"
    assert not any(x.isnan().any() for x in merged), f"{where}: not a number; take exponentials of differences only"
    assert torch.allclose(merged[1], log, atol=1e-3), f"{where}: the log-sum-exp is wrong"
    assert torch.allclose(merged[0], o, atol=1e-3), f"{where}: the output is wrong"
