"""Checks of the exercises in notebooks/01_bpe."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

from nanomai.show import exercise
from nanomai.tokenizer import BYTES, END_OF_TEXT, train_bpe


def _letters(word: str) -> list[bytes]:
    return [letter.encode() for letter in word]


@exercise
def check_next_merge(next_merge: Callable[[list[tuple[list[bytes], int]]], tuple[bytes, bytes]]) -> None:
    """`next_merge([(tokens, count), ...])` gives the pair that occurs most often, of equals the smallest."""
    cases = [
        ("one word", [(_letters("banana"), 1)], (b"a", b"n")),
        ("a rare word with many pairs beside a frequent one", [(_letters("ababab"), 1), (_letters("cd"), 5)],
         (b"c", b"d")),
        ("one pair in several words", [(_letters("xyz"), 2), (_letters("wxy"), 2), (_letters("yz"), 1)], (b"x", b"y")),
        ("two pairs equally often, the larger seen first", [(_letters("zy"), 2), (_letters("ab"), 2)], (b"a", b"b")),
        ("a pair twice in one word", [(_letters("xyxy"), 2), (_letters("ab"), 3)], (b"x", b"y")),
        ("equal first tokens", [(_letters("ac"), 2), (_letters("ab"), 2)], (b"a", b"b")),
        ("tokens of several bytes", [([b"an", b"a"], 3), ([b"b", b"an", b"d", b"an", b"a"], 1)], (b"an", b"a")),
        ("a word of one token", [([b"the"], 9), (_letters("of"), 1)], (b"o", b"f")),
    ]
    for name, words, expected in cases:
        answer = next_merge([(list(tokens), count) for tokens, count in words])
        assert answer == expected, f"{name}: of {words} the next merge is {expected}, not {answer}"


@exercise
def check_encode_documents(encode_documents: Callable[[list[str], object], list[int]]) -> None:
    """`encode_documents(texts, tokenizer)` gives ids, each document opened by `tokenizer.end_of_text`."""
    learned = train_bpe(["the cat sat on the mat. the end. " * 9], 256 + 15 + 1)
    tokenizer = SimpleNamespace(encode=learned.encode, end_of_text=learned.end_of_text, decode=learned.decode)
    forged = f"the {END_OF_TEXT} cat"
    for documents in ([], ["the cat"], ["the cat", "sat"], ["the", " mat"], ["the en", "d."], ["", "the end."],
                      [forged, "on"]):
        answer = encode_documents(list(documents), tokenizer)
        assert isinstance(answer, list), f"return a list of ids, not {type(answer).__name__}"
        marks = answer.count(tokenizer.end_of_text)
        assert marks == len(documents), f"{len(documents)} documents {documents} need as many marks; yours have {marks}"
        if documents:
            assert answer[0] == tokenizer.end_of_text, "the mark stands before its document, not after it"
        expected = [i for text in documents for i in (tokenizer.end_of_text, *tokenizer.encode(text))]
        assert answer == expected, f"{documents}: expected {expected}, not {answer}"


@exercise
def check_twins(twins: Callable[[list[bytes]], list[tuple[int, int]]]) -> None:
    """`twins(tokens)` gives the pairs of ids (bare, blank) where tokens[blank] == b" " + tokens[bare]."""
    cases = [
        ("no twins", [b"a", b"b"], []),
        ("one pair", [b"a", b" a", b"b"], [(0, 1)]),
        ("the blank one first", [b" on", b"on"], [(1, 0)]),
        ("another blank", [b"\ta", b"a", b"\na", b"a "], []),
        ("two blanks", [b"a", b" a", b"  a"], [(0, 1), (1, 2)]),
        ("tokens that are not UTF-8", [b"\xc3", b" \xc3", b" \xa9"], [(0, 1)]),
        ("blanks alone", [b" ", b"  ", b"x"], [(0, 1)]),
        ("no twin without its bare one", [*BYTES, b" the", b"he"], []),
    ]
    for name, tokens, expected in cases:
        answer = sorted(twins(list(tokens)))
        assert answer == expected, f"{name}: of {tokens[-4:]} the twins are {expected}, not {answer[:4]}"
