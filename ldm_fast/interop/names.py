"""Checkpoint layouts: the parameter names of the original latent-diffusion code ("compvis") and ours, both ways.

    config = unet_config_from_compvis(params)            # what the original's constructor was given
    entries = layout(model, config)                      # of UNet(config), which may be on the meta device
    ours = from_compvis(state_dict, entries, "UNet")     # for UNet(config).load_state_dict
    theirs = to_compvis(ours, entries, "UNet")           # the same tensors again

A layout pairs modules, ours with theirs: a walk over the configuration says which block stands where, and a table says
what the parts of a block are called. Shapes come from our model. An `Entry` says what a rename cannot: the original's
attention over pixels keeps q, k and v in one convolution (interleaved head by head) or in three 1×1 convolutions, ours
in three linear layers. diffusers' names are ours, except those of attention in its first versions (`current_names`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ldm_fast.configs.encoders import ClassEmbedderConfig, CLIPShape, SpatialRescalerConfig, TransformerConfig
from ldm_fast.configs.first_stage import AutoencoderConfig, VQConfig
from ldm_fast.configs.unet import UNetConfig
from ldm_fast.files.tensors import CheckpointError
from ldm_fast.interop.clip_names import clip_names

Config = UNetConfig | AutoencoderConfig | TransformerConfig | ClassEmbedderConfig | SpatialRescalerConfig | CLIPShape
Names = Iterable[tuple[str, str]]  # (our module, their module)

# The parts of a block: our name, theirs.

UNET_RES_BLOCK = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_SELF_ATTENTION = {
    "group_norm": "norm",
    "to_q": "qkv",
    "to_k": "qkv",
    "to_v": "qkv",
    "to_out.0": "proj_out",
}
FIRST_STAGE_RES_BLOCK = {
    "norm1": "norm1",
    "conv1": "conv1",
    "norm2": "norm2",
    "conv2": "conv2",
    "conv_shortcut": "nin_shortcut",
}
FIRST_STAGE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
TRANSFORMER_LAYER = {  # theirs counts attention and feed-forward as a layer each: 2 i and 2 i + 1
    "attention_norm": "{attention}.0",
    "attention.to_q": "{attention}.1.to_q",
    "attention.to_k": "{attention}.1.to_k",
    "attention.to_v": "{attention}.1.to_v",
    "attention.to_out": "{attention}.1.to_out",
    "feed_forward_norm": "{feed_forward}.0",
    "feed_forward.0": "{feed_forward}.1.net.0.0",
    "feed_forward.2": "{feed_forward}.1.net.2",
}


def _parts(ours: str, theirs: str, table: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for our_part, their_part in table.items():
        yield f"{ours}.{our_part}", f"{theirs}.{their_part}"


def _unet_names(config: UNetConfig) -> Iterator[tuple[str, str]]:
    """Pair the modules of a UNet.

    Theirs has a flat list of input blocks (the first convolution, then for each level its blocks and the reduction), a
    middle, and a flat list of output blocks, which hold a residual block, perhaps attention, perhaps upsampling.
    """
    yield from {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "time_embedding.cond_proj": "time_embed.cond_proj",
        "class_embedding": "label_emb",  # a table of classes; below, a network over a vector
        "class_embedding.linear_1": "label_emb.0.0",
        "class_embedding.linear_2": "label_emb.0.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        "id_predictor": "id_predictor",
    }.items()
    levels, count = len(config.block_out_channels), 0
    for level, block_type in enumerate(config.down_block_types):
        ours = f"down_blocks.{level}"
        for i in range(config.layers(level)):
            count += 1
            yield from _unet_block(f"{ours}.resnets.{i}", f"{ours}.attentions.{i}", f"input_blocks.{count}", block_type)
        if level < levels - 1:
            count += 1
            yield from _unet_resampler(config, f"{ours}.downsamplers.0", f"input_blocks.{count}.0", "op")

    middle = config.mid_block_type or ""
    yield from _unet_block("mid_block.resnets.0", "mid_block.attentions.0", "middle_block", middle)
    yield from _parts("mid_block.resnets.1", "middle_block.2", UNET_RES_BLOCK)

    count = 0
    for up, block_type in enumerate(config.up_block_types):
        ours, level = f"up_blocks.{up}", levels - 1 - up
        for i in range(config.layers(level) + 1):
            yield from _unet_block(
                f"{ours}.resnets.{i}", f"{ours}.attentions.{i}", f"output_blocks.{count}", block_type
            )
            count += 1
        if level > 0:  # in the last block, after its residual block and, if there is one, its attention
            place = f"output_blocks.{count - 1}.{1 if block_type == 'UpBlock2D' else 2}"
            yield from _unet_resampler(config, f"{ours}.upsamplers.0", place, "conv")


def _unet_block(resnet: str, attention: str, theirs: str, block_type: str) -> Iterator[tuple[str, str]]:
    yield from _parts(resnet, f"{theirs}.0", UNET_RES_BLOCK)
    if "CrossAttn" in block_type:
        yield attention, f"{theirs}.1"  # the names inside a spatial transformer are the same
    else:
        yield from _parts(attention, f"{theirs}.1", UNET_SELF_ATTENTION)


def _unet_resampler(config: UNetConfig, ours: str, theirs: str, convolution: str) -> Iterator[tuple[str, str]]:
    yield from _parts(ours, theirs, UNET_RES_BLOCK if config.resample_type == "resnet" else {"conv": convolution})


def _first_stage_names(config: AutoencoderConfig) -> Iterator[tuple[str, str]]:
    levels = len(config.block_out_channels)
    for side in ("encoder", "decoder"):
        yield f"{side}.conv_in", f"{side}.conv_in"
        yield f"{side}.conv_norm_out", f"{side}.norm_out"
        yield f"{side}.conv_out", f"{side}.conv_out"
        yield from _parts(f"{side}.mid_block.resnets.0", f"{side}.mid.block_1", FIRST_STAGE_RES_BLOCK)
        yield from _parts(f"{side}.mid_block.attentions.0", f"{side}.mid.attn_1", FIRST_STAGE_ATTENTION)
        yield from _parts(f"{side}.mid_block.resnets.1", f"{side}.mid.block_2", FIRST_STAGE_RES_BLOCK)
    for level in range(levels):
        # Theirs numbers the decoder's levels by resolution, ours in the order in which the data meets them.
        for ours, theirs, count, resampler in (
            (f"encoder.down_blocks.{level}", f"encoder.down.{level}", config.layers_per_block, "down"),
            (f"decoder.up_blocks.{levels - 1 - level}", f"decoder.up.{level}", config.layers_per_block + 1, "up"),
        ):
            for i in range(count):
                yield from _parts(f"{ours}.resnets.{i}", f"{theirs}.block.{i}", FIRST_STAGE_RES_BLOCK)
                yield from _parts(f"{ours}.attentions.{i}", f"{theirs}.attn.{i}", FIRST_STAGE_ATTENTION)
            yield f"{ours}.{resampler}samplers.0", f"{theirs}.{resampler}sample"
    for same in ("quant_conv", "post_quant_conv", "quantize.embedding"):
        yield same, same


def _transformer_names(config: TransformerConfig) -> Iterator[tuple[str, str]]:
    yield "token_embedding", "transformer.token_emb"
    yield "position_embedding", "transformer.pos_emb.emb"
    yield "norm", "transformer.norm"
    for i in range(config.depth):
        places = {"attention": 2 * i, "feed_forward": 2 * i + 1}
        for ours, theirs in TRANSFORMER_LAYER.items():
            yield f"layers.{i}.{ours}", f"transformer.attn_layers.layers.{theirs.format(**places)}"


def _same_names(*modules: str) -> Callable[[Config], Names]:
    return lambda config: [(module, module) for module in modules]


# The names of the modules, by the class of the configuration.
NAMES: dict[type, Callable[[Any], Names]] = {
    UNetConfig: _unet_names,
    AutoencoderConfig: _first_stage_names,
    VQConfig: _first_stage_names,
    TransformerConfig: _transformer_names,
    ClassEmbedderConfig: _same_names("embedding"),
    SpatialRescalerConfig: _same_names("channel_mapper"),
    CLIPShape: clip_names,
}


@dataclass(frozen=True)
class Entry:
    """A tensor of the original layout and the one of ours that holds the same numbers.

    `ours` has one name; or to_q, to_k and to_v, which theirs stacks head by head as (heads, 3, head width, …); or none
    for a tensor that the original's outputs do not depend on. A matrix may be `transposed`.
    """

    theirs: str
    their_shape: tuple[int, ...]
    ours: tuple[str, ...]
    our_shape: tuple[int, ...]
    heads: int = 1
    transposed: bool = False


# State that only training needs. No other program's layout has a place for it.
TRAINING_STATE = frozenset({"quantize.ema_counts"})


def without_training_state(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors that a trained model needs."""
    return {name: tensor for name, tensor in state_dict.items() if name not in TRAINING_STATE}


def layout(model: nn.Module, config: Config) -> tuple[Entry, ...]:
    """Return every tensor of `model` in both layouts; the model may be on the meta device."""
    renames = dict(NAMES[type(config)](config))
    # Theirs has 1×1 convolutions in attention over pixels: over a row of them in a UNet, over a map in a first stage.
    pixels = (1,) if isinstance(config, UNetConfig) else (1, 1)
    heads = {name: m.heads for name, m in model.named_modules() if getattr(m, "residual_connection", False)}

    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    grouped: dict[str, list[str]] = {}
    for name in shapes:
        grouped.setdefault(_rename(name, renames), []).append(name)
    entries = _without_counterpart(config)
    for theirs, ours in grouped.items():
        shape = shapes[ours[0]]
        attention_heads = next((n for name, n in heads.items() if ours[0].startswith(f"{name}.")), None)
        was_convolution = attention_heads is not None and len(shape) == 2
        their_shape = (len(ours) * shape[0], *shape[1:], *(pixels if was_convolution else ()))
        transposed = isinstance(config, CLIPShape) and theirs == "model.text_projection"
        their_shape = their_shape[::-1] if transposed else their_shape
        entries.append(Entry(theirs, their_shape, tuple(ours), shape, attention_heads or 1, transposed))
    return tuple(entries)


def _rename(name: str, renames: Mapping[str, str]) -> str:
    if name in renames:
        return renames[name]
    module, rest = name, ""
    while "." in module:
        module, _, last = module.rpartition(".")
        rest = f".{last}{rest}"
        if module in renames:
            return renames[module] + rest
    raise ValueError(f"weights: the original's layout has no name for {name}")


def _without_counterpart(config: Config) -> list[Entry]:
    """Return entries for tensors that we lack: LDM's transformer has a head of logits that nothing calls.

    They are left out when read, and written as zeros.
    """
    if not isinstance(config, TransformerConfig):
        return []
    return [
        Entry("transformer.to_logits.weight", (config.vocab_size, config.width), (), ()),
        Entry("transformer.to_logits.bias", (config.vocab_size,), (), ()),
    ]


def from_compvis(state_dict: Mapping[str, Tensor], entries: Sequence[Entry], model: str) -> dict[str, Tensor]:
    """Return the state dict of our model, given one in the original layout without the prefix a checkpoint has.

    entries: the `layout` of the model. model: what errors call it.

    Raises:
        CheckpointError (a ValueError): names every key that is missing, unexpected or of the wrong shape.
    """
    check_names(state_dict, {e.theirs: e.their_shape for e in entries}, f"compvis state dict of this {model}")
    ours: dict[str, Tensor] = {}
    for entry in entries:
        tensor = state_dict[entry.theirs]
        if entry.transposed:
            ours[entry.ours[0]] = tensor.t()
        elif len(entry.ours) == 1:
            ours[entry.ours[0]] = tensor.reshape(entry.our_shape)
        elif entry.ours:
            stacked = tensor.reshape(entry.heads, len(entry.ours), -1, *entry.our_shape[1:])
            for name, part in zip(entry.ours, stacked.unbind(1), strict=True):
                ours[name] = part.reshape(entry.our_shape)
    return ours


def to_compvis(state_dict: Mapping[str, Tensor], entries: Sequence[Entry], model: str) -> dict[str, Tensor]:
    """Return the inverse of `from_compvis`, without training state.

    Raises:
        CheckpointError (a ValueError): names every key that is missing, unexpected or of the wrong shape.
    """
    ours = {name: e.our_shape for e in entries for name in e.ours}
    state_dict = without_training_state(state_dict)
    check_names(state_dict, ours, f"ldm_fast state dict of this {model}")
    like = next(iter(state_dict.values()))
    theirs: dict[str, Tensor] = {}
    for entry in entries:
        if entry.transposed:
            theirs[entry.theirs] = state_dict[entry.ours[0]].t()
        elif entry.ours:
            parts = [state_dict[n].reshape(entry.heads, -1, *entry.our_shape[1:]) for n in entry.ours]
            tensor = torch.stack(parts, 1) if len(parts) > 1 else parts[0]
            theirs[entry.theirs] = tensor.reshape(entry.their_shape)
        else:
            theirs[entry.theirs] = like.new_zeros(entry.their_shape)
    return theirs


def check_names(state_dict: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], what: str) -> None:
    """Compare a state dict with the shapes that `what` has.

    Raises:
        CheckpointError (a ValueError): names every key that is missing, unexpected or of the wrong shape.
    """
    missing = [key for key in shapes if key not in state_dict]
    unexpected = [key for key in state_dict if key not in shapes]
    wrong = [
        f"{key} is {tuple(state_dict[key].shape)} instead of {shape}"
        for key, shape in shapes.items()
        if key in state_dict and tuple(state_dict[key].shape) != shape
    ]
    problems = {"missing": missing, "unexpected": unexpected, "wrong shape": wrong}
    found = [f"{len(keys)} {problem}: {', '.join(keys)}" for problem, keys in problems.items() if keys]
    if found:
        raise CheckpointError(f"not a {what}: {'; '.join(found)}")


UNET_PREFIX = "model.diffusion_model."  # a UNet saved alone has it, too; a first stage saved alone has no prefix

_FIRST_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD_NAME = re.compile(r"(.*attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)")


def current_names(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict of diffusers under today's names.

    In many published first stages the parts of attention over pixels still have their first names: query, key, value
    and proj_attn.
    """
    renamed = {}
    for name, tensor in state_dict.items():
        if old := _OLD_NAME.fullmatch(name):
            name = f"{old[1]}.{_FIRST_ATTENTION[old[2]]}.{old[3]}"
            tensor = tensor.flatten(1) if tensor.ndim == 4 else tensor  # once a 1x1 convolution
        renamed[name] = tensor
    return renamed


def without_dots(names: Iterable[str]) -> dict[str, str]:
    """Return the names of parameters by what the original's moving averages call them.

    ValueError if two would be called the same.
    """
    names = list(names)
    found = {name.replace(".", ""): name for name in names}
    if len(found) < len(names):
        raise ValueError("weights: two names differ only in their dots; their moving averages cannot be told apart")
    return found
