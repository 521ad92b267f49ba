"""The transforms of `torch.func` through the ops: right, or an error of ours that says what to use."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from small_models import UNET
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from ldm_fast import ops, use_impl
from ldm_fast.models.unet import UNet
from ldm_fast.ops.dispatch import IMPLEMENTATIONS

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap calls an op once for each


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


Q, K, V, MASK = (
    numbers(*shape, seed=seed) for seed, shape in enumerate([(2, 3, 4, 8), (2, 3, 5, 8), (2, 3, 5, 8), (4, 5)])
)
X, WEIGHT, BIAS, SCALE, SHIFT = (
    numbers(2, 8, 3, 3),
    numbers(8),
    numbers(8, seed=1),
    numbers(2, 8),
    numbers(2, 8, seed=2),
)


def norm_reference(**changed: Tensor) -> Tensor:
    given = {"x": X, "weight": WEIGHT, "bias": BIAS, "scale": SCALE, "shift": SHIFT, **changed}
    normed = F.group_norm(given["x"], 4, given["weight"], given["bias"])
    return F.silu(normed * (1 + given["scale"][..., None, None]) + given["shift"][..., None, None])


def norm(**changed: Tensor) -> Tensor:
    given = {"x": X, "weight": WEIGHT, "bias": BIAS, "scale": SCALE, "shift": SHIFT, **changed}
    return ops.group_norm_silu(num_groups=4, **given)


def attention_reference(q: Tensor = Q, k: Tensor = K, v: Tensor = V) -> Tensor:
    return (q @ k.mT * 8**-0.5 + MASK).softmax(-1) @ v


# By op and argument: the op, the same in PyTorch's own ops, and where.
FUNCTIONS: dict[str, tuple[str, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], Tensor]] = {
    **{
        f"attention {name}": (
            "attention",
            lambda x, name=name: ops.attention(**{"q": Q, "k": K, "v": V, "mask": MASK, name: x}),
            lambda x, name=name: attention_reference(**{name: x}),
            at,
        )
        for name, at in (("q", Q), ("k", K), ("v", V))
    },
    **{
        f"group_norm_silu {name}": (
            "group_norm_silu",
            lambda x, name=name: norm(**{name: x}),
            lambda x, name=name: norm_reference(**{name: x}),
            at,
        )
        for name, at in (("x", X), ("weight", WEIGHT), ("bias", BIAS), ("scale", SCALE), ("shift", SHIFT))
    },
}
OURS = [(name, impl) for name, row in FUNCTIONS.items() for impl in IMPLEMENTATIONS[row[0]] if impl != "triton"]


def pulled_back(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    out, back = vjp(f, x)
    (gradient,) = back(torch.cos(torch.arange(out.numel(), dtype=out.dtype).reshape(out.shape)))
    return gradient


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]] = {
    "grad": lambda f, x: grad(lambda y: f(y).square().sum())(x),
    "vjp": pulled_back,
    "jacrev": lambda f, x: jacrev(f)(x),
    "jacrev row by row": lambda f, x: jacrev(f, chunk_size=1)(x),
    "vmap": lambda f, x: vmap(f)(torch.stack([x, x + 1, 2 * x])),
    "vmap along another dimension": lambda f, x: vmap(f, in_dims=-1)(torch.stack([x, x + 1], -1)),
    "vmap of grad": lambda f, x: vmap(grad(lambda y: f(y).square().sum()))(torch.stack([x, x + 1])),
    "grad of vmap": lambda f, x: grad(lambda y: vmap(f)(torch.stack([y, 2 * y])).square().sum())(x),
    "jacobian of autograd": lambda f, x: torch.autograd.functional.jacobian(f, x),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(("name", "impl"), OURS, ids=lambda value: value)
def test_transforms(name: str, impl: str, transform: str) -> None:
    """As through PyTorch's own ops."""
    _, function, truth, at = FUNCTIONS[name]
    with use_impl(impl):
        result = TRANSFORMS[transform](function, at)
    torch.testing.assert_close(result, TRANSFORMS[transform](truth, at), rtol=2e-4, atol=2e-5)


UNSUPPORTED = {
    "jvp": (lambda f, x: jvp(f, (x,), (x,)), NotImplementedError, "no forward-mode derivative.*; use reverse mode"),
    "jacfwd": (lambda f, x: jacfwd(f)(x), NotImplementedError, "no forward-mode derivative.*; use reverse mode"),
    "hessian": (
        lambda f, x: hessian(lambda y: f(y).sum())(x),
        NotImplementedError,
        "no forward-mode derivative.*; use reverse mode",
    ),
    "grad of grad": (
        lambda f, x: grad(lambda y: grad(lambda w: f(w).sum())(y).sum())(x),
        RuntimeError,
        "no second derivative .*write it out",
    ),
}


@pytest.mark.parametrize("transform", UNSUPPORTED)
@pytest.mark.parametrize(("name", "impl"), OURS, ids=lambda value: value)
def test_what_is_not_supported_says_what_to_use(name: str, impl: str, transform: str) -> None:
    op, function, _, at = FUNCTIONS[name]
    run, kind, message = UNSUPPORTED[transform]
    with use_impl(impl), pytest.raises(kind, match=rf"{op}: has {message}"):
        run(function, at)


@pytest.mark.parametrize("impl", [impl for impl in IMPLEMENTATIONS["group_norm_stats"] if impl != "triton"])
def test_ops_without_gradients(impl: str) -> None:
    """The halves of a norm say so; indices have none, and pass through."""
    z, codebook = numbers(6, 4), numbers(5, 4, seed=1)
    with use_impl(impl):
        stats = ops.group_norm_stats(X, 4)
        for function in (lambda x: ops.group_norm_stats(x, 4), lambda x: ops.group_norm_apply(x, stats, 4, None, None)):
            torch.testing.assert_close(vmap(function)(torch.stack([X, X]))[1], function(X))
            with pytest.raises(RuntimeError, match="has no gradient; group_norm_silu"):
                grad(lambda x, function=function: function(x).sum())(X)
        assert torch.equal(
            vmap(lambda z: ops.nearest_codebook(z, codebook))(z[None])[0], ops.nearest_codebook(z, codebook)
        )
        straight_through = grad(lambda z: (z + (codebook[ops.nearest_codebook(z, codebook)] - z).detach()).sum())
        assert torch.equal(straight_through(z), torch.ones_like(z))


def test_a_whole_unet() -> None:
    """Gradients of `functional_call`, and of each sample, are those of autograd."""
    torch.manual_seed(0)
    unet = UNet(UNET)
    z, context = numbers(2, UNET.in_channels, 8, 8), numbers(2, 3, UNET.cross_attention_dim)
    parameters = {name: parameter.detach() for name, parameter in unet.named_parameters()}

    def loss(parameters: dict[str, Tensor], z: Tensor, context: Tensor) -> Tensor:
        return functional_call(unet, parameters, (z, 3, context)).sample.square().mean()

    gradients = grad(loss)(parameters, z, context)
    unet(z, 3, context).sample.square().mean().backward()
    for name, parameter in unet.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-5)
    each = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, z[:, None], context[:, None])
    for name, parameter in unet.named_parameters():
        torch.testing.assert_close(each[name].mean(0), parameter.grad, rtol=1e-3, atol=1e-5)
