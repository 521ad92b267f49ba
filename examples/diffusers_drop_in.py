"""Accelerate a diffusers pipeline: the same pictures, computed by the kernels of ldm_fast.

python examples/diffusers_drop_in.py --pipeline path/to/stable-diffusion

Without --pipeline a tiny pipeline with random weights shows the mechanics. Needs `pip install "ldm_fast[diffusers]"`.
"""

import argparse
import time

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import ldm_fast

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--pipeline", help="a folder in diffusers' format")
parser.add_argument("--prompt", default="a lighthouse at dusk")
parser.add_argument("--steps", type=int, default=10)
args = parser.parse_args()


def tiny_pipeline() -> StableDiffusionPipeline:
    """Stable Diffusion in miniature, with random weights."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    text = CLIPTextConfig(vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    text.update({"num_attention_heads": 4, "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 1})
    return StableDiffusionPipeline(
        vae=AutoencoderKL(block_out_channels=(32,), norm_num_groups=8, sample_size=32),
        text_encoder=CLIPTextModel(text),
        tokenizer=CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=32),
        unet=UNet2DConditionModel(
            sample_size=32,
            block_out_channels=(32, 64),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=32,
            attention_head_dim=4,
        ),
        scheduler=DDIMScheduler(
            beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def run(pipe: DiffusionPipeline) -> tuple[np.ndarray, float]:
    """Return the picture, (H, W, 3) in [0, 1], and the seconds it took."""
    start = time.perf_counter()
    generator = torch.Generator().manual_seed(0)
    image = pipe(args.prompt, num_inference_steps=args.steps, generator=generator, output_type="np").images[0]
    return image, time.perf_counter() - start


pipe = DiffusionPipeline.from_pretrained(args.pipeline) if args.pipeline else tiny_pipeline()
pipe.set_progress_bar_config(disable=True)
theirs, seconds = run(pipe)
ldm_fast.accelerate(pipe)  # in place: our UNet and autoencoder replace theirs and share the weights
ours, seconds_of_ours = run(pipe)

difference = np.abs(ours - theirs).max()
assert difference < 2 / 255, difference
print(f"diffusers {seconds:.2f} s, accelerated {seconds_of_ours:.2f} s, largest difference {difference:.1e} (of 1)")
