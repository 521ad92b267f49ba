"""Our configurations from constructor parameters of the original code and of Stable Diffusion's repositories."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ldm_fast.configs.encoders import ClassEmbedderConfig, SpatialRescalerConfig, TransformerConfig
from ldm_fast.configs.first_stage import AutoencoderConfig, VQConfig
from ldm_fast.configs.from_dict import as_tuple
from ldm_fast.configs.unet import UNetConfig
from ldm_fast.interop.parameters import Parameters, one_value

XL_TIME_CHANNELS = 256  # for each of the six numbers (sizes and crops) that Stable Diffusion XL is told


def unet_config_from_compvis(params: Mapping[str, Any]) -> UNetConfig:
    """Return our configuration from the constructor parameters of the original's UNetModel.

    ValueError names a parameter that we cannot honour.
    """
    params = Parameters("UNetModel", params)
    generative_models = "spatial_transformer_attn_type" in params  # the repository of Stable Diffusion XL
    params.ignore("use_checkpoint", "use_fp16", "use_bf16", "spatial_transformer_attn_type")
    params.insist(dims=2, use_new_attention_order=False)
    params.insist(num_attention_blocks=None, disable_middle_self_attn=False)
    base, multipliers = params.take("model_channels"), tuple(params.take("channel_mult", (1, 2, 4, 8)))
    attention = "CrossAttn" if params.take("use_spatial_transformer", generative_models) else "Attn"
    resolutions = set(params.take("attention_resolutions"))
    head_channels, heads = params.take("num_head_channels", -1), params.take("num_heads", -1)
    if head_channels == heads == -1:
        raise ValueError("UNetModel: num_heads or num_head_channels is needed")
    context_channels = one_value("UNetModel", "context_dim", params.take("context_dim", None))
    if (context_channels is None) == (attention == "CrossAttn"):
        raise ValueError("UNetModel: context_dim and use_spatial_transformer belong together")
    # Heads on the way up count only if neither their width nor, with legacy=False, the number on the way down is taken.
    legacy, heads_up = params.take("legacy", True), params.take("num_heads_upsample", -1)
    has_up_heads = legacy and attention == "Attn" and head_channels == -1 and heads_up not in (-1, heads)
    conv = "conv" if params.take("conv_resample", True) else "pool"
    depth = as_tuple(params.take("transformer_depth", 1))
    params.insist(transformer_depth_middle=depth[-1] if isinstance(depth, tuple) else depth)
    config = UNetConfig(
        sample_size=params.take("image_size", UNetConfig.sample_size),
        in_channels=params.take("in_channels"),
        out_channels=params.take("out_channels"),
        down_block_types=tuple(
            f"{attention if 2**level in resolutions else ''}DownBlock2D" for level in range(len(multipliers))
        ),
        mid_block_type="UNetMidBlock2DCrossAttn" if attention == "CrossAttn" else "UNetMidBlock2D",
        block_out_channels=tuple(base * m for m in multipliers),
        layers_per_block=as_tuple(params.take("num_res_blocks")),
        cross_attention_dim=context_channels,
        transformer_layers_per_block=depth,
        num_attention_heads=heads if head_channels == -1 else tuple(base * m // head_channels for m in multipliers),
        use_linear_projection=params.take("use_linear_in_transformer", False),
        only_cross_attention=as_tuple(params.take("disable_self_attentions", None) or False),
        resnet_time_scale_shift="scale_shift" if params.take("use_scale_shift_norm", False) else "default",
        resample_type="resnet" if params.take("resblock_updown", False) else conv,
        dropout=params.take("dropout", 0.0),
        num_attention_heads_up=heads_up if has_up_heads else None,
        n_embed=params.take("n_embed", None),
        **_class_fields(params, generative_models),
    )
    params.finish()
    return config


def _class_fields(params: Parameters, generative_models: bool) -> dict[str, Any]:
    """Return the fields that say what joins the time embedding: a class, or a vector ("sequential")."""
    classes, width = params.take("num_classes", None), params.take("adm_in_channels", None)
    if classes is None or isinstance(classes, int):
        return {"num_class_embeds": classes}
    if classes != "sequential" or width is None:
        raise ValueError(
            f"UNetModel: num_classes must be a number or 'sequential' with adm_in_channels, got {classes!r}"
        )
    fields = {"projection_class_embeddings_input_dim": width}
    if generative_models:
        return {**fields, "addition_embed_type": "text_time", "addition_time_embed_dim": XL_TIME_CHANNELS}
    return {**fields, "class_embed_type": "projection"}


def autoencoder_config_from_compvis(params: Mapping[str, Any]) -> AutoencoderConfig | VQConfig:
    """Return our configuration from the parameters of the original's AutoencoderKL, VQModel or VQModelInterface.

    The latter two have `n_embed`. They get `legacy=True`, the loss they were trained with. ValueError names a parameter
    that we cannot honour.
    """
    params = Parameters("first stage", params)
    inner = Parameters("first stage: ddconfig", params.take("ddconfig"))
    codes = params.take("n_embed", None)
    params.ignore("lossconfig", "monitor", "image_key", "ckpt_path", "ignore_keys", "scheduler_config", "use_ema")
    params.insist(remap=None, sane_index_shape=False)
    inner.insist(double_z=codes is None, resamp_with_conv=True, use_linear_attn=False, tanh_out=False, dropout=0.0)
    attention = inner.take("attn_type", "vanilla")
    if attention not in ("vanilla", "vanilla-xformers", "none"):
        raise ValueError(f"first stage: attn_type must be vanilla or none, got {attention!r}")
    resolution, multipliers = inner.take("resolution"), tuple(inner.take("ch_mult", (1, 2, 4, 8)))
    base, resolutions = inner.take("ch"), set(inner.take("attn_resolutions"))
    levels = (level for level in range(len(multipliers)) if resolution // 2**level in resolutions)
    fields: dict[str, Any] = dict(
        in_channels=inner.take("in_channels"),
        out_channels=inner.take("out_ch"),
        block_out_channels=tuple(base * m for m in multipliers),
        layers_per_block=inner.take("num_res_blocks"),
        latent_channels=params.take("embed_dim"),
        z_channels=inner.take("z_channels"),
        attention_levels=tuple(levels) if attention != "none" else (),
        mid_block_add_attention=attention != "none",
    )
    params.finish()
    inner.finish()
    if codes is None:
        return AutoencoderConfig(**fields)
    return VQConfig(**fields, num_vq_embeddings=codes, legacy=True)


MODEL_READERS: dict[type, Callable[[Mapping[str, Any]], UNetConfig | AutoencoderConfig]] = {
    UNetConfig: unet_config_from_compvis,
    AutoencoderConfig: autoencoder_config_from_compvis,
    VQConfig: autoencoder_config_from_compvis,
}


def encoder_config_from_compvis(
    name: str, params: Mapping[str, Any]
) -> TransformerConfig | ClassEmbedderConfig | SpatialRescalerConfig:
    """Return our configuration from the class name and parameters of one of the original's condition encoders.

    ValueError names a class or a parameter that we do not know.
    """
    params = Parameters(name, params)
    config: TransformerConfig | ClassEmbedderConfig | SpatialRescalerConfig
    if name in ("BERTEmbedder", "TransformerEmbedder"):
        params.ignore("use_tokenizer", "device")
        params.insist(embedding_dropout=0.0)
        vocabulary = params.take("vocab_size", 30522) if name == "BERTEmbedder" else params.take("vocab_size")
        config = TransformerConfig(
            vocab_size=vocabulary,
            width=params.take("n_embed"),
            depth=params.take("n_layer"),
            max_length=params.take("max_seq_len", 77),
        )
    elif name == "ClassEmbedder":
        params.ignore("key")
        config = ClassEmbedderConfig.published(params.take("n_classes", 1000), params.take("embed_dim"))
    elif name == "SpatialRescaler":
        params.insist(method="bilinear", bias=False)
        config = SpatialRescalerConfig(
            in_channels=params.take("in_channels", 3),
            out_channels=params.take("out_channels"),
            n_stages=params.take("n_stages", 1),
            multiplier=params.take("multiplier", 0.5),
        )
    else:
        known = "BERTEmbedder, TransformerEmbedder, ClassEmbedder, SpatialRescaler"
        raise ValueError(f"weights: no encoder {name!r}; known: {known}")
    params.finish()
    return config
