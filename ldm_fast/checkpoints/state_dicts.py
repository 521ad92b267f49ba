"""What a state dict holds: which models, under which prefixes, with which configurations, and what is not a weight.

Every key is accounted for: it is a weight of a model, or it is on the list of what training leaves behind, or the state
dict is refused with the key's name. `load.py` reads the files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm_fast.checkpoints import published, recognise
from ldm_fast.checkpoints.catalogue import MODELS, layout
from ldm_fast.checkpoints.found import Found, Part
from ldm_fast.checkpoints.schedules import note_schedule
from ldm_fast.configs.encoders import CLIPShape
from ldm_fast.configs.first_stage import AutoencoderConfig, VQConfig
from ldm_fast.configs.unet import UNetConfig, conditioning_key
from ldm_fast.files.tensors import CheckpointError
from ldm_fast.interop.clip_names import with_text_model
from ldm_fast.interop.names import UNET_PREFIX, Config, check_names, current_names, without_dots

PARTS = ("unet", "first_stage", "cond_stage", "cond_stage_2")  # each is recognised with those before it at hand
PREFIXES = {
    UNET_PREFIX: "unet",
    "first_stage_model.": "first_stage",
    "cond_stage_model.": "cond_stage",
    "conditioner.embedders.0.": "cond_stage",  # Stable Diffusion XL
    "conditioner.embedders.1.": "cond_stage_2",
}
EMA = "model_ema."

_SCHEDULE = (
    "betas|alphas_cumprod|alphas_cumprod_prev|sqrt_alphas_cumprod|sqrt_one_minus_alphas_cumprod|"
    "log_one_minus_alphas_cumprod|sqrt_recip_alphas_cumprod|sqrt_recipm1_alphas_cumprod|posterior_variance|"
    "posterior_log_variance_clipped|posterior_mean_coef1|posterior_mean_coef2|lvlb_weights|logvar|cond_ids"
)
# What an entry is that is not a weight of a model, by its whole name.
NO_WEIGHTS = {
    "the noise schedule's tables": re.compile(rf"(low_scale_model\.)?({_SCHEDULE})|denoiser\.(log_)?sigmas"),
    "the training loss": re.compile(r"(first_stage_model\.)?(model_ema\.)?loss[._a-z]\S*"),
    "counters of the moving averages": re.compile(r"(first_stage_model\.)?model_ema\.(decay|num_updates)"),
    "tables of positions and masks": re.compile(r"\S+\.(position_ids|attn_mask)"),
    "the scale of CLIP's own loss": re.compile(r"\S+\.logit_scale"),
    "colours to show label maps in": re.compile(r"(first_stage_model\.)?colorize"),
    "marks of the parameterisation": re.compile(r"v_pred|ztsnr|scale_factor"),  # `note_schedule` reads them
}


def inspect_tensors(
    tensors: Mapping[str, Tensor],
    path: Path,
    given: Mapping[str, Config] | None = None,
    *,
    ema: bool = True,
    parts: Collection[str] | None = None,
    others: Mapping[str, Any] | None = None,
) -> Found:
    """Return what a state dict holds.

    That is a whole checkpoint of the original code, with its parts under prefixes, or one part alone, with the names of
    the original or of diffusers.

    given: configurations of parts, which are not to be recognised then.
    parts: those that have to be understood, None for all.
    others: what stands beside the state dict in its file.

    Errors as for `load`.
    """
    given = dict(given or {})
    groups, prefixes, ignored = _sort(tensors)
    found = Found(path, None, {}, ignored=ignored)
    names, averaged = "compvis", "unet"  # whose names the parts have; which part the averages without its prefix are of
    problems, elsewhere = [], []
    rest = groups["rest"]
    if rest and not any(groups[part] for part in PARTS):
        averaged, names = _only_part(rest, given)
        groups[averaged] = rest if names == "compvis" else current_names(rest)
    elif rest:
        problems.append(f"{len(rest)} unexpected: {', '.join(rest)}")
    for part in PARTS:
        averages = _pop_averages(groups[part], groups["ema"] if part == averaged else {})
        config = given.get(part)
        try:
            if averages and ema:
                ignored[f"weights of the {part} that their moving averages replace"] = list(groups[part])
                groups[part] = _averaged(groups[part], averages, config)
            elif averages:
                ignored[f"moving averages of the {part}"] = list(averages)
            if groups[part]:
                _add_part(found, part, groups[part], names, prefixes.get(part, "no prefix"), config)
        except CheckpointError as error:
            if parts is None or part in parts:
                problems.append(str(error))
            else:
                elsewhere.append(str(error))
                found.leave_out(part, error)
    if problems or not found.parts:
        raise CheckpointError("; ".join(problems or elsewhere) or "there are no weights in it")
    note_schedule(found, tensors, others or {})
    return found


def _add_part(
    found: Found, name: str, tensors: dict[str, Tensor], names: str, where: str, config: Config | None
) -> None:
    if name == "cond_stage" and "encoder.conv_in.weight" in tensors:
        found.ignored["the first stage once more, as encoder of the condition"] = list(tensors)
        return
    if name.startswith("cond_stage"):
        tensors = with_text_model(tensors)
    if config is None and names == "diffusers":
        raise CheckpointError(f"{name} under diffusers' names without config.json: put that beside it, or give config=")
    if config is None:
        config = RECOGNISERS[name](tensors, found)
    elif isinstance(config, UNetConfig):
        found.conditioning_key = conditioning_key(config)
    if isinstance(config, CLIPShape) and config.projection is not None and not _takes_pooled_text(found):
        unused = [key for key in tensors if key.endswith("text_projection")]
        found.ignored["the projection of CLIP's pooled vector, which this UNet does not take"] = unused
        tensors = {key: tensor for key, tensor in tensors.items() if key not in unused}
        config = replace(config, projection=None)
    found.parts[name] = Part(MODELS[type(config)], config, tensors, names, where)
    found.parts[name].check()


def _takes_pooled_text(found: Found) -> bool:
    unet = found.parts.get("unet")
    return unet is None or unet.config.addition_embed_type == "text_time"


def _sort(
    tensors: Mapping[str, Tensor],
) -> tuple[dict[str, dict[str, Tensor]], dict[str, str], dict[str, list[str]]]:
    """Sort the tensors of a state dict into parts.

    Returns the tensors of each part without their prefix, of "ema" and of the "rest"; the parts' prefixes; and the
    names of what is not a weight, by its kind.
    """
    groups: dict[str, dict[str, Tensor]] = {group: {} for group in (*PARTS, "ema", "rest")}
    ignored: dict[str, list[str]] = {}
    found: dict[str, str] = {}
    prefixes = {**PREFIXES, EMA: "ema"}
    for name, tensor in tensors.items():
        what = next((what for what, pattern in NO_WEIGHTS.items() if pattern.fullmatch(name)), None)
        if what is not None:
            ignored.setdefault(what, []).append(name)
            continue
        prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), "")
        group = prefixes.get(prefix, "rest")
        groups[group][name.removeprefix(prefix)] = tensor
        found[group] = prefix
    return groups, found, ignored


def _only_part(tensors: Mapping[str, Tensor], given: Mapping[str, Config]) -> tuple[str, str]:
    """Return (which part these tensors without a prefix are, whose names they have)."""
    for part, names, start in (
        ("unet", "compvis", "input_blocks."),
        ("unet", "diffusers", "down_blocks."),
        ("first_stage", "diffusers", "encoder.down_blocks."),
        ("first_stage", "compvis", "encoder."),
    ):
        if any(name.startswith(start) for name in tensors):
            return part, names
    if given.keys() == {"cond_stage"}:
        return "cond_stage", "compvis"
    some = ", ".join(list(tensors)[:3]) or "none"
    raise CheckpointError(f"its tensors have the names of no model known here: {some}, … ({len(tensors)} in all)")


def _pop_averages(weights: dict[str, Tensor], of_the_whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take the moving averages out of a part's tensors; return them and those that the whole checkpoint has of it."""
    own = {name: weights.pop(name) for name in list(weights) if name.startswith(EMA)}
    averages = {name.removeprefix(EMA): tensor for name, tensor in own.items()}
    return averages | {name.removeprefix("diffusion_model"): tensor for name, tensor in of_the_whole.items()}


def _averaged(
    weights: Mapping[str, Tensor], averages: Mapping[str, Tensor], config: Config | None
) -> dict[str, Tensor]:
    """Return moving averages under the names of their weights; the original stores them without the dots."""
    shapes = _shapes(weights)
    if config is not None:
        shapes = {entry.theirs: entry.their_shape for entry in layout(config)}
    elif not weights:
        raise CheckpointError(
            "moving averages without the weights they belong to: shapes do not tell enough, give config="
        )
    names = without_dots(shapes)
    found = {names.get(name, name): tensor for name, tensor in averages.items()}
    check_names(found, shapes, "complete set of moving averages")
    return found


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _recognise_unet(tensors: Mapping[str, Tensor], found: Found) -> UNetConfig:
    shapes = _shapes(tensors)
    try:
        fields = recognise.unet_fields(shapes)
        row = published.find(fields)
        problem = f"no published model has its UNet ({_summary(fields)})"
    except (CheckpointError, ValueError) as error:
        row, problem = None, str(error)
    row = row or _nearest(shapes)
    if row is None:
        raise CheckpointError(f"{problem}, and shapes do not tell the number of heads: give config=UNetConfig(…)")
    found.model, found.conditioning_key = row.name, row.conditioning_key
    found.schedule, found.scaling_factor = row.schedule, row.scaling_factor
    found.assumed.append("number of heads")
    return row.unet


def _summary(fields: Mapping[str, Any]) -> str:
    names = ("in_channels", "block_out_channels", "down_block_types", "cross_attention_dim")
    return ", ".join(f"{name} {fields[name]}" for name in names)


def _nearest(shapes: Mapping[str, tuple[int, ...]], enough: float = 0.9) -> published.Published | None:
    """Return the published model that has all but a few of these tensors, so that an error can say what is wrong."""

    def in_common(row: published.Published) -> float:
        theirs = {(entry.theirs, entry.their_shape) for entry in layout(row.unet)}
        return len(theirs & set(shapes.items())) / max(len(theirs), len(shapes))

    best = max(published.PUBLISHED, key=in_common)
    return best if in_common(best) > enough else None


def _recognise_first_stage(tensors: Mapping[str, Tensor], found: Found) -> AutoencoderConfig | VQConfig:
    config = recognise.first_stage_config(_shapes(tensors))
    unet = found.parts.get("unet")
    if unet is None:
        found.scaling_factor = config.scaling_factor
        found.assumed.append(f"scaling factor {config.scaling_factor}")
        return config
    size, factor = unet.config.sample_size, config.downsampling_factor
    if size is None:
        return replace(config, scaling_factor=found.scaling_factor)
    pixels = size * factor if isinstance(size, int) else (size[0] * factor, size[1] * factor)
    return replace(config, sample_size=pixels, scaling_factor=found.scaling_factor)


def _recognise_encoder(tensors: Mapping[str, Tensor], found: Found) -> Config:
    first_stage = found.parts.get("first_stage")
    factor = None if first_stage is None else first_stage.config.downsampling_factor
    return recognise.encoder_config(_shapes(tensors), factor)


RECOGNISERS: dict[str, Callable[[Mapping[str, Tensor], Found], Config]] = {
    "unet": _recognise_unet,
    "first_stage": _recognise_first_stage,
    "cond_stage": _recognise_encoder,
    "cond_stage_2": _recognise_encoder,
}
