"""Work that is not done twice: projections of one input in a single product, and results of what has not changed.

The numbers are the same as without, but for the order of sums inside a larger matrix product. Everything here stands
aside while gradients are recorded, under autocast, and where a graph is made of the call (compiled, traced, captured).
Weights that require a gradient are taken for unchanged only inside `fixed_weights`, as which `LatentDiffusion.generate`
and accelerated pipelines run.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ldm_fast.models.joined import _stands_alone, is_plain

# ---- results remembered ----

_scope: ContextVar[object | None] = ContextVar("fixed_weights", default=None)


@contextlib.contextmanager
def fixed_weights() -> Iterator[None]:
    """A promise that nobody trains in here: results may be kept for tensors that require a gradient, too.

    What trains such tensors writes to them without a trace (fused optimizers, moving averages that are copied in), so
    they are taken for unchanged only from one call to the next within one such scope. Also a decorator.
    """
    token = _scope.set(object())
    try:
        yield
    finally:
        _scope.reset(token)


def _fixed(tensors: Sequence[Tensor]) -> bool:
    """Whether no write to the tensors would go unnoticed."""
    return _scope.get() is not None or not any(t.requires_grad for t in tensors)


class _Seen(NamedTuple):
    """A tensor as it was: the object, where its values lie, how often they have been written, and where that counts."""

    tensor: weakref.ref
    address: int
    version: int
    scope: object | None  # of `fixed_weights`, where the tensor needs one

    @classmethod
    def of(cls, tensor: Tensor, when_gone: Callable[[weakref.ref], None] | None = None) -> _Seen:
        return cls(weakref.ref(tensor, when_gone), *_state(tensor))

    def is_still(self, tensor: Tensor) -> bool:
        return self.tensor() is tensor and self[1:] == _state(tensor)


def _state(tensor: Tensor) -> tuple[int, int, object | None]:
    return tensor.data_ptr(), tensor._version, _scope.get() if tensor.requires_grad else None


def _unchanged(seen: Sequence[_Seen], tensors: Sequence[Tensor]) -> bool:
    return len(seen) == len(tensors) and all(s.is_still(t) for s, t in zip(seen, tensors, strict=True))


class _Entry(NamedTuple):
    source: _Seen
    weights: tuple[_Seen, ...]
    stream: Any  # of the GPU: on another one the value might not be there yet
    value: Any


class Memory:
    """Results of linear layers, kept for the last few sources and given again while source and weights are unchanged.

    Unchanged means the same tensor objects, at the same place in memory, not written to since: in-place operations,
    optimizers, `load_state_dict`, other dtypes and devices are all noticed. Writing through `.data` or a NumPy view
    leaves no trace in PyTorch, nor do its fused optimizers. So for tensors that require a gradient results are kept
    only within one scope of `fixed_weights`; whoever writes like that to others, between two calls with one and the
    same source, calls `forget`. A result lives no longer than its source.

    Threads may share a memory: entries never change, and lists of them are only exchanged as a whole.
    """

    SIZE = 2  # a prompt and its negative, where they are not evaluated as one batch

    def __init__(self) -> None:
        self._entries: list[_Entry] = []

    def recall(self, source: Tensor, layers: Sequence[nn.Module], compute: Callable[[], Any]) -> Any:
        """compute(), or what it returned for this very source and these weights before."""
        if torch.compiler.is_compiling():
            return compute()
        if not all(is_plain(layer) for layer in layers) or not _can_be_kept(source, _weights(layers)):
            self.forget()
            return compute()
        weights, stream = _weights(layers), _stream(source)
        for entry in self._entries:
            if entry.source.is_still(source) and _unchanged(entry.weights, weights) and entry.stream == stream:
                return entry.value
        # Looked at before: what another thread writes while the value is computed counts as a change.
        seen = _Seen.of(source, _forgetting(self)), tuple(map(_Seen.of, weights)), stream
        value = compute()
        others = [entry for entry in self._entries if entry.source.tensor() is not source]
        self._entries = [*others, _Entry(*seen, value)][-self.SIZE :]
        return value

    def forget(self, gone: weakref.ref | None = None) -> None:
        """Drops all results, or those of a source that is gone."""
        self._entries = [entry for entry in self._entries if gone is not None and entry.source.tensor is not gone]

    def __reduce__(self) -> tuple[type[Memory], tuple[()]]:
        return Memory, ()  # copied and pickled without what it holds


def _forgetting(memory: Memory) -> Callable[[weakref.ref], None]:
    """`memory.forget` without holding on to the memory, which would keep both alive in a circle."""
    forget = weakref.WeakMethod(memory.forget)

    def call(gone: weakref.ref) -> None:
        if (method := forget()) is not None:
            method(gone)

    return call


def _stream(source: Tensor) -> Any:
    return torch.cuda.current_stream(source.device) if source.is_cuda else None


def _can_be_kept(source: Tensor, weights: Sequence[Tensor]) -> bool:
    captured = source.is_cuda and torch.cuda.is_current_stream_capturing()  # a CUDA graph would replay old results
    plain = type(source) is Tensor or type(source) is nn.Parameter
    own_values = plain and not torch._C._functorch.is_functorch_wrapped_tensor(source)  # as inside torch.vmap
    return (
        own_values
        and not captured
        and _stands_alone(source)
        and not any(t.is_inference() for t in (source, *weights))  # these do not count their changes
        and _fixed((source, *weights))
    )


class Remembering(nn.Module):
    """A module with a memory for what its layers computed.

    It forgets when a layer is exchanged (an adapter around it may write to the weights without a trace), when it moves
    to another device or dtype (other weights may come to lie at the old place), and at `train()` and `eval()`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._memory: Memory | TimeTable = Memory()

    def forget(self) -> None:
        """Drops what was kept of earlier calls."""
        self._memory.forget()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Remembering:
        self.forget()
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True) -> Remembering:
        self.forget()
        return super().train(mode)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if isinstance(value, nn.Module):
            self._memory.forget()


class _Table(NamedTuple):
    index: dict[float, int]
    rows: Tensor
    weights: tuple[_Seen, ...]


class TimeTable:
    """Embeddings of the timesteps of a whole schedule, computed at once and found again by the timestep's value."""

    def __init__(self) -> None:
        self._table: _Table | None = None

    def fill(self, timesteps: Tensor, layers: Sequence[nn.Module], compute: Callable[[], Tensor]) -> None:
        """Keeps the rows (T, C) that compute() returns, the embeddings of timesteps (T,) by these layers, if plain."""
        self.forget()
        if not all(is_plain(layer) for layer in layers):
            return
        weights = _weights(layers)
        if _fixed(weights) and not any(t.is_inference() for t in weights):
            index = {t: i for i, t in enumerate(timesteps.float().tolist())}
            seen = tuple(map(_Seen.of, weights))
            self._table = _Table(index, compute(), seen)

    def look_up(self, timesteps: Tensor | float, layers: Sequence[nn.Module], like: Tensor) -> Tensor | None:
        """The rows (1 or B, C) for a number or a tensor on the CPU, of the dtype and device of `like`; None without."""
        table = self._table
        if torch.compiler.is_compiling() or table is None:
            return None
        if not (all(is_plain(layer) for layer in layers) and _fixed(_weights(layers)) and _stands_alone(like)):
            self.forget()
            return None
        if isinstance(timesteps, Tensor) and timesteps.device.type != "cpu":
            return None  # to look at its value is to wait for the device
        index = [table.index.get(t) for t in torch.as_tensor(timesteps).float().reshape(-1).tolist()]
        if None in index or not _unchanged(table.weights, _weights(layers)):
            return None
        rows = table.rows
        return rows[index] if (rows.dtype, rows.device) == (like.dtype, like.device) else None

    def forget(self) -> None:
        """Drops all rows."""
        self._table = None

    def __reduce__(self) -> tuple[type[TimeTable], tuple[()]]:
        return TimeTable, ()


def _weights(layers: Sequence[nn.Module]) -> list[Tensor]:
    return [t for layer in layers for t in (layer.weight, layer.bias) if t is not None]
