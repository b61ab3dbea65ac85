"""config.json, read as a `ModelConfig` and written from one, by the tables of `families.py`."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable
from typing import Any

from nanomai import rope
from nanomai.architecture import ConfigError, ModelConfig
from nanomai.config_file import config_from_dict
from nanomai.hub.families import DEFAULTS, FAMILIES, REQUIRED, Family, HubError, cut

SWITCHES = {"tie_word_embeddings", "truncate"} | {key for family in FAMILIES.values() for key in family.biases}
LISTS = {"short_factor", "long_factor"}


def config_of(settings: dict[str, Any], where: str = "config.json") -> tuple[Family, ModelConfig]:
    """The class and the configuration that a config.json means. HubError for what nanomai cannot express."""
    try:
        return _config_of(settings)
    except (ConfigError, HubError) as error:
        name = f"{error.field}: " if getattr(error, "field", None) else ""
        raise HubError(f"{where}: {name}{cut(str(error), 260)}") from None
    except (TypeError, ValueError, OverflowError) as error:
        raise HubError(f"{where} holds a value of the wrong kind: {cut(str(error))}") from None


def _config_of(settings: dict[str, Any]) -> tuple[Family, ModelConfig]:
    name = (settings.get("architectures") or [None])[0] if isinstance(settings.get("architectures"), list) else None
    if name not in FAMILIES:
        near = difflib.get_close_matches(cut(str(name)), FAMILIES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(FAMILIES)}"
        raise HubError(f"architecture {cut(repr(name))} is not known; {hint}")
    family = FAMILIES[name]
    settings = DEFAULTS | family.defaults | settings
    for key, allowed in (family.demands | {"quantization_config": (None,)}).items():
        if settings.get(key, allowed[0]) not in allowed:
            raise HubError(f"{key} is {cut(repr(settings[key]))}, and nanomai has {' or '.join(map(repr, allowed))} "
                           "only")
    _check_kinds(settings, [*family.settings, *family.biases, family.unturned])
    flat = dict(family.ours)
    for theirs, ours in family.settings.items():
        if settings.get(theirs) is not None:
            flat[ours] = settings[theirs]
        elif ours in REQUIRED:
            raise HubError(f"{theirs} is missing")
    if family.unturned:
        flat["head_dim"] = settings[family.unturned] + flat["mla.rope_dim"]
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


def _check_kinds(values: dict[str, Any], keys: Iterable[str | None]) -> None:
    """HubError for a value of another kind than its setting has; null is as good as nothing."""
    for key in keys:
        value = values.get(key)
        if key in SWITCHES:
            good, kind = isinstance(value, bool), "true or false"
        elif key in LISTS:
            good, kind = isinstance(value, list | tuple) and all(map(_is_number, value)), "a list of numbers"
        else:
            good, kind = _is_number(value), "a number"
        if value is not None and not good:
            raise HubError(f"{key} is {cut(repr(value))}, and must be {kind}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _derive(flat: dict[str, Any]) -> None:
    """What follows from other settings where it is not given."""
    numbers = [flat[name] for name in ("d_model", "n_heads")]
    if not all(isinstance(n, int) and n > 0 for n in numbers):
        raise HubError(f"d_model {numbers[0]} and n_heads {numbers[1]} must be whole numbers above 0")
    flat.setdefault("n_kv_heads", flat["n_heads"])
    flat.setdefault("head_dim", flat["d_model"] // flat["n_heads"])
    flat.setdefault("d_ff", flat.get("moe.d_expert", 4 * flat["d_model"]))


_SCALINGS = {  # their rope_type: their numbers and ours
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {"factor": "factor", "low_freq_factor": "low_frequency", "high_freq_factor": "high_frequency"},
    "yarn": {"factor": "factor", "beta_slow": "low_frequency", "beta_fast": "high_frequency", "mscale": "mscale",
             "mscale_all_dim": "mscale_all_dim", "attention_factor": "attention_factor", "truncate": "whole_pairs"},
    "longrope": {"short_factor": "short_factors", "long_factor": "long_factors",
                 "attention_factor": "attention_factor"}}
_NEEDED = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor"), "yarn": ("factor",),
           "longrope": ("short_factor", "long_factor")}
_MSCALES = ("short_mscale", "long_mscale")
_ORIGINAL = "original_max_position_embeddings"


def _read_rope(family: Family, settings: dict[str, Any], flat: dict[str, Any]) -> dict[str, Any]:
    """Rotary settings: in `rope_parameters` since transformers 5, beside `rope_scaling` before, which goes first."""
    given = settings.get("rope_scaling") or settings.get("rope_parameters") or {}
    if not isinstance(given, dict):
        raise HubError(f"rope_parameters must be a mapping, not {cut(repr(given))}")
    given = {key: settings[key] for key in ("rope_theta", "partial_rotary_factor") if key in settings} | given
    kind = given.get("rope_type", given.get("type", "default"))
    kind = "longrope" if kind == "su" else kind  # its first name
    if kind not in ("default", *family.scalings):
        raise HubError(f"rope_type {cut(repr(kind))} is not one of {', '.join(('default', *family.scalings))}")
    # where it stands in both places, transformers takes the outer one, and a class that has a default has it there
    given[_ORIGINAL] = settings.get(_ORIGINAL, given.get(_ORIGINAL, flat["context_length"]))
    _check_kinds(given, ("rope_theta", "partial_rotary_factor", "factor", _ORIGINAL, *_MSCALES, *_SCALINGS[kind]))
    found = {"rope_theta": given["rope_theta"]}
    share = given.get("partial_rotary_factor", family.partial) if family.partial else 1.0
    if share is None or not 0 < share <= 1:
        raise HubError(f"partial_rotary_factor {share} must lie above 0, up to 1")
    if share < 1:
        found["rotary_dim"] = int(flat["head_dim"] * share)
    if kind == "default":
        return found
    for key in (*_NEEDED[kind], *(_MSCALES if family.mscale else ())):
        if given.get(key) is None:
            raise HubError(f"rope_type {kind!r} needs {key}")
    scaling = {"kind": kind, "original_context": given[_ORIGINAL]}
    if kind == "yarn":
        scaling["high_frequency"] = 32.0  # what transformers takes where beta_fast is left out
    scaling |= {ours: given[theirs] for theirs, ours in _SCALINGS[kind].items() if given.get(theirs) is not None}
    if kind == "longrope" and "attention_factor" not in scaling:
        _attention_factor(given, scaling)
    return found | {f"rope_scaling.{key}": value for key, value in scaling.items()}


def _attention_factor(given: dict[str, Any], scaling: dict[str, Any]) -> None:
    """From `long_mscale`, or from a `factor` that takes the place of the ratio of the two contexts."""
    short, long = (given.get(key) for key in _MSCALES)
    original = given[_ORIGINAL]
    if short != long:
        raise HubError(f"short_mscale {short} and long_mscale {long} must be alike: nanomai has one attention factor")
    if long is not None:
        scaling["attention_factor"] = long
    elif given.get("factor") is not None and original > 1:
        scaling["attention_factor"] = math.sqrt(1 + math.log(max(1, given["factor"])) / math.log(original))


# --- Writing ----------------------------------------------------------------------------------------------------------


def settings_of(config: ModelConfig, architecture: str | None = None) -> dict[str, Any]:
    """config.json of this class, or of the first that says all that `config` says."""
    if architecture is not None and architecture not in FAMILIES:
        raise HubError(f"architecture {cut(repr(architecture))} is not known; there are {', '.join(FAMILIES)}")
    lost = {}
    for name in [architecture] if architecture else FAMILIES:
        family = FAMILIES[name]
        settings = {"architectures": [name], "model_type": family.model_type} | _settings(family, config)
        lost[name] = _lost(family, config) or _changed(config, settings)
        if not lost[name]:
            return settings
    near = min(lost, key=lambda name: len(lost[name]))
    if architecture:
        raise HubError(f"{near} would be this model but for {_list(lost[near])}")
    nowhere = {name: value for name, value in lost[near].items() if all(name in others for others in lost.values())}
    fault = f"has {_list(nowhere)}" if nowhere else "is this model"
    others = {name: value for name, value in lost[near].items() if name not in nowhere}
    nearest = f"; {near} would be {'the rest of it' if nowhere else 'it'} but for {_list(others)}" if others else ""
    raise HubError(f"no class of transformers that nanomai knows {fault}{nearest}")


def caution(settings: dict[str, Any]) -> str | None:
    """One line on where transformers computes something else than the model that this config.json was written for."""
    name, scaling = settings["architectures"][0], settings.get("rope_scaling")
    if not FAMILIES[name].short_only or not scaling:
        return None
    return (f"{name} of transformers keeps to the short factors of LongRoPE: beyond {scaling[_ORIGINAL]} tokens it "
            "computes something else than this model")


def _settings(family: Family, config: ModelConfig) -> dict[str, Any]:
    flat = _flat(config) | {"mla.q_rank": config.mla.q_rank or None}  # a rank of 0 is null there
    settings = {key: allowed[0] for key, allowed in family.demands.items()}
    settings |= {theirs: flat[ours] for theirs, ours in family.settings.items()}
    settings |= {key: set(biases) <= set(config.biases) for key, biases in family.biases.items()}
    if family.unturned:
        settings[family.unturned] = config.head_dim - config.mla.rope_dim
    return settings if family.ours.get("position") == "learned" else settings | _rope_settings(family, config)


def _rope_settings(family: Family, config: ModelConfig) -> dict[str, Any]:
    """In `rope_parameters`, and again where transformers before 5 looks for them."""
    scaling = config.rope_scaling
    settings = {"rope_theta": config.rope_theta}
    if family.partial:
        settings["partial_rotary_factor"] = config.turned_dim / config.head_dim
    if scaling.kind == "none":
        return settings | {"rope_parameters": settings | {"rope_type": "default"}}
    numbers = {theirs: getattr(scaling, ours) for theirs, ours in _SCALINGS.get(scaling.kind, {}).items()}
    if scaling.kind == "longrope":
        numbers["attention_factor"] = rope.attention_factor(config)
        numbers |= dict.fromkeys(_MSCALES if family.mscale else (), rope.attention_factor(config))
    original = {} if scaling.kind == "linear" else {_ORIGINAL: scaling.original_context}
    numbers = {key: number for key, number in numbers.items() if number is not None}
    parameters = settings | {"rope_type": scaling.kind} | original | numbers
    return settings | original | {"rope_parameters": parameters, "rope_scaling": parameters}


# --- Is it still the same model? --------------------------------------------------------------------------------------

_PARTS = {"moe.": "moe.n_experts", "mla.": "mla.kv_rank", "sparse.": "sparse.block"}  # a part: what is 0 without it


def _flat(config: ModelConfig) -> dict[str, Any]:
    """Every setting under its dotted name."""
    flat = {}
    for name, value in dataclasses.asdict(config).items():
        flat |= {f"{name}.{key}": inner for key, inner in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def _features(config: ModelConfig) -> dict[str, Any]:
    """All that decides what the model computes; not how it is trained, nor settings of parts that it does not have."""
    flat, kind = _flat(config), config.rope_scaling.kind
    idle = {"init_std", "moe.balance_loss", "moe.z_loss", "moe.bias_speed"}
    idle |= {name for part, switch in _PARTS.items() if not flat[switch] for name in flat.keys() - {switch}
             if name.startswith(part)}
    of_kind = {f"rope_scaling.{name}" for name in ("kind", "original_context", *_SCALINGS.get(kind, {}).values())}
    idle |= {name for name in flat if name.startswith("rope_scaling.")} - of_kind
    if kind in ("none", "linear"):
        idle.add("rope_scaling.original_context")
    if config.moe.n_experts and not config.moe.n_dense_layers:
        idle.add("d_ff")
    if config.position == "learned":
        idle |= {"rope_theta", "rotary_dim", *of_kind}
    if config.attention_scale == config.head_dim**-0.5:  # what it is where it is not set
        idle.add("attention_scale")
    flat |= {"biases": tuple(sorted(config.biases)), "rotary_dim": config.turned_dim,
             "rope_scaling.attention_factor": rope.attention_factor(config),
             "d_model % n_heads": config.d_model % config.n_heads}
    return {name: value for name, value in flat.items() if name not in idle}


def _lost(family: Family, config: ModelConfig) -> dict[str, Any]:
    """What of the model this class cannot say."""
    features = _features(config)
    always = _flat(ModelConfig()) | {"n_kv_heads": config.n_heads, "head_dim": config.d_model // config.n_heads,
                                     "rotary_dim": config.head_dim} | family.ours
    groups = [biases for biases in family.biases.values() if set(biases) <= set(config.biases)]
    always["biases"] = tuple(sorted([*always["biases"], *sum(groups, ())]))
    possible = {name: (value,) for name, value in always.items()}
    possible |= {ours: family.demands.get(theirs) for theirs, ours in family.settings.items()}  # None: any
    possible |= {name: None for name in features if name.startswith("rope_")}
    possible["rope_scaling.kind"] = ("none", *family.scalings)
    possible["d_model % n_heads"] = (0,) if family.whole_heads else None
    if family.partial or family.unturned or family.ours.get("position") == "learned":
        possible["rotary_dim"] = None
    if family.unturned:
        possible["head_dim"] = None
    lost = {name: value for name, value in features.items() if possible[name] and value not in possible[name]}
    return lost | {name: 0 for name in family.needs if not features.get(name)}


def _changed(config: ModelConfig, settings: dict[str, Any]) -> dict[str, Any]:
    """What of the model is not the same any more when these settings are read, such as a share of a head."""
    returned = _features(config_of(settings)[1])
    return {name: value for name, value in _features(config).items() if returned.get(name) != value}


def _list(features: dict[str, Any]) -> str:
    """In words; of a part that is missing, nothing more than that."""
    parts = tuple(part for part, switch in _PARTS.items() if switch in features)
    words = {name: "+".join(value) or "none" if name == "biases" else cut(str(value))
             for name, value in features.items() if name in _PARTS.values() or not name.startswith(parts)}
    return ", ".join(f"{name} {word}" for name, word in words.items())
