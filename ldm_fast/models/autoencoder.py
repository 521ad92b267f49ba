"""The first stage: encoder E, decoder D and the regularisation of the latent between them (arXiv:2112.10752, 3.1).

`AutoencoderKL` regularises by a KL term towards the standard normal, `VQModel` by a vector-quantization layer absorbed
into the decoder. Both compress by f = 2^m, where m is the number of levels less one. Methods, outputs and the fields of
the configuration have diffusers' names, so that its pipelines run on these classes as they are.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ldm_fast.configs.first_stage import AutoencoderConfig, VQConfig
from ldm_fast.models.attention import name_attentions
from ldm_fast.models.attention_methods import AttentionMethods
from ldm_fast.models.bands import BANDS_PER_TILE, decode_in_bands, encode_in_bands
from ldm_fast.models.coders import Decoder, Encoder
from ldm_fast.models.outputs import AutoencoderKLOutput, DecoderOutput, VQEncoderOutput
from ldm_fast.models.pretrained import Pretrained
from ldm_fast.models.regularisation import DiagonalGaussian, QuantizerOutput, VectorQuantizer
from ldm_fast.models.tiles import in_tiles
from ldm_fast.models.upcast import Float32Arithmetic


def _after_offloading(method: Callable[..., Any]) -> Callable[..., Any]:
    """Make accelerate move an offloaded model to its device before `method`, as it does before `forward`."""

    @functools.wraps(method)
    def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        hook = getattr(self, "_hf_hook", None)
        if hook is not None:
            hook.pre_forward(self)
        return method(self, *args, **kwargs)

    return wrapper


class _FirstStage(AttentionMethods, Pretrained):
    """What the two first stages share: E, D and the 1×1 convolutions on either side of the latent.

    With `tile`, `encode` and `decode` work on a large image in the memory of tiles of `tile` latents a side, with the
    result of the whole image (see `models.bands`), without gradients.

    As in diffusers, `use_slicing` takes one image at a time, and `use_tiling` takes images larger than a tile in
    overlapping tiles that know nothing of one another: `tile_sample_min_size` pixels a side (`tile_latent_min_size` in
    the latent), of which they share `tile_overlap_factor`. The result differs from that of the whole image.
    """

    config: AutoencoderConfig
    distribution_class: ClassVar[type[Any]] = DiagonalGaussian
    latent_class: ClassVar[type[Any]]  # of what `encode` returns
    output_class: ClassVar[type[Any]] = DecoderOutput

    def __init__(self, config: AutoencoderConfig, moments: int):
        super().__init__()
        self.config = config
        inner, z = config.encoder_channels, config.latent_channels
        self.encoder = Encoder(config, moments * inner)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(moments * inner, moments * z, 1) if config.use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(z, inner, 1) if config.use_post_quant_conv else None
        name_attentions(self)
        self.latent_channels = z
        self.use_slicing = self.use_tiling = False
        size = config.sample_size
        self.tile_sample_min_size = size if isinstance(size, int) else size[0]
        self.tile_latent_min_size = self.tile_sample_min_size // config.downsampling_factor
        self.tile_overlap_factor = 0.25

    @torch.no_grad()
    def open_latent_convs(self) -> None:
        """Set the 1×1 convolutions around the latent to the identity, as training should start.

        Together with the convolution on either side they are four linear layers in a row. From random weights, gradient
        descent finds maps of low rank through such a chain: latents that lie in a plane, whatever their channels.
        """
        for conv in (self.quant_conv, self.post_quant_conv):
            if conv is not None and conv.bias is not None:
                nn.init.dirac_(conv.weight)
                nn.init.zeros_(conv.bias)

    @property
    def dtype(self) -> torch.dtype:
        return self.encoder.conv_in.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.encoder.conv_in.weight.device

    @contextlib.contextmanager
    def upcast(self) -> Iterator[torch.dtype]:
        """Compute in float32 inside if the weights are float16 and `config.force_upcast` says that this is too small.

        Yields the dtype in which `encode` and `decode` are to be given their input: float32 then, else that of the
        weights. The weights stay what they are, so that threads may share the model.
        """
        wide = self.dtype == torch.float16 and self.config.force_upcast
        with Float32Arithmetic() if wide else contextlib.nullcontext():
            yield torch.float32 if wide else self.dtype

    def enable_slicing(self) -> None:
        """Encode and decode one image of a batch at a time."""
        self.use_slicing = True

    def disable_slicing(self) -> None:
        self.use_slicing = False

    def enable_tiling(self, use_tiling: bool = True) -> None:
        """Encode and decode images larger than a tile in overlapping tiles, which changes the result; see `tile=`."""
        self.use_tiling = use_tiling

    def disable_tiling(self) -> None:
        self.use_tiling = False

    def _encode(self, x: Tensor, tile: int | None) -> Tensor:
        """Return the moments (B, latent_channels or twice that, H/f, W/f) of x (B, in_channels, H, W)."""
        channels = self.encoder.conv_in.in_channels
        if x.ndim != 4 or x.shape[1] != channels:
            raise ValueError(f"{type(self).__name__}: x must be (B, {channels}, H, W), got {tuple(x.shape)}")
        if tile is not None:
            pixels = self._pixels_of_a_band("encode", x, tile)
            with torch.no_grad():
                return self._encode_whole(x, functools.partial(encode_in_bands, self.encoder, pixels=pixels))
        sample, latent = self.tile_sample_min_size, self.tile_latent_min_size
        return self._in_parts(self._encode_whole, x, sample, latent)

    def _encode_whole(self, x: Tensor, encoder: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        h = (encoder or self.encoder)(x)
        return h if self.quant_conv is None else self.quant_conv(h)

    def _decode(self, z: Tensor, tile: int | None) -> Tensor:
        """Return the images (B, out_channels, f·h, f·w) of z (B, latent_channels, h, w)."""
        if tile is not None:
            pixels = self._pixels_of_a_band("decode", z, tile)
            with torch.no_grad():
                return self._decode_whole(z, functools.partial(decode_in_bands, self.decoder, pixels=pixels))
        sample, latent = self.tile_sample_min_size, self.tile_latent_min_size
        return self._in_parts(self._decode_whole, z, latent, sample)

    def _decode_whole(self, z: Tensor, decoder: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        return (decoder or self.decoder)(z if self.post_quant_conv is None else self.post_quant_conv(z))

    def _pixels_of_a_band(self, method: str, x: Tensor, tile: int) -> int:
        name = f"{type(self).__name__}.{method}"
        if not isinstance(tile, int) or tile < 1:
            raise ValueError(f"{name}: tile must be a number of latents, at least 1, or None, got {tile!r}")
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name}: tile={tile} gives no gradients; leave it out, or use torch.no_grad()")
        side = tile * self.config.downsampling_factor
        return max(1, side * side // BANDS_PER_TILE)

    def _in_parts(self, function: Callable[[Tensor], Tensor], x: Tensor, size: int, out_size: int) -> Tensor:
        """Return function(x), in slices and tiles if they are enabled."""
        if self.use_tiling and max(x.shape[2:]) > size:
            function = functools.partial(
                in_tiles, function, size=size, out_size=out_size, overlap=self.tile_overlap_factor
            )
        if self.use_slicing and len(x) > 1:
            return torch.cat([function(image) for image in x.split(1)])
        return function(x)

    def _output(
        self,
        sample: Tensor,
        loss: Tensor | None = None,
        regulariser: DiagonalGaussian | QuantizerOutput | None = None,
    ) -> DecoderOutput:
        results = {"sample": sample} if loss is None else {"sample": sample, "commit_loss": loss}
        output: DecoderOutput = self.output_class(**results)
        if regulariser is not None:
            output.regulariser = regulariser
        return output

    def _check_latent(self, z: Tensor) -> None:
        if z.ndim != 4 or z.shape[1] != self.latent_channels:
            raise ValueError(
                f"{type(self).__name__}: z must be (B, {self.latent_channels}, h, w), got {tuple(z.shape)}"
            )


class AutoencoderKL(_FirstStage):
    """First stage with a KL-regularised latent. Images and reconstructions lie in [-1, 1]."""

    config_class = AutoencoderConfig
    stands_for = ("AutoencoderKL",)
    latent_class = AutoencoderKLOutput

    def __init__(self, config: AutoencoderConfig):
        super().__init__(config, moments=2)

    @_after_offloading
    def encode(
        self, x: Tensor, return_dict: bool = True, *, tile: int | None = None
    ) -> AutoencoderKLOutput | tuple[DiagonalGaussian]:
        """Return `.latent_dist`, over z (B, latent_channels, H/f, W/f), of x (B, in_channels, H, W)."""
        posterior: DiagonalGaussian = self.distribution_class(self._encode(x, tile))
        if not return_dict:
            return (posterior,)
        latent: AutoencoderKLOutput = self.latent_class(latent_dist=posterior)
        return latent

    def encode_latents(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return the latent that the second stage learns: a sample of q(z | x)."""
        z: Tensor = self.encode(x).latent_dist.sample(generator)
        return z

    @_after_offloading
    def decode(
        self, z: Tensor, return_dict: bool = True, generator: Any = None, *, tile: int | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Return `.sample` (B, out_channels, f·h, f·w) of z (B, latent_channels, h, w).

        Nothing here is random. Pipelines pass a generator, since some decoders of diffusers are.
        """
        self._check_latent(z)
        sample = self._decode(z, tile)
        return self._output(sample) if return_dict else (sample,)

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """Reconstruct `sample` (B, in_channels, H, W) from the mode of q(z | x), or from a sample of it as in training.

        Returns `.sample`, like the input, and `.regulariser`, the distribution q.
        """
        posterior = self.encode(sample).latent_dist
        z = posterior.sample(generator) if sample_posterior else posterior.mode()
        reconstruction = self.decode(z).sample
        return self._output(reconstruction, regulariser=posterior) if return_dict else (reconstruction,)


class VQModel(_FirstStage):
    """First stage with a vector-quantized latent. Images and reconstructions lie in [-1, 1]."""

    config_class = VQConfig
    stands_for = ("VQModel",)
    latent_class = VQEncoderOutput
    config: VQConfig

    def __init__(self, config: VQConfig):
        super().__init__(config, moments=1)
        self.quantize = VectorQuantizer(
            config.num_vq_embeddings,
            config.latent_channels,
            config.commitment_weight,
            config.legacy,
            config.codebook_ema_decay,
        )
        for name in ("post_quant_conv", "decoder"):  # after the codebook: the order of parameters is that of diffusers
            part = getattr(self, name)
            delattr(self, name)
            setattr(self, name, part)

    @_after_offloading
    def encode(
        self, x: Tensor, return_dict: bool = True, *, tile: int | None = None
    ) -> VQEncoderOutput | tuple[Tensor]:
        """Return `.latents` (B, latent_channels, H/f, W/f), not yet quantized, of x (B, in_channels, H, W)."""
        latents = self._encode(x, tile)
        if not return_dict:
            return (latents,)
        latent: VQEncoderOutput = self.latent_class(latents=latents)
        return latent

    def encode_latents(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return the latent that the second stage learns: the one before quantization (decoding quantizes)."""
        z: Tensor = self.encode(x).latents
        return z

    @_after_offloading
    def decode(
        self,
        z: Tensor,
        force_not_quantize: bool = False,
        return_dict: bool = True,
        shape: Sequence[int] | None = None,
        *,
        tile: int | None = None,
    ) -> DecoderOutput | tuple[Tensor, Tensor]:
        """Return `.sample` (B, out_channels, f·h, f·w) of z (B, latent_channels, h, w), which is quantized first.

        With `force_not_quantize` it is not. A model with `config.lookup_from_codebook` then takes indices of codes, in
        any shape, and `shape` (B, h, w, latent_channels) says which latent they make up.
        """
        if force_not_quantize and self.config.lookup_from_codebook:
            quantized, z = None, self.quantize.get_codebook_entry(z, shape)
            self._check_latent(z)
        else:
            self._check_latent(z)
            quantized = None if force_not_quantize else self.quantize(z)
        sample = self._decode(z if quantized is None else quantized.z_q, tile)
        loss = z.new_zeros(len(z)) if quantized is None else quantized.loss
        return self._output(sample, loss, quantized) if return_dict else (sample, loss)

    def forward(self, sample: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor, Tensor]:
        """Reconstruct `sample` (B, in_channels, H, W).

        Returns `.sample`, like it, `.commit_loss`, and `.regulariser` with indices and perplexity.
        """
        out: DecoderOutput | tuple[Tensor, Tensor] = self.decode(self.encode(sample).latents, return_dict=return_dict)
        return out
