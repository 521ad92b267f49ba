"""What cross attention looks at besides the text: images of IP-Adapters (Ye et al., arXiv:2308.06721)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

# A context alone, or with the images of all IP-Adapters, each (B, images, tokens, context channels).
Context = Tensor | tuple[Tensor, Sequence[Tensor]] | None


def text_and_images(context: Context) -> tuple[Tensor | None, Sequence[Tensor] | None]:
    """Return the context of text and, if there are any, the images of all IP-Adapters."""
    return context if isinstance(context, tuple) else (context, None)


def split_last_tokens(adapters: Any, context: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
    """Return the context of text and one IP-Adapter's image, whose tokens are the context's last ones.

    That is how diffusers reads a context without images if an IP-Adapter is set.
    """
    count = adapters.num_tokens[0]
    return context[:, :-count], (context[:, None, -count:],)


def image_parts(
    adapters: Any, images: Sequence[Tensor], masks: Tensor | Sequence[Tensor | None] | None, queries: Tensor
) -> list[tuple[Tensor, float, Tensor | None, Any]]:
    """Return [(tokens (B, L, C), weight, area (1, 1, N, 1) or None, (to_k, to_v))] of all IP-Adapters.

    `adapters` is their processor; it has a scale, to_k_ip and to_v_ip for each. masks: for each None or (1, images,
    height, width) of any size, which says where each image counts. queries: (B, H, N, D).
    """
    count = len(adapters.scale)
    if isinstance(masks, Tensor):  # (adapters, 1, height, width)
        masks = list(masks.unsqueeze(1))
    masks = [None] * count if masks is None else masks
    for name, given in (("image embeddings", images), ("ip_adapter_masks", masks)):
        if len(given) != count:
            raise ValueError(f"Attention: {name} must be one for each of the {count} IP-Adapters, got {len(given)}")
    parts = zip(images, masks, adapters.scale, adapters.to_k_ip, adapters.to_v_ip, strict=True)
    return [
        (tokens, weight, area, (to_k, to_v))
        for embeds, mask, scale, to_k, to_v in parts
        for tokens, weight, area in _parts_of_one(embeds, mask, scale, queries)
    ]


def _parts_of_one(
    embeds: Tensor, mask: Tensor | None, scale: float | list[float], queries: Tensor
) -> list[tuple[Tensor, float, Tensor | None]]:
    """Return [(tokens, weight, area)] of one IP-Adapter; without masks all its images at once."""
    if mask is None:
        if isinstance(scale, list):
            raise ValueError("Attention: one IP-Adapter scale for each image needs ip_adapter_masks")
        return [(embeds.flatten(1, -2), scale, None)] if scale != 0 else []
    images = embeds.shape[1]
    if mask.ndim != 4 or mask.shape[:2] != (1, images):
        raise ValueError(f"Attention: an IP-Adapter's mask must be (1, {images}, H, W), got {tuple(mask.shape)}")
    scales = scale if isinstance(scale, list) else [scale] * images
    if len(scales) != images:
        raise ValueError(f"Attention: this IP-Adapter needs {images} scales, one for each image, got {len(scales)}")
    if not any(scales):
        return []
    area = _over_tokens(mask, queries.shape[2]).to(queries.device, queries.dtype)  # (images, N)
    return [(embeds[:, i], scales[i], area[i][None, None, :, None]) for i in range(images)]


def _over_tokens(mask: Tensor, count: int) -> Tensor:
    """Return a mask (1, images, H, W) as (images, count), resized to where its proportions have `count` pixels."""
    height, width = mask.shape[2:]
    rows = max(1, int(math.sqrt(count / (width / height))))
    rows += count % rows != 0
    flat = F.interpolate(mask, size=(rows, count // rows), mode="bicubic").flatten(2)[0]
    return F.pad(flat, (0, count - flat.shape[1]))  # cut or filled with zeros if the proportions differ
