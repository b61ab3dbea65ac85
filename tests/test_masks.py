"""Masks against loops: causal, windows, documents, block-sparse; and models that use them, cached and not."""

import dataclasses

import pytest
import torch
from random_model import CONTEXT, TINY, V, greedy, ids, random_model

from nanomai import ops
from nanomai.architecture import SparseAttention
from nanomai.kernels import HAS_TRITON
from nanomai.masks import FlashMask, attention_mask, block_sparse_mask, causal_mask, prefix, training_mask
from nanomai.model import Transformer
from nanomai.sampling import KVCache, generate

MIXED = dataclasses.replace(TINY, n_layers=3, sparse=SparseAttention(block=3, local_blocks=2, vertical_stride=3))
SPARSE = {  # heads, block, local blocks, vertical stride
    "phi-3-small": (4, 2, 3, 8), "more heads than the stride": (5, 2, 1, 3), "local alone": (2, 4, 2, 0),
    "all columns": (2, 3, 1, 1), "one block": (3, 32, 1, 2), "blocks of one": (2, 1, 4, 4)}


def build(**changes) -> Transformer:
    return random_model(dataclasses.replace(MIXED, **changes))


def sparse_loop(queries, keys, n_heads: int, block: int, local: int, stride: int) -> torch.Tensor:
    """phi-3-small's rule, one pair of positions at a time."""
    mask = torch.zeros(n_heads, len(queries), len(keys), dtype=torch.bool)
    step = max(1, int(stride / n_heads))
    for h in range(n_heads):
        for i, q in enumerate(queries):
            for j, k in enumerate(keys):
                near = q // block - k // block < local
                column = stride > 0 and (k // block + h * step + 1) % stride == 0
                mask[h, i, j] = k <= q and (near or column)
    return mask


@pytest.mark.parametrize("case", SPARSE)
def test_block_sparse(case):
    n_heads, positions = SPARSE[case][0], torch.arange(33)
    mask = block_sparse_mask(positions, positions, *SPARSE[case])
    expected = sparse_loop(range(33), range(33), *SPARSE[case])
    assert torch.equal(mask.expand(n_heads, 33, 33), expected)
    assert mask.diagonal(dim1=-2, dim2=-1).all(), "everyone sees at least itself"
    assert torch.equal(block_sparse_mask(positions[20:], positions, *SPARSE[case]).expand(n_heads, 13, 33),
                       expected[:, 20:]), "the last queries of a cache"


def test_block_sparse_heads_differ():
    mask = block_sparse_mask(torch.arange(33), torch.arange(33), *SPARSE["phi-3-small"])
    assert len({tuple(head.flatten().tolist()) for head in mask}) == 4
    assert not torch.equal(mask.any(0), attention_mask(torch.arange(33), torch.arange(33))), "something is far"


def test_block_sparse_rows_at_their_own_positions():
    """(B, T): padding shifts a row, and a pad sees at least itself."""
    keys = torch.arange(12) - torch.tensor([[0], [5]])
    mask = block_sparse_mask(keys[:, -4:], keys, 4, 2, 2, 4)
    assert mask.shape == (2, 4, 4, 12)
    for row in range(2):
        assert torch.equal(mask[row], sparse_loop(keys[row, -4:].tolist(), keys[row].tolist(), 4, 2, 2, 4))
    assert block_sparse_mask(keys, keys, 4, 2, 1, 0).any(-1).all()


@pytest.mark.parametrize("window", [None, 1, 4, 99])
def test_attention_mask(window):
    documents = torch.tensor([[0] * 4 + [1] * 5, [2] * 9])
    positions = torch.arange(9)
    mask = attention_mask(positions, positions, window, documents, documents)
    for b in range(2):
        for i in range(9):
            for j in range(9):
                expected = 0 <= i - j < (window or 99) and documents[b, i] == documents[b, j]
                assert mask[b, 0, i, j] == expected
    assert torch.equal(training_mask(positions, window, documents, 64), mask)
    assert torch.equal(attention_mask(positions[6:], positions, window), attention_mask(positions, positions,
                                                                                         window)[6:])
    if window is None:
        q, k = torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 9, 2)
        assert torch.equal(causal_mask(q, k), attention_mask(positions[6:], positions))


@pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=pytest.mark.skipif(
    not HAS_TRITON, reason="needs Triton"))])
@pytest.mark.parametrize("window", [None, 1, 4, 99])
@pytest.mark.parametrize("with_documents", [False, True])
def test_prefix(window, with_documents, impl):
    """Two stretches of queries, each with its part of the mask and the keys up to its end, see what all of it sees."""
    documents = torch.tensor([[0] * 4 + [1] * 8, [2] * 11 + [0]]) if with_documents else None
    generator, positions = torch.Generator().manual_seed(0), torch.arange(12)
    q, k, v = (torch.randn(2, heads, 12, 16, generator=generator) for heads in (4, 2, 2))
    expected = ops.attention_plain(q, k, v, attention_mask(positions, positions, window, documents, documents))
    stretches = (slice(2, 5), slice(9, 12))
    own = torch.cat([positions[stretch] for stretch in stretches])
    mask = training_mask(positions, window, documents, 16, impl, own)
    assert isinstance(mask, FlashMask) == (impl == "triton")
    assert (mask is None) == (impl == "torch" and window is None and documents is None), "no matrix for nothing"
    for i, stretch in enumerate(stretches):
        part = prefix(mask, slice(3 * i, 3 * i + 3), stretch.stop)
        y = ops.attention(q[:, :, stretch], k[:, :, : stretch.stop], v[:, :, : stretch.stop], part)
        torch.testing.assert_close(y, expected[:, :, stretch])


def test_prefix_is_part_of_a_graph():
    reach = torch.arange(48).view(2, 2, 12)
    for mask in (FlashMask(4, reach), FlashMask(None, None), reach[:, :1] > 0, None):
        whole = torch.compile(prefix, fullgraph=True, backend="eager")(mask, slice(0, 1), 5)
        torch.testing.assert_close(whole, prefix(mask, slice(0, 1), 5))
    assert prefix(FlashMask(4, reach), slice(0, 1), 5).reach.is_contiguous(), "a kernel counts on it"


# --- models of sparse and dense layers


def test_which_layers_are_sparse():
    assert [MIXED.is_sparse(i) for i in range(3)] == [True, False, True]
    every = dataclasses.replace(MIXED, sparse=dataclasses.replace(MIXED.sparse, dense_every=3))
    assert [every.is_sparse(i) for i in range(3)] == [True, True, False]
    assert not any(TINY.is_sparse(i) for i in range(3))


def reached(model: Transformer, x: torch.Tensor, at: int, **options) -> set[int]:
    """The positions whose logits change with the token at `at`."""
    changed = x.clone()
    changed[:, at] = (changed[:, at] + 1) % V
    before, after = model(x, **options), model(changed, **options)
    return {i for i in range(x.shape[1]) if not torch.equal(before[:, i], after[:, i])}


def test_what_a_sparse_layer_reaches():
    """One layer, blocks of 3, two of them: a token is seen in its block, in the next, and by columns of some head."""
    local = SparseAttention(block=3, local_blocks=2, dense_every=99)
    x = ids(1, CONTEXT)
    assert reached(build(n_layers=1, sparse=local), x, 4) == set(range(4, 9))
    assert reached(build(n_layers=1, sparse=SparseAttention()), x, 4) == set(range(4, CONTEXT))
    for at in (1, 4, 7):  # of two heads and a stride of 4, blocks 1, 3, 5, ... are seen from everywhere
        columns = dataclasses.replace(local, vertical_stride=4)
        expected = set(range(at, CONTEXT)) if at // 3 % 2 else set(range(at, 3 * (at // 3 + 2)))
        got = reached(build(n_layers=1, n_heads=2, sparse=columns), x, at)
        assert got == expected, (at, got)


def test_documents_are_alone():
    model, x, documents = build(), ids(1, CONTEXT), torch.tensor([[0] * 10 + [1] * 14])
    assert reached(model, x, 3) > set(range(10, 14))
    assert reached(model, x, 3, document_ids=documents) == set(range(3, 10))
    assert reached(model, x, 12, document_ids=documents) == set(range(12, CONTEXT))


@pytest.mark.parametrize("chunks", [[1] * 20, [7, 1, 1, 11], [19, 1]], ids=str)
@torch.no_grad()
def test_cached_is_uncached(chunks):
    model, x = build(), ids(2, 20)
    cache = KVCache(model, 2, CONTEXT)
    cached = torch.cat([model(part, cache=cache) for part in x.split(chunks, dim=1)], dim=1)
    torch.testing.assert_close(cached, model(x))


def test_generation_is_that_without_a_cache():
    """One prompt, and several of different lengths, padded on the left."""
    model, prompts = build(), [ids(n, seed=n).tolist() for n in (2, 9, 5)]
    expected = [greedy(model, prompt, 12) for prompt in prompts]
    assert generate(model, prompts[0], 12) == expected[0]
    assert generate(model, prompts, 12) == expected
