"""Hugging Face folders in and out: config.json, safetensors in one file or in shards, the tokenizer.

Headers are read and compared before any number is; then one tensor after another is copied. Nothing is ever unpickled,
no file outside the folder is named by an index, and what is written appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nanomai import checkpoint
from nanomai.config import Config, DataConfig, TrainConfig
from nanomai.files import write_atomically
from nanomai.hub.families import HubError, Link, links, read_json
from nanomai.hub.settings import config_of, settings_of
from nanomai.hub.vocabulary import end_settings, read_tokenizer, write_tokenizer
from nanomai.model import Transformer
from nanomai.pretrained import PretrainedTokenizer
from nanomai.runs import write_config
from nanomai.tokenizer import Tokenizer

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
SHARD_BYTES = 5 * 2**30
FLOATS = {"F64", "F32", "F16", "BF16"}
# DeepSeek-V3's fp8: a matrix has a scale for each block of 128 x 128 of its numbers, in a tensor beside it.
FP8, BLOCK, FP8_SETTINGS = "F8_E4M3", 128, {"quant_method": "fp8", "weight_block_size": [128, 128]}
# Tensors that older versions saved and that hold no weights: tables of rotations, and GPT-2's triangles.
IGNORED = re.compile(r".*(rotary_emb\.inv_freq|\.attn\.(masked_)?bias)")


def from_hf(folder: str | Path) -> tuple[Transformer, Tokenizer | PretrainedTokenizer]:
    """Model, in float32, and tokenizer of a Hugging Face folder. HubError says in one line what cannot be read."""
    tokenizer, source = _read_both(Path(folder))
    return _model(source), tokenizer


def read_model(folder: str | Path) -> Transformer:
    """The model alone: for a folder whose tokenizer cannot be read."""
    return _model(_Source(Path(folder)))


def _read_both(folder: Path) -> tuple[Tokenizer | PretrainedTokenizer, _Source]:
    source, tokenizer = _Source(folder), read_tokenizer(folder)
    if tokenizer.vocab_size > source.config.vocab_size:
        raise HubError(f"{folder}: tokenizer.json has {tokenizer.vocab_size} tokens, and the model knows "
                       f"{source.config.vocab_size}")
    return tokenizer, source


def _model(source: _Source) -> Transformer:
    model = source.model.to_empty(device="cpu")
    for buffer in model.buffers():
        buffer.zero_()
    source.copy_into(model.state_dict())
    return model.eval()


def import_run(folder: str | Path, out: str | Path) -> Path:
    """Makes a run folder that `load_run` reads. The weights pass through files, so memory holds a tensor of them."""
    tokenizer, source = _read_both(Path(folder))
    config = Config(Path(out).name, source.config, DataConfig(tokenizer=str(Path(out) / "tokenizer.json")),
                    train=TrainConfig(batch_tokens=source.config.context_length))
    with _appearing(Path(out)) as new:
        (new / "weights").mkdir()
        # a file for each: of a tensor that shares its storage the checkpoint's writer makes a copy, and keeps it
        tensors = {name: torch.from_file(str(new / "weights" / name), shared=True, size=shape.numel()).view(shape.shape)
                   for name, shape in source.model.state_dict().items()}
        source.copy_into(tensors)
        state = {"step": 0, "samples": 0, "data": None, "config": dataclasses.asdict(config)}
        checkpoint.save(new / "checkpoints", 0, {f"model/{name}": tensor for name, tensor in tensors.items()}, state)
        shutil.rmtree(new / "weights")
        tokenizer.save(new / "tokenizer.json")
        write_config(new, config)
    return Path(out)


def to_hf(model: Transformer, folder: str | Path, tokenizer: Tokenizer | PretrainedTokenizer | None = None,
          dtype: torch.dtype = torch.float32, architecture: str | None = None) -> Path:
    """Writes a new folder that `transformers` loads: as this class, or the first that computes what this model does."""
    settings = settings_of(model.config, architecture)
    family, config = config_of(settings)
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise HubError(f"the tokenizer has {tokenizer.vocab_size} tokens and the model {config.vocab_size}; export the "
                       "tokenizer that the model was trained with")
    settings |= {"dtype": str(dtype).removeprefix("torch."), **end_settings(tokenizer)}
    with _appearing(Path(folder)) as new:
        _write_shards(new, links(family, config, model.state_dict()), dtype)
        _write_json(new / "config.json", settings)
        if tokenizer is not None:
            write_tokenizer(tokenizer, new, config.context_length)
    return Path(folder)


@contextlib.contextmanager
def _appearing(folder: Path) -> Iterator[Path]:
    """A folder under another name, which becomes `folder` at the end, or nothing."""
    folder = folder.expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise HubError(f"{folder} exists already; choose another folder")
    new = folder.with_name(f".writing-{folder.name}-{os.getpid()}")
    try:
        new.mkdir(parents=True)
        yield new
        new.replace(folder)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


# --- Reading ----------------------------------------------------------------------------------------------------------


class _Source:
    """A folder whose settings and headers have been read and agree."""

    def __init__(self, folder: Path):
        if not (folder / "config.json").is_file():
            what = "has no config.json" if folder.is_dir() else "is no folder"
            raise HubError(f"{folder} {what}; name the folder of a Hugging Face model: config.json, safetensors and "
                           "tokenizer.json")
        self.folder = folder
        self.files = [_open(folder / name) for name in self._names()]
        self.place = {name: file for file in self.files for name in file.keys()}  # noqa: SIM118 (no mapping)
        settings = read_json(folder / "config.json")
        given = settings.get("quantization_config")
        self.fp8 = isinstance(given, dict) and FP8_SETTINGS.items() <= given.items()
        if self.fp8:
            del settings["quantization_config"]
        self.family, self.config = config_of(settings, str(folder / "config.json"))
        # before a module is made: a file of one kilobyte must not ask for a million layers
        most = max(self.config.n_layers, self.config.moe.n_experts)
        if most > len(self.place):
            raise HubError(f"{folder}: config.json names {most} layers or experts, and there are {len(self.place)} "
                           "tensors")
        try:
            with torch.device("meta"):
                self.model = Transformer(self.config)
        except RuntimeError:
            raise HubError(f"{folder}: config.json means matrices that are too large for any machine") from None
        self._compare(links(self.family, self.config, self.model.state_dict()))

    def _names(self) -> list[str]:
        """The safetensors files, none of them elsewhere."""
        if not (self.folder / INDEX).exists():
            if not (self.folder / SINGLE).exists() and list(self.folder.glob("*.bin")):
                raise HubError(f"{self.folder} holds .bin files, which are pickle and may run any program; "
                               "convert them to safetensors first")
            return [SINGLE]
        weight_map = read_json(self.folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise HubError(f"{self.folder / INDEX}: weight_map must map names to files")
        for name in weight_map.values():
            if not re.fullmatch(r"[\w-][\w.-]*\.safetensors", name):
                raise HubError(f"{self.folder / INDEX}: {name!r} is not the name of a safetensors file in this folder")
        return sorted(set(weight_map.values()))

    def _compare(self, wanted: dict[str, Link]) -> None:
        """Every tensor there once, none more, each in its shape, before one is read."""
        self.theirs: dict[str, str] = {}  # the name in the table: in the file
        for name in wanted:
            bare = name.split(".", 1)[-1]  # GPT-2's own files leave the first word out
            self.theirs[name] = bare if name not in self.place and bare in self.place else name
        shapes = {there: wanted[name].shape for name, there in self.theirs.items()}
        self.scales = {name: f"{name}_scale_inv" for name in shapes
                       if self.fp8 and name in self.place and self._header(name)[1] == FP8}
        shapes |= {scale: tuple(-(-n // BLOCK) for n in shapes[name]) for name, scale in self.scales.items()}
        left = self.place.keys() - shapes.keys()
        extra = sorted(name for name in left if not self._may_be_left(name))
        missing = sorted(shapes.keys() - self.place.keys())
        for names, what in ((missing, "is missing"), (extra, "has no place in this architecture")):
            if names:
                more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
                raise HubError(f"{self.folder}: tensor {names[0]!r}{more} {what}")
        for name, expected in shapes.items():
            shape, dtype = self._header(name)
            if shape != expected:
                hint = "; it seems to be transposed" if shape == expected[::-1] else ""
                raise HubError(f"{self.folder}: tensor {name!r} has shape {shape}, and config.json means "
                               f"{expected}{hint}")
            if dtype not in FLOATS and name not in self.scales:
                raise HubError(f"{self.folder}: tensor {name!r} is {dtype}; nanomai reads {', '.join(sorted(FLOATS))}")

    def _header(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape and type of a tensor whose numbers stay in the file."""
        there = self.place[name].get_slice(name)
        return tuple(there.get_shape()), there.get_dtype()

    def _may_be_left(self, name: str) -> bool:
        beyond = f"{self.family.layers}.{self.config.n_layers}."  # DeepSeek-V3's layer that predicts a second token
        tied = name == "lm_head.weight" and self.config.tied_embeddings
        return tied or bool(IGNORED.fullmatch(name)) or (bool(self.family.paired) and name.startswith(beyond))

    def copy_into(self, tensors: dict[str, Tensor]) -> None:
        """Reads the numbers of all tensors into ours."""
        for name, link in links(self.family, self.config, tensors).items():
            tensor = self._read(self.theirs[name])
            if not torch.isfinite(tensor).all():
                raise HubError(f"{self.folder}: tensor {name!r} holds numbers that are not finite")
            link.scatter(tensor)

    def _read(self, name: str) -> Tensor:
        """The numbers that a tensor stands for."""
        tensor = self.place[name].get_tensor(name)
        if name not in self.scales:
            return tensor
        scales = self.place[self.scales[name]].get_tensor(self.scales[name]).float()
        for dim, size in enumerate(tensor.shape):  # the last block of a dimension may be cut
            scales = scales.repeat_interleave(BLOCK, dim).narrow(dim, 0, size)
        return tensor.float().mul_(scales)


def _open(path: Path) -> Any:
    if not path.is_file():
        raise HubError(f"{path} is missing")
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise HubError(f"{path} is not a safetensors file: {str(error).splitlines()[0]}") from None


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
