"""The exercises of notebooks/01_bpe: the printed solutions pass, wrong answers do not, stubs are met kindly."""

from collections import Counter
from itertools import pairwise

from exercise_checks import exercise_tests, printed_solutions

from nanomai.exercises import bpe as checks
from nanomai.tokenizer import END_OF_TEXT

SOLVED = printed_solutions("01_bpe", Counter=Counter, pairwise=pairwise)


def ignores_how_often_a_word_occurs(words):
    return SOLVED.next_merge([(tokens, 1) for tokens, _ in words])


def takes_the_first_of_equals(words):
    pairs = Counter()
    for tokens, count in words:
        for pair in pairwise(tokens):
            pairs[pair] += count
    return pairs.most_common(1)[0][0]


def counts_each_pair_once_a_word(words):
    return SOLVED.next_merge([(pair, count) for tokens, count in words for pair in set(pairwise(tokens))])


def takes_the_most_frequent_token(words):
    return Counter(token for tokens, count in words for token in tokens * count).most_common(2)


def joins_the_texts(documents, tokenizer):
    return tokenizer.encode(END_OF_TEXT.join(["", *documents]))


def marks_the_end(documents, tokenizer):
    return [i for document in documents for i in (*tokenizer.encode(document), tokenizer.end_of_text)]


def marks_between_only(documents, tokenizer):
    return SOLVED.encode_documents(documents, tokenizer)[1:]


def merges_across_the_border(documents, tokenizer):
    return [tokenizer.end_of_text] * len(documents) + tokenizer.encode("".join(documents))


def lets_a_text_forge_a_mark(documents, tokenizer):
    parts = [part for document in documents for part in document.split(END_OF_TEXT)]
    return SOLVED.encode_documents(parts, tokenizer)


def strips_any_blank(tokens):
    ids = {token: i for i, token in enumerate(tokens)}
    return [(ids[token.strip()], i) for token, i in ids.items() if token.strip() != token and token.strip() in ids]


def decodes_first(tokens):
    ids = {token.decode(errors="replace"): i for i, token in enumerate(tokens)}
    return [(i, ids[" " + token]) for token, i in ids.items() if " " + token in ids]


def the_other_way_round(tokens):
    return [(blank, bare) for bare, blank in SOLVED.twins(tokens)]


def twins_are_neighbours(tokens):
    return [(i, i + 1) for i, (one, two) in enumerate(pairwise(tokens)) if two == b" " + one]


WRONG = {
    "next_merge": [(ignores_how_often_a_word_occurs, "beside a frequent one"),
                   (takes_the_first_of_equals, "the larger seen first"),
                   (counts_each_pair_once_a_word, "a pair twice in one word"),
                   (takes_the_most_frequent_token, "one word")],
    "encode_documents": [(joins_the_texts, "yours have 0"), (marks_the_end, "the mark stands before its document"),
                         (marks_between_only, "yours have 0"),
                         (merges_across_the_border, "['the cat', 'sat']: expected"),
                         (lets_a_text_forge_a_mark, "yours have 3")],
    "twins": [(strips_any_blank, "another blank"), (decodes_first, "not UTF-8"), (the_other_way_round, "one pair"),
              (twins_are_neighbours, "the blank one first")],
}

TestExercises = exercise_tests(checks, SOLVED, WRONG)
