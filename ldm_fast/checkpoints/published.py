"""The published latent diffusion models: what the shapes in a checkpoint do not tell.

One row for each different UNet; several models may share one. Sizes are those of the latent.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ldm_fast.configs.diffusion import DiffusionConfig
from ldm_fast.configs.unet import UNetConfig

CROSS, SELF, PLAIN = "CrossAttnDownBlock2D", "AttnDownBlock2D", "DownBlock2D"


@dataclass(frozen=True)
class Published:
    """A UNet with the noise schedule and the scaling factor it was trained with, and its conditioning key."""

    name: str
    unet: UNetConfig
    schedule: DiffusionConfig = DiffusionConfig()
    scaling_factor: float = 1.0
    conditioning_key: str | None = "crossattn"


def _ldm(beta_end: float) -> DiffusionConfig:
    return DiffusionConfig(beta_start=0.0015, beta_end=beta_end)


SD1 = UNetConfig()
SD2 = replace(
    SD1,
    sample_size=96,
    cross_attention_dim=1024,
    num_attention_heads=(5, 10, 20, 20),
    use_linear_projection=True,
    upcast_attention=True,
)
XL = UNetConfig(
    sample_size=128,
    down_block_types=(PLAIN, CROSS, CROSS),
    block_out_channels=(320, 640, 1280),
    cross_attention_dim=2048,
    transformer_layers_per_block=(1, 2, 10),
    num_attention_heads=(5, 10, 20),
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)
XL_REFINER = replace(
    XL,
    down_block_types=(PLAIN, CROSS, CROSS, PLAIN),
    block_out_channels=(384, 768, 1536, 1536),
    cross_attention_dim=1280,
    transformer_layers_per_block=4,
    num_attention_heads=(6, 12, 24, 24),
    projection_class_embeddings_input_dim=2560,
)
UPSCALER = UNetConfig(
    sample_size=128,
    in_channels=7,
    down_block_types=(PLAIN, CROSS, CROSS, CROSS),
    block_out_channels=(256, 512, 512, 1024),
    cross_attention_dim=1024,
    only_cross_attention=(True, True, True, False),
    use_linear_projection=True,
    upcast_attention=True,
    num_class_embeds=1000,
)
TEXT_F4 = UNetConfig(
    in_channels=3,
    out_channels=3,
    down_block_types=(PLAIN, CROSS, CROSS, CROSS),
    block_out_channels=(192, 384, 576, 960),
    cross_attention_dim=640,
    num_attention_heads=(6, 12, 18, 30),
)
CLASSES_F8 = UNetConfig(
    sample_size=32,
    down_block_types=(CROSS,) * 3,
    block_out_channels=(256, 512, 1024),
    cross_attention_dim=512,
    num_attention_heads=(8, 16, 32),
)
CLASSES_F4 = replace(TEXT_F4, cross_attention_dim=512, num_attention_heads=1)
LAYOUT_F4 = replace(
    TEXT_F4,
    block_out_channels=(128, 256, 384, 512),
    cross_attention_dim=512,
    transformer_layers_per_block=3,
    num_attention_heads=(4, 8, 12, 16),
)
RETRIEVAL_F16 = UNetConfig(
    sample_size=48,
    in_channels=16,
    out_channels=16,
    block_out_channels=(448, 896, 1344, 1792),
    num_attention_heads=(14, 28, 42, 56),
)
FACES_F4 = UNetConfig(
    in_channels=3,
    out_channels=3,
    down_block_types=(PLAIN, SELF, SELF, SELF),
    mid_block_type="UNetMidBlock2D",
    block_out_channels=(224, 448, 672, 896),
    cross_attention_dim=None,
    num_attention_heads=(7, 14, 21, 28),
)
CHURCHES_F8 = replace(
    FACES_F4,
    sample_size=32,
    in_channels=4,
    out_channels=4,
    down_block_types=(SELF, SELF, SELF, SELF, PLAIN),
    block_out_channels=(192, 384, 384, 768, 768),
    num_attention_heads=8,
    resnet_time_scale_shift="scale_shift",
    resample_type="resnet",
)
SUPER_RESOLUTION_F4 = replace(
    FACES_F4,
    in_channels=6,
    down_block_types=(PLAIN, PLAIN, PLAIN, SELF),
    block_out_channels=(160, 320, 320, 640),
    num_attention_heads=(5, 10, 10, 20),
)
INPAINTING_F4 = replace(
    FACES_F4,
    in_channels=7,
    block_out_channels=(256, 512, 768, 1024),
    num_attention_heads=8,
    resample_type="resnet",
)
SEMANTIC_F4 = replace(
    FACES_F4,
    in_channels=6,
    down_block_types=(PLAIN, PLAIN, PLAIN),
    block_out_channels=(128, 512, 1024),
    num_attention_heads=8,
)

SD, V_PREDICTION = DiffusionConfig(), DiffusionConfig(prediction_type="v_prediction")
UPSCALING = DiffusionConfig(beta_start=0.0001, beta_end=0.02, prediction_type="v_prediction")

PUBLISHED = (
    Published("Stable Diffusion 1.x", SD1, SD, 0.18215),
    Published("Stable Diffusion 1.x, inpainting", replace(SD1, in_channels=9), SD, 0.18215, "hybrid"),
    Published("Stable Diffusion 1.x, instructed", replace(SD1, in_channels=8), SD, 0.18215, "hybrid"),
    Published("Stable Diffusion 2.x", SD2, V_PREDICTION, 0.18215),
    Published("Stable Diffusion 2, inpainting", replace(SD2, in_channels=9, sample_size=64), SD, 0.18215, "hybrid"),
    Published("Stable Diffusion 2, depth", replace(SD2, in_channels=5, sample_size=64), SD, 0.18215, "hybrid"),
    Published("Stable Diffusion x4 upscaler", UPSCALER, UPSCALING, 0.08333, "hybrid"),
    Published("Stable Diffusion XL, base", XL, SD, 0.13025),
    Published("Stable Diffusion XL, inpainting", replace(XL, in_channels=9), SD, 0.13025, "hybrid"),
    Published("Stable Diffusion XL, refiner", XL_REFINER, SD, 0.13025),
    Published("LDM text to image (kl-f8)", replace(SD1, sample_size=32, cross_attention_dim=1280), SD, 0.18215),
    Published("LDM text to image (vq-f4)", TEXT_F4, _ldm(0.0195)),
    Published("LDM ImageNet (vq-f8)", CLASSES_F8, _ldm(0.0195)),
    Published("LDM ImageNet (vq-f4)", CLASSES_F4, _ldm(0.0195)),
    Published("LDM layout to image (vq-f4)", LAYOUT_F4, _ldm(0.0205)),
    Published("LDM retrieval-augmented (kl-f16)", RETRIEVAL_F16, _ldm(0.015), 0.22765929),
    Published("LDM CelebA-HQ, FFHQ, LSUN bedrooms (vq-f4)", FACES_F4, _ldm(0.0195), conditioning_key=None),
    Published("LDM LSUN churches (kl-f8)", CHURCHES_F8, _ldm(0.0155), conditioning_key=None),
    Published("LDM super-resolution (vq-f4)", SUPER_RESOLUTION_F4, _ldm(0.0155), conditioning_key="concat"),
    Published("LDM inpainting (vq-f4)", INPAINTING_F4, _ldm(0.0205), conditioning_key="concat"),
    Published("LDM semantic synthesis (vq-f4)", SEMANTIC_F4, _ldm(0.0205), conditioning_key="concat"),
)


def find(fields: dict[str, Any]) -> Published | None:
    """Return the published model whose UNet has these fields (`recognise.unet_fields`), None if there is none.

    If only the number of input channels differs, it is that model with other input channels.
    """
    wanted = _told_by_shapes(UNetConfig(**fields))
    for row in PUBLISHED:
        if _told_by_shapes(row.unet) == wanted:
            return row
    for row in PUBLISHED:
        if _told_by_shapes(replace(row.unet, in_channels=wanted.in_channels)) == wanted:
            unet = replace(row.unet, in_channels=wanted.in_channels)
            return replace(row, name=f"{row.name}, with other input", unet=unet)
    return None


def _told_by_shapes(config: UNetConfig) -> UNetConfig:
    """Return the configuration with a fixed value for everything that does not change names and shapes of tensors."""
    levels = range(len(config.block_out_channels))
    last = levels[-1]
    deep = [config.down_block_types[level] == CROSS or level == last for level in levels]
    by_level: dict[str, Any] = {
        name: tuple(config.at_level(name, level) if deep[level] else 0 for level in levels)
        for name in ("transformer_layers_per_block", "only_cross_attention")
    }
    return replace(
        config,
        sample_size=0,
        num_attention_heads=1,
        upcast_attention=False,
        class_embed_type=None,
        addition_embed_type=None,
        addition_time_embed_dim=None,
        dropout=0.0,
        **by_level,
    )
