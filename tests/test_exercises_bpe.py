"""The exercises of notebooks/01_bpe: the printed solutions pass, wrong answers do not, stubs are met kindly."""

import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from nanomai.exercises import bpe
from nanomai.tokenizer import END_OF_TEXT

HALF = Path(__file__).resolve().parent.parent / "notebooks" / "01_bpe.py"


def solution(name: str):
    """The function that the notebook's own <details> block defines."""
    lines = HALF.read_text(encoding="utf-8").splitlines()
    prose = "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines)
    [code] = [block for block in re.findall(r"```python\n(.*?)```", prose, re.DOTALL) if f"def {name}(" in block]
    names = {"Counter": Counter, "pairwise": pairwise}
    exec(code, names)
    return names[name]


def ignores_how_often_a_word_occurs(words):
    return solution("next_merge")([(tokens, 1) for tokens, _ in words])


def takes_the_first_of_equals(words):
    pairs = Counter()
    for tokens, count in words:
        for pair in pairwise(tokens):
            pairs[pair] += count
    return pairs.most_common(1)[0][0]


def counts_each_pair_once_a_word(words):
    return solution("next_merge")([(pair, count) for tokens, count in words for pair in set(pairwise(tokens))])


def takes_the_most_frequent_token(words):
    return Counter(token for tokens, count in words for token in tokens * count).most_common(2)


def joins_the_texts(documents, tokenizer):
    return tokenizer.encode(END_OF_TEXT.join(["", *documents]))


def marks_the_end(documents, tokenizer):
    return [i for document in documents for i in (*tokenizer.encode(document), tokenizer.end_of_text)]


def marks_between_only(documents, tokenizer):
    return solution("encode_documents")(documents, tokenizer)[1:]


def merges_across_the_border(documents, tokenizer):
    return [tokenizer.end_of_text] * len(documents) + tokenizer.encode("".join(documents))


def lets_a_text_forge_a_mark(documents, tokenizer):
    parts = [part for document in documents for part in document.split(END_OF_TEXT)]
    return solution("encode_documents")(parts, tokenizer)


def strips_any_blank(tokens):
    ids = {token: i for i, token in enumerate(tokens)}
    return [(ids[token.strip()], i) for token, i in ids.items() if token.strip() != token and token.strip() in ids]


def decodes_first(tokens):
    ids = {token.decode(errors="replace"): i for i, token in enumerate(tokens)}
    return [(i, ids[" " + token]) for token, i in ids.items() if " " + token in ids]


def the_other_way_round(tokens):
    return [(blank, bare) for bare, blank in solution("twins")(tokens)]


def twins_are_neighbours(tokens):
    return [(i, i + 1) for i, (one, two) in enumerate(pairwise(tokens)) if two == b" " + one]


CHECKS = {
    bpe.check_next_merge: ("next_merge", [ignores_how_often_a_word_occurs, takes_the_first_of_equals,
                                          counts_each_pair_once_a_word, takes_the_most_frequent_token]),
    bpe.check_encode_documents: ("encode_documents", [joins_the_texts, marks_the_end, marks_between_only,
                                                      merges_across_the_border, lets_a_text_forge_a_mark]),
    bpe.check_twins: ("twins", [strips_any_blank, decodes_first, the_other_way_round, twins_are_neighbours]),
}
WRONG = [(check, answer) for check, (_, answers) in CHECKS.items() for answer in answers]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_printed_solution_passes(check, capsys):
    assert check(solution(CHECKS[check][0]))
    assert capsys.readouterr().out == "correct\n"


@pytest.mark.parametrize("check, answer", WRONG, ids=lambda function: function.__name__)
def test_a_wrong_answer_is_rejected(check, answer, capsys):
    assert not check(answer)
    assert capsys.readouterr().out.startswith("not yet: ")


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_a_stub_is_not_solved_yet(check, capsys):
    def stub(*_):
        raise NotImplementedError

    assert not check(stub)
    assert capsys.readouterr().out == "not solved yet\n"
