"""Classes that stand for diffusers' own: a model of ours with what diffusers' pipelines and loaders look for around it.

They have diffusers' mixins that load LoRA and IP-Adapter files, and a `config` with what the replaced module's said.
They carry the names of the classes they stand for, since diffusers decides some things by name.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar

from torch import nn


def require_diffusers() -> Any:
    """Return the package diffusers. ImportError that says how to get it."""
    try:
        import diffusers
    except ImportError as error:
        raise ImportError('this needs the package diffusers: pip install "ldm_fast[diffusers]"') from error
    return diffusers


def stand_in(base: type[nn.Module], kind: str) -> type[nn.Module]:
    """Return the class derived from our model class `base` that stands for diffusers' class of the name `kind`."""
    return _made(next(cls for cls in base.__mro__ if not issubclass(cls, _Described)), kind)


@functools.cache
def _made(base: type[nn.Module], kind: str) -> type[nn.Module]:
    make = {"UNet2DConditionModel": _conditional_unet, "UNet2DModel": _unconditional_unet}.get(kind, _first_stage)
    cls = make(base)
    cls.__name__ = cls.__qualname__ = kind
    cls.__doc__ = f"`ldm_fast.{base.__name__}` in the place of diffusers' {kind}."
    return cls


def _conditional_unet(base: Any) -> type[nn.Module]:
    diffusers = require_diffusers()
    from diffusers.loaders import PeftAdapterMixin, UNet2DConditionLoadersMixin
    from diffusers.models.attention import AttentionMixin
    from diffusers.utils.peft_utils import scale_lora_layers, unscale_lora_layers

    mixins = (UNet2DConditionLoadersMixin, PeftAdapterMixin, AttentionMixin, diffusers.ModelMixin)

    class StandIn(_Described, base, *mixins):
        _repeated_blocks: ClassVar[list[str]] = ["TransformerBlock"]  # what `compile_repeated_blocks` compiles

        def forward(self, *args: Any, cross_attention_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> Any:
            """As `UNet.forward`; `cross_attention_kwargs["scale"]` is the weight of all LoRA layers in this call."""
            rest = dict(cross_attention_kwargs or {})
            scale = rest.pop("scale", 1.0)
            scale_lora_layers(self, scale)
            try:
                return super().forward(*args, cross_attention_kwargs=rest or None, **kwargs)
            finally:
                unscale_lora_layers(self, scale)

    return StandIn


def _unconditional_unet(base: Any) -> type[nn.Module]:
    class StandIn(_Described, base, require_diffusers().ModelMixin):
        def forward(self, sample: Any, timestep: Any, class_labels: Any = None, return_dict: bool = True) -> Any:
            """As `UNet.forward`, without a context."""
            return super().forward(sample, timestep, class_labels=class_labels, return_dict=return_dict)

    return StandIn


def _first_stage(base: Any) -> type[nn.Module]:
    return type(base.__name__, (_Described, base, require_diffusers().ModelMixin), {"__module__": __name__})


class _Described:
    """A model whose `config` is the replaced module's once that is known: pipelines read it, loaders write to it."""

    @property
    def config(self) -> Any:
        return self.__dict__.get("_their_config", self.__dict__.get("_our_config"))

    @config.setter
    def config(self, value: Any) -> None:
        self.__dict__["_our_config"] = value

    def __reduce_ex__(self, protocol: int) -> Any:
        """Pickle and copy by our class and the name of the class it stands for: no module has this one by its name."""
        cls = type(self)
        base = next(ours for ours in cls.__mro__ if not issubclass(ours, _Described))
        if cls.__name__ not in base.stands_for or _made(base, cls.__name__) is not cls:  # somebody's subclass
            return super().__reduce_ex__(protocol)
        return _empty, (base, cls.__name__), self.__dict__.copy()

    def describe_as(self, config: dict[str, Any]) -> None:
        """From now on `config` is this dictionary, with our own fields where it has none of the name."""
        self.__dict__["_their_config"] = _PipelineConfig(config, self.__dict__["_our_config"])


def _empty(base: type[nn.Module], kind: str) -> nn.Module:
    """What `pickle` fills with the state of a model."""
    cls = stand_in(base, kind)
    return cls.__new__(cls)


class _PipelineConfig(dict):
    """A diffusers configuration: keys are attributes, too, and both can be set."""

    def __init__(self, theirs: dict[str, Any], ours: Any):
        super().__init__(theirs)
        self.__dict__["_ours"] = ours

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        if "_ours" not in self.__dict__:  # while being copied
            raise AttributeError(name)
        return getattr(self.__dict__["_ours"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value
