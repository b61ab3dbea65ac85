"""Text to tokens and back: byte-level BPE, trained here in plain Python and run by tiktoken's Rust core.

Byte-pair encoding begins with the 256 bytes and adds, again and again, the most frequent pair of neighbouring tokens
as a new token (Sennrich et al. 2016, arXiv 1508.07909). Bytes rather than characters (Radford et al. 2019, GPT-2)
leave no text without a code. Merges stay inside the words that a regular expression cuts first.

A token's id is its rank: bytes 0..255, then the merges in the order they were learned, then the special tokens.
"""

from __future__ import annotations

import base64
import difflib
import hashlib
import heapq
import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from operator import add, index
from pathlib import Path

import regex
import tiktoken

from nanomai.files import write_atomically

END_OF_TEXT = "<|endoftext|>"
FORMAT, VERSION = "nanomai-tokenizer", 1
BYTES = [bytes([value]) for value in range(256)]
PUBLISHED = ("gpt2", "cl100k_base", "o200k_base")

# Every character fits one of the five pieces, so no text is lost, whichever version of Unicode cuts it.
# There is no look-around: Rust then cuts in linear time and cannot overflow on a megabyte of blanks.
PATTERN = "|".join((
    r"[^\r\n\p{L}\p{M}\p{N}_]?[\p{L}\p{M}_]+",  # a word or identifier with one blank or mark before it: " def", ".join"
    r"\p{N}",  # each digit alone: a small model cannot learn a thousand numbers one by one
    r" ?[^\s\p{L}\p{M}\p{N}_]+(?:[\r\n]+[ \t]*)?",  # marks, with the line end and indentation after them: "):\n    "
    r"[\r\n]+[ \t]*",  # line ends with the next line's indentation: a block's depth is then one token: "\n        "
    r"[^\S\r\n]+",  # other blanks
))


class TokenizerError(ValueError):
    """Text, ids or a file that a tokenizer cannot take: one line that says what to do."""


class Tokenizer:
    """Byte-level BPE over fixed tokens; immutable, picklable, and safe to share between threads.

    `tokens` are the ordinary tokens' bytes in rank order, which is the order of the merges; `special_tokens` maps
    names to ids above them. `token_bytes[id]` counts the bytes of a token's text, 0 for a special one. `hash` names
    the tokenizer for ever: two with the same hash give the same ids.
    """

    def __init__(self, pattern: str, tokens: list[bytes], special_tokens: dict[str, int]):
        if len(set(tokens)) != len(tokens) or not set(BYTES) <= set(tokens):
            raise TokenizerError("the tokens must hold each of the 256 bytes, and no token twice")
        if "" in special_tokens or len(set(special_tokens.values()) - {*range(len(tokens))}) != len(special_tokens):
            raise TokenizerError(f"special tokens need names, and distinct ids from {len(tokens)} on")
        self.pattern, self.tokens, self.special_tokens = pattern, tokens, special_tokens
        self.vocab_size = max([len(tokens) - 1, *special_tokens.values()]) + 1  # published ids have gaps
        self.token_bytes = [len(token) for token in tokens] + [0] * (self.vocab_size - len(tokens))
        self.hash = _digest(pattern, tokens, special_tokens)
        ranks = {token: rank for rank, token in enumerate(tokens)}
        self._byte_ids = [ranks[byte] for byte in BYTES]
        self._encoding = tiktoken.Encoding(
            f"nanomai-{self.hash}", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special_tokens)

    def __repr__(self) -> str:
        return f"Tokenizer({self.vocab_size} tokens, hash {self.hash})"

    @property
    def end_of_text(self) -> int:
        """The id that separates documents. Raises TokenizerError where there is none."""
        if END_OF_TEXT not in self.special_tokens:
            raise TokenizerError(f"this tokenizer has no {END_OF_TEXT}; train one with it among its special_tokens")
        return self.special_tokens[END_OF_TEXT]

    @property
    def opening(self) -> list[int]:
        """The ids before a text: the end of a text before."""
        return [self.end_of_text]

    @property
    def stop_tokens(self) -> list[int]:
        """The ids that end a text; none where there is no end of text."""
        return [number for name, number in self.special_tokens.items() if name == END_OF_TEXT]

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Ids of `text`. "<|endoftext|>" inside it is plain text, and becomes the special id only by allow_special.

        Raises TokenizerError for a lone surrogate, which has no bytes in UTF-8.
        """
        _utf8(text)
        if allow_special:
            return self._encoding.encode(text, allowed_special="all")
        return self._encoding.encode_ordinary(text)

    def encode_batch(self, texts: Iterable[str], threads: int = 0, allow_special: bool = False) -> list[list[int]]:
        """`encode` of each text, in order. `threads` texts at once; 0 takes one for each core."""
        with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
            return list(pool.map(lambda text: self.encode(text, allow_special), texts))

    def encode_bytes(self, data: bytes) -> list[int]:
        """Ids of any bytes at all: UTF-8 as `encode` gives it, and each byte that is not UTF-8 by itself."""
        text = data.decode("utf-8", errors="surrogateescape")  # a byte that is not UTF-8 becomes U+DC00 + its value
        ids: list[int] = []
        for part in regex.findall(r"[\uDC80-\uDCFF]+|[^\uDC80-\uDCFF]+", text):
            escaped = "\udc80" <= part[0] <= "\udcff"
            ids += [self._byte_ids[ord(character) - 0xDC00] for character in part] if escaped else self.encode(part)
        return ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of `ids` (any integers, also a tensor), special ones by name. Raises TokenizerError for others."""
        ids = [index(token) for token in ids]
        try:
            return self._encoding.decode_bytes(ids)
        except (KeyError, OverflowError):
            known = {*range(len(self.tokens)), *self.special_tokens.values()}
            bad = next(token for token in ids if token not in known)
            raise TokenizerError(f"token id {bad} is not in this vocabulary of {self.vocab_size}; "
                                 "decode with the tokenizer that encoded it") from None

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are not UTF-8, as where a character is cut in two, become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def save(self, path: str | Path) -> None:
        """Write a JSON file, tokens in base64 and rank order. It appears whole or not at all."""
        saved = {"format": FORMAT, "version": VERSION, "hash": self.hash, "pattern": self.pattern,
                 "special_tokens": self.special_tokens,
                 "tokens": [base64.b64encode(token).decode() for token in self.tokens]}
        write_atomically(Path(path), (json.dumps(saved, indent=1) + "\n").encode())

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read what `save` wrote and verify its hash. Raises TokenizerError for any other file."""
        saved = _read_saved(path)
        try:
            tokens = [base64.b64decode(token, validate=True) for token in saved["tokens"]]
            tokenizer = cls(saved["pattern"], tokens, saved["special_tokens"])
            intact = tokenizer.hash == saved["hash"]
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            intact = False
        if not intact:
            raise TokenizerError(f"{path}: damaged (its contents do not match its hash); "
                                 "restore it from a copy, or train it again")
        return tokenizer


def get_tokenizer(name_or_path: str | Path) -> Tokenizer:
    """A tokenizer by name (`gpt2`, `cl100k_base`, `o200k_base`; `bytes`: one token a byte) or by its saved file.

    Raises TokenizerError for an unknown name, a file that is no tokenizer, or a published one out of reach.
    """
    name, path = str(name_or_path), Path(name_or_path)
    if name == "bytes":
        return Tokenizer(PATTERN, BYTES, {END_OF_TEXT: 256})
    if name in PUBLISHED:
        try:
            encoding = tiktoken.get_encoding(name)
        except (OSError, ValueError) as error:  # no network, or a download that is not the published file
            raise TokenizerError(f"tokenizer {name!r} cannot be downloaded ({type(error).__name__}); "
                                 "train one with --data.tokenizer bpe, or name a saved tokenizer's file") from None
        tokens = sorted(encoding._mergeable_ranks, key=encoding._mergeable_ranks.get)
        return Tokenizer(encoding._pat_str, tokens, dict(encoding._special_tokens))
    if name == "bpe":
        raise TokenizerError("'bpe' is trained, not loaded: call train_bpe(texts, vocab_size), "
                             "or name a saved tokenizer's file")
    if path.is_file() or path.suffix == ".json" or len(path.parts) > 1:
        return Tokenizer.load(path)
    near = difflib.get_close_matches(name, ("bpe", "bytes", *PUBLISHED), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    raise TokenizerError(f"unknown tokenizer {name!r}{hint} valid are bpe, bytes, {', '.join(PUBLISHED)}, "
                         "or a saved tokenizer's file")


def train_bpe(texts: Iterable[str], vocab_size: int, pattern: str = PATTERN,
              special_tokens: Iterable[str] = (END_OF_TEXT,),
              progress: Callable[[int, int], None] | None = None) -> Tokenizer:
    """Learn a tokenizer of exactly `vocab_size` tokens: 256 bytes, the merges, the special tokens.

    Of pairs that occur equally often, the one with the smaller ids is merged first, so the result depends on how often
    each word occurs in `texts` and on nothing else. Special tokens in the texts are left out and cut words in two.
    `progress(done, total)` is called after each merge. Raises TokenizerError if `vocab_size` has no room for the bytes
    and special tokens, if the texts have too few pairs to fill it, or if `pattern` skips characters.
    """
    special_tokens = tuple(dict.fromkeys(special_tokens))
    fixed = len(BYTES) + len(special_tokens)
    if vocab_size < fixed:
        raise TokenizerError(f"vocab_size {vocab_size} is too small: the bytes and special tokens alone take {fixed}")
    words = _count_words(texts, pattern, special_tokens)
    tokens = list(BYTES)
    for left, right in _learn_merges(words, vocab_size - fixed, progress):
        tokens.append(tokens[ord(left)] + tokens[ord(right)])
    largest = len(tokens) + len(special_tokens)
    if largest < vocab_size:
        raise TokenizerError(f"the text is too small for vocab_size {vocab_size}: it gives {len(tokens) - 256} merges; "
                             f"set vocab_size to {largest} or less, or add text")
    return Tokenizer(pattern, tokens, {name: len(tokens) + i for i, name in enumerate(special_tokens)})


def _count_words(texts: Iterable[str], pattern: str, special_tokens: tuple[str, ...]) -> Counter[bytes]:
    """How often each word occurs. There are far fewer distinct words than words, which is why training is quick."""
    find_words = regex.compile(pattern).findall
    special = regex.compile("|".join(map(regex.escape, special_tokens)) or r"(?!)")  # (?!) matches nowhere
    words, n_characters = Counter(), 0
    for text in texts:
        for part in special.split(text):
            words.update(find_words(part))
            n_characters += len(part)
    if sum(len(word) * count for word, count in words.items()) != n_characters:
        raise TokenizerError("the pattern skips characters of the text, which would be lost; "
                             r"let it end in |[\s\S] and have no capturing group")
    return Counter({_utf8(word): count for word, count in words.items()})


def _learn_merges(words: Counter[bytes], n_merges: int, progress: Callable | None) -> list[str]:
    """The first `n_merges` pairs to merge, in order; fewer where no pair is left.

    A word is held as a string with one character for each token, chr(id): a pair is then two characters, and
    str.replace merges it. A merge visits only the words that hold its pair, and changes only the counts beside it.
    """
    repeats, words = list(words.values()), [word.decode("latin-1") for word in words]
    counts, holders = defaultdict(int), defaultdict(list)  # of each pair: occurrences; words that hold it, or once did
    for k, word in enumerate(words):
        for pair in map(add, word, word[1:]):
            counts[pair] += repeats[k]
            holders[pair].append(k)
    queue = sorted((-count, pair) for pair, count in counts.items())  # a sorted list is a heap
    merges: list[str] = []
    while queue and len(merges) < n_merges:
        queued, pair = heapq.heappop(queue)
        if counts[pair] != -queued:  # other merges took some of it since it was queued; a count never grows again
            if counts[pair]:
                heapq.heappush(queue, (-counts[pair], pair))
            continue
        token, born = chr(len(BYTES) + len(merges)), set()
        for k in set(holders.pop(pair)):
            if pair not in words[k]:
                continue
            words[k] = words[k].replace(pair, token)
            for lost, gained in _neighbours(words[k], pair, token):
                counts[lost] -= repeats[k]
                counts[gained] += repeats[k]
                holders[gained].append(k)
                born.add(gained)
        for gained in born:
            heapq.heappush(queue, (-counts[gained], gained))
        merges.append(pair)
        if progress:
            progress(len(merges), n_merges)
    return merges


def _neighbours(word: str, pair: str, token: str) -> Iterator[tuple[str, str]]:
    """The pairs (lost, gained) on both sides of each `token` in `word`, where it has just replaced `pair`."""
    first, last = pair
    at = word.find(token)
    while at >= 0:
        if at > 0:
            before = word[at - 1]
            yield (last if before == token else before) + first, before + token
        after = word[at + 1 : at + 2]
        if after and after != token:  # between two new tokens, the second one has reported the pair
            yield last + after, token + after
        at = word.find(token, at + 1)


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TokenizerError(f"the text holds U+{ord(text[error.start]):04X}, a lone surrogate, which has no bytes; "
                             "read the file with errors='replace', or use encode_bytes") from None


def _digest(pattern: str, tokens: list[bytes], special_tokens: dict[str, int]) -> str:
    special = [f"{number} {name}".encode() for name, number in sorted(special_tokens.items(), key=lambda item: item[1])]
    digest = hashlib.blake2b(digest_size=16)
    for part in (pattern.encode(), str(len(tokens)).encode(), *tokens, *special):
        digest.update(len(part).to_bytes(8, "little") + part)  # with its length, so that no two lists read the same
    return digest.hexdigest()


def _read_saved(path: str | Path) -> dict:
    try:
        saved = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise TokenizerError(f"{path}: {error.strerror}; train a tokenizer with --data.tokenizer bpe") from None
    except ValueError:  # not JSON
        saved = None
    if not isinstance(saved, dict) or saved.get("format") != FORMAT:
        raise TokenizerError(f"{path}: not a nanomai tokenizer file; train one with --data.tokenizer bpe")
    if (version := saved.get("version")) != VERSION:
        raise TokenizerError(f"{path}: tokenizer version {version}, but this nanomai reads {VERSION}; update nanomai")
    return saved
