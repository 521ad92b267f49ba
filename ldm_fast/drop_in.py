"""Our models inside diffusers' pipelines.

    pipe = StableDiffusionPipeline.from_pretrained(folder)
    ldm_fast.accelerate(pipe)

or one component at a time, `pipe.unet = ldm_fast.UNet.from_diffusers(pipe.unet)`. The classes made here are our models
with what diffusers' pipelines and loaders look for around them: its mixins that load LoRA and IP-Adapter files, and a
`config` that says what the replaced module's said. They carry the names of the classes they stand for, since diffusers
decides some things by name.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from ldm_fast.autoencoder import AutoencoderKL, VQModel
from ldm_fast.reuse import fixed_weights
from ldm_fast.unet import UNet

REPLACED = {"UNet2DConditionModel": UNet, "UNet2DModel": UNet, "AutoencoderKL": AutoencoderKL, "VQModel": VQModel}


def accelerate(pipe: Any) -> Any:
    """Replaces every UNet and first stage of a diffusers pipeline by ours, in place; returns the pipeline.

    The weights are shared, not copied; `pipe.unet.join_projections()` trades that for fewer products. Components of
    other kinds stay as they are, and so does the pipeline's record of its classes: `save_pretrained` writes a folder
    that diffusers opens without us. Weights must not be trained during a call of the pipeline: what does not change
    between its steps is computed once. Pipelines made of this one's components are accelerated in turn.

    Raises TypeError if `pipe` is not a diffusers pipeline, ValueError for a UNet or first stage whose configuration we
    cannot run, or that is compiled or offloaded already, and for a pipeline without either; nothing is replaced then.
    """
    diffusers = require_diffusers()
    if not isinstance(pipe, diffusers.DiffusionPipeline):
        raise TypeError(f"accelerate: pipe must be a diffusers pipeline, got {type(pipe).__name__}")
    replaced, ours = {}, tuple(REPLACED.values())
    parts = {name: part for name, part in pipe.components.items() if part is not None}
    modules = {name: getattr(part, "_orig_mod", part) for name, part in parts.items()}  # as before torch.compile
    for name, module in modules.items():
        kind = type(module).__name__
        if kind not in REPLACED or isinstance(module, ours):
            continue
        _check_untouched(name, parts[name])
        try:
            replaced[name] = REPLACED[kind].from_diffusers(module)
        except ValueError as error:
            raise ValueError(f"accelerate: {name}: {error}") from error
    if not replaced and not any(isinstance(module, ours) for module in modules.values()):
        found = ", ".join(f"{name} ({type(part).__name__})" for name, part in parts.items())
        raise ValueError(
            f"accelerate: {type(pipe).__name__} has no {', '.join(REPLACED)} to replace; its components are {found}"
        )
    for name, module in replaced.items():
        setattr(pipe, name, module)
        pipe.register_to_config(**{name: ("diffusers", type(module).__name__)})
    pipe.__class__ = _with_fixed_weights(type(pipe))
    return pipe


def _check_untouched(name: str, component: nn.Module) -> None:
    """ValueError if something was put around the component, or a part of it, that its replacement would be without."""
    for module in component.modules():
        if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
            raise ValueError(f"accelerate: {name} is compiled; accelerate the pipeline first, then compile {name}")
        if hasattr(module, "_hf_hook") or hasattr(module, "_diffusers_hook"):
            raise ValueError(
                f"accelerate: {name} has hooks on it (offloading, device_map, ...); accelerate the pipeline first, "
                "then enable them"
            )


def require_diffusers() -> Any:
    """The package diffusers. ImportError that says how to get it."""
    try:
        import diffusers
    except ImportError as error:
        raise ImportError('this needs the package diffusers: pip install "ldm_fast[diffusers]"') from error
    return diffusers


@functools.cache
def _with_fixed_weights(pipeline: type) -> type:
    """The pipeline's class under the same name, with every call in a scope of `fixed_weights`."""
    if getattr(pipeline.__call__, "_fixes_weights", False):
        return pipeline
    call = fixed_weights()(pipeline.__call__)
    call._fixes_weights = True
    members = {"__call__": call, "__doc__": pipeline.__doc__, "__module__": pipeline.__module__}
    return type(pipeline.__name__, (pipeline,), members)


def pipeline_class(kind: str) -> type[nn.Module]:
    """Our class that stands for diffusers' class of the name `kind` in a pipeline."""
    if kind not in REPLACED:
        raise ValueError(f"from_diffusers: {kind} is not one of {', '.join(REPLACED)}")
    return _pipeline_classes()[kind]


@functools.cache
def _pipeline_classes() -> dict[str, type[nn.Module]]:
    diffusers = require_diffusers()
    from diffusers.loaders import PeftAdapterMixin, UNet2DConditionLoadersMixin
    from diffusers.models.attention import AttentionMixin
    from diffusers.utils.peft_utils import scale_lora_layers, unscale_lora_layers

    class UNet2DConditionModel(
        _Described, UNet, UNet2DConditionLoadersMixin, PeftAdapterMixin, AttentionMixin, diffusers.ModelMixin
    ):
        """`ldm_fast.UNet` in the place of diffusers' UNet2DConditionModel."""

        _repeated_blocks = ["TransformerBlock"]  # what `compile_repeated_blocks` compiles

        def forward(self, *args: Any, cross_attention_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> Any:
            """As `UNet.forward`; `cross_attention_kwargs["scale"]` is the weight of all LoRA layers in this call."""
            rest = dict(cross_attention_kwargs or {})
            scale = rest.pop("scale", 1.0)
            scale_lora_layers(self, scale)
            try:
                return super().forward(*args, cross_attention_kwargs=rest or None, **kwargs)
            finally:
                unscale_lora_layers(self, scale)

    class UNet2DModel(_Described, UNet, diffusers.ModelMixin):
        """`ldm_fast.UNet` in the place of diffusers' UNet2DModel, which has no context."""

        def forward(self, sample, timestep, class_labels=None, return_dict=True):
            return super().forward(sample, timestep, class_labels=class_labels, return_dict=return_dict)

    kinds = {"UNet2DConditionModel": UNet2DConditionModel, "UNet2DModel": UNet2DModel}
    for ours in (AutoencoderKL, VQModel):
        members = {"__doc__": f"`ldm_fast.{ours.__name__}` in a pipeline.", "__module__": __name__}
        kinds[ours.__name__] = type(ours.__name__, (_Described, ours, diffusers.ModelMixin), members)
    return kinds


class _Described:
    """A model whose `config` is the replaced module's once that is known: pipelines read it, loaders write to it."""

    @property
    def config(self) -> Any:
        return self.__dict__.get("_their_config", self.__dict__.get("_our_config"))

    @config.setter
    def config(self, value: Any) -> None:
        self.__dict__["_our_config"] = value

    def __reduce_ex__(self, protocol: int) -> Any:
        """Pickled and copied by the name of the class it stands for: no module has this one under its name."""
        kind = type(self).__name__
        if _pipeline_classes().get(kind) is not type(self):  # somebody's subclass
            return super().__reduce_ex__(protocol)
        return _empty, (kind,), self.__dict__.copy()

    def describe_as(self, config: dict[str, Any]) -> None:
        """From now on `config` is this dictionary, with our own fields where it has none of the name."""
        self.__dict__["_their_config"] = _PipelineConfig(config, self.__dict__["_our_config"])


def _empty(kind: str) -> nn.Module:
    """What `pickle` fills with the state of a model."""
    cls = pipeline_class(kind)
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
