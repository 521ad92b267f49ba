"""Our models in diffusers' places are diffusers' models: by class, by methods, and to its pipelines."""

from __future__ import annotations

import inspect
import json
import pickle
import re

import pytest
import torch
from small_models import KL, UNET, VQ
from test_drop_in import quiet, text_to_image  # noqa: F401  # a fixture

import ldm_fast
from ldm_fast.interop.diffusers import config_to_diffusers
from ldm_fast.models.unet import UNet

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::RuntimeWarning")

UNCONDITIONAL = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 8,
}
CASES = {
    "UNet2DConditionModel": (ldm_fast.UNet, config_to_diffusers(UNET)),
    "UNet2DModel": (ldm_fast.UNet, UNCONDITIONAL),
    "AutoencoderKL": (ldm_fast.AutoencoderKL, config_to_diffusers(KL)),
    "VQModel": (ldm_fast.VQModel, config_to_diffusers(VQ)),
}


def pair(kind):
    ours, config = CASES[kind]
    theirs = getattr(diffusers, kind).from_config(config).eval()
    return ours.from_diffusers(theirs), theirs


def sample(size=8):
    return torch.randn(2, 4, size, size, generator=torch.Generator().manual_seed(0))


CONTEXT = torch.ones(2, 3, 8)


@pytest.mark.parametrize("kind", CASES)
def test_they_are_models_of_both(kind):
    ours, _ = pair(kind)
    cls, theirs = type(ours), getattr(diffusers, kind)
    assert isinstance(ours, theirs) and isinstance(ours, CASES[kind][0])
    assert cls in (theirs,) and theirs == cls and cls != diffusers.UNet1DModel and {theirs: 1}[cls] == 1
    assert (cls.__name__, cls.__module__) == (theirs.__name__, theirs.__module__)

    class Mine(cls):
        pass

    assert Mine not in (theirs, cls) and issubclass(Mine, theirs)


@pytest.mark.parametrize("kind", CASES)
def test_every_public_method_is_there(kind):
    ours, theirs = pair(kind)
    names = [name for name in dir(theirs) if not name.startswith("_") and name not in theirs._modules]
    assert [name for name in names if not hasattr(ours, name)] == []


@pytest.mark.parametrize("kind", CASES)
def test_made_like_diffusers_own(kind, tmp_path):
    """By the arguments of the constructor, from a configuration, and from a folder: the weights of diffusers' own."""
    ours, theirs = pair(kind)
    cls = type(ours)
    theirs.save_pretrained(tmp_path)
    arguments = {name: value for name, value in theirs.config.items() if not name.startswith("_")}
    for make in (lambda c: c(**arguments), lambda c: c.from_config(c.load_config(tmp_path))):
        torch.manual_seed(0)
        mine = make(cls)
        torch.manual_seed(0)
        wanted = make(type(theirs)).state_dict()
        assert type(mine) is cls
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in mine.state_dict().items())
    again, loading = cls.from_pretrained(tmp_path, torch_dtype=torch.float16, output_loading_info=True)
    assert type(again) is cls and again.dtype == torch.float16 and loading["missing_keys"] == []
    assert cls.from_config(theirs.config, return_unused_kwargs=True, nonsense=3)[1]["nonsense"] == 3


@pytest.mark.parametrize("kind", CASES)
def test_outputs_are_of_diffusers_classes(kind):
    ours, theirs = pair(kind)
    if "UNet" in kind:
        x = sample()[:, : ours.config.in_channels]
        rest = (CONTEXT,) if kind == "UNet2DConditionModel" else ()
        calls = [lambda model: model(x, 3, *rest)]
    else:
        x, z = torch.rand(2, 3, 8, 8), sample(4)[:, : ours.latent_channels]
        calls = [lambda m: m(x), lambda m: m.encode(x), lambda m: m.decode(z)]
    for call in calls:
        mine, wanted = call(ours), call(theirs)
        assert type(mine) is type(wanted) and list(mine) == list(wanted)
    if kind == "AutoencoderKL":
        mine, wanted = (m.encode(x).latent_dist for m in (ours, theirs))
        assert type(mine) is type(wanted)
        torch.testing.assert_close(mine.parameters, wanted.parameters)


@pytest.mark.parametrize("kind", CASES)
def test_signatures_are_diffusers_own(kind):
    """Programs read them: which arguments a model is built from, and what it can be called with."""
    ours, theirs = (type(model) for model in pair(kind))
    assert inspect.signature(ours.__init__) == inspect.signature(theirs.__init__)
    assert ours.extract_init_dict({"sample_size": 3, "note": 1})[0] == {"sample_size": 3}
    for name in (
        "forward",
        "encode",
        "decode",
        "save_pretrained",
        "enable_gradient_checkpointing",
        "register_to_config",
    ):
        if name in dir(theirs):
            wanted = [p for p in inspect.signature(getattr(theirs, name)).parameters if p != "kwargs"]
            assert list(inspect.signature(getattr(ours, name)).parameters)[: len(wanted)] == wanted


def test_every_argument_by_position():
    ours, theirs = pair("UNet2DConditionModel")
    arguments = sample(), 3, CONTEXT, None, None, None, {}, None, None, None, None, torch.ones(2, 3), False
    torch.testing.assert_close(ours(*arguments)[0], theirs(*arguments)[0])


def test_another_pipeline_takes_the_parts():
    pipe, _ = text_to_image()
    ldm_fast.accelerate(pipe)
    assert pipe.config["unet"] == ("diffusers", "UNet2DConditionModel")
    for other in (
        diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe),
        diffusers.AutoPipelineForInpainting.from_pipe(pipe),
        diffusers.StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False),
    ):
        assert other.unet is pipe.unet and other.vae is pipe.vae
        assert other.config["vae"] == ("diffusers", "AutoencoderKL")  # as diffusers opens it without us


def test_the_configuration_can_be_changed():
    ours, _ = pair("UNet2DConditionModel")
    ours.register_to_config(in_channels=5, my_own="entry")
    ours.conv_in = torch.nn.Conv2d(5, 32, 3, padding=1)
    assert ours.config.in_channels == ours.config["in_channels"] == 5 and ours.config.my_own == "entry"
    assert ours(torch.ones(1, 5, 8, 8), 3, CONTEXT[:1]).sample.shape == (1, 4, 8, 8)
    ours.conv_in = torch.nn.Conv2d(8, 32, 3, padding=1)  # as programs do that never tell the configuration
    assert ours(torch.ones(1, 8, 8, 8), 3, CONTEXT[:1]).sample.shape == (1, 4, 8, 8)
    with pytest.raises(ValueError, match=r"sample must be \(B, 8, H, W\), got \(1, 4, 8, 8\)"):
        ours(sample()[:1], 3, CONTEXT[:1])
    ours._internal_dict = diffusers.configuration_utils.FrozenDict({**ours.config, "sample_size": 16})  # pipelines do
    assert ours.config.sample_size == ours.sample_size == 16 and ours.config.in_channels == 5
    assert pickle.loads(pickle.dumps(ours)).config == ours.config
    with pytest.warns(FutureWarning, match="Accessing config attribute `in_channels` directly"):
        assert ours.in_channels == 5
    with pytest.raises(AttributeError, match="nonsense"):
        _ = ours.nonsense


def test_embeddings_by_diffusers_methods():
    ours, theirs = pair("UNet2DConditionModel")
    x = sample()
    for timestep in (3, 2.5, torch.tensor(7), torch.tensor([1, 5])):
        torch.testing.assert_close(ours.get_time_embed(x, timestep), theirs.get_time_embed(x, timestep))
    assert ours.get_class_embed(x, None) is None and ours.get_aug_embed(x, CONTEXT, {}) is None
    assert ours.process_encoder_hidden_states(CONTEXT, {}) is CONTEXT
    ours.set_attention_slice("auto")
    ours.set_attention_slice("max")


def test_tiles_by_diffusers_methods():
    ours, theirs = pair("AutoencoderKL")
    x, z = torch.rand(1, 3, 40, 40), sample(20)[:1]
    for model in (ours, theirs):
        model.tile_sample_min_size, model.tile_latent_min_size = 16, 8
    torch.testing.assert_close(ours.tiled_decode(z).sample, theirs.tiled_decode(z).sample)
    torch.testing.assert_close(ours.tiled_encode(x).latent_dist.mean, theirs.tiled_encode(x).latent_dist.mean)
    a, b = torch.rand(2, 1, 3, 8, 8)
    for blend in ("blend_h", "blend_v"):
        assert torch.equal(
            getattr(ours, blend)(a.clone(), b.clone(), 4), getattr(theirs, blend)(a.clone(), b.clone(), 4)
        )
    assert ours.attn_processors.keys() == theirs.attn_processors.keys()
    before = ours.decode(z).sample
    for model in (ours, theirs):
        model.set_attn_processor(diffusers.models.attention_processor.SlicedAttnProcessor(1))
        model.set_default_attn_processor()
    assert torch.equal(ours.decode(z).sample, before)
    ours.fuse_qkv_projections()
    assert torch.equal(ours.decode(z).sample, before)


def test_gradient_checkpointing_by_a_function_of_ones_own():
    for kind in ("UNet2DConditionModel", "AutoencoderKL"):
        ours, _ = pair(kind)
        ours.train()
        called = []

        def mine(module, *inputs, called=called):
            called.append(module)
            return torch.utils.checkpoint.checkpoint(module, *inputs, use_reentrant=False)

        assert ours._supports_gradient_checkpointing and not ours.is_gradient_checkpointing
        ours.enable_gradient_checkpointing(gradient_checkpointing_func=mine)
        assert ours.is_gradient_checkpointing
        x = torch.rand(1, 3, 8, 8) if kind == "AutoencoderKL" else sample()[:1]
        out = ours(x) if kind == "AutoencoderKL" else ours(x, 3, CONTEXT[:1])
        out.sample.sum().backward()
        assert called and all(p.grad is not None for p in ours.parameters())
        ours.disable_gradient_checkpointing()
        assert not ours.is_gradient_checkpointing


def test_an_adapter_on_the_autoencoder():
    peft = pytest.importorskip("peft")
    for ours, theirs in [pair("AutoencoderKL")]:
        z = sample(4)[:1]
        before = ours.decode(z).sample
        for model in (ours, theirs):
            torch.manual_seed(0)
            targets = ["to_q", "to_k", "to_v", "conv_in"]
            model.add_adapter(peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
        torch.testing.assert_close(ours.decode(z).sample, theirs.decode(z).sample)
        assert not torch.allclose(ours.decode(z).sample, before)
        ours.disable_adapters()
        torch.testing.assert_close(ours.decode(z).sample, before)


@pytest.mark.parametrize("kind", CASES)
def test_saved_as_diffusers_saves(kind, tmp_path):
    """Variants, pickles and shards, under the same names and with every entry of the configuration."""
    ours, theirs = pair(kind)
    for model in (ours, theirs):
        model.register_to_config(my_own="entry")
    for i, arguments in enumerate(
        ({"variant": "fp16"}, {"safe_serialization": False}, {"max_shard_size": "100KB", "variant": "ema"})
    ):
        folders = [tmp_path / f"{name}{i}" for name in ("ours", "theirs")]
        for model, folder in zip((ours, theirs), folders, strict=True):
            model.save_pretrained(folder, **arguments)
        mine, wanted = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders)
        assert {re.sub(r"\d{5}", "N", name) for name in mine} == {re.sub(r"\d{5}", "N", name) for name in wanted}
        configs = [json.loads(files["config.json"]) for files in (mine, wanted)]
        assert configs[0] == configs[1] and configs[0]["my_own"] == "entry"
        again = type(theirs).from_pretrained(folders[0], variant=arguments.get("variant"), low_cpu_mem_usage=False)
        state = ours.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
    with pytest.raises(ValueError, match="use_flashpack is not supported"):
        ours.save_pretrained(tmp_path, use_flashpack=True)
    with pytest.raises(TypeError, match="token without push_to_hub"):
        ours.save_pretrained(tmp_path, token="x")


def test_a_saved_pipeline_keeps_its_variant(tmp_path):
    pipe, _ = text_to_image()
    ldm_fast.accelerate(pipe).save_pretrained(tmp_path, variant="fp16")
    for part in ("unet", "vae"):
        assert {path.name for path in (tmp_path / part).iterdir()} == {
            "config.json",
            "diffusion_pytorch_model.fp16.safetensors",
        }
    again = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path, variant="fp16")
    assert type(again.unet) is diffusers.UNet2DConditionModel


def test_uploads_go_to_diffusers(tmp_path, monkeypatch):
    ours, theirs = pair("AutoencoderKL")
    sent = []
    monkeypatch.setattr(type(theirs), "push_to_hub", lambda self, *args, **kwargs: sent.append((args, kwargs)))
    ours.save_pretrained(tmp_path / "mine", push_to_hub=True, variant="fp16", token="t")
    assert sent == [(("mine",), {"safe_serialization": True, "variant": "fp16", "token": "t"})]


def test_plain_models_know_nothing_of_diffusers():
    assert [cls.__module__.split(".")[0] for cls in UNet.__mro__ if "diffusers" in cls.__module__] == []
