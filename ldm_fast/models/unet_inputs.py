"""What a UNet is called with: checks, and what becomes of masks and residuals before the blocks take them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ldm_fast.configs.unet import UNetConfig
from ldm_fast.models.embeddings import class_label_shape
from ldm_fast.models.layers import bias


def check_dtypes(dtype: torch.dtype, **inputs: Tensor | None) -> None:
    """ValueError if an input is not in the dtype of the weights."""
    for name, tensor in inputs.items():
        if tensor is not None and tensor.dtype != dtype:
            raise ValueError(f"UNet: {name} must be {dtype} as the weights are, got {tensor.dtype}")


def sample_channels(config: UNetConfig, conv_in: torch.nn.Module) -> int | None:
    """Return the channels of the sample: all that the first layer takes but the four that are made of a hint.

    The layer may have been exchanged for one that takes more. None if it does not tell.
    """
    channels = getattr(conv_in, "in_channels", None)
    return channels - (4 if config.addition_embed_type == "image_hint" else 0) if isinstance(channels, int) else None


def check_sample(
    config: UNetConfig, channels: int | None, sample: Tensor, timestep: Any, timestep_cond: Tensor | None
) -> None:
    """ValueError if the latent, the timesteps or their condition have the wrong shape."""
    if sample.ndim != 4 or sample.shape[1] != (channels or sample.shape[1]):
        raise ValueError(f"UNet: sample must be (B, {channels}, H, W), got {tuple(sample.shape)}")
    batch = sample.shape[0]
    shape = () if isinstance(timestep, (float, int)) else getattr(timestep, "shape", None)  # NumPy's have one, too
    if shape is None or tuple(shape) not in ((), (1,), (batch,)):
        got = repr(timestep) if shape is None else tuple(shape)
        raise ValueError(f"UNet: timestep must be a number or a tensor ({batch},), got {got}")
    needed = None if config.time_cond_proj_dim is None else (batch, config.time_cond_proj_dim)
    if timestep_cond is not None and tuple(timestep_cond.shape) != needed:
        raise ValueError(f"UNet: timestep_cond must be {needed}, got {tuple(timestep_cond.shape)}")


def as_batch(timestep: Any, sample: Tensor) -> Tensor:
    """Return the timesteps, a number or a tensor, as a tensor (B,) on the device of the sample."""
    precise = torch.float64 if isinstance(timestep, float) and sample.device.type != "mps" else None
    return torch.as_tensor(timestep, dtype=precise, device=sample.device).reshape(-1).expand(sample.shape[0])


def check_context(context: Tensor | None, batch: int, width: int | None, needed: bool) -> None:
    """ValueError if the context is `needed` and missing, or not (batch, L, width). If width is None, none is taken."""
    if context is None:
        if needed:
            raise ValueError("UNet: encoder_hidden_states is missing; this UNet has cross attention")
    elif width is None:
        raise ValueError("UNet: encoder_hidden_states given, but this UNet has no cross attention")
    elif context.ndim != 3 or context.shape[0] != batch or context.shape[2] != width:
        raise ValueError(f"UNet: encoder_hidden_states must be ({batch}, L, {width}), got {tuple(context.shape)}")


def check_labels(config: UNetConfig, class_labels: Tensor | None, batch: int, embedding: Any) -> None:
    """ValueError if class labels are missing, needless, or not what `embedding` takes."""
    if (class_labels is None) != (embedding is None):
        needs = "needs" if class_labels is None else "does not take"
        kind = f"class_embed_type is {config.class_embed_type}, num_class_embeds is {config.num_class_embeds}"
        raise ValueError(f"UNet: this UNet {needs} class_labels ({kind})")
    if class_labels is None:
        return
    shape = class_label_shape(config, batch)
    if tuple(class_labels.shape) != shape:
        raise ValueError(f"UNet: class_labels must be {shape}, got {tuple(class_labels.shape)}")
    if isinstance(embedding, torch.nn.Embedding) and class_labels.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"UNet: class_labels must be int64, got {class_labels.dtype}")


def check_residuals(down: Sequence[Tensor] | None, mid: Tensor | None) -> None:
    """ValueError if a ControlNet's residuals are given for one of the way down and the middle alone."""
    if (down is None) != (mid is None):
        raise ValueError(
            "UNet: down_block_additional_residuals and mid_block_additional_residual go together (a ControlNet gives "
            "both); a T2I-Adapter's residuals are down_intrablock_additional_residuals"
        )


def given(added: Mapping[str, Any], name: str) -> Any:
    """Return an entry of added_cond_kwargs. ValueError if it is missing."""
    if added.get(name) is None:
        raise ValueError(f"UNet: added_cond_kwargs needs {name!r} for this UNet, got {', '.join(added) or 'nothing'}")
    return added[name]


def biases(
    mask: Tensor | None, context_mask: Tensor | None, sample: Tensor, context: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Return masks (B, keys), 1 = attend, as what is added to the scores, (B, 1, keys): 0, and -10000 for a 0."""
    batch, tokens = sample.shape[0], None if context is None else context.shape[1]
    if mask is not None and (mask.ndim != 2 or mask.shape[0] != batch):
        raise ValueError(f"UNet: attention_mask must be ({batch}, keys), got {tuple(mask.shape)}")
    if context_mask is not None and tuple(context_mask.shape) != (batch, tokens):
        needed = "None without encoder_hidden_states" if context is None else (batch, tokens)
        raise ValueError(f"UNet: encoder_attention_mask must be {needed}, got {tuple(context_mask.shape)}")
    return bias(mask, sample), bias(context_mask, sample)


def add_extras(h: Tensor, extras: Sequence[Tensor]) -> Tensor:
    """Add what is left of a T2I-Adapter's residuals after the way down: that of the middle, if there is one."""
    if not extras:
        return h
    if len(extras) > 1 or extras[0].shape != h.shape:
        shapes = ", ".join(str(tuple(extra.shape)) for extra in extras)
        raise ValueError(
            "UNet: down_intrablock_additional_residuals must be one for each level and perhaps one of "
            f"{tuple(h.shape)} for the middle; left over: {shapes}"
        )
    return h + extras[0]


def add_residuals(skips: Sequence[Tensor], residuals: Sequence[Tensor]) -> list[Tensor]:
    """Add a ControlNet's residuals to the skip connections."""
    if len(skips) != len(residuals):
        raise ValueError(f"UNet: down_block_additional_residuals must be {len(skips)} tensors, got {len(residuals)}")
    return [skip + residual for skip, residual in zip(skips, residuals, strict=True)]
