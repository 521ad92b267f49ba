"""ldm_fast: latent diffusion models with hand-written kernels.

    import ldm_fast
    model = ldm_fast.LatentDiffusion.load()          # the shipped text-to-emoji model
    images = model.generate(["red apple"], seed=0)

`ldm_fast.explain()` tells which implementation each op would run here, and why not a better one.
"""

from ldm_fast import ops
from ldm_fast.checkpoints.load import inspect, load
from ldm_fast.configs.diffusion import DiffusionConfig
from ldm_fast.configs.first_stage import AutoencoderConfig, VQConfig
from ldm_fast.configs.unet import UNetConfig
from ldm_fast.diffusion.schedule import NoiseSchedule
from ldm_fast.models.autoencoder import AutoencoderKL, VQModel
from ldm_fast.models.memory import fixed_weights
from ldm_fast.models.unet import UNet
from ldm_fast.ops.dispatch import use_impl
from ldm_fast.ops.explain import explain
from ldm_fast.ops.version import __version__
from ldm_fast.pipelines.drop_in import accelerate
from ldm_fast.pipelines.latent_diffusion import LatentDiffusion

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
    "__version__",
    "accelerate",
    "explain",
    "fixed_weights",
    "inspect",
    "load",
    "ops",
    "use_impl",
]
