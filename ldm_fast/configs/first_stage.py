"""The configurations of the first stages."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from ldm_fast.configs.checks import check_positive
from ldm_fast.configs.from_dict import free


@dataclass(frozen=True)
class AutoencoderConfig:
    """The shape of a first stage. The defaults are those of Stable Diffusion's kl-f8.

    `latent_channels` is the width of z (embed_dim in LDM, vq_embed_dim in diffusers). `z_channels` is the width of the
    encoder's last convolution, by default the same. `attention_levels` are the levels (0 = full resolution) with
    attention after every block; `decoder_attention_levels` are those of the decoder, if others. The fields from
    `sample_size` on say how the model is to be used, mainly by diffusers' pipelines; `LatentDiffusion` has its own
    scaling factor.
    """

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 4
    z_channels: int | None = None
    attention_levels: tuple[int, ...] = ()
    decoder_attention_levels: tuple[int, ...] | None = None
    mid_block_add_attention: bool = True
    norm_num_groups: int = 32
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    sample_size: int | tuple[int, int] = free(512)  # of the training images; also the size of a tile
    scaling_factor: float = free(0.18215)  # the second stage sees (z - shift_factor) times this
    shift_factor: float | None = free(None)
    latents_mean: tuple[float, ...] | None = free(None)
    latents_std: tuple[float, ...] | None = free(None)
    force_upcast: bool = free(True)  # activations are too large for float16

    act_fn: ClassVar[str] = "silu"
    norm_type: ClassVar[str] = "group"

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_positive(self, "in_channels", "out_channels", "latent_channels", "layers_per_block", "norm_num_groups")
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups:
                raise ValueError(f"{name}: norm_num_groups {self.norm_num_groups} must divide {channels} channels")
        for level in (*self.attention_levels, *self.decoder_levels):
            if not 0 <= level < len(self.block_out_channels):
                raise ValueError(f"{name}: attention_levels has no level {level}")
        if not (self.use_quant_conv and self.use_post_quant_conv) and self.encoder_channels != self.latent_channels:
            raise ValueError(
                f"{name}: z_channels {self.z_channels} is not latent_channels {self.latent_channels}: "
                "use_quant_conv and use_post_quant_conv are needed"
            )

    @property
    def downsampling_factor(self) -> int:
        """f: how many times smaller than the image the latent is, on either side."""
        return 1 << (len(self.block_out_channels) - 1)

    @property
    def encoder_channels(self) -> int:
        """The width between the coders and the 1×1 convolutions around the latent."""
        return self.latent_channels if self.z_channels is None else self.z_channels

    @property
    def down_block_types(self) -> tuple[str, ...]:
        """Names of the encoder's levels in diffusers."""
        kinds = {True: "AttnDownEncoderBlock2D", False: "DownEncoderBlock2D"}
        return tuple(kinds[level in self.attention_levels] for level in range(len(self.block_out_channels)))

    @property
    def up_block_types(self) -> tuple[str, ...]:
        """Names of the decoder's levels in diffusers, the lowest resolution first."""
        kinds = {True: "AttnUpDecoderBlock2D", False: "UpDecoderBlock2D"}
        return tuple(kinds[level in self.decoder_levels] for level in reversed(range(len(self.block_out_channels))))

    @property
    def decoder_levels(self) -> tuple[int, ...]:
        """The levels of the decoder with attention after every block."""
        return self.attention_levels if self.decoder_attention_levels is None else self.decoder_attention_levels


@dataclass(frozen=True)
class VQConfig(AutoencoderConfig):
    """The shape of a first stage with a codebook of `num_vq_embeddings` codes. The defaults are those of LDM's vq-f4.

    `commitment_weight` is β of the VQ loss; `legacy` puts it on the codebook term instead, as the published code does.
    With `codebook_ema_decay` the codebook is trained by moving averages of the vectors that choose its codes, not by a
    gradient. With `lookup_from_codebook`, `decode` takes indices of codes when it is told not to quantize.
    """

    block_out_channels: tuple[int, ...] = (128, 256, 512)
    latent_channels: int = 3
    num_vq_embeddings: int = 8192
    commitment_weight: float = 0.25
    legacy: bool = False
    codebook_ema_decay: float | None = None
    sample_size: int | tuple[int, int] = free(256)
    scaling_factor: float = free(1.0)
    force_upcast: bool = free(False)
    lookup_from_codebook: bool = free(False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "num_vq_embeddings")

    @property
    def vq_embed_dim(self) -> int:
        """The width of z under its name in diffusers, where `latent_channels` are what is called `z_channels` here."""
        return self.latent_channels

    @property
    def trained(self) -> VQConfig:
        """The configuration of the trained model, without the state that only training needs."""
        return replace(self, codebook_ema_decay=None)
