"""Checks of `notebooks/03_attention`."""

import torch

from nanomai import ops
from nanomai.show import exercise


@exercise
def check_window_mask(answer):
    """`answer(query_positions, key_positions, window)`: True where 0 <= query - key < window."""
    for first, n_queries, n_keys, window in [(0, 5, 5, 2), (0, 6, 6, 1), (0, 3, 3, 9), (4, 3, 7, 3), (7, 1, 8, 4)]:
        query, key = torch.arange(first, first + n_queries), torch.arange(n_keys)
        mask = answer(query, key, window)
        assert isinstance(mask, torch.Tensor) and mask.dtype == torch.bool, "return a tensor of booleans"
        assert mask.shape == (n_queries, n_keys), f"the shape is {tuple(mask.shape)}, not (queries, keys)"
        distance = query[:, None] - key
        assert not mask[distance < 0].any(), "a query reads a key that comes after it"
        assert mask[distance == 0].all(), "a query must see its own position"
        assert not mask[distance >= window].any(), f"with a window of {window}, a key {window} or more back is seen"
        assert (mask == ops.attention_mask(query, key, window)).all(), f"a key inside the window of {window} is hidden"


@exercise
def check_alibi_bias(answer):
    """`answer(n_heads, length)`: the bias (H, T, T) that gives ALiBi's weights after mask and softmax."""
    for n_heads, length in [(8, 5), (2, 9), (4, 1), (1, 6)]:
        bias = answer(n_heads, length)
        assert bias.shape == (n_heads, length, length), f"the shape is {tuple(bias.shape)}, not (H, T, T)"
        future = torch.ones(length, length).triu(1).bool()
        # a number added to a whole row changes no weight, so only differences within the visible row count
        steps = (bias[:, :, 1:] - bias[:, :, :-1]).masked_fill(future[:, 1:], 0)
        assert (steps >= 0).all(), "a nearer key must never get the smaller bias: check the sign"
        slopes = [2.0 ** (-8 * h / n_heads) for h in range(1, n_heads + 1)]
        for h, slope in enumerate(slopes):
            expected = torch.full_like(steps[h], slope).masked_fill(future[:, 1:], 0)
            told = f"head {h + 1} of {n_heads}: each step back must cost {slope:.4f}"
            assert torch.allclose(steps[h], expected), told


@exercise
def check_permute_heads(answer):
    """`answer(wq, wk, wv, wo, order)`: weights with the heads in another order, and the same function."""
    generator = torch.Generator().manual_seed(0)
    for order, head_dim, d_model in [([2, 0, 1], 4, 10), ([1, 3, 0, 2], 3, 12)]:
        n = len(order) * head_dim
        wq, wk, wv = torch.randn(3, n, d_model, generator=generator)
        wo = torch.randn(d_model, n, generator=generator)
        x = torch.randn(2, 7, d_model, generator=generator)
        new = answer(wq, wk, wv, wo, order)
        assert len(new) == 4 and [w.shape for w in new] == [w.shape for w in (wq, wk, wv, wo)], \
            "return four weights of the shapes that came in"
        for name, old_w, new_w in zip(("wq", "wk", "wv"), (wq, wk, wv), new[:3], strict=True):
            expected = torch.cat([old_w[h * head_dim : (h + 1) * head_dim] for h in order])
            assert torch.equal(new_w, expected), f"{name}: its head h must be the old head order[h], row by row"
        close = torch.allclose(_layer(x, *new, len(order)), _layer(x, wq, wk, wv, wo, len(order)), atol=1e-4)
        assert close, "the layer's output changed: wo must follow its heads"


def _layer(x, wq, wk, wv, wo, n_heads):
    q, k, v = ((x @ w.T).unflatten(-1, (n_heads, -1)).transpose(1, 2) for w in (wq, wk, wv))
    return ops.attention(q, k, v).transpose(1, 2).flatten(-2) @ wo.T


