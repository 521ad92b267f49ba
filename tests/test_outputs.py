"""Outputs behave as diffusers' do: dictionaries with attributes and positions, seen by PyTorch's tree functions."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from small_models import KL, UNET, VQ
from torch.distributed.utils import _apply_to_tensors
from torch.utils import _pytree as tree

from ldm_fast.models.autoencoder import AutoencoderKL, VQModel
from ldm_fast.models.outputs import DecoderOutput, UNetOutput
from ldm_fast.models.unet import UNet


def unet_output():
    return UNet(UNET).eval()(torch.ones(1, 4, 8, 8), 3, torch.ones(1, 2, 8))


def test_names_positions_and_keys():
    output = unet_output()
    sample = output.sample
    assert isinstance(output, dict) and output["sample"] is sample and output[0] is sample and output[:1] == (sample,)
    assert list(output) == list(output.keys()) == ["sample"] and output.to_tuple() == (sample,)
    assert {**output}["sample"] is sample and "sample" in output and len(output) == 1
    output.sample = sample + 1
    assert output["sample"] is output[0] is output.sample
    output["sample"] = sample
    assert output.sample is sample
    with pytest.raises(KeyError, match="latents"):
        output["latents"]
    for change in (lambda: output.pop("sample"), lambda: output.update(sample=1), lambda: output.__delitem__("sample")):
        with pytest.raises(TypeError, match="UNetOutput: results can be replaced, but neither removed nor added"):
            change()


def test_results_that_are_none_are_left_out():
    output = DecoderOutput(sample=torch.ones(1))
    assert list(output) == ["sample"] and output.commit_loss is None and not hasattr(output, "latents")
    assert list(DecoderOutput(sample=torch.ones(1), commit_loss=torch.zeros(1))) == ["sample", "commit_loss"]


def test_first_stages():
    x = torch.ones(1, 3, 8, 8)
    kl, vq = AutoencoderKL(KL).eval(), VQModel(VQ).eval()
    assert kl.encode(x)["latent_dist"] is not None and list(kl.encode(x)) == ["latent_dist"]
    assert list(kl(x)) == ["sample"] and kl(x).regulariser.kl().shape == (1,)
    assert list(vq.encode(x)) == ["latents"] and list(vq(x)) == ["sample", "commit_loss"]
    assert vq(x).regulariser.indices.shape == (1, 4, 4)


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda output: pickle.loads(pickle.dumps(output))])
def test_copies(again):
    output = AutoencoderKL(KL).eval()(torch.ones(1, 3, 8, 8))
    output.sample, output.regulariser = output.sample.detach(), None
    other = again(output)
    assert type(other) is DecoderOutput and torch.equal(other.sample, output.sample)
    assert other["sample"] is other.sample and list(other) == ["sample"]


def test_trees_see_the_tensors():
    """DDP, FSDP, accelerate and export take outputs apart and put them together again, each in its way."""
    output = UNetOutput(sample=torch.ones(2))
    for made in (
        tree.tree_map(lambda t: t + 1, output),
        _apply_to_tensors(lambda t: t + 1, output),
        type(output)({"sample": output.sample + 1}),
    ):
        assert type(made) is UNetOutput and made.sample.tolist() == made["sample"].tolist() == [2, 2]


def test_compiled_and_exported():
    model = UNet(UNET).eval()
    inputs = torch.ones(1, 4, 8, 8), torch.tensor(3), torch.ones(1, 2, 8)
    with torch.no_grad():
        wanted = model(*inputs)
        compiled = torch.compile(model, backend="eager", fullgraph=True)(*inputs)
        assert type(compiled) is UNetOutput and torch.equal(compiled["sample"], wanted.sample)
        exported = torch.export.export(model, inputs).module()(*inputs)
        torch.testing.assert_close(exported["sample"], wanted.sample)
    kl, z = AutoencoderKL(KL).eval(), torch.ones(1, KL.latent_channels, 4, 4)
    decoded = torch.compile(kl.decode, backend="eager", fullgraph=True)(z)
    assert torch.equal(decoded.sample, kl.decode(z).sample)
