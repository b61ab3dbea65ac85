"""Tokenizers of published models: any tokenizer.json, run by the `tokenizers` library that wrote it.

The library makes ids of a text, and normalises and cuts it as the file says. The way back is a table here, of the
bytes of each token: the library decodes whole texts only, but a stream holds back half a character, and bits per byte
need a token's length. The table is made with the library's own decoder, and compared with it.

Two ways to write tokens are common. GPT-2 and Llama-3 use one visible character for each byte. SentencePiece (Llama-2,
Mistral, Phi-3) writes a blank as ▁, puts one before the text, and spells in bytes, <0x00> to <0xFF>, what it has no
token for.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from functools import cached_property
from operator import index
from pathlib import Path
from typing import Any

from nanomai.files import write_atomically
from nanomai.tokenizer import Tokenizer, TokenizerError, get_tokenizer

FORMAT, VERSION = "nanomai-pretrained", 1
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
SAMPLE = "a b  c\n\té 日本 🙂"  # blanks, and characters that many vocabularies have no token for


def _visible() -> str:
    """One character for each byte, as GPT-2 chose them: itself where it can be seen, else the next from U+0100 on."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = iter(range(256))
    return "".join(chr(byte if byte in seen else 256 + next(hidden)) for byte in range(256))


VISIBLE = _visible()
BYTE_OF = {character: byte for byte, character in enumerate(VISIBLE)}


class PretrainedTokenizer:
    """A tokenizer.json and the files beside it, with what training, sampling and evaluation ask of a `Tokenizer`.

    `files` maps names among FILES to their texts. `stop_tokens` end a text; the first of them separates documents.
    """

    def __init__(self, files: dict[str, str], stop_tokens: list[int]):
        self.files, self.stop_tokens = files, stop_tokens
        self.hash = hashlib.blake2b(json.dumps([files, stop_tokens]).encode(), digest_size=16).hexdigest()
        self._library = _read(files["tokenizer.json"])
        self._template = _template(self._library)
        self._library.encode_special_tokens = True  # the name of a special token inside a text is text
        added = self._library.get_added_tokens_decoder()
        self.special_tokens = {token.content: number for number, token in added.items() if token.special}
        self._bytes, self._blank = _bytes_of(self._library), b""
        self.vocab_size = max(self._bytes, default=-1) + 1
        ids = self.encode(SAMPLE)
        told, found = self._library.decode(ids, skip_special_tokens=False), self.decode(ids)
        self._blank = b" " if found == " " + told else b""
        if self.decode(ids) != told:
            raise TokenizerError("its decoder is of a kind that nanomai does not know")

    def __repr__(self) -> str:
        return f"PretrainedTokenizer({self.vocab_size} tokens, hash {self.hash})"

    def __reduce__(self) -> tuple:
        return PretrainedTokenizer, (self.files, self.stop_tokens)  # the library's own pickle forgets a setting

    @property
    def end_of_text(self) -> int:
        """The id that separates documents. Raises TokenizerError where there is none."""
        if not self.stop_tokens:
            raise TokenizerError("this tokenizer has no end of text; name an eos_token in the tokenizer_config.json of "
                                 "the folder that it came from, and import that again")
        return self.stop_tokens[0]

    @property
    def opening(self) -> list[int]:
        """The ids before a text: what the tokenizer itself puts there, or else the end of a text before."""
        return self._template or [self.end_of_text]

    @cached_property
    def token_bytes(self) -> list[int]:
        """How many bytes of text each id is, 0 for a special one. The blank that SentencePiece adds counts as one."""
        special = {*self.special_tokens.values()}
        return [0 if number in special else len(self._bytes.get(number, b"")) for number in range(self.vocab_size)]

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Ids of `text`, without `opening`. "</s>" inside it is plain text, and the special id only by allow_special.

        Raises TokenizerError for a text that the library refuses, such as one with a lone surrogate.
        """
        return _encode(self._with_special if allow_special else self._library, text)

    @cached_property
    def _with_special(self) -> Any:
        return _read(self.files["tokenizer.json"])  # another one: threads share the first, which must not change

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of `ids` (any integers, also a tensor), special ones by name. Raises TokenizerError for others.

        The blank that SentencePiece puts before a text is taken away again.
        """
        try:
            return b"".join(self._bytes[index(token)] for token in ids).removeprefix(self._blank)
        except KeyError as error:
            raise TokenizerError(f"token id {error} is not in this vocabulary of {self.vocab_size}; "
                                 "decode with the tokenizer that encoded it") from None

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are not UTF-8, as where a character is cut in two, become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def save(self, path: str | Path) -> None:
        """Write a JSON file with the files as they were. It appears whole or not at all."""
        saved = {"format": FORMAT, "version": VERSION, "hash": self.hash, "stop_tokens": self.stop_tokens,
                 "files": self.files}
        write_atomically(Path(path), (json.dumps(saved, ensure_ascii=False, indent=1) + "\n").encode())

    @classmethod
    def load(cls, path: str | Path) -> PretrainedTokenizer:
        """Read what `save` wrote and verify its hash. Raises TokenizerError for any other file."""
        try:
            saved = json.loads(Path(path).read_bytes())
            if (version := saved["version"]) != VERSION:
                raise TokenizerError(f"version {version}, but this nanomai reads {VERSION}; update nanomai")
            tokenizer = cls(saved["files"], saved["stop_tokens"])
            intact = tokenizer.hash == saved["hash"] and {*tokenizer.files} <= {*FILES}
        except TokenizerError as error:
            raise TokenizerError(f"{path}: {error}") from None
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
            intact = False
        if not intact:
            raise TokenizerError(f"{path}: damaged (its contents do not match its hash); import its folder again")
        return tokenizer


def load_tokenizer(name_or_path: str | Path) -> Tokenizer | PretrainedTokenizer:
    """What `get_tokenizer` gives, or the tokenizer of a published model from its saved file."""
    path = Path(name_or_path)
    if path.is_file():
        with path.open("rb") as file:
            if f'"format": "{FORMAT}"'.encode() in file.read(64):
                return PretrainedTokenizer.load(path)
    return get_tokenizer(name_or_path)


def _read(text: str) -> Any:
    """The library's tokenizer; what the file says of the length of a batch is not for us."""
    try:
        from tokenizers import Tokenizer as Library
    except ImportError:
        raise TokenizerError("the tokenizer of a published model needs a library: pip install tokenizers") from None
    try:
        library = Library.from_str(text)
    except Exception as error:  # the library has no class of its own for its errors
        raise TokenizerError(f"the tokenizers library cannot read it: {_first_line(error)}") from None
    library.no_truncation()
    library.no_padding()
    return library


def _encode(library: Any, text: str, template: bool = False) -> list[int]:
    try:
        return library.encode(text, add_special_tokens=template).ids
    except Exception as error:
        raise TokenizerError(f"the text cannot be tokenized: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0][:200]


def _template(library: Any) -> list[int]:
    """The ids that the library puts before a text."""
    whole, plain = _encode(library, "a", template=True), _encode(library, "a")
    return whole[: whole.index(plain[0])] if plain else []


def _bytes_of(library: Any) -> dict[int, bytes]:
    """The bytes of each token behind another one."""
    if library.decoder is None:
        raise TokenizerError("it has no decoder, so its ids cannot become text again")
    decode = library.decoder.decode
    byte_level, byte_fallback = decode([VISIBLE[ord(" ")]]) == " ", decode(["<0x41>"]) == "A"

    def read(name: str) -> bytes:
        if byte_level:  # what was added to the vocabulary as plain text may hold other characters
            return bytes(map(BYTE_OF.get, name)) if {*name} <= BYTE_OF.keys() else name.encode()
        if byte_fallback and re.fullmatch("<0x[0-9A-F]{2}>", name):
            return bytes.fromhex(name[3:5])
        return decode(["a", name])[1:].encode()

    return {number: read(name) for name, number in library.get_vocab().items()}
