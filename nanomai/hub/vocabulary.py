"""tokenizer.json of the `tokenizers` library, read and written.

Byte-level BPE has the same ids on both sides. There a token is written with one visible character for each byte, and a
merge names its two tokens. Here a token's id is its rank, and the merges follow: the pair that the ranks below a
token's own leave of it. A file that says anything else stays as it is and is run by the library.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from nanomai.files import write_atomically
from nanomai.hub.families import HubError, read_json
from nanomai.pretrained import BYTE_OF, FILES, VISIBLE, PretrainedTokenizer
from nanomai.tokenizer import END_OF_TEXT, Tokenizer, TokenizerError

MOST_SPECIAL = 2**16  # ids that are reserved above the ordinary ones: a table of them all is kept
NOT_OURS = ("byte_fallback", "dropout", "continuing_subword_prefix", "end_of_word_suffix")
TRIAL = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from nanomai.pretrained import PretrainedTokenizer
try:
    PretrainedTokenizer({"tokenizer.json": open(sys.argv[2], "rb").read().decode()}, [])
except Exception:
    pass  # which is said by the process that asked
"""
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


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


def end_settings(tokenizer: Tokenizer | PretrainedTokenizer | None) -> dict[str, Any]:
    """What config.json says of the ends of a text."""
    ends = tokenizer.stop_tokens if tokenizer else []
    return {"bos_token_id": tokenizer.opening[0] if ends else None,
            "eos_token_id": ends[0] if len(ends) == 1 else ends or None, "pad_token_id": None}


def write_tokenizer(tokenizer: Tokenizer | PretrainedTokenizer, folder: Path, context_length: int) -> None:
    """tokenizer.json and tokenizer_config.json, as `AutoTokenizer` loads them; what was imported is written back."""
    if isinstance(tokenizer, PretrainedTokenizer):
        for name, text in tokenizer.files.items():
            write_atomically(folder / name, text.encode())
        return
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


def read_tokenizer(folder: Path) -> Tokenizer | PretrainedTokenizer:
    """The tokenizer of a folder: ours, which is faster, where it gives the same ids, else the library's."""
    path = folder / "tokenizer.json"
    saved = read_json(path)
    try:
        stop_tokens = _stop_tokens(folder, {token["content"]: token["id"] for token in saved["added_tokens"]})
        with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError):
            if ours := _ours(saved, stop_tokens):
                return ours
        _try(path)
        files = {name: (folder / name).read_bytes().decode() for name in FILES if (folder / name).is_file()}
        return PretrainedTokenizer(files, stop_tokens)
    except TokenizerError as error:
        raise HubError(f"{path}: {error}; read_model reads the weights without it") from None
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise HubError(f"{path} is not a tokenizer of the tokenizers library ({type(error).__name__})") from None


def _stop_tokens(folder: Path, added: dict[str, int]) -> list[int]:
    """The ids that end a text, from the first file that names any. An ordinary token there is a leftover: the default
    of a class, for example, means the third byte of a byte-level vocabulary."""
    for name in ("generation_config.json", "config.json", "tokenizer_config.json"):
        settings = read_json(folder / name) if (folder / name).is_file() else {}
        token = settings.get("eos_token")  # its text, or a mapping that holds it
        found = settings.get("eos_token_id", added.get(token["content"] if isinstance(token, dict) else token))
        found = [number for number in (found if isinstance(found, list) else [found])
                 if type(number) is int and number in added.values()]
        if found:
            return list(dict.fromkeys(found))
    return []


def _try(path: Path) -> None:
    """Has another process read and run the file: some mistakes in one make the library abort."""
    arguments = [sys.executable, "-c", TRIAL, json.dumps(sys.path), str(path)]
    if subprocess.run(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode:
        raise TokenizerError("the tokenizers library crashes on it")


def _ours(saved: dict[str, Any], stop_tokens: list[int]) -> Tokenizer | None:
    """A tokenizer that gives the same ids and ends a text as this one does, if there is one."""
    model, pattern, added = saved["model"], _pattern(saved.get("pre_tokenizer")), saved["added_tokens"]
    special = {token["content"]: token["id"] for token in added}
    plain = all(token["special"] and not (token["lstrip"] or token["rstrip"] or token["single_word"])
                for token in added)
    opens = (saved.get("post_processor") or {"type": "ByteLevel"})["type"] != "ByteLevel"  # texts by a token
    if (model.get("type", "BPE") != "BPE" or pattern is None or any(map(model.get, NOT_OURS)) or saved.get("normalizer")
            or not plain or opens or {*stop_tokens} - {special.get(END_OF_TEXT)}):
        return None
    ranked = sorted((rank, name) for name, rank in model["vocab"].items() if name not in special)
    if [rank for rank, _ in ranked] != list(range(len(ranked))) or any(
            number > len(ranked) + MOST_SPECIAL for number in special.values()):
        return None
    tokens = [bytes(BYTE_OF[character] for character in name) for _, name in ranked]
    pairs = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    made = [model["vocab"][left + right] for left, right in pairs]
    needed = [pair and tuple(map(_show, pair)) for pair in merges_of(tokens)]
    unmade = [token for token, pair in zip(tokens, needed, strict=True) if pair is None and len(token) > 1]
    if made != sorted(made) or {*filter(None, needed)} - {*pairs} or (unmade and not model.get("ignore_merges")):
        return None
    return Tokenizer(pattern, tokens, special)


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
