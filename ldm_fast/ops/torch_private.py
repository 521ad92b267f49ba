"""PyTorch's private names: what it is doing around a call, and what it can do. No other file uses them.

Hot paths ask these questions on every call, and PyTorch has no public answer, or one that takes longer than a small
op. Where a version of PyTorch lacks a name, the question is answered "perhaps", which is True, and the caller takes
the public road: the dispatcher, a look at each tensor, or the call of a layer. The result is the same, only later.
A function that a version of PyTorch lacks is None, and nothing is computed by it.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.nn.modules import module as modules
from torch.utils import _pytree as tree


def _perhaps(*_: object) -> bool:
    return True


def _question(name: str) -> Callable[..., Any]:
    """Return the function `torch.<name>`, or `_perhaps` if there is none."""
    found: Any = torch
    for word in name.split("."):
        found = getattr(found, word, None)
    return found or _perhaps


_is_tracing = _question("_C._is_tracing")
_count_dispatch_modes = _question("_C._len_torch_dispatch_stack")
_count_function_modes = _question("_C._len_torch_function_stack")
_innermost_transform = _question("_C._functorch.peek_interpreter_stack")
_functionalization = _question("_C._functorch.TransformType.Functionalize")
_is_profiling = _question("autograd._profiler_enabled")
_is_any_autocast_on = _question("_C._is_any_autocast_enabled")


# (q, k, v, attn_mask=None, scale=None) → out, log-sum-exp; and its gradients.
flash_attention_for_cpu: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
flash_attention_for_cpu_backward: Any = getattr(
    torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None
)


@functools.cache
def amx_is_used() -> bool:
    """Whether PyTorch multiplies bfloat16 matrices on Intel's tile units here; False if it cannot be found out.

    The environment variables that hold PyTorch and its library oneDNN back to narrower instructions count, too.
    """
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    library = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "ALL")).upper()
    allowed = "AMX" in library or library in ("ALL", "DEFAULT")
    return bool(supported and supported() and allowed and "ATEN_CPU_CAPABILITY" not in os.environ)


def someone_may_watch() -> bool:
    """Whether a compiler, tracer, mode, transform or profiler is to see every op. If so, go through the dispatcher."""
    return bool(
        torch.compiler.is_compiling()
        or _is_tracing()
        or _count_dispatch_modes()
        or _count_function_modes()
        or _innermost_transform() is not None
        or _is_profiling()
    )


def transform_may_differentiate() -> bool:
    """Whether a transform of `torch.func` may be on that differentiates, or under which another one does."""
    innermost = _innermost_transform()
    return innermost is not None and (innermost is True or innermost.key() != _functionalization)


def graph_may_be_made() -> bool:
    """Whether a compiler or tracer may be recording the ops. If so, keep no result for another call."""
    return bool(torch.compiler.is_compiling() or _is_tracing())


def autocast_may_be_on() -> bool:
    """Whether autocast may be on for some device. If so, ask for the device (`op.autocast_dtype`)."""
    return bool(_is_any_autocast_on())


def tangents_may_exist() -> bool:
    """Whether forward-mode differentiation may be going on. If so, look at each tensor (`forward_ad.unpack_dual`)."""
    return bool(getattr(forward_ad, "_current_level", 0) >= 0)


def global_hooks_may_exist() -> bool:
    """Whether hooks may be registered for the forward pass of all modules. If so, call the module."""
    names = ("_global_forward_hooks", "_global_forward_pre_hooks")
    return any(getattr(modules, name, True) for name in names)


def register_as_tree(cls: type[Any]) -> None:
    """Let PyTorch's tree functions (DDP, export, compilers) see the values of this class of dictionaries."""
    tree.register_pytree_node(
        cls,
        tree._dict_flatten,
        lambda values, context: cls(**tree._dict_unflatten(values, context)),
        serialized_type_name=f"{cls.__module__}.{cls.__name__}",
        flatten_with_keys_fn=tree._dict_flatten_with_keys,
    )
