"""The denoising UNet ε_θ(z_t, t, τ_θ(y)) of latent diffusion (Rombach et al., arXiv:2112.10752, 3.2, figure 3)."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from ldm_fast.configs.unet import UNetConfig
from ldm_fast.interop.names import UNET_PREFIX
from ldm_fast.models.attention import Attention, name_attentions
from ldm_fast.models.attention_methods import AttentionMethods
from ldm_fast.models.embeddings import (
    Timesteps,
    activation,
    add_embedding,
    class_embedding,
    context_projection,
    time_embedding,
    time_projection,
)
from ldm_fast.models.image_prompts import Context, text_and_images
from ldm_fast.models.layers import GroupNorm, ResnetBlock2D, Transformer2DModel, norm_and_activation
from ldm_fast.models.memory import recall
from ldm_fast.models.outputs import UNetOutput
from ldm_fast.models.pretrained import Pretrained
from ldm_fast.models.unet_blocks import DOWN_BLOCKS, MID_BLOCKS, UP_BLOCKS, UpBlock2D
from ldm_fast.models.unet_inputs import (
    add_extras,
    add_residuals,
    as_batch,
    biases,
    check_context,
    check_dtypes,
    check_labels,
    check_sample,
    given,
    residuals_as_meant,
    sample_channels,
)
from ldm_fast.ops.op import autocast_dtype


class UNet(AttentionMethods, Pretrained):
    """UNet(config)(sample, timestep, encoder_hidden_states) → prediction in the parameterisation it was trained in.

    Takes what diffusers' UNet2DConditionModel takes, including the residuals of ControlNets and T2I-Adapters, and
    IP-Adapters. Run a sampling loop of your own in `torch.no_grad()` and `ldm_fast.fixed_weights()`: then the keys and
    values of a context are computed once for all steps.

    Sizes that are not multiples of 2^levels work, since upsampling goes to the size of the skip connection.
    """

    config: UNetConfig

    config_class = UNetConfig
    stands_for = ("UNet2DConditionModel", "UNet2DModel")
    compvis_prefix = UNET_PREFIX
    output_class: ClassVar[type[Any]] = UNetOutput

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        self.uses_context = config.uses_context
        channels = config.block_out_channels
        self.conv_in = _convolution(config.in_channels, channels[0], config.conv_in_kernel)
        self.time_proj = time_projection(config)
        self.time_embedding = time_embedding(config)
        self.encoder_hid_proj = context_projection(config)  # or of images, once IP-Adapters are loaded
        self.class_embedding = class_embedding(config)
        self.add_time_proj: nn.Module | None = None
        if config.addition_embed_type == "text_time":
            width = config.given("addition_time_embed_dim")
            self.add_time_proj = Timesteps(width, config.flip_sin_to_cos, config.freq_shift)
        self.add_embedding = add_embedding(config)
        act = config.time_embedding_act_fn
        self.time_embed_act = None if act is None else activation(act)
        time_channels = config.time_channels * (2 if config.class_embeddings_concat else 1)

        self.down_blocks = nn.ModuleList(
            DOWN_BLOCKS[kind](config, level, time_channels) for level, kind in enumerate(config.down_block_types)
        )
        kind = config.mid_block_type
        middle = None if kind is None else MID_BLOCKS[kind](config, time_channels)
        self.up_blocks = nn.ModuleList(
            UP_BLOCKS[kind](config, len(channels) - 1 - i, time_channels)
            for i, kind in enumerate(config.up_block_types)
        )
        self.mid_block = middle  # after the way up: optimizers know parameters by diffusers' order
        has_norm = config.norm_num_groups is not None or not config.is_conditional
        norm = GroupNorm(config.groups(channels[0]), channels[0], config.norm_eps) if has_norm else None
        self.conv_norm_out = norm
        self.conv_act = activation(config.act_fn if config.is_conditional else "silu") if has_norm else None
        self.conv_out = _convolution(channels[0], config.out_channels, config.conv_out_kernel)
        self.id_predictor: nn.Module | None = None
        if config.n_embed is not None:
            norm = GroupNorm(config.groups(channels[0]), channels[0], config.norm_eps)
            self.id_predictor = nn.Sequential(norm, nn.Conv2d(channels[0], config.n_embed, 1))
        name_attentions(self)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        encoder_hidden_states: Context = None,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        added_cond_kwargs: Mapping[str, Any] | None = None,
        down_block_additional_residuals: Sequence[Tensor] | None = None,
        mid_block_additional_residual: Tensor | None = None,
        down_intrablock_additional_residuals: Sequence[Tensor] | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNetOutput | tuple[Tensor]:
        """Evaluate the network. Names, order and meaning of the arguments are those of diffusers.

        Args:
            sample: z_t, (B, in_channels, H, W).
            timestep: int, float, 0-d or (B,) tensor.
            encoder_hidden_states: context τ_θ(y), (B, L, cross_attention_dim); needed by cross attention. With
                IP-Adapters also (context, [projected images (B, images, tokens, cross_attention_dim) for each]).
            class_labels: (B,) int64, for a UNet with class embeddings (conditioning key "adm"); numbers if
                class_embed_type is given, (B,) for "timestep", (B, width) for the others.
            timestep_cond: (B, time_cond_proj_dim), added to the timestep's embedding.
            attention_mask: (B, keys) of self attention, 1 = attend, 0 = do not.
            cross_attention_kwargs: for processors, and "ip_adapter_masks", for each IP-Adapter (1, images, height,
                width). What nobody takes is named in a warning.
            added_cond_kwargs: "text_embeds" (B, width) and "time_ids" (B, numbers) if addition_embed_type is
                "text_time"; "image_embeds" for IP-Adapters.
            down_block_additional_residuals, mid_block_additional_residual: a ControlNet's, for every skip connection
                and for the middle.
            down_intrablock_additional_residuals: a T2I-Adapter's, for each level and perhaps for the middle.
            encoder_attention_mask: (B, L), True or 1 = attend, False or 0 = do not.
            return_dict: `UNetOutput` if True, else a tuple with the sample.

        Raises:
            ValueError: an input is missing, has the wrong shape or dtype, or is not for this UNet.
        """
        context, images = text_and_images(encoder_hidden_states)
        added = added_cond_kwargs or {}
        residuals, residual, extras = residuals_as_meant(
            down_block_additional_residuals, mid_block_additional_residual, down_intrablock_additional_residuals
        )
        self._check(sample, timestep, context, class_labels, timestep_cond)
        temb = self._embed_time(sample, timestep, timestep_cond)  # (B, 4 C)
        temb, hint = self._embed_conditions(temb, context, class_labels, added)
        context, images = self._project_context(context, images, added)
        masks = biases(attention_mask, encoder_attention_mask, sample, context)
        conditions = {
            "encoder_hidden_states": context if images is None else (context, images),
            "cross_attention_kwargs": cross_attention_kwargs,
            "attention_mask": masks[0],
            "encoder_attention_mask": masks[1],
        }

        x = self._whole_input(sample, hint)  # (B, in, H, W)
        h, skips = self._down(x, temb, conditions, extras)  # (B, C', H/8, W/8)
        if self.mid_block is not None:
            h = add_extras(self.mid_block(h, temb, **_for(self.mid_block, conditions)), extras)
        if residual is not None and residuals is not None:
            h, skips = h + residual, add_residuals(skips, residuals)
        h, picture = self._up(h, skips, temb, conditions)  # (B, C, H, W)
        h = self._head(h) if picture is None else self._head(h) + picture  # (B, out, H, W)
        if self.config.predicts_over_level:
            h = h / as_batch(timestep, h)[:, None, None, None]
        if not return_dict:
            return (h,)
        output: UNetOutput = self.output_class(sample=h)
        return output

    def _down(
        self, x: Tensor, temb: Tensor, conditions: Mapping[str, Any], extras: list[Tensor]
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """Return (h, all skips) of the way down. Takes one of the extras, a T2I-Adapter's residuals, for each level."""
        h: Tensor = self.conv_in(x)  # (B, C, H, W)
        skips = (h,)
        for block in self.down_blocks:
            if hasattr(block, "skip_conv"):  # NCSN++
                h, skips_of_block, x = block(hidden_states=h, temb=temb, skip_sample=x)
                skips += tuple(skips_of_block)
                continue
            given, extra = _for(block, conditions), extras.pop(0) if extras else None
            crosses = getattr(block, "has_cross_attention", False)
            if extra is not None and crosses:
                given["additional_residuals"] = extra
            h, skips_of_block = block(hidden_states=h, temb=temb, **given)  # (B, C', H/2, W/2)
            if extra is not None and not crosses:  # after the reduction
                h = h + extra
                skips_of_block = (*skips_of_block[:-1], h)
            skips += tuple(skips_of_block)
        return h, skips

    def _up(
        self, h: Tensor, skips: Sequence[Tensor], temb: Tensor, conditions: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """Return (h, what blocks of NCSN++ add to the prediction)."""
        picture: Tensor | None = None
        for block in self.up_blocks:
            count = len(cast("nn.ModuleList", block.resnets))
            skips, own = skips[:-count], tuple(skips[-count:])
            if hasattr(block, "skip_conv"):
                h, picture = block(h, own, temb, picture)
                continue
            size = tuple(skips[-1].shape[2:]) if skips else None  # skips may be of odd sizes
            given = _for(block, conditions)
            h = block(hidden_states=h, temb=temb, res_hidden_states_tuple=own, upsample_size=size, **given)
        return h, picture

    def _head(self, h: Tensor) -> Tensor:
        """Return the prediction, (B, C, H, W) → (B, out_channels, H, W), or that of codes (B, n_embed, H, W)."""
        if self.id_predictor is not None:
            h = self.id_predictor(h)
        elif self.conv_norm_out is None or self.conv_act is None:
            h = self.conv_out(h)
        else:
            h = self.conv_out(norm_and_activation(self.conv_norm_out, self.conv_act, h))
        return h

    def _embed_time(self, sample: Tensor, timestep: Tensor | float | int, condition: Tensor | None) -> Tensor:
        known = self.time_embedding.look_up(timestep, sample) if condition is None else None
        if known is not None:
            return known.expand(sample.shape[0], -1)
        t = as_batch(timestep, sample)
        temb: Tensor = self.time_embedding(self.time_proj(t).to(sample.dtype), condition)
        return temb

    def _embed_conditions(
        self, temb: Tensor, context: Tensor | None, class_labels: Tensor | None, added: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """Return the embedding (B, 4 C) of time, class and pooled text or image, and the channels made of a hint."""
        if self.class_embedding is not None:
            if self.config.class_embed_type == "timestep":
                class_labels = self.time_proj(class_labels).to(temb.dtype)
            classes = self.class_embedding(class_labels).to(temb.dtype)
            temb = torch.cat([temb, classes], dim=-1) if self.config.class_embeddings_concat else temb + classes
        hint = None
        if self.add_embedding is not None:
            embedded = self.add_embedding(*self._pooled(temb, context, added))
            if isinstance(embedded, tuple):
                embedded, hint = embedded
            temb = temb + embedded
        return temb if self.time_embed_act is None else self.time_embed_act(temb), hint

    def _pooled(self, temb: Tensor, context: Tensor | None, added: Mapping[str, Any]) -> tuple[Any, ...]:
        """Return what `add_embedding` is called with."""
        kind = self.config.addition_embed_type
        if kind == "text_image":
            return added.get("text_embeds", context), given(added, "image_embeds")
        if kind == "image":
            return (given(added, "image_embeds"),)
        if kind == "image_hint":
            return given(added, "image_embeds"), given(added, "hint")
        if self.add_time_proj is None:
            return (context,)
        numbers = self.add_time_proj(given(added, "time_ids").flatten())  # (B · numbers, channels)
        text = given(added, "text_embeds")  # (B, width)
        both = torch.cat([text, numbers.reshape(text.shape[0], -1)], dim=-1).to(temb.dtype)
        needed = self.config.projection_class_embeddings_input_dim
        if both.shape != (temb.shape[0], needed):
            raise ValueError(
                f"UNet: text_embeds and time_ids must come to ({temb.shape[0]}, {needed}), got {tuple(both.shape)} "
                f"from {tuple(text.shape)} and {tuple(added['time_ids'].shape)}"
            )
        return (both,)

    def _project_context(
        self, context: Tensor | None, images: Sequence[Tensor] | None, added: Mapping[str, Any]
    ) -> tuple[Tensor | None, Sequence[Tensor] | None]:
        """Return what cross attention looks at: the context (B, L, cross_attention_dim), and IP-Adapters' images."""
        kind, project_text = self.config.encoder_hid_dim_type, None
        if kind == "text_proj":
            project_text = self.encoder_hid_proj
        elif kind == "ip_image_proj":
            if self.encoder_hid_proj is None:
                raise ValueError("UNet: encoder_hid_dim_type is 'ip_image_proj', but no IP-Adapter is loaded")
            images = self.encoder_hid_proj(given(added, "image_embeds"))
            project_text = getattr(self, "text_encoder_hid_proj", None)  # where a loader puts what was here before
        elif kind is not None:
            assert self.encoder_hid_proj is not None
            image = given(added, "image_embeds")
            inputs = (image,) if kind == "image_proj" else (context, image)
            return self.encoder_hid_proj(*inputs), images
        if project_text is not None and context is not None:
            context = recall(context, (project_text,), functools.partial(project_text, context))
        return context, images

    def _whole_input(self, sample: Tensor, hint: Tensor | None) -> Tensor:
        if self.config.center_input_sample:
            sample = 2 * sample - 1
        return sample if hint is None else torch.cat([sample, hint], dim=1)

    def _check(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        context: Tensor | None,
        class_labels: Tensor | None,
        timestep_cond: Tensor | None,
    ) -> None:
        check_sample(self.config, sample_channels(self.config, self.conv_in), sample, timestep, timestep_cond)
        plain = "forward" not in self.conv_in.__dict__ and not self.conv_in._forward_pre_hooks  # else these may convert
        if plain and autocast_dtype(sample) is None:
            check_dtypes(self.dtype, sample=sample, encoder_hidden_states=context, timestep_cond=timestep_cond)
        batch = sample.shape[0]
        if self.config.encoder_hid_dim_type != "image_proj":  # else it is not looked at
            check_context(context, batch, self.config.given_context_channels, needed=self.uses_context)
        check_labels(self.config, class_labels, batch, self.class_embedding)

    def precompute_time(self, timesteps: Tensor | Sequence[float]) -> None:
        """Embed a whole schedule (T,) at once, for the calls in this scope of `fixed_weights`; no effect outside one.

        Calls find their timesteps by value, if these are numbers or on the CPU. Calls with `timestep_cond` do not.
        """
        t = torch.as_tensor(timesteps, device=self.device).reshape(-1)
        self.time_embedding.remember(t, self.time_proj(t).to(self.dtype))

    def enable_freeu(self, s1: float, s2: float, b1: float, b2: float) -> None:
        """Weigh skips (s) and backbone (b) of the first two levels on the way up: see `models.freeu`."""
        for block in cast("list[UpBlock2D]", self.up_blocks):
            block.s1, block.s2, block.b1, block.b2 = s1, s2, b1, b2

    def disable_freeu(self) -> None:
        """End what `enable_freeu` began."""
        for block in cast("list[UpBlock2D]", self.up_blocks):
            block.s1 = block.s2 = block.b1 = block.b2 = None

    @torch.no_grad()
    def zero_residuals(self) -> None:
        """Set the last layer of every residual branch, and of the whole, to zero, as training should start."""
        last: list[nn.Module] = [self.conv_out]
        for module in self.modules():
            if isinstance(module, ResnetBlock2D):
                last.append(module.conv2)
            elif isinstance(module, Transformer2DModel):
                last.append(module.proj_out)
            elif isinstance(module, Attention) and module.residual_connection:
                last.append(module.to_out[0])
        for layer in last:
            for parameter in layer.parameters():
                parameter.zero_()

    @property
    def dtype(self) -> torch.dtype:
        return self.conv_in.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.conv_in.weight.device


def _convolution(inputs: int, outputs: int, kernel: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)


def _for(block: Any, conditions: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the conditions that the block looks at; blocks that replace ours may take no others."""
    if getattr(block, "has_cross_attention", False):
        return dict(conditions)
    mask = conditions["attention_mask"]
    return {} if mask is None else {"attention_mask": mask}
