"""Attention as a layer: projections around `ops.attention`, and what IP-Adapters add."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_fast import ops
from ldm_fast.models.joined import join, linears, separate
from ldm_fast.models.memory import recall

# Classes of diffusers that compute plain attention, each in its own way.
PLAIN_PROCESSORS = ("AttnProcessor", "AttnProcessor2_0", "SlicedAttnProcessor", "XFormersAttnProcessor")


class ImagePrompts(NamedTuple):
    """What cross attention looks at besides the text (Ye et al., arXiv:2308.06721), one entry for each IP-Adapter."""

    embeds: Sequence[Tensor]  # (B, images, tokens, context channels)
    masks: Sequence[Tensor | None] | None = None  # (1, images, height, width) of any size: where each image counts


class AttnProcessor:
    """Plain attention. diffusers' loaders exchange such objects, and look at the names of their classes."""


class Attention(nn.Module):
    """Multi-head attention from x to `context`, or to x itself if there is no context.

    Inside `fixed_weights`, keys and values of a context are computed once. After `join`, q, k and v of x (k and v
    of a context) come from one product. Both need plain linear layers (`joined.is_plain`).
    """

    _joined = False

    def __init__(
        self, channels: int, *, heads: int, head_dim: int, context_channels: int | None = None, qkv_bias: bool = False
    ):
        super().__init__()
        self.heads = heads
        inner = heads * head_dim
        self.to_q = nn.Linear(channels, inner, bias=qkv_bias)
        self.to_k = nn.Linear(context_channels or channels, inner, bias=qkv_bias)
        self.to_v = nn.Linear(context_channels or channels, inner, bias=qkv_bias)
        self.to_out = nn.ModuleList([nn.Linear(inner, channels), nn.Dropout(0.0)])
        self.processor: Any = AttnProcessor()
        self.has_context = context_channels is not None

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        images: ImagePrompts | None = None,
    ) -> Tensor:
        """Attend from x (B, N, C) to context (B, L, context channels); the mask is that of `ops.attention`."""
        if context is None:
            q, k, v = linears(x, (self.to_q, self.to_k, self.to_v))
        else:
            layers = (self.to_k, self.to_v)
            k, v = recall(context, layers, lambda: linears(context, layers))
            q = self.to_q(x)
        q = self._split(q)  # (B, H, N, D)
        out = ops.attention(q, self._split(k), self._split(v), mask=mask)  # (B, H, N, D)
        if images is not None:
            out = self._add_images(out, q, images)
        result: Tensor = self.to_out[0](out.transpose(1, 2).flatten(2))  # (B, N, C)
        return result

    def _split(self, t: Tensor) -> Tensor:
        """(B, N, H·D) → (B, H, N, D), as a view."""
        return torch.unflatten(t, -1, (self.heads, -1)).transpose(1, 2)

    def _add_images(self, out: Tensor, q: Tensor, images: ImagePrompts) -> Tensor:
        """Return out + Σ scale · mask · attention to the image, over the images of all IP-Adapters, (B, H, N, D)."""
        adapters = self.processor
        if isinstance(adapters, AttnProcessor):
            raise ValueError("Attention: got image embeddings, but no IP-Adapter is loaded")
        count = len(adapters.scale)
        masks = [None] * count if images.masks is None else images.masks
        for name, given in (("image embeddings", images.embeds), ("ip_adapter_masks", masks)):
            if len(given) != count:
                raise ValueError(f"Attention: {name} must be one for each of the {count} IP-Adapters, got {len(given)}")
        parts = zip(images.embeds, masks, adapters.scale, adapters.to_k_ip, adapters.to_v_ip, strict=True)
        for embeds, mask, scale, to_k, to_v in parts:
            for part, weight, area in _image_parts(embeds, mask, scale, q):
                attended = ops.attention(q, self._split(to_k(part)), self._split(to_v(part)))
                out = out + weight * (attended if area is None else attended * area)
        return out

    def join(self) -> None:
        """Put the projections' weights one behind the other in memory, so that one product can use them all.

        Copies and moves of the layer keep this layout. `train()` ends it: training has ordinary parameters.
        """
        self._joined = True
        join((self.to_k, self.to_v) if self.has_context else (self.to_q, self.to_k, self.to_v))

    def train(self, mode: bool = True) -> Attention:
        if mode and self._joined:
            self._joined = False
            separate((self.to_q, self.to_k, self.to_v))
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Attention:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._joined:
            self.join()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self._joined:  # copy.deepcopy gives every weight memory of its own
            self.join()

    def get_processor(self) -> Any:
        """Return what `set_processor` was given."""
        return self.processor

    def set_processor(self, processor: Any) -> None:
        """Take an IP-Adapter's processor (a module with to_k_ip, to_v_ip and scale), or a plain one for none.

        Only its weights and scales are used, never its code: `forward` stays what is computed. ValueError for any other
        processor.
        """
        if isinstance(processor, nn.Module) and hasattr(processor, "to_k_ip") and hasattr(processor, "to_v_ip"):
            self.processor = processor
        elif type(processor).__name__ in PLAIN_PROCESSORS:
            self._modules.pop("processor", None)
            self.processor = AttnProcessor()
        else:
            raise ValueError(
                f"set_processor: {type(processor).__name__} computes attention in a way of its own, which this layer "
                f"does not run; it takes IP-Adapters and {', '.join(PLAIN_PROCESSORS)}"
            )


def join_projections(model: nn.Module) -> None:
    """Call `Attention.join` of every attention in the model."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.join()


def _image_parts(
    embeds: Tensor, mask: Tensor | None, scale: float | list[float], q: Tensor
) -> list[tuple[Tensor, float, Tensor | None]]:
    """Return [(tokens (B, L, C), weight, area (1, 1, N, 1))] of an IP-Adapter; without masks all its images at once."""
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
    area = _over_tokens(mask, q.shape[2]).to(q.device, q.dtype)  # (images, N)
    return [(embeds[:, i], scales[i], area[i][None, None, :, None]) for i in range(images)]


def _over_tokens(mask: Tensor, count: int) -> Tensor:
    """Return a mask (1, images, H, W) as (images, count), resized to where its proportions have `count` pixels."""
    height, width = mask.shape[2:]
    rows = max(1, int(math.sqrt(count / (width / height))))
    rows += count % rows != 0
    flat = F.interpolate(mask, size=(rows, count // rows), mode="bicubic").flatten(2)[0]
    return F.pad(flat, (0, count - flat.shape[1]))  # cut or filled with zeros if the proportions differ
