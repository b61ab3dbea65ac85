"""Sampling: the cache against none, every filter against its definition, and text that is never cut in a character."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_model import CONTEXT, TINY, V, greedy, ids, random_model

from nanomai import sampling
from nanomai.model import Transformer
from nanomai.sampling import KVCache, SamplingError, choose, generate, penalize_repetition, probabilities, stream
from nanomai.tokenizer import train_bpe

FAMILIES = {"rope": {}, "window": {"sliding_window": 4}, "learned": {"position": "learned", "norm": "layernorm"}}


def build(name="rope", **changes) -> Transformer:
    return random_model(dataclasses.replace(TINY, **FAMILIES[name] | changes), torch.float32)


def logits(rows=4, seed=0) -> torch.Tensor:
    return 3 * torch.randn(rows, V, generator=torch.Generator().manual_seed(seed))


# --- the cache


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunks", [[1] * 12, [5, 1, 1, 5], [12], [1, 10, 1]], ids=str)
@torch.no_grad()
def test_cached_is_uncached(family, chunks):
    model, x = build(family), ids(3, 12)
    cache = KVCache(model, 3, CONTEXT)
    cached = torch.cat([model(part, cache=cache) for part in x.split(chunks, dim=1)], dim=1)
    assert cache.length == 12
    torch.testing.assert_close(cached, model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_padded_row_is_as_if_alone(family):
    model, lengths = build(family), [3, 9, 1, 9]
    texts = [ids(n, seed=n).tolist() for n in lengths]
    cache, fresh = sampling._prefill(model, texts, CONTEXT)
    together = [model(fresh, cache=cache, last_only=True)[:, -1]]
    more = ids(4, 3, seed=7)
    together += [model(more[:, i : i + 1], cache=cache)[:, -1] for i in range(3)]
    for row, text in enumerate(texts):
        for step, seen in enumerate(together):
            alone = model(torch.tensor([text + more[row, :step].tolist()]))[0, -1]
            torch.testing.assert_close(seen[row], alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_cache_has_the_models_dtype():
    model, x = build(), ids(2, 9)
    model.compute_dtype = torch.bfloat16
    cache = KVCache(model, 2, CONTEXT)
    assert cache.layers[0].keys.dtype == torch.bfloat16
    cached = torch.cat([model(part, cache=cache) for part in x.split(4, dim=1)], dim=1)
    assert (cached - model(x)).norm() < 0.03 * model(x).norm()


# --- whole texts


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_the_definition(family):
    model, prompts = build(family), [ids(n, seed=n).tolist() for n in (2, 7, 1)]
    expected = [greedy(model, prompt, 12) for prompt in prompts]
    assert generate(model, prompts, 12) == expected, "a batch of different lengths, one by one"
    assert generate(model, prompts[0], 12) == expected[0]
    assert generate(model, prompts[0], 12, temperature=1.0, top_k=1) == expected[0]
    assert generate(model, prompts[0], 12, temperature=1e-30, seed=0) == expected[0], "the limit of the cold"
    assert generate(model, prompts[0], 0) == []
    stop = expected[1][4]
    cut = expected[1].index(stop)
    stopped = generate(model, prompts, 12, stop_tokens=[stop])
    assert stopped[1] == expected[1][:cut]
    assert [s == e[: len(s)] for s, e in zip(stopped, expected, strict=True)] == [True] * 3


def test_a_stopped_row_is_silent_while_the_others_go_on():
    model, prompts = build(), [ids(n, seed=n).tolist() for n in (2, 7)]
    first, second = generate(model, prompts, 10)
    stop = next(token for token in first if token not in second)
    steps = list(stream(model, prompts, 10, temperature=0.0, stop_tokens=[stop]))
    assert len(steps) == 10 and [step[1] for step in steps] == second
    at = first.index(stop)
    assert [step[0] for step in steps] == first[:at] + [None] * (10 - at)


@pytest.mark.parametrize("family", FAMILIES)
def test_beyond_the_context(family):
    """When the cache is full, the last half is read again: token by token the same as that rule spelled out."""
    model, prompt = build(family), ids(5).tolist()
    assert generate(model, prompt, 3 * CONTEXT) == greedy(model, prompt, 3 * CONTEXT)


def test_a_cache_is_as_large_as_the_text():
    """Not as the context, which may be 131,072 positions in every layer."""
    model, made = build(context_length=2**62), []
    cache = sampling.KVCache
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "KVCache", lambda *a: made.append(cache(*a)) or made[-1])
        assert generate(model, [1, 2, 3], 5) == generate(build(), [1, 2, 3], 5)
    assert [c.layers[0].keys.shape[2] for c in made[:1]] == [8]


def test_a_prompt_longer_than_the_context_keeps_its_end():
    model, long = build(), ids(3 * CONTEXT).tolist()
    assert generate(model, long, 1) == generate(model, long[-(CONTEXT - 1) :], 1)
    assert generate(model, long[: CONTEXT], 1) == generate(model, long[1:CONTEXT], 1)
    assert len(generate(build(context_length=1), [1, 2, 3], 4)) == 4


def test_ids_beyond_the_tokenizer_are_never_chosen():
    model, prompt = build(), [1, 2, 3]
    likeliest = generate(model, prompt, 1)[0]
    for options in ({}, {"temperature": 1.0, "top_k": 5, "seed": 0}, {"repetition_penalty": 1.5}):
        assert max(generate(model, prompt, 20, vocab_size=likeliest, **options)) < likeliest


def test_a_tensor_of_prompts():
    model, prompts = build(), ids(2, 5)
    assert generate(model, prompts, 4) == generate(model, prompts.tolist(), 4)
    assert generate(model, prompts[0], 4) == generate(model, prompts[0].tolist(), 4)


def test_seeds():
    model, prompt = build(), [1, 2, 3]

    def write(seed):
        return generate(model, prompt, 15, temperature=1.0, seed=seed)

    before = torch.get_rng_state()
    assert write(0) == write(0) and len({tuple(write(seed)) for seed in range(5)}) == 5
    assert torch.equal(before, torch.get_rng_state()), "a seed leaves the global generator alone"
    torch.manual_seed(3)
    once = write(None)
    torch.manual_seed(3)
    assert once == write(None) != write(None)


# --- the filters, each against its definition


def kept(p: torch.Tensor) -> list[set[int]]:
    return [set(row.nonzero().flatten().tolist()) for row in p]


@pytest.mark.parametrize("k", [1, 2, V - 1, V, V + 9])
def test_top_k(k):
    p = probabilities(logits(), top_k=k)
    for row, keep in zip(logits(), kept(p), strict=True):
        assert keep == set(sorted(range(V), key=lambda i, row=row: -row[i])[:k])
    torch.testing.assert_close(p.sum(-1), torch.ones(4))


@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.7, 0.999, 1.0])
def test_top_p(top_p):
    exact = logits().double()
    for row, keep in zip(exact.softmax(-1), kept(probabilities(exact, top_p=top_p)), strict=True):
        expected, mass = set(), 0.0
        for i in sorted(range(V), key=lambda i, row=row: -row[i]):
            if mass < top_p:
                expected.add(i)
                mass += row[i].item()
        assert keep == expected


def test_top_p_of_equals_keeps_no_more_than_needed():
    assert kept(probabilities(torch.zeros(1, 8), top_p=0.5)) == [{0, 1, 2, 3}]


@pytest.mark.parametrize("min_p", [1e-6, 0.1, 0.5, 1.0])
def test_min_p(min_p):
    for row, keep in zip(logits().softmax(-1), kept(probabilities(logits(), min_p=min_p)), strict=True):
        assert keep == {i for i in range(V) if row[i] >= min_p * row.max()}


def test_all_filters_together():
    """In this order: temperature, top-k, top-p of what is left, min-p of what is left."""
    p = probabilities(logits(), temperature=0.7, top_k=10, top_p=0.9, min_p=0.05)
    narrowed = probabilities(logits(), temperature=0.7, top_k=10).log()
    torch.testing.assert_close(p, probabilities(probabilities(narrowed, top_p=0.9).log(), min_p=0.05))
    torch.testing.assert_close(p.sum(-1), torch.ones(4))


def test_temperature():
    torch.testing.assert_close(probabilities(logits(), temperature=2.0), (logits() / 2).softmax(-1))
    assert torch.equal(choose(logits(), temperature=0.0), logits().argmax(-1))
    for cold in (1e-4, 1e-30, 1e-38):
        assert torch.equal(choose(1e3 * logits(), temperature=cold), logits().argmax(-1))
    torch.testing.assert_close(probabilities(logits(), temperature=1e9), torch.full((4, V), 1 / V))


def test_draws_follow_the_probabilities():
    rows = logits(1).expand(20_000, -1)
    draws = choose(rows, temperature=1.5, top_k=5, generator=torch.Generator().manual_seed(0))
    counted = torch.bincount(draws, minlength=V) / 20_000
    torch.testing.assert_close(counted, probabilities(logits(1), 1.5, 5)[0], rtol=0, atol=0.015)


def test_repetition_penalty():
    before, seen = torch.tensor([[2.0, -2.0, 3.0, 0.0]]), torch.tensor([[True, True, False, True]])
    assert penalize_repetition(before, seen, 4.0).tolist() == [[0.5, -8.0, 3.0, 0.0]]
    model, prompt = build(), [1, 2, 3]
    written = generate(model, prompt, 40, repetition_penalty=1e9)
    assert len({*prompt, *written}) == 43, "no token twice, and none of the prompt"
    assert generate(model, prompt, 10, repetition_penalty=1.0) == generate(model, prompt, 10)


# --- text


@given(st.text(st.characters(exclude_categories=["Cs"])), st.integers(1, 3))
@settings(max_examples=200, deadline=None)
def test_pieces_are_whole_characters(text, size):
    data, pending, pieces = text.encode(), b"", []
    for start in range(0, len(data), size):
        pending += data[start : start + size]
        whole = sampling._whole_characters(pending)
        pieces.append(pending[:whole].decode())  # strictly: half a character would raise
        pending = pending[whole:]
        assert len(pending) <= 3
    assert "".join(pieces) == text and not pending


@given(st.binary(max_size=12))
def test_bytes_that_are_no_text_are_not_held_back_for_ever(data):
    assert len(data) - sampling._whole_characters(data) <= 3


def test_stream_text(monkeypatch):
    tokenizer = train_bpe(["words and more words, naïve 東京"], 270)
    model = build(vocab_size=tokenizer.vocab_size)
    script = [*tokenizer.encode_bytes("é東🙂!".encode()), tokenizer.end_of_text, 7]

    def scripted(model, prompts, max_tokens, stop_tokens=(), **options):
        assert prompts == [[tokenizer.end_of_text, *tokenizer.encode("So")]]
        assert options == {"vocab_size": 270, "seed": 3}
        for token in script[:max_tokens]:
            if token in stop_tokens:
                return
            yield [token]

    monkeypatch.setattr(sampling, "stream", scripted)
    assert "".join(sampling.stream_text(model, tokenizer, "So", 99, seed=3)) == "é東🙂!"
    assert all("�" not in piece for piece in sampling.stream_text(model, tokenizer, "So", 99, seed=3))
    cut = "".join(sampling.stream_text(model, tokenizer, "So", 1, seed=3))
    assert cut == tokenizer.decode_bytes(script[:1]).decode(errors="replace"), "the end may be half a character"


# --- mistakes

OPTIONS = ("max_tokens, temperature and top_k must not be negative, top_p must lie above 0, up to 1, "
           "min_p from 0 to 1, and repetition_penalty above 0")
NO_TOKEN = "every prompt needs at least one token; begin with the tokenizer's end_of_text"
OUTSIDE = f"a prompt holds a token outside the vocabulary of {V}"


@pytest.mark.parametrize("prompts, options, message", [
    ([], {}, NO_TOKEN), ([[]], {}, NO_TOKEN), ([[1], []], {}, NO_TOKEN), ([V], {}, OUTSIDE), ([[1, -1]], {}, OUTSIDE),
    *(([1], option, OPTIONS) for option in (
        {"max_tokens": -1}, {"temperature": -0.1}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}, {"min_p": 1.1},
        {"min_p": -0.1}, {"repetition_penalty": 0.0}, {"temperature": float("nan")}))], ids=str)
def test_mistakes(prompts, options, message):
    with pytest.raises(SamplingError) as caught:
        generate(build(), prompts, **options)
    assert str(caught.value) == message
