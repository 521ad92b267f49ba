"""If PyTorch lacks a private name, an op uses public functions instead, with the same result."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from ldm_fast import ops
from ldm_fast.ops import torch_private

# Private names of torch, each with the question that needs it.
QUESTIONS = {
    "_C._is_tracing": lambda: torch_private.someone_may_watch() and torch_private.graph_may_be_made(),
    "_C._len_torch_dispatch_stack": torch_private.someone_may_watch,
    "_C._len_torch_function_stack": torch_private.someone_may_watch,
    "_C._functorch.peek_interpreter_stack": torch_private.someone_may_watch,
    "autograd._profiler_enabled": torch_private.someone_may_watch,
    "_C._is_any_autocast_enabled": torch_private.autocast_may_be_on,
    "autograd.forward_ad._current_level": torch_private.tangents_may_exist,
    "nn.modules.module._global_forward_hooks": torch_private.global_hooks_may_exist,
    "nn.modules.module._global_forward_pre_hooks": torch_private.global_hooks_may_exist,
}


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Removes names from torch for the duration of a test."""

    def remove(name: str) -> None:
        if name == "autograd.forward_ad._current_level":  # the public functions of this PyTorch read it themselves
            monkeypatch.setattr(torch_private, "forward_ad", SimpleNamespace())
            return
        monkeypatch.delattr(f"torch.{name}")
        importlib.reload(torch_private)

    yield remove
    monkeypatch.undo()
    importlib.reload(torch_private)


def results() -> list[Tensor]:
    """Return results of ops with and without gradients, and under autocast."""
    q, k, v = torch.randn(3, 1, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    leaf = q.clone().requires_grad_()
    out = ops.attention(leaf, k, v)
    normed = ops.group_norm_silu(q, 2, None, None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lowered = ops.attention(q, k, v)
    return [ops.attention(q, k, v), out.detach(), *torch.autograd.grad(out.sum(), leaf), normed, lowered]


def test_by_default_every_answer_is_no() -> None:
    assert not any(question() for question in QUESTIONS.values())


@pytest.mark.parametrize("name", QUESTIONS)
def test_if_a_name_is_missing_the_answer_is_yes(name: str, without: Callable[[str], None]) -> None:
    wanted = results()
    without(name)
    assert QUESTIONS[name]()
    for got, right in zip(results(), wanted, strict=True):
        assert torch.equal(got, right) and got.dtype == right.dtype


@pytest.mark.filterwarnings("ignore")  # tracing is old
def test_what_goes_on_is_seen() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch_private.autocast_may_be_on()
    with torch.autograd.forward_ad.dual_level():
        assert torch_private.tangents_may_exist()
    traced: list[bool] = []

    def look(x: Tensor) -> Tensor:
        traced.append(torch_private.graph_may_be_made())
        return x + 1

    torch.jit.trace(look, torch.ones(2), check_trace=False)
    assert traced == [True]
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert torch_private.global_hooks_may_exist()
    handle.remove()


@pytest.mark.parametrize(
    ("variable", "value", "used"),
    [
        ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_AMX", True),
        ("ONEDNN_MAX_CPU_ISA", "avx512_core_bf16", False),
        ("DNNL_MAX_CPU_ISA", "AVX2", False),
        ("ATEN_CPU_CAPABILITY", "avx2", False),
        ("UNRELATED", "AVX2", True),
    ],
)
def test_tile_units_are_used_unless_the_environment_forbids_it(
    variable: str, value: str, used: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, value)
    assert torch_private.amx_is_used.__wrapped__() is used
    monkeypatch.delattr("torch.cpu._is_amx_tile_supported")
    assert torch_private.amx_is_used.__wrapped__() is False
