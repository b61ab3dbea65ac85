"""Reading a `Config` from YAML: strictly, so that every mistake is one line with the file, the line and the field."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import types
import typing
from pathlib import Path
from typing import Any, Literal

import yaml

from nanomai.config import Config, ConfigError

CONFIG_FOLDER = Path(__file__).resolve().parent.parent / "scale_configs"


def find_config(name: str | Path) -> Path:
    """The file that `name` means: a path as it stands, or a bare name in `scale_configs/`, from anywhere."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml") and path.exists():
        return path
    known = {p.stem: p for p in sorted(CONFIG_FOLDER.glob("*.yaml"))}
    stem = str(name).removesuffix(".yaml")  # not path.stem: to it, phi-1.5 is phi-1 with a suffix
    if stem in known:
        return known[stem]
    raise ConfigError(f"no configuration {str(name)!r}: neither a .yaml file nor one of the {len(known)} in "
                      f"scale_configs/{_nearest(stem, known)}")


def load_config(name: str | Path, /, **overrides: Any) -> Config:
    """Reads a YAML file strictly; `overrides` are dotted: `load_config("nano", **{"train.steps": 200})`."""
    path = find_config(name)
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(f"{where}: not YAML: {getattr(error, 'problem', None) or 'not UTF-8 text'}") from None
    if root is None:
        raise ConfigError(f"{path}: the file is empty; see scale_configs/nano.yaml for a complete one")
    lines: dict[str, int] = {}
    values = _read(root, Config, "", path, lines)
    values = {"name": path.stem} | values
    for dotted, value in overrides.items():
        _set(values, dotted, value)
    try:
        return config_from_dict(values)
    except ConfigError as error:
        line = f":{lines[error.field]}" if error.field in lines else ""
        where = f"{error.field}: " if error.field else ""
        raise ConfigError(f"{path}{line}: {where}{error}", error.field) from None


def config_from_dict(values: dict[str, Any]) -> Config:
    """The inverse of `dataclasses.asdict`: what a run folder's config.yaml and a checkpoint hold."""
    return _build(Config, values, "")


def replace(config: Config, /, **overrides: Any) -> Config:
    """A copy with dotted fields changed: `replace(config, **{"train.steps": 10})`."""
    values = dataclasses.asdict(config)
    for dotted, value in overrides.items():
        _set(values, dotted, value)
    return config_from_dict(values)


def to_yaml(config: Config) -> str:
    """The whole tree, in the form that `load_config` reads."""
    values = json.loads(json.dumps(dataclasses.asdict(config)))  # tuples become lists
    return yaml.safe_dump(values, sort_keys=False)  # in ASCII: PyYAML writes some line breaks of Unicode as they are


def _read(node: yaml.Node, hint: Any, dotted: str, path: Path, lines: dict[str, int]) -> Any:
    """The plain value of a YAML node; keeps the line of every setting and refuses unknown and duplicate keys."""
    if not dataclasses.is_dataclass(hint):
        return _construct(node, dotted, path)
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{path}:{node.start_mark.line + 1}: {dotted or 'the file'} must be a mapping of settings")
    hints, found = typing.get_type_hints(hint), {}
    for key_node, value_node in node.value:
        key, line = str(key_node.value), key_node.start_mark.line + 1
        name = f"{dotted}.{key}".lstrip(".")
        if key not in hints:
            raise ConfigError(f"{path}:{line}: unknown setting {name!r}{_nearest(key, hints)}", name)
        if key in found:
            raise ConfigError(f"{path}:{line}: {name} is given twice (first on line {lines[name]})", name)
        lines[name] = line
        found[key] = _read(value_node, hints[key], name, path, lines)
    return found


def _construct(node: yaml.Node, dotted: str, path: Path) -> Any:
    """The value of one setting; {step: value} may not give a step twice."""
    where = f"{path}:{node.start_mark.line + 1}: {dotted}"
    try:
        value = yaml.SafeLoader("").construct_object(node, deep=True)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{where}: {getattr(error, 'problem', None) or error}", dotted) from None
    if isinstance(value, dict) and len(value) < len(node.value):
        raise ConfigError(f"{where} gives the same key twice", dotted)
    return value


def _set(values: dict[str, Any], dotted: str, value: Any) -> None:
    """Puts one dotted override into a tree of plain values."""
    *sections, key = dotted.split(".")
    hint: Any = Config
    for section in sections:
        hint = typing.get_type_hints(hint).get(section)
        values = values.setdefault(section, {})
        if not dataclasses.is_dataclass(hint):
            raise ConfigError(f"unknown setting {dotted!r}{_nearest(section, typing.get_type_hints(Config))}", dotted)
    if key not in typing.get_type_hints(hint):
        raise ConfigError(f"unknown setting {dotted!r}{_nearest(key, typing.get_type_hints(hint))}", dotted)
    values[key] = value


def _build(hint: Any, value: Any, dotted: str) -> Any:
    """Plain values as the dataclass `hint`, each converted to the type that its field wants."""
    if not dataclasses.is_dataclass(hint):
        try:
            return _convert(value, hint)
        except ValueError as error:
            raise ConfigError(str(error), dotted) from None
    if not isinstance(value, dict):
        raise ConfigError(f"{dotted} must be a mapping of settings", dotted)
    hints = typing.get_type_hints(hint)
    unknown = [key for key in value if key not in hints]
    if unknown:
        name = f"{dotted}.{unknown[0]}".lstrip(".")
        raise ConfigError(f"unknown setting {name!r}{_nearest(unknown[0], hints)}")
    return hint(**{key: _build(hints[key], item, f"{dotted}.{key}".lstrip(".")) for key, item in value.items()})


def _convert(value: Any, hint: Any) -> Any:
    """`value` as the annotated type, or ValueError. The field leads: YAML reads 3e-4 as text and 1 as an int."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for choice in arguments:
            try:
                return _convert(value, choice)
            except ValueError:
                continue
    elif hint is type(None) and value is None:
        return None
    elif origin is Literal and (value in arguments or isinstance(value, bool)):
        word = {True: "on", False: "off"}[value] if isinstance(value, bool) else value  # YAML reads on, off as booleans
        if word in arguments:
            return word
    elif origin is tuple and isinstance(value, list | tuple):
        return tuple(_convert(item, arguments[0]) for item in value)
    elif origin is dict and isinstance(value, dict):
        return {_convert(key, arguments[0]): _convert(item, arguments[1]) for key, item in value.items()}
    elif (hint is bool and isinstance(value, bool)) or (hint is str and isinstance(value, str)):
        return value
    elif hint in (int, float) and isinstance(value, int | float | str) and not isinstance(value, bool):
        number = _number(value)
        if number is not None and (hint is float or number == int(number)):
            return hint(number)
    raise ValueError(f"{value!r} is not {_describe(hint)}")


def _number(value: int | float | str) -> int | float | None:
    try:
        number = float(value)
    except ValueError:
        return None
    except OverflowError:  # a whole number of more than 308 digits
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{value!r} is not a finite number")
    return value if isinstance(value, int) else number


def _describe(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(choice) for choice in arguments)
    if origin is tuple:
        return f"a list of {_describe(arguments[0])}"
    if origin is dict:
        return f"a mapping of {_describe(arguments[0])} to {_describe(arguments[1])}"
    return names[hint]


def _nearest(name: str, known: typing.Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
