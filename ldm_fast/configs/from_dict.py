"""Dictionaries to dataclasses and back, with types checked."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from typing import Any, Literal, Union


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the field by its dotted path."""


def from_dict(cls: type, values: dict[str, Any], path: str = "") -> Any:
    """The dataclass `cls` from nested dictionaries, types checked by its annotations. `path` is what errors prepend."""
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    for name in values:
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known fields: {', '.join(fields)}"
            raise ConfigError(f"{_join(path, name)}: there is no such field; {hint}")
    for name, f in fields.items():
        needed = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if needed and name not in values:
            raise ConfigError(f"{_join(path, name)}: this field is missing; it is {_describe(hints[name])}")
    arguments = {name: _convert(value, hints[name], _join(path, name)) for name, value in values.items()}
    try:
        return cls(**arguments)
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path or 'recipe'}: {error}") from error


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _convert(value: Any, hint: Any, path: str) -> Any:
    """`value` as TOML gives it, checked against the annotation `hint` and turned into what it says."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(value, hint, path)
    if origin is Literal:
        if not any(value == known and type(value) is type(known) for known in arguments):
            near = difflib.get_close_matches(str(value), map(str, arguments), n=1)
            hint_text = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"{path}: {value!r} is not {_describe(hint)}{hint_text}")
        return value
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise _wrong_type(value, "a section", path)
        return from_dict(hint, value, path)
    if origin in (tuple, list) or hint in (tuple, list):
        return _convert_sequence(value, hint, path)
    if origin is dict or hint is dict:
        if not isinstance(value, dict):
            raise _wrong_type(value, "a section", path)
        return {k: _convert(v, arguments[1], _join(path, k)) if arguments else v for k, v in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is type(None) or not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise _wrong_type(value, _describe(hint), path)
    return value


def _convert_union(value: Any, hint: Any, path: str) -> Any:
    """The first member of the union that takes the value; the error of the only one, where there is one beside None."""
    members = [member for member in typing.get_args(hint) if member is not type(None)]
    if len(members) == 1:
        return _convert(value, members[0], path)
    for member in members:
        try:
            return _convert(value, member, path)
        except ConfigError:
            continue
    raise _wrong_type(value, _describe(hint), path)


def _convert_sequence(value: Any, hint: Any, path: str) -> Any:
    arguments = typing.get_args(hint)
    if not isinstance(value, list | tuple):
        raise _wrong_type(value, _describe(hint), path)
    kind = typing.get_origin(hint) or hint
    if kind is list or not arguments or (len(arguments) == 2 and arguments[1] is Ellipsis):
        each = [arguments[0] if arguments else Any] * len(value)
    elif len(arguments) != len(value):
        raise ConfigError(f"{path}: needs {len(arguments)} values, got {len(value)}")
    else:
        each = list(arguments)
    return kind(_convert(v, h, f"{path}[{i}]") for i, (v, h) in enumerate(zip(value, each, strict=True)))


def _wrong_type(value: Any, needed: str, path: str) -> ConfigError:
    return ConfigError(f"{path}: needs {needed}, got {value!r} ({type(value).__name__})")


def _describe(hint: Any) -> str:
    """An annotation in words a recipe's author knows."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(repr(a) for a in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(a) for a in arguments if a is not type(None))
    if origin in (tuple, list):
        return f"a list of {_describe(arguments[0])}"
    if dataclasses.is_dataclass(hint):
        return "a section"
    return {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}.get(hint, str(hint))


def to_dict(value: Any) -> Any:
    """A dataclass as plain values that JSON can hold."""
    if dataclasses.is_dataclass(value):
        return {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [to_dict(v) for v in value]
    if isinstance(value, dict):
        return {k: to_dict(v) for k, v in value.items()}
    return value
