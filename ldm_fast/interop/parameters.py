"""Reading a dictionary of which every entry has to be understood."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any


class Parameters(dict):
    """Parameters of which every one has to be taken: what is left at the end is an error."""

    def __init__(self, owner: str, params: Mapping[str, Any]):
        super().__init__(params)
        self.owner = owner

    def take(self, name: str, *default: Any) -> Any:
        if name not in self and not default:
            raise ValueError(f"{self.owner}: parameter {name} is missing")
        return self.pop(name, *default)

    def ignore(self, *names: str) -> None:
        for name in names:
            self.pop(name, None)

    def insist(self, **values: Any) -> None:
        for name, value in values.items():
            got = self.pop(name, value)
            if got != value:
                raise ValueError(f"{self.owner}: {name} must be {value!r}, got {got!r}")

    def take_fields(self, config: type) -> dict[str, Any]:
        """All that are fields of `config` by the same name, lists as tuples."""
        names = [field.name for field in fields(config) if field.name in self]
        return {name: as_tuple(self.pop(name)) for name in names}

    def finish(self) -> None:
        if self:
            raise ValueError(f"{self.owner}: not supported: {', '.join(f'{k}={v!r}' for k, v in self.items())}")


def as_tuple(value: Any) -> Any:
    return tuple(as_tuple(v) for v in value) if isinstance(value, list | tuple) else value


def one_value(owner: str, name: str, value: Any) -> Any:
    """The value of a field that may be given level by level, where all levels have the same."""
    if not isinstance(value, list | tuple):
        return value
    if len(set(value)) != 1:
        raise ValueError(f"{owner}: {name} must be the same at all levels, got {value!r}")
    return value[0]
