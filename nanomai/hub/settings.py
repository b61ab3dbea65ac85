"""config.json, read as a `ModelConfig` and written from one, by the tables of `families.py`."""

from __future__ import annotations

import dataclasses
import difflib
import math
from typing import Any

from nanomai import rope
from nanomai.architecture import ConfigError, ModelConfig
from nanomai.config_file import config_from_dict
from nanomai.hub.families import DEFAULTS, FAMILIES, REQUIRED, Family, HubError


def config_of(settings: dict[str, Any], where: str = "config.json") -> tuple[Family, ModelConfig]:
    """The class and the configuration that a config.json means. HubError for what nanomai cannot express."""
    try:
        return _config_of(settings)
    except (ConfigError, HubError) as error:
        name = f"{error.field}: " if getattr(error, "field", None) else ""
        raise HubError(f"{where}: {name}{error}") from None
    except (TypeError, ValueError, OverflowError) as error:
        raise HubError(f"{where} holds a value of the wrong kind: {error}") from None


def _config_of(settings: dict[str, Any]) -> tuple[Family, ModelConfig]:
    name = (settings.get("architectures") or [None])[0] if isinstance(settings.get("architectures"), list) else None
    if name not in FAMILIES:
        near = difflib.get_close_matches(str(name), FAMILIES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(FAMILIES)}"
        raise HubError(f"architecture {name!r} is not known; {hint}")
    family = FAMILIES[name]
    settings = DEFAULTS | family.defaults | settings
    for key, allowed in (family.demands | {"quantization_config": (None,)}).items():
        if settings.get(key, allowed[0]) not in allowed:
            raise HubError(f"{key} is {settings[key]!r}, and nanomai has {' or '.join(map(repr, allowed))} only")
    if family.paired and isinstance(settings.get("qk_nope_head_dim"), int):
        settings = settings | {"qk_head_dim": settings["qk_nope_head_dim"] + settings.get("qk_rope_head_dim", 64)}
    flat = dict(family.ours)
    for theirs, names in family.settings.items():
        if settings.get(theirs) is not None:
            flat |= dict.fromkeys(names.split(), settings[theirs])
        elif names in REQUIRED:
            raise HubError(f"{theirs} is missing")
    if family.biases:
        flat["biases"] = tuple(b for key, bs in family.biases.items() if settings.get(key) for b in bs)
    _derive(flat)
    if family.ours.get("position") != "learned":
        flat |= _read_rope(family, settings, flat)
    tree: dict[str, Any] = {}
    for dotted, value in flat.items():
        section, _, key = dotted.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[key] = value
    context = {"batch_tokens": flat["context_length"]}  # else it must divide the default
    return family, config_from_dict({"model": tree, "train": context}).model


def _derive(flat: dict[str, Any]) -> None:
    """What follows from other settings where it is not given."""
    numbers = [flat[name] for name in ("d_model", "n_heads")]
    if not all(isinstance(n, int) and n > 0 for n in numbers):
        raise HubError(f"d_model {numbers[0]!r} and n_heads {numbers[1]!r} must be whole numbers above 0")
    flat.setdefault("n_kv_heads", flat["n_heads"])
    flat.setdefault("head_dim", flat["d_model"] // flat["n_heads"])
    flat.setdefault("d_ff", 4 * flat["d_model"])


_SCALINGS = {  # their rope_type: their numbers and ours
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {"factor": "factor", "low_freq_factor": "low_frequency", "high_freq_factor": "high_frequency"},
    "yarn": {"factor": "factor", "beta_slow": "low_frequency", "beta_fast": "high_frequency", "mscale": "mscale",
             "mscale_all_dim": "mscale_all_dim", "attention_factor": "attention_factor", "truncate": "whole_pairs"},
    "longrope": {"short_factor": "short_factors", "long_factor": "long_factors",
                 "attention_factor": "attention_factor"}}


def _read_rope(family: Family, settings: dict[str, Any], flat: dict[str, Any]) -> dict[str, Any]:
    """Rotary settings: in `rope_parameters` since transformers 5, beside `rope_scaling` before, which goes first."""
    given = settings.get("rope_scaling") or settings.get("rope_parameters") or {}
    if not isinstance(given, dict):
        raise HubError(f"rope_parameters must be a mapping, not {given!r}")
    given = {key: settings[key] for key in ("rope_theta", "partial_rotary_factor") if key in settings} | given
    kind = given.get("rope_type", given.get("type", "default"))
    kind = "longrope" if kind == "su" else kind  # its first name
    if kind not in _SCALINGS:
        raise HubError(f"rope_type {kind!r} is not one of {', '.join(_SCALINGS)}")
    found = {"rope_theta": given["rope_theta"]}
    share = given.get("partial_rotary_factor", family.partial) if family.partial else 1.0
    if not isinstance(share, int | float) or not 0 < share <= 1:
        raise HubError(f"partial_rotary_factor {share!r} must lie above 0, up to 1")
    if share < 1:
        found["rotary_dim"] = int(flat["head_dim"] * share)
    if kind == "default":
        return found
    key = "original_max_position_embeddings"  # where it stands in both places, transformers takes the outer one
    original = settings.get(key, given.get(key, flat["context_length"]))
    if "factor" in _SCALINGS[kind] and given.get("factor") is None:
        raise HubError(f"rope_type {kind!r} needs a factor")
    scaling = {"kind": kind, "original_context": original}
    if kind == "yarn":
        scaling["high_frequency"] = 32.0  # what transformers takes where beta_fast is left out
    scaling |= {ours: given[theirs] for theirs, ours in _SCALINGS[kind].items() if given.get(theirs) is not None}
    if kind == "longrope" and "attention_factor" not in scaling:
        _attention_factor(given, original, scaling)
    return found | {f"rope_scaling.{key}": value for key, value in scaling.items()}


def _attention_factor(given: dict[str, Any], original: Any, scaling: dict[str, Any]) -> None:
    """From `long_mscale`, or from a `factor` that takes the place of the ratio of the two contexts."""
    if "long_mscale" in given:
        if given["long_mscale"] != given.get("short_mscale"):
            raise HubError(f"short_mscale {given.get('short_mscale')!r} and long_mscale {given['long_mscale']!r} must "
                           "be alike: nanomai has one attention factor")
        scaling["attention_factor"] = given["long_mscale"]
    elif isinstance(given.get("factor"), int | float) and isinstance(original, int) and original > 1:
        scaling["attention_factor"] = math.sqrt(1 + math.log(max(1, given["factor"])) / math.log(original))


def settings_of(config: ModelConfig, architecture: str | None = None) -> dict[str, Any]:
    """config.json of this class, or of the first that says all that `config` says."""
    if architecture is not None and architecture not in FAMILIES:
        raise HubError(f"architecture {architecture!r} is not known; there are {', '.join(FAMILIES)}")
    lost = {}
    for name in [architecture] if architecture else FAMILIES:
        family = FAMILIES[name]
        settings = {"architectures": [name], "model_type": family.model_type} | _settings(family, config)
        lost[name] = _lost(config, settings)
        if not lost[name]:
            return settings
    near = min(lost, key=lambda name: len(lost[name]))
    raise HubError(f"no class of transformers that nanomai knows is this model; {near} would be it without its "
                   + ", ".join(lost[near]))


def _settings(family: Family, config: ModelConfig) -> dict[str, Any]:
    values = dataclasses.asdict(config)
    flat = values | {f"{section}.{key}": value for section in ("moe", "mla") for key, value in values[section].items()}
    settings = {key: allowed[0] for key, allowed in family.demands.items()}
    settings |= {theirs: flat[names.split()[-1]] for theirs, names in family.settings.items()}
    settings |= {key: set(biases) <= set(config.biases) for key, biases in family.biases.items()}
    if family.paired:
        settings["qk_nope_head_dim"] = config.head_dim - config.mla.rope_dim
        settings["q_lora_rank"] = config.mla.q_rank or None
    if family.ours.get("position") == "learned":
        return settings
    scaling = config.rope_scaling
    parameters = {"rope_type": "default", "rope_theta": config.rope_theta}
    if family.partial:
        parameters["partial_rotary_factor"] = config.turned_dim / config.head_dim
    if scaling.kind != "none":
        numbers = {theirs: getattr(scaling, ours) for theirs, ours in _SCALINGS.get(scaling.kind, {}).items()}
        parameters |= {theirs: number for theirs, number in numbers.items() if number is not None}
        settings["original_max_position_embeddings"] = scaling.original_context
        parameters["rope_type"] = scaling.kind
    if scaling.kind in ("llama3", "yarn"):  # the form before transformers 5 is the same mapping
        parameters["original_max_position_embeddings"] = scaling.original_context
        settings |= {"rope_theta": config.rope_theta, "rope_scaling": parameters}
    if scaling.kind == "longrope":
        parameters["attention_factor"] = rope.attention_factor(config)
        if family.mscale:
            parameters |= dict.fromkeys(("short_mscale", "long_mscale"), rope.attention_factor(config))
    return settings | {"rope_parameters": parameters}


def _lost(config: ModelConfig, settings: dict[str, Any]) -> list[str]:
    """Names of what the model would not be any more after an export with these settings and an import of them."""
    try:
        _, returned = config_of(settings)
    except HubError as error:
        return [str(error)]
    before, after = _essence(config), _essence(returned)
    return [f"{name} {before[name]!r}" for name in before if before[name] != after[name]]


def _essence(config: ModelConfig) -> dict[str, Any]:
    """All that decides what the model computes; not how it is trained, nor settings of parts that it does not have."""
    moe, mla, learned = config.moe, config.mla, config.position == "learned"
    values = dataclasses.asdict(config)
    del values["init_std"], values["rotary_dim"]
    values["biases"] = sorted(config.biases)
    values["d_ff"] = config.d_ff if moe.n_dense_layers or not moe.n_experts else None
    values["sparse"] = config.sparse.block and values["sparse"]
    values["mla"] = mla.kv_rank and values["mla"]
    values["rope_theta"] = not learned and (config.rope_theta, config.turned_dim)
    values["rope_scaling"] = not learned and dataclasses.replace(
        config.rope_scaling, attention_factor=rope.attention_factor(config))
    of_router = {"softmax": (), "sparsemixer": (moe.jitter,),
                 "sigmoid": (moe.n_groups, moe.groups_per_token, moe.weight_scale)}[moe.router]
    values["moe"] = moe.n_experts and (moe.router, moe.n_experts, moe.experts_per_token, moe.d_expert,
                                       moe.n_shared_experts, moe.n_dense_layers, *of_router)
    return values
