"""First stages: fast code against the reference, half precision, sizes, the two regularisations and their losses."""

from __future__ import annotations

import copy
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from _eager import eager_ops
from compare import assert_same_gradients, gradients, relative_error
from torch import Tensor
from torch.distributions import Normal, kl_divergence

import ldm_fast
from ldm_fast.configs.first_stage import AutoencoderConfig, VQConfig
from ldm_fast.models.autoencoder import AutoencoderKL, VQModel
from ldm_fast.models.regularisation import DiagonalGaussian, VectorQuantizer

SMALL = dict(block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, latent_channels=3)
MODELS = {
    "kl": lambda: AutoencoderKL(AutoencoderConfig(**SMALL, attention_levels=(1,), z_channels=5)),
    "vq": lambda: VQModel(VQConfig(**SMALL, num_vq_embeddings=13)),
    "vq-noattn": lambda: VQModel(VQConfig(**SMALL, num_vq_embeddings=13, mid_block_add_attention=False)),
}
SIZES = ((8, 8), (18, 22), (2, 6))


def make(name: str) -> AutoencoderKL | VQModel:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    if isinstance(model, VQModel):  # spread as wide as the latents, so that many codes are in use
        torch.nn.init.normal_(model.quantize.embedding.weight)
    return model


def images(batch: int = 2, size: tuple[int, int] = (8, 8), channels: int = 3) -> Tensor:
    return torch.rand(batch, channels, *size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def reconstruct(model: AutoencoderKL | VQModel, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the reconstruction (from the mode) and the loss of the regularisation."""
    out = model(x)
    if isinstance(model, VQModel):
        return out.sample, out.commit_loss
    return out.sample, out.regulariser.kl()


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_fast_equals_reference(name, size):
    model, x = make(name), images(size=size).requires_grad_()
    fast, fast_loss = reconstruct(model, x)
    with ldm_fast.use_impl("reference"):
        reference, loss = reconstruct(model, x)
        wanted = gradients(model, torch.cat([reference.flatten(), loss.flatten()]), x)
    assert fast.shape == x.shape
    assert relative_error(fast, reference) <= 1e-5
    assert relative_error(fast_loss, loss) <= 1e-5
    assert_same_gradients(gradients(model, torch.cat([fast.flatten(), fast_loss.flatten()]), x), wanted)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_float64_agrees_with_plain_pytorch(name):
    model, x = make(name).double(), images(size=(10, 14)).double()
    ours = reconstruct(model, x)
    with eager_ops():
        plain = reconstruct(model, x)
    for got, wanted in zip(ours, plain, strict=True):
        assert relative_error(got, wanted) <= 1e-6  # the reference's softmax is float32


@pytest.mark.parametrize("impl", [None, "reference"], ids=["best", "reference"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_bfloat16_error(name, impl):
    """Against float64 on the same rounded weights and inputs, the error is at most twice that of eager PyTorch.

    Decoding skips the quantizer: a single latent that rounds to another code would dominate the comparison.
    """
    model, x = make(name).bfloat16(), images(4, (32, 32)).bfloat16()
    z = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)).bfloat16()

    def both(x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(model, VQModel):
            return model.encode(x).latents, model.decode(z, force_not_quantize=True).sample
        return model.encode(x).latent_dist.mean, model.decode(z).sample

    with ldm_fast.use_impl(impl):
        ours = both(x, z)
    with eager_ops():
        eager = both(x, z)
        model.double()
        exact = both(x.double(), z.double())
    for got, peer, wanted in zip(ours, eager, exact, strict=True):
        assert got.dtype == torch.bfloat16
        assert relative_error(got, wanted) <= 2 * relative_error(peer, wanted)


@pytest.mark.parametrize("m", range(5))
@pytest.mark.parametrize("kind", ["kl", "vq"])
@torch.no_grad()
def test_every_downsampling_factor(kind, m):
    fields = dict(block_out_channels=(8,) * (m + 1), layers_per_block=1, norm_num_groups=4, latent_channels=2)
    model = AutoencoderKL(AutoencoderConfig(**fields)) if kind == "kl" else VQModel(VQConfig(**fields))
    assert model.config.downsampling_factor == 2**m
    x = images(size=(32, 48))
    z = model.encode_latents(x)
    assert z.shape == (2, 2, 32 // 2**m, 48 // 2**m)
    assert model.decode(z).sample.shape == x.shape
    assert model(x).sample.shape == x.shape


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_channels_last_gives_the_same_numbers(name):
    model, x = make(name), images(size=(18, 22))
    wanted, _ = reconstruct(model, x)
    assert relative_error(reconstruct(model, x.contiguous(memory_format=torch.channels_last))[0], wanted) <= 1e-5


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch(name):
    model, x = make(name), images(3)
    together, _ = reconstruct(model, x)
    for i in range(3):
        assert relative_error(reconstruct(model, x[i : i + 1])[0], together[i : i + 1]) <= 2e-6


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_counts(name):
    model, x = make(name), images(size=(16, 16)).requires_grad_()
    found = gradients(model, torch.cat([t.flatten() for t in reconstruct(model, x)]), x)
    assert len(found) == len(list(model.parameters())) + 1
    assert not [n for n, g in found.items() if not g.any() and not n.endswith("to_k.bias")]


@pytest.mark.parametrize(
    "name, call, message",
    [
        ("kl", lambda m: m.encode(images(channels=4)), r"AutoencoderKL: x must be \(B, 3, H, W\), got \(2, 4, 8, 8\)"),
        ("vq", lambda m: m(images()[0]), r"VQModel: x must be \(B, 3, H, W\), got \(3, 8, 8\)"),
        ("vq", lambda m: m.encode_latents(images(channels=1)), r"VQModel: x must be"),
        ("kl", lambda m: m.decode(torch.zeros(2, 4, 4, 4)), r"AutoencoderKL: z must be \(B, 3, h, w\), got"),
        ("vq", lambda m: m.decode(torch.zeros(3, 4, 4)), r"VQModel: z must be \(B, 3, h, w\), got \(3, 4, 4\)"),
    ],
)
def test_errors(name, call, message):
    with pytest.raises(ValueError, match=message):
        call(make(name))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"block_out_channels": (30,)}, "norm_num_groups 32 must divide 30"),
        ({"attention_levels": (4,)}, "attention_levels has no level 4"),
        ({"z_channels": 7, "use_quant_conv": False}, "z_channels 7 is not latent_channels .: use_quant_conv"),
        ({"norm_num_groups": 0}, "norm_num_groups must be a positive number, got 0"),
        ({"latent_channels": -1}, "latent_channels must be a positive number, got -1"),
        ({"layers_per_block": 1.5}, "layers_per_block must be a positive number, got 1.5"),
    ],
)
def test_config_errors(fields, message):
    for config in (AutoencoderConfig, VQConfig):
        with pytest.raises(ValueError, match=f"{config.__name__}: {message}"):
            config(**fields)


def test_an_empty_codebook_is_refused():
    with pytest.raises(ValueError, match="VQConfig: num_vq_embeddings must be a positive number, got 0"):
        VQConfig(num_vq_embeddings=0)


# KL-reg


def test_gaussian_agrees_with_torch_distributions():
    moments = torch.randn(2, 6, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    posterior = DiagonalGaussian(moments)
    normal = Normal(posterior.mean, posterior.logvar.exp().sqrt())
    z = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(posterior.kl(), kl_divergence(normal, Normal(0.0, 1.0)).flatten(1).sum(1))
    torch.testing.assert_close(posterior.nll(z), -normal.log_prob(z).flatten(1).sum(1))
    torch.testing.assert_close(posterior.std, normal.stddev)
    torch.testing.assert_close(posterior.var, normal.variance)
    assert torch.equal(posterior.mode(), moments[:, :3])


def test_gaussian_samples():
    posterior = DiagonalGaussian(torch.cat([torch.full((1, 1, 200, 200), 3.0), torch.full((1, 1, 200, 200), -2.0)], 1))
    z = posterior.sample(torch.Generator().manual_seed(0))
    assert float(z.mean()) == pytest.approx(3, abs=0.01)
    assert float(z.std()) == pytest.approx(math.exp(-1), abs=0.01)
    assert torch.equal(z, posterior.sample(torch.Generator().manual_seed(0)))
    assert not torch.equal(z, posterior.sample(torch.Generator().manual_seed(1)))


def test_gaussian_stays_finite():
    """The moments may come from an untrained or diverging encoder: the log-variance is clamped to [-30, 20]."""
    for logvar, clamped in ((-1e4, -30.0), (1e4, 20.0)):
        posterior = DiagonalGaussian(torch.tensor([0.0, logvar]).reshape(1, 2, 1, 1))
        assert float(posterior.logvar) == clamped
        assert posterior.kl().isfinite().all() and posterior.nll(torch.ones(1, 1, 1, 1)).isfinite().all()


def test_kl_model_samples_what_the_second_stage_learns():
    model, x = make("kl"), images()
    z = model.encode_latents(x, torch.Generator().manual_seed(3))
    torch.testing.assert_close(z, model.encode(x).latent_dist.sample(torch.Generator().manual_seed(3)))
    out = model(x, sample_posterior=True, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(out.sample, model.decode(z).sample)
    assert not torch.allclose(z, out.regulariser.mode())


def test_every_sample_of_a_batch_can_have_its_own_generator():
    posterior = make("kl").encode(images(3)).latent_dist
    z = posterior.sample([torch.Generator().manual_seed(i) for i in range(3)])
    for i in range(3):
        alone = DiagonalGaussian(torch.cat([posterior.mean, posterior.logvar], 1)[i : i + 1])
        assert torch.equal(z[i : i + 1], alone.sample(torch.Generator().manual_seed(i)))
    with pytest.raises(ValueError, match="2 generators for a batch of 3"):
        posterior.sample([torch.Generator()] * 2)


# VQ-reg


def quantizer(codes: list[list[float]], **fields) -> VectorQuantizer:
    codes = torch.tensor(codes)
    module = VectorQuantizer(*codes.shape, **fields)
    with torch.no_grad():
        module.embedding.weight.copy_(codes)
    return module


def vectors(*rows: list[float]) -> Tensor:
    """Return latents (1, d, 1, N) that hold the rows."""
    return torch.tensor(rows).T[None, :, None].contiguous()


CODES = [[0.0, 0.0], [2.0, 0.0], [0.0, 4.0], [9.0, 9.0]]


def test_quantizer_takes_the_nearest_codes():
    out = quantizer(CODES)(vectors([0.4, 0.1], [1.5, -1.0], [0.5, 0.0], [0.0, 3.0]))
    assert out.indices.shape == (1, 1, 4) and out.indices.dtype == torch.int64
    assert out.indices.flatten().tolist() == [0, 1, 0, 2]
    torch.testing.assert_close(out.z_q, vectors([0.0, 0.0], [2.0, 0.0], [0.0, 0.0], [0.0, 4.0]))
    assert out.counts.tolist() == [2, 1, 1, 0] and float(out.usage) == 0.75
    assert float(out.perplexity) == pytest.approx(math.exp(0.5 * math.log(2) + 0.5 * math.log(4)))  # p = 1/2, 1/4, 1/4


def test_straight_through_gradient():
    """The decoder's gradient passes to the encoder unchanged, and does not reach the codebook."""
    module, z = quantizer(CODES), vectors([0.4, 0.1], [1.5, -1.0]).requires_grad_()
    direction = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
    (module(z).z_q * direction).sum().backward()
    assert torch.equal(z.grad, direction)
    assert module.embedding.weight.grad is None or not module.embedding.weight.grad.any()


@pytest.mark.parametrize("weight", [0.25, 2.0])
@pytest.mark.parametrize("legacy", [False, True])
def test_losses_by_hand(legacy, weight):
    """The loss is that of van den Oord et al., eq. 3, as means over all N d entries: ‖sg[z] - e‖² + β ‖z - sg[e]‖².

    The published code (`legacy`) has β on the other term. Both terms have the same value; only their gradients differ.
    """
    module = quantizer(CODES, legacy=legacy, commitment_weight=weight)
    z = vectors([0.4, 0.1], [1.5, -1.0], [0.5, 0.0]).requires_grad_()
    loss = module(z).loss
    loss.backward()
    differences = torch.tensor([[0.4, 0.1], [-0.5, -1.0], [0.5, 0.0]])  # z - e, for codes 0, 1, 0
    on_codebook, on_encoder = (weight, 1.0) if legacy else (1.0, weight)
    assert float(loss.detach()) == pytest.approx((1 + weight) * float(differences.square().sum()) / 6)
    torch.testing.assert_close(z.grad[0, :, 0].T, on_encoder * 2 / 6 * differences)
    of_code_0 = differences[0] + differences[2]
    wanted = torch.stack([of_code_0, differences[1], torch.zeros(2), torch.zeros(2)])
    torch.testing.assert_close(module.embedding.weight.grad, -on_codebook * 2 / 6 * wanted)


def test_moving_averages_by_hand():
    """The codes are those of van den Oord et al., appendix A.1: e = m / N, both moving averages; N starts at one."""
    module, decay = quantizer(CODES, ema_decay=0.75), 0.75
    steps = ([[0.4, 0.1], [1.5, -1.0], [0.5, 0.0]], [[2.5, 1.0], [0.0, 5.0], [0.0, 3.0]], [[0.0, 3.5]])
    means, counts = torch.tensor(CODES, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    for rows in steps:
        shown = torch.tensor(rows, dtype=torch.float64)
        codes = module.embedding.weight.detach().clone()
        chosen = torch.cdist(shown, codes.double()).argmin(1)
        out = module(vectors(*rows))
        assert out.indices.flatten().tolist() == chosen.tolist()
        torch.testing.assert_close(out.z_q[0, :, 0].T, codes[chosen])  # the codes before the step
        one_hot = torch.nn.functional.one_hot(chosen, 4).double()
        means = decay * means + (1 - decay) * one_hot.T @ shown
        counts = decay * counts + (1 - decay) * one_hot.sum(0)
        torch.testing.assert_close(module.embedding.weight.double(), means / counts[:, None], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(module.ema_counts.double(), counts, rtol=1e-6, atol=0)
    assert module.embedding.weight[3].tolist() == CODES[3]  # no vector chose it


def test_moving_averages_learn_only_in_training_mode():
    module, z = quantizer(CODES, ema_decay=0.5).eval(), vectors([0.4, 0.1], [1.5, -1.0])
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    assert before.keys() == {"embedding.weight", "ema_counts"}
    evaluated = module(z)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    trained = module.train()(z)
    assert torch.equal(trained.z_q, evaluated.z_q)
    assert not any(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize(("legacy", "on_encoder"), [(False, 2.0), (True, 1.0)])
def test_moving_averages_leave_the_commitment_loss(legacy, on_encoder):
    module = quantizer(CODES, legacy=legacy, commitment_weight=2.0, ema_decay=0.99)
    z = vectors([0.4, 0.1], [1.5, -1.0], [0.5, 0.0]).requires_grad_()
    loss = module(z).loss
    loss.backward()
    differences = torch.tensor([[0.4, 0.1], [-0.5, -1.0], [0.5, 0.0]])
    assert float(loss.detach()) == pytest.approx(on_encoder * float(differences.square().sum()) / 6)
    torch.testing.assert_close(z.grad[0, :, 0].T, on_encoder * 2 / 6 * differences)
    assert module.embedding.weight.grad is None and not module.embedding.weight.requires_grad


def test_moving_averages_find_the_clusters():
    """A code that is chosen goes to the mean of its vectors, even if it was not chosen for a long time."""
    module, z = quantizer([[1.0, 1.0], [9.0, 1.0], [1.0, 9.0], [99.0, 99.0]], ema_decay=0.9), clusters()
    for _ in range(100):
        module(z.T[None, :, None])
    codes = module.embedding.weight
    assert codes[3].tolist() == [99.0, 99.0] and float(module.ema_counts[3]) == pytest.approx(0.9**100)
    assert (
        module.revive_dead_codes(torch.tensor([[11.0, 9.0]]), module(z.T[None, :, None]).counts, torch.Generator()) == 1
    )
    assert float(module.ema_counts[3]) == 1
    for _ in range(100):
        out = module(z.T[None, :, None])
    assert float(out.usage) == 1
    for code in range(4):
        torch.testing.assert_close(codes[code], z[out.indices.flatten() == code].mean(0), rtol=0, atol=1e-3)


def test_moving_averages_start_at_k_means():
    module, z = quantizer([[0.0, 0.0]] * 4, ema_decay=0.9), clusters()
    module.ema_counts.fill_(7)
    module.init_from_data(z, torch.Generator().manual_seed(0))
    assert module.ema_counts.tolist() == [1] * 4
    settled = module.embedding.weight.clone()
    module(z.T[None, :, None])
    torch.testing.assert_close(module.embedding.weight, settled, rtol=0, atol=1e-4)


@pytest.mark.parametrize("decay", [-0.1, 1.0, 2.0])
def test_decay_outside_its_range_is_refused(decay):
    with pytest.raises(ValueError, match=f"ema_decay must be in \\[0, 1\\), got {decay}"):
        VectorQuantizer(4, 2, ema_decay=decay)


def _one_of_two(rank, folder):
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    module = quantizer(CODES, ema_decay=0.75)
    module(vectors([0.4, 0.1], [1.5, -1.0]) if rank == 0 else vectors([0.5, 0.0]))
    torch.save(module.state_dict(), folder / f"{rank}.pt")
    torch.distributed.barrier()  # PyTorch 2.6 may wait forever in the next line for a process that has already left
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
def test_moving_averages_are_those_of_all_processes(tmp_path):
    torch.multiprocessing.spawn(_one_of_two, (tmp_path,), nprocs=2)
    whole = quantizer(CODES, ema_decay=0.75)
    whole(vectors([0.4, 0.1], [1.5, -1.0], [0.5, 0.0]))
    for rank in range(2):
        state = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, tensor in whole.state_dict().items():
            torch.testing.assert_close(state[name], tensor, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("decay", [None, 0.9])
def test_a_quantizer_compiles(decay):
    """A quantizer compiles into one graph, which gives the same result."""
    modules = [quantizer(CODES, ema_decay=decay) for _ in range(2)]
    compiled = torch.compile(modules[1], fullgraph=True, backend="aot_eager")
    for rows in ([[0.4, 0.1], [1.5, -1.0]], [[2.5, 1.0], [0.0, 5.0]]):
        z = vectors(*rows).requires_grad_()
        wanted, got = modules[0](z), compiled(z)
        assert torch.equal(wanted.indices, got.indices) and torch.equal(wanted.loss, got.loss)
        torch.testing.assert_close(modules[0].embedding.weight, modules[1].embedding.weight)


def test_dead_codes_restart_at_data():
    module = quantizer(CODES)
    z = torch.tensor([[5.0, 6.0], [7.0, 8.0], [1.0, 1.0]])
    assert module.revive_dead_codes(z, torch.tensor([3, 0, 1, 0]), torch.Generator().manual_seed(0)) == 2
    codes = module.embedding.weight.detach()
    assert codes[0].tolist() == CODES[0] and codes[2].tolist() == CODES[2]
    revived = {tuple(c) for c in codes[[1, 3]].tolist()}
    assert len(revived) == 2 and revived <= {tuple(row) for row in z.tolist()}
    before = codes.clone()
    assert module.revive_dead_codes(z, torch.ones(4), torch.Generator()) == 0
    assert torch.equal(module.embedding.weight, before)


def test_more_dead_codes_than_data():
    module = quantizer(CODES)
    assert module.revive_dead_codes(torch.tensor([[5.0, 6.0]]), torch.zeros(4), torch.Generator()) == 4
    assert module.embedding.weight.tolist() == [[5.0, 6.0]] * 4


def clusters() -> Tensor:
    """400 vectors around four points that are far apart."""
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])
    return (centres + 0.1 * torch.randn(100, 4, 2, generator=torch.Generator().manual_seed(0))).reshape(-1, 2)


def test_k_means_finds_the_clusters():
    """Every code ends up in use and near the mean of its vectors; the error is below that of one code per cluster."""
    z, module = clusters(), quantizer([[50.0, 50.0]] * 16)
    module.init_from_data(z, torch.Generator().manual_seed(0))
    codes = module.embedding.weight.detach()
    indices = ldm_fast.ops.nearest_codebook(z, codes)
    assert indices.unique().numel() == 16
    assert float((codes[indices] - z).square().sum(1).mean()) < 2 * 0.1**2
    for code in range(16):
        torch.testing.assert_close(codes[code], z[indices == code].mean(0), rtol=0, atol=0.05)


def test_k_means_leaves_no_code_without_vectors():
    """On these twelve points of very different weight, plain Lloyd iterations would leave one of five cells empty."""
    generator = torch.Generator().manual_seed(231)
    points = torch.randn(12, 2, generator=generator)
    z = points.repeat_interleave((10 ** (3 * torch.rand(12, generator=generator))).long(), 0)
    module = quantizer([[0.0, 0.0]] * 5)
    module.init_from_data(z, torch.Generator().manual_seed(0))
    assert ldm_fast.ops.nearest_codebook(z, module.embedding.weight.detach()).unique().numel() == 5


def test_k_means_repeats_with_its_seed():
    z, results = clusters(), []
    for seed in (0, 0, 1):
        module = quantizer([[0.0, 0.0]] * 8)
        module.init_from_data(z, torch.Generator().manual_seed(seed))
        results.append(module.embedding.weight.detach().clone())
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_vq_decode_quantizes_unless_told_not_to():
    model, x = make("vq"), images()
    latents = model.encode(x).latents
    assert torch.equal(model.encode_latents(x), latents)
    out = model(x)
    torch.testing.assert_close(model.decode(latents).sample, out.sample)
    torch.testing.assert_close(model.decode(out.regulariser.z_q, force_not_quantize=True).sample, out.sample)
    assert not torch.allclose(model.decode(latents, force_not_quantize=True).sample, out.sample)


def upcast_decode(model: AutoencoderKL | VQModel, z: Tensor) -> Tensor:
    with torch.no_grad(), model.upcast() as dtype:
        return model.decode(z.to(dtype)).sample


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_upcast_computes_with_the_float16_weights_in_float32(name):
    model = make(name).half()
    wide, x, z = copy.deepcopy(model).float(), images(), torch.randn(2, 3, 4, 5)
    model.config = replace(model.config, force_upcast=True)
    assert torch.equal(upcast_decode(model, z), wide.decode(z).sample)
    with model.upcast() as dtype:
        got = model.encode_latents(x.to(dtype), generator=torch.Generator().manual_seed(0))
    assert torch.equal(got, wide.encode_latents(x, generator=torch.Generator().manual_seed(0)))
    assert model.decode(z.half()).sample.dtype == torch.float16  # the upcast has ended
    model.config = replace(model.config, force_upcast=False)
    assert upcast_decode(model, z).dtype == torch.float16


@pytest.mark.parametrize("name", ["kl", "vq"])
def test_two_threads_decode_one_float16_model(name):
    """Each thread decodes a hundred pictures, and all equal those decoded one after the other."""
    model = make(name).half()
    model.config = replace(model.config, force_upcast=True)
    model.join_projections()
    latents = [torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    wanted = [upcast_decode(model, z) for z in latents]
    together = threading.Barrier(2)

    def decode(first: int) -> list[Tensor]:
        together.wait()
        return [upcast_decode(model, latents[(first + i) % 4]) for i in range(100)]

    with ThreadPoolExecutor(2) as pool:
        for first, pictures in enumerate(pool.map(decode, range(2))):
            assert all(torch.equal(picture, wanted[(first + i) % 4]) for i, picture in enumerate(pictures))


def test_tiling_is_switched_by_an_argument_too():
    """`enable_tiling` takes `use_tiling`, as it did in diffusers."""
    model = make("kl")
    for given in (False, True):
        model.enable_tiling(given)
        assert model.use_tiling is given
    model.disable_tiling()
    model.enable_tiling()
    assert model.use_tiling
