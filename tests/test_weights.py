"""Checkpoint layouts: the map between the original's parameter names and ours is a bijection. Misfits are errors."""

from __future__ import annotations

import json
from dataclasses import replace

import golden
import pytest
import torch
from small_models import UNET, compvis_to_ours, ours_to_compvis
from torch import Tensor, nn

from ldm_fast.checkpoints.catalogue import layout
from ldm_fast.checkpoints.published import SD1, SD2, UPSCALER, XL, XL_REFINER
from ldm_fast.configs.encoders import ClassEmbedderConfig, SpatialRescalerConfig, TransformerConfig
from ldm_fast.configs.first_stage import AutoencoderConfig, VQConfig
from ldm_fast.configs.unet import UNetConfig
from ldm_fast.files.tensors import CheckpointError
from ldm_fast.interop.compvis import (
    autoencoder_config_from_compvis,
    encoder_config_from_compvis,
    unet_config_from_compvis,
)
from ldm_fast.interop.diffusers import config_from_diffusers, config_to_diffusers, spelt_out
from ldm_fast.interop.names import check_names, current_names, without_dots
from ldm_fast.models.autoencoder import AutoencoderKL
from ldm_fast.models.encoders import TransformerEmbedder
from ldm_fast.models.unet import UNet

SMALL_UNET = dict(
    image_size=8,
    in_channels=4,
    out_channels=4,
    model_channels=32,
    attention_resolutions=[1, 2],
    num_res_blocks=1,
    channel_mult=[1, 2],
    num_heads=2,
)
SMALL_FIRST_STAGE = dict(
    embed_dim=4,
    ddconfig=dict(
        double_z=True,
        z_channels=4,
        resolution=32,
        in_channels=3,
        out_ch=3,
        ch=32,
        ch_mult=[1, 2],
        num_res_blocks=1,
        attn_resolutions=[16],
        dropout=0.0,
    ),
)


def zoo_parts() -> dict[str, dict]:
    """Return the different UNets, first stages and encoders of the 32 published configurations: id -> part."""
    parts: dict[str, dict] = {}
    seen = set()
    for path, entry in golden.zoo().items():
        name = path.removesuffix("/config.yaml").removesuffix(".yaml").split("/")[-1]
        candidates = {"first_stage": entry}
        if "unet_config" in entry:
            candidates = {kind: entry[f"{kind}_config"] for kind in ("unet", "first_stage", "cond_stage")}
        for kind, part in candidates.items():
            if not isinstance(part, dict) or not part.get("state_dict"):
                continue  # unconditional, or conditioned on the first stage's latent or on vectors from outside
            what = json.dumps([kind, part["params"], part["state_dict"]])
            if what not in seen:
                seen.add(what)
                parts[f"{name}-{kind}"] = {"kind": kind, **part}
    return parts


ZOO = zoo_parts()


def test_zoo_is_complete():
    kinds = [part["kind"] for part in ZOO.values()]
    assert len(golden.zoo()) == 32
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {"unet": 12, "first_stage": 9, "cond_stage": 6}


@pytest.mark.parametrize("name", ZOO)
def test_zoo_manifest(name):
    """In full-size key -> shape maps every key is mapped, none is left over, and the way back gives the same keys."""
    part = ZOO[name]
    if part["kind"] == "unet":
        config = unet_config_from_compvis(part["params"])
    elif part["kind"] == "first_stage":
        config = autoencoder_config_from_compvis(part["params"])
    else:
        config = encoder_config_from_compvis(part["class"], part["params"])
    theirs = {key: torch.empty(shape, device="meta") for key, shape in part["state_dict"].items()}
    ours = compvis_to_ours(theirs, config)
    back = ours_to_compvis(ours, config)
    assert {key: list(t.shape) for key, t in back.items()} == part["state_dict"]
    again = compvis_to_ours(back, config)
    assert shapes(again) == shapes(ours) == {name: e.our_shape for e in layout(config) for name in e.ours}


def shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


THREE_LEVELS = replace(
    UNET,
    block_out_channels=(32, 64, 64),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    use_linear_projection=True,
)
ONE_LEVEL = replace(UNET, block_out_channels=(32,), down_block_types=("CrossAttnDownBlock2D",), layers_per_block=2)
CONFIGS = {
    "unet": replace(UNET, transformer_layers_per_block=2),
    "unet-linear-classes": replace(ONE_LEVEL, use_linear_projection=True, num_class_embeds=5),
    "unet-2": replace(UNET, in_channels=9, num_attention_heads=(1, 2), use_linear_projection=True),
    "unet-xl": replace(
        THREE_LEVELS,
        num_attention_heads=(1, 2, 2),
        transformer_layers_per_block=(1, 2, 3),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=56,
    ),
    "unet-upscaler": replace(
        THREE_LEVELS, in_channels=7, only_cross_attention=(True, True, False), num_class_embeds=10
    ),
    "unet-guided-by-image": replace(
        ONE_LEVEL, class_embed_type="projection", projection_class_embeddings_input_dim=12, time_cond_proj_dim=6
    ),
    "unet-resnet-resampling": UNetConfig(
        block_out_channels=(32, 64, 64),
        down_block_types=("AttnDownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        mid_block_type="UNetMidBlock2D",
        cross_attention_dim=None,
        num_attention_heads=4,
        resnet_time_scale_shift="scale_shift",
        resample_type="resnet",
    ),
    "kl": AutoencoderConfig(block_out_channels=(32, 64), attention_levels=(1,), latent_channels=3, z_channels=5),
    "kl-f1": AutoencoderConfig(block_out_channels=(32,), layers_per_block=1),
    "vq": VQConfig(block_out_channels=(32, 32, 64), num_vq_embeddings=17, mid_block_add_attention=False),
    "transformer": TransformerConfig(vocab_size=11, width=24, depth=2, max_length=5),
    "classes": ClassEmbedderConfig(num_classes=7, width=6),
    "spatial": SpatialRescalerConfig(in_channels=9, out_channels=3),
}


def random_state_dict(config) -> dict[str, Tensor]:
    """Return our state dict for a config, with numbers that are all different."""
    generator = torch.Generator().manual_seed(0)
    shapes = {name: entry.our_shape for entry in layout(config) for name in entry.ours}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip_is_the_identity(name):
    ours = random_state_dict(CONFIGS[name])
    theirs = ours_to_compvis(ours, CONFIGS[name])
    back = compvis_to_ours(theirs, CONFIGS[name])
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[key], ours[key]) for key in ours)
    again = ours_to_compvis(back, CONFIGS[name])
    assert all(torch.equal(again[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("name", CONFIGS)
def test_conversion_keeps_every_number(name):
    ours = random_state_dict(CONFIGS[name])
    theirs = ours_to_compvis(ours, CONFIGS[name])

    def flat(d):
        return torch.cat([t.flatten() for t in d.values()]).sort().values

    unused = {k: theirs.pop(k) for k in list(theirs) if "to_logits" in k}
    assert all(not t.any() for t in unused.values())
    assert torch.equal(flat(theirs), flat(ours))


def test_qkv_is_interleaved_head_by_head():
    """Head h of the original's fused convolution holds rows q, k, v of that head, one after the other."""
    config = unet_config_from_compvis(SMALL_UNET)
    ours = random_state_dict(config)
    theirs = ours_to_compvis(ours, config)
    fused, name = theirs["middle_block.1.qkv.weight"], "mid_block.attentions.0"
    assert fused.shape == (3 * 64, 64, 1)
    width = 64 // 2
    for head in range(2):
        for i, part in enumerate("qkv"):
            rows = fused[(3 * head + i) * width : (3 * head + i + 1) * width, :, 0]
            assert torch.equal(rows, ours[f"{name}.to_{part}.weight"][head * width : (head + 1) * width])


def test_decoder_levels_are_numbered_by_resolution():
    config = autoencoder_config_from_compvis(SMALL_FIRST_STAGE)
    assert config.attention_levels == (1,)
    ours = random_state_dict(config)
    theirs = ours_to_compvis(ours, config)
    lowest = ours["decoder.up_blocks.0.resnets.0.conv1.weight"]
    assert torch.equal(theirs["decoder.up.1.block.0.conv1.weight"], lowest)
    assert theirs["decoder.up.1.attn.0.q.weight"].shape == (64, 64, 1, 1)


def test_every_bad_key_is_in_one_error():
    config = autoencoder_config_from_compvis(SMALL_FIRST_STAGE)
    theirs = ours_to_compvis(AutoencoderKL(config).state_dict(), config)
    del theirs["quant_conv.bias"], theirs["encoder.mid.attn_1.q.weight"]
    theirs["loss.logvar"] = torch.zeros(())
    theirs["decoder.conv_in.weight"] = torch.zeros(1, 2, 3, 3)
    with pytest.raises(ValueError) as error:
        compvis_to_ours(theirs, config)
    text = str(error.value)
    assert "2 missing" in text and "quant_conv.bias" in text and "encoder.mid.attn_1.q.weight" in text
    assert "1 unexpected: loss.logvar" in text
    assert "1 wrong shape: decoder.conv_in.weight is (1, 2, 3, 3) instead of (64, 4, 3, 3)" in text


def test_errors_on_the_way_back():
    config = CONFIGS["unet"]
    ours = random_state_dict(config)
    ours["extra"] = torch.zeros(1)
    ours["conv_in.bias"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"(?s)1 unexpected: extra.*conv_in.bias is \(3,\) instead of \(32,\)"):
        ours_to_compvis(ours, config)
    with pytest.raises(TypeError, match="no model for dict"):
        compvis_to_ours({}, {})


def test_transformer_logits_are_dropped_and_checked():
    config = CONFIGS["transformer"]
    theirs = ours_to_compvis(TransformerEmbedder(config).state_dict(), config)
    assert theirs["transformer.to_logits.weight"].shape == (11, 24)
    assert not any("logits" in key for key in compvis_to_ours(theirs, config))
    theirs["transformer.to_logits.weight"] = torch.zeros(11, 23)
    with pytest.raises(ValueError, match="to_logits.weight"):
        compvis_to_ours(theirs, config)


def test_conversion_draws_no_random_numbers():
    state = torch.get_rng_state()
    layout(CONFIGS["unet"])
    assert torch.equal(torch.get_rng_state(), state)


def test_converted_weights_load():
    config = unet_config_from_compvis(SMALL_UNET)
    unet = UNet(config)
    unet.load_state_dict(compvis_to_ours(ours_to_compvis(unet.state_dict(), config), config))


XL_PARAMS = dict(
    adm_in_channels=2816,
    num_classes="sequential",
    use_checkpoint=True,
    in_channels=4,
    out_channels=4,
    model_channels=320,
    attention_resolutions=[4, 2],
    num_res_blocks=2,
    channel_mult=[1, 2, 4],
    num_head_channels=64,
    use_spatial_transformer=True,
    use_linear_in_transformer=True,
    transformer_depth=[1, 2, 10],
    context_dim=2048,
    spatial_transformer_attn_type="softmax-xformers",
    image_size=128,
)
SD_PARAMS = dict(
    image_size=64,
    in_channels=4,
    out_channels=4,
    model_channels=320,
    attention_resolutions=[4, 2, 1],
    num_res_blocks=2,
    channel_mult=[1, 2, 4, 4],
    use_spatial_transformer=True,
    transformer_depth=1,
    legacy=False,
)
UPSCALER_PARAMS = dict(
    image_size=128,
    in_channels=7,
    out_channels=4,
    num_classes=1000,
    model_channels=256,
    attention_resolutions=[2, 4, 8],
    num_res_blocks=2,
    channel_mult=[1, 2, 2, 4],
    disable_self_attentions=[True, True, True, False],
    disable_middle_self_attn=False,
    num_heads=8,
    use_spatial_transformer=True,
    transformer_depth=1,
    context_dim=1024,
    use_linear_in_transformer=True,
)
REFINER = dict(
    adm_in_channels=2560,
    model_channels=384,
    channel_mult=[1, 2, 4, 4],
    transformer_depth=4,
    context_dim=[1280, 1280, 1280, 1280],
)
STABLE_DIFFUSION = {
    "1": ({**SD_PARAMS, "num_heads": 8, "context_dim": 768}, SD1),
    "2": (
        {
            **SD_PARAMS,
            "image_size": 96,
            "num_head_channels": 64,
            "context_dim": 1024,
            "use_linear_in_transformer": True,
        },
        SD2,
    ),
    "xl": (XL_PARAMS, XL),
    "xl-refiner": ({**XL_PARAMS, **REFINER}, XL_REFINER),
    "upscaler": (UPSCALER_PARAMS, UPSCALER),
}


@pytest.mark.parametrize("name", STABLE_DIFFUSION)
def test_stable_diffusion_parameters(name):
    params, config = STABLE_DIFFUSION[name]
    assert unet_config_from_compvis(params) == replace(config, upcast_attention=False)


CONVERTED_BY_DIFFUSERS = ["unet", "unet-linear-classes", "unet-2", "unet-xl", "unet-upscaler", "kl", "kl-f1"]


@pytest.mark.parametrize("name", CONVERTED_BY_DIFFUSERS)
def test_diffusers_converts_to_the_same(name):
    """diffusers' conversion of single files reads the same tensors from what we write, under our names."""
    pytest.importorskip("diffusers")
    from diffusers.loaders import single_file_utils

    config = CONFIGS[name]
    if isinstance(config, AutoencoderConfig):
        config = replace(config, attention_levels=(), z_channels=None)  # neither is known to its converter
        convert, prefix = single_file_utils.convert_ldm_vae_checkpoint, ""
    else:
        convert, prefix = single_file_utils.convert_ldm_unet_checkpoint, "model.diffusion_model."
    ours = random_state_dict(config)
    theirs = {prefix + key: tensor for key, tensor in ours_to_compvis(ours, config).items()}
    converted = convert(dict(theirs), config=config_to_diffusers(config))
    assert shapes(current_names(converted)) == shapes(ours)
    assert all(torch.equal(current_names(converted)[key], ours[key]) for key in ours)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name.startswith(("unet", "kl", "vq"))])
def test_names_and_config_are_those_of_diffusers(name):
    """diffusers' class has exactly our parameters if it is given the configuration that we write."""
    diffusers = pytest.importorskip("diffusers")
    written = config_to_diffusers(CONFIGS[name])
    if name in (
        "kl",
        "unet-resnet-resampling",
    ):  # z_channels besides latent_channels, resampling by res blocks: only ours
        assert written["_class_name"] == type(CONFIGS[name]).__name__
        return
    build = getattr(diffusers, written["_class_name"])
    with torch.device("meta"):
        theirs = build.from_config(written)
    assert shapes(theirs.state_dict()) == {n: e.our_shape for e in layout(CONFIGS[name]) for n in e.ours}
    again = config_from_diffusers({**theirs.config, "_class_name": written["_class_name"]})
    assert spelt_out(again) == spelt_out(CONFIGS[name])


@pytest.mark.parametrize("name", [name for name in CONFIGS if name.startswith(("unet", "kl", "vq"))])
def test_config_round_trip(name):
    written = json.loads(json.dumps(config_to_diffusers(CONFIGS[name])))
    assert spelt_out(config_from_diffusers(written)) == spelt_out(CONFIGS[name])


@pytest.mark.parametrize("name", [name for name in ZOO if ZOO[name]["kind"] == "unet"])
def test_zoo_configs_round_trip(name):
    config = unet_config_from_compvis(ZOO[name]["params"])
    assert spelt_out(config_from_diffusers(config_to_diffusers(config))) == spelt_out(config)


def test_old_names_of_attention():
    ours = random_state_dict(CONFIGS["kl"])
    theirs = {}
    for key, tensor in ours.items():
        for new, was in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            key = key.replace(f".{new}.", f".{was}.")
        theirs[key] = tensor[:, :, None, None] if "proj_attn.weight" in key else tensor
    assert not theirs.keys() & {key for key in ours if ".to_" in key}
    back = current_names(theirs)
    assert back.keys() == ours.keys() and all(torch.equal(back[key], ours[key]) for key in ours)


def test_names_without_dots():
    names = [entry.theirs for entry in layout(SD1)]
    assert without_dots(names)["input_blocks00weight"] == "input_blocks.0.0.weight"
    assert len(without_dots(names)) == len(names) == 686
    with pytest.raises(ValueError, match="differ only in their dots"):
        without_dots(["a.bc", "ab.c"])


def test_layers_that_the_original_lacks_are_an_error():
    config = replace(CONFIGS["unet"], addition_embed_type="text", addition_embed_type_num_heads=2)
    with pytest.raises(ValueError, match="no name for add_embedding"):
        layout(config)


def test_every_wrong_name_is_in_one_error():
    with pytest.raises(CheckpointError, match=r"(?s)1 missing: b.*1 unexpected: c.*a is \(2,\) instead of \(1,\)"):
        check_names({"a": torch.zeros(2), "c": torch.zeros(1)}, {"a": (1,), "b": (1,)}, "thing")


def test_unet_parameters():
    config = unet_config_from_compvis({**SMALL_UNET, "resblock_updown": True, "num_heads": -1, "num_head_channels": 32})
    assert config.resample_type == "resnet"
    assert [config.heads(level) for level in (0, 1)] == [(1, 32), (2, 32)]
    assert config.down_block_types == ("AttnDownBlock2D",) * 2 and config.mid_block_type == "UNetMidBlock2D"
    config = unet_config_from_compvis({**SMALL_UNET, "attention_resolutions": [2]})
    assert config.down_block_types == ("DownBlock2D", "AttnDownBlock2D")


def test_unet_parameters_that_no_published_model_has():
    config = unet_config_from_compvis({**SMALL_UNET, "conv_resample": False, "num_res_blocks": [1, 2]})
    assert config.resample_type == "pool" and config.layers_per_block == (1, 2)
    names = {entry.theirs for entry in layout(config)}
    blocks = {name.split(".")[1] for name in names if name.startswith("input_blocks.")}
    assert blocks == {"0", "1", "3", "4"}  # 2 is the reduction, without weights
    assert {name.split(".")[1] for name in names if name.startswith("output_blocks.")} == set("01234")
    assert not [name for name in names if name.endswith((".op.weight", ".conv.weight"))]
    model = UNet(config).eval()
    model.load_state_dict(compvis_to_ours(ours_to_compvis(model.state_dict(), config), config))
    halves = model.down_blocks[0].downsamplers[0](torch.arange(16.0).reshape(1, 1, 4, 4))
    assert halves.flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    doubled = model.up_blocks[0].upsamplers[0](halves)
    assert doubled[0, 0, 0].tolist() == [2.5, 2.5, 4.5, 4.5]

    config = unet_config_from_compvis({**SMALL_UNET, "num_heads": 2, "num_heads_upsample": 4})
    assert config.heads(1, "AttnDownBlock2D") == (2, 32) and config.heads(1, "AttnUpBlock2D") == (4, 16)
    model = UNet(config)
    heads = {name: layer.heads for name, layer in model.named_modules() if hasattr(layer, "heads")}
    assert {heads[name] for name in heads if name.startswith("up_blocks")} == {4}
    assert {heads[name] for name in heads if not name.startswith("up_blocks")} == {2}
    for ignored in ({"legacy": False}, {"num_head_channels": 32}):
        config = unet_config_from_compvis({**SMALL_UNET, "num_heads_upsample": 4, **ignored})
        assert config.heads(1, "AttnUpBlock2D") == config.heads(1, "AttnDownBlock2D")


def test_a_network_that_predicts_codes():
    config = unet_config_from_compvis({**SMALL_UNET, "n_embed": 7})
    assert {"id_predictor.0.weight", "id_predictor.1.weight", "out.2.weight"} <= {e.theirs for e in layout(config)}
    model = UNet(config).eval()
    seen = []
    model.up_blocks[-1].register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        got = model(torch.randn(1, config.in_channels, 8, 8), 5).sample
        norm, convolution = model.id_predictor
        h = nn.functional.group_norm(seen[0], norm.num_groups, norm.weight, norm.bias, norm.eps)
        wanted = nn.functional.conv2d(h, convolution.weight, convolution.bias)
    assert got.shape == (1, 7, 8, 8)
    assert torch.allclose(got, wanted, atol=1e-5)


def test_first_stage_parameters():
    config = autoencoder_config_from_compvis(SMALL_FIRST_STAGE)
    assert config == AutoencoderConfig(
        block_out_channels=(32, 64), layers_per_block=1, latent_channels=4, z_channels=4, attention_levels=(1,)
    )
    inner = {**SMALL_FIRST_STAGE["ddconfig"], "double_z": False, "attn_type": "none"}
    config = autoencoder_config_from_compvis({"embed_dim": 4, "n_embed": 9, "ddconfig": inner, "lossconfig": {}})
    assert isinstance(config, VQConfig) and config.legacy and config.num_vq_embeddings == 9
    assert config.attention_levels == () and not config.mid_block_add_attention


def _without(params: dict, name: str) -> dict:
    return {key: value for key, value in params.items() if key != name}


@pytest.mark.parametrize(
    "read, params, message",
    [
        (unet_config_from_compvis, {**SMALL_UNET, "use_new_attention_order": True}, "use_new_attention_order must be"),
        (unet_config_from_compvis, {**SMALL_UNET, "dims": 3}, "dims must be 2, got 3"),
        (unet_config_from_compvis, {**SMALL_UNET, "colour": 1}, "not supported: colour=1"),
        (unet_config_from_compvis, _without(SMALL_UNET, "model_channels"), "model_channels is missing"),
        (unet_config_from_compvis, _without(SMALL_UNET, "num_heads"), "num_heads or num_head_channels is needed"),
        (unet_config_from_compvis, {**SMALL_UNET, "context_dim": 8}, "belong together"),
        (autoencoder_config_from_compvis, {"embed_dim": 4}, "ddconfig is missing"),
        (autoencoder_config_from_compvis, {**SMALL_FIRST_STAGE, "n_embed": 8}, "double_z must be False, got True"),
        (
            autoencoder_config_from_compvis,
            {"embed_dim": 4, "ddconfig": {**SMALL_FIRST_STAGE["ddconfig"], "attn_type": "linear"}},
            "attn_type must be vanilla or none, got 'linear'",
        ),
        (lambda p: encoder_config_from_compvis("FrozenT5Embedder", p), {}, "no encoder 'FrozenT5Embedder'"),
        (lambda p: encoder_config_from_compvis("SpatialRescaler", p), {"out_channels": 3, "bias": True}, "bias must"),
    ],
)
def test_parameters_we_cannot_honour(read, params, message):
    with pytest.raises(ValueError, match=message):
        read(params)
