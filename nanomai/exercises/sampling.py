"""Checks of `notebooks/07_sampling_kv_cache`."""

import torch

from nanomai import ops, sampling
from nanomai.show import exercise


@exercise
def check_penalize(answer):
    """`answer(logits, seen, penalty)`: logits (V,) with those of the ids in `seen` lowered, once each."""
    logits = torch.tensor([3.0, -2.0, 0.5, 1.0, -4.0, 0.0, 2.5])
    cases = [([0], 2.0), ([1, 4], 2.0), ([0, 1, 6], 1.3), ([2, 2, 1, 2, 1], 3.0), ([5, 6], 1.0), ([], 2.0)]
    for seen, penalty in cases:
        given = logits.clone()
        new = answer(given, seen, penalty)
        assert isinstance(new, torch.Tensor) and new.shape == logits.shape, "return a tensor of new logits (V,)"
        assert torch.equal(given, logits), "the logits that came in were changed: work on a clone"
        mask = torch.zeros(len(logits), dtype=torch.bool)
        mask[seen] = True
        assert torch.equal(new[~mask], logits[~mask]), "the logit of a token that was not seen has changed"
        assert (new <= logits + 1e-6).all(), "a penalty must never raise a logit: think of the negative ones"
        expected = sampling.penalize_repetition(logits[None], mask[None], penalty)[0]
        once = " (once for each token, however often it was seen)" if len(set(seen)) < len(seen) else ""
        assert torch.allclose(new, expected), f"seen {seen}, penalty {penalty}: expected {expected.tolist()}{once}"


@exercise
def check_min_p(answer):
    """`answer(p, share)`: p (V,) without the tokens below `share` times the largest, summing to one."""
    # powers of two, so that a token that stands exactly at the limit does so in floating point
    tables = [[0.5, 0.25, 0.125, 0.125], [0.125, 0.5, 0.0625, 0.25, 0.0625], [0.125] * 8, [0.0, 1.0, 0.0],
              [0.03125, 0.0625, 0.03125, 0.875]]
    for table in tables:
        for share in (0.05, 0.25, 0.5, 1.0):
            p = torch.tensor(table)
            given = p.clone()
            cut = answer(given, share)
            told = f"p {table}, share {share}: "
            assert isinstance(cut, torch.Tensor) and cut.shape == p.shape, "return a tensor of probabilities (V,)"
            assert torch.equal(given, p), "the probabilities that came in were changed: work on a copy"
            assert not cut.isnan().any(), f"{told}NaN: the likeliest token must always stay"
            keep = p >= share * p.max()
            for token in range(len(table)):
                kept, verb = bool(cut[token] > 0), "stay" if keep[token] else "go"
                assert kept == bool(keep[token] and p[token] > 0), f"{told}token {token} must {verb}"
            assert abs(cut.sum() - 1) < 1e-5, f"{told}what stays sums to {cut.sum():.3f}, not to one"
            expected = p * keep / p[keep].sum()
            assert torch.allclose(cut, expected), f"{told}what stays must keep its proportions"


@exercise
def check_pad_left(answer):
    """`answer(prompts)`: ids and positions (B, T) and a mask (B, T, T) for prompts of different lengths."""
    for prompts in ([[5, 6, 7], [8], [9, 10]], [[3], [4]], [[1, 2, 3, 4, 5]], [[7], [1, 2, 3, 4]]):
        width = max(map(len, prompts))
        parts = answer(prompts)
        assert isinstance(parts, tuple) and len(parts) == 3, "return ids, positions and mask"
        ids, positions, mask = parts
        for name, part in zip(("ids", "positions", "mask"), parts, strict=True):
            shape = (len(prompts), width, width)[: 3 if name == "mask" else 2]
            assert tuple(part.shape) == shape, f"{name} has the shape {tuple(part.shape)}, not {shape}"
        assert ids.dtype == torch.int64 and mask.dtype == torch.bool, "ids are whole numbers, the mask is of booleans"
        for row, prompt in enumerate(prompts):
            n, pads = len(prompt), width - len(prompt)
            told = f"a prompt of {n} in a row of {width}: "
            assert ids[row, pads:].tolist() == prompt, f"{told}the tokens must stand at the right end"
            assert positions[row, pads:].tolist() == list(range(n)), f"{told}its own first token has position 0"
            assert not mask[row, pads:, :pads].any(), f"{told}a token sees a pad"
            causal = ops.attention_mask(torch.arange(n), torch.arange(n))
            assert not (mask[row, pads:, pads:] & ~causal).any(), f"{told}a token sees the future"
            assert torch.equal(mask[row, pads:, pads:], causal), f"{told}a token must see itself and all before it"
            assert mask[row].any(-1).all(), f"{told}a pad sees nothing, and softmax gives NaN: let it see something"
