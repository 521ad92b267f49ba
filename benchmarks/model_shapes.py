"""Every shape that latent diffusion passes to attention and group_norm_silu, recorded from the models themselves.

    python benchmarks/model_shapes.py        # runs the models on the meta device and prints both tables again

The models are Stable Diffusion 1.x, 2.x, XL (base and refiner) and the x4 upscaler, the LDM zoo, their first stages
(encoder and decoder) and the text encoders that were trained with them. UNets get two images, as with
classifier-free guidance; first stages get one.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ldm_fast.checkpoints.published import PUBLISHED
from ldm_fast.configs.encoders import TransformerConfig
from ldm_fast.configs.first_stage import AutoencoderConfig, VQConfig
from ldm_fast.configs.unet import UNetConfig
from ldm_fast.models.autoencoder import AutoencoderKL, VQModel
from ldm_fast.models.encoders import TransformerEmbedder
from ldm_fast.models.unet import UNet


class AttentionShape(NamedTuple):
    """A call of attention: q is (B, H, N, D), k and v are (B, H, M, D)."""

    B: int
    H: int
    N: int
    M: int
    D: int


class GroupNormShape(NamedTuple):
    """A call of group_norm_silu: x is (B, C, H, W). SiLU may follow, and a time embedding may scale and shift."""

    B: int
    C: int
    H: int
    W: int
    silu: bool
    modulated: bool


# fmt: off
_HEADS = {  # (B, H, D): (N, M)
    (1, 1, 512): ((64, 64), (256, 256), (1024, 1024), (2304, 2304), (4096, 4096), (9216, 9216), (16384, 16384)),
    (2, 1, 960): ((64, 1), (64, 64)), (2, 1, 576): ((256, 1), (256, 256)), (2, 1, 384): ((1024, 1), (1024, 1024)),
    (2, 5, 64): ((4096, 77), (4096, 4096), (9216, 77), (9216, 9216)), (2, 8, 96): ((4, 4), (16, 16), (256, 256)),
    (2, 8, 160): ((16, 16), (16, 77), (64, 64), (64, 77), (256, 77), (256, 256)), (2, 8, 48): ((64, 64), (256, 256)),
    (2, 8, 128): ((64, 64), (256, 77), (256, 256), (1024, 1024)),
    (2, 8, 64): ((77, 77), (92, 92), (1024, 77), (1024, 1024), (4096, 77)),
    (2, 8, 80): ((256, 77), (256, 256), (1024, 77), (1024, 1024)), (2, 8, 32): ((1024, 1), (1024, 92), (1024, 1024)),
    (2, 8, 40): ((1024, 77), (1024, 1024), (4096, 77), (4096, 4096)), (2, 8, 24): ((1024, 1024),),
    (2, 10, 64): ((1024, 77), (1024, 1024), (2304, 77), (2304, 2304), (4096, 77), (4096, 4096)),
    (2, 12, 32): ((256, 92), (256, 256), (1024, 77), (1024, 1024)), (2, 12, 64): ((4096, 77), (4096, 4096)),
    (2, 14, 32): ((1024, 1024), (2304, 11), (2304, 2304)), (2, 16, 32): ((64, 64), (64, 92), (256, 1), (256, 256)),
    (2, 18, 32): ((256, 77), (256, 256)), (2, 20, 32): ((64, 64),),
    (2, 20, 64): ((64, 64), (64, 77), (144, 77), (144, 144), (256, 77), (256, 256), (576, 77), (576, 576),
                  (1024, 77), (1024, 1024)),
    (2, 21, 32): ((256, 256),), (2, 24, 64): ((256, 77), (256, 256), (1024, 77), (1024, 1024)),
    (2, 28, 32): ((64, 64), (576, 11), (576, 576)), (2, 30, 32): ((64, 64), (64, 77)),
    (2, 32, 32): ((64, 1), (64, 64)), (2, 42, 32): ((144, 11), (144, 144)), (2, 56, 32): ((36, 11), (36, 36)),
}
_MAPS = {  # (B, silu, modulated): C: sides of the maps, all square
    (1, True, False): {
        128: (64, 128, 192, 256, 384, 512, 768, 1024), 256: (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024),
        512: (8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512),
    },
    (1, False, False): {
        512: (8, 16, 32, 48, 64, 96, 128),
    },
    (2, True, False): {
        128: (32, 64, 128), 160: (32, 64), 192: (16, 32, 64), 224: (32, 64), 256: (16, 32, 64, 128),
        320: (8, 16, 32, 48, 64, 96, 128), 384: (4, 8, 16, 32, 64, 128), 448: (16, 24, 32, 48, 64), 480: (32, 64),
        512: (8, 16, 32, 64, 128), 576: (8, 16, 32, 64), 640: (8, 16, 24, 32, 48, 64, 96, 128), 672: (8, 16, 32, 64),
        768: (2, 4, 8, 16, 32, 64, 128), 896: (8, 12, 16, 24, 32, 48), 960: (8, 16, 32, 48, 64, 96, 128),
        1024: (8, 16, 32, 64), 1120: (16, 32), 1152: (4, 8, 16, 64, 128), 1280: (4, 8, 12, 16, 24, 32, 48, 64),
        1344: (6, 12, 16, 24, 48), 1536: (2, 4, 8, 16, 32, 64), 1568: (8, 16), 1792: (6, 8, 16, 24),
        1920: (8, 16, 24, 32, 48, 64), 2048: (8, 16, 32), 2240: (12, 24), 2304: (32, 64), 2560: (4, 8, 12, 16, 24, 32),
        2688: (12,), 3072: (16, 32), 3136: (6, 12), 3584: (6,),
    },
    (2, True, True): {
        192: (16, 32), 384: (4, 8, 16, 32), 768: (2, 4, 8),
    },
    (2, False, False): {
        192: (32,), 256: (32,), 320: (32, 64, 96), 384: (8, 16, 32), 448: (32, 48), 512: (8, 16, 32, 64), 576: (16,),
        640: (8, 16, 32, 48, 64), 672: (16,), 768: (2, 4, 16, 64), 896: (8, 24), 960: (8,), 1024: (8, 16, 32),
        1280: (4, 8, 12, 16, 24, 32), 1344: (12,), 1536: (16, 32), 1792: (6,),
    },
}
# fmt: on
ATTENTION = [AttentionShape(B, H, N, M, D) for (B, H, D), lengths in _HEADS.items() for N, M in lengths]
GROUP_NORM_SILU = [
    GroupNormShape(B, C, side, side, silu, modulated)
    for (B, silu, modulated), maps in _MAPS.items()
    for C, sides in maps.items()
    for side in sides
]


class Recorder(TorchDispatchMode):
    """Records the shapes that reach the two ops while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.attention: set[AttentionShape] = set()
        self.group_norm_silu: set[GroupNormShape] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.ldm_fast.attention.default:
            q, k = args[:2]
            self.attention.add(AttentionShape(*q.shape[:3], k.shape[2], q.shape[3]))
        elif func is torch.ops.ldm_fast.group_norm_silu.default:
            x, *_, activation, scale, shift, _ = args
            assert (scale is None) == (shift is None) and args[1] == GROUPS
            self.group_norm_silu.add(GroupNormShape(*x.shape, activation == "silu", scale is not None))
        return func(*args, **(kwargs or {}))


GROUPS = 32  # in all of these models
TEXT = 77  # tokens of a prompt
TOKENS = {  # of other contexts: a class; boxes; the embeddings of a prompt and of its ten nearest images
    "LDM ImageNet (vq-f8)": 1,
    "LDM ImageNet (vq-f4)": 1,
    "LDM layout to image (vq-f4)": 92,
    "LDM retrieval-augmented (kl-f16)": 11,
}
OTHER_SIZES = {"LDM semantic synthesis (vq-f4)": (128,)}  # of latents, besides the one in the configuration
FIRST_STAGES = (  # each with the sizes of its images
    (AutoencoderConfig(), (256, 512, 768, 1024)),
    (AutoencoderConfig(block_out_channels=(128, 256, 512)), (256, 512)),
    (AutoencoderConfig(block_out_channels=(128, 128, 256, 256, 512), attention_levels=(4,)), (256, 768)),
    (AutoencoderConfig(block_out_channels=(128, 128, 256, 256, 512, 512), attention_levels=(4, 5)), (256,)),
    (VQConfig(), (256, 512)),
    (VQConfig(mid_block_add_attention=False), (256,)),
    (VQConfig(block_out_channels=(128, 256, 256, 512), attention_levels=(3,)), (256,)),
    (VQConfig(block_out_channels=(128, 128, 256, 256, 512), attention_levels=(4,)), (256,)),
)
TEXT_ENCODERS = (
    TransformerConfig(30522, 1280, 1),
    TransformerConfig(8192, 512, 1, max_length=92),
)  # of one layer, since all layers are alike


def unets() -> Iterator[Callable[[], Any]]:
    """Yield one evaluation of each UNet, for two images."""
    seen = set()
    for row in PUBLISHED:
        for size in (row.unet.sample_size, *OTHER_SIZES.get(row.name, ())):
            # the image's channels reach neither op, and the blocks of one transformer are all alike
            config = replace(row.unet, in_channels=4, transformer_layers_per_block=1, sample_size=size)
            tokens = TOKENS.get(row.name, TEXT)
            if (config, tokens) not in seen:
                seen.add((config, tokens))
                yield unet(config, tokens)


def unet(config: UNetConfig, tokens: int) -> Callable[[], Any]:
    """Return one evaluation for two images, with contexts of `tokens` tokens."""
    model, side = UNet(config), config.sample_size
    added = {}
    if config.addition_time_embed_dim is not None:
        width = config.projection_class_embeddings_input_dim - config.addition_time_embed_dim
        added = {"text_embeds": torch.empty(2, width), "time_ids": torch.empty(2, 1)}  # together as wide as needed
    context = torch.empty(2, tokens, config.cross_attention_dim) if config.uses_context else None
    labels = None if config.num_class_embeds is None else torch.empty(2, dtype=torch.int64)
    sample, timesteps = torch.empty(2, config.in_channels, side, side), torch.empty(2)
    return lambda: model(sample, timesteps, context, labels, added_cond_kwargs=added)


def first_stage(config: AutoencoderConfig, side: int) -> Callable[[], Any]:
    """Return a function that encodes and decodes one image."""
    model = (VQModel if isinstance(config, VQConfig) else AutoencoderKL)(config)
    latent = torch.empty(1, config.encoder_channels, *[side // config.downsampling_factor] * 2)
    image = torch.empty(1, config.in_channels, side, side)
    return lambda: (model.encoder(image), model.decoder(latent))


def text_encoder(config: TransformerConfig) -> Callable[[], Any]:
    """Return a function that encodes two prompts."""
    model, tokens = TransformerEmbedder(config), torch.empty(2, config.max_length, dtype=torch.int64)
    return lambda: model(tokens)


def record(runs: Iterable[Callable[[], Any]]) -> Recorder:
    """Return the shapes that these runs pass to the two ops."""
    recorder = Recorder()
    for run in runs:
        with recorder:
            run()
    return recorder


def all_runs() -> Iterator[Callable[[], Any]]:
    """Yield one run of every model. Call this, and the runs, with the meta device as the default."""
    yield from unets()
    for config, sides in FIRST_STAGES:
        yield from (first_stage(config, side) for side in sides)
    yield from (text_encoder(config) for config in TEXT_ENCODERS)


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    with torch.device("meta"):
        recorded = record(all_runs())
    heads: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for B, H, N, M, D in sorted(recorded.attention):
        heads.setdefault((B, H, D), []).append((N, M))
    maps: dict[tuple[int, bool, bool], dict[int, list[int]]] = {}
    for B, C, height, width, silu, modulated in sorted(recorded.group_norm_silu):
        assert height == width
        maps.setdefault((B, silu, modulated), {}).setdefault(C, []).append(height)
    print("_HEADS =", heads)
    print("_MAPS =", maps)


if __name__ == "__main__":
    main()
