"""What must not change between two parts of one run: what influences the weights, of the recipe and of the data."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm_fast.configs.from_dict import is_free, to_dict
from ldm_fast.training.image_set import ImageSet
from ldm_fast.training.recipe import Recipe


@dataclass(frozen=True)
class Fingerprint:
    """Every field that has an influence on the weights, flat: {"loop.batch_size": 64, ...}.

    `defaults` are those whose values are the defaults: what an earlier version had no field for did as they say.
    `free` are the fields without influence, which an earlier version may have taken for others.
    """

    fields: dict[str, Any]
    defaults: frozenset[str] = frozenset()
    free: frozenset[str] = frozenset()

    @classmethod
    def of(cls, value: Any, prefix: str = "") -> Fingerprint:
        """The fingerprint of a dataclass; `prefix` goes before its fields' names."""
        flat, defaults, free = {}, set(), set()
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
        """What differs from the fields of an earlier run, as {"field": "field: old -> new"}."""
        now = json.loads(json.dumps(self.fields))
        names = sorted((before.keys() | now.keys()) - (self.defaults - before.keys()) - self.free)
        return {n: f"{n}: {before.get(n)!r} -> {now.get(n)!r}" for n in names if before.get(n) != now.get(n)}


def fingerprint(recipe: Recipe, stage: str, data: ImageSet) -> Fingerprint:
    """What must not change between two parts of one run. The first stage sees no conditions: these may be put right
    after it."""
    seen = {"data.images": tensors_digest({"images": data.images, "held_out": data.held_out})[:16]}
    if stage == "second_stage":
        seen |= conditions_digest(recipe, data)
    fixed = Fingerprint({"seed": recipe.seed}) | Fingerprint(seen, defaults=frozenset(seen))
    return fixed | Fingerprint.of(recipe.data, "data.") | Fingerprint.of(getattr(recipe, stage), f"{stage}.")


def conditions_digest(recipe: Recipe, data: ImageSet) -> dict[str, str]:
    """A digest of what the words' and the classes' numbers in a trained second stage depend on."""
    labels = None if data.labels is None else data.labels.tolist()
    seen = {"none": None, "text": data.captions, "class": [data.classes, labels]}[recipe.second_stage.condition]
    return {"data.conditions": hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:16]}


def tensors_digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
