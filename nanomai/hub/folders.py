"""Hugging Face folders in and out: config.json, safetensors in one file or in shards, the tokenizer.

One tensor after another is copied, and what is written appears whole or not at all; `source.py` is what is read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from nanomai import checkpoint
from nanomai.config import Config, DataConfig, TrainConfig
from nanomai.files import write_atomically
from nanomai.hub.families import HubError, Link, links
from nanomai.hub.settings import config_of, settings_of
from nanomai.hub.source import INDEX, SINGLE, Source
from nanomai.hub.vocabulary import end_settings, read_tokenizer, write_tokenizer
from nanomai.model import Transformer
from nanomai.pretrained import PretrainedTokenizer
from nanomai.runs import write_config
from nanomai.tokenizer import Tokenizer

SHARD_BYTES = 5 * 2**30


def from_hf(folder: str | Path) -> tuple[Transformer, Tokenizer | PretrainedTokenizer]:
    """Model, in float32, and tokenizer of a Hugging Face folder. HubError says in one line what cannot be read."""
    tokenizer, source = _read_both(Path(folder).expanduser())
    return _model(source), tokenizer


def read_model(folder: str | Path) -> Transformer:
    """The model alone: for a folder whose tokenizer cannot be read."""
    return _model(Source(Path(folder).expanduser()))


def _read_both(folder: Path) -> tuple[Tokenizer | PretrainedTokenizer, Source]:
    source, tokenizer = Source(folder), read_tokenizer(folder)
    if tokenizer.vocab_size > source.config.vocab_size:
        raise HubError(f"{folder}: tokenizer.json has {tokenizer.vocab_size} tokens, and the model knows "
                       f"{source.config.vocab_size}")
    return tokenizer, source


def _model(source: Source) -> Transformer:
    model = source.model.to_empty(device="cpu")
    for buffer in model.buffers():
        buffer.zero_()
    source.copy_into(model.state_dict())
    return model.eval()


def import_run(folder: str | Path, out: str | Path) -> Path:
    """Makes a run folder that `load_run` reads. The weights pass through files, so memory holds a tensor of them."""
    folder, out = Path(folder).expanduser(), Path(out).expanduser()
    if out.resolve().is_relative_to(folder.resolve()):
        raise HubError(f"{out} lies in {folder}, which is read; choose another folder")
    tokenizer, source = _read_both(folder)
    config = Config(out.resolve().name, source.config, DataConfig(tokenizer=str(out / "tokenizer.json")),
                    train=TrainConfig(batch_tokens=source.config.context_length))
    with _appearing(out) as new:
        (new / "weights").mkdir()
        # a file for each: of a tensor that shares its storage the checkpoint's writer makes a copy, and keeps it
        tensors = {name: _in_file(new / "weights" / name, shape) for name, shape in source.model.state_dict().items()}
        source.copy_into(tensors)
        state = {"step": 0, "samples": 0, "data": None, "config": dataclasses.asdict(config)}
        checkpoint.save(new / "checkpoints", 0, {f"model/{name}": tensor for name, tensor in tensors.items()}, state)
        shutil.rmtree(new / "weights")
        tokenizer.save(new / "tokenizer.json")
        write_config(new, config)
    return out


def _in_file(path: Path, like: Tensor) -> Tensor:
    """A tensor whose numbers are a file's."""
    with path.open("wb") as file:
        if hasattr(os, "posix_fallocate"):  # else a disk that fills up later ends the process without a word
            os.posix_fallocate(file.fileno(), 0, max(1, like.numel() * like.itemsize))
    return torch.from_file(str(path), shared=True, size=like.numel(), dtype=like.dtype).view(like.shape)


def to_hf(model: Transformer, folder: str | Path, tokenizer: Tokenizer | PretrainedTokenizer | None = None,
          dtype: torch.dtype = torch.float32, architecture: str | None = None) -> Path:
    """Writes a new folder that `transformers` loads: as this class, or the first that computes what this model does.

    One exception: its PhiMoE keeps to the short factors of LongRoPE, so beyond the original context it computes
    something else.
    """
    settings = settings_of(model.config, architecture)
    family, config = config_of(settings)
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise HubError(f"the tokenizer has {tokenizer.vocab_size} tokens and the model {config.vocab_size}; export the "
                       "tokenizer that the model was trained with")
    settings |= {"dtype": str(dtype).removeprefix("torch."), **end_settings(tokenizer)}
    folder = Path(folder).expanduser()
    with _appearing(folder) as new:
        _write_shards(new, links(family, config, model.state_dict()), dtype)
        _write_json(new / "config.json", settings)
        if tokenizer is not None:
            write_tokenizer(tokenizer, new, config.context_length)
    return folder


@contextlib.contextmanager
def _appearing(folder: Path) -> Iterator[Path]:
    """A folder under another name, which becomes `folder` at the end, or nothing."""
    whole = folder.resolve()
    if whole.exists() and (not whole.is_dir() or any(whole.iterdir()) or whole == Path.cwd()):
        raise HubError(f"{folder} exists already; choose another folder")
    new = whole.with_name(f".writing-{whole.name}-{os.getpid()}")
    try:
        new.mkdir(parents=True)
        yield new
        new.replace(whole)
    except BaseException as error:
        shutil.rmtree(new, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError | checkpoint.CheckpointError):
            cause = getattr(error, "strerror", None) or str(error).rpartition(": ")[2].partition(";")[0]
            raise HubError(f"{folder} cannot be written: {cause}") from None
        raise


# --- Writing ----------------------------------------------------------------------------------------------------------


def _write_shards(folder: Path, found: dict[str, Link], dtype: torch.dtype) -> None:
    """One file, or shards of at most SHARD_BYTES and an index: memory holds one of them."""
    shards, size = [[]], 0
    for link in found.values():
        n_bytes = sum(part.numel() for part in link.parts) * dtype.itemsize
        if shards[-1] and size + n_bytes > SHARD_BYTES:
            shards, size = [*shards, []], 0
        shards[-1].append(link)
        size += n_bytes
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    names = [SINGLE] if len(shards) == 1 else names
    total, weight_map = 0, {}
    for name, shard in zip(names, shards, strict=True):
        tensors = {link.name: link.gather().to(_dtype(link, dtype)).contiguous() for link in shard}
        save_file(tensors, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if len(shards) > 1:
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _dtype(link: Link, dtype: torch.dtype) -> torch.dtype:
    """The selection bias of a router stays in float32: its steps are smaller than bfloat16 can add."""
    return torch.float32 if link.name.endswith("score_correction_bias") else dtype


def _write_json(path: Path, value: dict[str, Any]) -> None:
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())
