"""Our model file: one .safetensors with weights, configurations, vocabulary, sampling defaults and model card.

Tensors are named unet.*, first_stage.*, cond_stage.* as in `LatentDiffusion.state_dict()`. Everything else is one JSON
object in the file's metadata under "ldm_fast". It is the only entry: safetensors writes several in random order, while
the same model is to give the same bytes. A SHA-256 over both tells a damaged file from a whole one. Nothing is
unpickled, and classes are looked up only in the table below.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm_fast.checkpoints.found import OUR_FILE, Found, Part
from ldm_fast.configs.diffusion import Defaults, DiffusionConfig
from ldm_fast.configs.encoders import ClassEmbedderConfig, SpatialRescalerConfig, TextEncoderConfig, TransformerConfig
from ldm_fast.configs.first_stage import AutoencoderConfig, VQConfig
from ldm_fast.configs.from_dict import from_dict, to_dict
from ldm_fast.configs.unet import UNetConfig
from ldm_fast.files.tensors import CheckpointError, TensorFile, add_to_digest, read_each, tensors_digest, write_tensors
from ldm_fast.interop.names import check_names
from ldm_fast.models.autoencoder import AutoencoderKL, VQModel
from ldm_fast.models.encoders import BertTextEncoder, ClassEmbedder, SpatialRescaler, TextEncoder, TransformerEmbedder
from ldm_fast.models.unet import UNet

SHIPPED = Path(__file__).parents[1] / "assets" / "emoji.safetensors"
FORMAT = 1
METADATA = "ldm_fast"  # the entry of a safetensors file that makes it a model file of ours

# (class, its configuration) by the name written into the file.
CLASSES: dict[str, dict[str, tuple[type[nn.Module], type]]] = {
    "unet": {"UNet": (UNet, UNetConfig)},
    "first_stage": {"AutoencoderKL": (AutoencoderKL, AutoencoderConfig), "VQModel": (VQModel, VQConfig)},
    "cond_stage": {
        "BertTextEncoder": (BertTextEncoder, TextEncoderConfig),
        "TextEncoder": (TextEncoder, TextEncoderConfig),
        "TransformerEmbedder": (TransformerEmbedder, TransformerConfig),
        "ClassEmbedder": (ClassEmbedder, ClassEmbedderConfig),
        "SpatialRescaler": (SpatialRescaler, SpatialRescalerConfig),
    },
}


# Writing


def save(
    path: str | Path,
    parts: Mapping[str, nn.Module],
    *,
    schedule: DiffusionConfig,
    scaling_factor: float,
    conditioning_key: str | None,
    defaults: Defaults,
    card: Mapping[str, Any],
    dtype: torch.dtype | None = None,
) -> None:
    """Write a model to `path`, whole or not at all.

    Args:
        parts: modules by their names in CLASSES.
        dtype: the dtype to store floating-point weights in (torch.float16, say). None keeps theirs.

    Raises:
        ValueError: a part has no row in CLASSES or has adapters in it, or weights are not finite in `dtype`.
        OSError: the file cannot be written.
    """
    tensors = {
        f"{part}.{name}": _stored(f"{part}.{name}", tensor, dtype)
        for part, module in parts.items()
        for name, tensor in module.state_dict().items()
    }
    about = {
        "format": FORMAT,
        **dict.fromkeys(CLASSES),
        **{part: _describe(part, module) for part, module in parts.items()},
        "schedule": to_dict(schedule),
        "scaling_factor": scaling_factor,
        "conditioning_key": conditioning_key,
        "defaults": to_dict(defaults),
        "card": dict(card),
    }
    about["sha256"] = tensors_digest(tensors, _description(about))
    write_tensors(Path(path), tensors, {METADATA: json.dumps(about)})


def _stored(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    tensor = tensor.detach().cpu().contiguous()
    if not tensor.is_floating_point():
        return tensor
    stored = tensor.to(dtype or tensor.dtype)
    if not stored.isfinite().all():
        raise ValueError(f"cannot save {name}: it holds values that are not finite in {stored.dtype}")
    return stored


def _describe(part: str, module: nn.Module) -> dict[str, Any]:
    name, known = type(module).__name__, CLASSES.get(part, {})
    if name not in known:
        raise ValueError(f"cannot save a {part} of class {name}; known: {', '.join(known)}")
    with torch.device("meta"):
        plain = known[name][0](module.config)
    shapes = {key: tuple(tensor.shape) for key, tensor in plain.state_dict().items()}
    try:
        check_names(module.state_dict(), shapes, name)
    except CheckpointError as error:  # a file that nobody could load
        raise ValueError(f"cannot save the {part}; adapters are to be merged or unloaded first: {error}") from error
    return {"class": name, "config": to_dict(module.config)}


def _description(about: Mapping[str, Any]) -> bytes:
    """Return what the checksum covers beside the tensors."""
    return json.dumps({key: value for key, value in about.items() if key != "sha256"}).encode()


# Reading


def inspect(file: TensorFile) -> Found:
    """Return what a model file holds, with tensors on the meta device. `read` returns the tensors themselves.

    Raises CheckpointError if the file does not describe a model.
    """
    try:
        about = json.loads(file.metadata[METADATA])
    except ValueError as error:
        raise CheckpointError(f"{file.path}: the model description is not JSON: {error}") from error
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        found = about.get("format") if isinstance(about, dict) else about
        raise CheckpointError(f"{file.path} has model format {found!r}; this version of ldm_fast reads {FORMAT}")
    try:
        return Found(
            file.path,
            OUR_FILE,
            _parts(about, file.tensors),
            from_dict(DiffusionConfig, about["schedule"], "schedule"),
            float(about["scaling_factor"]),
            about["conditioning_key"],
            defaults=from_dict(Defaults, about["defaults"], "defaults"),
            about=about,
        )
    except KeyError as error:
        raise CheckpointError(f"{file.path} does not hold a usable model: {error} is missing") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file.path} does not hold a usable model: {error}") from error


def _parts(about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Part]:
    parts: dict[str, Part] = {}
    for part, classes in CLASSES.items():
        if (described := about[part]) is None:
            continue
        kind = described["class"]
        if kind not in classes:
            raise ValueError(f"unknown {part} class {kind!r}; known: {', '.join(classes)}")
        build, config = classes[kind]
        parts[part] = Part(build, from_dict(config, described["config"], part), {}, "ldm_fast", f"{part}.*")
    for name, tensor in tensors.items():
        part, _, key = name.partition(".")
        if part not in parts:
            raise ValueError(f"unexpected {name}")
        parts[part].tensors[key] = tensor.to("meta")
    return parts


def read(found: Found, parts: Collection[str], dtype: torch.dtype | None) -> dict[str, Part]:
    """Return `parts` with their tensors in memory, cast to `dtype` if one is given.

    The checksum in the file is over all tensors, so those of the other parts are read and dropped. Raises
    CheckpointError if it does not fit.
    """
    tensors = {f"{name}.{key}": tensor for name, part in found.parts.items() for key, tensor in part.tensors.items()}
    chosen = {name: replace(found.parts[name], tensors={}) for name in parts}
    digest = hashlib.sha256(_description(found.about))
    for name, tensor in read_each(found.path, tensors):
        add_to_digest(digest, name, tensor)
        part, _, key = name.partition(".")
        if part in chosen:
            chosen[part].tensors[key] = tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
    if found.about.get("sha256") != digest.hexdigest():
        raise CheckpointError(f"{found.path} has been changed or damaged: its checksum does not fit its content")
    return chosen
