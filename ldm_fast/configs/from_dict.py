"""Dictionaries, as TOML and JSON give them, to dataclasses and back, with types checked."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar, Union

T = TypeVar("T")

WORDS = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}


class ConfigError(ValueError):
    """A configuration that cannot be used. The message names the field by its dotted path."""


def from_dict(cls: type[T], values: Mapping[str, Any], path: str = "") -> T:
    """Return the dataclass `cls` made from nested dictionaries; lists become tuples if its annotation says so.

    path: what errors put before a field's name.

    Raises:
        ConfigError (a ValueError): a field is unknown, missing or of the wrong type, or `cls` refuses the values.
    """
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]  # cls is a dataclass
    for name in values:
        if name not in fields:
            hint = nearest(name, fields) or f"; known fields: {', '.join(fields)}"
            raise ConfigError(f"{_join(path, name)}: there is no such field{hint}")
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
        raise ConfigError(f"{path or cls.__name__}: {error}") from error


def to_dict(value: Any) -> Any:
    """Return a dataclass as plain values that JSON can hold: the inverse of `from_dict`."""
    if dataclasses.is_dataclass(value):
        return {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [to_dict(v) for v in value]
    if isinstance(value, dict):
        return {k: to_dict(v) for k, v in value.items()}
    return value


def as_tuple(value: Any) -> Any:
    """Return a list, and all lists in it, as tuples; anything else as it is."""
    return tuple(as_tuple(v) for v in value) if isinstance(value, list | tuple) else value


def free(default: Any) -> Any:
    """Declare a field that influences neither the weights nor how they are trained: a resumed run may change it."""
    return dataclasses.field(default=default, metadata={"free": True})


def is_free(field: dataclasses.Field[Any]) -> bool:
    """Return whether the field was declared by `free`."""
    return bool(field.metadata.get("free"))


# ---- conversion by annotation ----


def _convert(value: Any, hint: Any, path: str) -> Any:
    """Return `value` checked against the annotation `hint` and converted to it."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(value, hint, path)
    if origin is Literal:
        if not any(value == known and type(value) is type(known) for known in arguments):
            raise ConfigError(f"{path}: {value!r} is not {_describe(hint)}{nearest(str(value), map(str, arguments))}")
        return value
    if origin in (tuple, list) or hint in (tuple, list):
        return _convert_sequence(value, hint, path)
    if dataclasses.is_dataclass(hint) or dict in (origin, hint):
        if not isinstance(value, dict):
            raise _wrong_type(value, "a section", path)
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            return from_dict(hint, value, path)
        return {k: _convert(v, arguments[1], _join(path, k)) if arguments else v for k, v in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is type(None) or not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise _wrong_type(value, _describe(hint), path)
    return value


def _convert_union(value: Any, hint: Any, path: str) -> Any:
    """Return the value as the first member of the union that takes it; a single one beside None raises its error."""
    if value is None and type(None) in typing.get_args(hint):
        return None
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


# ---- words for errors ----


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def nearest(name: str, known: Iterable[str]) -> str:
    """Return what an error says of the known name that is most like `name`; nothing if none is."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _wrong_type(value: Any, needed: str, path: str) -> ConfigError:
    return ConfigError(f"{path}: needs {needed}, got {value!r} ({type(value).__name__})")


def _describe(hint: Any) -> str:
    """Return an annotation in words that the author of a recipe knows."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(repr(a) for a in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(a) for a in arguments if a is not type(None))
    if origin in (tuple, list):
        return f"a list of {_describe(arguments[0])}"
    if dataclasses.is_dataclass(hint):
        return "a section"
    return WORDS.get(hint, str(hint))
