"""Is what a model of Python writes Python? Do twenty samples tokenize up to their last line, and are they its own?

    python benchmarks/samples.py runs/nano

A sample ends where its tokens run out, so an open bracket or string at its very end is no fault; an indentation that
fits no outer level, or a string that a line does not close, is. "Longest copy" is the longest piece of the sample that
stands word for word in the training text.
"""

from __future__ import annotations

import argparse
import io
import tokenize

import nanomai


def fault(text: str) -> str | None:
    """What keeps `text` from being a beginning of a Python file, or None; the last, unfinished line does not count."""
    lines = text.splitlines(keepends=True)[:-1]
    try:
        for token in tokenize.generate_tokens(io.StringIO("".join(lines)).readline):
            if token.type == tokenize.ERRORTOKEN and token.string.strip():
                return f"line {token.start[0]}: {token.string!r}"
    except tokenize.TokenError as error:
        return None if "EOF in multi-line" in str(error) or "unexpected EOF" in str(error) else str(error)
    except IndentationError as error:
        return f"line {error.lineno}: {error.msg}"
    return None


def longest_copy(sample: str, text: str) -> str:
    """The longest piece of `sample` that stands in `text`."""
    best, start = "", 0
    for end in range(1, len(sample) + 1):
        while sample[start:end] not in text:
            start += 1
        if end - start > len(best):
            best = sample[start:end]
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--show", action="store_true", help="print the samples")
    arguments = parser.parse_args()
    model, tokenizer, config = nanomai.load_run(arguments.run)
    loader = nanomai.prepare(config.data, config.model.vocab_size).loader(config.sequence_length)
    training = b"".join(tokenizer.decode_bytes(shard.tolist()) for source in loader.sources for shard in source.shards)
    training, good = training.decode("utf-8", errors="replace"), 0
    for seed in range(arguments.samples):
        text = "".join(nanomai.stream_text(model, tokenizer, "", arguments.tokens, temperature=arguments.temperature,
                                           top_p=arguments.top_p, seed=seed))
        problem, copy = fault(text), longest_copy(text, training)
        good += problem is None
        print(f"{seed:>3}  {len(text):>5} characters, longest copy {len(copy):>4}  {problem or 'tokenizes'}")
        if arguments.show:
            print(text + "\n" + "-" * 80)
    print(f"{good} of {arguments.samples} tokenize as Python up to their last line")


if __name__ == "__main__":
    main()
