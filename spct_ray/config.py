"""Configuration files become frozen dataclasses, and dataclasses become plain values.

OmegaConf reads YAML, merges `key=value` overrides and resolves `${...}`. The types are checked here rather than by
its structured configs, which neither type a `tuple[SomeDataclass, ...]` nor name the key of a bad list element.
There is no logic in YAML and there are no `_target_` strings; a file may name another as its `base` and say only what
differs from it.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import importlib
import math
import os
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from spct_ray.errors import ConfigError

T = TypeVar("T")
# Metadata of a field that was added to a config without changing what its default stands for: steps keep their ids.
UNLESS_DEFAULT = {"plain": "unless default"}


def load(schema: type[T], path: str, overrides: Sequence[str] = ()) -> T:
    """Read the YAML file at `path`, apply `key=value` overrides (dotted keys), and build `schema`, a dataclass.

    With `base: FILE` (relative to the file itself) it is merged over that file: mappings key by key, all else replaced.
    The override `base=FILE` puts it over another one. Other relative paths, and that one, are relative to the current
    directory. Raises ConfigError that names the file or override, the full key, the value and what is allowed.
    """
    others = [override.partition("=")[2] for override in overrides if override.startswith("base=")]
    try:
        tree = _read(path, other=os.path.abspath(others[-1]) if others else None)
        for override in overrides:
            if not override.startswith("base="):
                _apply(tree, override)
        values = OmegaConf.to_container(tree, resolve=True)
    except OmegaConfBaseException as error:
        key = f"{error.full_key}: " if error.full_key else ""
        raise ConfigError(f"{path}: {key}{str(error).splitlines()[0]}") from error
    try:
        return typing.cast(T, _convert(values, schema, ""))
    except _BadValueError as error:
        raise ConfigError(f"{_source(error.key, path, overrides)}: {error}") from error


def override(config: T, overrides: Sequence[str]) -> T:
    """The dataclass with `key=value` overrides (dotted keys) applied, as by `load`. Raises ConfigError."""
    tree = OmegaConf.create(to_plain(config))
    for word in overrides:
        _apply(tree, word)
    try:
        return typing.cast(T, _convert(OmegaConf.to_container(tree, resolve=True), type(config), ""))
    except _BadValueError as error:
        raise ConfigError(f"{_source(error.key, type(config).__name__, overrides)}: {error}") from error


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


def convert(kind: Any, values: Mapping[str, Any], key: str) -> Any:
    """Plain values as the dataclass `kind`. Raises ConfigError, which names the full key under the setting `key`."""
    try:
        return _convert(values, kind, key)
    except _BadValueError as error:
        raise ConfigError(str(error)) from error


def to_plain(value: Any) -> Any:
    """A config as JSON values: dataclasses and mappings become dicts, tuples lists, whole floats integers.

    Two configs are equal exactly when their plain forms are; NaN and other types raise ConfigError. A field with
    `UNLESS_DEFAULT` as its metadata is absent while it has its default.
    """
    if isinstance(value, enum.Enum):
        return to_plain(value.value)
    if value is None or isinstance(value, bool | str | int):
        return value
    if isinstance(value, float):
        if math.isnan(value):
            raise ConfigError("a configuration value is NaN, which equals nothing, not even itself")
        return int(value) if value.is_integer() else value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            f.name: to_plain(getattr(value, f.name))
            for f in dataclasses.fields(value)
            if not (f.metadata == UNLESS_DEFAULT and getattr(value, f.name) == _default_of(f))
        }
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    raise ConfigError(f"a configuration holds {value!r} of type {type(value).__name__}, which is not a plain value")


class _BadValueError(Exception):
    """A value at `key` that the schema does not take."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(f"{key or 'the whole file'}: {message}")
        self.key = key


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


def _convert(value: Any, kind: Any, key: str, default: Any = None) -> Any:
    """`value` as the annotated type `kind`; a dataclass takes what `value` leaves out from `default`, if it is one.

    Raises _BadValueError.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _convert_union(value, arguments, key, default)
    if origin is Literal:
        if any(value == choice and type(value) is type(choice) for choice in arguments):
            return value
        raise _BadValueError(key, f"{value!r} is not one of {', '.join(repr(choice) for choice in arguments)}")
    if origin is tuple:
        return _convert_tuple(value, arguments, key)
    if origin is dict:
        if isinstance(value, Mapping):
            return {str(name): _convert(item, arguments[1], _join(key, name)) for name, item in value.items()}
    elif kind is type(None):
        if value is None:
            return None
    elif dataclasses.is_dataclass(kind):
        return _convert_dataclass(value, typing.cast(type, kind), key, default if type(default) is kind else None)
    elif kind is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    elif type(value) is kind:
        return value
    hint = "; write it in quotes" if kind is str and isinstance(value, int | float) else ""
    raise _BadValueError(key, f"expected {_describe(kind)}, found {value!r}{hint}")


def _convert_union(value: Any, kinds: tuple[Any, ...], key: str, default: Any) -> Any:
    problems = []
    for kind in kinds:
        try:
            return _convert(value, kind, key, default)
        except _BadValueError as error:
            problems.append(error)
    real = [problem for kind, problem in zip(kinds, problems, strict=True) if kind is not type(None)]
    if len(real) == 1 and value is not None:
        raise real[0]
    raise _BadValueError(key, f"expected {' or '.join(_describe(kind) for kind in kinds)}, found {value!r}")


def _convert_tuple(value: Any, kinds: tuple[Any, ...], key: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise _BadValueError(key, f"expected a list such as [1, 2], found {value!r}")
    if kinds[-1] is Ellipsis:
        kinds = (kinds[0],) * len(value)
    if len(kinds) != len(value):
        raise _BadValueError(key, f"expected a list of {len(kinds)}, found {len(value)}: {value!r}")
    return tuple(_convert(v, kind, _join(key, i)) for i, (v, kind) in enumerate(zip(value, kinds, strict=True)))


def _convert_dataclass(value: Any, schema: type, key: str, default: Any) -> Any:
    if not isinstance(value, dict):
        raise _BadValueError(key, f"expected `key: value` lines, found {value!r}")
    hints, fields = typing.get_type_hints(schema), [f for f in dataclasses.fields(schema) if f.init]
    names = [f.name for f in fields]
    defaults = {f.name: _default_of(f) if default is None else getattr(default, f.name) for f in fields}
    for name in value:
        if name not in names:
            close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
            hint = f"did you mean {_join(key, close[0])!r}?" if close else f"known keys: {', '.join(names)}"
            raise _BadValueError(_join(key, name), f"unknown key; {hint}")
    for f in fields:
        if f.name not in value and defaults[f.name] is dataclasses.MISSING:
            raise _BadValueError(_join(key, f.name), f"missing; expected {_describe(hints[f.name])}")
    given = {name: _convert(item, hints[name], _join(key, name), defaults[name]) for name, item in value.items()}
    try:
        return schema(**{**defaults, **given})
    except (ValueError, ConfigError) as error:  # a check across fields in __post_init__
        raise _BadValueError(key, str(error)) from error


def _default_of(f: dataclasses.Field[Any]) -> Any:
    return f.default if f.default_factory is dataclasses.MISSING else f.default_factory()


def _join(key: str, name: Any) -> str:
    return f"{key}.{name}" if key else str(name)


def _describe(kind: Any) -> str:
    if kind is type(None):
        return "null"
    plain = {bool: "true or false", int: "an integer", float: "a number", str: "text"}
    return plain.get(kind, str(kind) if typing.get_origin(kind) else getattr(kind, "__name__", str(kind)))
