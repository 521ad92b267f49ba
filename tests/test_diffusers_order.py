"""Parameters, buffers and modules stand in diffusers' order: optimizers, averages and PEFT go by it."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

diffusers = pytest.importorskip("diffusers")

import test_diffusers_autoencoder as first_stages  # noqa: E402
import test_diffusers_unet as unets  # noqa: E402
from test_weights import ZOO  # noqa: E402

from ldm_fast.interop.compvis import autoencoder_config_from_compvis, unet_config_from_compvis  # noqa: E402
from ldm_fast.interop.diffusers import config_to_diffusers  # noqa: E402
from ldm_fast.models.autoencoder import AutoencoderKL, VQModel  # noqa: E402
from ldm_fast.models.pretrained import Pretrained  # noqa: E402
from ldm_fast.models.unet import UNet  # noqa: E402

PUBLISHED = {name: part for name, part in ZOO.items() if part["kind"] in ("unet", "first_stage")}
FAMILIES = {f"unet {name}": ("unet", name) for name in unets.CASES}
FAMILIES |= {f"first stage {name}": ("first stage", name) for name in first_stages.MODELS}


def pair(family: str) -> tuple[nn.Module, Pretrained]:
    """(theirs, ours) with the same weights."""
    kind, name = FAMILIES[family]
    if kind == "unet":
        return unets.pair(name)
    ours, theirs = first_stages.pair(name)
    return theirs, ours


def assert_same_order(theirs: nn.Module, ours: nn.Module) -> None:
    for what in ("named_parameters", "named_buffers"):
        wanted, got = ([name for name, _ in getattr(model, what)()] for model in (theirs, ours))
        assert got == wanted
    assert list(ours.state_dict()) == list(theirs.state_dict())
    wanted, got = ([name for name, _ in model.named_modules()] for model in (theirs, ours))
    assert [name for name in got if name in set(wanted)] == [name for name in wanted if name in set(got)]


@pytest.mark.parametrize("family", FAMILIES)
def test_same_order(family):
    assert_same_order(*pair(family))


@pytest.mark.parametrize("name", PUBLISHED)
def test_same_order_in_every_published_model(name):
    part = PUBLISHED[name]
    read = unet_config_from_compvis if part["kind"] == "unet" else autoencoder_config_from_compvis
    config = read(part["params"])
    values = config_to_diffusers(config)
    if not hasattr(diffusers, values["_class_name"]):
        pytest.skip(f"diffusers has no {values['_class_name']}")
    build = next(cls for cls in (UNet, AutoencoderKL, VQModel) if cls.config_class is type(config))
    with torch.device("meta"):
        assert_same_order(getattr(diffusers, values["_class_name"]).from_config(values), build(config))


def squared(model: nn.Module, family: str) -> torch.Tensor:
    """A loss."""
    kind, name = FAMILIES[family]
    given = unets.inputs(name) if kind == "unet" else {"sample": first_stages.images(model)}
    return model(**given).sample.square().mean()


@pytest.mark.parametrize("family", ["unet sd1", "unet xl", "unet unconditional", "first stage kl attention"])
def test_an_optimizer_of_theirs_goes_on_with_ours(family):
    """Its state goes by the number of the parameter: after the next step the weights are the same."""
    theirs, ours = pair(family)
    start = {name: parameter.clone() for name, parameter in ours.named_parameters()}
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-3) for model in (theirs, ours)]
    for _ in range(2):
        squared(theirs, family).backward()
        optimizers[0].step()
        optimizers[0].zero_grad()
    ours.load_state_dict(theirs.state_dict())
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    for model, optimizer in zip((theirs, ours), optimizers, strict=True):
        gradients = torch.Generator().manual_seed(3)
        for _, parameter in sorted(model.named_parameters()):  # the same, whatever rounding would make of them
            parameter.grad = torch.randn(parameter.shape, generator=gradients)
        optimizer.step()
    wanted = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, wanted[name]), name
        assert not torch.equal(parameter, start[name]), name


@pytest.mark.parametrize("family", ["unet sd1", "unet unconditional"])
def test_averages_are_written_and_read(family, tmp_path):
    """`EMAModel` goes by the order of parameters, and writes a model that diffusers opens."""
    from diffusers.training_utils import EMAModel

    theirs, _ = pair(family)
    ours = UNet.from_diffusers(copy.deepcopy(theirs))
    average = EMAModel(theirs.parameters(), decay=0.5, model_cls=type(theirs), model_config=theirs.config)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.mul_(1.5)
    average.step(ours.parameters())
    average.save_pretrained(tmp_path)
    again = type(theirs).from_pretrained(tmp_path)
    before, after = dict(theirs.named_parameters()), dict(ours.named_parameters())
    for name, parameter in again.named_parameters():
        low, high = (torch.minimum, torch.maximum)
        between = low(before[name], after[name]) <= parameter, parameter <= high(before[name], after[name])
        assert all(part.all() for part in between), name
    copied = copy.deepcopy(ours)
    average.copy_to(copied.parameters())
    assert all(torch.equal(p, dict(again.named_parameters())[name]) for name, p in copied.named_parameters())


def test_the_same_seed_gives_the_same_lora():
    peft = pytest.importorskip("peft")
    layers = []
    for model in pair("unet sd1"):
        torch.manual_seed(5)
        lora = peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "conv1", "proj_in"], init_lora_weights="gaussian")
        peft.inject_adapter_in_model(lora, model, "one")
        layers.append([(name, p) for name, p in model.named_parameters() if "lora_" in name])
    assert len(layers[0]) > 20
    for (name, wanted), (ours, got) in itertools.zip_longest(*layers):
        assert name == ours and torch.equal(wanted, got), name
