"""Layers of a stand-in that are instances of diffusers' classes, too: its pipelines (PAG among them) ask `isinstance`.

A layer keeps its code and its state. Its class becomes one made of ours and of diffusers' of the same name, ours first.
"""

from __future__ import annotations

import functools
from typing import Any, SupportsIndex

from torch import nn

OURS = "ldm_fast.models."  # where classes of ours are
ALIASES = {"AddedKVAttention": "Attention"}


def stand_in_layers(model: nn.Module) -> None:
    """Make the layers of a model of ours instances of the diffusers classes of the same names, in place."""
    for module in model.modules():
        if type(module).__module__.startswith(OURS):
            kind: Any = type(module)
            module.__class__ = _made(kind)


@functools.cache
def _made(ours: Any) -> Any:
    """Return the class of both, or ours if diffusers has none of that name."""
    name = ALIASES.get(ours.__name__, ours.__name__)
    theirs = _their_layers().get(name)
    if theirs is None:
        return ours

    def reduced(self: nn.Module, protocol: SupportsIndex) -> Any:
        """Pickle and copy by our class: no module holds this one by name."""
        return _empty, (ours,), self.__dict__.copy()

    members = {"__module__": theirs.__module__, "__doc__": ours.__doc__, "__reduce_ex__": reduced}
    return type(name, (ours, theirs), members)


@functools.cache
def _their_layers() -> dict[str, Any]:
    from diffusers.models import attention, attention_processor, downsampling, resnet, upsampling
    from diffusers.models.unets import unet_2d_blocks

    names = {
        attention_processor: ("Attention",),
        attention: ("BasicTransformerBlock", "FeedForward"),
        resnet: ("ResnetBlock2D",),
        downsampling: ("Downsample2D",),
        upsampling: ("Upsample2D",),
        unet_2d_blocks: [name for name in vars(unet_2d_blocks) if name.endswith("Block2D") or "MidBlock2D" in name],
    }
    return {name: getattr(module, name) for module, listed in names.items() for name in listed}


def _empty(ours: Any) -> Any:
    """Return what `pickle` fills with the state of a layer."""
    cls = _made(ours)
    return cls.__new__(cls)
