"""The configuration of a UNet. Its fields have the names diffusers uses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ldm_fast.configs.checks import check_positive
from ldm_fast.configs.unet_details import UNetDetails

DOWN_BLOCK_TYPES = (
    "DownBlock2D",
    "AttnDownBlock2D",
    "CrossAttnDownBlock2D",
    "ResnetDownsampleBlock2D",
    "SimpleCrossAttnDownBlock2D",
    "KDownBlock2D",
    "KCrossAttnDownBlock2D",
    "SkipDownBlock2D",
    "AttnSkipDownBlock2D",
)
# "ResnetMidBlock2D" is one residual block: what a UNet2DConditionModel makes of "UNetMidBlock2D".
MID_BLOCK_TYPES = (
    "UNetMidBlock2D",
    "UNetMidBlock2DCrossAttn",
    "UNetMidBlock2DSimpleCrossAttn",
    "ResnetMidBlock2D",
    None,
)
CHOICES = {
    "mid_block_type": MID_BLOCK_TYPES,
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "class_embed_type": (None, "timestep", "identity", "projection", "simple_projection"),
    "addition_embed_type": (None, "text", "text_time", "text_image", "image", "image_hint"),
    "encoder_hid_dim_type": (None, "text_proj", "ip_image_proj", "text_image_proj", "image_proj"),
    "time_embedding_type": ("positional", "fourier", "learned"),
}
NEEDS = (  # a field with this value needs that other field
    ("addition_embed_type", "text_time", "addition_time_embed_dim"),
    ("addition_embed_type", "text_time", "projection_class_embeddings_input_dim"),
    ("addition_embed_type", "text", "cross_attention_dim"),
    ("addition_embed_type", "text_image", "cross_attention_dim"),
    ("addition_embed_type", "image", "encoder_hid_dim"),
    ("addition_embed_type", "image_hint", "encoder_hid_dim"),
    ("class_embed_type", "projection", "projection_class_embeddings_input_dim"),
    ("class_embed_type", "simple_projection", "projection_class_embeddings_input_dim"),
    ("encoder_hid_dim_type", "text_proj", "encoder_hid_dim"),
    ("encoder_hid_dim_type", "text_image_proj", "encoder_hid_dim"),
    ("encoder_hid_dim_type", "image_proj", "encoder_hid_dim"),
    ("time_embedding_type", "learned", "num_train_timesteps"),
)
RESAMPLE_TYPES = ("conv", "resnet", "pool")
BY_LEVEL = (
    "layers_per_block",
    "resample_type",
    "attention_head_dim",
    "transformer_layers_per_block",
    "reverse_transformer_layers_per_block",
    "num_attention_heads",
    "only_cross_attention",
)


@dataclass(frozen=True)
class UNetConfig(UNetDetails):
    """The shape of a UNet. The defaults are those of Stable Diffusion 1.x.

    A level of `down_block_types` has no attention ("DownBlock2D"), self attention ("AttnDownBlock2D") or a spatial
    transformer with cross attention ("CrossAttnDownBlock2D"); the up path mirrors it. `layers_per_block`,
    `num_attention_heads`, `transformer_layers_per_block`, `only_cross_attention` and `resample_type` hold for all
    levels or are given level by level. If the transformers of the up path have other depths,
    `reverse_transformer_layers_per_block` gives them, lowest resolution first; the depths of a level may then also be
    given for each of its transformers.
    """

    sample_size: int | tuple[int, int] | None = 64  # of the latents trained on
    in_channels: int = 4
    out_channels: int = 4
    down_block_types: tuple[str, ...] = (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D")
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int | tuple[int, ...] = 2
    cross_attention_dim: int | None = 768
    transformer_layers_per_block: int | tuple[int | tuple[int, ...], ...] = 1
    reverse_transformer_layers_per_block: tuple[int | tuple[int, ...], ...] | None = None
    num_attention_heads: int | tuple[int, ...] = 8
    only_cross_attention: bool | tuple[bool, ...] = False  # both attentions of a transformer block look at the context
    use_linear_projection: bool = False
    upcast_attention: bool = False  # changes nothing here: scores are computed in float32 in any case
    resnet_time_scale_shift: str = "default"
    resample_type: str | tuple[str, ...] = "conv"  # or a residual block, "resnet", or no weights at all, "pool"
    time_cond_proj_dim: int | None = None  # width of `timestep_cond` (latent consistency models)
    class_embed_type: str | None = None  # how class labels are embedded if not by a table of num_class_embeds
    num_class_embeds: int | None = None
    # "text": the context, pooled; "text_time": pooled text and numbers (XL); Kandinsky's "text_image", "image" and
    # "image_hint"
    addition_embed_type: str | None = None
    addition_embed_type_num_heads: int = 64
    addition_time_embed_dim: int | None = None  # channels for each of the numbers
    projection_class_embeddings_input_dim: int | None = None  # all of "text_time" together, or that of "projection"
    encoder_hid_dim: int | None = None  # width of a context that is projected to cross_attention_dim first
    # "text_proj"; "ip_image_proj" once IP-Adapters are loaded; Kandinsky's "text_image_proj" and "image_proj"
    encoder_hid_dim_type: str | None = None
    norm_num_groups: int | None = 32  # None only if all levels are "K…" or all are "…Skip…"
    norm_eps: float = 1e-5
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_levels()
        self._check_choices()
        self._check_depths()

    def _check_levels(self) -> None:
        levels = len(self.block_out_channels)
        if len(self.down_block_types) != levels:
            raise ValueError(f"UNetConfig: down_block_types needs {levels} entries, got {self.down_block_types}")
        for name in BY_LEVEL:
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != levels:
                raise ValueError(f"UNetConfig: {name} needs one value or {levels}, got {value}")
        kinds = self.down_block_types
        if self.norm_num_groups is not None:
            check_positive(self, "norm_num_groups")
        elif not (all("Skip" in kind for kind in kinds) or (self.is_conditional and all(k[0] == "K" for k in kinds))):
            raise ValueError("UNetConfig: norm_num_groups must be a positive number, got None")
        if any("Skip" in kind for kind in kinds) and not self.in_channels == self.out_channels == 3:
            raise ValueError("UNetConfig: Skip blocks need in_channels and out_channels 3")
        for level in range(levels):
            if not isinstance(self.layers(level), int) or self.layers(level) < 1:
                raise ValueError(f"UNetConfig: layers_per_block must be a positive number, got {self.layers_per_block}")
        for channels in self.block_out_channels:
            if self.norm_num_groups is not None and channels % self.norm_num_groups:
                raise ValueError(f"UNetConfig: norm_num_groups {self.norm_num_groups} must divide {channels} channels")

    def _check_choices(self) -> None:
        chosen = [(name, getattr(self, name), allowed) for name, allowed in CHOICES.items()]
        kinds: list[tuple[str, Any, tuple[Any, ...]]]
        kinds = [("down_block_types", kind, DOWN_BLOCK_TYPES) for kind in self.down_block_types]
        up_types = tuple(map(_mirrored, DOWN_BLOCK_TYPES))
        kinds += [("up_blocks", kind, up_types) for kind in self.up_block_types]
        levels = range(len(self.block_out_channels))
        kinds += [("resample_type", self.at_level("resample_type", level), RESAMPLE_TYPES) for level in levels]
        for name, value, allowed in (*kinds, *chosen):
            if value not in allowed:
                raise ValueError(f"UNetConfig: {name} must be one of {', '.join(map(str, allowed))}, got {value!r}")
        for name, value, needed in NEEDS:
            if getattr(self, name) == value and getattr(self, needed) is None:
                raise ValueError(f"UNetConfig: {name} {value!r} needs {needed}")
        classes = self.class_embed_type is not None or self.num_class_embeds is not None
        if self.class_embeddings_concat and (not classes or self.addition_embed_type is not None):
            raise ValueError("UNetConfig: class_embeddings_concat needs class labels, and no addition_embed_type")
        if self.encoder_hid_dim is not None and self.encoder_hid_dim_type is None:
            raise ValueError(f"UNetConfig: encoder_hid_dim {self.encoder_hid_dim} needs encoder_hid_dim_type")

    def _check_depths(self) -> None:
        down, up = self.transformer_layers_per_block, self.reverse_transformer_layers_per_block
        if isinstance(down, tuple) and any(isinstance(depth, tuple) for depth in down) and up is None:
            raise ValueError(
                "UNetConfig: transformer_layers_per_block with a depth for each transformer needs "
                f"reverse_transformer_layers_per_block for the way up, got {down}"
            )
        for level in range(len(self.block_out_channels)):
            self.depths_down(level)
            self.depths_up(level)

    @property
    def up_block_types(self) -> tuple[str, ...]:
        """The kinds of the levels on the way up, the lowest resolution first."""
        return self.up_blocks or tuple(map(_mirrored, reversed(self.down_block_types)))

    @property
    def uses_context(self) -> bool:
        """Whether any block has cross attention."""
        types = (*self.down_block_types, *self.up_block_types, self.mid_block_type or "")
        return self.cross_attention_dim is not None and any("CrossAttn" in t for t in types)

    @property
    def is_conditional(self) -> bool:
        """Whether diffusers' class for it is UNet2DConditionModel; the other, UNet2DModel, takes no context."""
        return self.cross_attention_dim is not None

    @property
    def time_channels(self) -> int:
        """The width of the time embedding."""
        narrow = self.is_conditional and self.time_embedding_type == "fourier"
        return self.time_embedding_dim or (2 if narrow else 4) * self.block_out_channels[0]

    @property
    def timestep_channels(self) -> int:
        """The width of a timestep's sines and cosines, or of its row in a table."""
        if self.time_embedding_type != "fourier":
            return self.block_out_channels[0]
        return self.time_channels if self.is_conditional else 2 * self.block_out_channels[0]

    @property
    def predicts_over_level(self) -> bool:
        """Whether the output is divided by the noise level, the timestep (Song et al., arXiv:2011.13456)."""
        return not self.is_conditional and self.time_embedding_type == "fourier"

    @property
    def given_context_channels(self) -> int | None:
        """The width of the context that the network is called with, before any projection."""
        return self.encoder_hid_dim or self.cross_attention_dim

    def groups(self, channels: int) -> int:
        """The number of groups of a norm over so many channels."""
        return min(channels // 4, 32) if self.norm_num_groups is None else self.norm_num_groups

    def at_level(self, name: str, level: int) -> Any:
        """The value of a field that holds for all levels or is given level by level."""
        value = getattr(self, name)
        return value[level] if isinstance(value, tuple) else value

    def layers(self, level: int) -> int:
        """The number of residual blocks of a level on the way down; on the way up there is one more."""
        count: int = self.at_level("layers_per_block", level)
        return count

    def depths_down(self, level: int) -> tuple[int, ...]:
        """Transformer blocks after each residual block of a level on the way down."""
        depths = self.at_level("transformer_layers_per_block", level)
        return _one_for_each("transformer_layers_per_block", depths, self.layers(level))

    def depths_up(self, level: int) -> tuple[int, ...]:
        """Transformer blocks after each residual block of a level on the way up."""
        name, depths = "transformer_layers_per_block", self.at_level("transformer_layers_per_block", level)
        if self.reverse_transformer_layers_per_block is not None:
            name = "reverse_transformer_layers_per_block"
            depths = self.reverse_transformer_layers_per_block[-1 - level]
        return _one_for_each(name, depths, self.layers(level) + 1)

    @property
    def depth_of_middle(self) -> int:
        """Transformer blocks in the middle: those of the first transformer of the last level."""
        return self.depths_down(len(self.block_out_channels) - 1)[0]

    def given(self, name: str) -> int:
        """Return a number that may be None, but is given: the checks have made sure, since another field needs it."""
        value = getattr(self, name)
        assert isinstance(value, int), f"UNetConfig: {name} is {value!r}"
        return value

    def heads(self, level: int, block_type: str = "CrossAttn") -> tuple[int, int]:
        """(number of heads, width of one head) at a level, in a block of this kind."""
        channels, heads = self.block_out_channels[level], self.at_level("num_attention_heads", level)
        # diffusers does not turn the list of widths round for the way up, and weights are trained like that.
        width = self.at_level("attention_head_dim", -1 - level if "Up" in block_type else level)
        by_width = block_type.startswith(("Attn", "K")) or "SimpleCrossAttn" in block_type
        if width is not None and (by_width or block_type == "UNetMidBlock2D"):
            if width > channels:
                raise ValueError(f"UNetConfig: attention_head_dim {width} is more than {channels} channels")
            return channels // width, width
        if self.num_attention_heads_up is not None and block_type.startswith("AttnUp"):
            heads = self.num_attention_heads_up
        if not isinstance(heads, int) or heads < 1 or channels % heads:
            raise ValueError(f"UNetConfig: {channels} channels do not divide into {heads} heads")
        return heads, channels // heads


def _mirrored(block_type: str) -> str:
    return block_type.replace("Down", "Up")


def _one_for_each(name: str, depths: int | tuple[int, ...], count: int) -> tuple[int, ...]:
    if isinstance(depths, int):
        return (depths,) * count
    if len(depths) != count:
        raise ValueError(f"UNetConfig: {name} needs one depth for a level or {count}, got {depths}")
    return depths


def conditioning_key(config: UNetConfig) -> str | None:
    """Return how a UNet of this shape takes its condition; input channels beyond the output's are for a map."""
    concat = config.in_channels > config.out_channels
    if config.uses_context:
        return "hybrid" if concat else "crossattn"
    return "concat" if concat else None
