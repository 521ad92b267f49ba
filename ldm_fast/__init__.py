"""ldm_fast: latent diffusion models with hand-written kernels.

    import ldm_fast
    model = ldm_fast.LatentDiffusion.load()          # the shipped text-to-emoji model
    images = model.generate(["red apple"], seed=0)

`ldm_fast.explain()` tells which implementation each op would run here, and why not a better one.
"""

from ldm_fast import ops
from ldm_fast.autoencoder import AutoencoderConfig, AutoencoderKL, VQConfig, VQModel
from ldm_fast.checkpoints import inspect, load
from ldm_fast.diffusion import DiffusionConfig, NoiseSchedule
from ldm_fast.dispatch import use_impl
from ldm_fast.drop_in import accelerate
from ldm_fast.explain import explain
from ldm_fast.pipeline import LatentDiffusion
from ldm_fast.unet import UNet, UNetConfig

__version__ = "0.1.0"

__all__ = [
    "AutoencoderConfig",
    "AutoencoderKL",
    "DiffusionConfig",
    "LatentDiffusion",
    "NoiseSchedule",
    "UNet",
    "UNetConfig",
    "VQConfig",
    "VQModel",
    "accelerate",
    "explain",
    "inspect",
    "load",
    "ops",
    "use_impl",
]
