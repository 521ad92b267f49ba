"""Attention as a layer: projections around `ops.attention`, and what IP-Adapters add."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm_fast import ops
from ldm_fast.models.attention_processors import (
    AttnProcessor,
    ProcessorTools,
    is_ip_adapter,
    is_plain_processor,
    run_processor,
    warn_unused,
)
from ldm_fast.models.image_prompts import Context, image_parts, split_last_tokens, text_and_images
from ldm_fast.models.joined import join, linears, separate
from ldm_fast.models.memory import recall


class Attention(ProcessorTools):
    """Multi-head attention from tokens to a context, or to the tokens themselves if there is no context.

    With `residual` it is attention over the pixels of a map, to which the result is added, perhaps after a `group_norm`
    (LDM's AttentionBlock and AttnBlock). Attributes and arguments have diffusers' names.

    Inside `fixed_weights`, keys and values of a context are computed once. After `join`, q, k and v of tokens (k and v
    of a context) come from one product. Both need plain linear layers (`joined.is_plain`).
    """

    path = "Attention"  # where the layer is in its model
    processor: Any
    to_k: Any  # None in `AddedKVAttention`, perhaps
    to_v: Any
    _joined = False
    _runs_processor = False  # instead of computing plain attention or an IP-Adapter
    _takes_images = False  # since the processor is an IP-Adapter
    _processor_call: Any = None  # the code of the processor's class when it was set

    def __init__(
        self,
        channels: int,
        *,
        heads: int,
        head_dim: int,
        context_channels: int | None = None,
        qkv_bias: bool = False,
        group_norm: nn.Module | None = None,
        residual: bool = False,
        rescale_output_factor: float = 1.0,
        upcast_attention: bool = False,
    ):
        super().__init__()
        self.heads = self.sliceable_head_dim = heads
        self.inner_dim = self.inner_kv_dim = inner = heads * head_dim
        self.query_dim = self.out_dim = channels
        self.is_cross_attention = context_channels is not None
        self.cross_attention_dim = context_channels or channels
        self.scale = head_dim**-0.5
        self.upcast_attention = upcast_attention  # for processors: here scores are computed in float32 in any case
        self.use_bias = qkv_bias
        self.residual_connection = self.upcast_softmax = self._from_deprecated_attn_block = residual
        self.rescale_output_factor = rescale_output_factor
        self.group_norm = group_norm
        self._without_extras()
        self.to_q = nn.Linear(channels, inner, bias=qkv_bias)
        self.to_k = nn.Linear(self.cross_attention_dim, inner, bias=qkv_bias)
        self.to_v = nn.Linear(self.cross_attention_dim, inner, bias=qkv_bias)
        self.to_out = nn.ModuleList([nn.Linear(inner, channels), nn.Dropout(0.0)])
        self.processor = AttnProcessor()

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Context = None,
        attention_mask: Tensor | None = None,
        **cross_attention_kwargs: Any,
    ) -> Tensor:
        """Attend from tokens (B, N, C), or the pixels of a map (B, C, H, W), to a context (B, L, context channels).

        With IP-Adapters, the context is (context, images) and `ip_adapter_masks` says where each image counts.
        attention_mask is added to the scores: (B, keys), (B, N or 1, keys), the same for each head (B · heads, N or 1,
        keys), or broadcastable to (B, heads, N, keys). A processor of others gets these arguments as they are.
        """
        if self._runs_processor or type(self.processor).__call__ is not self._processor_call:
            return run_processor(self, hidden_states, encoder_hidden_states, attention_mask, cross_attention_kwargs)
        if cross_attention_kwargs:
            warn_unused(self.processor, [name for name in cross_attention_kwargs if name != "temb"])
        areas = cross_attention_kwargs.get("ip_adapter_masks")
        return self.attend(hidden_states, encoder_hidden_states, attention_mask, areas)

    def attend(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Context = None,
        attention_mask: Tensor | None = None,
        ip_adapter_masks: Any = None,
    ) -> Tensor:
        """Compute what `forward` does if the processor is a plain one or an IP-Adapter."""
        x = self._tokens(hidden_states)  # (B, N, C)
        context, images = text_and_images(encoder_hidden_states)
        if self._takes_images and images is None and context is not None:
            context, images = split_last_tokens(self.processor, context)
        if context is None:
            q, k, v = linears(x, (self.to_q, self.to_k, self.to_v))
        else:
            k, v = recall(context, (self.to_k, self.to_v), lambda: self._keys_and_values(context))
            q = self.to_q(x)
        q, k, v = self._split(q), self._split(k), self._split(v)  # (B, H, N, D)
        mask = None if attention_mask is None else self._mask(attention_mask, len(q), k.shape[2])
        out = ops.attention(q, k, v, mask=mask)  # (B, H, N, D)
        if images is not None:
            out = self._add_images(out, q, images, ip_adapter_masks)
        result: Tensor = self.to_out[0](out.transpose(1, 2).flatten(2))  # (B, N, C)
        if hidden_states.ndim == 4:
            result = to_map(result, hidden_states)
        if self.residual_connection:
            result = hidden_states + result
        return result if self.rescale_output_factor == 1 else result / self.rescale_output_factor

    def _tokens(self, x: Tensor) -> Tensor:
        """Return x normalised, a map as tokens."""
        if x.ndim == 4:
            return to_tokens(x if self.group_norm is None else self.group_norm(x))
        return x if self.group_norm is None else self.group_norm(x.transpose(1, 2)).transpose(1, 2)

    def _keys_and_values(self, context: Tensor) -> Sequence[Tensor]:
        return linears(
            context if self.norm_cross is None else self.norm_encoder_hidden_states(context), (self.to_k, self.to_v)
        )

    def _split(self, t: Tensor) -> Tensor:
        """(B, N, H·D) → (B, H, N, D), as a view."""
        return torch.unflatten(t, -1, (self.heads, -1)).transpose(1, 2)

    def _mask(self, mask: Tensor, batch: int, keys: int) -> Tensor:
        """Return the mask as (B, heads or 1, N or 1, keys). ValueError if it is for another number of keys."""
        if mask.shape[-1] != keys:
            raise ValueError(
                f"{self.path}: attention_mask must be (B, {keys}) for this size, got (B, {mask.shape[-1]}); a UNet "
                "with self attention at several resolutions takes none"
            )
        if mask.ndim == 4:
            return mask
        rows, images = len(mask), 1 if len(mask) == 1 else batch
        if rows not in (1, batch, batch * self.heads):
            raise ValueError(
                f"{self.path}: attention_mask must be for {batch} images or {batch * self.heads} heads, got {rows}"
            )
        return mask.reshape(images, rows // images, -1, keys)

    def _add_images(self, out: Tensor, q: Tensor, images: Sequence[Tensor], masks: Any) -> Tensor:
        """Return out + Σ scale · mask · attention to the image, over the images of all IP-Adapters, (B, H, N, D)."""
        if not self._takes_images:
            raise ValueError(f"{self.path}: got image embeddings, but no IP-Adapter is loaded")
        for tokens, weight, area, (to_k, to_v) in image_parts(self.processor, images, masks, q):
            attended = ops.attention(q, self._split(to_k(tokens)), self._split(to_v(tokens)))
            out = out + weight * (attended if area is None else attended * area)
        return out

    def join(self) -> None:
        """Put the projections' weights one behind the other in memory, so that one product can use them all.

        Copies and moves of the layer keep this layout. `train()` ends it: training has ordinary parameters.
        """
        self._joined = True
        join((self.to_k, self.to_v) if self.is_cross_attention else (self.to_q, self.to_k, self.to_v))

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

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "processor":
            self.set_processor(value)
        else:
            super().__setattr__(name, value)

    def get_processor(self) -> Any:
        """Return what `set_processor` was given."""
        return self.processor

    def set_processor(self, processor: Any) -> None:
        """Set what computes the layer; assigning `processor` does the same.

        Of plain processors and IP-Adapters of diffusers only weights and scales are used: `forward` computes what they
        would. Any other callable computes the layer itself. TypeError if it cannot be called.
        """
        plain, images = is_plain_processor(processor), is_ip_adapter(processor)
        if not (plain or images or callable(processor)):
            raise TypeError(f"{self.path}: a processor must be callable, got {type(processor).__name__}")
        self._modules.pop("processor", None)
        self.__dict__.pop("processor", None)
        super().__setattr__("processor", processor)
        self._runs_processor, self._takes_images = not (plain or images), images
        self._processor_call = None if self._runs_processor else type(processor).__call__

    def not_ours(self) -> str | None:
        """Return what computes this layer in our place, None if nothing does."""
        kind = type(self.processor)
        if self._runs_processor or kind.__call__ is not self._processor_call:
            return f"processor {kind.__name__} of {kind.__module__} computes attention in a way of its own"
        hooked = hasattr(self, "_hf_hook") or hasattr(self, "_diffusers_hook")  # these call ours in the end
        return "its forward was replaced" if "forward" in self.__dict__ and not hooked else None


def to_tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) → (B, H·W, C), contiguous: every norm and product of a view would copy it."""
    return x.permute(0, 2, 3, 1).flatten(1, 2).contiguous()


def to_map(tokens: Tensor, like: Tensor) -> Tensor:
    """(B, H·W, C) → (B, C, H, W) of the size of `like`, as a view."""
    return torch.unflatten(tokens, 1, like.shape[2:]).permute(0, 3, 1, 2)


def attention_layers(model: nn.Module) -> dict[str, Attention]:
    """Return {"down_blocks.0.attentions.0…": layer} of a model, in the order of its modules."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, Attention)}


def name_attentions(model: nn.Module) -> None:
    """Tell every attention where it is in the model, for errors."""
    for name, layer in attention_layers(model).items():
        layer.path = f"{type(model).__name__}: {name}"


def join_projections(model: nn.Module) -> None:
    """Call `Attention.join` of every attention in the model."""
    for layer in attention_layers(model).values():
        layer.join()
