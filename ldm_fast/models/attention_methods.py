"""What UNet and first stages offer programs that exchange how attention is computed. Names are diffusers'."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from ldm_fast.models.attention import Attention, attention_layers, join_projections
from ldm_fast.models.attention_processors import AttnProcessor


class AttentionMethods(nn.Module):
    """A model with attention layers."""

    default_processor: ClassVar[type[Any]] = AttnProcessor

    @property
    def attn_processors(self) -> dict[str, Any]:
        """{"….attn1.processor": processor} of all attentions, in the order of the modules."""
        return {f"{name}.processor": layer.get_processor() for name, layer in attention_layers(self).items()}

    def set_attn_processor(self, processor: Any | dict[str, Any]) -> None:
        """Set one processor for all attentions, or one for each as in `attn_processors`.

        See `Attention.set_processor`. ValueError if a dictionary does not have exactly the names of the attentions.
        """
        layers: dict[str, Attention] = attention_layers(self)
        if not isinstance(processor, dict):
            processor = {f"{name}.processor": processor for name in layers}
        wanted = {f"{name}.processor" for name in layers}
        if processor.keys() != wanted:
            wrong = sorted(processor.keys() ^ wanted)
            raise ValueError(
                f"set_attn_processor: needs one processor for each attention; the number of processors is "
                f"{len(processor)} of {len(layers)}; missing or unknown: {wrong}"
            )
        for name, layer in layers.items():
            layer.set_processor(processor[f"{name}.processor"])

    def set_default_attn_processor(self) -> None:
        """Go back to plain attention: no IP-Adapters, and no code of others."""
        self.set_attn_processor(self.default_processor())

    def fuse_qkv_projections(self) -> None:
        """Change nothing: attention here is as fast with separate projections; see `join_projections`."""

    def unfuse_qkv_projections(self) -> None:
        """Change nothing, as `fuse_qkv_projections`."""

    def join_projections(self) -> None:
        """Compute q, k and v (k and v of a context) of every attention in one product: a layout for inference.

        Moves weights in memory, layer by layer; changes no value and exchanges no parameter. Copies, other devices and
        dtypes keep the layout, `train()` ends it. Call it again after `load_state_dict(assign=True)`.

        Joined weights share memory. Programs that look at storages (accelerate, `safetensors.torch.save_model`) take
        them for tied ones and leave some of them out: let them store models that are not joined.
        """
        join_projections(self)
