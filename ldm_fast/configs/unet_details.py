"""What only few published UNets change: fields of `UNetConfig` that hardly any configuration sets."""

from __future__ import annotations

from dataclasses import dataclass

ACTIVATIONS = ("silu", "swish", "mish", "gelu", "relu")


@dataclass(frozen=True, kw_only=True)
class UNetDetails:
    """What only few published UNets change. The defaults are those of Stable Diffusion and latent diffusion.

    Models that change the activation, the scale of a residual branch or the kind of block run at PyTorch's speed.
    """

    center_input_sample: bool = False  # the network sees 2 z - 1
    flip_sin_to_cos: bool = True  # cosines stand before sines; False in the published DDPM models
    freq_shift: int = 0  # 1: the last frequency is 1/10000, as in the published DDPM models
    time_embedding_type: str = "positional"  # "fourier": of random frequencies; "learned": a table of timesteps
    time_embedding_dim: int | None = None  # width of the time embedding; None: four times the first level's
    time_embedding_act_fn: str | None = None  # activation of the time embedding before all blocks
    timestep_post_act: str | None = None  # activation behind the timestep's own embedding
    num_train_timesteps: int | None = None  # length of the table of "learned"
    act_fn: str = "silu"  # activation of residual blocks
    conv_in_kernel: int = 3
    conv_out_kernel: int = 3
    downsample_padding: int = 1  # 0: a row and a column are added below and on the right alone (published DDPM models)
    up_blocks: tuple[str, ...] | None = (
        None  # kinds of the levels on the way up, if not the mirror image of the way down
    )
    # Heads on the way up, if others; only where pixels attend to themselves alone (the original's num_heads_upsample).
    num_attention_heads_up: int | None = None
    # Width of a head in levels whose kind goes by it if it is given: "Attn…", "K…", "SimpleCrossAttn…" and the$
    # middle of a UNet without a context. It need not divide the channels.
    attention_head_dim: int | tuple[int, ...] | None = None
    attn_norm_num_groups: int | None = None  # of the norm of the middle's attention; 0: there is none
    add_attention: bool = True  # in the middle, "UNetMidBlock2D"
    mid_block_scale_factor: float = 1.0  # residual branches of the middle are divided by it
    mid_block_only_cross_attention: bool = False  # of "UNetMidBlock2DSimpleCrossAttn"
    resnet_skip_time_act: bool = False  # "Resnet…" and "SimpleCrossAttn…": no activation before the time projection
    resnet_out_scale_factor: float = 1.0  # in the same levels residual branches are divided by it
    cross_attention_norm: str | None = None  # norm of the context in "SimpleCrossAttn…": "layer_norm" or "group_norm"
    n_embed: int | None = None  # codes of a codebook that the network predicts instead of a latent
    class_embeddings_concat: bool = False  # the class embedding stands behind the time embedding, not added to it

    def __post_init__(self) -> None:
        for name in ("act_fn", "time_embedding_act_fn", "timestep_post_act"):
            value = getattr(self, name)
            if value not in ACTIVATIONS and (value is not None or name == "act_fn"):
                raise ValueError(f"UNetConfig: {name} must be one of {', '.join(ACTIVATIONS)}, got {value!r}")
        if self.cross_attention_norm not in (None, "layer_norm", "group_norm"):
            raise ValueError(
                f"UNetConfig: cross_attention_norm must be None, layer_norm or group_norm, "
                f"got {self.cross_attention_norm!r}"
            )
        if self.downsample_padding not in (0, 1):
            raise ValueError(f"UNetConfig: downsample_padding must be 0 or 1, got {self.downsample_padding!r}")
        for name in ("conv_in_kernel", "conv_out_kernel"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1 or value % 2 == 0:
                raise ValueError(f"UNetConfig: {name} must be an odd number, got {value!r}")
