"""The configuration of a model, recognised from the names and shapes of its tensors in the original's layout.

Shapes tell everything about a first stage, and everything about a UNet but the number of heads. That, the noise
schedule and the scaling factor come from the list of published models (`published.py`) or from the caller.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from ldm_fast.configs.encoders import ClassEmbedderConfig, CLIPShape, SpatialRescalerConfig, TransformerConfig
from ldm_fast.configs.first_stage import AutoencoderConfig, VQConfig
from ldm_fast.files.tensors import CheckpointError
from ldm_fast.interop.clip_names import clip_shape

Shapes = Mapping[str, tuple[int, ...]]

TRANSFORMER_HEAD_WIDTH = 64  # of LDM's BERT-style encoder, always


@contextlib.contextmanager
def _as_checkpoint_error(what: str) -> Iterator[None]:
    """Turn the error of shapes that are not those of `what` into a CheckpointError that says so."""
    try:
        yield
    except (KeyError, IndexError, ValueError) as error:
        reason = f"there is no {error.args[0]}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"the tensors are not those of {what}: {reason}") from error


@_as_checkpoint_error("a latent diffusion UNet")
def unet_fields(shapes: Shapes) -> dict[str, Any]:
    """Return the fields of UNetConfig that shapes tell: all but the heads and what does not concern weights.

    CheckpointError if it is not a UNet of the original's family.
    """
    blocks = 1 + _last_number(shapes, "output_blocks")
    up = [block for block in range(blocks) if _upsampler(shapes, block) is not None]
    levels = len(up) + 1
    layers = blocks // levels - 1
    # Level by level, the highest resolution first: the number of its first input block.
    starts = [1 + level * (layers + 1) for level in range(levels)]
    first = [f"input_blocks.{start}" for start in starts]
    channels = tuple(shapes[f"{block}.0.out_layers.3.weight"][0] for block in first)
    kinds = tuple(_attention_kind(shapes, f"{block}.1") for block in first)
    middle = _attention_kind(shapes, "middle_block.1")
    transformers = [f"{block}.1" for block, kind in zip(first, kinds, strict=True) if kind == "CrossAttn"]
    transformers += ["middle_block.1"] if middle == "CrossAttn" else []
    scale_shift = shapes["input_blocks.1.0.emb_layers.1.weight"][0] == 2 * channels[0]
    conv = not up or f"output_blocks.{up[0]}.{_upsampler(shapes, up[0])}.conv.weight" in shapes
    return {
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "out_channels": shapes["out.2.weight"][0],
        "down_block_types": tuple(f"{kind}DownBlock2D" for kind in kinds),
        "mid_block_type": f"UNetMidBlock2D{'CrossAttn' if middle == 'CrossAttn' else ''}",
        "block_out_channels": channels,
        "layers_per_block": layers,
        "resnet_time_scale_shift": "scale_shift" if scale_shift else "default",
        "resample_type": "conv" if conv else "resnet",
        **_transformer_fields(shapes, transformers, [f"{block}.1" for block in first]),
        **_embedding_fields(shapes),
    }


def _transformer_fields(shapes: Shapes, transformers: list[str], by_level: list[str]) -> dict[str, Any]:
    if not transformers:
        return {"cross_attention_dim": None}
    cross = {shapes[f"{t}.transformer_blocks.0.attn2.to_k.weight"][1] for t in transformers}
    if len(cross) > 1:
        raise ValueError(f"contexts of different widths: {sorted(cross)}")
    depths = [1 + _last_number(shapes, f"{name}.transformer_blocks") for name in by_level]
    depths[-1] = max(depths[-1], 1 + _last_number(shapes, "middle_block.1.transformer_blocks"))
    depth: int | tuple[int, ...] = tuple(max(1, d) for d in depths)
    used = {d for d in depths if d > 0}
    only = tuple(_looks_at_context_alone(shapes, name) for name in by_level)
    return {
        "cross_attention_dim": cross.pop(),
        "transformer_layers_per_block": used.pop() if len(used) == 1 else depth,
        "use_linear_projection": len(shapes[f"{transformers[0]}.proj_in.weight"]) == 2,
        "only_cross_attention": only if any(only) else False,
    }


def _looks_at_context_alone(shapes: Shapes, name: str) -> bool:
    """Whether the first attention of a transformer block takes the context, too: its keys then have that width.

    If the two widths are the same, this cannot be told, but no published model of such widths does it.
    """
    key = f"{name}.transformer_blocks.0.attn1.to_k.weight"
    return key in shapes and shapes[key][0] != shapes[key][1]


def _embedding_fields(shapes: Shapes) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if "label_emb.weight" in shapes:
        fields["num_class_embeds"] = shapes["label_emb.weight"][0]
    if "label_emb.0.0.weight" in shapes:
        fields["projection_class_embeddings_input_dim"] = shapes["label_emb.0.0.weight"][1]
    if "id_predictor.1.weight" in shapes:
        fields["n_embed"] = shapes["id_predictor.1.weight"][0]
    if "time_embed.cond_proj.weight" in shapes:
        fields["time_cond_proj_dim"] = shapes["time_embed.cond_proj.weight"][1]
    return fields


def _attention_kind(shapes: Shapes, name: str) -> str:
    if f"{name}.transformer_blocks.0.attn1.to_q.weight" in shapes:
        return "CrossAttn"
    return "Attn" if f"{name}.qkv.weight" in shapes else ""


def _upsampler(shapes: Shapes, block: int) -> int | None:
    """Return the position in an output block of what doubles the size, None if nothing does."""
    for position in (1, 2):
        name = f"output_blocks.{block}.{position}"
        if f"{name}.conv.weight" in shapes or f"{name}.in_layers.0.weight" in shapes:
            return position
    return None


@_as_checkpoint_error("an autoencoder of latent diffusion")
def first_stage_config(shapes: Shapes) -> AutoencoderConfig | VQConfig:
    """Return the configuration of a first stage. CheckpointError if it is not one."""
    levels = range(1 + _last_number(shapes, "encoder.down"))
    codes = shapes.get("quantize.embedding.weight")
    moments = 2 if codes is None else 1
    fields: dict[str, Any] = {
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "block_out_channels": tuple(shapes[f"encoder.down.{level}.block.0.conv1.weight"][0] for level in levels),
        "layers_per_block": 1 + _last_number(shapes, "encoder.down.0.block"),
        "latent_channels": shapes["post_quant_conv.weight"][1],
        "z_channels": shapes["encoder.conv_out.weight"][0] // moments,
        "attention_levels": tuple(level for level in levels if f"encoder.down.{level}.attn.0.q.weight" in shapes),
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in shapes,
    }
    if codes is None:
        return AutoencoderConfig(**fields)
    return VQConfig(**fields, num_vq_embeddings=codes[0], legacy=True)


def encoder_config(
    shapes: Shapes, downsampling_factor: int | None
) -> TransformerConfig | ClassEmbedderConfig | SpatialRescalerConfig | CLIPShape:
    """Return the configuration of one of LDM's condition encoders, or of CLIP's. CheckpointError if it is not one.

    downsampling_factor: the first stage's. A map is brought to the latent's size, and no weight tells by how much.
    """
    if shapes.keys() == {"embedding.weight"}:
        return ClassEmbedderConfig.published(*shapes["embedding.weight"])
    if shapes.keys() == {"channel_mapper.weight"}:
        if downsampling_factor is None:
            raise CheckpointError("shapes do not tell by how much a SpatialRescaler reduces a map; give its config")
        outputs, inputs = shapes["channel_mapper.weight"][:2]
        return SpatialRescalerConfig(inputs, outputs, n_stages=downsampling_factor.bit_length() - 1)
    with _as_checkpoint_error("an encoder of LDM"):
        if (clip := clip_shape(shapes)) is not None:
            return clip
        vocabulary, width = shapes["transformer.token_emb.weight"]
        return TransformerConfig(
            vocab_size=vocabulary,
            width=width,
            depth=(1 + _last_number(shapes, "transformer.attn_layers.layers")) // 2,
            max_length=shapes["transformer.pos_emb.emb.weight"][0],
            heads=shapes["transformer.attn_layers.layers.0.1.to_q.weight"][0] // TRANSFORMER_HEAD_WIDTH,
            head_dim=TRANSFORMER_HEAD_WIDTH,
        )


def _last_number(shapes: Shapes, name: str) -> int:
    """Return the highest n of the names that start with "name.n.", -1 if there is none."""
    pattern = re.compile(rf"{re.escape(name)}\.(\d+)\.")
    return max((int(found[1]) for key in shapes if (found := pattern.match(key))), default=-1)
