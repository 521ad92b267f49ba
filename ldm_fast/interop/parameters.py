"""A reader for dictionaries: every entry must be understood."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from ldm_fast.configs.from_dict import as_tuple


class Parameters(dict[str, Any]):
    """Parameters that are taken out one by one. `finish` raises an error for those that nobody took."""

    def __init__(self, owner: str, params: Mapping[str, Any]):
        super().__init__(params)
        self.owner = owner  # named in errors

    def take(self, name: str, *default: Any) -> Any:
        """Remove a parameter and return its value. ValueError if it is missing and has no default."""
        if name not in self and not default:
            raise ValueError(f"{self.owner}: parameter {name} is missing")
        return self.pop(name, *default)

    def take_fields(self, config: type) -> dict[str, Any]:
        """Remove all parameters that are named like fields of the dataclass `config`; return them, lists as tuples."""
        names = [field.name for field in fields(config) if field.name in self]
        return {name: as_tuple(self.pop(name)) for name in names}

    def ignore(self, *names: str) -> None:
        """Remove parameters whose values change nothing."""
        for name in names:
            self.pop(name, None)

    def insist(self, **values: Any) -> None:
        """Remove parameters. ValueError if one is given with another value than this."""
        for name, value in values.items():
            got = self.pop(name, value)
            if got != value:
                raise ValueError(f"{self.owner}: {name} must be {value!r}, got {got!r}")

    def finish(self) -> None:
        """ValueError that names the parameters nobody took."""
        if self:
            raise ValueError(f"{self.owner}: not supported: {', '.join(f'{k}={v!r}' for k, v in self.items())}")


def one_value(owner: str, name: str, value: Any) -> Any:
    """Return a value that may be given level by level. ValueError if the levels differ."""
    if not isinstance(value, list | tuple):
        return value
    if len(set(value)) != 1:
        raise ValueError(f"{owner}: {name} must be the same at all levels, got {value!r}")
    return value[0]
