"""tokenizer.json of the `tokenizers` library, read and written: byte-level BPE with the same ids on both sides.

There a token is written with one visible character for each byte, and a merge names its two tokens. Here a token's id
is its rank, and the merges follow: the pair that the ranks below a token's own leave of it.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

from nanomai.files import write_atomically
from nanomai.hub.families import HubError, read_json
from nanomai.tokenizer import END_OF_TEXT, Tokenizer, TokenizerError

MOST_SPECIAL = 2**16  # ids that are reserved above the ordinary ones: a table of them all is kept
END_SETTINGS = ("bos_token_id", "eos_token_id")
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def _visible() -> str:
    """One character for each byte, as GPT-2 chose them: itself where it can be seen, else the next from U+0100 on."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = iter(range(256))
    return "".join(chr(byte if byte in seen else 256 + next(hidden)) for byte in range(256))


VISIBLE = _visible()
BYTE_OF = {character: byte for byte, character in enumerate(VISIBLE)}


def _show(token: bytes) -> str:
    return "".join(VISIBLE[byte] for byte in token)


def merges_of(tokens: list[bytes]) -> list[tuple[bytes, bytes] | None]:
    """The last merge that makes each token; None for a byte, and for a token that no merge of tokens before it makes.

    No other pair of a token is ever merged: inside it, the merges of a text are those of the token alone.
    """
    ranks = {token: rank for rank, token in enumerate(tokens)}
    merges = []
    for rank, token in enumerate(tokens):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            pairs = [ranks.get(a + b, rank) for a, b in itertools.pairwise(parts)]
            best = min(pairs)
            if best >= rank:
                break
            i = pairs.index(best)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        whole = len(parts) == 2 and all(ranks[part] < rank for part in parts)
        merges.append((parts[0], parts[1]) if whole else None)
    return merges


def write_tokenizer(tokenizer: Tokenizer, folder: Path, context_length: int) -> None:
    """tokenizer.json and tokenizer_config.json, as `AutoTokenizer` loads them."""
    split = {"type": "Split", "pattern": {"Regex": tokenizer.pattern}, "behavior": "Isolated", "invert": False}
    to_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    special = [{"id": number, "content": name, "single_word": False, "lstrip": False, "rstrip": False,
                "normalized": False, "special": True}
               for name, number in sorted(tokenizer.special_tokens.items(), key=lambda item: item[1])]
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
             "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
             "ignore_merges": True,  # a word that is a token needs no merges, as in tiktoken
             "vocab": {_show(token): rank for rank, token in enumerate(tokenizer.tokens)},
             "merges": [list(map(_show, pair)) for pair in merges_of(tokenizer.tokens) if pair]}
    whole = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": special, "normalizer": None,
             "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, to_bytes]}, "post_processor": None,
             "decoder": to_bytes, "model": model}
    end = END_OF_TEXT if END_OF_TEXT in tokenizer.special_tokens else None
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": end, "eos_token": end,
                "model_max_length": context_length, "clean_up_tokenization_spaces": False}
    for name, value in (("tokenizer.json", whole), ("tokenizer_config.json", settings)):
        write_atomically(folder / name, json.dumps(value, ensure_ascii=False).encode())


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json whose ids ours would give too; HubError for one of another kind."""
    path = folder / "tokenizer.json"
    saved = read_json(path)
    try:
        return _tokenizer(saved)
    except (HubError, TokenizerError) as error:
        raise HubError(f"{path}: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise HubError(f"{path} is not a tokenizer of the tokenizers library ({type(error).__name__})") from None


def _tokenizer(saved: dict[str, Any]) -> Tokenizer:
    model, pattern = saved["model"], _pattern(saved.get("pre_tokenizer"))
    if model.get("type", "BPE") != "BPE" or pattern is None or model.get("byte_fallback") or saved.get("normalizer"):
        raise HubError("this tokenizer is not byte-level BPE; read_model reads the weights without it")
    special = {token["content"]: token["id"] for token in saved.get("added_tokens", [])}
    ranked = sorted((rank, name) for name, rank in model["vocab"].items() if name not in special)
    if [rank for rank, _ in ranked] != list(range(len(ranked))):
        raise HubError("the ids of its tokens must be 0, 1, 2, ..., the special ones above")
    if any(number > len(ranked) + MOST_SPECIAL for number in special.values()):
        raise HubError(f"a special token's id lies more than {MOST_SPECIAL} above the others")
    tokens = [bytes(BYTE_OF[character] for character in name) for _, name in ranked]
    tokenizer = Tokenizer(pattern, tokens, special)
    pairs = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    made = [model["vocab"][left + right] for left, right in pairs]
    needed = [pair and tuple(map(_show, pair)) for pair in merges_of(tokens)]
    unmade = [token for token, pair in zip(tokens, needed, strict=True) if pair is None and len(token) > 1]
    if made != sorted(made) or {*filter(None, needed)} - {*pairs} or (unmade and not model.get("ignore_merges")):
        raise HubError("its merges are not in the order of its ids, so nanomai would give other ids")
    return tokenizer


def _pattern(cutter: Any) -> str | None:
    """The expression that cuts words, if bytes follow it: GPT-2's own, or the one before a ByteLevel."""
    if not isinstance(cutter, dict):
        return None
    if cutter.get("type") == "ByteLevel":
        return GPT2_PATTERN if cutter.get("use_regex", True) and not cutter.get("add_prefix_space") else None
    steps = cutter.get("pretokenizers", [])
    if [step.get("type") for step in steps] != ["Split", "ByteLevel"] or steps[1].get("add_prefix_space"):
        return None
    split, to_bytes = steps
    plain = split.get("behavior") == "Isolated" and not split.get("invert") and not to_bytes.get("use_regex", True)
    return split["pattern"].get("Regex") if plain else None
