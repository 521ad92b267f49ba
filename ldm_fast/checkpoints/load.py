"""`load` finds out what is at a path and makes our models of it; `inspect` only finds out.

checkpoint = ldm_fast.load("sd-v1-4.ckpt")     # or a .safetensors, or a folder as diffusers writes it
checkpoint.unet, checkpoint.first_stage, checkpoint.schedule
print(checkpoint.found)                         # what was found, what was ignored, what was assumed
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from ldm_fast.checkpoints import model_file
from ldm_fast.checkpoints.catalogue import MODELS
from ldm_fast.checkpoints.found import NO_SCHEDULE, OUR_FILE, Checkpoint, Found, Part
from ldm_fast.checkpoints.state_dicts import PARTS, inspect_tensors
from ldm_fast.configs.first_stage import AutoencoderConfig
from ldm_fast.configs.unet import UNetConfig, conditioning_key
from ldm_fast.diffusion.schedule import NoiseSchedule
from ldm_fast.files.tensors import CheckpointError, read_json, read_tensors
from ldm_fast.interop.diffusers import READERS, config_from_diffusers, schedule_from_diffusers
from ldm_fast.interop.names import Config, current_names
from ldm_fast.models.pretrained import read_folder


def load(
    path: str | Path,
    *,
    config: Config | Mapping[str, Any] | None = None,
    parts: Collection[str] | None = None,
    ema: bool = True,
    variant: str | None = None,
    torch_dtype: torch.dtype | None = None,
) -> Checkpoint:
    """Load what is at a path. No code from a file is ever run.

    That is a folder as diffusers writes it (of a pipeline or of one model), a single .safetensors, an original .ckpt,
    or a model file of ours. Weights are mapped into memory, so the file has to stay as it is; those of a model file of
    ours are read.

    Args:
        config: the architecture, if it cannot be found out, or to overrule what is found: our configuration of the only
            model, or a dictionary {"unet": …, "first_stage": …, "cond_stage": …} of them.
        parts: the names of the parts to load, None for all. The others may be missing or not understood; they may be
            damaged, too, except in a model file of ours, which has one checksum over all.
        ema: take the moving averages of the weights if the file has them.
        variant: the part of the weights' file names in a folder of diffusers that says which they are ("fp16").
        torch_dtype: the dtype to cast the weights to. None keeps theirs.

    Raises:
        FileNotFoundError: nothing is there.
        CheckpointError (a ValueError): the file is damaged, refused or not understood; or keys are missing, unexpected
            or of the wrong shape, and then all of them are named.
        ValueError: an unknown or missing part, or a configuration for a file that needs none.
    """
    if isinstance(parts, str):
        raise TypeError(f"load: parts must be a collection of names, [{parts!r}] say, got {parts!r}")
    _check_parts(parts, PARTS, "a checkpoint")
    found = inspect(path, config=config, parts=parts, ema=ema, variant=variant)
    _check_parts(parts, found.parts, str(path))
    chosen = {name: part for name, part in found.parts.items() if parts is None or name in parts}
    if found.model == OUR_FILE:
        chosen = model_file.read(found, chosen, torch_dtype)
    try:
        models: dict[str, Any] = {name: part.load(torch_dtype) for name, part in chosen.items()}
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    schedule = None if found.schedule is None else NoiseSchedule(found.schedule)
    return Checkpoint(found, schedule, found.scaling_factor, found.conditioning_key, **models)


def _check_parts(parts: Collection[str] | None, known: Collection[str], what: str) -> None:
    unknown = set(parts or ()) - set(known)
    if unknown:
        raise ValueError(f"load: {what} has no {', '.join(sorted(unknown))}, only {', '.join(known)}")


def inspect(
    path: str | Path,
    *,
    config: Config | Mapping[str, Any] | None = None,
    parts: Collection[str] | None = None,
    ema: bool = True,
    variant: str | None = None,
) -> Found:
    """Find out, from names and shapes alone, what is at a path. Arguments and errors as for `load`."""
    path = Path(path)
    given = _by_part(config)
    if path.is_dir():
        if (path / "model_index.json").is_file():
            return _inspect_pipeline(path, given, parts, variant)
        return _inspect_folder(path, given, variant)
    file = read_tensors(path)
    if model_file.METADATA in file.metadata:
        if config is not None:
            raise ValueError(f"load: {path} is a model of ldm_fast; leave config out")
        return model_file.inspect(file)
    given = {**_config_beside(path), **given}
    try:
        found = inspect_tensors(file.tensors, path, given, ema=ema, parts=parts, others=file.others)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    found.ignored.update(file.wrappers)
    if file.others:
        found.ignored["beside the weights"] = sorted(file.others)
    return found


def _config_beside(path: Path) -> dict[str, Config]:
    """Return the configuration beside a file, if it is that of one model."""
    beside = path.with_name("config.json")
    values = read_json(beside) if beside.is_file() else {}
    return _by_part(config_from_diffusers(values)) if values.get("_class_name") in READERS else {}


def _by_part(config: Config | Mapping[str, Any] | None) -> dict[str, Config]:
    if config is None:
        return {}
    if not isinstance(config, Mapping):
        return {_part_of(config): config}
    if "_class_name" in config:
        return _by_part(config_from_diffusers(config))
    unknown = config.keys() - set(PARTS)
    if unknown or any(type(part) not in MODELS for part in config.values()):
        raise ValueError(f"load: config must be a configuration of ours, or one for each of {', '.join(PARTS)}")
    return dict(config)


def _part_of(config: Config) -> str:
    if isinstance(config, UNetConfig):
        return "unet"
    return "first_stage" if isinstance(config, AutoencoderConfig) else "cond_stage"


# Folders as diffusers writes them


def _inspect_folder(path: Path, given: Mapping[str, Config], variant: str | None) -> Found:
    """Find out what is in a folder with one model."""
    values, names, tensors = read_folder(path, variant)
    try:
        config: Config = config_from_diffusers(values)
    except ValueError as error:
        raise CheckpointError(f"{path / 'config.json'}: {error}") from error
    name = _part_of(config)
    config = given.get(name, config)
    part = Part(MODELS[type(config)], config, current_names(tensors), names, str(path))
    part.check()
    return Found(path, None, {name: part}, scaling_factor=getattr(config, "scaling_factor", 1.0))


def _inspect_pipeline(
    path: Path, given: dict[str, Config], parts: Collection[str] | None, variant: str | None
) -> Found:
    """Find the UNet, the first stage and the schedule in a pipeline's folder.

    Text encoders need tokenizers, and `clip.load_text_encoder` loads both.
    """
    index = read_json(path / "model_index.json")
    found = Found(path, str(index.get("_class_name")), {}, conditioning_key="crossattn")
    for name, about in index.items():
        kind = about[1] if isinstance(about, list) and len(about) == 2 else None
        if kind in READERS:
            part = "unet" if kind.startswith("UNet") else "first_stage"
            try:
                one = _inspect_folder(path / name, given, variant)
            except (CheckpointError, FileNotFoundError) as error:
                if parts is None or part in parts:
                    raise
                found.leave_out(part, error)
                continue
            found.parts |= one.parts
            if "first_stage" in one.parts:
                found.scaling_factor = one.scaling_factor
        elif name == "scheduler" and kind:
            values = read_json(path / name / "scheduler_config.json")
            try:
                found.schedule = schedule_from_diffusers(values)
            except ValueError as error:  # the models are still of use
                found.ignored[NO_SCHEDULE] = [str(error)]
        elif kind:
            found.ignored.setdefault("components of the pipeline that are not ours", []).append(f"{name} ({kind})")
    if "unet" in found.parts:
        found.conditioning_key = conditioning_key(found.parts["unet"].config)
    return found
