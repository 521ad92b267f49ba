"""Large images in bands: `encode` and `decode` with `tile=…` give the result of the whole image, in less memory."""

from __future__ import annotations

import pytest
import torch
from test_autoencoder import MODELS, images, make
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from ldm_fast.configs.first_stage import AutoencoderConfig
from ldm_fast.models.autoencoder import AutoencoderKL, VQModel
from ldm_fast.models.bands import Bands

SIZES = ((8, 8), (9, 7), (1, 5), (23, 3))  # of the latent
IMAGES = ((32, 32), (33, 29), (20, 41), (64, 6))


def latent(size: tuple[int, int], batch: int = 1) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0))


def decode(model: AutoencoderKL | VQModel, z: Tensor, **kwargs: int) -> Tensor:
    """Decode without the quantizer, which would hide small differences and exaggerate others."""
    plain = {"force_not_quantize": True} if isinstance(model, VQModel) else {}
    return model.decode(z, **plain, **kwargs).sample


def encode(model: AutoencoderKL | VQModel, x: Tensor, **kwargs: int) -> Tensor:
    out = model.encode(x, **kwargs)
    return out.latents if isinstance(model, VQModel) else torch.cat([out.latent_dist.mean, out.latent_dist.logvar], 1)


def deep(**fields: object) -> AutoencoderKL:
    """Return a model with three levels and several blocks, so that bands are split and halved more than once."""
    torch.manual_seed(0)
    shape = dict(block_out_channels=(8, 16, 16), layers_per_block=2, norm_num_groups=4, latent_channels=3)
    return AutoencoderKL(AutoencoderConfig(**{"attention_levels": (1,), **shape, **fields})).eval()


def model_called(name: str) -> AutoencoderKL | VQModel:
    return deep() if name == "deep" else make(name)


def assert_same(got: Tensor, wanted: Tensor) -> None:
    assert (got.shape, got.dtype, got.stride()) == (wanted.shape, wanted.dtype, wanted.stride())
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("tile", (1, 2, 3, 64))
@pytest.mark.parametrize("name", (*MODELS, "deep"))
@torch.no_grad()
def test_decoding_in_bands_equals_decoding_the_whole(name: str, tile: int) -> None:
    model = model_called(name)
    for size in SIZES:
        z = latent(size)
        assert_same(decode(model, z, tile=tile), decode(model, z))


@pytest.mark.parametrize("tile", (1, 2, 3, 64))
@pytest.mark.parametrize("name", (*MODELS, "deep"))
@torch.no_grad()
def test_encoding_in_bands_equals_encoding_the_whole(name: str, tile: int) -> None:
    model = model_called(name)
    for size in IMAGES:
        x = images(1, size)
        assert_same(encode(model, x, tile=tile), encode(model, x))


@torch.no_grad()
def test_a_batch_and_other_layouts() -> None:
    model, z, x = deep(), latent((9, 7), batch=3), images(3, (36, 28))
    for layout in (torch.contiguous_format, torch.channels_last):
        assert_same(decode(model, z.contiguous(memory_format=layout), tile=2), decode(model, z))
        assert_same(encode(model, x.contiguous(memory_format=layout), tile=2), encode(model, x))


@torch.no_grad()
def test_bfloat16() -> None:
    model, z = deep().bfloat16(), latent((12, 8)).bfloat16()
    banded, whole = decode(model, z, tile=2), decode(model, z)
    exact = decode(model.double(), z.double())
    assert banded.dtype == torch.bfloat16
    assert (banded - exact).norm() <= 1.5 * (whole - exact).norm()


@torch.no_grad()
def test_enable_tiling_does_not_give_what_bands_give() -> None:
    """What it gives is far from the whole, so the tests above can tell the two apart; `tile` takes precedence."""
    model, z = deep(), latent((12, 12))
    whole = decode(model, z)
    model.enable_tiling()
    model.tile_latent_min_size, model.tile_sample_min_size = 4, 16
    assert (decode(model, z) - whole).abs().max() > 1e-2 * whole.abs().max()
    assert_same(decode(model, z, tile=4), whole)


class LiveBytes(TorchDispatchMode):
    """Records the most bytes of results that were alive after any op."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.alive = {key: (ref, size) for key, (ref, size) in self.alive.items() if not ref.expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return result


@torch.no_grad()
def test_memory_is_two_maps_and_some_bands() -> None:
    """Two maps with the last level's 8 channels, or one with the 16 that enter it, have to be kept in any case."""
    model, z, x = deep(attention_levels=()), latent((64, 64)), images(1, (256, 256))
    two_maps = 2 * 8 * 256 * 256 * 4
    for function in (lambda **tile: decode(model, z, **tile), lambda **tile: encode(model, x, **tile)):
        with LiveBytes() as whole:
            function()
        with LiveBytes() as banded:
            function(tile=32)  # bands of 16 rows and two rims
        assert whole.peak >= 2.4 * two_maps
        assert two_maps <= banded.peak <= 1.5 * two_maps


@pytest.mark.parametrize("multiple", (1, 4))
@pytest.mark.parametrize("pixels", (1, 30, 64, 10**6))
@pytest.mark.parametrize("height", (1, 5, 16, 23))
def test_bands_cover_the_image(height: int, pixels: int, multiple: int) -> None:
    x = images(1, (height, 6))
    bands = Bands.cut(x, pixels, multiple)
    rows = [bands.own(i).shape[2] for i in range(len(bands.parts))]
    assert sum(rows) == height and all(count % multiple == 0 and count > 0 for count in rows[:-1])
    assert max(rows[:-1], default=0) <= max(multiple, pixels // 6)
    assert torch.equal(bands.joined(), x)
    before = [part.clone() for part in bands.parts]
    for part in bands.parts:
        assert part.data_ptr() != x.data_ptr(), "bands are written to, so they must not be the image itself"
    for i in range(1, len(rows)):
        bands.parts[i][:, :, 0] = bands.parts[i - 1][:, :, -1] = float("nan")
    bands.update_rims()
    assert all(torch.equal(a, b) for a, b in zip(bands.parts, before, strict=True))


@pytest.mark.parametrize("tile", (0, -3, 2.0, "64"))
def test_bad_tiles(tile: object) -> None:
    model = make("kl")
    for method, argument in (("decode", latent((4, 4))), ("encode", images())):
        with pytest.raises(ValueError, match=f"AutoencoderKL.{method}: tile must be a number of latents"):
            getattr(model, method)(argument, tile=tile)


def test_no_gradients_in_bands() -> None:
    model, z = make("vq"), latent((4, 4)).requires_grad_()
    with pytest.raises(ValueError, match="VQModel.decode: tile=2 gives no gradients"):
        model.decode(z, tile=2)
    with torch.no_grad():
        assert not model.decode(z, tile=2).sample.requires_grad
