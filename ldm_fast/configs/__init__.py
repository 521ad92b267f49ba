"""Configurations of other programs, read into ours: the original's constructor parameters, and diffusers' config.json.

Every field is accounted for: it has a field of ours, or it has the one value that all published models have, or it
changes nothing; anything else is a ValueError that names it.
"""

from ldm_fast.configs.compvis import (
    autoencoder_config_from_compvis,
    encoder_config_from_compvis,
    unet_config_from_compvis,
)
from ldm_fast.configs.diffusers import config_from_diffusers, config_to_diffusers

__all__ = [
    "autoencoder_config_from_compvis",
    "config_from_diffusers",
    "config_to_diffusers",
    "encoder_config_from_compvis",
    "unet_config_from_compvis",
]
