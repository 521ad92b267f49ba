"""Processors of others on our attention layers: as on diffusers' own, and never ignored."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from compare import relative_error
from torch import nn

import ldm_fast
from ldm_fast.models.attention import attention_layers

diffusers = pytest.importorskip("diffusers")

import test_diffusers_autoencoder as first_stages  # noqa: E402
from diffusers.models import attention_processor as theirs_are  # noqa: E402
from test_diffusers_unet import assert_same, inputs, pair  # noqa: E402

TOLERANCE = 1e-5


class Scores:
    """Attention by the layer's own tools, as prompt-to-prompt and Attend-and-Excite do; keeps the probabilities."""

    def __init__(self, strength: float = 1.0):
        self.strength, self.seen = strength, []

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None, sharpen=None):
        residual, shape = hidden_states, hidden_states.shape
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        if len(shape) == 4:
            hidden_states = hidden_states.view(shape[0], shape[1], -1).transpose(1, 2)
        batch, length, _ = (hidden_states if encoder_hidden_states is None else encoder_hidden_states).shape
        attention_mask = attn.prepare_attention_mask(attention_mask, length, batch)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        query = attn.to_q(hidden_states)
        if encoder_hidden_states is None:
            encoder_hidden_states = hidden_states
        elif attn.norm_cross:
            encoder_hidden_states = attn.norm_encoder_hidden_states(encoder_hidden_states)
        key, value = attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
        query, key, value = (attn.head_to_batch_dim(t) for t in (query, key, value))
        probabilities = attn.get_attention_scores(query, key, attention_mask)
        self.seen.append(probabilities)
        probabilities = probabilities ** (self.strength if sharpen is None else sharpen)
        out = attn.batch_to_head_dim(torch.bmm(probabilities, value))
        out = attn.to_out[1](attn.to_out[0](out))
        if len(shape) == 4:
            out = out.transpose(-1, -2).reshape(shape)
        if attn.residual_connection:
            out = out + residual
        return out / attn.rescale_output_factor


class Doubled(theirs_are.AttnProcessor2_0):
    """A subclass of a plain processor."""

    def __call__(self, *args, **kwargs):
        return 2 * super().__call__(*args, **kwargs)


class Wrapped:
    """What trackers do: they call the processor that was there."""

    def __init__(self, inner):
        self.inner = inner

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **kwargs):
        return self.inner(attn, hidden_states, encoder_hidden_states, attention_mask, **kwargs) * 1.5


class AttnProcessor2_0:  # the name of a plain processor, but another's class
    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        return hidden_states * 0.5


def custom_diffusion(attn):
    processor = theirs_are.CustomDiffusionAttnProcessor2_0(
        train_kv=attn.is_cross_attention,
        train_q_out=attn.is_cross_attention,
        hidden_size=attn.to_q.in_features,
        cross_attention_dim=attn.cross_attention_dim if attn.is_cross_attention else None,
    )
    with torch.no_grad():
        for i, parameter in enumerate(processor.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)) * 0.2)
    return processor


PROCESSORS = {
    "scores": lambda attn: Scores(),
    "sharpened": lambda attn: Scores(2.0),
    "a subclass": lambda attn: Doubled(),
    "wrapped": lambda attn: Wrapped(theirs_are.AttnProcessor2_0()),
    "of a plain one's name": lambda attn: AttnProcessor2_0(),
    "custom diffusion": custom_diffusion,
    "text to video": lambda attn: CrossFrame(),
}
PLAIN = [theirs_are.AttnProcessor, theirs_are.AttnProcessor2_0, lambda: theirs_are.SlicedAttnProcessor(1)]


class CrossFrame:
    """Keys and values of the first image of the batch, as Text2Video-Zero."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        query, own = attn.to_q(hidden_states), encoder_hidden_states is None
        context = hidden_states if own else encoder_hidden_states
        key, value = attn.to_k(context), attn.to_v(context)
        if own:
            key, value = (t[:1].expand_as(t) for t in (key, value))
        query, key, value = (attn.head_to_batch_dim(t) for t in (query, key, value))
        out = torch.bmm(attn.get_attention_scores(query, key, attention_mask), value)
        return attn.to_out[0](attn.batch_to_head_dim(out))


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    return {name: layer for name, layer in model.named_modules() if hasattr(layer, "set_processor")}


@pytest.mark.parametrize("one", [True, False], ids=["one layer", "all layers"])
@pytest.mark.parametrize("kind", PROCESSORS)
@pytest.mark.parametrize("name", ["sd1", "sd2", "unconditional"])
def test_processors_of_others_run_as_on_their_layer(name, kind, one):
    if name == "unconditional" and kind in ("custom diffusion", "text to video"):
        pytest.skip("made for tokens")
    theirs, ours = pair(name)
    given = inputs(name)
    with torch.no_grad():
        plain = ours(**given).sample
    for model in (theirs, ours):
        layers = list(layers_of(model).values())
        for layer in layers[1:2] if one else layers:
            layer.processor = PROCESSORS[kind](layer)
    assert_same(theirs, ours, given)
    if kind not in ("scores", "text to video"):
        with torch.no_grad():
            assert relative_error(ours(**given).sample, plain) > 1e-4
    reasons = ldm_fast.explain(ours).layers
    assert len(reasons) == (1 if one else len(layers_of(ours)))
    assert "computes attention in a way of its own" in str(ldm_fast.explain(ours))


def test_probabilities_are_seen():
    theirs, ours = pair("sd1")
    seen = []
    for model in (theirs, ours):
        model.set_attn_processor(Scores())
        with torch.no_grad():
            model(**inputs("sd1"))
        seen.append(next(iter(model.attn_processors.values())).seen)
    assert len(seen[0]) == len(seen[1]) == len(layers_of(ours))
    assert all(relative_error(b, a) <= TOLERANCE for a, b in zip(*seen, strict=True))


def test_gradients_reach_the_latent():
    """Attend-and-Excite goes down the gradient of what it saw."""
    found = []
    for model in pair("sd1"):
        processor, given = Scores(), inputs("sd1")
        model.set_attn_processor(processor)
        given["sample"].requires_grad_()
        model(**given)
        loss = sum(p.amax(dim=1).sum() for p in processor.seen)
        found.append(torch.autograd.grad(loss, given["sample"])[0])
    assert relative_error(found[1], found[0]) <= 1e-4


def test_masks_reach_processors():
    theirs, ours = pair("one size")
    mask = torch.rand(2, 64, generator=torch.Generator().manual_seed(2)) < 0.5
    for model in (theirs, ours):
        model.set_attn_processor(Scores())
    given = {**inputs("one size"), "attention_mask": mask}
    given["encoder_attention_mask"] = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 1, 1]])
    assert_same(theirs, ours, given)


@pytest.mark.parametrize("build", PLAIN)
def test_plain_processors_leave_the_layer_ours(build):
    theirs, ours = pair("sd1")
    ours.set_attn_processor(build())
    assert not ldm_fast.explain(ours).layers
    assert_same(theirs, ours, inputs("sd1"))


def test_set_and_back():
    theirs, ours = pair("sd1")
    ours.set_attn_processor(Doubled())
    assert len(ldm_fast.explain(ours).layers) == len(layers_of(ours))
    ours.set_default_attn_processor()
    assert not ldm_fast.explain(ours).layers
    assert_same(theirs, ours, inputs("sd1"))
    layer = list(attention_layers(ours).values())[1]
    layer.processor = custom_diffusion(layer)  # a module, then none
    assert any("processor" in key for key in ours.state_dict())
    layer.processor = theirs_are.AttnProcessor()
    assert not any("processor" in key for key in ours.state_dict())
    assert_same(theirs, ours, inputs("sd1"))
    ours.set_attn_processor(Wrapped(layer.get_processor()))


def test_our_own_processor_can_be_wrapped():
    _, ours = pair("sd1")
    with torch.no_grad():
        plain = ours(**inputs("sd1")).sample
        for layer in attention_layers(ours).values():
            layer.processor = Wrapped(layer.processor)
        wrapped = ours(**inputs("sd1")).sample
        for layer in attention_layers(ours).values():
            layer.processor = lambda attn, h, encoder_hidden_states=None, attention_mask=None: attn.attend(
                h, encoder_hidden_states, attention_mask
            )
        assert relative_error(ours(**inputs("sd1")).sample, plain) <= TOLERANCE
    assert relative_error(wrapped, plain) > 1e-3


def test_code_that_replaces_a_class_is_run(monkeypatch):
    """Programs that show attention maps replace `AttnProcessor2_0.__call__`, before or after the pipeline is made."""
    theirs, ours = pair("sd1")
    for model in (theirs, ours):
        model.set_attn_processor(theirs_are.AttnProcessor2_0())
    call = theirs_are.AttnProcessor2_0.__call__
    monkeypatch.setattr(theirs_are.AttnProcessor2_0, "__call__", lambda self, *a, **k: call(self, *a, **k) * 0.5)
    assert_same(theirs, ours, inputs("sd1"))
    assert len(ldm_fast.explain(ours).layers) == len(layers_of(ours))
    ours.set_attn_processor(theirs_are.AttnProcessor2_0())
    assert_same(theirs, ours, inputs("sd1"))


def test_arguments_reach_the_processors_that_take_them(monkeypatch):
    theirs, ours = pair("sd1")
    given = {**inputs("sd1"), "cross_attention_kwargs": {"sharpen": 3.0, "colour": 1}}
    logger = logging.getLogger("diffusers.models.attention_processor")
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    monkeypatch.setattr(logger, "disabled", False)  # programs that set up logging switch off loggers that exist
    try:
        for model in (theirs, ours):
            next(iter(layers_of(model).values())).processor = Scores()
        assert_same(theirs, ours, given)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
    half = len(messages) // 2
    assert half == len(layers_of(ours))
    assert "['colour'] are not expected by Scores and will be ignored" in messages[half]
    assert "['sharpen', 'colour'] are not expected by AttnProcessor and will be ignored" in messages[-1]


@pytest.mark.parametrize(
    "out", [lambda h: h[:, :1], lambda h: (h, None), lambda h: None], ids=["shape", "pair", "none"]
)
def test_another_shape_is_named_with_its_layer(out):
    _, ours = pair("sd1")
    name, layer = list(attention_layers(ours).items())[3]
    layer.processor = lambda attn, h, encoder_hidden_states=None, attention_mask=None: out(h)
    with pytest.raises(ValueError, match=f"UNet: {name}: its processor function must return a tensor .*got"):
        ours(**inputs("sd1"))


def test_a_replaced_forward_is_run_and_named():
    theirs, ours = pair("sd1")
    for model in (theirs, ours):
        layer = list(layers_of(model).values())[1]

        def forward(hidden_states, encoder_hidden_states=None, attention_mask=None, layer=layer, **kwargs):
            return layer.processor(layer, hidden_states, encoder_hidden_states, attention_mask) * 0.25

        layer.forward = forward
    assert_same(theirs, ours, inputs("sd1"))
    assert [layer.reason for layer in ldm_fast.explain(ours).layers] == ["its forward was replaced"]


def test_stand_ins_keep_the_processors_they_find():
    theirs, _ = pair("sd1")
    list(layers_of(theirs).values())[2].processor = Doubled()
    ours = ldm_fast.UNet.from_diffusers(theirs)
    assert {name: type(p) for name, p in ours.attn_processors.items()} == {
        name: type(p) for name, p in theirs.attn_processors.items()
    }
    plain = [p for p in ours.attn_processors.values() if type(p) is not Doubled]
    assert plain and all(isinstance(p, theirs_are.AttnProcessor2_0) for p in plain)
    assert_same(theirs, ours, inputs("sd1"))
    ours.set_default_attn_processor()
    assert all(type(p) is theirs_are.AttnProcessor for p in ours.attn_processors.values())
    again = copy.deepcopy(ours)
    assert_same(pair("sd1")[0], again, inputs("sd1"))


def test_ip_adapters_loaded_before_we_come():
    from test_diffusers_unet import load_ip_adapters

    theirs, _ = pair("sd1")
    load_ip_adapters(theirs, [0.7])
    ours = ldm_fast.UNet.from_diffusers(theirs)
    embeds = [torch.randn(2, 2, 6, generator=torch.Generator().manual_seed(5))]
    assert_same(theirs, ours, {**inputs("sd1"), "added_cond_kwargs": {"image_embeds": embeds}})


@torch.no_grad()
def test_an_ip_adapter_given_a_context_alone():
    """Its last tokens are then those of the image, as in diffusers."""
    from test_diffusers_unet import load_ip_adapters

    theirs, _ = pair("sd1")
    load_ip_adapters(theirs, [0.7])
    ours = ldm_fast.UNet.from_diffusers(theirs)
    name, layer = next((n, m) for n, m in attention_layers(ours).items() if m.is_cross_attention)
    tokens = torch.randn(2, 9, layer.query_dim)
    context = torch.randn(2, 5 + layer.processor.num_tokens[0], layer.cross_attention_dim)
    got, wanted = (layer(tokens, encoder_hidden_states=context) for layer in (layer, theirs.get_submodule(name)))
    assert relative_error(got, wanted) <= TOLERANCE
    layer.processor.scale = [0.0]
    assert relative_error(layer(tokens, encoder_hidden_states=context), wanted) > 1e-3


@pytest.mark.parametrize("name", ["kl", "kl attention"])
@torch.no_grad()
def test_first_stages_have_processors(name):
    ours, theirs = first_stages.pair(name)
    assert list(ours.attn_processors) == list(theirs.attn_processors)
    x = first_stages.images(ours)
    plain = first_stages.encoded(ours, x)
    for model in (theirs, ours):
        model.set_attn_processor(Doubled())
    got, wanted = (first_stages.encoded(model, x) for model in (ours, theirs))
    assert relative_error(got, wanted) <= TOLERANCE and relative_error(got, plain) > 1e-3
    ours.set_default_attn_processor()
    assert torch.equal(first_stages.encoded(ours, x), plain)
    ours.fuse_qkv_projections()
    assert torch.equal(first_stages.encoded(ours, x), plain)
    ours.unfuse_qkv_projections()


def test_what_cannot_be_called_is_refused():
    _, ours = pair("sd1")
    with pytest.raises(TypeError, match="UNet: down_blocks.*a processor must be callable, got int"):
        next(iter(attention_layers(ours).values())).processor = 3
    with pytest.raises(TypeError, match="subject must be a dtype or a model, got str"):
        ldm_fast.explain("unet")
