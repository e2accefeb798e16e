"""Configuration files become frozen dataclasses, and dataclasses become plain values.

OmegaConf reads YAML, merges `key=value` overrides and resolves `${...}`; pydantic checks the types. There is no logic
in YAML and there are no `_target_` strings; a file may name another as its `base` and say only what differs from it.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import json
import math
import os
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ConfigDict, TypeAdapter, ValidationError

from spct_ray.errors import ConfigError

T = TypeVar("T")
_EXPECTED = {
    "float_type": "a number",
    "int_type": "an integer",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list such as [1, 2]",
    "dict_type": "`key: value` lines",
    "dataclass_type": "`key: value` lines",
}


def load(schema: type[T], path: str, overrides: Sequence[str] = ()) -> T:
    """Read the YAML file at `path`, apply `key=value` overrides (dotted keys), and build `schema`, a dataclass.

    With `base: FILE` (relative to the file itself) it is merged over that file: mappings key by key, all else replaced.
    The override `base=FILE` puts it over another one. Other relative paths, and that one, are relative to the current
    directory. Raises ConfigError that names the file or override, the full key, the value and what is allowed.
    """
    others = [override.partition("=")[2] for override in overrides if override.startswith("base=")]
    tree = _read(path, other=os.path.abspath(others[-1]) if others else None)
    return _build(schema, tree, [o for o in overrides if not o.startswith("base=")], path)


def override(config: T, overrides: Sequence[str]) -> T:
    """The dataclass with `key=value` overrides (dotted keys) applied, as by `load`. Raises ConfigError."""
    return _build(type(config), OmegaConf.create(to_plain(config)), overrides, type(config).__name__)


def rebuild(schema: type[T], plain: Any, place: str) -> T:
    """The dataclass whose plain form an earlier run stored at `place`, file and field, as by `convert`."""
    try:
        return typing.cast(T, convert(schema, plain, place))
    except ConfigError as error:
        raise ConfigError(
            f"{error}\nAnother version of spct-ray wrote this. Its record.json names the version under `packages`: "
            "install that one, or finish the run again with this one (`spct run`; `spct plan` says what it will redo)"
        ) from error


def _read(path: str, above: tuple[str, ...] = (), other: str | None = None) -> DictConfig:
    """The file's tree, over that of its base or of the `other` one in its place. Raises ConfigError."""
    if not os.path.isfile(path):
        named = f"the base of {above[-1]}" if above else f"current directory: {os.getcwd()}"
        raise ConfigError(f"{path}: no such configuration file ({named})")
    if any(os.path.samefile(path, upper) for upper in above):
        raise ConfigError(f"{path}: is a base of itself: {' <- '.join((*above, path))}")
    try:
        tree = OmegaConf.load(path)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(tree, DictConfig):
        raise ConfigError(f"{path}: expected `key: value` lines at the top, found {type(tree).__name__}")
    named_base = tree.pop("base", None)
    base = other or named_base
    if base is None:
        return tree
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base: expected the path of a configuration file, found {base!r}")
    below = os.path.normpath(os.path.join(os.path.dirname(path), base))
    return typing.cast(DictConfig, OmegaConf.merge(_read(below, (*above, path)), tree))


def imported(path: str, key: str) -> Any:
    """The object at the import path `module:name`. Raises ConfigError, which names the setting `key`."""
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"{key}: {path!r} cannot be imported ({error}); it has the form module:name, and the module must be "
            "importable on every node (installed, or on PYTHONPATH)"
        ) from error


def convert(schema: Any, values: Mapping[str, Any], key: str) -> Any:
    """Plain values as a dataclass; what they lack has its default. Raises ConfigError, which names the full key under
    the setting `key`."""
    return _validate(schema, {**_defaults(schema), **values}, lambda inner: ".".join(filter(None, (key, inner))))


def to_plain(value: Any) -> Any:
    """A config as JSON values: dataclasses and mappings become dicts, tuples lists, whole floats integers.

    Two configs are equal exactly when their plain forms are; NaN and other types raise ConfigError.
    """
    if value is None or isinstance(value, bool | str | int):
        return value
    if isinstance(value, float):
        if math.isnan(value):
            raise ConfigError("a configuration value is NaN, which equals nothing, not even itself")
        return int(value) if value.is_integer() else value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    raise ConfigError(f"a configuration holds {value!r} of type {type(value).__name__}, which is not a plain value")


def _build(schema: type[T], tree: DictConfig, overrides: Sequence[str], path: str) -> T:
    for word in overrides:
        _apply(tree, word)
    try:
        values = OmegaConf.to_container(OmegaConf.merge(_defaults(schema), tree), resolve=True)
    except OmegaConfBaseException as error:
        key = f"{error.full_key}: " if error.full_key else ""
        raise ConfigError(f"{path}: {key}{str(error).splitlines()[0]}") from error
    return _validate(schema, values, lambda key: f"{_source(key, path, overrides)}: {key or 'the whole file'}")


def _apply(tree: DictConfig, override: str) -> None:
    key, equals, _ = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r}: write it as key=value, e.g. grpo.beta=0.1")
    try:
        parsed = OmegaConf.to_container(OmegaConf.from_dotlist([f"value{override[len(key) :]}"]), resolve=False)
        OmegaConf.update(tree, key, typing.cast(dict[str, Any], parsed)["value"], merge=True, force_add=True)
    except (yaml.YAMLError, OmegaConfBaseException, AttributeError, TypeError, ValueError, IndexError) as error:
        raise ConfigError(f"override {override!r}: {str(error).splitlines()[0]}") from error


def _source(key: str, path: str, overrides: Sequence[str]) -> str:
    for override in reversed(overrides):
        name = override.partition("=")[0]
        if key == name or key.startswith(f"{name}.") or name.startswith(f"{key}."):
            return f"override {override!r}"
    return path


def _defaults(schema: type) -> dict[str, Any]:
    """The defaults of a dataclass as plain values: a section that a file gives in part keeps the rest of them, which
    may differ from those of the section's own class."""
    made = {f.name: f.default_factory() for f in dataclasses.fields(schema) if f.default_factory is not MISSING}
    given = {f.name: f.default for f in dataclasses.fields(schema) if f.default is not MISSING}
    return {name: to_plain(value) for name, value in (made | given).items()}


def _validate(schema: type[T], values: Any, place: Callable[[str], str]) -> T:
    """`values` as the dataclass `schema`. Raises ConfigError with a line for each problem, which `place(key)` begins.

    As JSON, in which lists are tuples and mappings dataclasses even where 1 must not stand for true. The tuple around
    the schema is what pydantic takes settings for; a plain dataclass has none.
    """
    adapter = TypeAdapter(tuple[schema], config=ConfigDict(extra="forbid", strict=True))  # type: ignore[valid-type]
    try:
        return typing.cast(T, adapter.validate_json(json.dumps([values]))[0])
    except ValidationError as failed:
        lines = []
        for error in failed.errors():
            location = error["loc"][1:]
            key = ".".join(map(str, location))
            lines.append(f"{place(key)}: {_problem(error, schema, location)}")
        raise ConfigError("\n".join(lines)) from failed


def _problem(error: Any, schema: type, location: Sequence[Any]) -> str:
    kind, value = error["type"], error["input"]
    if kind == "unexpected_keyword_argument":
        names, name = _names(schema, location[:-1]), str(location[-1])
        close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        hint = f"did you mean {'.'.join(map(str, (*location[:-1], *close)))!r}?" if close else ""
        return f"unknown key; {hint or 'known keys: ' + ', '.join(names)}"
    if kind == "missing":
        return "missing"
    if kind == "value_error":  # a check across fields in __post_init__
        return str(error["ctx"]["error"])
    if kind == "literal_error":
        return f"{value!r} is not one of {error['ctx']['expected'].replace(' or ', ', ')}"
    quotes = "; write it in quotes" if kind == "string_type" and isinstance(value, int | float) else ""
    expected = f"expected {_EXPECTED[kind]}" if kind in _EXPECTED else error["msg"]
    return f"{expected}, found {value!r}{quotes}"


def _names(kind: Any, location: Sequence[Any]) -> list[str]:
    """Names of the fields of the dataclass at a location within the annotated type `kind`."""
    if dataclasses.is_dataclass(kind):
        if not location:
            return [f.name for f in dataclasses.fields(kind)]
        return _names(typing.get_type_hints(kind)[location[0]], location[1:])
    rest = location[1:] if typing.get_origin(kind) in (tuple, dict) else location
    return next((names for inner in typing.get_args(kind) if (names := _names(inner, rest))), [])
