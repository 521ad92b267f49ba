"""LatentDiffusion with tiny random weights: seeds, sizes, img2img, inpainting, and its file."""

import hashlib
import json
import struct
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import small_models
import torch
from PIL import Image
from small_models import TEXT_UNET

from ldm_fast.checkpoints import model_file
from ldm_fast.configs.diffusion import Defaults
from ldm_fast.configs.encoders import ClassEmbedderConfig
from ldm_fast.diffusion.condition import Condition
from ldm_fast.diffusion.samplers import SAMPLERS
from ldm_fast.files.tensors import tensors_digest
from ldm_fast.models import attention
from ldm_fast.models.encoders import ClassEmbedder
from ldm_fast.models.unet import UNet
from ldm_fast.pipelines.latent_diffusion import LatentDiffusion
from ldm_fast.training import evaluation
from ldm_fast.training.image_set import ImageSet
from ldm_fast.training.metrics import rank, thumbnails

UNCONDITIONAL_UNET = replace(
    TEXT_UNET,
    down_block_types=("DownBlock2D",) * 2,
    mid_block_type="UNetMidBlock2D",
    cross_attention_dim=None,
)
QUICK = Defaults(steps=3, guidance=2.0)


def text_model(kl=False, **options):
    card = {"licence": "none", "metrics": {"psnr": 1.5}}
    return small_models.text_model(kl, **{"defaults": QUICK, "scaling_factor": 1.5, "card": card} | options)


@pytest.fixture(scope="module")
def model():
    return text_model()


def close(a, b):
    """Equal except for rounding: batches of other sizes multiply matrices in another order."""
    return (a.int() - b.int()).abs().max() <= 2


def picture(height=16, width=16, seed=0):
    return torch.randint(256, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def test_images(model):
    images = model.generate(["red apple", "green tree"])
    assert images.shape == (2, 16, 16, 3) and images.dtype == torch.uint8 and images.is_contiguous()
    assert model.image_size == (16, 16)
    assert not close(images[0], images[1])
    assert torch.equal(images, model.generate(["red apple", "green tree"]))
    assert torch.equal(model.generate("red apple"), model.generate(["red apple"]))


def test_image_i_depends_only_on_seed_plus_i():
    # The first stage is KL-reg, since quantizing could turn a rounding error into another code.
    model = text_model(kl=True)
    prompts = ["red apple", "green tree", "", "red apple"]
    images = model.generate(prompts, seed=5)
    assert close(images, model.generate(prompts, seed=5, batch_size=3))
    for i, prompt in enumerate(prompts):
        assert close(images[i], model.generate(prompt, seed=5 + i)[0])
    assert not close(images[0], images[3])


def test_generate_neither_uses_nor_changes_the_global_random_state(model):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = model.generate("red apple", sampler="ddpm")
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert torch.equal(first, model.generate("red apple", sampler="ddpm"))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers(model, sampler):
    images = model.generate("red apple", sampler=sampler, steps=4)
    assert images.shape == (1, 16, 16, 3)
    if sampler != "ddim":
        assert not torch.equal(images, model.generate("red apple", sampler="ddim", steps=4))


def test_guidance_and_negative_prompt(model):
    plain = model.generate("red apple", guidance=1.0)
    guided = model.generate("red apple", guidance=4.0)
    assert not torch.equal(plain, guided)
    assert torch.equal(guided, model.generate("red apple", guidance=4.0, negative=""))
    assert not torch.equal(guided, model.generate("red apple", guidance=4.0, negative="green tree"))
    # Steering away from the prompt itself gives the same as no guidance.
    assert close(plain, model.generate("red apple", guidance=4.0, negative="red apple"))


def test_progress(model):
    calls = []
    model.generate(["red apple"] * 3, steps=2, batch_size=2, progress=lambda *call: calls.append(call))
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_a_prompt_given_twice_is_warned_about_once(model):
    with pytest.warns(UserWarning) as caught:
        model.generate(["blue apple"] * 3, steps=1)
    assert len(caught) == 1


@pytest.mark.parametrize("size", [(16, 24), (10, 6), 20])
def test_sizes(model, size):
    height, width = (size, size) if isinstance(size, int) else size
    assert model.generate("red apple", size=size, steps=1).shape == (1, height, width, 3)


BAD_ARGUMENTS = {
    "steps 0": ({"steps": 0}, "steps must be between 1 and 1000, got 0"),
    "steps negative": ({"steps": -2}, "got -2"),
    "sampler": ({"sampler": "euler"}, "unknown sampler 'euler'; known: ddim, ddpm"),
    "spacing": ({"spacing": "log"}, "unknown timestep spacing 'log'"),
    "guidance": ({"guidance": float("nan")}, "guidance must be a finite number"),
    "eta": ({"eta": 1.5}, "eta must be between 0 and 1"),
    "guidance type": ({"guidance": "7"}, "guidance must be a number, got '7'"),
    "eta type": ({"eta": "1"}, "eta must be a number, got '1'"),
    "eta of another sampler": ({"eta": 0.5, "sampler": "plms"}, "eta belongs to .* ddim; plms has none, got 0.5"),
    "strength type": ({"init": picture(), "strength": "0.5"}, "strength must be a number, got '0.5'"),
    "size type": ({"size": 16.0}, "size must be a whole number, got 16.0"),
    "one side": ({"size": (16,)}, r"size must be one number or \(height, width\), got \(16,\)"),
    "init type": ({"init": "me.png"}, "images and masks must be tensors, arrays or Pillow images, got str"),
    "inits of two sizes": ({"init": [picture(), picture(8, 8)]}, "of one size are needed"),
    "mask type": ({"init": picture(), "mask": 1}, "images and masks must be tensors, arrays or Pillow images, got int"),
    "batch size type": ({"batch_size": 1.5}, "batch_size must be a whole number, got 1.5"),
    "size": ({"size": 17}, "size must be a multiple of 2, got 17; nearest are 16 and 18"),
    "size 0": ({"size": 0}, "size must be a multiple of 2, got 0"),
    "seed": ({"seed": -1}, "seed must be between 0 and 4294967295, got -1"),
    "seed type": ({"seed": 1.5}, "seed must be a whole number"),
    "strength alone": ({"strength": 0.5}, "strength needs an init image"),
    "mask alone": ({"mask": torch.ones(16, 16)}, "mask needs an init image"),
    "strength": ({"init": picture(), "strength": 0.0}, "strength must be above 0"),
    "init dtype": ({"init": picture().float()}, "images must be uint8"),
    "init size": ({"init": picture(15, 16)}, "multiple of 2, got 15"),
    "init and size": ({"init": picture(), "size": 8}, "init is 16x16, but size 8"),
    "init count": ({"init": torch.stack([picture()] * 2)}, "2 init images for 1 images"),
    "mask size": ({"init": picture(), "mask": torch.ones(8, 16)}, "mask has shape"),
    "negatives": ({"negative": ["a", "b", "c"]}, "3 negative prompts for 1 images"),
    "batch size": ({"batch_size": 0}, "batch_size must be at least 1"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_bad_arguments(model, arguments, message):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises((ValueError, TypeError), match=message):
            model.generate("red apple", **arguments)


def test_numbers_of_numpy(model):
    expected = model.generate("red apple", size=(16, 16), seed=3, steps=2, guidance=2.0, eta=0.5)
    for size in (np.int64(16), np.array([16, 16]), [16, 16]):
        options = {"seed": np.int64(3), "steps": np.int32(2), "batch_size": np.int64(2), "size": size}
        assert torch.equal(
            model.generate("red apple", guidance=np.float32(2), eta=np.float64(0.5), **options), expected
        )


def test_init_and_mask_may_be_pictures():
    model, init = text_model(kl=True), picture()
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[:8] = True
    expected = model.generate(["red apple"] * 2, init=init, mask=mask)
    pillow = Image.fromarray(init.numpy()), Image.fromarray(mask.numpy())
    for given in (pillow, ([pillow[0]] * 2, [pillow[1]] * 2), (init.numpy(), mask.numpy()), ([init], [mask])):
        assert torch.equal(model.generate(["red apple"] * 2, init=given[0], mask=given[1]), expected)


def test_bad_prompts(model):
    for prompts, error in (([], ValueError), (3, ValueError), ([3], TypeError), (Condition(), ValueError)):
        with pytest.raises(error):
            model.generate(prompts)


def test_reconstruct_any_size(model):
    images = torch.stack([picture(7, 9), picture(7, 9, seed=1)])
    again = model.reconstruct(images)
    assert again.shape == images.shape and again.dtype == torch.uint8
    even = torch.stack([picture(8, 10), picture(8, 10, seed=1)])
    assert torch.equal(model.reconstruct(even), model.decode(model.encode(even)))


def test_encode_scales_the_pre_quantized_latent(model):
    x = picture()[None]
    expected = model.first_stage.encode(x.permute(0, 3, 1, 2) / 127.5 - 1).latents * 1.5
    torch.testing.assert_close(model.encode(x), expected)


def test_decode_undoes_the_scaling(model):
    z = model.encode(picture()[None])
    expected = model.first_stage.decode(z / 1.5).sample
    expected = ((expected.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
    assert torch.equal(model.decode(z), expected)


@pytest.mark.parametrize("part", ["UNet", "first stage"])
def test_latents_and_pixels_that_are_not_finite_are_refused(part):
    """A quantizer would turn latents that are not finite into codes, and uint8 would make pixels black."""
    model = text_model(kl=part != "UNet")
    with torch.no_grad():
        (model.unet.conv_out if part == "UNet" else model.first_stage.decoder.conv_out).bias[0] = float("inf")
    with pytest.raises(ValueError, match=f"not finite; the {part} computes in torch.float32"):
        model.generate("red apple")


@pytest.mark.parametrize("force_upcast", [False, True])
def test_a_first_stage_that_overflows_in_float16(force_upcast):
    """If its configuration says so, it computes in float32, and its weights stay as they are."""
    model = text_model(kl=True)
    model.first_stage.config = replace(model.first_stage.config, force_upcast=force_upcast)
    with torch.no_grad():  # a norm follows, so values too large for float16 do no harm in float32
        model.first_stage.decoder.conv_in.weight.mul_(3e5)
    model.first_stage.half().float()
    x, z = picture()[None], torch.ones(1, 4, 8, 8)
    encoded, decoded = model.encode(x, torch.Generator().manual_seed(0)), model.decode(z)
    model.first_stage.half()
    before = {name: (t, t.data_ptr(), t.clone()) for name, t in model.first_stage.state_dict(keep_vars=True).items()}
    if force_upcast:
        torch.testing.assert_close(model.encode(x, torch.Generator().manual_seed(0)), encoded)
        assert close(model.decode(z), decoded)
    else:
        with pytest.raises(ValueError, match="not finite; the first stage computes in torch.float16"):
            model.decode(z)
    after = model.first_stage.state_dict(keep_vars=True)
    for name, (tensor, address, value) in before.items():
        assert after[name] is tensor and tensor.data_ptr() == address and torch.equal(tensor, value)


def test_two_threads_decode_one_float16_model():
    """Each thread decodes a picture a hundred times, always as if it were the only thread."""
    model = text_model(kl=True).half()
    model.first_stage.config = replace(model.first_stage.config, force_upcast=True)
    latents = [torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    wanted = [model.decode(z) for z in latents]
    together = threading.Barrier(2)

    def decode(z):
        together.wait()
        return [model.decode(z) for _ in range(100)]

    with ThreadPoolExecutor(2) as pool:
        for pictures, picture in zip(pool.map(decode, latents), wanted, strict=True):
            assert all(torch.equal(again, picture) for again in pictures)


def test_img2img_keeps_more_at_low_strength():
    model = text_model(kl=True, defaults=Defaults(steps=20, guidance=1.0))
    init = picture()
    z = model.encode(init[None], torch.Generator().manual_seed(0))

    def distance(strength):
        torch.manual_seed(0)
        images = model.generate("red apple", init=init, strength=strength)
        return (images.float() - model.decode(z).float()).square().mean()

    assert distance(0.05) < distance(0.5) < distance(1.0)


@pytest.mark.parametrize("kl", [False, True], ids=["vq", "kl"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_inpainting_keeps_the_known_latents_exactly(sampler, kl):
    model = text_model(kl=kl)
    init = picture()
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[3:8, 9:] = True  # touches latent rows 1 to 3, columns 4 to 7
    caught = []
    model.decode = lambda z: caught.append(z) or torch.zeros(len(z), 16, 16, 3, dtype=torch.uint8)
    model.generate("red apple", init=init, mask=mask, sampler=sampler, steps=4)
    known = model.encode(init[None], torch.Generator().manual_seed(0))
    changed = (caught[0] != known).any(1)[0]
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[1:4, 4:] = True
    assert torch.equal(changed, expected)


def test_a_batch_of_inits_and_masks(model):
    inits = torch.stack([picture(seed=1), picture(seed=2)])
    masks = torch.zeros(2, 16, 16)
    masks[1] = 1
    images = model.generate(["red apple"] * 2, init=inits, mask=masks, batch_size=1)
    assert close(images[0], model.reconstruct(inits[:1])[0])
    assert not close(images[1], model.reconstruct(inits[1:])[0])


def test_class_conditional_model():
    model = text_model()
    model.cond_stage = ClassEmbedder(ClassEmbedderConfig(num_classes=4, width=16, null_class=3))
    images = model.generate([0, 2])
    assert images.shape == (2, 16, 16, 3)
    assert close(model.generate([0], guidance=3.0, negative=[3]), model.generate([0], guidance=3.0))
    for negative in (0, [0], np.int64(0), np.array([0])):  # one label for all images
        assert torch.equal(model.generate([1, 2], negative=negative), model.generate([1, 2], negative=[0, 0]))
    with pytest.raises(ValueError, match="label 4 is not in 0..3"):
        model.generate([4])


def test_a_model_of_tokens():
    """The model has the network of a text encoder without its tokenizer, so prompts are tokens."""
    model = text_model()
    tokens = model.cond_stage.tokenizer(["red apple", "green tree"])
    expected = model.generate(["red apple", "green tree"], negative="")
    empty = model.cond_stage.tokenizer([""])
    model.cond_stage = model.cond_stage.transformer
    assert torch.equal(model.generate(tokens, negative=empty), expected)
    with pytest.raises(ValueError, match="no unconditional input; give negative ones"):
        model.generate(tokens)


def test_unconditional_and_concat_models():
    model = text_model()
    model.unet, model.cond_stage = UNet(UNCONDITIONAL_UNET).eval(), None
    model.conditioning_key = None
    assert model.generate(3, guidance=1.0).shape == (3, 16, 16, 3)
    assert model.generate(np.int64(3), guidance=1.0).shape == (3, 16, 16, 3)
    with pytest.raises(ValueError, match="no unconditional input"):
        model.generate(1, guidance=2.0)
    with pytest.raises(ValueError, match="no unconditional input; give guidance 1"):
        model.generate(1, guidance=2.0, negative=1)
    with pytest.raises(ValueError, match="takes a number of images, got 'red apple'"):
        model.generate("red apple", guidance=1.0)
    model.unet = UNet(replace(UNCONDITIONAL_UNET, in_channels=7)).eval()
    model.conditioning_key = "concat"
    maps = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.generate(maps, guidance=1.0), model.generate(Condition(concat=maps), guidance=1.0))


def test_hybrid_model():
    """Guidance steers away from a context; the map of the condition stays."""
    model = text_model(conditioning_key="hybrid")
    model.unet = UNet(replace(TEXT_UNET, in_channels=7)).eval()
    maps = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    context = {prompt: model.cond_stage([prompt] * 2).detach() for prompt in ("red apple", "green tree", "")}
    condition = Condition(context["red apple"], maps)
    for given, meant in ((None, ""), ("green tree", "green tree"), (["green tree"] * 2, "green tree")):
        spelt_out = Condition(context[meant], maps)
        assert close(model.generate(condition, negative=given), model.generate(condition, negative=spelt_out))
    assert not close(model.generate(condition), model.generate(condition, negative="green tree"))
    assert not close(model.generate(condition), model.generate(condition, negative=Condition(context[""], -maps)))
    with pytest.raises(ValueError, match="takes a Condition with both"):
        model.generate("red apple")


# The file


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    model.save(path)
    return path


@pytest.mark.parametrize("kl", [False, True], ids=["vq", "kl"])
def test_file_holds_the_whole_model(tmp_path, kl):
    model = text_model(kl=kl)
    path = tmp_path / "m.safetensors"
    model.save(path)
    before = torch.get_rng_state()
    again = LatentDiffusion.load(path)
    assert torch.equal(before, torch.get_rng_state())
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    for part in ("unet", "first_stage", "cond_stage", "schedule"):
        assert getattr(again, part).config == getattr(model, part).config
    assert (again.defaults, again.card, again.scaling_factor) == (model.defaults, model.card, 1.5)
    assert again.origin.startswith("m.safetensors sha256:") and not again.training
    # A model is loaded for inference, so its projections are joined.
    assert any(p.untyped_storage().nbytes() > p.nbytes for p in again.unet.parameters())
    assert torch.equal(again.generate("red apple"), model.generate("red apple"))
    again.save(tmp_path / "n.safetensors")
    assert (tmp_path / "n.safetensors").read_bytes() == path.read_bytes()


def test_half_precision_file(tmp_path, model):
    path = tmp_path / "half.safetensors"
    model.save(path, dtype=torch.float16)
    again = LatentDiffusion.load(path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.half().float(), again.state_dict()[name])
    with torch.no_grad():
        again.unet.conv_in.bias[0] = 1e6
    with pytest.raises(ValueError, match=r"unet.conv_in.bias: it holds values that are not finite in torch.float16"):
        again.save(path, dtype=torch.float16)
    LatentDiffusion.load(path)


def test_adapters_are_not_saved_into_a_file_nobody_could_load(tmp_path):
    model = text_model()
    model.unet.conv_in.lora_A = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="cannot save the unet; adapters .* unexpected: conv_in.lora_A.weight"):
        model.save(tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no model file at .*nowhere"):
        LatentDiffusion.load(tmp_path / "nowhere.safetensors")


def header_of(content):
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(header, data):
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def flipped(content):
    return content[:-5] + bytes([content[-5] ^ 1]) + content[-4:]


def with_other_description(content):
    header, data = header_of(content)
    header["__metadata__"]["ldm_fast"] = header["__metadata__"]["ldm_fast"].replace('"steps": 3', '"steps": 4')
    return with_header(header, data)


def without_description(content):
    header, data = header_of(content)
    del header["__metadata__"]
    return with_header(header, data)


DAMAGE = {
    "empty": (lambda content: b"", "not a whole safetensors file"),
    "truncated": (lambda content: content[: len(content) // 2], "not a whole safetensors file"),
    "one byte short": (lambda content: content[:-1], "not a whole safetensors file"),
    "in the header": (lambda content: content[:100], "not a whole safetensors file"),
    "text": (lambda content: b"hello world, this is no model\n" * 9, "not a whole safetensors file"),
    "pickle": (lambda content: b"\x80\x04\x95" + bytes(64), "not what its name says but a pickle"),
    "one bit": (flipped, "changed or damaged"),
    "description": (with_other_description, "changed or damaged"),
    "foreign": (without_description, "names of no model known here"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_files(saved, tmp_path, damage, message):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(damage(saved.read_bytes()))
    with pytest.raises(ValueError, match=message) as caught:
        LatentDiffusion.load(path)
    assert str(path) in str(caught.value)


def signed(saved, path, change_about=None, change_tensors=None):
    """Write a file with a correct checksum, as another version of the program could have written it."""
    from safetensors.torch import load_file, save_file

    header, _ = header_of(saved.read_bytes())
    about, tensors = json.loads(header["__metadata__"]["ldm_fast"]), load_file(saved)
    if change_about:
        change_about(about)
    if change_tensors:
        change_tensors(tensors)
    about["sha256"] = tensors_digest(tensors, model_file._description(about))
    save_file(tensors, path, {"ldm_fast": json.dumps(about)})


def rename(tensors):
    tensors["unet.stranger"] = tensors.pop("unet.conv_in.bias")
    tensors["unet.conv_out.bias"] = torch.zeros(7)


MISFITS = {
    "tensors": (
        {"change_tensors": rename},
        r"1 missing: conv_in.bias; 1 unexpected: stranger; 1 wrong shape: conv_out.bias is \(7,\) instead of \(4,\)",
    ),
    "format": ({"change_about": lambda about: about.update(format=2)}, "format 2; this version of ldm_fast reads 1"),
    "field": (
        {"change_about": lambda about: about["unet"]["config"].update(sample_sise=1)},
        "unet.sample_sise: there is no such field; did you mean 'sample_size'?",
    ),
    "class": (
        {"change_about": lambda about: about["unet"].update({"class": "os.system"})},
        "unknown unet class 'os.sys",
    ),
    "nothing": ({"change_about": lambda about: about.pop("schedule")}, "'schedule' is missing"),
    "nonsense": (
        {"change_about": lambda about: about["unet"]["config"].update(block_out_channels="x")},
        "does not hold a usable model",
    ),
}


@pytest.mark.parametrize(("changes", "message"), MISFITS.values(), ids=MISFITS)
def test_files_that_do_not_fit(saved, tmp_path, changes, message):
    path = tmp_path / "other.safetensors"
    signed(saved, path, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        LatentDiffusion.load(path)
    assert "\n" not in str(caught.value)


def test_a_full_disk_leaves_the_old_file_as_it_was(model, saved, monkeypatch):
    before = hashlib.sha256(saved.read_bytes()).hexdigest()

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        model.save(saved)
    assert caught.value.filename == str(saved)
    assert hashlib.sha256(saved.read_bytes()).hexdigest() == before
    assert len(list(saved.parent.iterdir())) == 1


# Metrics


def test_rank_counts_only_strictly_closer_images():
    candidates = torch.tensor([[0.0, 0.0], [3.0, 0.0], [3.0, 0.0], [9.0, 9.0]])
    near = torch.tensor([2.0, 0.0])
    assert [rank(near, candidates, truth) for truth in range(4)] == [3, 1, 1, 4]


def test_thumbnail_is_the_mean_over_blocks():
    images = torch.randint(256, (3, 3, 64, 64), dtype=torch.uint8)
    expected = images.double().reshape(3, 3, 16, 4, 16, 4).mean((3, 5)).flatten(1)
    assert torch.equal(thumbnails(images), expected)


def test_evaluate(model):
    images = torch.stack([picture(seed=i).permute(2, 0, 1) for i in range(6)])
    captions = ("red apple", "green tree", "apple", "tree", "green apple", "red tree")
    held_out = torch.tensor([False, True, False, False, True, False])
    data = ImageSet(images, names=captions, captions=captions, held_out=held_out)
    metrics = evaluation.evaluate(model, data, seen=3, batch_size=4)
    assert metrics["seen_count"] == 3 and metrics["held_out_count"] == 2
    again = model.reconstruct(images[held_out].permute(0, 2, 3, 1)).double()
    error = (again - images[held_out].permute(0, 2, 3, 1)).square().mean((1, 2, 3))
    assert metrics["psnr"] == pytest.approx((10 * (255**2 / error).log10()).mean().item())
    z = model.encode(images.permute(0, 2, 3, 1)) / model.scaling_factor
    assert metrics["codebook_usage"] == len(model.first_stage.quantize(z).indices.unique()) / 32
    for group in ("seen", "held_out"):
        assert 0 <= metrics[f"{group}_top1"] <= metrics[f"{group}_top5"] <= 1
    assert "held out" in evaluation.table(metrics)
    assert json.loads(evaluation.json_line(metrics))["seen_count"] == 3


def test_evaluate_finds_the_true_images(model, monkeypatch):
    """If a model draws the true picture of each caption, every rank is 1; if it draws another's, this is not so."""
    images = torch.stack([picture(seed=i).permute(2, 0, 1) for i in range(8)])
    captions = tuple("abcdefgh")
    data = ImageSet(images, names=captions, captions=captions, held_out=torch.arange(8) % 2 == 0)

    def drawing(shift):
        def generate(prompts, **_):
            return torch.stack([images[(captions.index(p) + shift) % 8].permute(1, 2, 0) for p in prompts])

        return generate

    monkeypatch.setattr(model, "generate", drawing(0))
    metrics = evaluation.evaluate(model, data, seen=4)
    assert metrics["seen_top1"] == metrics["held_out_top1"] == 1
    monkeypatch.setattr(model, "generate", drawing(1))
    assert evaluation.evaluate(model, data, seen=4)["seen_top1"] == 0


def test_what_does_not_change_between_steps_is_computed_once(monkeypatch):
    """The context's keys and values are computed once per attention layer, the time embedding once per schedule."""
    model, computed, embedded, linears = text_model(), [], [], attention.linears
    monkeypatch.setattr(attention, "linears", lambda x, layers: computed.append(layers) or linears(x, layers))
    model.unet.time_embedding.register_forward_hook(lambda module, inputs, output: embedded.append(len(output)))
    model.generate(["red apple", "green tree"], steps=5, guidance=2.0)
    cross = [name for name, module in model.unet.named_modules() if name.endswith("attn2")]
    assert len(cross) == sum(len(layers) == 2 for layers in computed) > 0  # self-attention has three
    assert embedded == [5]
