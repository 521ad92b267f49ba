"""One .safetensors file holds one model: weights, configurations, vocabulary, sampling defaults, model card.

Tensors are named unet.*, first_stage.*, cond_stage.* as in `LatentDiffusion.state_dict()`. Everything else is one JSON
object in the file's metadata under "ldm_fast" (the only entry: safetensors writes several in random order, and the same
model shall be the same bytes). A SHA-256 over both tells a damaged file from a whole one. Nothing is unpickled, and no
class is looked up by a name that is not in the table below.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm_fast.configs.diffusion import Defaults, DiffusionConfig
from ldm_fast.configs.encoders import ClassEmbedderConfig, SpatialRescalerConfig, TextEncoderConfig, TransformerConfig
from ldm_fast.configs.first_stage import AutoencoderConfig, VQConfig
from ldm_fast.configs.unet import UNetConfig
from ldm_fast.diffusion.schedule import NoiseSchedule
from ldm_fast.files.atomic import write_atomically
from ldm_fast.models.autoencoder import AutoencoderKL, VQModel
from ldm_fast.models.encoders import BertTextEncoder, ClassEmbedder, SpatialRescaler, TextEncoder, TransformerEmbedder
from ldm_fast.models.unet import UNet

SHIPPED = Path(__file__).parents[1] / "assets" / "emoji.safetensors"
FORMAT = 1

# (class, its configuration) by the name written into the file.
PARTS: dict[str, dict[str, tuple[Callable[..., nn.Module], type]]] = {
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


def save(model: Any, path: str | Path, dtype: torch.dtype | None = None) -> None:
    """Writes `model` to `path`, whole or not at all. `dtype` (torch.float16, say) is what weights are stored in.

    Raises ValueError for a part that has no row in PARTS or has adapters in it, and for weights that are not finite in
    `dtype`, OSError where the file cannot be written.
    """
    from safetensors.torch import save as serialize

    tensors = {name: _stored(name, tensor, dtype) for name, tensor in model.state_dict().items()}
    about = {
        "format": FORMAT,
        **{part: _describe(part, getattr(model, part)) for part in PARTS},
        "schedule": asdict(model.schedule.config),
        "scaling_factor": model.scaling_factor,
        "conditioning_key": model.conditioning_key,
        "defaults": asdict(model.defaults),
        "card": model.card,
    }
    about["sha256"] = _digest(about, tensors)
    write_atomically(path, serialize(tensors, {"ldm_fast": json.dumps(about)}))


def load(path: str | Path | None = None) -> Any:
    """The model stored at `path` (None: the shipped one), weights in float32, in eval mode.

    Raises FileNotFoundError where there is no such file, ValueError naming what is wrong with it otherwise: not a
    safetensors file, cut short, changed, another program's, or tensors missing, unexpected or of the wrong shape.
    """
    path = SHIPPED if path is None else Path(path)
    if not path.is_file():
        hint = "; this copy of ldm_fast comes without the shipped model" if path == SHIPPED else ""
        raise FileNotFoundError(f"no model file at {path}{hint}")
    about, tensors = _read(path)
    try:
        model = _build(about, tensors)
    except KeyError as error:
        raise ValueError(f"{path} does not hold a usable model: {error} is missing") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} does not hold a usable model: {error}") from error
    model.origin = f"{path.name} sha256:{about['sha256'][:16]}"
    return model


def _stored(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    tensor = tensor.detach().cpu().contiguous()
    if not tensor.is_floating_point():
        return tensor
    stored = tensor.to(dtype or tensor.dtype)
    if not stored.isfinite().all():
        raise ValueError(f"cannot save {name}: it holds values that are not finite in {stored.dtype}")
    return stored


def _describe(part: str, module: nn.Module | None) -> dict[str, Any] | None:
    if module is None:
        return None
    name = type(module).__name__
    if name not in PARTS[part]:
        raise ValueError(f"cannot save a {part} of class {name}; known: {', '.join(PARTS[part])}")
    with torch.device("meta"):
        plain = PARTS[part][name][0](module.config)
    try:
        _check_tensors(plain.state_dict(), module.state_dict())
    except ValueError as error:  # a file that nobody could load
        raise ValueError(f"cannot save the {part}; adapters are to be merged or unloaded first: {error}") from error
    return {"class": name, "config": asdict(module.config)}


def _digest(about: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps({k: v for k, v in about.items() if k != "sha256"}).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if "ldm_fast" not in metadata:
                raise ValueError(f"{path} is a safetensors file, but not a model of ldm_fast")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file (cut short or something else): {error}") from error
    try:
        about = json.loads(metadata["ldm_fast"])
    except ValueError as error:
        raise ValueError(f"{path}: the model description is not JSON: {error}") from error
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        found = about.get("format") if isinstance(about, dict) else about
        raise ValueError(f"{path} has model format {found!r}; this version of ldm_fast reads {FORMAT}")
    if about.get("sha256") != _digest(about, tensors):
        raise ValueError(f"{path} has been changed or damaged: its checksum does not fit its content")
    return about, tensors


def _build(about: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    from ldm_fast.pipelines.latent_diffusion import LatentDiffusion

    with torch.random.fork_rng(devices=[]):  # building draws initial weights: leave the caller's random state alone
        parts = {part: _part(part, about[part]) for part in PARTS}
    model = LatentDiffusion(
        **parts,
        schedule=NoiseSchedule(_config(DiffusionConfig, about["schedule"])),
        scaling_factor=about["scaling_factor"],
        conditioning_key=about["conditioning_key"],
        defaults=_config(Defaults, about["defaults"]),
        card=about["card"],
    )
    _check_tensors(model.state_dict(), tensors)
    model.load_state_dict({name: t.float() if t.is_floating_point() else t for name, t in tensors.items()})
    return model.eval()


def _part(part: str, description: dict[str, Any] | None) -> nn.Module | None:
    if description is None:
        return None
    if description["class"] not in PARTS[part]:
        raise ValueError(f"unknown {part} class {description['class']!r}; known: {', '.join(PARTS[part])}")
    build, config = PARTS[part][description["class"]]
    return build(_config(config, description["config"]))


def _config(config: type, values: dict[str, Any]) -> Any:
    """A configuration dataclass from what JSON made of it. ValueError naming fields that are unknown or missing."""
    required = {f.name for f in fields(config) if f.default is MISSING and f.default_factory is MISSING}
    unknown = sorted(values.keys() - {f.name for f in fields(config)})
    missing = sorted(required - values.keys())
    if unknown or missing:
        raise ValueError(f"{config.__name__}: unknown fields {unknown}, missing fields {missing}")
    return config(**{name: _as_tuple(value) for name, value in values.items()})


def _as_tuple(value: Any) -> Any:
    return tuple(_as_tuple(v) for v in value) if isinstance(value, list) else value


def _check_tensors(expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    problems = [f"missing {name}" for name in expected if name not in found]
    problems += [f"unexpected {name}" for name in found if name not in expected]
    problems += [
        f"{name} is {tuple(found[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError("; ".join(problems[:8]) + more)
