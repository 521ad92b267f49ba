"""First stages against diffusers' classes of the same name, with the same weights, at tiny widths."""

from __future__ import annotations

import pytest
import torch
from compare import assert_same_gradients, gradients, relative_error
from torch import Tensor, nn

from ldm_fast.configs.first_stage import AutoencoderConfig, VQConfig
from ldm_fast.models.autoencoder import AutoencoderKL, VQModel
from ldm_fast.models.tiles import in_tiles

diffusers = pytest.importorskip("diffusers")

FIELDS = dict(block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, latent_channels=4, sample_size=16)
VQ_FIELDS = dict(FIELDS, num_vq_embeddings=23, legacy=True)
# Ours; diffusers' configuration is read off it, as pipelines do.
MODELS = {
    "kl": (AutoencoderKL, AutoencoderConfig(**FIELDS)),
    "kl deep": (
        AutoencoderKL,
        AutoencoderConfig(
            block_out_channels=(8, 8, 16, 16),
            layers_per_block=2,
            norm_num_groups=4,
            in_channels=4,
            out_channels=2,
            attention_levels=(3,),
        ),
    ),
    "kl attention": (AutoencoderKL, AutoencoderConfig(**FIELDS, attention_levels=(0, 1))),
    "kl attention in the decoder": (AutoencoderKL, AutoencoderConfig(**FIELDS, decoder_attention_levels=(0,))),
    "kl no mid attention": (AutoencoderKL, AutoencoderConfig(**FIELDS, mid_block_add_attention=False)),
    "kl no quant conv": (AutoencoderKL, AutoencoderConfig(**FIELDS, use_quant_conv=False, use_post_quant_conv=False)),
    "vq": (VQModel, VQConfig(**VQ_FIELDS)),
    "vq attention": (VQModel, VQConfig(**VQ_FIELDS, attention_levels=(1,))),
    "vq attention in the encoder": (
        VQModel,
        VQConfig(**VQ_FIELDS, attention_levels=(0, 1), decoder_attention_levels=()),
    ),
    "vq embed dim": (VQModel, VQConfig(**VQ_FIELDS, z_channels=6)),
    "vq no mid attention": (VQModel, VQConfig(**VQ_FIELDS, mid_block_add_attention=False)),
    "vq lookup": (VQModel, VQConfig(**VQ_FIELDS, lookup_from_codebook=True)),
}
KL = [name for name in MODELS if name.startswith("kl")]
VQ = [name for name in MODELS if name.startswith("vq") and name != "vq lookup"]
SHARED = (
    "in_channels out_channels down_block_types up_block_types block_out_channels layers_per_block act_fn "
    "latent_channels norm_num_groups sample_size scaling_factor mid_block_add_attention force_upcast"
).split()
OWN = {
    AutoencoderKL: ("shift_factor", "latents_mean", "latents_std", "use_quant_conv", "use_post_quant_conv"),
    VQModel: ("num_vq_embeddings", "vq_embed_dim", "norm_type", "lookup_from_codebook"),
}


def pair(name: str) -> tuple[nn.Module, nn.Module]:
    """Our model and diffusers', with the same random weights."""
    build, config = MODELS[name]
    torch.manual_seed(0)
    ours = build(config).eval()
    for tensor in ours.state_dict().values():
        if tensor.ndim == 1:  # norms that scale and shift
            tensor.add_(torch.randn_like(tensor) * 0.2)
    if build is VQModel:  # codes where the latents are
        with torch.no_grad():
            z = ours.encode(images(ours)).latents.movedim(1, -1).flatten(0, 2)
            ours.quantize.embedding.weight.copy_(
                z.mean(0) + z.std(0) * torch.randn(config.num_vq_embeddings, z.shape[1])
            )
    values = {field: getattr(config, field) for field in (*SHARED, *OWN[build])}
    values["latent_channels"] = config.encoder_channels
    theirs = getattr(diffusers, build.__name__)(**values).eval()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def images(model: nn.Module, size: tuple[int, int] = (16, 12), batch: int = 2) -> Tensor:
    channels = model.config.in_channels
    return torch.rand(batch, channels, *size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def latents(model: nn.Module, size: tuple[int, int] = (8, 6), batch: int = 2) -> Tensor:
    channels = model.config.latent_channels
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(1))


def encoded(model: nn.Module, x: Tensor) -> Tensor:
    """Latents, or the moments of their distribution."""
    out = model.encode(x)
    if hasattr(out, "latents"):
        return out.latents
    return torch.cat([out.latent_dist.mean, out.latent_dist.logvar], 1)


@pytest.mark.parametrize("name", MODELS)
def test_state_dict_and_config(name):
    ours, theirs = pair(name)
    mine, its = ours.state_dict(), theirs.state_dict()
    assert mine.keys() == its.keys()
    assert all(mine[key].shape == its[key].shape for key in mine)
    for field in (*SHARED, *OWN[type(ours)]):
        if field != "latent_channels":
            assert getattr(ours.config, field) == getattr(theirs.config, field), field


@pytest.mark.parametrize("size", [(16, 12), (9, 15)], ids=str)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_encode_and_decode(name, size):
    ours, theirs = pair(name)
    x = images(ours, size)
    z, wanted = encoded(ours, x), encoded(theirs, x)
    assert relative_error(z, wanted) <= 1e-5
    z = latents(ours)
    assert relative_error(ours.decode(z).sample, theirs.decode(z).sample) <= 1e-5
    assert torch.equal(ours.decode(z, return_dict=False)[0], ours.decode(z).sample)


@pytest.mark.parametrize("name", KL)
@torch.no_grad()
def test_posterior(name):
    ours, theirs = pair(name)
    x = images(ours)
    mine, its = ours.encode(x, return_dict=False)[0], theirs.encode(x, return_dict=False)[0]
    for what in ("mean", "logvar", "std", "var"):
        assert relative_error(getattr(mine, what), getattr(its, what)) <= 1e-5
    assert relative_error(mine.kl(), its.kl()) <= 1e-5
    assert relative_error(mine.mode(), its.mode()) <= 1e-5
    for seeds in (3, [4, 5]):  # diffusers' helper for several generators
        if isinstance(seeds, int):
            draws = [p.sample(torch.Generator().manual_seed(seeds)) for p in (mine, its)]
        else:
            draws = [p.sample([torch.Generator().manual_seed(s) for s in seeds]) for p in (mine, its)]
        assert relative_error(*draws) <= 1e-5
    draws = [(torch.manual_seed(6), p.sample())[1] for p in (mine, its)]
    assert relative_error(*draws) <= 1e-5
    assert relative_error(mine.nll(draws[1]), its.nll(draws[1])) <= 1e-5


@pytest.mark.parametrize("name", KL)
@torch.no_grad()
def test_forward_kl(name):
    ours, theirs = pair(name)
    x = images(ours)
    assert relative_error(ours(x).sample, theirs(x).sample) <= 1e-5
    sampled = [m(x, sample_posterior=True, generator=torch.Generator().manual_seed(2)) for m in (ours, theirs)]
    assert relative_error(sampled[0].sample, sampled[1].sample) <= 1e-5
    assert relative_error(sampled[0].sample, ours(x).sample) > 1e-2
    values = ours(x, return_dict=False)
    assert len(values) == 1 and torch.equal(values[0], ours(x)["sample"]) and torch.equal(values[0], ours(x)[0])


@pytest.mark.parametrize("name", VQ)
@torch.no_grad()
def test_quantization(name):
    ours, theirs = pair(name)
    x = images(ours)
    mine, its = ours(x), theirs(x)
    assert relative_error(mine.sample, its.sample) <= 1e-5
    assert relative_error(mine.commit_loss, its.commit_loss) <= 1e-5
    z = ours.encode(x).latents
    z_q, _, (_, _, indices) = theirs.quantize(z)
    quantized = ours.quantize(z)
    assert torch.equal(quantized.indices.flatten(), indices) and indices.unique().numel() > 5
    assert relative_error(quantized.z_q, z_q) <= 1e-6
    raw = [m.decode(z, force_not_quantize=True, return_dict=False) for m in (ours, theirs)]
    assert relative_error(raw[0][0], raw[1][0]) <= 1e-5
    assert torch.equal(raw[0][1], raw[1][1])
    for got, wanted in zip(ours(x, return_dict=False), theirs(x, return_dict=False), strict=True):
        assert relative_error(got, wanted) <= 1e-5


@torch.no_grad()
def test_decoding_indices():
    ours, theirs = pair("vq lookup")
    shape = (2, 3, 5, 4)
    indices = torch.randint(23, (30,), generator=torch.Generator().manual_seed(0))
    got, wanted = (m.decode(indices, force_not_quantize=True, shape=shape).sample for m in (ours, theirs))
    assert got.shape == (2, 3, 6, 10)
    assert relative_error(got, wanted) <= 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_gradients(name):
    ours, theirs = pair(name)
    x = images(ours, (8, 12))

    def output(model: nn.Module) -> Tensor:
        z = encoded(model, x)
        half = z[:, : model.decoder.conv_in.in_channels] if name in KL else z
        out = model.decode(half)
        parts = [z, out.sample] if name in KL else [z, out.sample, 100 * out.commit_loss]
        return torch.cat([part.flatten() for part in parts])

    wanted = gradients(theirs, output(theirs))
    assert len(wanted) == len(list(theirs.parameters()))
    assert_same_gradients(gradients(ours, output(ours)), wanted)


@pytest.mark.parametrize("name", MODELS)
def test_gradient_checkpointing(name):
    """The same numbers from fewer tensors kept for the backward pass."""
    ours, _ = pair(name)
    x = images(ours, (8, 12))
    kept, results = [], []
    for switch in (ours.disable_gradient_checkpointing, ours.enable_gradient_checkpointing):
        switch()
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: (sizes.append(t.numel()), t)[1], lambda t: t
        ):
            out = ours(x).sample
        kept.append(sum(sizes))
        results.append(gradients(ours, out))
    assert kept[1] < kept[0] / 2
    assert_same_gradients(results[1], results[0], 1e-6)


def their_tiling(model: nn.Module, ours: nn.Module) -> None:
    model.enable_tiling()
    for field in ("tile_sample_min_size", "tile_latent_min_size", "tile_overlap_factor"):
        setattr(model, field, getattr(ours, field))


@pytest.mark.parametrize("overlap", [0.25, 0.5, 0.0])
@pytest.mark.parametrize("size", [(40, 16), (34, 50), (19, 31)], ids=str)
@torch.no_grad()
def test_tiling(size, overlap):
    ours, theirs = pair("kl")
    assert (theirs.tile_sample_min_size, theirs.tile_latent_min_size) == (16, 8)
    ours.tile_overlap_factor = overlap
    ours.enable_tiling()
    their_tiling(theirs, ours)
    x, z = images(ours, size), latents(ours, (size[0] // 2, size[1] // 2))
    mine, its = encoded(ours, x), encoded(theirs, x)
    assert relative_error(mine, its) <= 1e-5
    tiled = ours.decode(z).sample
    assert relative_error(tiled, theirs.decode(z).sample) <= 1e-5
    ours.disable_tiling()
    whole = ours.decode(z).sample
    assert tiled.shape == whole.shape and relative_error(tiled, whole) > 1e-3


@torch.no_grad()
def test_tiling_of_a_codebook():
    """diffusers has none for VQModel. The latent is quantized as a whole; an image of one tile is not tiled at all."""
    ours, _ = pair("vq")
    x = images(ours, (32, 24))
    z = ours.encode(x).latents
    wanted = in_tiles(ours._decode_whole, ours.quantize(z).z_q, size=8, out_size=16, overlap=0.25)
    small = ours.decode(z[..., :8, :8]).sample
    ours.enable_tiling()
    assert torch.equal(ours.decode(z).sample, wanted) and wanted.shape == x.shape
    assert torch.equal(ours.decode(z[..., :8, :8]).sample, small)


def test_tiles_that_do_not_advance():
    ours, _ = pair("kl")
    ours.enable_tiling()
    ours.tile_overlap_factor = 1.0
    with pytest.raises(ValueError, match=r"tiling: tiles of 16 \(output 8\) that overlap by 1.0"):
        ours.encode(images(ours, (32, 32)))


@pytest.mark.parametrize("name", ["kl", "vq"])
@torch.no_grad()
def test_slicing(name):
    ours, theirs = pair(name)
    ours.enable_slicing()
    seen = []
    for part in (ours.encoder, ours.decoder):
        part.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    x = images(ours, batch=3)
    assert relative_error(encoded(ours, x), encoded(theirs, x)) <= 1e-5
    z = latents(ours, batch=3)
    assert relative_error(ours.decode(z).sample, theirs.decode(z).sample) <= 1e-5
    assert seen == [1] * 6
    ours.disable_slicing()
    ours.encode(x)
    assert seen[6:] == [3]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["kl", "kl attention", "vq"])
@torch.no_grad()
def test_half_precision(name, dtype):
    """At most twice the error of diffusers in the same precision, against float32 on the same rounded weights."""
    ours, theirs = pair(name)
    x, z = (t.to(dtype) for t in (images(ours), latents(ours)))
    ours.to(dtype), theirs.to(dtype)
    raw = {} if name in KL else {"force_not_quantize": True}
    got = encoded(ours, x), ours.decode(z, **raw).sample
    peers = encoded(theirs, x), theirs.decode(z, **raw).sample
    theirs.float()
    exact = encoded(theirs, x.float()), theirs.decode(z.float(), **raw).sample
    for mine, peer, wanted in zip(got, peers, exact, strict=True):
        assert mine.dtype == dtype and mine.isfinite().all()
        assert relative_error(mine, wanted) <= 2 * relative_error(peer, wanted)
    assert ours.dtype == dtype and ours.decode(z).sample.dtype == dtype


@torch.no_grad()
def test_upcast_as_pipelines_do_it():
    """float16 weights, decoding in float32, and back: the lines of the SDXL pipeline."""
    vae, theirs = pair("kl")
    vae.half(), theirs.half()
    for model in (vae, theirs):
        assert model.dtype == torch.float16 and model.config.force_upcast
    z, outputs = latents(vae).half(), []
    for model in (vae, theirs):
        model.to(dtype=torch.float32)
        outputs.append(model.decode(z.to(next(iter(model.post_quant_conv.parameters())).dtype), return_dict=False)[0])
        model.to(dtype=torch.float16)
    assert outputs[0].dtype == torch.float32 and vae.dtype == torch.float16
    assert relative_error(*outputs) <= 1e-5


@pytest.mark.parametrize("name", ["kl attention", "vq"])
@torch.no_grad()
def test_channels_last(name):
    ours, theirs = pair(name)
    ours.to(memory_format=torch.channels_last)
    x = images(ours).contiguous(memory_format=torch.channels_last)
    assert relative_error(encoded(ours, x), encoded(theirs, x)) <= 1e-5
    z = latents(ours).contiguous(memory_format=torch.channels_last)
    assert relative_error(ours.decode(z).sample, theirs.decode(z).sample) <= 1e-5


@pytest.mark.parametrize("name", ["kl attention", "vq"])
@torch.no_grad()
def test_compile(name):
    """One graph each of encoding and decoding, quantization included."""
    ours, _ = pair(name)
    x, z = images(ours), latents(ours)
    wanted = encoded(ours, x), ours.decode(z).sample
    torch._dynamo.reset()
    encode, decode = (torch.compile(f, fullgraph=True, backend="aot_eager") for f in (ours.encode, ours.decode))
    out = encode(x)
    got = out.latents if name == "vq" else torch.cat([out.latent_dist.mean, out.latent_dist.logvar], 1)
    assert relative_error(got, wanted[0]) <= 1e-5
    assert relative_error(decode(z).sample, wanted[1]) <= 1e-5


def test_offloading_moves_the_model_before_encode_and_decode():
    """accelerate's hook runs before them as it does before forward (diffusers: enable_model_cpu_offload)."""
    hooks = pytest.importorskip("accelerate.hooks")

    class Count(hooks.ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            Count.calls += 1
            return args, kwargs

    for name in ("kl", "vq"):
        Count.calls = 0
        ours, _ = pair(name)
        hooks.add_hook_to_module(ours, Count())
        ours.encode(images(ours))
        ours.decode(latents(ours))
        assert Count.calls == 2
