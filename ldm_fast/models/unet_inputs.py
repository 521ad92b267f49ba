"""What a UNet is called with: checks, and what becomes of masks and residuals before the blocks take them."""

from __future__ import annotations

import warnings
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
    """ValueError if class labels are missing, or not what `embedding` takes; or needless, without a context."""
    if embedding is None and (class_labels is None or config.is_conditional):
        return  # a conditional UNet of diffusers does not look at needless labels, the other one refuses them
    if (class_labels is None) != (embedding is None):
        needs = "needs" if class_labels is None else "does not take"
        kind = f"class_embed_type is {config.class_embed_type}, num_class_embeds is {config.num_class_embeds}"
        raise ValueError(f"UNet: this UNet {needs} class_labels ({kind})")
    assert class_labels is not None
    shape = class_label_shape(config, batch)
    if tuple(class_labels.shape) != shape:
        raise ValueError(f"UNet: class_labels must be {shape}, got {tuple(class_labels.shape)}")
    if isinstance(embedding, torch.nn.Embedding) and class_labels.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"UNet: class_labels must be int64, got {class_labels.dtype}")


def residuals_as_meant(
    down: Sequence[Tensor] | None, mid: Tensor | None, extras: Sequence[Tensor] | None
) -> tuple[Sequence[Tensor] | None, Tensor | None, list[Tensor]]:
    """Return a ControlNet's residuals, both or neither, and a T2I-Adapter's, as diffusers understands them.

    Residuals of the way down alone are a T2I-Adapter's, as they once were given. One of the middle alone is left out.
    """
    if down is not None and mid is not None:
        return down, mid, list(extras or ())
    if down is not None and extras is None:
        return None, None, list(down)
    if down is not None or mid is not None:
        name = "mid_block_additional_residual" if down is None else "down_block_additional_residuals"
        warnings.warn(f"UNet: {name} alone changes nothing: a ControlNet gives both residuals", stacklevel=3)
    return None, None, list(extras or ())


def given(added: Mapping[str, Any], name: str) -> Any:
    """Return an entry of added_cond_kwargs. ValueError if it is missing."""
    if added.get(name) is None:
        raise ValueError(f"UNet: added_cond_kwargs needs {name!r} for this UNet, got {', '.join(added) or 'nothing'}")
    return added[name]


def biases(
    mask: Tensor | None, context_mask: Tensor | None, sample: Tensor, context: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Return masks, 1 = attend, as what is added to the scores: 0, and -10000 for a 0.

    (B, keys) → (B, 1, keys), and masks with a row for each query, or one for all, (B, queries, keys) → (B, 1, …).
    """
    batch, tokens = sample.shape[0], None if context is None else context.shape[1]
    if mask is not None and (mask.ndim not in (2, 3) or mask.shape[0] != batch):
        raise ValueError(f"UNet: attention_mask must be ({batch}, keys), got {tuple(mask.shape)}")
    if context_mask is not None:
        shape = tuple(context_mask.shape)
        if len(shape) not in (2, 3) or (shape[0], shape[-1]) != (batch, tokens):
            needed = "None without encoder_hidden_states" if context is None else (batch, tokens)
            raise ValueError(f"UNet: encoder_attention_mask must be {needed}, got {shape}")
    return _bias(mask, sample), _bias(context_mask, sample)


def _bias(mask: Tensor | None, like: Tensor) -> Tensor | None:
    if mask is None or mask.ndim == 2:
        return bias(mask, like)
    return ((1 - mask.to(like.dtype)) * -10000.0)[:, None]


def add_extras(h: Tensor, extras: Sequence[Tensor]) -> Tensor:
    """Add the residual that a T2I-Adapter gives for the middle; leave out any other that the way down has not used."""
    return h + extras[0] if extras and extras[0].shape == h.shape else h


def add_residuals(skips: Sequence[Tensor], residuals: Sequence[Tensor]) -> list[Tensor]:
    """Add a ControlNet's residuals to the skip connections."""
    if len(skips) != len(residuals):
        raise ValueError(f"UNet: down_block_additional_residuals must be {len(skips)} tensors, got {len(residuals)}")
    return [skip + residual for skip, residual in zip(skips, residuals, strict=True)]
