"""A reader for dictionaries: every entry must be understood."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any

from ldm_fast.configs.from_dict import as_tuple, nearest


class Parameters(dict[str, Any]):
    """Parameters that are taken out one by one. `finish` raises an error for those that nobody took."""

    def __init__(self, owner: str, params: Mapping[str, Any]):
        super().__init__(params)
        self.owner = owner  # named in errors
        self.known: set[str] = set()  # what was asked for

    def take(self, name: str, *default: Any) -> Any:
        """Remove a parameter and return its value. ValueError if it is missing and has no default."""
        self.known.add(name)
        if name not in self and not default:
            raise ValueError(f"{self.owner}: parameter {name} is missing")
        return self.pop(name, *default)

    def take_fields(self, config: type, but: Collection[str] = ()) -> dict[str, Any]:
        """Remove all parameters that are named like fields of the dataclass `config`; return them, lists as tuples.

        but: names of fields that are not taken.
        """
        names = {field.name: None for field in fields(config) if field.name not in but}
        self.known.update(names)
        return {name: as_tuple(self.pop(name)) for name in names if name in self}

    def ignore(self, *names: str) -> None:
        """Remove parameters whose values change nothing."""
        for name in names:
            self.take(name, None)

    def insist(self, **values: Any) -> None:
        """Remove parameters. ValueError if one is given with another value than this."""
        for name, value in values.items():
            got = self.take(name, value)
            if got != value:
                raise ValueError(f"{self.owner}: {name} must be {value!r}, got {got!r}")

    def finish(self) -> None:
        """ValueError that names the parameters nobody took, each with the known one that is most like it."""
        if self:
            unknown = (f"{name}={value!r}{nearest(name, self.known)}" for name, value in self.items())
            raise ValueError(f"{self.owner}: not supported: {', '.join(unknown)}")


def one_value(owner: str, name: str, value: Any) -> Any:
    """Return a value that may be given level by level. ValueError if the levels differ."""
    if not isinstance(value, list | tuple):
        return value
    if len(set(value)) != 1:
        raise ValueError(f"{owner}: {name} must be the same at all levels, got {value!r}")
    return value[0]
