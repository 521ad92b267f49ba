"""Checkpoints: one safetensors file each, written so that no crash at any moment harms it or its predecessor.

A checkpoint holds every tensor of a run (weights, averages, optimizer state) and, as JSON in the safetensors header,
the step and all other state, with a SHA-256 of the tensors. It is written under another name, flushed to the disk and
only then renamed. The last two are kept; if the newest is damaged, the one before it is used.
"""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm_fast.files.atomic import reason
from ldm_fast.files.tensors import CheckpointError, read_tensors, tensors_digest, write_tensors

KEEP = 2
_NAME = re.compile(r"step_(\d{8})\.safetensors")


def save_checkpoint(folder: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> Path:
    """Write folder/step_XXXXXXXX.safetensors and remove all but the last two. CheckpointError if it cannot."""
    metadata = {"state": json.dumps({**state, "step": step}), "sha256": _digest(tensors)}
    path = folder / f"step_{step:08d}.safetensors"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(path, tensors, metadata)
    except OSError as error:
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        raise CheckpointError(
            f"could not write the checkpoint {path} ({size / 1e6:.1f} MB): {reason(error)}; "
            "the checkpoints before it are unharmed, and no half-written file is left"
        ) from error
    for old in list_checkpoints(folder)[:-KEEP]:
        old.unlink(missing_ok=True)
    return path


def list_checkpoints(folder: Path) -> list[Path]:
    """List the folder's checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step_*.safetensors") if _NAME.fullmatch(path.name))


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors and the state of one checkpoint. CheckpointError if it is truncated, altered or none at all."""
    file = read_tensors(path)
    try:
        state: dict[str, Any] = json.loads(file.metadata["state"])
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path} is not a checkpoint of a training run: {error}") from error
    if file.metadata.get("sha256") != _digest(file.tensors):
        raise CheckpointError(f"the checkpoint {path} is damaged: its tensors do not match their checksum")
    return file.tensors, state


def newest_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Read the newest readable checkpoint; None if there is none at all.

    A damaged one is left out with a warning; CheckpointError if there are checkpoints and none can be read.
    """
    paths = list_checkpoints(folder)
    for path in reversed(paths):
        try:
            return load_checkpoint(path)
        except CheckpointError as error:
            warnings.warn(f"{error}; trying the one before it", stacklevel=2)
    if paths:
        raise CheckpointError(f"no checkpoint in {folder} can be read; remove the folder to start again")
    return None


def _digest(tensors: dict[str, Tensor]) -> str:
    return tensors_digest(tensors, label="{name}|{dtype}|{shape}|")
