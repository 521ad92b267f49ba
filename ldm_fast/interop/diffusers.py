"""Configurations of diffusers' models and schedulers, to ours and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, replace
from typing import Any

from ldm_fast.configs.diffusion import DiffusionConfig
from ldm_fast.configs.first_stage import AutoencoderConfig, VQConfig
from ldm_fast.configs.from_dict import as_tuple
from ldm_fast.configs.unet import DOWN_BLOCK_TYPES, UNetConfig
from ldm_fast.interop.parameters import Parameters, one_value

# What diffusers' EMAModel writes into the configuration of a model whose moving average it saves.
EMA_KEYS = frozenset("decay inv_gamma min_decay optimization_step power update_after_step use_ema_warmup".split())

ModelConfig = UNetConfig | AutoencoderConfig | VQConfig

# Schedulers whose z_t has the distribution q(z_t | z_0) of ours, with the β_1 and β_T that their classes default to.
SCHEDULERS: dict[str, tuple[float, float]] = {
    "DDIMScheduler": (0.0001, 0.02),
    "DDIMInverseScheduler": (0.0001, 0.02),
    "DDIMParallelScheduler": (0.0001, 0.02),
    "DDPMScheduler": (0.0001, 0.02),
    "DDPMParallelScheduler": (0.0001, 0.02),
    "DEISMultistepScheduler": (0.0001, 0.02),
    "DPMSolverMultistepScheduler": (0.0001, 0.02),
    "DPMSolverMultistepInverseScheduler": (0.0001, 0.02),
    "DPMSolverSDEScheduler": (0.00085, 0.012),
    "DPMSolverSinglestepScheduler": (0.0001, 0.02),
    "EulerAncestralDiscreteScheduler": (0.0001, 0.02),
    "EulerDiscreteScheduler": (0.0001, 0.02),
    "HeunDiscreteScheduler": (0.00085, 0.012),
    "KDPM2AncestralDiscreteScheduler": (0.00085, 0.012),
    "KDPM2DiscreteScheduler": (0.00085, 0.012),
    "LMSDiscreteScheduler": (0.0001, 0.02),
    "PNDMScheduler": (0.0001, 0.02),
    "SASolverScheduler": (0.0001, 0.02),
    "UniPCMultistepScheduler": (0.0001, 0.02),
}
# Parameters that some of them have; with any other value the process is another one.
SCHEDULE_FIXED = dict(trained_betas=None, use_flow_sigmas=False, timestep_type="discrete")


def config_from_diffusers(config: Mapping[str, Any]) -> ModelConfig:
    """Return our configuration from that of a diffusers model (config.json, or `module.config`).

    `_class_name` names the model's class; all other keys that start with "_" are ignored. ValueError names a key that
    we do not know or whose value we cannot honour.
    """
    name = config.get("_class_name")
    if name not in READERS:
        raise ValueError(f"config: _class_name must be one of {', '.join(READERS)}, got {name!r}")
    ours = {key: v for key, v in config.items() if not key.startswith("_") and key not in EMA_KEYS}
    return READERS[name](Parameters(name, ours))


def described_class(config: Mapping[str, Any], candidates: tuple[str, ...]) -> str:
    """Return which of these classes of diffusers a dictionary describes that does not name its class."""
    only_there = config.keys() & UNCONDITIONAL_KEYS or "AttnDownBlock2D" in config.get("down_block_types", ())
    return "UNet2DModel" if only_there and "UNet2DModel" in candidates else candidates[0]


def schedule_from_diffusers(config: Mapping[str, Any]) -> DiffusionConfig:
    """Return the noise schedule in a scheduler_config.json, without what that says of sampling.

    ValueError names the scheduler's class, or the key, that stands for another process than q(z_t | z_0).
    """
    kind = config.get("_class_name")
    if kind not in SCHEDULERS:
        raise ValueError(f"{kind}: its noise is not that of DDPM, as the noise of DDIMScheduler or PNDMScheduler is")
    start, end = SCHEDULERS[kind]
    params = Parameters(kind, config)
    params.insist(**SCHEDULE_FIXED)
    names = {"scaled_linear": "scaled_linear", "linear": "linear", "squaredcos_cap_v2": "cosine"}
    name = params.take("beta_schedule", "linear")
    if name not in names:
        raise ValueError(f"{kind}: beta_schedule must be one of {', '.join(names)}, got {name!r}")
    return DiffusionConfig(
        schedule=names[name],
        num_train_timesteps=params.take("num_train_timesteps", 1000),
        beta_start=params.take("beta_start", start),
        beta_end=params.take("beta_end", end),
        prediction_type=params.take("prediction_type", "epsilon"),
        zero_terminal_snr=params.take("rescale_betas_zero_snr", False),
    )


def config_to_diffusers(config: ModelConfig) -> dict[str, Any]:
    """Return the inverse of `config_from_diffusers`.

    A model that none of diffusers' classes can be is written field by field, under the name of our configuration.
    """
    if isinstance(config, VQConfig):
        config = config.trained
    if isinstance(config, UNetConfig):
        candidates = [_as_conditional_unet(config), _as_unconditional_unet(config)]
    elif isinstance(config, VQConfig):
        candidates = [_as_vq_model(config)]
    else:
        candidates = [_as_autoencoder_kl(config)]
    for candidate in candidates:
        try:
            same = spelt_out(config_from_diffusers(candidate)) == spelt_out(config)
        except ValueError:
            same = False
        if same:
            return candidate
    return {"_class_name": type(config).__name__, **asdict(config)}


def spelt_out(config: ModelConfig) -> ModelConfig:
    """Return the same configuration in one form: everything that can be said in two ways is spelt out."""
    if not isinstance(config, UNetConfig):
        decoder = config.decoder_levels
        return replace(config, z_channels=config.encoder_channels, decoder_attention_levels=decoder)
    levels = range(len(config.block_out_channels))
    by_level: dict[str, Any] = {
        name: tuple(config.at_level(name, level) for level in levels) for name in SPELT_BY_LEVEL
    }
    heads = [config.at_level("num_attention_heads", level) for level in levels]
    for level in levels[:-1]:
        if "Attn" not in config.down_block_types[level] + config.up_block_types[-1 - level]:
            heads[level] = 1  # there is no attention; at the last level the number is that of the middle
    return replace(config, num_attention_heads=tuple(heads), **by_level)


SPELT_BY_LEVEL = ("layers_per_block", "transformer_layers_per_block", "only_cross_attention", "resample_type")


# ---- diffusers' UNets: one with cross attention, one without ----

UNCONDITIONAL_LEVELS = tuple(kind for kind in DOWN_BLOCK_TYPES if "Cross" not in kind and kind[0] != "K")
CONDITIONAL_LEVELS = tuple(kind for kind in DOWN_BLOCK_TYPES if "Skip" not in kind)
CONDITIONAL_MIDDLES = ("UNetMidBlock2DCrossAttn", "UNetMidBlock2DSimpleCrossAttn", "UNetMidBlock2D", None)
UNCONDITIONAL_MIDDLES = ("UNetMidBlock2D", None)
UNCONDITIONAL_KEYS = frozenset(
    "add_attention attn_norm_num_groups downsample_type upsample_type num_train_timesteps".split()
)
NOT_CONDITIONAL_FIELDS = frozenset(
    "resample_type num_attention_heads num_attention_heads_up num_train_timesteps up_blocks attention_head_dim "
    "attn_norm_num_groups add_attention n_embed".split()
)
UNCONDITIONAL_FIELDS = frozenset(
    "downsample_padding mid_block_scale_factor add_attention center_input_sample "
    "flip_sin_to_cos freq_shift time_embedding_type time_embedding_dim num_train_timesteps act_fn "
    "sample_size in_channels out_channels down_block_types mid_block_type block_out_channels layers_per_block dropout "
    "norm_num_groups norm_eps resnet_time_scale_shift class_embed_type num_class_embeds".split()
)


def _conditional_unet(params: Parameters) -> UNetConfig:
    params.insist(attention_type="default", dual_cross_attention=False)
    # attention_head_dim is the number of heads: a misnomer that diffusers keeps for compatibility. In some kinds of
    # blocks it is indeed their width.
    heads = params.take("attention_head_dim", 8)
    heads = as_tuple(params.take("num_attention_heads", None) or heads)
    default = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    given: dict[str, Any] = {
        "cross_attention_dim": 1280,
        **_levels(params, default, CONDITIONAL_LEVELS),
        "mid_block_type": _middle(params, "UNetMidBlock2DCrossAttn", CONDITIONAL_MIDDLES),
    }
    middle_only_cross = params.take("mid_block_only_cross_attention", None)
    given |= params.take_fields(UNetConfig, but=NOT_CONDITIONAL_FIELDS)
    given["cross_attention_dim"] = one_value(params.owner, "cross_attention_dim", given["cross_attention_dim"])
    params.finish()
    if given.get("encoder_hid_dim") is not None and given.get("encoder_hid_dim_type") is None:
        given["encoder_hid_dim_type"] = "text_proj"
    _keep_depths_in_use(given)
    if given["mid_block_type"] == "UNetMidBlock2D":
        given["mid_block_type"] = "ResnetMidBlock2D"
    if given["mid_block_type"] == "UNetMidBlock2DSimpleCrossAttn":
        everywhere = given.get("only_cross_attention", False)
        by_default = everywhere if isinstance(everywhere, bool) else False
        given["mid_block_only_cross_attention"] = by_default if middle_only_cross is None else middle_only_cross
    kinds = (*given["down_block_types"], *(given["up_blocks"] or ()), given["mid_block_type"] or "")
    if any(kind.startswith(("Attn", "K")) or "SimpleCrossAttn" in kind for kind in kinds):
        given["attention_head_dim"] = heads
    return UNetConfig(**given, num_attention_heads=heads)


def _keep_depths_in_use(given: dict[str, Any]) -> None:
    """Shorten lists of depths to what diffusers looks at: one for each transformer that a level has."""
    down = given["down_block_types"]
    layers = given.get("layers_per_block", UNetConfig.layers_per_block)
    layers = layers if isinstance(layers, tuple) else (layers,) * len(down)
    ways = (
        ("transformer_layers_per_block", down, layers),
        (
            "reverse_transformer_layers_per_block",
            given["up_blocks"] or _mirrored(down),
            [count + 1 for count in reversed(layers)],
        ),
    )
    for name, kinds, counts in ways:
        depths = given.get(name)
        if isinstance(depths, tuple) and len(depths) == len(kinds) == len(counts):
            given[name] = tuple(
                depth if isinstance(depth, int) else depth[:count] if kind.startswith("CrossAttn") else depth[0]
                for depth, kind, count in zip(depths, kinds, counts, strict=True)
            )


def _as_conditional_unet(config: UNetConfig) -> dict[str, Any]:
    middle = config.mid_block_type
    return {
        "_class_name": "UNet2DConditionModel",
        **{name: value for name, value in asdict(config).items() if name not in NOT_CONDITIONAL_FIELDS},
        "mid_block_type": "UNetMidBlock2D" if middle == "ResnetMidBlock2D" else middle,
        "up_block_types": config.up_block_types,
        "attention_head_dim": config.num_attention_heads,
    }


def _unconditional_unet(params: Parameters) -> UNetConfig:
    width, norm_groups = params.take("attention_head_dim", 8), params.take("attn_norm_num_groups", None)
    resample = params.take("downsample_type", "conv")
    if params.take("upsample_type", "conv") != resample:
        raise ValueError(f"{params.owner}: upsample_type must be downsample_type, {resample!r}")
    if resample not in ("conv", "resnet"):
        raise ValueError(f"{params.owner}: downsample_type must be conv or resnet, got {resample!r}")
    default = ("DownBlock2D",) + ("AttnDownBlock2D",) * 3
    given: dict[str, Any] = {"in_channels": 3, "out_channels": 3, "block_out_channels": (224, 448, 672, 896)}
    given |= _levels(params, default, UNCONDITIONAL_LEVELS)
    given["mid_block_type"] = _middle(params, "UNetMidBlock2D", UNCONDITIONAL_MIDDLES)
    given |= params.take_fields(UNetConfig, but={f.name for f in fields(UNetConfig)} - UNCONDITIONAL_FIELDS)
    params.finish()
    groups = given.get("norm_num_groups", UNetConfig.norm_num_groups)
    # If not told otherwise, the attention in the middle has a norm only without scale-shift.
    if norm_groups is None and given.get("resnet_time_scale_shift", "default") != "default":
        norm_groups = 0
    if norm_groups not in (None, groups):
        given["attn_norm_num_groups"] = norm_groups
    down = given["down_block_types"]
    if resample == "resnet":  # levels without attention do not look at it
        if given["up_blocks"] is not None:
            raise ValueError(f"{params.owner}: downsample_type 'resnet' needs up_block_types that mirror {down}")
        resample = tuple("resnet" if kind.startswith("Attn") else "conv" for kind in down)
    levels = zip(given["block_out_channels"], (*down[:-1], "AttnMiddle"), strict=True)
    if width and any(kind.startswith("Attn") and channels % width for channels, kind in levels):
        given["attention_head_dim"] = width
    heads = tuple(max(1, channels // width) if width else 1 for channels in given["block_out_channels"])
    return UNetConfig(**given, num_attention_heads=heads, cross_attention_dim=None, resample_type=resample)


def _as_unconditional_unet(config: UNetConfig) -> dict[str, Any]:
    level = len(config.block_out_channels) - 1
    groups = config.norm_num_groups if config.attn_norm_num_groups is None else config.attn_norm_num_groups
    resnet = any(config.at_level("resample_type", i) == "resnet" for i in range(level + 1))
    return {
        "_class_name": "UNet2DModel",
        **{name: value for name, value in asdict(config).items() if name in UNCONDITIONAL_FIELDS},
        "up_block_types": config.up_block_types,
        "attention_head_dim": config.heads(level, "UNetMidBlock2D")[1],
        "attn_norm_num_groups": groups or None,
        "downsample_type": "resnet" if resnet else "conv",
        "upsample_type": "resnet" if resnet else "conv",
    }


def _levels(params: Parameters, default: tuple[str, ...], allowed: tuple[str, ...]) -> dict[str, Any]:
    """Return the kinds of levels, those of the way up only if they do not mirror the way down."""
    down = tuple(kind.removeprefix("UNetRes") for kind in params.take("down_block_types", default))
    up = tuple(kind.removeprefix("UNetRes") for kind in params.take("up_block_types", _mirrored(down)))
    both = (("down_block_types", down, allowed), ("up_block_types", up, _mirrored(allowed)))
    for name, kinds, choices in both:
        for kind in kinds:
            if kind not in choices:
                raise ValueError(f"{params.owner}: {name} must be of {', '.join(choices)}, got {kind!r}")
    if len(up) != len(down):
        raise ValueError(f"{params.owner}: up_block_types needs {len(down)} entries, got {list(up)}")
    return {"down_block_types": down, "up_blocks": None if list(up) == _mirrored(down) else up}


def _middle(params: Parameters, default: str, allowed: tuple[str | None, ...]) -> str | None:
    kind: str | None = params.take("mid_block_type", default)
    if kind not in allowed:
        names = ", ".join(map(str, allowed))
        raise ValueError(f"{params.owner}: mid_block_type must be {names}, got {kind!r}")
    return kind


def _insist_on_silu(params: Parameters) -> None:
    activation = params.take("act_fn", "silu")
    if activation not in ("silu", "swish"):  # two names of one function
        raise ValueError(f"{params.owner}: act_fn must be 'silu', got {activation!r}")


def _mirrored(down: tuple[str, ...]) -> list[str]:
    return [block.replace("Down", "Up").replace("Encoder", "Decoder") for block in reversed(down)]


# ---- diffusers' first stages ----


def _autoencoder_kl(params: Parameters) -> AutoencoderConfig:
    return AutoencoderConfig(**{"latent_channels": 4, **_coder(params, AutoencoderConfig)})


def _as_autoencoder_kl(config: AutoencoderConfig) -> dict[str, Any]:
    hidden = ("attention_levels", "decoder_attention_levels", "z_channels")
    values = {name: value for name, value in asdict(config).items() if name not in hidden}
    return {"_class_name": "AutoencoderKL", **values, **_coder_blocks(config)}


def _vq_model(params: Parameters) -> VQConfig:
    # In diffusers latent_channels is the width next to the coders, and vq_embed_dim that of the codes.
    inner = params.take("latent_channels", 3)
    width = params.take("vq_embed_dim", None)
    params.insist(norm_type="group")
    given: dict[str, Any] = {
        "num_vq_embeddings": 256,
        "scaling_factor": 0.18215,
        "legacy": True,
        **_coder(params, VQConfig),
    }
    return VQConfig(**given, latent_channels=inner if width is None else width, z_channels=inner)


NOT_IN_VQ_MODEL = frozenset(
    "attention_levels decoder_attention_levels z_channels use_quant_conv use_post_quant_conv shift_factor "
    "latents_mean latents_std codebook_ema_decay".split()
)


def _as_vq_model(config: VQConfig) -> dict[str, Any]:
    # The loss is not part of diffusers' configuration; its class has this one.
    loss = {"legacy": True, "commitment_weight": VQConfig.commitment_weight}.items()
    values = {key: v for key, v in asdict(config).items() if key not in NOT_IN_VQ_MODEL and (key, v) not in loss}
    width = {"latent_channels": config.encoder_channels, "vq_embed_dim": config.latent_channels}
    return {"_class_name": "VQModel", **values, **_coder_blocks(config), **width}


def _coder(params: Parameters, config: type) -> dict[str, Any]:
    """Return the fields that both first stages share."""
    _insist_on_silu(params)
    down = tuple(params.take("down_block_types", ("DownEncoderBlock2D",)))
    up = tuple(params.take("up_block_types", _mirrored(down)))
    for name, kinds, plain in (
        ("down_block_types", down, "DownEncoderBlock2D"),
        ("up_block_types", up, "UpDecoderBlock2D"),
    ):
        wrong = [kind for kind in kinds if kind not in (plain, f"Attn{plain}")]
        if wrong:
            raise ValueError(f"{params.owner}: {name} must be {plain} or Attn{plain}, got {wrong[0]!r}")
    if len(up) != len(down):
        raise ValueError(f"{params.owner}: up_block_types needs {len(down)} entries, got {list(up)}")
    given = {"block_out_channels": (64,), "layers_per_block": 1, "sample_size": 32, **params.take_fields(config)}
    params.finish()
    levels = tuple(level for level, block in enumerate(down) if block.startswith("Attn"))
    if len(down) != len(given["block_out_channels"]):
        raise ValueError(
            f"{params.owner}: down_block_types needs {len(given['block_out_channels'])} entries, got {len(down)}"
        )
    if list(up) != _mirrored(down):
        given["decoder_attention_levels"] = tuple(i for i, kind in enumerate(reversed(up)) if kind.startswith("Attn"))
    return {**given, "attention_levels": levels}


def _coder_blocks(config: AutoencoderConfig) -> dict[str, Any]:
    return {"down_block_types": config.down_block_types, "up_block_types": config.up_block_types}


def _field_by_field(config: type[ModelConfig]) -> Callable[[Parameters], ModelConfig]:
    def read(params: Parameters) -> ModelConfig:
        given = params.take_fields(config)
        params.finish()
        return config(**given)

    return read


READERS: dict[str, Callable[[Parameters], ModelConfig]] = {
    "UNet2DConditionModel": _conditional_unet,
    "UNet2DModel": _unconditional_unet,
    "AutoencoderKL": _autoencoder_kl,
    "VQModel": _vq_model,
    **{config.__name__: _field_by_field(config) for config in (UNetConfig, AutoencoderConfig, VQConfig)},
}
