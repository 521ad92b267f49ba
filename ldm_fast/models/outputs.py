"""What the models return: results by name (as attributes and keys) and by position, as diffusers' outputs are."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NoReturn

from torch import Tensor

from ldm_fast.models.regularisation import DiagonalGaussian, QuantizerOutput
from ldm_fast.ops.torch_private import register_as_tree


class Output(OrderedDict[str, Any]):
    """Results that are not None: `output.sample`, `output["sample"]`, or `output[0]`.

    Iterating gives the names, as with any dictionary; `to_tuple()` gives the results. PyTorch's tree functions (DDP,
    `torch.export`, ...) see the tensors inside. No dataclass, and built as any dictionary is, so that compilers need
    not look into it.
    """

    def __init_subclass__(cls) -> None:
        register_as_tree(cls)

    def to_tuple(self) -> tuple[Any, ...]:
        """Return the results that are not None."""
        return tuple(self.values())

    def __getitem__(self, key: int | slice | str) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return super().__getitem__(name)
        if name in type(self).__annotations__:
            return None
        raise AttributeError(f"{type(self).__name__} has no {name}; it has {', '.join(self)}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self:
            self[name] = value
        else:
            super().__setattr__(name, value)

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError(f"{type(self).__name__}: results can be replaced, but neither removed nor added")

    __delitem__ = setdefault = pop = update = _refuse


class UNetOutput(Output):
    """The prediction of a UNet."""

    sample: Tensor  # (B, out_channels, H, W)


class DecoderOutput(Output):
    """Images, and what regularises the latent."""

    sample: Tensor  # (B, out_channels, H, W)
    commit_loss: Tensor | None  # VQ-reg: the quantizer's loss
    regulariser: DiagonalGaussian | QuantizerOutput | None = None  # what training regularises; an attribute, not a key


class AutoencoderKLOutput(Output):
    """The latent of a KL-reg first stage: a distribution."""

    latent_dist: DiagonalGaussian


class VQEncoderOutput(Output):
    """The latent of a VQ-reg first stage."""

    latents: Tensor  # (B, latent_channels, H/f, W/f), not yet quantized
