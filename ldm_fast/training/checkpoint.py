"""Checkpoints: one safetensors file each, written so that no crash at any moment can harm it or its predecessor.

A checkpoint holds every tensor of a run (weights, EMA, optimiser state) and, as JSON in the safetensors header, the
step and all other state, with a SHA-256 of the tensors. It is written under another name, flushed to the disk, and
only then renamed; the last two are kept, and a damaged newest gives way to the one before it.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm_fast.files.atomic import reason, write_atomically
from ldm_fast.files.tensors import CheckpointError
from ldm_fast.training.stage import Stage

KEEP = 2
_NAME = re.compile(r"step_(\d{8})\.safetensors")


def save_checkpoint(folder: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> Path:
    """Writes folder/step_XXXXXXXX.safetensors and removes all but the last two. CheckpointError if it cannot."""
    from safetensors.torch import save

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"state": json.dumps({**state, "step": step}), "sha256": _digest(tensors)}
    path = folder / f"step_{step:08d}.safetensors"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, save(tensors, metadata))
    except OSError as error:
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        raise CheckpointError(
            f"could not write the checkpoint {path} ({size / 1e6:.1f} MB): {reason(error)}; "
            "nothing half written is left, and the checkpoints before it are as they were"
        ) from error
    for old in list_checkpoints(folder)[:-KEEP]:
        old.unlink(missing_ok=True)
    return path


def list_checkpoints(folder: Path) -> list[Path]:
    """The folder's checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step_*.safetensors") if _NAME.fullmatch(path.name))


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the state of one checkpoint. CheckpointError if it is truncated, altered or not a checkpoint."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        state = json.loads(metadata["state"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(f"the checkpoint {path} cannot be read: {error}") from error
    if metadata.get("sha256") != _digest(tensors):
        raise CheckpointError(f"the checkpoint {path} is damaged: its tensors do not match their checksum")
    return tensors, state


def newest_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The newest readable checkpoint, None if there is none at all.

    A damaged one is left out with a warning; CheckpointError if checkpoints are there and none can be read.
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
    """SHA-256 over names, dtypes, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


# What a checkpoint holds


def capture(stage: Stage) -> dict[str, Tensor]:
    """Every tensor of a stage's state under a flat name, copied to the CPU: a device may not hold it twice."""
    tensors = {}
    for name, module in stage.modules().items():
        tensors.update({f"weights/{name}/{key}": value for key, value in module.state_dict().items()})
    for name, optimizer in stage.optimizers().items():
        for number, values in optimizer.state_dict()["state"].items():
            tensors.update({f"optimizer/{name}/{number}/{key}": value for key, value in values.items()})
    tensors.update({f"extra/{name}": value for name, value in stage.extra().items()})
    return {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}


def restore(stage: Stage, tensors: dict[str, Tensor]) -> None:
    """Puts what `capture` returned back into the stage. CheckpointError if it belongs to something else."""
    try:
        for name, module in stage.modules().items():
            module.load_state_dict(_under(tensors, f"weights/{name}/"))
        for name, optimizer in stage.optimizers().items():
            _restore_optimizer(optimizer, _under(tensors, f"optimizer/{name}/"))
        for name, value in stage.extra().items():
            value.copy_(tensors[f"extra/{name}"])
    except (KeyError, RuntimeError, IndexError) as error:
        raise CheckpointError(f"the checkpoint does not fit the recipe's {stage.name}: {error}") from error


def _restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """State tensors take the memory layout of their parameter: the fused optimisers read both in memory order."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        number, key = name.split("/", 1)
        param = params[int(number)]
        if tensor.shape == param.shape:
            tensor = torch.empty_like(param, memory_format=torch.preserve_format).copy_(tensor)
        state.setdefault(int(number), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
