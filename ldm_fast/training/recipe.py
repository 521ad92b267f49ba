"""Recipes: a training run as one small TOML file, read into frozen dataclasses with typed fields.

The dataclasses are the schema. A field that no dataclass has, a value of the wrong type and a missing field are errors
that name the place ("second_stage.unet.sample_sise: ... did you mean 'sample_size'?"); no string ever names a class.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ldm_fast.configs.diffusion import Defaults, DiffusionConfig
from ldm_fast.configs.first_stage import AutoencoderConfig, VQConfig
from ldm_fast.configs.from_dict import ConfigError, free, from_dict
from ldm_fast.configs.unet import UNetConfig
from ldm_fast.diffusion.samplers import SAMPLERS, spaced_timesteps
from ldm_fast.training.data import DataConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

RECIPES = Path(__file__).with_name("recipes")


def _not_negative(config: LoopConfig | FirstStageRecipe, *names: str) -> None:
    for name in names:
        if not getattr(config, name) >= 0:
            raise ValueError(f"{name} must not be negative, got {getattr(config, name)}")


@dataclass(frozen=True)
class LoopConfig:
    """What the loop needs to know about a stage: how long, how fast, how often."""

    steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int = 0
    lr_schedule: Literal["constant", "cosine"] = "constant"
    final_lr_ratio: float = 0.0  # the last step's learning rate over the peak's, if the schedule is a cosine
    lr_restarts: tuple[int, ...] = ()  # steps at which the schedule starts again, warm-up included
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    grad_clip: float | None = None  # the largest allowed norm of all gradients together
    accumulate: int = 1  # batches whose gradients are averaged into one step
    ema_decay: float = 0.9999
    precision: Literal["fp32", "bf16"] = "fp32"
    channels_last: bool = False
    checkpoint_every: int = free(500)
    sample_every: int = free(500)
    evaluate_every: int = free(500)
    log_every: int = 10

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "checkpoint_every", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.learning_rate > 0 or not 0 <= self.ema_decay < 1:
            raise ValueError("learning_rate must be positive and ema_decay in [0, 1)")
        if self.grad_clip is not None and not self.grad_clip > 0:
            raise ValueError(f"grad_clip must be positive, got {self.grad_clip}")
        _not_negative(self, "warmup_steps", "final_lr_ratio", "weight_decay", "sample_every", "evaluate_every")
        bounds = [0, *self.lr_restarts, self.steps]
        if any(b <= a for a, b in itertools.pairwise(bounds)):
            raise ValueError(f"lr_restarts must rise from above 0 to below steps ({self.steps}), got {bounds[1:-1]}")


@dataclass(frozen=True)
class FirstStageRecipe:
    """The autoencoder, in a section `vq` or a section `kl`, and its losses. A loss of weight 0 costs nothing."""

    loop: LoopConfig
    vq: VQConfig | None = None
    kl: AutoencoderConfig | None = None
    pixel_loss: Literal["l1", "l2", "l1+l2"] = "l1"
    lpips_weight: float = 0.0
    kl_weight: float = 1e-6
    codebook_weight: float = 1.0  # weight of the codebook loss and the commitment loss together
    # Steps before `quantize_from` train a plain autoencoder, so that the codebook starts at latents with a meaning.
    # Noise on these latents, relative to their standard deviation, makes them use all channels.
    quantize_from: int = 0
    latent_noise: float = 0.0
    init_codebook: bool = True  # start it at k-means centres of the latents, not at random
    revive_every: int = 0  # after so many steps, codes that no latent chose start again; 0: never
    revive_until: int | None = None
    disc_weight: float = 0.0
    disc_start: int = 0
    disc_channels: int = 64
    disc_layers: int = 3
    disc_learning_rate: float | None = None  # default: the autoencoder's
    shift: int = 0  # augmentation: move images at random by up to so many pixels in each direction
    horizontal_flip: bool = False

    def __post_init__(self) -> None:
        if (self.vq is None) == (self.kl is None):
            raise ValueError("give exactly one of the sections vq and kl")
        _not_negative(self, "lpips_weight", "kl_weight", "codebook_weight", "latent_noise", "revive_every")
        _not_negative(self, "disc_weight", "disc_start", "shift")
        for name in ("disc_channels", "disc_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.vq is not None and not 0 <= self.quantize_from < self.loop.steps:
            raise ValueError(
                f"quantize_from is {self.quantize_from}; between 0 and loop.steps ({self.loop.steps}) the codebook has "
                "to start, or the decoder never learns to decode it"
            )

    @property
    def model(self) -> AutoencoderConfig:
        """The autoencoder's configuration."""
        model = self.kl if self.vq is None else self.vq
        assert model is not None
        return model


@dataclass(frozen=True)
class TextConfig:
    """The text encoder that is trained along with the UNet. Its vocabulary is the words of the training captions."""

    width: int
    depth: int
    heads: int = 8
    head_dim: int = 64
    max_length: int = 32


@dataclass(frozen=True)
class Phase:
    """What changes at step `start`, until a later phase changes it again. What is not given stays as it was."""

    start: int
    condition_dropout: float | None = None
    timestep_shift: float | None = None
    loss_levels: int | None = None


@dataclass(frozen=True)
class SecondStageRecipe:
    """The UNet, its condition and the diffusion loss."""

    unet: UNetConfig
    loop: LoopConfig
    condition: Literal["none", "text", "class"] = "text"
    text: TextConfig | None = None
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    scaling_factor: float | None = None  # default: 1 / standard deviation of the first batch's latents
    condition_dropout: float = 0.1
    min_snr_gamma: float | None = None
    stratified_timesteps: bool = False
    timestep_shift: float = 1.0  # above 1: noisy timesteps are drawn more often (arXiv:2403.03206, 5.3.2)
    loss_levels: int = 1  # scales at which the loss is taken: 1 is the mean square, 3 adds those of 2×2 and 4×4 means
    phases: tuple[Phase, ...] = ()
    horizontal_flip: bool = False
    sampling: Defaults = free(Defaults())  # for the exported model and for the sample grids during training
    grid_prompts: tuple[str, ...] = free(())  # for the sample grids; default: captions spread over the data
    export_half: bool = free(True)  # whether the exported model has float16 weights

    def __post_init__(self) -> None:
        self._check_condition()
        self._check_sampling()
        if not 0 <= self.condition_dropout <= 1:
            raise ValueError(f"condition_dropout must be in [0, 1], got {self.condition_dropout}")
        if self.loss_levels < 1:
            raise ValueError(f"loss_levels must be at least 1, got {self.loss_levels}")
        starts = [phase.start for phase in self.phases]
        if any(b <= a for a, b in itertools.pairwise([0, *starts])):
            raise ValueError(f"phases must start one after the other, the first above 0, got {starts}")
        for start in starts:
            self.at(start)
        if not self.timestep_shift > 0:
            raise ValueError(f"timestep_shift must be positive, got {self.timestep_shift}")
        for name in ("min_snr_gamma", "scaling_factor"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")

    def _check_condition(self) -> None:
        if self.condition == "text" and self.text is None:
            raise ValueError('condition "text" needs the section text')
        unet = self.unet
        if (self.condition != "none") != (unet.uses_context or unet.addition_embed_type == "text"):
            kind = "no cross attention" if self.condition == "none" else "cross attention, or nothing reads it"
            raise ValueError(f'condition "{self.condition}" needs a unet with {kind}')
        width = unet.cross_attention_dim if unet.encoder_hid_dim is None else unet.encoder_hid_dim
        if self.condition == "text" and self.text is not None and self.text.width != width:
            raise ValueError(f"text.width is {self.text.width}, but the unet takes a context of width {width}")

    def _check_sampling(self) -> None:
        spaced_timesteps(self.diffusion.num_train_timesteps, self.sampling.steps, self.sampling.spacing)
        if self.sampling.sampler not in SAMPLERS:
            raise ValueError(f"sampling.sampler must be one of {', '.join(SAMPLERS)}, got {self.sampling.sampler!r}")
        if not math.isfinite(self.sampling.guidance) or not 0 <= self.sampling.eta <= 1:
            raise ValueError("sampling.guidance must be finite and sampling.eta in [0, 1]")

    def at(self, step: int) -> SecondStageRecipe:
        """Return the recipe as it is at `step` (from 0), without phases."""
        given: dict[str, Any] = {}
        for phase in self.phases:
            if phase.start <= step:
                given |= {name: value for name, value in vars(phase).items() if name != "start" and value is not None}
        return dataclasses.replace(self, phases=(), **given) if self.phases else self


@dataclass(frozen=True)
class Recipe:
    """A whole training run. `first_stage` may be left out if a trained one is given to `train`."""

    name: str
    data: DataConfig
    second_stage: SecondStageRecipe
    first_stage: FirstStageRecipe | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed must be in [0, 2^31), got {self.seed}")


def load_recipe(name_or_path: str | Path) -> Recipe:
    """Load a shipped recipe by its name ("emoji") or any recipe by its path ("my/recipe.toml").

    ConfigError if it cannot be read, or something in it is wrong.
    """
    path = Path(name_or_path)
    if path.suffix == ".toml":
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the recipe {path}: {error}") from error
    else:
        shipped = shipped_recipes()
        if str(name_or_path) not in shipped:
            raise ConfigError(f"no recipe {str(name_or_path)!r}: give {', '.join(shipped)} or the path of a .toml file")
        text = (RECIPES / f"{name_or_path}.toml").read_text(encoding="utf-8")
    return parse_recipe(text, str(name_or_path))


def parse_recipe(text: str, source: str = "recipe") -> Recipe:
    """Read a recipe from TOML text; `source` is what errors call it."""
    try:
        return from_dict(Recipe, tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source} is not valid TOML: {error}") from error
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error


def shipped_recipes() -> list[str]:
    """List the names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))
