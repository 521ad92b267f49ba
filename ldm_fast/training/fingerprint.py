"""What must not change between two parts of one run: everything in the recipe and the data that affects the weights."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any

from torch import nn

from ldm_fast.configs.from_dict import is_free, to_dict
from ldm_fast.files.tensors import tensors_digest
from ldm_fast.training.image_set import ImageSet
from ldm_fast.training.recipe import Recipe


@dataclass(frozen=True)
class Fingerprint:
    """Every field that affects the weights, flat: {"loop.batch_size": 64, ...}.

    defaults: the names of those that have their default values. An earlier version that lacked such a field did what
    the default says. free: the names of fields that do not affect the weights; an earlier version may have recorded
    them.
    """

    fields: dict[str, Any]
    defaults: frozenset[str] = frozenset()
    free: frozenset[str] = frozenset()

    @classmethod
    def of(cls, value: Any, prefix: str = "") -> Fingerprint:
        """Return the fingerprint of a dataclass, with `prefix` before its fields' names."""
        flat: dict[str, Any] = {}
        defaults: set[str] = set()
        free: set[str] = set()
        for f in dataclasses.fields(value):
            name, inner = prefix + f.name, getattr(value, f.name)
            if is_free(f):
                free.add(name)
            elif dataclasses.is_dataclass(inner):
                part = cls.of(inner, f"{name}.")
                flat.update(part.fields)
                defaults |= part.defaults
                free |= part.free
            else:
                flat[name] = to_dict(inner)
                if inner == f.default:
                    defaults.add(name)
        return cls(flat, frozenset(defaults), frozenset(free))

    def __or__(self, other: Fingerprint) -> Fingerprint:
        return Fingerprint(self.fields | other.fields, self.defaults | other.defaults, self.free | other.free)

    def changes(self, before: dict[str, Any]) -> dict[str, str]:
        """Return what differs from the fields of an earlier run, as {"field": "field: old -> new"}."""
        now = json.loads(json.dumps(self.fields))
        names = sorted((before.keys() | now.keys()) - (self.defaults - before.keys()) - self.free)
        return {n: f"{n}: {before.get(n)!r} -> {now.get(n)!r}" for n in names if before.get(n) != now.get(n)}


def fingerprint(recipe: Recipe, stage: str, data: ImageSet) -> Fingerprint:
    """Return what must not change between two parts of one stage's run.

    The first stage sees no conditions, so they may still be corrected after it.
    """
    images = {"images": data.images, "held_out": data.held_out}
    seen = {"data.images": tensors_digest(images, label="{name}")[:16]}
    if stage == "second_stage":
        seen |= conditions_digest(recipe, data)
    fixed = Fingerprint({"seed": recipe.seed}) | Fingerprint(seen, defaults=frozenset(seen))
    return fixed | Fingerprint.of(recipe.data, "data.") | Fingerprint.of(getattr(recipe, stage), f"{stage}.")


def conditions_digest(recipe: Recipe, data: ImageSet) -> dict[str, str]:
    """Return a digest of what gives a trained second stage's inputs, words or class numbers, their meaning."""
    labels = None if data.labels is None else data.labels.tolist()
    seen = {"none": None, "text": data.captions, "class": [data.classes, labels]}[recipe.second_stage.condition]
    return {"data.conditions": hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:16]}


def weights_digest(model: nn.Module) -> str:
    """Return a digest of a model's weights, as a second stage's fingerprint holds that of its first stage."""
    return tensors_digest(model.state_dict(), label="{name}")
