"""The blocks of Stable Diffusion's x2 latent upscaler, from k-diffusion, in plain PyTorch.

Norms take scale and shift from the time embedding alone, attention has no feed-forward, and sizes change by a fixed
filter. An up block looks at one skip. Sub-modules have diffusers' names and stand in its order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_fast.configs.unet import UNetConfig
from ldm_fast.models.attention import Attention, to_map, to_tokens
from ldm_fast.models.attention_processors import NOTHING
from ldm_fast.models.embeddings import activation
from ldm_fast.models.image_prompts import Context
from ldm_fast.models.recompute import Recomputed

GROUP_SIZE = 32  # channels of a group
FILTER = (1 / 8, 3 / 8, 3 / 8, 1 / 8)


class AdaGroupNorm(nn.Module):
    """Group norm whose scale and shift are made of the time embedding."""

    def __init__(self, time_channels: int, channels: int, groups: int, eps: float = 1e-5):
        super().__init__()
        self.num_groups, self.eps = groups, eps
        self.linear = nn.Linear(time_channels, 2 * channels)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        scale, shift = self.linear(emb)[:, :, None, None].chunk(2, dim=1)
        out: Tensor = F.group_norm(x, self.num_groups, eps=self.eps) * (1 + scale) + shift
        return out


class KResnet(nn.Module):
    """Norm, activation and convolution twice, plus the input.

    `middle` is the width between the convolutions, and `level_channels` that of the level, which gives its groups.
    """

    def __init__(
        self, config: UNetConfig, inputs: int, middle: int, outputs: int, level_channels: int, time_channels: int
    ):
        super().__init__()
        self.norm1 = AdaGroupNorm(time_channels, inputs, inputs // GROUP_SIZE, config.norm_eps)
        self.conv1 = nn.Conv2d(inputs, middle, 3, padding=1)
        self.norm2 = AdaGroupNorm(time_channels, middle, level_channels // GROUP_SIZE, config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = nn.Conv2d(middle, outputs, 3, padding=1)
        self.nonlinearity = activation(config.act_fn)
        self.conv_shortcut = nn.Conv2d(inputs, outputs, 1, bias=False) if inputs != outputs else None

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        h = self.conv1(self.nonlinearity(self.norm1(x, temb)))
        h = self.conv2(self.dropout(self.nonlinearity(self.norm2(h, temb))))
        out: Tensor = (x if self.conv_shortcut is None else self.conv_shortcut(x)) + h
        return out


class KAttentionBlock(nn.Module):
    """Attention from the pixels of a map to themselves, if `add_self_attention`, and to the context."""

    def __init__(self, config: UNetConfig, channels: int, head_dim: int, time_channels: int, add_self_attention: bool):
        super().__init__()
        heads, groups = channels // head_dim, max(1, channels // GROUP_SIZE)
        self.add_self_attention = add_self_attention
        if add_self_attention:
            self.norm1 = AdaGroupNorm(time_channels, channels, groups)
            self.attn1 = Attention(channels, heads=heads, head_dim=head_dim, qkv_bias=True)
        self.norm2 = AdaGroupNorm(time_channels, channels, groups)
        width = config.given("cross_attention_dim")
        self.attn2 = Attention(channels, heads=heads, head_dim=head_dim, context_channels=width, qkv_bias=True)
        projections = dict(self.attn2.named_children())
        for name in projections:
            delattr(self.attn2, name)
        self.attn2.norm_cross = nn.LayerNorm(width)  # first: the order of parameters is that of diffusers
        for name, layer in projections.items():
            setattr(self.attn2, name, layer)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Context = None,
        emb: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        encoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Return a map like hidden_states, (B, C, H, W)."""
        h, more = hidden_states, cross_attention_kwargs or NOTHING
        if self.add_self_attention:
            out = self.attn1(to_tokens(self.norm1(h, emb)), attention_mask=attention_mask, **more)
            h = h + to_map(out, h)
        mask = attention_mask if encoder_hidden_states is None else encoder_attention_mask
        out = self.attn2(to_tokens(self.norm2(h, emb)), encoder_hidden_states, mask, **more)
        return h + to_map(out, h)


class KDownsample2D(nn.Module):
    """A reduction by 2 with a fixed filter."""

    kernel: Tensor

    def __init__(self) -> None:
        super().__init__()
        row = torch.tensor([FILTER], device="cpu")  # also while the model is built without memory
        self.register_buffer("kernel", row.T @ row, persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        padded = F.pad(inputs, (1,) * 4, "reflect")
        return F.conv2d(padded, _for_each_channel(self.kernel, padded), stride=2, groups=padded.shape[1])


class KUpsample2D(nn.Module):
    """A doubling with a fixed filter."""

    kernel: Tensor

    def __init__(self) -> None:
        super().__init__()
        row = 2 * torch.tensor([FILTER], device="cpu")
        self.register_buffer("kernel", row.T @ row, persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        padded = F.pad(inputs, (1,) * 4, "reflect")
        weight = _for_each_channel(self.kernel, padded)
        return F.conv_transpose2d(padded, weight, stride=2, padding=3, groups=padded.shape[1])


def _for_each_channel(kernel: Tensor, like: Tensor) -> Tensor:
    return kernel.to(like).expand(like.shape[1], 1, *kernel.shape)


class KDownBlock2D(Recomputed):
    """A level on the way down: residual blocks, perhaps with attention, then a reduction (not at the last level)."""

    has_cross_attention = False

    def __init__(self, config: UNetConfig, level: int, time_channels: int):
        super().__init__()
        channels, kind = config.block_out_channels, type(self).__name__
        inputs, outputs, last = channels[max(level - 1, 0)], channels[level], level == len(channels) - 1
        widths = [inputs] + [outputs] * (config.layers(level) - 1)
        self.resnets = nn.ModuleList(
            KResnet(config, width, outputs, outputs, outputs, time_channels) for width in widths
        )
        if self.has_cross_attention:
            head_dim = config.heads(level, kind)[1]
            self.attentions = nn.ModuleList(
                KAttentionBlock(config, outputs, head_dim, time_channels, add_self_attention=last) for _ in widths
            )
        self.downsamplers = None if last else nn.ModuleList([KDownsample2D()])

    def forward(
        self, hidden_states: Tensor, temb: Tensor, **conditions: Any
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """Return (h, the skips). The last level with attention has none: the first on the way up looks at h alone."""
        h, skips = hidden_states, []
        for i, resnet in enumerate(self.resnets):
            h = self._run(resnet, h, temb)
            if self.has_cross_attention:
                h = self._run(self.attentions[i], h, emb=temb, **conditions)
            skips.append(None if self.has_cross_attention and self.downsamplers is None else h)
        for downsampler in self.downsamplers or ():
            h = downsampler(h)
        return h, tuple(skips)


class KCrossAttnDownBlock2D(KDownBlock2D):
    """A level on the way down with attention to the context."""

    has_cross_attention = True


class KUpBlock2D(Recomputed):
    """A level on the way up: residual blocks over h and one skip, perhaps with attention, then a doubling."""

    has_cross_attention = False

    def __init__(self, config: UNetConfig, level: int, time_channels: int):
        super().__init__()
        channels, kind, count = config.block_out_channels, type(self).__name__, config.layers(level)
        above, outputs = channels[max(level - 1, 0)], channels[level]
        first = self.has_cross_attention and above == outputs == time_channels  # it gets no skip
        inputs = [outputs if first else 2 * outputs] + [outputs] * (count - 1)
        ends = [outputs] * (count - 1) + [above]
        # With attention the last block narrows in its second convolution, otherwise in its first.
        self.resnets = nn.ModuleList(
            KResnet(config, i, outputs if self.has_cross_attention else end, end, outputs, time_channels)
            for i, end in zip(inputs, ends, strict=True)
        )
        if self.has_cross_attention:
            head_dim = config.heads(level, kind)[1]
            self.attentions = nn.ModuleList(
                KAttentionBlock(config, end, head_dim, time_channels, add_self_attention=first) for end in ends
            )
        self.upsamplers = None if level == 0 else nn.ModuleList([KUpsample2D()])
        self.resolution_idx = len(channels) - 1 - level

    def forward(
        self,
        hidden_states: Tensor,
        res_hidden_states_tuple: Sequence[Tensor | None],
        temb: Tensor,
        upsample_size: tuple[int, int] | None = None,
        **conditions: Any,
    ) -> Tensor:
        """Return (B, C', 2 H, 2 W). Only the last of the skips is looked at."""
        skip = res_hidden_states_tuple[-1]
        h = hidden_states if skip is None else torch.cat([hidden_states, skip], dim=1)
        for i, resnet in enumerate(self.resnets):
            h = self._run(resnet, h, temb)
            if self.has_cross_attention:
                h = self._run(self.attentions[i], h, emb=temb, **conditions)
        for upsampler in self.upsamplers or ():
            h = upsampler(h)
        return h


class KCrossAttnUpBlock2D(KUpBlock2D):
    """A level on the way up with attention to the context."""

    has_cross_attention = True
