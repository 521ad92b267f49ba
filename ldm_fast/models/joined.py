"""Projections of one input in a single product."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from ldm_fast.ops.op import autocast_dtype


def is_plain(layer: nn.Module) -> bool:
    """Whether calling the layer is F.linear with its weights: no adapter around it, no hook, not quantized."""
    return (
        type(layer) is nn.Linear
        and type(layer.weight) is nn.Parameter
        and "forward" not in layer.__dict__  # replaced there by programs that keep weights elsewhere
        and not (layer._forward_hooks or layer._forward_pre_hooks)
        and not (hooks._global_forward_hooks or hooks._global_forward_pre_hooks)  # on every module there is
    )


def _stands_alone(x: Tensor) -> bool:
    """Whether nothing but this call's result matters: no gradient, no graph that would hold on to what it used."""
    return not (torch.compiler.is_compiling() or torch.is_grad_enabled() or torch.jit.is_tracing() or under_autocast(x))


def under_autocast(x: Tensor) -> bool:
    """Whether ops on x are cast by autocast."""
    return autocast_dtype(x) is not None


# ---- one product ----


@torch.no_grad()
def join(layers: Sequence[nn.Module]) -> None:
    """Moves the weights (and biases) of linear layers one behind the other in memory, for `linears`.

    The parameters stay the objects they are, with the values they have. Layers that are not plain stay where they are.
    This is a layout for inference: programs that look at storages (accelerate, safetensors' `save_model`) take joined
    weights for tied ones, and store only some of them.
    """
    if not all(is_plain(layer) for layer in layers):
        return
    for parameters in ([layer.weight for layer in layers], [layer.bias for layer in layers]):
        first = parameters[0]
        if any(p is None or p.is_meta or (p.device, p.dtype) != (first.device, first.dtype) for p in parameters):
            continue
        if _one_behind_the_other(parameters) is None:
            parts = torch.cat(parameters).split([len(p) for p in parameters])
            for parameter, part in zip(parameters, parts, strict=True):
                parameter.data = part


@torch.no_grad()
def separate(layers: Sequence[nn.Module]) -> None:
    """Undoes `join`: every weight in memory of its own, even if a layer was wrapped since. The objects stay."""
    for layer in layers:
        for parameter in layer.parameters():
            if type(parameter) is nn.Parameter and parameter.untyped_storage().nbytes() > parameter.nbytes:
                parameter.data = parameter.data.clone()


def linears(x: Tensor, layers: Sequence[nn.Module]) -> Sequence[Tensor]:
    """[layer(x) for layer in layers]; for plain layers that were joined, in one product without a copy."""
    if _stands_alone(x) and all(is_plain(layer) for layer in layers):
        weight = _one_behind_the_other([layer.weight for layer in layers])
        bias = _one_behind_the_other([layer.bias for layer in layers])
        if weight is not None and (bias is not None or all(layer.bias is None for layer in layers)):
            return F.linear(x, weight, bias).split([layer.out_features for layer in layers], dim=-1)
    return [layer(x) for layer in layers]


def _one_behind_the_other(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """The tensors stacked along their first dimension, as a view; None if they do not lie like that in memory."""
    if any(tensor is None for tensor in tensors):
        return None
    first = tensors[0]
    storage, end = first.untyped_storage().data_ptr(), first.data_ptr()
    for tensor in tensors:
        if not tensor.is_contiguous() or tensor.data_ptr() != end or tensor.dtype != first.dtype:
            return None
        if tensor.untyped_storage().data_ptr() != storage:
            return None
        end += tensor.nbytes
    return first.as_strided((sum(len(t) for t in tensors), *first.shape[1:]), first.stride())
