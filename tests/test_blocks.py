"""Blocks and layers are called, hooked, found and replaced as diffusers' own."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from compare import relative_error
from torch import Tensor, nn

import ldm_fast
from ldm_fast.models.unet import UNet

diffusers = pytest.importorskip("diffusers")

import test_drop_in as pipelines  # noqa: E402
from diffusers.models.attention_processor import Attention  # noqa: E402
from test_diffusers_unet import CASES, CONDITIONAL, TOLERANCE, assert_same, inputs, pair  # noqa: E402

STATES = {"encoder_hidden_states", "encoder_attention_mask", "cross_attention_kwargs", "attention_mask"}


def walked(unet: nn.Module, sample: Tensor, timestep: Tensor, context: Tensor | None) -> Tensor:
    """The walk over the blocks that forks of diffusers have, by keywords."""
    temb = unet.time_embedding(unet.time_proj(timestep))
    h = unet.conv_in(sample)
    skips = (h,)
    for block in unet.down_blocks:
        given = {"encoder_hidden_states": context} if getattr(block, "has_cross_attention", False) else {}
        h, more = block(hidden_states=h, temb=temb, **given)
        assert isinstance(more, tuple)
        skips += more
    if getattr(unet.mid_block, "has_cross_attention", False):
        h = unet.mid_block(h, temb, encoder_hidden_states=context, attention_mask=None, cross_attention_kwargs=None)
    else:
        h = unet.mid_block(h, temb)
    for block in unet.up_blocks:
        own, skips = skips[-len(block.resnets) :], skips[: -len(block.resnets)]
        given = {"encoder_hidden_states": context} if getattr(block, "has_cross_attention", False) else {}
        h = block(hidden_states=h, temb=temb, res_hidden_states_tuple=own, **given)
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(h)))


@pytest.mark.parametrize("name", ["sd1", "sd2", "upscaler", "scale-shift", "unconditional", "super-resolution"])
@torch.no_grad()
def test_the_walk_of_a_fork(name):
    theirs, ours = pair(name)
    given = inputs(name)
    if "class_labels" in given:  # the walk has no embedding of classes; the blocks are the same without
        del given["class_labels"]
    arguments = given["sample"], given["timestep"], given.get("encoder_hidden_states")
    assert relative_error(walked(ours, *arguments), walked(theirs, *arguments)) <= TOLERANCE


def recorded(model: nn.Module, given: dict) -> dict[str, tuple]:
    """What each resnet, transformer and attention is called with, by shapes, and what kind of result it gives."""
    calls: dict[str, tuple] = {}

    def shape(value):
        return tuple(value.shape) if isinstance(value, Tensor) else value

    def note(name):
        def hook(module, args, kwargs, out):
            states = {key: shape(value) for key, value in kwargs.items() if value is not None}
            calls[name] = ([shape(a) for a in args], states, type(out) if not isinstance(out, tuple) else "tuple")

        return hook

    wanted = ("ResnetBlock2D", "Transformer2DModel", "BasicTransformerBlock", "Attention", "DownBlock2D", "UpBlock2D")
    for name, module in model.named_modules():
        if any(type(module).__name__.endswith(kind) for kind in wanted):
            module.register_forward_hook(note(name), with_kwargs=True)
    with torch.no_grad():
        model(**given)
    return calls


@pytest.mark.parametrize("name", ["sd1", "xl", "unconditional"])
def test_hooks_see_what_they_see_in_diffusers(name):
    """Positions, keywords and shapes; only upsample_size is always given."""
    theirs, ours = pair(name)
    wanted, got = recorded(theirs, inputs(name)), recorded(ours, inputs(name))
    assert wanted.keys() == got.keys()
    for layer, (args, kwargs, out) in wanted.items():
        again, keywords, kind = got[layer]
        keywords.pop("upsample_size", None)
        kwargs.pop("res_hidden_states_tuple", None)
        keywords.pop("res_hidden_states_tuple", None)
        hidden = "hidden_states" in kwargs or "hidden_states" in keywords
        if hidden or "up_blocks" not in layer:  # UNet2DModel calls its blocks by position
            assert kind == out, layer
        if name != "unconditional":
            assert (again, keywords) == (args, kwargs), layer


@pytest.mark.parametrize("name", CASES)
def test_no_module_changes_an_argument(name):
    """Hooks that copy lists and dictionaries change nothing, and nothing that was given is changed."""
    _, ours = pair(name)
    given = inputs(name)
    with torch.no_grad():
        plain = ours(**given).sample

        def copied(module, args, kwargs):
            before = [(t, t.clone()) for t in args if isinstance(t, Tensor)]
            before += [(t, t.clone()) for t in kwargs.values() if isinstance(t, Tensor)]
            lists = [(v, list(v)) for v in (*args, *kwargs.values()) if isinstance(v, list | tuple)]
            seen.append((before, lists))
            rebuild = lambda v: type(v)(list(v)) if isinstance(v, list | tuple) else v  # noqa: E731
            return tuple(map(rebuild, args)), {key: rebuild(value) for key, value in kwargs.items()}

        seen: list = []
        for module in ours.modules():
            module.register_forward_pre_hook(copied, with_kwargs=True)
        assert torch.equal(ours(**given).sample, plain)
    assert len(seen) > 10
    assert all(torch.equal(now, then) for before, _ in seen for now, then in before)
    assert all(len(now) == len(then) for _, lists in seen for now, then in lists)


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_group_offloading(kind):
    from diffusers.hooks import apply_group_offloading

    theirs, _ = pair("sd1")
    ours = UNet.from_diffusers(copy.deepcopy(theirs))
    cpu = torch.device("cpu")
    apply_group_offloading(ours, cpu, cpu, kind, **({"num_blocks_per_group": 1} if kind == "block_level" else {}))
    assert_same(theirs, ours, inputs("sd1"))


@pytest.mark.parametrize("name", ["sd1", "scale-shift", "unconditional"])
def test_replaced_norms(name):
    """StyleAligned and others replace `norm.forward` by a function of the map alone."""
    theirs, ours = pair(name)
    for model in (theirs, ours):
        for module in model.modules():
            if isinstance(module, nn.GroupNorm | nn.LayerNorm):
                module.forward = lambda x, forward=module.forward: forward(x * 1.25) + 0.1
    assert_same(theirs, ours, inputs(name))


def plug_and_play(self):
    """A residual block computed by somebody else's code, from its parts."""

    def forward(input_tensor, temb, *args, **kwargs):
        h = self.nonlinearity(self.norm1(input_tensor))
        if self.upsample is not None:
            input_tensor, h = self.upsample(input_tensor), self.upsample(h)
        elif self.downsample is not None:
            input_tensor, h = self.downsample(input_tensor), self.downsample(h)
        h = self.conv1(h)
        emb = self.time_emb_proj(self.nonlinearity(temb))[:, :, None, None]
        if self.time_embedding_norm == "default":
            h = self.norm2(h + emb)
        else:
            scale, shift = emb.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        h = self.conv2(self.dropout(self.nonlinearity(h)))
        if self.conv_shortcut is not None:
            input_tensor = self.conv_shortcut(input_tensor)
        return (input_tensor + h) / self.output_scale_factor

    return forward


@pytest.mark.parametrize("name", ["sd1", "scale-shift", "class-conditional"])
def test_replaced_residual_blocks(name):
    theirs, ours = pair(name)
    for module in ours.modules():
        if type(module).__name__ == "ResnetBlock2D":
            module.forward = plug_and_play(module)
    assert_same(theirs, ours, inputs(name))


def merged(block):
    """A transformer block as token merging computes it: found by its class's name, subclassed, given other code."""

    class Merged(type(block)):
        def forward(self, hidden_states, attention_mask=None, encoder_hidden_states=None, encoder_attention_mask=None,
                    timestep=None, cross_attention_kwargs=None, class_labels=None):  # fmt: skip
            assert not (self.use_ada_layer_norm or self.use_ada_layer_norm_zero)
            h, more = hidden_states, cross_attention_kwargs or {}
            own = encoder_hidden_states if self.only_cross_attention else None
            x = self.norm1(h)[:, ::2]  # every other token
            x = self.attn1(x, encoder_hidden_states=own, attention_mask=attention_mask, **more)
            h = h + x.repeat_interleave(2, dim=1)
            if self.attn2 is not None:
                x = self.attn2(self.norm2(h), encoder_hidden_states=encoder_hidden_states, **more)
                h = h + x
            return h + self.ff(self.norm3(h))

    block.__class__ = Merged


def test_token_merging():
    theirs, ours = pair("sd1")
    for model in (theirs, ours):
        blocks = [m for m in model.modules() if any(c.__name__ == "BasicTransformerBlock" for c in type(m).__mro__)]
        assert len(blocks) == 6
        for block in blocks:
            merged(block)
    assert_same(theirs, ours, inputs("sd1"))


@pytest.mark.parametrize("size", [(8, 8), (7, 9)], ids=str)
@pytest.mark.parametrize("name", ["sd1", "refiner", "unconditional"])
def test_freeu(name, size):
    theirs, ours = pair(name)
    given = inputs(name, size if name != "unconditional" else (8, 8))
    with torch.no_grad():
        plain = ours(**given).sample
    factors = {"s1": 0.9, "s2": 0.2, "b1": 1.2, "b2": 1.4}
    ours.enable_freeu(**factors)
    if name in CONDITIONAL:
        theirs.enable_freeu(**factors)
        with torch.no_grad():
            assert relative_error(ours(**given).sample, plain) > 1e-3
    assert_same(theirs, ours, given, tolerance=2e-5)
    ours.disable_freeu()
    with torch.no_grad():
        assert torch.equal(ours(**given).sample, plain)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize("kind", ["StableDiffusionPAGPipeline", "StableDiffusionSAGPipeline"])
def test_guidance_by_attention(kind):
    theirs = pipelines.stable_diffusion(getattr(diffusers, kind))
    parts = copy.deepcopy(theirs.components)
    ours = ldm_fast.accelerate(type(theirs)(**parts, requires_safety_checker=False))
    arguments = {"prompt": "a cat", "height": 16, "width": 16, "pag_scale": 3.0, "sag_scale": 1.0}
    arguments.pop("sag_scale" if "PAG" in kind else "pag_scale")
    assert pipelines.difference(pipelines.run(theirs, arguments), pipelines.run(ours, arguments)) <= pipelines.TOLERANCE


def test_layers_of_stand_ins_are_instances_of_theirs():
    theirs, _ = pair("sd1")
    ours = UNet.from_diffusers(theirs)
    for model in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        for name, module in theirs.named_modules():
            kind = type(module).__name__
            if kind.endswith("Block2D") or kind in ("Attention", "BasicTransformerBlock", "UNetMidBlock2DCrossAttn"):
                assert isinstance(model.get_submodule(name), type(module)), name
                assert type(model.get_submodule(name)).__name__ == kind
        assert_same(theirs, model, inputs("sd1"))
    attention = next(m for m in ours.modules() if isinstance(m, Attention))
    assert isinstance(attention, ldm_fast.models.attention.Attention)
    ours.join_projections()
    assert_same(theirs, copy.deepcopy(ours), inputs("sd1"))
