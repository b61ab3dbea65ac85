"""What lm-evaluation-harness asks a run about: texts of its validation split, which training never saw.

    documents.jsonl    every held-out document: how many bits does a byte of it cost?
    next_line.jsonl    some lines, and four that could come next: the true one, and three from elsewhere

The tasks that read them lie in `eval_tasks/`. Nothing is stored in the repository: a run has its own split, and these
files are made of it anew.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from pathlib import Path

import numpy as np

from nanomai.data import Validation
from nanomai.tokenizer import Tokenizer

CONTEXT = 12
"""Lines before the one that is asked for: 106 tokens (the median) of nano's validation text, and it can see 256."""
QUESTIONS = 500
LENGTHS = range(12, 121)
"""Characters of a line that is asked for, without its indentation: `else:` is no riddle, and a paragraph no line."""


def held_out_documents(validation: Validation, tokenizer: Tokenizer) -> list[str]:
    """The documents of the validation split as they were written; in a shard each begins with the end-of-text token."""
    parts = (part for shard in validation.windows.shards
             for part in np.split(shard, np.flatnonzero(shard == tokenizer.end_of_text)))
    texts = (tokenizer.decode_bytes(part[1:].tolist()).decode("utf-8") for part in parts)
    return [text for text in texts if text]


def next_line_questions(texts: list[str], count: int = QUESTIONS, seed: int = 0) -> list[dict]:
    """`count` places in the texts, or as many as there are. The wrong lines are indented as the true one is, so that
    counting spaces does not help, and no two of the four are alike."""
    draw, places, alike = random.Random(seed), [], defaultdict(set)
    for lines in (text.split("\n") for text in texts):
        for i, line in enumerate(lines):
            if len(line.strip()) in LENGTHS:
                alike[_indentation(line)].add(line)
                if any(map(str.strip, before := lines[max(0, i - CONTEXT) : i])):
                    places.append(("\n".join(before), line))
    pools = {indentation: sorted(lines) for indentation, lines in alike.items()}  # a set has no order of its own
    questions = []
    for context, line in draw.sample(places, len(places)):
        pool = pools[_indentation(line)]
        if len(pool) >= 4 and len(questions) < count:
            choices = [line, *[other for other in draw.sample(pool, 4) if other != line][:3]]
            draw.shuffle(choices)
            questions.append({"context": context, "choices": choices, "answer": choices.index(line)})
    return questions


def _indentation(line: str) -> str:
    return line[: len(line) - len(line.lstrip())]


def write_lines(path: Path, rows: list[dict]) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
