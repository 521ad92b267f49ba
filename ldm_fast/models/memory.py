"""`fixed_weights`: a scope in which results that do not change from one call of a network to the next are kept.

These are the keys and values of a context and the embeddings of a schedule's timesteps. Nothing is kept while gradients
are recorded, under autocast, or while a graph is made of the call (compiled, traced, captured).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ldm_fast.models.joined import is_plain, stands_alone

SOURCES = 2  # kept for each layer: a prompt and its negative, if they are not evaluated as one batch

T = TypeVar("T")
Layers = tuple[nn.Module, ...]


class Scope(dict[Layers, Any]):
    """Results by the layers that they come from. Tasks that were started inside may see it after its end."""

    ended = False


_scope: ContextVar[Scope | None] = ContextVar("fixed_weights", default=None)


@contextlib.contextmanager
def fixed_weights() -> Iterator[None]:
    """Promise that no weight changes inside, so that what depends on weights and context alone is computed once.

        with torch.no_grad(), ldm_fast.fixed_weights():
            for t in timesteps:
                z = step(z, unet(z, t, context).sample, t)

    Writes to the context are noticed, and so are layers that are exchanged, hooked or wrapped by an adapter. The scope
    holds for one thread; `LatentDiffusion.generate` and accelerated pipelines open their own. Also a decorator.
    """
    scope = Scope()
    token = _scope.set(scope)
    try:
        yield
    finally:
        _scope.reset(token)
        scope.ended = True
        scope.clear()


def open_scope(x: Tensor, layers: Layers) -> Scope | None:
    """Return the scope if what these linear layers make of x may be kept in it."""
    if not stands_alone(x) or (scope := _scope.get()) is None or scope.ended or not all(map(is_plain, layers)):
        return None
    captured = x.is_cuda and torch.cuda.is_current_stream_capturing()  # a CUDA graph would replay old results
    return None if captured else scope


def recall(source: Tensor, layers: Layers, compute: Callable[[], T]) -> T:
    """Return compute(), or what it returned earlier in the scope for this very source, not written to since."""
    scope = open_scope(source, layers)
    if scope is None or type(source) not in (Tensor, nn.Parameter) or source.is_inference():
        return compute()  # inference tensors do not count how often they are written
    state = source._version, torch.cuda.current_stream(source.device) if source.is_cuda else None
    results: tuple[tuple[Tensor, Any, T], ...] = scope.get(layers, ())
    for kept, kept_state, value in results:
        if kept is source and kept_state == state:
            return value
    value = compute()
    # as a whole, since threads may share a scope
    scope[layers] = (*(r for r in results if r[0] is not source), (source, state, value))[-SOURCES:]
    return value
