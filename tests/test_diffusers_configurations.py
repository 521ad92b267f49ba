"""Configurations of diffusers' UNets that few models have: ours against theirs with the same weights, tiny."""

from __future__ import annotations

import functools
import inspect
import json
from dataclasses import dataclass, field

import pytest
import torch
from compare import assert_same_gradients, gradients, relative_error
from torch import Tensor, nn

from ldm_fast.models.unet import UNet

diffusers = pytest.importorskip("diffusers")

TOLERANCE = 1e-5
TOKENS, CONTEXT, IMAGE = 5, 24, 20
SIZES = dict(block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8)


@dataclass
class Case:
    """What a configuration changes, and what its model is called with besides."""

    change: dict
    given: dict = field(default_factory=dict)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def blocks(*down: str, up: tuple[str, ...] | None = None) -> dict:
    """The kinds of levels; the way up mirrors the way down if it is not given."""
    mirrored = tuple(kind.replace("Down", "Up") for kind in reversed(down))
    return {"down_block_types": down, "up_block_types": up or mirrored, "block_out_channels": (16, 32, 32)[: len(down)]}


DOWN, SELF, CROSS = "DownBlock2D", "AttnDownBlock2D", "CrossAttnDownBlock2D"
RESNET, SIMPLE = "ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"
NO_MIDDLE = {"mid_block_type": None}
MASK = {"encoder_attention_mask": torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 1, 1]])}
LABELS = {"class_labels": torch.tensor([3, 5])}
NO_CONTEXT = {"encoder_hidden_states": None}
CONDITIONAL = {
    "sines first": Case(dict(flip_sin_to_cos=False, freq_shift=1)),
    "sines first, numbers": Case(
        dict(
            flip_sin_to_cos=False,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 10,
        ),
        {"added_cond_kwargs": {"text_embeds": normal(2, 10), "time_ids": 100 * normal(2, 6).abs()}},
    ),
    "fourier": Case(dict(time_embedding_type="fourier", time_embedding_dim=20)),
    "fourier, its own width": Case(dict(time_embedding_type="fourier", flip_sin_to_cos=False), {"timestep": 0.37}),
    "time width": Case(dict(time_embedding_dim=20, class_embed_type="identity"), {"class_labels": normal(2, 20)}),
    "time activations": Case(dict(time_embedding_act_fn="mish", timestep_post_act="gelu")),
    "kernels": Case(dict(conv_in_kernel=1, conv_out_kernel=5, center_input_sample=True)),
    "classes behind": Case(dict(class_embeddings_concat=True, num_class_embeds=7), LABELS),
    "class timesteps, fourier": Case(
        dict(class_embed_type="timestep", time_embedding_type="fourier", class_embeddings_concat=True), LABELS
    ),
    "Kandinsky 2.1 inputs": Case(
        dict(encoder_hid_dim=IMAGE, encoder_hid_dim_type="text_image_proj", addition_embed_type="text_image"),
        {
            "encoder_hidden_states": normal(2, TOKENS, IMAGE),
            "added_cond_kwargs": {"image_embeds": normal(2, CONTEXT), "text_embeds": normal(2, CONTEXT)},
        },
    ),
    "Kandinsky 2.2 inputs": Case(
        dict(encoder_hid_dim=IMAGE, encoder_hid_dim_type="image_proj", addition_embed_type="image"),
        {**NO_CONTEXT, "added_cond_kwargs": {"image_embeds": normal(2, IMAGE)}},
    ),
    "Kandinsky 2.2 hint": Case(
        dict(encoder_hid_dim=IMAGE, encoder_hid_dim_type="image_proj", addition_embed_type="image_hint", in_channels=8),
        {
            **NO_CONTEXT,
            "sample": normal(2, 4, 8, 8),
            "added_cond_kwargs": {"image_embeds": normal(2, IMAGE), "hint": normal(2, 3, 64, 64)},
        },
    ),
    "gelu": Case(dict(act_fn="gelu", class_embed_type="timestep", resnet_time_scale_shift="scale_shift"), LABELS),
    "swish": Case(dict(act_fn="swish", mid_block_scale_factor=2.0)),
    "no middle": Case(NO_MIDDLE),
    "a plain middle": Case(dict(mid_block_type="UNetMidBlock2D", mid_block_scale_factor=1.5)),
    "layers by level": Case(dict(layers_per_block=(1, 3))),
    "other depths by level": Case(
        dict(
            layers_per_block=(2, 1),
            transformer_layers_per_block=((1, 2), 1),
            reverse_transformer_layers_per_block=(1, (2, 1, 1)),
        )
    ),
    "more depths than transformers": Case(
        dict(transformer_layers_per_block=[[3, 2], 1], reverse_transformer_layers_per_block=[[3, 4], [1, 2, 5]])
    ),
    "unequal ways": Case(dict(up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))),
    "self attention": Case(dict(blocks(SELF, CROSS, SELF), attention_head_dim=(4, 2, 8))),
    "self attention up": Case(
        dict(
            blocks(DOWN, CROSS, up=("AttnUpBlock2D", "CrossAttnUpBlock2D")),
            attention_head_dim=8,
            mid_block_type="UNetMidBlock2D",
        )
    ),
    "padded once": Case(dict(blocks(CROSS, DOWN, SELF), downsample_padding=0)),
    "resnet levels": Case(
        dict(blocks(RESNET, CROSS, RESNET), resnet_skip_time_act=True, resnet_out_scale_factor=1.3, layers_per_block=2)
    ),
    "DeepFloyd IF": Case(
        dict(
            blocks(RESNET, SIMPLE, SIMPLE),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            attention_head_dim=8,
            act_fn="gelu",
            addition_embed_type="text",
            addition_embed_type_num_heads=4,
            cross_attention_norm="group_norm",
            cross_attention_dim=64,
            encoder_hid_dim=IMAGE,
            encoder_hid_dim_type="text_proj",
            resnet_time_scale_shift="scale_shift",
            resnet_out_scale_factor=1.414,
            mid_block_scale_factor=1.414,
            resnet_skip_time_act=True,
            class_embed_type="timestep",
            time_embedding_act_fn="gelu",
        ),
        {"encoder_hidden_states": normal(2, TOKENS, IMAGE), **LABELS, **MASK},
    ),
    "Kandinsky 2.2": Case(
        dict(
            blocks(RESNET, SIMPLE),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            attention_head_dim=8,
            resnet_time_scale_shift="scale_shift",
            encoder_hid_dim=IMAGE,
            encoder_hid_dim_type="image_proj",
            addition_embed_type="image",
            out_channels=8,
        ),
        {**NO_CONTEXT, "added_cond_kwargs": {"image_embeds": normal(2, IMAGE)}},
    ),
    "only the context": Case(
        dict(
            blocks(SIMPLE, SIMPLE),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            attention_head_dim=4,
            only_cross_attention=True,
        )
    ),
    "only the context, by level": Case(
        dict(
            blocks(SIMPLE, SIMPLE),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            attention_head_dim=4,
            only_cross_attention=(False, True),
            mid_block_only_cross_attention=True,
        )
    ),
    "x2 latent upscaler": Case(
        dict(
            blocks("KDownBlock2D", "KCrossAttnDownBlock2D", "KCrossAttnDownBlock2D"),
            block_out_channels=(32, 64, 64),
            layers_per_block=2,
            mid_block_type=None,
            norm_num_groups=None,
            act_fn="gelu",
            attention_head_dim=16,
            conv_in_kernel=1,
            conv_out_kernel=1,
            time_cond_proj_dim=12,
            time_embedding_type="fourier",
            timestep_post_act="gelu",
        ),
        {"timestep_cond": normal(2, 12), "timestep": torch.tensor([0.3, -0.2]), **MASK},
    ),
    "K levels of other widths": Case(
        dict(
            blocks("KDownBlock2D", "KCrossAttnDownBlock2D", "KDownBlock2D"),
            block_out_channels=(32, 64, 128),
            layers_per_block=(1, 3, 2),
            mid_block_type=None,
            attention_head_dim=(16, 32, 8),
        )
    ),
}
UNCONDITIONAL = {
    "gelu, unconditional": Case(dict(act_fn="gelu", class_embed_type="timestep"), LABELS),
    "NCSN++": Case(
        dict(
            blocks("SkipDownBlock2D", "AttnSkipDownBlock2D", "SkipDownBlock2D"),
            block_out_channels=(32, 64, 64),
            layers_per_block=2,
            norm_num_groups=None,
            time_embedding_type="fourier",
            mid_block_scale_factor=1.414,
            attention_head_dim=None,
        ),
        {"timestep": torch.tensor([3.5, 0.2])},
    ),
    "NCSN++ with attention at first": Case(
        dict(
            blocks("AttnSkipDownBlock2D", "SkipDownBlock2D"),
            block_out_channels=(64, 32),
            norm_num_groups=32,
            resnet_time_scale_shift="scale_shift",
            act_fn="gelu",
        )
    ),
    "heads that do not divide": Case(dict(blocks(DOWN, SELF, SELF), attention_head_dim=3)),
    "published DDPM, all of it": Case(
        dict(blocks(DOWN, SELF, DOWN), flip_sin_to_cos=False, freq_shift=1, downsample_padding=0, layers_per_block=2)
    ),
    "scaled middle": Case(dict(mid_block_scale_factor=1.414, attention_head_dim=None)),
    "no attention in the middle": Case(dict(add_attention=False)),
    "no middle, unconditional": Case(NO_MIDDLE),
    "no norm in the middle": Case(dict(resnet_time_scale_shift="scale_shift")),
    "another norm in the middle": Case(dict(attn_norm_num_groups=4)),
    "resnet where there is attention": Case(
        dict(blocks(DOWN, SELF, SELF), downsample_type="resnet", upsample_type="resnet")
    ),
    "resnet levels, unconditional": Case(blocks(RESNET, SELF)),
    "unequal ways, unconditional": Case(dict(up_block_types=("UpBlock2D", "AttnUpBlock2D"))),
    "published DDPM": Case(dict(flip_sin_to_cos=False, freq_shift=1)),
    "noise level": Case(dict(time_embedding_type="fourier"), {"timestep": torch.tensor([3.5, 0.02])}),
    "noise level, classes": Case(
        dict(time_embedding_type="fourier", class_embed_type="timestep", time_embedding_dim=24), LABELS
    ),
    "learned": Case(dict(time_embedding_type="learned", num_train_timesteps=1000, center_input_sample=True)),
}
CASES = {**CONDITIONAL, **UNCONDITIONAL}
each = pytest.mark.parametrize("name", CASES)


def their_config(name: str) -> dict:
    if name in CONDITIONAL:
        base = dict(
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=CONTEXT,
            attention_head_dim=2,
        )
    else:
        base = dict(
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=8,
        )
    return {**SIZES, **base, **CASES[name].change}


@functools.cache
def theirs_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    kind = diffusers.UNet2DConditionModel if name in CONDITIONAL else diffusers.UNet2DModel
    model = kind(**their_config(name)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim <= 1:  # no norm stays at the identity, no gate at zero
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def pair(name: str) -> tuple[nn.Module, UNet]:
    """(theirs, ours) with the same random weights."""
    theirs = theirs_of(name)
    return theirs, UNet.from_diffusers(theirs)


def inputs(name: str) -> dict:
    channels = theirs_of(name).config.in_channels
    given = {"sample": normal(2, channels, 8, 8), "timestep": torch.tensor([7, 801])}
    if name in CONDITIONAL:
        given["encoder_hidden_states"] = normal(2, TOKENS, CONTEXT)
    return {**given, **CASES[name].given}


@each
def test_same_output(name):
    theirs, ours = pair(name)
    with torch.no_grad():
        wanted, got = theirs(**inputs(name)).sample, ours(**inputs(name)).sample
    assert torch.isfinite(wanted).all()
    assert relative_error(got, wanted) <= TOLERANCE


@each
def test_same_gradients(name):
    wanted, got = (
        gradients_of_trained(model, model(**inputs(name)).sample) for model in (theirs_of(name), pair(name)[1])
    )
    assert_same_gradients(got, wanted)


def gradients_of_trained(model: nn.Module, output: Tensor) -> dict[str, Tensor]:
    frozen = {key for key, parameter in model.named_parameters() if not parameter.requires_grad}
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    found = gradients(model, output)
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(key not in frozen)
    return {key: value for key, value in found.items() if key not in frozen}


@each
def test_configuration_and_weights_there_and_back(name, tmp_path):
    """A folder that we wrote opens in diffusers, and one that it wrote opens here, with nothing lost."""
    theirs, _ = pair(name)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = UNet.from_pretrained(tmp_path / "theirs")
    assert ours.config == UNet.from_diffusers(theirs)._own_config()
    ours.save_pretrained(tmp_path / "ours")
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    kind = type(theirs)
    assert written["_class_name"] == kind.__name__
    again = kind.from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        assert torch.equal(again(**inputs(name)).sample, theirs(**inputs(name)).sample)
    assert UNet.from_pretrained(tmp_path / "ours").config == ours.config


@each
def test_what_a_configuration_changes_counts(name):
    """The output of the same weights is another without the change, if they fit: agreement is no accident."""
    theirs, ours = pair(name)
    defaults = inspect.signature(type(theirs).__init__).parameters
    for key, value in CASES[name].change.items():
        if value in (defaults[key].default, "swish", "text_proj") or key == "up_block_types":
            continue
        rest = {k: v for k, v in their_config(name).items() if k != key}
        try:
            plain = UNet.from_config({**rest, "_class_name": type(theirs).__name__}).eval()
            plain.load_state_dict(theirs.state_dict())
            with torch.no_grad():
                output = plain(**inputs(name)).sample
        except (ValueError, RuntimeError):
            continue  # the shapes differ, or the rest is none we could build
        with torch.no_grad():
            assert relative_error(output, ours(**inputs(name)).sample) > 1e-4, key


@pytest.mark.parametrize(
    "change, message",
    [
        ({"time_embedding_type": "rotary"}, "time_embedding_type must be one of positional, fourier, learned, got"),
        ({"act_fn": "tanh"}, "act_fn must be one of silu, swish, mish, gelu, relu, got 'tanh'"),
        ({"dual_cross_attention": True}, "dual_cross_attention must be False, got True"),
        ({"downsample_padding": 2}, "downsample_padding must be 0 or 1, got 2"),
        ({"cross_attention_norm": "batch_norm"}, "cross_attention_norm must be None, layer_norm or group_norm, got"),
        ({"layers_per_block": (1, 2, 3)}, r"layers_per_block needs one value or 2, got \(1, 2, 3\)"),
        ({"layers_per_block": (1, 0)}, r"layers_per_block must be a positive number, got \(1, 0\)"),
        ({"up_block_types": ("UpBlock2D",)}, "up_block_types needs 2 entries, got"),
        ({"up_block_types": ("UpBlock2D", "CrossUpBlock2D")}, "up_block_types must be of .*, got 'CrossUpBlock2D'"),
        (blocks("SkipDownBlock2D", "SkipDownBlock2D"), "down_block_types must be of .*, got 'SkipDownBlock2D'"),
        ({"mid_block_type": "UNetMidBlock"}, "mid_block_type must be UNetMidBlock2DCrossAttn, .*, got 'UNetMidBlock'"),
        ({"timestep_post_act": "tanh"}, "timestep_post_act must be one of silu, swish, mish, gelu, relu, got 'tanh'"),
        ({"freq_shfit": 1}, "not supported: freq_shfit=1; did you mean 'freq_shift'"),
        ({"surprise": 1, "Kernel": 2}, "not supported: surprise=1, Kernel=2$"),
        ({"conv_in_kernel": 4}, "conv_in_kernel must be an odd number, got 4"),
        ({"class_embeddings_concat": True}, "class_embeddings_concat needs class labels"),
        ({"addition_embed_type": "image"}, "addition_embed_type 'image' needs encoder_hid_dim"),
        ({"encoder_hid_dim_type": "image_proj"}, "encoder_hid_dim_type 'image_proj' needs encoder_hid_dim"),
    ],
)
def test_configurations_we_cannot_honour(change, message):
    with pytest.raises(ValueError, match=message):
        UNet.from_config({**their_config("sines first"), "flip_sin_to_cos": True, "freq_shift": 0, **change})


@pytest.mark.parametrize("missing", ["image_embeds", "hint"])
def test_missing_conditions_are_named(missing):
    _, ours = pair("Kandinsky 2.2 hint")
    given = inputs("Kandinsky 2.2 hint")
    rest = {key: value for key, value in given["added_cond_kwargs"].items() if key != missing}
    with pytest.raises(ValueError, match=f"added_cond_kwargs needs '{missing}' for this UNet"):
        ours(**{**given, "added_cond_kwargs": rest})


def test_a_key_of_the_other_class_is_named():
    values = {**their_config("published DDPM"), "_class_name": "UNet2DModel", "cross_attention_dim": 8}
    with pytest.raises(ValueError, match="UNet2DModel: not supported: cross_attention_dim=8"):
        UNet.from_config(values)
