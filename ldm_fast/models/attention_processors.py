"""Processors: objects that compute an attention layer's result in its place, as in diffusers.

`Attention` computes plain attention and IP-Adapters itself, and takes what it needs from their processors. Any other
processor is called, as diffusers calls it, with the layer as its first argument. `ProcessorTools` is what such
processors call and read on the layer.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# diffusers' classes that compute plain attention, each in its own way. A subclass, or a class of the same name that
# somebody else wrote, may compute anything.
PLAIN_PROCESSORS = (
    "AttnProcessor",
    "AttnProcessor2_0",
    "FusedAttnProcessor2_0",
    "SlicedAttnProcessor",
    "XFormersAttnProcessor",
    "AttnAddedKVProcessor",
    "AttnAddedKVProcessor2_0",
    "SlicedAttnAddedKVProcessor",
    "XFormersAttnAddedKVProcessor",
)
IP_ADAPTERS = ("IPAdapterAttnProcessor", "IPAdapterAttnProcessor2_0", "IPAdapterXFormersAttnProcessor")
THEIRS = "diffusers.models.attention_processor"
QUIET = ("ip_adapter_masks", "ip_hidden_states")  # arguments that not every layer needs
NOTHING: Mapping[str, Any] = {}

logger = logging.getLogger(THEIRS)  # warnings appear where diffusers' own do


class AttnProcessor:
    """Plain attention. diffusers' loaders exchange such objects, and look at the names of their classes."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Return what the layer computes by itself: for processors that wrap the one they found."""
        out: Tensor = attn.attend(hidden_states, encoder_hidden_states, attention_mask)
        return out


def is_plain_processor(processor: Any) -> bool:
    """Whether this is plain attention, which `Attention` computes itself."""
    return type(processor) is AttnProcessor or _is_theirs(processor, PLAIN_PROCESSORS)


def is_ip_adapter(processor: Any) -> bool:
    """Whether this is diffusers' processor of IP-Adapters, whose weights and scales `Attention` uses."""
    return _is_theirs(processor, IP_ADAPTERS)


def _is_theirs(processor: Any, names: tuple[str, ...]) -> bool:
    """Whether the class is one of these of diffusers, and computes what it does there: nobody replaced its code."""
    kind = type(processor)
    if kind.__module__ != THEIRS or kind.__name__ not in names:
        return False
    call = kind.__call__
    return call.__module__ == THEIRS and not hasattr(call, "__wrapped__")


def warn_unused(processor: Any, names: list[str]) -> None:
    """Say, as diffusers does, that a processor does not look at some of cross_attention_kwargs."""
    unused = [name for name in names if name not in QUIET]
    if unused:
        logger.warning(
            "cross_attention_kwargs %s are not expected by %s and will be ignored.", unused, type(processor).__name__
        )


def run_processor(
    layer: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Any,
    attention_mask: Tensor | None,
    arguments: Mapping[str, Any],
) -> Tensor:
    """Return what the layer's processor computes, given those of the arguments that it takes by name.

    ValueError, with the names of layer and processor, if that is no tensor like hidden_states.
    """
    processor = layer.processor
    taken = inspect.signature(processor.__call__).parameters
    warn_unused(processor, [name for name in arguments if name not in taken])
    out = processor(
        layer,
        hidden_states,
        encoder_hidden_states=encoder_hidden_states,
        attention_mask=attention_mask,
        **{name: value for name, value in arguments.items() if name in taken},
    )
    if not isinstance(out, Tensor) or out.shape != hidden_states.shape:
        got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(
            f"{layer.path}: its processor {type(processor).__name__} must return a tensor "
            f"{tuple(hidden_states.shape)}, like the hidden states it was given, got {got}"
        )
    return out


class ProcessorTools(nn.Module):
    """What diffusers' attention layer offers processors: heads to batch and back, masks, scores, norms."""

    # What diffusers' layer may be and ours never is.
    added_kv_proj_dim: int | None = None
    only_cross_attention = False  # in diffusers' layer: without keys and values of the image itself
    context_pre_only: bool | None = None
    pre_only = False
    is_causal = False
    fused_projections = False
    scale_qk = True
    dropout = 0.0

    heads: int
    scale: float
    sliceable_head_dim: int
    upcast_attention: bool
    upcast_softmax: bool
    norm_cross: Any  # this and the following: modules or None
    add_k_proj: Any
    add_v_proj: Any

    def _without_extras(self) -> None:
        """Set the sub-modules that diffusers' layer may have to None."""
        self.spatial_norm = self.norm_q = self.norm_k = self.norm_cross = None
        self.add_q_proj = self.add_k_proj = self.add_v_proj = self.to_add_out = None
        self.norm_added_q = self.norm_added_k = None

    def head_to_batch_dim(self, tensor: Tensor, out_dim: int = 3) -> Tensor:
        """Return (B, N, H·D), or (B, E, N, H·D), as (B·H, N, D), or with out_dim=4 as (B, H, N, D)."""
        if tensor.ndim == 4:
            tensor = tensor.flatten(1, 2)
        heads = torch.unflatten(tensor, -1, (self.heads, -1)).transpose(1, 2)  # (B, H, N, D)
        return heads.flatten(0, 1) if out_dim == 3 else heads

    def batch_to_head_dim(self, tensor: Tensor) -> Tensor:
        """Return (B·H, N, D) as (B, N, H·D)."""
        return torch.unflatten(tensor, 0, (-1, self.heads)).transpose(1, 2).flatten(2)

    def get_attention_scores(self, query: Tensor, key: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return softmax(q kᵀ · scale + mask), (B·H, N, M), of q (B·H, N, D) and k (B·H, M, D), in q's dtype."""
        dtype = query.dtype
        if self.upcast_attention:
            query, key = query.float(), key.float()
        if attention_mask is None:
            scores = self.scale * torch.bmm(query, key.transpose(1, 2))
        else:
            scores = torch.baddbmm(attention_mask.to(query.dtype), query, key.transpose(1, 2), alpha=self.scale)
        if self.upcast_softmax:
            scores = scores.float()
        return scores.softmax(dim=-1).to(dtype)

    def prepare_attention_mask(
        self, attention_mask: Tensor | None, target_length: int, batch_size: int, out_dim: int = 3
    ) -> Tensor | None:
        """Return a mask (B, ..., M) for each head: (B·H, ..., M), or with out_dim=4 (B, H, ..., M).

        As in diffusers, a mask of another length gets `target_length` more keys, all of which count.
        """
        if attention_mask is None:
            return None
        if attention_mask.shape[-1] != target_length:
            attention_mask = F.pad(attention_mask, (0, target_length))
        if out_dim == 4:
            return attention_mask.unsqueeze(1).repeat_interleave(self.heads, dim=1)
        if attention_mask.shape[0] < batch_size * self.heads:
            attention_mask = attention_mask.repeat_interleave(self.heads, dim=0)
        return attention_mask

    def norm_encoder_hidden_states(self, encoder_hidden_states: Tensor) -> Tensor:
        """Return `norm_cross` of a context (B, L, C). ValueError if the layer has no such norm."""
        if self.norm_cross is None:
            raise ValueError("Attention: norm_encoder_hidden_states needs norm_cross, which this layer does not have")
        first = isinstance(self.norm_cross, nn.GroupNorm)  # channels, for this norm
        normed: Tensor = self.norm_cross(encoder_hidden_states.transpose(1, 2) if first else encoder_hidden_states)
        return normed.transpose(1, 2) if first else normed

    def set_attention_slice(self, slice_size: int | None) -> None:
        """Change nothing: scores are never stored. ValueError if there are fewer heads than `slice_size`."""
        if slice_size is not None and slice_size > self.sliceable_head_dim:
            raise ValueError(
                f"set_attention_slice: slice_size must be at most {self.sliceable_head_dim}, the number of heads, got "
                f"{slice_size}"
            )

    def fuse_projections(self, fuse: bool = True) -> None:
        """Change nothing. `join` computes projections in one product, without exchanging parameters."""
