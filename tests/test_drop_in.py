"""Our models inside diffusers' pipelines: tiny random ones, each run as it is and accelerated; images are compared."""

import copy
import inspect
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

import ldm_fast
from ldm_fast.models import attention

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

STEPS, TOLERANCE = 10, 2 / 255


# What diffusers and PEFT say about tiny pipelines is of no interest here.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def quiet():
    diffusers.utils.logging.set_verbosity_error()
    torch.manual_seed(0)


def tokenizer():
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{c}</w>" for c in letters)]
    return transformers.CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[], model_max_length=16)


TEXT = {
    "vocab_size": 54,
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "projection_dim": 32,
}
UNET = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
XL = {
    "attention_head_dim": (2, 4),
    "transformer_layers_per_block": (1, 2),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "cross_attention_dim": 64,
    "projection_class_embeddings_input_dim": 6 * 8 + 32,
}


def text_encoder(with_projection=False):
    config = transformers.CLIPTextConfig(**TEXT)
    return (transformers.CLIPTextModelWithProjection if with_projection else transformers.CLIPTextModel)(config).eval()


def unet(**change):
    return diffusers.UNet2DConditionModel(**{**UNET, **change}).eval()


def vae(**change):
    config = {
        "block_out_channels": (16, 32),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": 4,
        "norm_num_groups": 8,
        "sample_size": 16,
    }
    return diffusers.AutoencoderKL(**{**config, **change}).eval()


def vqvae():
    return diffusers.VQModel(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=3,
        num_vq_embeddings=64,
        norm_num_groups=8,
    ).eval()


def scheduler():
    return diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def picture(size=32, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


def mask(size=32):
    values = np.zeros((size, size), np.uint8)
    values[8:20, 4:24] = 255
    return Image.fromarray(values)


def stable_diffusion(cls, **parts):
    parts = {"unet": unet(), "vae": vae(), "text_encoder": text_encoder(), "tokenizer": tokenizer(), **parts}
    return cls(
        scheduler=scheduler(), safety_checker=None, feature_extractor=None, requires_safety_checker=False, **parts
    )


def text_to_image():
    return stable_diffusion(diffusers.StableDiffusionPipeline), {"prompt": ["a cat", "dogs"], "height": 24, "width": 16}


def image_to_image():
    pipe = stable_diffusion(diffusers.StableDiffusionImg2ImgPipeline)
    return pipe, {"prompt": "a cat", "image": picture(16), "strength": 0.7}


def inpainting_nine_channels():
    pipe = stable_diffusion(diffusers.StableDiffusionInpaintPipeline, unet=unet(in_channels=9))
    return pipe, {"prompt": "a cat", "image": picture(16), "mask_image": mask(16), "height": 16, "width": 16}


def inpainting_four_channels():
    pipe = stable_diffusion(diffusers.StableDiffusionInpaintPipeline)
    return pipe, {"prompt": "a cat", "image": picture(16), "mask_image": mask(16), "height": 16, "width": 16}


def upscaling():
    pipe = diffusers.StableDiffusionUpscalePipeline(
        unet=unet(in_channels=7, num_class_embeds=1000, only_cross_attention=(True, False)),
        vae=vae(),
        text_encoder=text_encoder(),
        tokenizer=tokenizer(),
        low_res_scheduler=diffusers.DDPMScheduler(),
        scheduler=diffusers.DDIMScheduler(prediction_type="v_prediction"),
        safety_checker=None,
        max_noise_level=350,
    )
    return pipe, {"prompt": "a cat", "image": picture(8), "noise_level": 20}


def xl_base():
    pipe = diffusers.StableDiffusionXLPipeline(
        unet=unet(**XL),
        vae=vae(force_upcast=False),
        text_encoder=text_encoder(),
        text_encoder_2=text_encoder(with_projection=True),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        scheduler=diffusers.EulerDiscreteScheduler(),
        add_watermarker=False,
    )
    return pipe, {"prompt": "a cat", "height": 16, "width": 16}


def xl_refiner():
    refiner = {**XL, "cross_attention_dim": 32, "projection_class_embeddings_input_dim": 5 * 8 + 32}
    pipe = diffusers.StableDiffusionXLImg2ImgPipeline(
        unet=unet(**refiner),
        vae=vae(force_upcast=False),
        text_encoder=None,
        text_encoder_2=text_encoder(with_projection=True),
        tokenizer=None,
        tokenizer_2=tokenizer(),
        scheduler=diffusers.EulerDiscreteScheduler(),
        requires_aesthetics_score=True,
        add_watermarker=False,
    )
    return pipe, {"prompt": "a cat", "image": picture(16), "strength": 0.9}


def control_net():
    network = unet()
    control = diffusers.ControlNetModel.from_unet(network, conditioning_embedding_out_channels=(8, 16)).eval()
    for p in control.parameters():
        if not p.any():  # the zero convolutions would hide a residual that is not added
            torch.nn.init.normal_(p, std=0.05)
    pipe = stable_diffusion(diffusers.StableDiffusionControlNetPipeline, unet=network, controlnet=control)
    return pipe, {"prompt": "a cat", "image": picture(16), "height": 16, "width": 16}


def latent_consistency():
    pipe = stable_diffusion(diffusers.LatentConsistencyModelPipeline, unet=unet(time_cond_proj_dim=32))
    pipe.scheduler = diffusers.LCMScheduler()
    return pipe, {"prompt": "a cat", "height": 16, "width": 16}


UNET2D = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 8,
}


def unconditional():
    network = diffusers.UNet2DModel(in_channels=3, out_channels=3, attention_head_dim=16, **UNET2D).eval()
    return diffusers.LDMPipeline(vqvae=vqvae(), unet=network, scheduler=scheduler()), {}


def super_resolution():
    network = diffusers.UNet2DModel(in_channels=6, out_channels=3, attention_head_dim=32, **UNET2D).eval()
    pipe = diffusers.LDMSuperResolutionPipeline(vqvae=vqvae(), unet=network, scheduler=scheduler())
    return pipe, {"image": torch.rand(2, 3, 10, 12) * 2 - 1}


PIPELINES = {
    f.__name__: f
    for f in (
        text_to_image,
        image_to_image,
        inpainting_nine_channels,
        inpainting_four_channels,
        upscaling,
        xl_base,
        xl_refiner,
        control_net,
        latent_consistency,
        unconditional,
        super_resolution,
    )
}


def run(pipe, arguments):
    """Images (B, H, W, 3) in [0, 1], the same noise every time."""
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(7)
    return pipe(**arguments, num_inference_steps=STEPS, generator=generator, output_type="np").images


def difference(a, b):
    assert a.shape == b.shape
    return float(np.abs(np.asarray(a, np.float64) - b).max())


@pytest.mark.parametrize("name", PIPELINES)
def test_same_images(name):
    pipe, arguments = PIPELINES[name]()
    before = run(pipe, arguments)
    assert ldm_fast.accelerate(pipe) is pipe
    assert isinstance(pipe.unet, ldm_fast.UNet)
    first_stage = pipe.vqvae if hasattr(pipe, "vqvae") else pipe.vae
    assert isinstance(first_stage, ldm_fast.VQModel | ldm_fast.AutoencoderKL)
    after = run(pipe, arguments)
    assert float(np.std(before)) > 0.01  # not a blank picture
    assert difference(before, after) <= TOLERANCE


def test_one_component_at_a_time():
    pipe, arguments = text_to_image()
    before = run(pipe, arguments)
    pipe.unet = ldm_fast.UNet.from_diffusers(pipe.unet)
    assert difference(before, run(pipe, arguments)) <= TOLERANCE
    pipe.vae = ldm_fast.AutoencoderKL.from_diffusers(pipe.vae)
    assert difference(before, run(pipe, arguments)) <= TOLERANCE


def test_weights_are_shared_not_copied():
    pipe, _ = text_to_image()
    weight = pipe.unet.mid_block.attentions[0].proj_in.weight
    ldm_fast.accelerate(pipe)
    assert pipe.unet.mid_block.attentions[0].proj_in.weight.data_ptr() == weight.data_ptr()


def test_compiling_the_repeated_blocks():
    pipe, arguments = text_to_image()
    before = run(ldm_fast.accelerate(pipe), arguments)
    pipe.unet.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    assert difference(before, run(pipe, arguments)) <= TOLERANCE


def test_accelerate_twice_changes_nothing():
    pipe, _ = text_to_image()
    ours, kind = ldm_fast.accelerate(pipe).unet, type(pipe)
    assert ldm_fast.accelerate(pipe).unet is ours and type(pipe) is kind
    assert isinstance(pipe, diffusers.StableDiffusionPipeline) and kind.__name__ == "StableDiffusionPipeline"
    assert inspect.signature(pipe.__call__) == inspect.signature(text_to_image()[0].__call__)


def test_keys_and_values_are_computed_once_for_each_call(monkeypatch):
    """Within a call they are kept; the next one, even of the same embeddings, may follow a write without a trace."""
    theirs, arguments = text_to_image()
    ours = ldm_fast.accelerate(copy.deepcopy(theirs))
    computed, linears = [], attention.linears

    def counting(x, layers):
        if len(layers) == 2:  # self attention has three
            computed.append(layers)
        return linears(x, layers)

    monkeypatch.setattr(attention, "linears", counting)
    layers = sum(name.endswith("attn2") for name, _ in ours.unet.named_modules())
    embeddings = torch.randn(1, 16, 32), torch.randn(1, 16, 32)
    arguments = {**arguments, "prompt": None, "prompt_embeds": embeddings[0], "negative_prompt_embeds": embeddings[1]}
    for calls in (1, 2):
        assert difference(run(theirs, arguments), run(ours, arguments)) <= TOLERANCE
        assert len(computed) == calls * layers
        for pipe in (theirs, ours):
            for parameter in pipe.unet.parameters():
                parameter.data.mul_(1.05)
    with torch.no_grad():  # a loop of one's own says itself whether weights may change
        for _ in range(2):
            ours.unet(torch.ones(1, 4, 8, 8), 1, embeddings[0])
    assert len(computed) == 4 * layers


@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "exchanged"])
def test_a_callback_that_changes_the_prompt(in_place):
    """Between two steps, by its embeddings in place or by others."""

    def change(pipe, step, timestep, given):
        embeddings = given["prompt_embeds"]
        if step == 1:
            embeddings = embeddings.mul_(-1) if in_place else -embeddings
        return {"prompt_embeds": embeddings}

    theirs, arguments = text_to_image()
    ours = ldm_fast.accelerate(copy.deepcopy(theirs))
    plain = run(ours, arguments)
    arguments |= {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    changed = run(ours, arguments)
    assert difference(plain, changed) > TOLERANCE and difference(run(theirs, arguments), changed) <= TOLERANCE


def test_copies_and_pickles():
    sample, context = torch.ones(1, 4, 8, 8), torch.ones(1, 3, unet().config.cross_attention_dim)
    ours = {"unet": ldm_fast.UNet.from_diffusers(unet()), "vae": ldm_fast.AutoencoderKL.from_diffusers(vae())}
    for again in (pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)):
        assert {name: type(part) for name, part in again.items()} == {name: type(part) for name, part in ours.items()}
        assert torch.equal(*(parts["unet"](sample, 3, context).sample for parts in (ours, again)))
        assert torch.equal(*(parts["vae"].decode(sample).sample for parts in (ours, again)))
        assert again["unet"].config == ours["unet"].config and again["unet"].config.sample_size == 8

    class Mine(type(ours["unet"])):
        pass

    ours["unet"].__class__ = Mine
    assert type(copy.deepcopy(ours["unet"])) is Mine


def test_saved_pipelines_open_again_as_diffusers_own(tmp_path):
    pipe, arguments = text_to_image()
    before = run(pipe, arguments)
    ldm_fast.accelerate(pipe).save_pretrained(tmp_path)
    again = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path)
    assert type(again.unet) is diffusers.UNet2DConditionModel and type(again.vae) is diffusers.AutoencoderKL
    assert difference(before, run(again, arguments)) <= 1e-6


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_our_pipeline_makes_the_images_of_theirs(tmp_path, prediction):
    """A folder of Stable Diffusion, opened without diffusers' pipeline: the same noise, the same images."""
    pipe, arguments = text_to_image()
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, prediction_type=prediction)
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(5 + i) for i in range(2)]
    theirs = pipe(**arguments, num_inference_steps=STEPS, generator=generators, output_type="np").images
    pipe.save_pretrained(tmp_path)
    model = ldm_fast.LatentDiffusion.load(tmp_path)
    ours = model.generate(arguments["prompt"], steps=STEPS, seed=5, size=(arguments["height"], arguments["width"]))
    assert difference(ours.numpy() / 255, theirs) <= TOLERANCE
    assert "StableDiffusionPipeline" in model.origin


def test_a_variant_of_the_weights_alone(tmp_path):
    """As `variant="fp16"` downloads a folder: every component's weights in files of that name, and no others."""
    pipe = text_to_image()[0].to(torch.float16)
    pipe.save_pretrained(tmp_path / "plain")
    pipe.save_pretrained(tmp_path / "variant", variant="fp16")
    with pytest.raises(ValueError, match="weights there: diffusion_pytorch_model.fp16.safetensors"):
        ldm_fast.LatentDiffusion.load(tmp_path / "variant")
    plain = ldm_fast.LatentDiffusion.load(tmp_path / "plain")
    ours = ldm_fast.LatentDiffusion.load(tmp_path / "variant", variant="fp16")
    assert torch.equal(*(model.generate("a cat", steps=1, size=16) for model in (plain, ours)))


def test_xl_is_left_to_diffusers_pipeline(tmp_path):
    xl_base()[0].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Stable Diffusion XL; run it in diffusers' pipeline"):
        ldm_fast.LatentDiffusion.load(tmp_path)


def test_what_we_cannot_run_is_named():
    """The other parts are replaced; with `strict`, or if there are no others, nothing is."""
    pipe, arguments = text_to_image()
    pipe.vae = theirs = vae(act_fn="relu")
    before = run(pipe, arguments)
    with pytest.raises(ValueError, match=r"accelerate: vae: AutoencoderKL: act_fn must be"):
        ldm_fast.accelerate(pipe, strict=True)
    assert not isinstance(pipe.unet, ldm_fast.UNet)
    with pytest.warns(UserWarning, match=r"left as diffusers' own: vae: AutoencoderKL: act_fn must be .*relu") as said:
        ldm_fast.accelerate(pipe)
    assert len(said) == 1 and isinstance(pipe.unet, ldm_fast.UNet) and pipe.vae is theirs
    assert difference(before, run(pipe, arguments)) <= TOLERANCE
    alone = diffusers.StableDiffusionPipeline(**{**pipe.components, "unet": None}, requires_safety_checker=False)
    with pytest.raises(ValueError, match=r"accelerate: vae: AutoencoderKL: act_fn must be"):
        ldm_fast.accelerate(alone)
    with pytest.raises(TypeError, match="accelerate"):
        ldm_fast.accelerate("stable diffusion")


def test_adapters_come_after(lora_file):
    """Weights that are wrapped already are an error of order, not a part to be left out."""
    pipe, _ = text_to_image()
    pipe.load_lora_weights(lora_file)
    with pytest.raises(ValueError, match=r"accelerate: unet: .*unexpected"):
        ldm_fast.accelerate(pipe)
    assert not isinstance(pipe.vae, ldm_fast.AutoencoderKL)


@pytest.mark.parametrize(
    "touch, message",
    [
        (
            lambda pipe: setattr(pipe, "unet", torch.compile(pipe.unet)),
            "unet is compiled; accelerate the pipeline first",
        ),
        (lambda pipe: setattr(pipe, "vae", torch.compile(pipe.vae)), "vae is compiled"),
        (lambda pipe: pipe.unet.compile(), "unet is compiled"),
        (lambda pipe: pipe.unet.compile_repeated_blocks(), "unet is compiled"),
        (lambda pipe: pipe.enable_model_cpu_offload(device="cpu"), "vae has hooks on it .offloading.*first"),
        (lambda pipe: pipe.enable_sequential_cpu_offload(device="cpu"), "vae has hooks on it"),
        (lambda pipe: pipe.unet.enable_layerwise_casting(torch.float16, torch.float32), "unet has hooks on it"),
    ],
)
def test_what_is_compiled_or_offloaded_is_refused(touch, message):
    pipe, _ = text_to_image()
    touch(pipe)
    before = dict(pipe.components)
    with pytest.raises(ValueError, match=message):
        ldm_fast.accelerate(pipe)
    assert all(pipe.components[name] is component for name, component in before.items())


def test_compiled_after_it_was_accelerated():
    pipe, arguments = text_to_image()
    before = run(ldm_fast.accelerate(pipe), arguments)
    pipe.unet = compiled = torch.compile(pipe.unet, backend="eager")
    pipe.vae = torch.compile(pipe.vae, backend="eager")
    assert ldm_fast.accelerate(pipe).unet is compiled
    assert difference(before, run(pipe, arguments)) <= TOLERANCE


def test_a_pipeline_without_anything_to_replace():
    network = diffusers.UNet1DModel(
        block_out_channels=(8, 16), down_block_types=("DownBlock1D",) * 2, up_block_types=("UpBlock1D",) * 2
    )
    pipe = diffusers.DanceDiffusionPipeline(unet=network, scheduler=diffusers.IPNDMScheduler())
    with pytest.raises(ValueError, match=r"DanceDiffusionPipeline has no UNet2DConditionModel.*unet \(UNet1DModel\)"):
        ldm_fast.accelerate(pipe)


# LoRA: files are made by PEFT on diffusers' own UNet


@pytest.fixture(scope="module")
def lora_file(tmp_path_factory):
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    network = unet()
    targets = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"]
    network.add_adapter(peft.LoraConfig(r=4, lora_alpha=4, target_modules=targets, init_lora_weights=False))
    folder = tmp_path_factory.mktemp("lora")
    layers = diffusers.utils.convert_state_dict_to_diffusers(peft.get_peft_model_state_dict(network))
    layers = {name: 3 * tensor for name, tensor in layers.items()}  # strong enough to see
    diffusers.StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers)
    return folder


def test_lora(lora_file):
    """Load, scale, switch off, fuse, unfuse, unload: at every stage the images of diffusers' own UNet."""
    theirs, arguments = text_to_image()
    ours = ldm_fast.accelerate(diffusers.StableDiffusionPipeline(**copy.deepcopy(theirs.components), **NO_CHECKER))
    plain = run(theirs, arguments)
    stages = [
        ("load", lambda p: p.load_lora_weights(lora_file, adapter_name="style")),
        ("scale", lambda p: p.set_adapters(["style"], adapter_weights=[0.5])),
        ("off", lambda p: p.disable_lora()),
        ("on", lambda p: p.enable_lora()),
        ("fuse", lambda p: p.fuse_lora(lora_scale=0.7)),
        ("unfuse", lambda p: p.unfuse_lora()),
        ("unload", lambda p: p.unload_lora_weights()),
    ]
    seen = {}
    for name, change in stages:
        change(theirs)
        change(ours)
        seen[name] = run(theirs, arguments)
        assert difference(seen[name], run(ours, arguments)) <= TOLERANCE, name
    assert difference(plain, seen["load"]) > 4 * TOLERANCE  # the LoRA can be seen
    assert difference(seen["load"], seen["scale"]) > TOLERANCE
    assert difference(plain, seen["off"]) == 0
    assert difference(plain, seen["unload"]) < 1e-5  # fused and unfused: rounded twice


def test_lora_scale_of_a_call(lora_file):
    theirs, arguments = text_to_image()
    ours = ldm_fast.accelerate(diffusers.StableDiffusionPipeline(**copy.deepcopy(theirs.components), **NO_CHECKER))
    arguments["cross_attention_kwargs"] = {"scale": 0.3}
    for pipe in (theirs, ours):
        pipe.load_lora_weights(lora_file)
    assert difference(run(theirs, arguments), run(ours, arguments)) <= TOLERANCE


NO_CHECKER = {"requires_safety_checker": False}


# IP-Adapter: a file made of random numbers


def ip_adapter(network):
    """Weights as a published IP-Adapter file holds them, for `network`."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape):
        return torch.randn(shape, generator=generator) * shape[-1] ** -0.5

    projection = {
        "proj.weight": random(4 * 32, 32),
        "proj.bias": random(4 * 32),
        "norm.weight": torch.ones(32),
        "norm.bias": torch.zeros(32),
    }
    layers, number = {}, 1
    for name, module in network.named_modules():
        if name.endswith("attn2"):
            for part in ("to_k", "to_v"):
                layers[f"{number}.{part}_ip.weight"] = 2 * random(*getattr(module, part).weight.shape)
            number += 2
    return {"image_proj": projection, "ip_adapter": layers}


def test_ip_adapter():
    encoder = transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=37,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=32,
            patch_size=8,
            projection_dim=32,
        )
    ).eval()
    processor = transformers.CLIPImageProcessor(size=32, crop_size=32)
    theirs, arguments = text_to_image()
    theirs.register_modules(image_encoder=encoder, feature_extractor=processor)
    ours = ldm_fast.accelerate(diffusers.StableDiffusionPipeline(**copy.deepcopy(theirs.components), **NO_CHECKER))
    plain = run(theirs, arguments)
    weights = ip_adapter(theirs.unet)
    shown = {**arguments, "ip_adapter_image": picture(32, seed=5)}
    for pipe in (theirs, ours):
        pipe.load_ip_adapter(weights, subfolder="", weight_name="", image_encoder_folder=None)
    for scale in (1.0, 0.4):
        for pipe in (theirs, ours):
            pipe.set_ip_adapter_scale(scale)
        seen = run(theirs, shown)
        assert difference(seen, run(ours, shown)) <= TOLERANCE
        assert difference(seen, plain) > TOLERANCE
    for pipe in (theirs, ours):
        pipe.unload_ip_adapter()
    assert difference(plain, run(ours, arguments)) <= TOLERANCE
