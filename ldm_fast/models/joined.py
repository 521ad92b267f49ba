"""Projections of one input in a single product, and what layers must be for that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_fast.ops.op import autocast_dtype
from ldm_fast.ops.torch_private import global_hooks_may_exist, graph_may_be_made


def is_plain(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether calling the layer is F.linear with its weights: no adapter around it, no hook, not quantized."""
    return (
        type(layer) is nn.Linear
        and type(layer.weight) is nn.Parameter
        and "forward" not in layer.__dict__  # programs that keep weights elsewhere replace it there
        and not (layer._forward_hooks or layer._forward_pre_hooks or global_hooks_may_exist())
    )


def stands_alone(x: Tensor) -> bool:
    """Whether ops on x are for their values alone: nothing records gradients or makes a graph, and autocast is off."""
    return not (graph_may_be_made() or torch.is_grad_enabled() or autocast_dtype(x) is not None)


@torch.no_grad()
def join(layers: Sequence[nn.Module]) -> None:
    """Move the weights (and biases) of plain linear layers one behind the other in memory, for `linears`.

    The parameters stay the objects they are, with the values they have. This is a layout for inference: programs that
    look at storages (accelerate, safetensors' `save_model`) take joined weights for tied ones and leave some out.
    """
    plain = [layer for layer in layers if is_plain(layer)]
    for tensors in ([layer.weight for layer in plain], [layer.bias for layer in plain if layer.bias is not None]):
        alike = len({(t.device, t.dtype) for t in tensors}) == 1
        if alike and len(tensors) == len(layers) and _stacked(tensors) is None:
            for tensor, part in zip(tensors, torch.cat([*tensors]).split([len(t) for t in tensors]), strict=True):
                tensor.data = part


@torch.no_grad()
def separate(layers: Sequence[nn.Module]) -> None:
    """Undo `join`: give every weight memory of its own, even if a layer was wrapped since. The objects stay."""
    for layer in layers:
        for parameter in layer.parameters():
            if type(parameter) is nn.Parameter and parameter.untyped_storage().nbytes() > parameter.nbytes:
                parameter.data = parameter.data.clone()


def linears(x: Tensor, layers: Sequence[nn.Module]) -> Sequence[Tensor]:
    """Return [layer(x) for layer in layers]; plain layers that were joined take one product, without a copy."""
    plain = [layer for layer in layers if is_plain(layer)]
    if len(plain) == len(layers) and stands_alone(x):
        biases = [layer.bias for layer in plain if layer.bias is not None]
        weight, bias = _stacked([layer.weight for layer in plain]), _stacked(biases) if biases else None
        if weight is not None and (not biases or (bias is not None and len(biases) == len(plain))):
            return torch.split(F.linear(x, weight, bias), [layer.out_features for layer in plain], dim=-1)
    return [layer(x) for layer in layers]


def _stacked(tensors: Sequence[Tensor]) -> Tensor | None:
    """Return the tensors one above the other, as a view; None if they do not lie like that in memory."""
    first = tensors[0]
    storage, end = first.untyped_storage().data_ptr(), first.data_ptr()
    for tensor in tensors:
        place = tensor.untyped_storage().data_ptr(), tensor.data_ptr()
        if place != (storage, end) or not tensor.is_contiguous():
            return None
        end += tensor.nbytes
    return first.as_strided((sum(map(len, tensors)), *first.shape[1:]), first.stride())
