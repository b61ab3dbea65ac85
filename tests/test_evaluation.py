"""Bits per byte against the definition, however the text is cut into batches."""

import gzip
import lzma
import math
from types import SimpleNamespace

import pytest
import torch

from nanomai.config import ModelConfig
from nanomai.data import make_batch
from nanomai.evaluation import EvaluationError, compressed_bits_per_byte, evaluate, evaluate_text, validation_text
from nanomai.model import build_model
from nanomai.tokenizer import get_tokenizer, train_bpe

TEXT = "def f(x):\n    return 'naïve 東京 🙂', x\n" * 3


def build(vocab_size: int, context_length=16, even=False):
    model = build_model(ModelConfig(n_layers=1, d_model=16, n_heads=2, n_kv_heads=1, head_dim=8, d_ff=24,
                                    vocab_size=vocab_size, context_length=context_length, init_std=0.5))
    if even:  # every token has the same probability
        torch.nn.init.zeros_(model.embed.weight)
    return model.eval()


@torch.no_grad()
def nats(model, ids: list[int]) -> list[float]:
    """Of each token after the first, from log-probabilities one by one."""
    log_p = model(torch.tensor([ids[:-1]]))[0].log_softmax(-1)
    return [-log_p[i, token].item() for i, token in enumerate(ids[1:])]


def test_an_even_model_needs_log_v():
    tokenizer = get_tokenizer("bytes")
    result = evaluate_text(build(257, even=True), tokenizer, TEXT)
    n = len(TEXT.encode())
    assert (result.tokens, result.bytes) == (n, n)
    assert result.loss == pytest.approx(math.log(257)) and result.bits_per_byte == pytest.approx(math.log2(257))


def test_text_is_read_in_windows_of_the_context():
    tokenizer = train_bpe([TEXT], 280)
    model, ids = build(tokenizer.vocab_size), [tokenizer.end_of_text, *tokenizer.encode(TEXT)]
    expected = [x for start in range(0, len(ids) - 1, 16) for x in nats(model, ids[start : start + 17])]
    for batch_size in (1, 2, 100):
        result = evaluate_text(model, tokenizer, TEXT, batch_size)
        assert (result.tokens, result.bytes) == (len(ids) - 1, len(TEXT.encode()))
        assert result.loss == pytest.approx(sum(expected) / len(expected), rel=1e-5)
        assert result.bits_per_byte == pytest.approx(sum(expected) / math.log(2) / len(TEXT.encode()), rel=1e-5)


def test_one_token():
    tokenizer = get_tokenizer("bytes")
    result = evaluate_text(build(257), tokenizer, "a")
    assert (result.tokens, result.bytes) == (1, 1)
    assert result.loss == pytest.approx(nats(build(257), [tokenizer.end_of_text, ord("a")])[0], rel=1e-5)


def test_documents_are_apart_and_their_ends_cost_bits_but_bring_no_bytes():
    tokenizer = get_tokenizer("bytes")
    model, end = build(257), tokenizer.end_of_text
    first, second = [end, *b"abc"], [end, *b"de"]
    batch = make_batch(torch.tensor([[*first, *second, end]]).numpy(), end)
    result = evaluate(model, tokenizer, [batch])
    expected = [*nats(model, [*first, end]), *nats(model, [*second, end])]  # the second does not see the first
    assert (result.tokens, result.bytes) == (7, 5)
    assert result.loss == pytest.approx(sum(expected) / 7, rel=1e-5)
    assert result.bits_per_byte == pytest.approx(sum(expected) / math.log(2) / 5, rel=1e-5)


@pytest.mark.parametrize("measure", [lambda m, t: evaluate_text(m, t, ""), lambda m, t: evaluate(m, t, [])])
def test_nothing_to_measure(measure):
    with pytest.raises(EvaluationError, match=r"^nothing to evaluate: the text has fewer than two tokens$"):
        measure(build(257), get_tokenizer("bytes"))


def test_compressors():
    text = TEXT.encode() * 20
    levels = compressed_bits_per_byte(text)
    assert levels == {"gzip -9": 8 * len(gzip.compress(text, 9)) / len(text),
                      "xz -9": 8 * len(lzma.compress(text, preset=9)) / len(text)}


def test_the_validation_text_comes_back_whole():
    tokenizer = train_bpe([TEXT], 270)
    ids = tokenizer.encode_bytes("東".encode())
    shards = [torch.tensor([tokenizer.end_of_text, *tokenizer.encode("one"), tokenizer.end_of_text, *ids[:1]]).numpy(),
              torch.tensor([*ids[1:], *tokenizer.encode(" two")]).numpy()]
    validation = SimpleNamespace(windows=SimpleNamespace(shards=shards))
    assert validation_text(validation, tokenizer) == "one東 two".encode()
