"""Our UNet against diffusers' UNet2DConditionModel and UNet2DModel, same weights: every published kind, tiny."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from compare import assert_same_gradients, gradients, relative_error
from torch import Tensor, nn

from ldm_fast.configs.unet import UNetConfig
from ldm_fast.models.unet import UNet

diffusers = pytest.importorskip("diffusers")
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0  # noqa: E402
from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection  # noqa: E402

TOLERANCE = 1e-5
TOKENS, CONTEXT = 5, 24

CROSS, PLAIN, SELF = "CrossAttnDownBlock2D", "DownBlock2D", "AttnDownBlock2D"
BASE = dict(
    block_out_channels=(16, 32),
    down_block_types=(CROSS, PLAIN),
    layers_per_block=1,
    cross_attention_dim=CONTEXT,
    attention_head_dim=2,
    norm_num_groups=8,
)
XL = dict(
    BASE,
    down_block_types=(PLAIN, CROSS),
    attention_head_dim=(2, 4),
    transformer_layers_per_block=(1, 2),
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=6 * 8 + 10,
)
CONDITIONAL = {
    "sd1": dict(BASE, layers_per_block=2),
    "sd2": dict(BASE, attention_head_dim=(2, 4), use_linear_projection=True, upcast_attention=True),
    "xl": XL,
    "refiner": dict(
        XL,
        block_out_channels=(16, 32, 32),
        down_block_types=(PLAIN, CROSS, PLAIN),
        attention_head_dim=(2, 4, 4),
        transformer_layers_per_block=2,
        projection_class_embeddings_input_dim=5 * 8 + 10,
    ),
    "inpainting": dict(BASE, in_channels=9),
    "upscaler": dict(
        BASE,
        in_channels=7,
        block_out_channels=(16, 32, 32),
        down_block_types=(PLAIN, CROSS, CROSS),
        only_cross_attention=(True, True, False),
        num_class_embeds=10,
        use_linear_projection=True,
    ),
    "lcm": dict(BASE, time_cond_proj_dim=12),
    "unclip": dict(BASE, class_embed_type="projection", projection_class_embeddings_input_dim=14),
    "simple projection": dict(BASE, class_embed_type="simple_projection", projection_class_embeddings_input_dim=14),
    "class timestep": dict(BASE, class_embed_type="timestep"),
    "class identity": dict(BASE, class_embed_type="identity"),
    "xl inpainting": dict(XL, in_channels=9),
    "uneven depths": dict(
        BASE,
        layers_per_block=2,
        down_block_types=(CROSS, CROSS),
        transformer_layers_per_block=((1, 2), (2, 0)),
        reverse_transformer_layers_per_block=((1, 0, 2), (2, 1, 1)),
    ),
    "pooled text": dict(BASE, addition_embed_type="text", addition_embed_type_num_heads=4),
    "text projection": dict(XL, encoder_hid_dim=20, encoder_hid_dim_type="text_proj"),
    "scale-shift": dict(BASE, resnet_time_scale_shift="scale_shift", norm_eps=1e-6),
    "fields that say nothing": dict(BASE, addition_time_embed_dim=8, projection_class_embeddings_input_dim=14),
    "one size": dict(BASE, block_out_channels=(16,), down_block_types=(CROSS,)),
}
UNCONDITIONAL = {
    "unconditional": dict(
        in_channels=3,
        out_channels=3,
        block_out_channels=(16, 32, 32),
        down_block_types=(PLAIN, SELF, SELF),
        layers_per_block=1,
        attention_head_dim=8,
        norm_num_groups=8,
        norm_eps=1e-6,
    ),
    "super-resolution": dict(
        in_channels=6,
        out_channels=3,
        block_out_channels=(16, 32),
        down_block_types=(PLAIN, SELF),
        layers_per_block=2,
        attention_head_dim=16,
        norm_num_groups=8,
    ),
    "class-conditional": dict(
        block_out_channels=(16, 32),
        down_block_types=(SELF, SELF),
        layers_per_block=1,
        attention_head_dim=8,
        norm_num_groups=8,
        num_class_embeds=7,
        downsample_type="resnet",
        upsample_type="resnet",
    ),
    "timestep-conditional": dict(
        block_out_channels=(16, 32),
        down_block_types=(SELF, SELF),
        layers_per_block=1,
        attention_head_dim=8,
        norm_num_groups=8,
        attn_norm_num_groups=8,  # for the middle, which has no norm with scale_shift if not told so
        resnet_time_scale_shift="scale_shift",
        class_embed_type="timestep",
    ),
}
CASES = {**CONDITIONAL, **UNCONDITIONAL}


def our_config(name: str) -> UNetConfig:
    values = dict(CASES[name])
    heads = values.pop("attention_head_dim")
    if name in CONDITIONAL:
        return UNetConfig(**values, num_attention_heads=heads)  # the number of heads, in spite of diffusers' name
    resample = values.pop("downsample_type", "conv")
    for same in ("upsample_type", "attn_norm_num_groups"):
        values.pop(same, None)
    values = {"in_channels": 3, "out_channels": 3, **values}
    return UNetConfig(
        **values,
        num_attention_heads=tuple(c // heads for c in values["block_out_channels"]),
        resample_type=resample,
        mid_block_type="UNetMidBlock2D",
        cross_attention_dim=None,
    )


def pair(name: str) -> tuple[nn.Module, UNet]:
    """(theirs, ours) with the same random weights, which leave no norm at the identity."""
    torch.manual_seed(0)
    config = our_config(name)
    kind = diffusers.UNet2DConditionModel if name in CONDITIONAL else diffusers.UNet2DModel
    theirs = kind(**CASES[name], up_block_types=config.up_block_types).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    ours = UNet(config).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def inputs(name: str, size: tuple[int, int] = (8, 8), batch: int = 2) -> dict:
    random = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    config = our_config(name)
    given = {"sample": normal(batch, config.in_channels, *size), "timestep": torch.tensor([7, 801])[:batch]}
    if name in CONDITIONAL:
        given["encoder_hidden_states"] = normal(batch, TOKENS, config.encoder_hid_dim or CONTEXT)
    if config.num_class_embeds is not None:
        given["class_labels"] = torch.tensor([3, 5])[:batch]
    elif config.class_embed_type == "timestep":
        given["class_labels"] = torch.tensor([20, 350])[:batch]
    elif config.class_embed_type is not None:
        given["class_labels"] = normal(batch, config.projection_class_embeddings_input_dim or 4 * 16)
    if config.time_cond_proj_dim is not None:
        given["timestep_cond"] = normal(batch, config.time_cond_proj_dim)
    if config.addition_embed_type == "text_time":
        numbers = (config.projection_class_embeddings_input_dim - 10) // 8
        given["added_cond_kwargs"] = {"text_embeds": normal(batch, 10), "time_ids": 100 * normal(batch, numbers).abs()}
    return given


def assert_same(theirs: nn.Module, ours: UNet, given: dict, tolerance: float = TOLERANCE) -> None:
    with torch.no_grad():
        wanted = theirs(**copy.deepcopy(given)).sample  # theirs empties some of its lists
        got = ours(**given).sample
    error = relative_error(got, wanted)
    assert error <= tolerance, f"relative L2 error {error:.2e}"


def assert_counts(ours: UNet, given: dict, *names: str) -> None:
    """Each of the arguments changes the output: agreement is not for want of an effect."""
    with torch.no_grad():
        whole = ours(**given).sample
        for name in names:
            rest = {key: value for key, value in given.items() if key != name}
            assert relative_error(ours(**rest).sample, whole) > 1e-4, name


@pytest.mark.parametrize("name", CASES)
def test_same_keys(name):
    theirs, ours = pair(name)
    shapes = {key: t.shape for key, t in theirs.state_dict().items()}
    assert {key: t.shape for key, t in ours.state_dict().items()} == shapes
    theirs.load_state_dict(ours.state_dict())


@pytest.mark.parametrize("name", CASES)
def test_same_output(name):
    theirs, ours = pair(name)
    assert_same(theirs, ours, inputs(name))


@pytest.mark.parametrize("size", [(7, 5), (9, 12)], ids=str)
@pytest.mark.parametrize("name", ["sd1", "upscaler", "refiner"])
def test_same_output_at_sizes_that_do_not_divide(name, size):
    theirs, ours = pair(name)
    assert_same(theirs, ours, inputs(name, size))


@pytest.mark.parametrize("name", CASES)
def test_same_gradients(name):
    theirs, ours = pair(name)
    found = []
    for model in (theirs, ours):
        given = inputs(name)
        leaves = [given["sample"].requires_grad_()]
        if "encoder_hidden_states" in given:
            leaves.append(given["encoder_hidden_states"].requires_grad_())
        found.append(gradients(model, model(**given).sample, *leaves))
    wanted, got = found
    assert len(wanted) == len(list(theirs.parameters())) + len(leaves)
    assert_same_gradients(got, wanted)


@pytest.mark.parametrize(
    "timestep",
    [37, 37.5, torch.tensor(37), torch.tensor(37.5), torch.tensor([37]), torch.tensor([37.25, 3.5])],
    ids=str,
)
def test_timestep_in_every_form(timestep):
    theirs, ours = pair("sd1")
    assert_same(theirs, ours, {**inputs("sd1"), "timestep": timestep})


def test_positional_arguments_and_return_dict():
    theirs, ours = pair("lcm")
    given = inputs("lcm")
    names = ("sample", "timestep", "encoder_hidden_states", "class_labels", "timestep_cond")
    arguments = [given.get(name) for name in names] + [None] * 6
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 1, 1]])
    with torch.no_grad():
        wanted = theirs(*arguments, mask, False)
        got = ours(*arguments, mask, False)
    assert type(got) is tuple and len(got) == 1
    assert relative_error(got[0], wanted[0]) <= TOLERANCE
    assert torch.equal(ours(*arguments, mask)[0], got[0])  # as well as .sample


@pytest.mark.parametrize("name", CASES)
def test_blocks_have_the_attributes_of_theirs(name):
    """Loaders and scales by block go by them."""
    theirs, ours = pair(name)
    blocks = [(theirs.mid_block, ours.mid_block)]
    for part in ("down_blocks", "up_blocks"):
        blocks += zip(getattr(theirs, part), getattr(ours, part), strict=True)
    for their_block, our_block in blocks:
        for attribute in ("resnets", "attentions"):
            lengths = [len(getattr(block, attribute, ())) for block in (their_block, our_block)]
            assert lengths[0] == lengths[1]
            assert hasattr(their_block, attribute) == hasattr(our_block, attribute)
        crosses = [getattr(block, "has_cross_attention", False) for block in (their_block, our_block)]
        assert crosses[0] == crosses[1]
        for attribute in ("downsamplers", "upsamplers"):
            there = [getattr(block, attribute, None) is not None for block in (their_block, our_block)]
            assert there[0] == there[1]


def test_scales_by_block():
    """What `set_ip_adapter_scale` and `set_adapters` make of scales for parts of the network."""
    from diffusers.loaders.unet_loader_utils import _maybe_expand_lora_scales

    theirs, ours = pair("upscaler")
    scales = [{"down": {"block_1": [0.5]}, "mid": 2.0, "up": 0.25}]
    assert _maybe_expand_lora_scales(ours, scales) == _maybe_expand_lora_scales(theirs, scales)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32], ids=str)
def test_encoder_attention_mask(dtype):
    """1 attends, 0 does not, in every dtype."""
    theirs, ours = pair("sd1")
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 1, 1, 1]]).to(dtype)
    given = {**inputs("sd1"), "encoder_attention_mask": mask}
    assert_same(theirs, ours, given)
    assert_counts(ours, given, "encoder_attention_mask")


def test_encoder_attention_mask_of_zeros():
    """Attends to everything, to the precision that is left of a score in float32 once 10000 is taken from it."""
    theirs, ours = pair("sd1")
    given = inputs("sd1")
    masked = {**given, "encoder_attention_mask": torch.zeros(2, TOKENS)}
    assert_same(theirs, ours, masked, tolerance=2e-4)
    with torch.no_grad():
        assert relative_error(ours(**masked).sample, ours(**given).sample) <= 2e-4


def test_attention_mask_over_pixels():
    theirs, ours = pair("one size")
    mask = torch.rand(2, 64, generator=torch.Generator().manual_seed(2)) < 0.5
    given = {**inputs("one size"), "attention_mask": mask}
    assert_same(theirs, ours, given)
    assert_counts(ours, given, "attention_mask")
    with pytest.raises(ValueError, match=r"attention_mask must be \(B, 64\) for this size, got \(B, 63\)"):
        ours(**{**given, "attention_mask": mask[:, 1:]})
    with pytest.raises(ValueError, match=r"attention_mask must be \(2, keys\), got \(2, 1, 1, 64\)"):
        ours(**{**given, "attention_mask": mask[:, None, None]})


def test_attention_mask_over_pixels_without_transformers():
    """Not silently left out where diffusers' model does not take one: as if the masked pixels were not there."""
    _, ours = pair("class-conditional")
    attention = ours.down_blocks[0].attentions[0]
    h = torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(2))
    bias = torch.zeros(2, 1, 1, 16)
    bias[..., 8:] = -10000
    normed = attention.group_norm(h).flatten(2).transpose(1, 2)
    with torch.no_grad():
        q, k, v = (
            layer(t).unflatten(-1, (2, 8)).transpose(1, 2)
            for layer, t in (
                (attention.to_q, normed),
                (attention.to_k, normed[:, :8]),
                (attention.to_v, normed[:, :8]),
            )
        )
        out = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        wanted = h + attention.to_out[0](out).transpose(1, 2).unflatten(2, (4, 4))
        got = attention(h, attention_mask=bias)
    assert relative_error(got, wanted) <= TOLERANCE
    with pytest.raises(ValueError, match=r"attention_mask must be \(B, 16\) for this size, got \(B, 15\)"):
        attention(h, attention_mask=bias[..., 1:])


def addresses(model: nn.Module) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in model.state_dict(keep_vars=True).items()}


@pytest.mark.parametrize("name", ["sd1", "unconditional"])
def test_weights_stay_shared_with_the_module_they_are_from(name):
    """Through everything that moves nothing, and training: one set of weights in memory, one set of values."""
    theirs, _ = pair(name)
    ours = UNet.from_diffusers(theirs)
    given = inputs(name)
    assert_same(theirs, ours, given)
    ours.to("cpu").float().requires_grad_(True).train().eval()
    assert addresses(ours) == addresses(theirs)
    optimizer = torch.optim.SGD(ours.parameters(), lr=1e-3)
    ours(**given).sample.square().mean().backward()
    with torch.no_grad():
        before = ours(**given).sample
    optimizer.step()
    assert addresses(ours) == addresses(theirs)
    with torch.no_grad():
        assert relative_error(ours(**given).sample, before) > 1e-4
    assert_same(theirs, ours, given)


def residuals(ours: UNet, given: dict) -> tuple[list[Tensor], Tensor]:
    """A ControlNet's: of the shapes of skips and middle."""
    shapes = []
    hooks = [ours.mid_block.register_forward_hook(lambda m, a, out: shapes.append(out.shape))]
    note = lambda m, a, k: shapes.append([s.shape for s in k["res_hidden_states_tuple"]])  # noqa: E731
    hooks += [block.register_forward_pre_hook(note, with_kwargs=True) for block in ours.up_blocks]
    with torch.no_grad():
        ours(**given)
    for hook in hooks:
        hook.remove()
    random = torch.Generator().manual_seed(3)
    down = [shape for block in reversed(shapes[1:]) for shape in block]
    return [torch.randn(s, generator=random) for s in down], torch.randn(shapes[0], generator=random)


@pytest.mark.parametrize("name", ["sd1", "xl"])
def test_controlnet_residuals(name):
    theirs, ours = pair(name)
    given = inputs(name, (7, 9))
    down, mid = residuals(ours, given)
    with_both = {**given, "down_block_additional_residuals": down, "mid_block_additional_residual": mid}
    assert_same(theirs, ours, with_both)
    with pytest.warns(UserWarning, match="mid_block_additional_residual alone changes nothing"):
        assert_same(theirs, ours, {**given, "mid_block_additional_residual": mid})
    both = {"down_block_additional_residuals": down, "down_intrablock_additional_residuals": []}
    with pytest.warns(UserWarning, match="down_block_additional_residuals alone changes nothing"):
        assert_same(theirs, ours, {**given, **both})
    with pytest.raises(ValueError, match=f"must be {len(down)} tensors, got {len(down) - 1}"):
        ours(**{**with_both, "down_block_additional_residuals": down[1:]})


@pytest.mark.parametrize(
    "name, shapes",
    [
        ("sd1", [(16, 8), (32, 4)]),  # cross attention: before the reduction
        ("xl", [(16, 4), (32, 4)]),  # none: after it
        ("xl", [(16, 4), (32, 4), (32, 4)]),  # and one for the middle
    ],
    ids=["cross attention", "none at first", "middle"],
)
def test_t2i_adapter_residuals(name, shapes):
    theirs, ours = pair(name)
    extras = [torch.randn(2, c, s, s, generator=torch.Generator().manual_seed(c)) for c, s in shapes]
    given = {**inputs(name), "down_intrablock_additional_residuals": extras}
    assert_same(theirs, ours, given)
    assert len(extras) == len(shapes)  # the caller's list stays as it is
    assert_counts(ours, given, "down_intrablock_additional_residuals")
    assert_same(theirs, ours, {**given, "down_intrablock_additional_residuals": [*extras, *extras]})
    del given["down_intrablock_additional_residuals"]  # as older programs call it
    assert_same(theirs, ours, {**given, "down_block_additional_residuals": extras})


def test_needless_class_labels():
    theirs, ours = pair("sd1")
    assert_same(theirs, ours, {**inputs("sd1"), "class_labels": torch.tensor([3, 5])})
    theirs, ours = pair("unconditional")
    for model in (theirs, ours):
        with pytest.raises(ValueError, match="class"):
            model(**inputs("unconditional"), class_labels=torch.tensor([3, 5]))


@pytest.mark.parametrize("rows", [1, 64])
def test_masks_with_rows(rows):
    """A mask for all queries, or with a row for each (at one resolution)."""
    theirs, ours = pair("one size")
    random = torch.Generator().manual_seed(2)
    for name, keys in (("encoder_attention_mask", TOKENS), ("attention_mask", 64)):
        given = {**inputs("one size"), name: torch.rand(2, rows, keys, generator=random) < 0.7}
        assert_same(theirs, ours, given)
        assert_counts(ours, given, name)


def load_ip_adapters(model: nn.Module, scales: list, image_width: int = 6, tokens: int = 3) -> None:
    """As diffusers' loader, with random weights: a processor for each cross attention, a projection of images."""
    torch.manual_seed(4)
    count, processors = len(scales), {}
    for name, processor in model.attn_processors.items():
        if name.endswith("attn1.processor"):
            processors[name] = processor.__class__()
            continue
        hidden = model.get_submodule(name.removesuffix(".processor")).to_q.out_features
        processors[name] = IPAdapterAttnProcessor2_0(hidden, CONTEXT, [tokens] * count, list(scales))
    model.set_attn_processor(processors)
    projections = [ImageProjection(image_width, CONTEXT, tokens) for _ in range(count)]
    model.encoder_hid_proj = MultiIPAdapterImageProjection(projections)
    if isinstance(model, UNet):
        model.config = dataclasses.replace(model.config, encoder_hid_dim_type="ip_image_proj")
    else:
        model.config.encoder_hid_dim_type = "ip_image_proj"


@pytest.fixture
def with_images():
    def build(scales: list, images: int = 1, name: str = "sd1") -> tuple[nn.Module, UNet, dict]:
        theirs, ours = pair(name)
        load_ip_adapters(theirs, scales)
        load_ip_adapters(ours, scales)
        random = torch.Generator().manual_seed(5)
        embeds = [torch.randn(2, images, 6, generator=random) for _ in scales]
        return theirs, ours, {**inputs(name), "added_cond_kwargs": {"image_embeds": embeds}}

    return build


def test_processors_are_named_and_ordered_as_in_diffusers():
    theirs, ours = pair("sd1")
    assert list(ours.attn_processors) == list(theirs.attn_processors)
    ours.set_attn_processor(theirs.attn_processors)  # plain ones: nothing changes
    assert_same(theirs, ours, inputs("sd1"))
    with pytest.raises(TypeError, match="a processor must be callable, got Strange"):
        ours.set_attn_processor(type("Strange", (), {})())
    with pytest.raises(ValueError, match="needs one processor for each attention; the number .* missing or unknown: "):
        ours.set_attn_processor({})


@pytest.mark.parametrize("scales", [[0.7], [0.7, 0.4], [0.7, 0.0]], ids=str)
def test_ip_adapters(with_images, scales):
    theirs, ours, given = with_images(scales, images=2)
    assert theirs.state_dict().keys() == ours.state_dict().keys()
    assert_same(theirs, ours, given)
    with torch.no_grad():
        whole = ours(**given).sample
        for processor in ours.attn_processors.values():
            if hasattr(processor, "scale"):
                processor.scale = [0.0] * len(scales)
        assert relative_error(ours(**given).sample, whole) > 1e-3
    load_ip_adapters(theirs, scales)  # with other scales: set in place, as pipelines do
    load_ip_adapters(ours, scales)
    for model in (theirs, ours):
        for processor in model.attn_processors.values():
            if hasattr(processor, "scale"):
                processor.scale[0] = 1.3
    assert_same(theirs, ours, given)


def test_ip_adapter_tuple_as_context(with_images):
    """The blocks' own form of it: text and projected images together in encoder_hidden_states."""
    theirs, ours, given = with_images([0.7])
    images = [t.detach() for t in theirs.encoder_hid_proj(given.pop("added_cond_kwargs")["image_embeds"])]
    for model in (theirs, ours):
        model.encoder_hid_proj = None
    ours.config = dataclasses.replace(ours.config, encoder_hid_dim_type=None)
    assert_same(theirs, ours, {**given, "encoder_hidden_states": (given["encoder_hidden_states"], images)})


@pytest.mark.parametrize("area", [(16, 16), (12, 20)], ids=str)
@pytest.mark.parametrize("scale", [0.7, [0.7, 0.2]], ids=str)
@pytest.mark.filterwarnings("ignore:The aspect ratio of the mask")
def test_ip_adapter_masks(with_images, scale, area):
    theirs, ours, given = with_images([scale], images=2)
    mask = torch.rand(1, 2, *area, generator=torch.Generator().manual_seed(6)).round()
    given["cross_attention_kwargs"] = {"ip_adapter_masks": [mask]}
    assert_same(theirs, ours, given)
    if not isinstance(scale, list):
        assert_counts(ours, given, "cross_attention_kwargs")


def test_ip_adapter_unloaded(with_images):
    theirs, ours, given = with_images([0.7])
    for model in (theirs, ours):
        model.encoder_hid_proj = None
        model.set_default_attn_processor()
    theirs.config.encoder_hid_dim_type = None
    ours.config = dataclasses.replace(ours.config, encoder_hid_dim_type=None)
    assert not any("processor" in key for key in ours.state_dict())
    assert_same(theirs, ours, inputs("sd1"))
    with pytest.raises(ValueError, match="no IP-Adapter is loaded"):
        ours(**{**inputs("sd1"), "encoder_hidden_states": (given["encoder_hidden_states"], [torch.zeros(2, 1, 3, 24)])})


def test_ip_adapter_errors(with_images):
    _, ours, given = with_images([0.7], images=2)
    embeds = given["added_cond_kwargs"]["image_embeds"]
    with pytest.raises(ValueError, match="needs 'image_embeds' for this UNet, got nothing"):
        ours(**{**given, "added_cond_kwargs": None})
    for masks, message in (
        ([torch.zeros(1, 3, 8, 8)], r"must be \(1, 2, H, W\), got \(1, 3, 8, 8\)"),
        ([torch.zeros(1, 2, 8, 8)] * 2, "one for each of the 1 IP-Adapters, got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            ours(**given, cross_attention_kwargs={"ip_adapter_masks": masks})
    for processor in ours.attn_processors.values():
        if hasattr(processor, "scale"):
            processor.scale = [[0.7, 0.2]]
    with pytest.raises(ValueError, match="one IP-Adapter scale for each image needs ip_adapter_masks"):
        ours(**given)
    ours.encoder_hid_proj = None
    with pytest.raises(ValueError, match="no IP-Adapter is loaded"):
        ours(**given, cross_attention_kwargs=None)
    assert len(embeds) == 1


def test_lora():
    """PEFT wraps the projections: both models with the same adapter, active, scaled, merged and gone again."""
    peft = pytest.importorskip("peft")
    theirs, ours = pair("sd1")
    given = inputs("sd1")
    targets = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj"]
    with torch.no_grad():
        before = ours(**given).sample
    for model in (theirs, ours):
        torch.manual_seed(7)
        lora = peft.LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights=False)
        peft.inject_adapter_in_model(lora, model, "one")
    ours.load_state_dict(theirs.state_dict())
    assert_same(theirs, ours, given)
    with torch.no_grad():
        assert relative_error(ours(**given).sample, before) > 1e-3
    layers = [m for model in (theirs, ours) for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    for layer in layers:
        layer.set_scale("one", 0.3)
    assert_same(theirs, ours, given)
    for layer in layers:
        layer.merge()
    assert_same(theirs, ours, given)
    for layer in layers:
        layer.unmerge()
        layer.enable_adapters(False)
    with torch.no_grad():
        assert relative_error(ours(**given).sample, before) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["sd1", "sd2", "xl", "class identity", "unconditional"])
def test_half_precision(name, dtype):
    """Rounding errors against float64 on the same weights at most twice those of diffusers."""
    theirs, ours = pair(name)
    given = inputs(name)
    images = ("sample", "encoder_hidden_states")
    low = {key: value.to(dtype) if key in images else value for key, value in given.items()}
    if "added_cond_kwargs" in low:
        low["added_cond_kwargs"] = {key: value.to(dtype) for key, value in given["added_cond_kwargs"].items()}
    exact = {key: value.double() if key in images else value for key, value in low.items()}
    with torch.no_grad():
        wanted, got = theirs.to(dtype)(**low).sample, ours.to(dtype)(**low).sample
        truth = theirs.double()(**exact).sample
    assert got.dtype == dtype
    assert relative_error(got, truth) <= 2 * relative_error(wanted, truth)


def test_channels_last():
    theirs, ours = pair("sd1")
    ours = ours.to(memory_format=torch.channels_last)
    given = inputs("sd1", (7, 9))
    assert_same(theirs, ours, {**given, "sample": given["sample"].contiguous(memory_format=torch.channels_last)})


@pytest.mark.parametrize("name", ["xl", "unconditional"])
def test_gradient_checkpointing(name):
    _, ours = pair(name)
    given = inputs(name)
    plain = gradients(ours, ours(**given).sample)
    stored = count_saved(ours, given)
    ours.enable_gradient_checkpointing()
    again = gradients(ours, ours(**given).sample)
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[key], again[key]) for key in plain)
    assert count_saved(ours, given) < stored / 2
    ours.disable_gradient_checkpointing()
    assert count_saved(ours, given) == stored


def count_saved(model: nn.Module, given: dict) -> int:
    """Numbers that the forward pass keeps for the backward pass."""
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        model(**given)
    return sum(sizes)


def test_compile_fullgraph_with_every_condition(with_images):
    """One graph, residuals, masks and IP-Adapters included (with the compilers' backends: test_unet.py)."""
    theirs, ours, given = with_images([0.7], name="one size")
    down, mid = residuals(ours, given)
    given |= {
        "encoder_attention_mask": torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 1, 1]]),
        "down_block_additional_residuals": down,
        "mid_block_additional_residual": mid,
        "timestep": 7,
    }
    with torch.no_grad():
        ours(**given)  # what is kept of other calls must not enter the graph
        torch._dynamo.reset()
        compiled = torch.compile(ours, fullgraph=True, backend="eager")
        assert relative_error(compiled(**given).sample, theirs(**given).sample) <= TOLERANCE
        given["encoder_hidden_states"] = given["encoder_hidden_states"].flip(1)
        assert relative_error(compiled(**given).sample, theirs(**given).sample) <= TOLERANCE


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("xl", {"added_cond_kwargs": None}, "needs 'time_ids' for this UNet, got nothing"),
        (
            "xl",
            {"added_cond_kwargs": {"time_ids": torch.zeros(2, 6)}},
            "needs 'text_embeds' for this UNet, got time_ids",
        ),
        (
            "xl",
            {"added_cond_kwargs": {"time_ids": torch.zeros(2, 5), "text_embeds": torch.zeros(2, 10)}},
            r"must come to \(2, 58\), got \(2, 50\) from \(2, 10\) and \(2, 5\)",
        ),
        ("lcm", {"timestep_cond": torch.zeros(2, 11)}, r"timestep_cond must be \(2, 12\), got \(2, 11\)"),
        ("sd1", {"timestep_cond": torch.zeros(2, 11)}, r"timestep_cond must be None, got \(2, 11\)"),
        ("unclip", {"class_labels": torch.zeros(2)}, r"class_labels must be \(2, 14\), got \(2,\)"),
        ("simple projection", {"class_labels": torch.zeros(2)}, r"class_labels must be \(2, 14\), got \(2,\)"),
        ("class identity", {"class_labels": torch.zeros(2, 32)}, r"class_labels must be \(2, 64\), got \(2, 32\)"),
        ("text projection", {"encoder_hidden_states": torch.zeros(2, 5, 24)}, r"must be \(2, L, 20\)"),
    ],
)
def test_errors(name, change, message):
    with pytest.raises(ValueError, match=message):
        UNet(our_config(name))(**{**inputs(name), **change})
