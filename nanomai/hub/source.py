"""A Hugging Face folder as it is read: config.json, and safetensors in one file or in shards.

Headers are read and compared before any number is. Nothing is ever unpickled, and no file outside the folder is named
by an index.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nanomai.hub.families import HubError, Link, cut, links, read_json
from nanomai.hub.settings import config_of
from nanomai.model import Transformer

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
FLOATS = {"F64", "F32", "F16", "BF16"}
# DeepSeek-V3's fp8: a matrix has a scale for each block of 128 x 128 of its numbers, in a tensor beside it.
FP8, BLOCK, FP8_SETTINGS = "F8_E4M3", 128, {"quant_method": "fp8", "weight_block_size": [128, 128]}
# Tensors that older versions saved and that hold no weights: tables of rotations, and GPT-2's triangles.
IGNORED = re.compile(r".*(rotary_emb\.inv_freq|\.attn\.(masked_)?bias)")


class Source:
    """A folder whose settings and headers have been read and agree."""

    def __init__(self, folder: Path):
        if not (folder / "config.json").exists():
            what = "has no config.json" if folder.is_dir() else "is no folder"
            raise HubError(f"{folder} {what}; name the folder of a Hugging Face model: config.json, safetensors and "
                           "tokenizer.json")
        self.folder = folder
        self.place = self._places()
        self._read_settings()
        self.model = self._empty_model()
        self._compare(links(self.family, self.config, self.model.state_dict()))

    def _places(self) -> dict[str, Any]:
        """The open file of each tensor: where it stands in several, the one that the index names."""
        index = self._index()
        files = sorted(set(index.values())) if index is not None else [SINGLE]
        place: dict[str, Any] = {}
        for name in files:
            file = _open(self.folder / name)
            for tensor in file.keys():  # noqa: SIM118 (no mapping)
                if (index or {}).get(tensor, name) != name:
                    continue
                if tensor in place:
                    raise HubError(f"{self.folder}: tensor {_shown(tensor)} is in two files, and {INDEX} names neither")
                place[tensor] = file
        return place

    def _index(self) -> dict[str, str] | None:
        """Tensors and their safetensors files, none of them elsewhere; None where one file has them all."""
        path = self.folder / INDEX
        if not path.exists():
            if not (self.folder / SINGLE).exists() and list(self.folder.glob("*.bin")):
                raise HubError(f"{self.folder} holds .bin files, which are pickle and may run any program; "
                               "convert them to safetensors first")
            return None
        weight_map = read_json(path).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise HubError(f"{path}: weight_map must map names to files")
        for name in weight_map.values():
            if not re.fullmatch(r"[\w-][\w.-]*\.safetensors", name):
                raise HubError(f"{path}: {_shown(name)} is not the name of a safetensors file in this folder")
        return weight_map

    def _read_settings(self) -> None:
        settings = read_json(self.folder / "config.json")
        given = settings.get("quantization_config")
        self.fp8 = isinstance(given, dict) and FP8_SETTINGS.items() <= given.items()
        if self.fp8:
            del settings["quantization_config"]
        self.family, self.config = config_of(settings, str(self.folder / "config.json"))

    def _empty_model(self) -> Transformer:
        """Ours, without memory."""
        # before a module is made: a file of one kilobyte must not ask for a million layers
        most = max(self.config.n_layers, self.config.moe.n_experts)
        if most > len(self.place):
            raise HubError(f"{self.folder}: config.json names {most} layers or experts, and there are "
                           f"{len(self.place)} tensors")
        try:
            with torch.device("meta"):
                return Transformer(self.config)
        except RuntimeError:
            raise HubError(f"{self.folder}: config.json means matrices that are too large for any machine") from None

    def _compare(self, wanted: dict[str, Link]) -> None:
        """Every tensor there once, none more, each in its shape, before one is read."""
        self.theirs: dict[str, str] = {}  # the name in the table: in the file
        word = self.family.layers.partition(".")[0] + "."  # files of the model without its head leave it out
        for name in wanted:
            bare = name.removeprefix(word)
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
                raise HubError(f"{self.folder}: tensor {_shown(names[0])}{more} {what}")
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
        return tied or bool(IGNORED.fullmatch(name)) or (self.family.predicts and name.startswith(beyond))

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


def _shown(name: str) -> str:
    return cut(repr(name), 120)


def _open(path: Path) -> Any:
    if not path.is_file():
        raise HubError(f"{path} is missing")
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise HubError(f"{path} is not a safetensors file: {cut(str(error).splitlines()[0], 120)}") from None
