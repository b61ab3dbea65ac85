"""The tokenizer against slow, plain twins; exact round trips; determinism; and each error's one line."""

import json
import os
import pickle
import re
import subprocess
import sys
import sysconfig
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import regex
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from nanomai.tokenizer import BYTES, END_OF_TEXT, PATTERN, Tokenizer, TokenizerError, get_tokenizer, train_bpe

TEXT = '''
def merge(words, pair):
    """Merge the pair in every word."""
    for word in words:
        if pair in word:
            yield word.replace(pair, "ab")
        else:
            yield word  # naïve café, 東京, 🙂🙂
'''
UNICODE = st.text(st.characters(exclude_categories=["Cs"]))
RUNS = st.text("aab \n(é", max_size=60)  # few letters: long runs, overlapping pairs, ties


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe([TEXT], 320)


def cut(text: str) -> list[list[int]]:
    return [list(word.encode()) for word in regex.findall(PATTERN, text)]


def merge(word: list[int], pair: tuple[int, int], token: int) -> list[int]:
    merged, i = [], 0
    while i < len(word):
        hit = tuple(word[i : i + 2]) == pair
        merged.append(token if hit else word[i])
        i += 2 if hit else 1
    return merged


def naive_train(text: str, n_merges: int) -> list[tuple[int, int]]:
    """The definition: count every pair of every word anew before each merge."""
    words, merges = cut(text), []
    while len(merges) < n_merges:
        counts = Counter(pair for word in words for pair in pairwise(word))
        if not counts:
            break
        merges.append(min(counts, key=lambda pair: (-counts[pair], pair)))
        words = [merge(word, merges[-1], 255 + len(merges)) for word in words]
    return merges


def naive_encode(text: str, merges: list[tuple[int, int]]) -> list[int]:
    words = cut(text)
    for token, pair in enumerate(merges, 256):
        words = [merge(word, pair, token) for word in words]
    return [token for word in words for token in word]


def spell(merges: list[tuple[int, int]]) -> list[bytes]:
    tokens = list(BYTES)
    for left, right in merges:
        tokens.append(tokens[left] + tokens[right])
    return tokens


# --- the same merges and ids as the definition

def test_training_equals_the_naive_twin_on_code():
    merges = naive_train(TEXT, 64)
    assert train_bpe([TEXT], 256 + 64, special_tokens=()).tokens == spell(merges)


@settings(max_examples=300, deadline=None)
@given(RUNS, RUNS)
def test_training_and_encoding_equal_the_naive_twins(text, other):
    merges = naive_train(text, 40)
    tokenizer = train_bpe([text], 256 + len(merges), special_tokens=())
    assert tokenizer.tokens == spell(merges)
    for sample in (text, other, text + other):
        assert tokenizer.encode(sample) == naive_encode(sample, merges)


def test_ties_go_to_the_smaller_ids():
    assert train_bpe(["zy", "ab", "ba"], 258, special_tokens=()).tokens[256:] == [b"ab", b"ba"]


def test_vocabulary_is_exact_and_in_order(tokenizer):
    assert tokenizer.vocab_size == len(tokenizer.token_bytes) == 320
    assert tokenizer.tokens[:256] == BYTES and len(set(tokenizer.tokens)) == 319
    assert tokenizer.special_tokens == {END_OF_TEXT: 319} and tokenizer.end_of_text == 319
    assert train_bpe([], 257).tokens == BYTES
    two = train_bpe([TEXT], 320, special_tokens=("<a>", "<b>"))
    assert two.special_tokens == {"<a>": 318, "<b>": 319} and two.tokens == tokenizer.tokens[:-1]
    assert train_bpe([TEXT], 320, special_tokens=[END_OF_TEXT] * 2).hash == tokenizer.hash


def test_token_bytes_add_up(tokenizer):
    ids = [*tokenizer.encode(TEXT), tokenizer.end_of_text]
    assert sum(tokenizer.token_bytes[token] for token in ids) == len(TEXT.encode())
    assert tokenizer.token_bytes[tokenizer.end_of_text] == 0


def test_progress_is_called_after_each_merge():
    calls = []
    train_bpe([TEXT], 260, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 3), (2, 3), (3, 3)]


# --- the pattern

def test_pattern_on_code():
    code = "class A:\n\n    def __init__(self, x=10):\r\n        self.x = x  # don't\n"
    assert regex.findall(PATTERN, code) == [
        "class", " A", ":\n\n    ", "def", " __init__", "(self", ",", " x", "=", "1", "0", "):\r\n        ",
        "self", ".x", " =", " x", "  ", "#", " don", "'t", "\n"]


def test_pattern_loses_no_character(tokenizer):
    every = "".join(chr(i) for i in range(0x110000) if not 0xD800 <= i <= 0xDFFF)
    assert "".join(regex.findall(PATTERN, every)) == every
    assert tokenizer.decode(tokenizer.encode(every)) == every
    assert all(tokenizer.decode(tokenizer.encode(character)) == character for character in every[::97])


@pytest.mark.parametrize("character", ["a", " ", "\n", "(", "\u0301", "\t"])
def test_a_megabyte_of_one_character_takes_seconds(character):
    start, text = time.process_time(), character * 1_000_000
    tokenizer = train_bpe([text], 270)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert time.process_time() - start < 20


def test_4096_tokens_from_the_standard_library_within_a_minute():
    paths = [path for path in Path(sysconfig.get_path("stdlib")).rglob("*.py")
             if not {"site-packages", "test", "tests", "encodings"} & set(path.parts)]
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in paths]
    start = time.process_time()
    tokenizer = train_bpe(texts, 4096)
    assert time.process_time() - start < 60
    assert tokenizer.vocab_size == 4096
    assert {b" return", b"self", b":\n        ", b"__init__"} <= set(tokenizer.tokens)


# --- round trips

@settings(max_examples=300, deadline=None)
@given(UNICODE)
def test_any_text_comes_back(text):
    for tokenizer in (get_tokenizer("bytes"), train_bpe([TEXT], 320)):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.encode_bytes(text.encode()) == ids
        assert tokenizer.encode_batch([text, TEXT]) == [ids, tokenizer.encode(TEXT)]


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.binary(), st.tuples(UNICODE, st.binary(), UNICODE).map(
    lambda parts: parts[0].encode() + parts[1] + parts[2].encode())))
def test_any_bytes_come_back(data):
    tokenizer = train_bpe([TEXT], 320)
    ids = tokenizer.encode_bytes(data)
    assert tokenizer.decode_bytes(ids) == data
    assert tokenizer.decode(ids) == data.decode("utf-8", errors="replace")
    assert sum(tokenizer.token_bytes[token] for token in ids) == len(data)


def test_bytes_that_are_not_utf8(tokenizer):
    assert tokenizer.encode_bytes(b"\xff\xed\xa0\x80def\x80") == [255, 237, 160, 128, *tokenizer.encode("def"), 128]


def test_empty_inputs(tokenizer):
    assert tokenizer.encode("") == tokenizer.encode_bytes(b"") == tokenizer.encode_batch([]) == []
    assert tokenizer.decode([]) == "" and tokenizer.decode_bytes(iter([])) == b""


def test_decode_takes_tensors(tokenizer):
    torch, np = pytest.importorskip("torch"), pytest.importorskip("numpy")
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(torch.tensor(ids)) == tokenizer.decode(np.array(ids, np.uint16)) == TEXT
    with pytest.raises(TypeError):
        tokenizer.decode([1.5])


def test_bytes_tokenizer():
    tokenizer = get_tokenizer("bytes")
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (257, 256)
    assert tokenizer.encode("é\n") == [0xC3, 0xA9, 0x0A]


# --- special tokens

def test_special_tokens_in_text_are_text_unless_asked(tokenizer):
    text = f"a{END_OF_TEXT}b"
    plain, special = tokenizer.encode(text), tokenizer.encode(text, allow_special=True)
    assert tokenizer.end_of_text not in plain
    assert special == [*tokenizer.encode("a"), tokenizer.end_of_text, *tokenizer.encode("b")]
    assert tokenizer.encode_batch([text]) == [plain]
    assert tokenizer.encode_batch([text], threads=2, allow_special=True) == [special]
    assert tokenizer.decode(plain) == tokenizer.decode(special) == text
    assert tokenizer.end_of_text not in tokenizer.encode_bytes(text.encode())


def test_special_tokens_are_never_merged():
    with_special = train_bpe([END_OF_TEXT * 100 + TEXT, f"ab{END_OF_TEXT}ab"], 320)
    assert with_special.hash == train_bpe([TEXT, "ab", "ab"], 320).hash


def test_without_special_tokens():
    tokenizer = train_bpe([TEXT], 300, special_tokens=())
    assert tokenizer.decode(tokenizer.encode(TEXT, allow_special=True)) == TEXT
    with pytest.raises(TokenizerError, match=exactly(
            "this tokenizer has no <|endoftext|>; train one with it among its special_tokens")):
        _ = tokenizer.end_of_text


# --- the same tokenizer everywhere

def test_training_does_not_depend_on_the_hash_seed():
    script = "import sys; from nanomai.tokenizer import train_bpe; print(train_bpe([sys.argv[1]], 340).hash)"
    hashes = {subprocess.run([sys.executable, "-c", script, TEXT], env={**os.environ, "PYTHONHASHSEED": seed},
                             cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True).stdout.strip()
              for seed in ("0", "1", "2")}
    assert hashes == {train_bpe([TEXT], 340).hash}


@settings(deadline=None)
@given(st.permutations(TEXT.splitlines()))
def test_training_does_not_depend_on_the_order_of_documents(lines):
    assert train_bpe(lines, 300).hash == train_bpe(TEXT.splitlines(), 300).hash


def test_hash_names_pattern_tokens_and_special_tokens():
    # a change here disowns every shard on disk
    assert get_tokenizer("bytes").hash == "dd937946a29f530543496f4f17f12948"
    base = Tokenizer("a|[^a]", BYTES, {"<x>": 256})
    others = [Tokenizer("b|[^b]", BYTES, {"<x>": 256}), Tokenizer("a|[^a]", [*BYTES, b"ab"], {"<x>": 257}),
              Tokenizer("a|[^a]", BYTES[::-1], {"<x>": 256}), Tokenizer("a|[^a]", BYTES, {"<y>": 256}),
              Tokenizer("a|[^a]", BYTES, {"<x>": 257})]
    assert len({tokenizer.hash for tokenizer in [base, *others]}) == 6
    in_order, reversed_ = {"<x>": 256, "<y>": 257}, {"<y>": 257, "<x>": 256}
    assert Tokenizer(PATTERN, BYTES, in_order).hash == Tokenizer(PATTERN, BYTES, reversed_).hash


def test_saved_and_pickled_tokenizers_are_the_same(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    pickled = pickle.loads(pickle.dumps(tokenizer))
    for copy in (Tokenizer.load(path), get_tokenizer(path), get_tokenizer(str(path)), pickled):
        assert copy.hash == tokenizer.hash and copy.tokens == tokenizer.tokens
        assert copy.encode(TEXT) == tokenizer.encode(TEXT) and copy.end_of_text == tokenizer.end_of_text
    assert repr(tokenizer) == f"Tokenizer(320 tokens, hash {tokenizer.hash})"


def test_an_interrupted_save_leaves_the_old_file(tokenizer, tmp_path, monkeypatch):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)

    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", no_space)
    with pytest.raises(OSError, match="No space left"):
        get_tokenizer("bytes").save(path)
    assert Tokenizer.load(path).hash == tokenizer.hash
    assert list(tmp_path.iterdir()) == [path]


def test_published_tokenizers_keep_their_ids(monkeypatch):
    ranks = {byte: 255 - rank for rank, byte in enumerate(BYTES)} | {b"ab": 256}
    published = tiktoken.Encoding("stub", pat_str=r"\w+|\W", mergeable_ranks=ranks,
                                  special_tokens={END_OF_TEXT: 259, "<|endofprompt|>": 262})  # gaps, as in o200k
    monkeypatch.setattr(tiktoken, "get_encoding", {"o200k_base": published}.__getitem__)
    tokenizer = get_tokenizer("o200k_base")
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (263, 259)
    assert tokenizer.encode("abc") == published.encode("abc") == [256, 255 - ord("c")]
    assert tokenizer.encode_bytes(b"\xff") == [0] and tokenizer.decode_bytes([0]) == b"\xff"
    with pytest.raises(TokenizerError, match="token id 260 is not"):
        tokenizer.decode([256, 260])


# --- errors: one line each, word for word

def exactly(message: str) -> str:
    return f"^{re.escape(message)}$"


@pytest.mark.parametrize(("texts", "vocab_size", "options", "message"), [
    ([TEXT], 256, {}, "vocab_size 256 is too small: the bytes and special tokens alone take 257"),
    (["abab", "ab"], 300, {}, "the text is too small for vocab_size 300: it gives 2 merges; "
                              "set vocab_size to 259 or less, or add text"),
    ([], 258, {}, "the text is too small for vocab_size 258: it gives 0 merges; "
                  "set vocab_size to 257 or less, or add text"),
    (["ab c"], 257, {"pattern": r"\w+"}, "the pattern skips characters of the text, which would be lost; "
                                         r"let it end in |[\s\S] and have no capturing group"),
    (["a\ud800"], 257, {}, "the text holds U+D800, a lone surrogate, which has no bytes; "
                           "read the file with errors='replace', or use encode_bytes"),
])
def test_training_errors(texts, vocab_size, options, message):
    with pytest.raises(TokenizerError, match=exactly(message)):
        train_bpe(texts, vocab_size, **options)


def test_the_largest_vocabulary_named_in_the_error_works():
    assert train_bpe(["abab", "ab"], 259).vocab_size == 259


@pytest.mark.parametrize("text", ["\ud800", "def \udfff", "\udc80"])
@pytest.mark.parametrize("allow_special", [False, True])
def test_lone_surrogates_are_refused(tokenizer, text, allow_special):
    message = (f"the text holds U+{ord(text[-1]):04X}, a lone surrogate, which has no bytes; "
               "read the file with errors='replace', or use encode_bytes")
    with pytest.raises(TokenizerError, match=exactly(message)):
        tokenizer.encode(text, allow_special)
    with pytest.raises(TokenizerError, match=exactly(message)):
        tokenizer.encode_batch([TEXT, text], allow_special=allow_special)


@pytest.mark.parametrize("bad", [320, -1, 2**40])
def test_ids_outside_the_vocabulary(tokenizer, bad):
    message = f"token id {bad} is not in this vocabulary of 320; decode with the tokenizer that encoded it"
    for decode in (tokenizer.decode, tokenizer.decode_bytes):
        with pytest.raises(TokenizerError, match=exactly(message)):
            decode([65, 319, bad])


@pytest.mark.parametrize(("name", "message"), [
    ("gpt3", "unknown tokenizer 'gpt3'; did you mean 'gpt2'? valid are bpe, bytes, gpt2, cl100k_base, o200k_base, "
             "or a saved tokenizer's file"),
    ("zzz", "unknown tokenizer 'zzz'; valid are bpe, bytes, gpt2, cl100k_base, o200k_base, "
            "or a saved tokenizer's file"),
    ("bpe", "'bpe' is trained, not loaded: call train_bpe(texts, vocab_size), or name a saved tokenizer's file"),
    ("no/such.json", "no/such.json: No such file or directory; train a tokenizer with --data.tokenizer bpe"),
    ("tokenizer-x.json", "tokenizer-x.json: No such file or directory; train a tokenizer with --data.tokenizer bpe"),
])
def test_unknown_names(name, message):
    with pytest.raises(TokenizerError, match=exactly(message)):
        get_tokenizer(name)


@pytest.mark.parametrize("name", ["gpt2", "cl100k_base", "o200k_base"])
def test_no_network(name, monkeypatch):
    def offline(_):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(TokenizerError, match=exactly(
            f"tokenizer '{name}' cannot be downloaded (ConnectionError); "
            "train one with --data.tokenizer bpe, or name a saved tokenizer's file")):
        get_tokenizer(name)


NOT_OURS = "not a nanomai tokenizer file; train one with --data.tokenizer bpe"
DAMAGED = "damaged (its contents do not match its hash); restore it from a copy, or train it again"


@pytest.mark.parametrize(("change", "message"), [
    (lambda text: text[:-20], NOT_OURS),
    (lambda text: "\ud800", NOT_OURS),
    (lambda text: "[1, 2]", NOT_OURS),
    (lambda text: '{"model": {"type": "BPE"}}', NOT_OURS),
    (lambda text: text.replace('"version": 1', '"version": 2'),
     "tokenizer version 2, but this nanomai reads 1; update nanomai"),
    (lambda text: text.replace('"hash": "', '"hash": "0'), DAMAGED),
    (lambda text: text.replace('"tokens"', '"token"'), DAMAGED),
    (lambda text: text.replace("319", "320"), DAMAGED),
    (lambda text: text.replace("319", "12"), DAMAGED),
    (lambda text: text.replace("319", '"x"'), DAMAGED),
    (lambda text: text.replace("319", "-1"), DAMAGED),
    (lambda text: text.replace(r"\\p{N}", r"\\p{N"), DAMAGED),
    (lambda text: text.replace('"AA=="', '"AQ=="'), DAMAGED),
    (lambda text: text.replace('"AA=="', '"A"'), DAMAGED),
    (lambda text: text.replace('"AA=="', "7"), DAMAGED),
    (lambda text: json.dumps(json.loads(text) | {"pattern": None}), DAMAGED),
    (lambda text: json.dumps(json.loads(text) | {"tokens": json.loads(text)["tokens"][::-1]}), DAMAGED),
    (lambda text: json.dumps(json.loads(text) | {"special_tokens": []}), DAMAGED),
])
def test_files_that_are_not_a_whole_tokenizer(tokenizer, tmp_path, change, message):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    text = path.read_text()
    assert change(text) != text
    path.write_bytes(change(text).encode("utf-8", errors="surrogatepass"))
    with pytest.raises(TokenizerError, match=exactly(f"{path}: {message}")):
        get_tokenizer(path)


def test_a_folder_is_not_a_tokenizer(tmp_path):
    with pytest.raises(TokenizerError, match=exactly(
            f"{tmp_path}: Is a directory; train a tokenizer with --data.tokenizer bpe")):
        get_tokenizer(tmp_path)


@pytest.mark.parametrize("tokens", [BYTES[1:], [*BYTES, b"a"]])
def test_a_vocabulary_holds_each_byte_and_no_token_twice(tokens):
    with pytest.raises(TokenizerError, match=exactly("the tokens must hold each of the 256 bytes, and no token twice")):
        Tokenizer(PATTERN, tokens, {})
