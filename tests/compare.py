"""Comparison of the outputs and gradients of two models."""

from __future__ import annotations

import torch
from torch import Tensor


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """Return the relative L2 error, computed in float64."""
    assert got.shape == wanted.shape, f"{tuple(got.shape)} instead of {tuple(wanted.shape)}"
    got, wanted = got.detach().double(), wanted.detach().double()
    return float((got - wanted).norm() / wanted.norm())


def gradients(model: torch.nn.Module, output: Tensor, *inputs: Tensor) -> dict[str, Tensor]:
    """Return the gradients of a fixed random projection of the output with respect to every parameter and input."""
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    named = {**dict(model.named_parameters()), **{f"input {i}": t for i, t in enumerate(inputs)}}
    values = torch.autograd.grad((output.double() * direction).sum(), list(named.values()), allow_unused=True)
    return {name: value for name, value in zip(named, values, strict=True) if value is not None}


def assert_same_gradients(got: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    """Compare each gradient by its relative L2 error.

    Some gradients are zero except for rounding (a key's bias moves every score of a row alike), so errors below 1e-6 of
    the norm of the whole gradient are ignored.
    """
    assert got.keys() == wanted.keys()
    floor = 1e-6 * torch.stack([g.double().norm() for g in wanted.values()]).norm()
    for name, gradient in wanted.items():
        error = (got[name].double() - gradient.double()).norm()
        limit = tolerance * gradient.double().norm() + floor
        assert error <= limit, f"gradient of {name}: error {error:.2e}, allowed {limit:.2e}"
