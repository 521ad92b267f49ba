"""Small models: configurations, a whole one that draws, and checkpoints with the original code's names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ldm_fast.checkpoints.catalogue import layout
from ldm_fast.configs.diffusion import DiffusionConfig
from ldm_fast.configs.encoders import ClassEmbedderConfig
from ldm_fast.configs.first_stage import AutoencoderConfig, VQConfig
from ldm_fast.configs.unet import UNetConfig
from ldm_fast.diffusion.schedule import NoiseSchedule
from ldm_fast.interop import names
from ldm_fast.interop.names import Config
from ldm_fast.models.autoencoder import AutoencoderKL, VQModel
from ldm_fast.models.encoders import TextEncoder, WordTokenizer
from ldm_fast.models.unet import UNet
from ldm_fast.pipelines.latent_diffusion import LatentDiffusion

UNET = UNetConfig(
    sample_size=8,
    block_out_channels=(32, 64),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    cross_attention_dim=8,
    num_attention_heads=2,
    layers_per_block=1,
)
KL = AutoencoderConfig(block_out_channels=(32, 32), layers_per_block=1, z_channels=4)
VQ = VQConfig(
    block_out_channels=(32, 32),
    layers_per_block=1,
    z_channels=3,
    num_vq_embeddings=7,
    attention_levels=(1,),
    legacy=True,
)
CLASSES = ClassEmbedderConfig(num_classes=5, width=8)
TEXT_UNET = replace(UNET, block_out_channels=(16, 16), cross_attention_dim=16, norm_num_groups=8)


def text_model(kl: bool = False, **options) -> LatentDiffusion:
    """A whole model that draws 16 × 16 pictures of two prompts, with random weights; `options` of LatentDiffusion."""
    torch.manual_seed(0)
    size = {"block_out_channels": (16, 16), "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 8}
    size["mid_block_add_attention"] = False
    first_stage = AutoencoderKL(AutoencoderConfig(**size)) if kl else VQModel(VQConfig(num_vq_embeddings=32, **size))
    if not kl:
        torch.nn.init.normal_(first_stage.quantize.embedding.weight)
    tokenizer = WordTokenizer.from_captions(["red apple", "green tree"], max_length=6)
    encoder = TextEncoder.from_tokenizer(tokenizer, width=16, depth=1, heads=2, head_dim=8)
    schedule = NoiseSchedule(DiffusionConfig(prediction_type="v_prediction"))
    return LatentDiffusion(UNet(TEXT_UNET), first_stage, encoder, schedule, **options).eval()


def compvis(config, prefix: str = "", device: str = "cpu") -> dict[str, Tensor]:
    """Random numbers under the original's names; none at all on the meta device."""
    generator = torch.Generator().manual_seed(0)
    if device == "meta":
        return {prefix + e.theirs: torch.empty(e.their_shape, device=device) for e in layout(config)}
    return {prefix + e.theirs: torch.randn(e.their_shape, generator=generator) for e in layout(config)}


def compvis_to_ours(state_dict: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    return names.from_compvis(state_dict, layout(config), type(config).__name__)


def ours_to_compvis(state_dict: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    return names.to_compvis(state_dict, layout(config), type(config).__name__)


def same(model: torch.nn.Module, tensors: dict[str, Tensor]) -> bool:
    ours = model.state_dict()
    return ours.keys() == tensors.keys() and all(torch.equal(ours[name], tensors[name]) for name in ours)
