"""What the second stage trains: a UNet, and the encoder of its condition."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ldm_fast.configs.encoders import ClassEmbedderConfig
from ldm_fast.diffusion.schedule import NoiseSchedule
from ldm_fast.models.autoencoder import AutoencoderKL, VQModel
from ldm_fast.models.encoders import ClassEmbedder, TextEncoder
from ldm_fast.models.tokenizers import WordTokenizer
from ldm_fast.models.unet import UNet
from ldm_fast.pipelines.latent_diffusion import LatentDiffusion
from ldm_fast.training.image_set import ImageSet
from ldm_fast.training.recipe import SecondStageRecipe


class Denoiser(nn.Module):
    """z_t, t and the inputs of the condition's encoder -> the network's output (arXiv:2112.10752, eq. 3).

    The vocabulary or the classes are those of the training images `data`.
    """

    def __init__(self, recipe: SecondStageRecipe, data: ImageSet):
        super().__init__()
        self.recipe = recipe
        self.unet = UNet(recipe.unet)
        self.unet.zero_residuals()
        self.condition = _encoder(recipe, data)

    def forward(self, z_t: Tensor, t: Tensor, inputs: Tensor | None) -> Tensor:
        """z_t (B, C, h, w), t (B,) and B rows of `inputs` -> (B, C, h, w)."""
        context = None  # (B, L, d)
        if self.condition is not None and inputs is not None:
            context = self.condition.encode_inputs(inputs)
        output: Tensor = self.unet(z_t, t, encoder_hidden_states=context).sample
        return output

    def inputs(self, data: ImageSet) -> Tensor | None:
        """Return what the encoder reads for all images: tokens (N, L), classes (N,), or None without a condition."""
        if isinstance(self.condition, TextEncoder) and data.captions is not None:
            return self.condition.inputs(data.captions)
        if isinstance(self.condition, ClassEmbedder) and data.labels is not None:
            return self.condition.inputs(data.labels)
        return None

    def latent_diffusion(
        self, first_stage: AutoencoderKL | VQModel, scaling_factor: float, card: dict[str, Any] | None = None
    ) -> LatentDiffusion:
        """The whole model around these very modules."""
        return LatentDiffusion(
            self.unet,
            first_stage,
            self.condition,
            NoiseSchedule(self.recipe.diffusion),
            scaling_factor,
            conditioning_key=None if self.condition is None else "crossattn",
            defaults=self.recipe.sampling,
            card=card,
        )


def _encoder(recipe: SecondStageRecipe, data: ImageSet) -> TextEncoder | ClassEmbedder | None:
    if recipe.condition == "text":
        assert recipe.text is not None and data.captions is not None
        text = recipe.text
        tokenizer = WordTokenizer.from_captions(data.captions, max_length=text.max_length)
        sizes = {"width": text.width, "depth": text.depth, "heads": text.heads, "head_dim": text.head_dim}
        return TextEncoder.from_tokenizer(tokenizer, **sizes)
    if recipe.condition == "class":
        classes, width = len(data.classes), recipe.unet.cross_attention_dim
        assert width is not None
        return ClassEmbedder(ClassEmbedderConfig(classes + 1, width, null_class=classes))
    return None
