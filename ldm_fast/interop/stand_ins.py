"""Classes that stand for diffusers' own: a model of ours with what diffusers' pipelines and loaders look for.

That is diffusers' mixins that load LoRA and IP-Adapter files, and the `config` of the module that is replaced. They
carry the names of the classes they stand for, since diffusers decides some things by name.
"""

from __future__ import annotations

import functools
from typing import Any, SupportsIndex

from torch import nn


def require_diffusers() -> Any:
    """Return the package diffusers. ImportError, with how to get it, if it is not installed."""
    try:
        import diffusers
    except ImportError as error:
        raise ImportError('this needs the package diffusers: pip install "ldm_fast[diffusers]"') from error
    return diffusers


def stand_in(base: type[nn.Module], kind: str) -> type[nn.Module]:
    """Return the class of the name `kind`, as in diffusers, made from our class `base` or from a stand-in's."""
    return _made(_ours(base), kind)


def _ours(cls: type) -> Any:
    """Return the class of ours that a stand-in, or a class derived from one, is made from."""
    return next(ours for ours in cls.__mro__ if not issubclass(ours, _Described))


@functools.cache
def _made(base: Any, kind: str) -> type[nn.Module]:
    parts = {"UNet2DConditionModel": _conditional_unet, "UNet2DModel": _unconditional_unet}.get(kind, _first_stage)
    mixins, members = parts(base)
    about = {"__module__": __name__, "__doc__": f"`ldm_fast.{base.__name__}` in the place of diffusers' {kind}."}
    return type(kind, (_Described, base, *mixins), {**about, **members})


def _conditional_unet(base: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    diffusers = require_diffusers()
    from diffusers.models.attention import AttentionMixin
    from diffusers.utils import peft_utils

    lora: Any = peft_utils

    def forward(self: Any, *args: Any, cross_attention_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        """As `UNet.forward`; `cross_attention_kwargs["scale"]` is the weight of all LoRA layers in this call."""
        rest = dict(cross_attention_kwargs or {})
        scale = rest.pop("scale", 1.0)
        lora.scale_lora_layers(self, scale)
        try:
            return base.forward(self, *args, cross_attention_kwargs=rest or None, **kwargs)
        finally:
            lora.unscale_lora_layers(self, scale)

    loaders = (diffusers.loaders.UNet2DConditionLoadersMixin, diffusers.loaders.PeftAdapterMixin)
    # `compile_repeated_blocks` compiles the blocks named here.
    members = {"forward": forward, "_repeated_blocks": ["TransformerBlock"]}
    return (*loaders, AttentionMixin, diffusers.ModelMixin), members


def _unconditional_unet(base: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def forward(self: Any, sample: Any, timestep: Any, class_labels: Any = None, return_dict: bool = True) -> Any:
        """As `UNet.forward`, without a context."""
        return base.forward(self, sample, timestep, class_labels=class_labels, return_dict=return_dict)

    return (require_diffusers().ModelMixin,), {"forward": forward}


def _first_stage(base: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (require_diffusers().ModelMixin,), {}


class _Described:
    """A model whose `config` is that of the module it replaces: pipelines read it, loaders write to it."""

    @property
    def config(self) -> Any:
        return self.__dict__.get("_their_config", self.__dict__.get("_our_config"))

    @config.setter
    def config(self, value: Any) -> None:
        self.__dict__["_our_config"] = value

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        """Pickle and copy by our class and the name of the class it stands for: no module holds the class by name."""
        cls: Any = type(self)
        base = _ours(cls)
        if cls.__name__ not in base.stands_for or _made(base, cls.__name__) is not cls:  # somebody's subclass
            return super().__reduce_ex__(protocol)
        return _empty, (base, cls.__name__), self.__dict__.copy()

    def describe_as(self, config: dict[str, Any]) -> None:
        """Make `config` this dictionary, with our own fields for names that are not in it."""
        self.__dict__["_their_config"] = _PipelineConfig(config, self.__dict__["_our_config"])


def _empty(base: type[nn.Module], kind: str) -> nn.Module:
    """Return what `pickle` fills with the state of a model."""
    cls = stand_in(base, kind)
    return cls.__new__(cls)


class _PipelineConfig(dict[str, Any]):
    """A diffusers configuration: its keys are attributes, too, and both can be set."""

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
