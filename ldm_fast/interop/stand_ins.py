"""Classes that stand for diffusers' own: a model of ours that is a diffusers model, too.

Such a class derives from ours and from the class it stands for, in this order: `isinstance` holds for both, and every
method of diffusers' that we do not define ourselves works on our module. It also carries the name of that class and of
its module, since diffusers decides some things by name.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
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
    cls: type[nn.Module] = _made(_ours(base), kind)
    return cls


def entries_of(theirs: type, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries that a class of diffusers is built from; others are notes, such as an EMA's decay."""
    theirs = getattr(theirs, "_stands_for", theirs)
    known = inspect.signature(theirs.__init__).parameters  # type: ignore[misc]  # of this very class
    return {**{name: value for name, value in config.items() if name in known}, "_class_name": theirs.__name__}


def _ours(cls: type) -> Any:
    """Return the class of ours that a stand-in, or a class derived from one, is made from."""
    return next(ours for ours in cls.__mro__ if not issubclass(ours, _Described))


@functools.cache
def _made(base: Any, kind: str) -> Any:
    theirs = getattr(require_diffusers(), kind)
    from diffusers.models.attention_processor import AttnProcessor

    members = {
        "default_processor": AttnProcessor,
        "__module__": theirs.__module__,
        "__doc__": f"`ldm_fast.{base.__name__}` in the place of diffusers' {kind}.",
        "__init__": _with_signature_of(theirs, base),
        "_stands_for": theirs,
        **{name: _built_by_theirs(getattr(theirs, name)) for name in FACTORIES if hasattr(theirs, name)},
        **MEMBERS[kind](base),
    }
    # `super().__init__()` of our classes leads to diffusers', which would build all of its layers first.
    unbuilt = type(kind, (theirs,), {"__init__": require_diffusers().ModelMixin.__init__})
    return _StandsFor(kind, (_Described, base, unbuilt), members)


FACTORIES = ("from_config", "from_pretrained", "from_single_file")


def _with_signature_of(theirs: type, base: Any) -> Any:
    def __init__(self: Any, config: Any) -> None:
        base.__init__(self, config)

    __init__.__signature__ = inspect.signature(theirs.__init__)  # type: ignore[attr-defined,misc]  # diffusers reads it
    return __init__


def _built_by_theirs(build: Callable[..., Any]) -> Any:
    """Return a class method that builds a model with this one of diffusers', and takes its place."""

    @functools.wraps(build)
    def method(cls: Any, *args: Any, **kwargs: Any) -> Any:
        made = build(*args, **kwargs)
        if isinstance(made, tuple):  # and what diffusers says about it
            return cls.from_diffusers(made[0]), *made[1:]
        return cls.from_diffusers(made)

    return classmethod(method)


def _conditional_unet(base: Any) -> dict[str, Any]:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
    from diffusers.utils import peft_utils

    lora: Any = peft_utils

    @functools.wraps(base.forward)
    def forward(
        self: Any,
        sample: Any,
        timestep: Any,
        encoder_hidden_states: Any = None,
        class_labels: Any = None,
        timestep_cond: Any = None,
        attention_mask: Any = None,
        cross_attention_kwargs: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """As `UNet.forward`; `cross_attention_kwargs["scale"]` is the weight of all LoRA layers in this call."""
        rest = dict(cross_attention_kwargs or {})
        scale = rest.pop("scale", 1.0)
        lora.scale_lora_layers(self, scale)
        given = (sample, timestep, encoder_hidden_states, class_labels, timestep_cond, attention_mask)
        try:
            return base.forward(self, *given, rest or None, *args, **kwargs)
        finally:
            lora.unscale_lora_layers(self, scale)

    return {
        "forward": forward,
        "output_class": UNet2DConditionOutput,
        "sample_size": property(lambda self: self.config.sample_size),
        "num_upsamplers": property(lambda self: len(self.up_blocks) - 1),
    }


def _unconditional_unet(base: Any) -> dict[str, Any]:
    from diffusers.models.unets.unet_2d import UNet2DOutput

    def forward(self: Any, sample: Any, timestep: Any, class_labels: Any = None, return_dict: bool = True) -> Any:
        """As `UNet.forward`, without a context."""
        return base.forward(self, sample, timestep, class_labels=class_labels, return_dict=return_dict)

    size = property(lambda self: self.config.sample_size)
    return {"forward": forward, "output_class": UNet2DOutput, "sample_size": size}


def _kl_first_stage(base: Any) -> dict[str, Any]:
    from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
    from diffusers.models.modeling_outputs import AutoencoderKLOutput

    return {
        "distribution_class": DiagonalGaussianDistribution,
        "latent_class": AutoencoderKLOutput,
        "output_class": DecoderOutput,
    }


def _vq_first_stage(base: Any) -> dict[str, Any]:
    from diffusers.models.autoencoders.vae import DecoderOutput
    from diffusers.models.autoencoders.vq_model import VQEncoderOutput

    def decode(
        self: Any, h: Any, force_not_quantize: bool = False, return_dict: bool = True, shape: Any = None, **kwargs: Any
    ) -> Any:
        """As `VQModel.decode`, with diffusers' name for the latent."""
        return base.decode(self, h, force_not_quantize, return_dict, shape, **kwargs)

    return {"decode": decode, "latent_class": VQEncoderOutput, "output_class": DecoderOutput}


MEMBERS = {
    "UNet2DConditionModel": _conditional_unet,
    "UNet2DModel": _unconditional_unet,
    "AutoencoderKL": _kl_first_stage,
    "VQModel": _vq_first_stage,
}


class _StandsFor(type):
    """The type of stand-ins: they are built as the class they stand for is, and equal to it.

    diffusers' `from_pipe` asks for `type(component) in (UNet2DConditionModel,)`. Classes derived from a stand-in are
    ordinary ones.
    """

    def __call__(cls: Any, *args: Any, **kwargs: Any) -> Any:
        """Build from our configuration, or from the arguments of diffusers' class."""
        theirs = cls.__dict__.get("_stands_for")
        if theirs is None or (len(args) == 1 and isinstance(args[0], cls.config_class)):
            return super().__call__(*args, **kwargs)
        return cls.from_diffusers(theirs(*args, **kwargs))

    def __eq__(cls, other: object) -> bool:
        return cls is other or (other is not None and cls.__dict__.get("_stands_for") is other)

    def __hash__(cls) -> int:
        return hash(cls.__dict__.get("_stands_for")) if "_stands_for" in cls.__dict__ else super().__hash__()


class _Described:
    """A model whose `config` is that of the module it replaces: pipelines read it, loaders write to it."""

    _stands_for: Any
    config_class: Any

    @property
    def config(self) -> Any:
        return self.__dict__.get("_internal_dict", self.__dict__.get("_our_config"))

    @config.setter
    def config(self, value: Any) -> None:
        self.__dict__["_our_config"] = value

    @property
    def _internal_dict(self) -> Any:
        """The configuration under the name by which diffusers' pipelines exchange it."""
        return self.config

    @_internal_dict.setter
    def _internal_dict(self, value: Any) -> None:
        self.describe_as(value)

    def describe_as(self, config: dict[str, Any]) -> None:
        """Make `config` this dictionary, with our own fields for names that are not in it."""
        self.__dict__["_internal_dict"] = _PipelineConfig(config, self.__dict__["_our_config"])

    def register_to_config(self, **values: Any) -> None:
        """Change or add entries of the configuration, for a layer that was exchanged."""
        self.describe_as({**self.__dict__.get("_internal_dict", {}), **values})

    def __getattr__(self, name: str) -> Any:
        try:
            return nn.Module.__getattr__(self, name)  # type: ignore[arg-type]  # it is a module
        except AttributeError:
            if name not in self.__dict__.get("_internal_dict", ()):
                raise
        return super().__getattr__(name)  # type: ignore[misc]  # diffusers', which warns: entries of the configuration

    def save_pretrained(
        self,
        save_directory: Any,
        is_main_process: bool = True,
        save_function: Callable[..., Any] | None = None,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
        push_to_hub: bool = False,
        use_flashpack: bool = False,
        *,
        layout: str = "diffusers",
        **upload: Any,
    ) -> None:
        """As `Pretrained.save_pretrained`; with `push_to_hub` the model is uploaded, too, as diffusers does it.

        `upload` is for `push_to_hub` alone (repo_id, token, ...). ValueError for `use_flashpack`.
        """
        if use_flashpack:
            raise ValueError("save_pretrained: use_flashpack is not supported; .safetensors and .bin files are")
        if upload and not push_to_hub:
            raise TypeError(f"save_pretrained: {', '.join(upload)} without push_to_hub=True")
        super().save_pretrained(  # type: ignore[misc]  # our model's
            save_directory, is_main_process, save_function, safe_serialization, variant, max_shard_size, layout=layout
        )
        if push_to_hub:
            kept = {"safe_serialization": safe_serialization, "variant": variant}
            repository = upload.pop("repo_id", Path(save_directory).name)
            self.push_to_hub(repository, **kept, **upload)  # diffusers'

    def _own_config(self) -> Any:
        described = self.__dict__.get("_internal_dict")
        ours: Any = super()
        return ours._own_config() if described is None else ours._read_config(entries_of(self._stands_for, described))

    def _config_text(self) -> str:
        """Return what diffusers would write: entries that we do not know are kept."""
        text: str = self.to_json_string()
        return text

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        """Pickle and copy by our class and the name of the class it stands for: no module holds the class by name."""
        cls: Any = type(self)
        base = _ours(cls)
        if cls.__name__ not in base.stands_for or _made(base, cls.__name__) is not cls:  # somebody's subclass
            return super().__reduce_ex__(protocol)
        return _empty, (base, cls.__name__), self.__dict__.copy()


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
