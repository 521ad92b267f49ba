"""The peer that whole models are measured against: the same modules with PyTorch's own functions as their ops."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm_fast import ops


def attention(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    *,
    activation: str | None = "silu",
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    h = F.group_norm(x, num_groups, weight, bias, eps)
    if scale is not None:
        h = h * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    return F.silu(h) if activation == "silu" else h


def nearest_codebook(z: Tensor, codebook: Tensor) -> Tensor:
    return torch.cdist(z.movedim(1, -1).float(), codebook.float()[None]).argmin(-1)


@contextlib.contextmanager
def eager_torch() -> Iterator[None]:
    """Inside the `with` block models run on PyTorch's group_norm, silu, scaled_dot_product_attention and cdist: what
    one would write without this package. Their parameters are the same objects, so outputs compare one to one.
    """
    with contextlib.ExitStack() as stack:
        for op in (attention, group_norm_silu, nearest_codebook):
            stack.enter_context(mock.patch.object(ops, op.__name__, op))
        yield


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """Relative L2 error, in float64."""
    assert got.shape == wanted.shape, f"{tuple(got.shape)} instead of {tuple(wanted.shape)}"
    got, wanted = got.detach().double(), wanted.detach().double()
    return float((got - wanted).norm() / wanted.norm())


def gradients(model: torch.nn.Module, output: Tensor, *inputs: Tensor) -> dict[str, Tensor]:
    """Gradients of a fixed random projection of the output by every parameter and input."""
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    named = {**dict(model.named_parameters()), **{f"input {i}": t for i, t in enumerate(inputs)}}
    values = torch.autograd.grad((output.double() * direction).sum(), list(named.values()), allow_unused=True)
    return {name: value for name, value in zip(named, values, strict=True) if value is not None}


def assert_same_gradients(got: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    """Relative L2 of each gradient. Some are zero but for rounding (a key's bias moves every score of a row alike), so
    errors below 1e-6 of the whole gradient's norm count as none.
    """
    assert got.keys() == wanted.keys()
    floor = 1e-6 * torch.stack([g.double().norm() for g in wanted.values()]).norm()
    for name, gradient in wanted.items():
        error = (got[name].double() - gradient.double()).norm()
        limit = tolerance * gradient.double().norm() + floor
        assert error <= limit, f"gradient of {name}: error {error:.2e}, allowed {limit:.2e}"
