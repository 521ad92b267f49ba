"""The peer that the ops and whole models are measured against: PyTorch's own functions, called one after another."""

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


OPS = {function.__name__: function for function in (attention, group_norm_silu, nearest_codebook)}


@contextlib.contextmanager
def eager_ops(*names: str) -> Iterator[None]:
    """Make models run on the functions above, or on those named, inside the `with` block.

    A model's parameters stay the same objects, so its outputs can be compared directly.
    """
    with contextlib.ExitStack() as stack:
        for name in names or OPS:
            stack.enter_context(mock.patch.object(ops, name, OPS[name]))
        yield
