"""Our models inside diffusers' pipelines.

    pipe = StableDiffusionPipeline.from_pretrained(folder)
    ldm_fast.accelerate(pipe)

or one component at a time: `pipe.unet = ldm_fast.UNet.from_diffusers(pipe.unet)`.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

from torch import nn

from ldm_fast.files.tensors import CheckpointError
from ldm_fast.interop.stand_ins import require_diffusers
from ldm_fast.models.autoencoder import AutoencoderKL, VQModel
from ldm_fast.models.memory import fixed_weights
from ldm_fast.models.unet import UNet

REPLACED = {kind: ours for ours in (UNet, AutoencoderKL, VQModel) for kind in ours.stands_for}


def accelerate(pipe: Any, strict: bool = False) -> Any:
    """Replace every UNet and first stage of a diffusers pipeline by ours, in place, and return the pipeline.

    The weights are shared, not copied; `pipe.unet.join_projections()` trades that for fewer products. Other components
    stay as they are, and so does the pipeline's record of its classes: `save_pretrained` writes a folder that diffusers
    opens without us. Weights must not be trained during a call of the pipeline, because what does not change between
    its steps is computed once. Accelerate a pipeline made of its components, too.

    A part with a configuration that we cannot run stays as it is, too, and a warning says which and why.

    Args:
        pipe: the pipeline.
        strict: raise ValueError for such a part instead, and replace nothing.

    Raises:
        TypeError: `pipe` is not a diffusers pipeline.
        ValueError: no part of it can be replaced, or a part is compiled, offloaded or wrapped by adapters already.
            Nothing is replaced then.
    """
    diffusers = require_diffusers()
    if not isinstance(pipe, diffusers.DiffusionPipeline):
        raise TypeError(f"accelerate: pipe must be a diffusers pipeline, got {type(pipe).__name__}")
    ours = tuple(REPLACED.values())
    parts = {name: part for name, part in pipe.components.items() if part is not None}
    modules = {name: getattr(part, "_orig_mod", part) for name, part in parts.items()}  # as before torch.compile
    known = {name: module for name, module in modules.items() if type(module).__name__ in REPLACED}
    foreign = {name: module for name, module in known.items() if not isinstance(module, ours)}
    replaced, refused = {}, {}
    for name, module in foreign.items():
        _check_untouched(name, parts[name])
        try:
            replaced[name] = REPLACED[type(module).__name__].from_diffusers(module)
        except CheckpointError as error:
            raise ValueError(f"accelerate: {name}: {error}") from error
        except ValueError as error:
            refused[name] = f"{name}: {error}"
    if not known:
        found = ", ".join(f"{name} ({type(part).__name__})" for name, part in parts.items())
        raise ValueError(
            f"accelerate: {type(pipe).__name__} has no {', '.join(REPLACED)} to replace; its components are {found}"
        )
    if refused and (strict or len(refused) == len(known)):
        raise ValueError(f"accelerate: {'; '.join(refused.values())}")
    if refused:
        warnings.warn(f"accelerate: left as diffusers' own: {'; '.join(refused.values())}", stacklevel=2)
    for name, module in replaced.items():
        setattr(pipe, name, module)
    pipe.__class__ = _with_fixed_weights(pipe.__class__)
    return pipe


def _check_untouched(name: str, component: nn.Module) -> None:
    """Raise ValueError if something is around the component, or a part of it, that its replacement would lack."""
    for module in component.modules():
        if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
            raise ValueError(f"accelerate: {name} is compiled; accelerate the pipeline first, then compile {name}")
        if hasattr(module, "_hf_hook") or hasattr(module, "_diffusers_hook"):
            raise ValueError(
                f"accelerate: {name} has hooks on it (offloading, device_map, ...); accelerate the pipeline first, "
                "then enable them"
            )


@functools.cache
def _with_fixed_weights(pipeline: Any) -> Any:
    """Return a subclass of a pipeline's class, under the same name, that runs every call inside `fixed_weights`."""
    if getattr(pipeline.__call__, "_fixes_weights", False):
        return pipeline
    call = fixed_weights()(pipeline.__call__)
    call._fixes_weights = True
    members = {"__call__": call, "__doc__": pipeline.__doc__, "__module__": pipeline.__module__}
    return type(pipeline.__name__, (pipeline,), members)
