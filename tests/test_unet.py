"""The UNet as a whole: fast against reference, half precision, sizes, input forms, errors, torch.compile."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from _eager import eager_ops
from compare import assert_same_gradients, gradients, relative_error
from torch import Tensor

import ldm_fast
from ldm_fast.configs.unet import UNetConfig
from ldm_fast.models.unet import UNet

CONFIGS = {
    "cross-attention": UNetConfig(
        in_channels=3,
        out_channels=3,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        layers_per_block=1,
        cross_attention_dim=24,
        num_attention_heads=2,
        norm_num_groups=8,
    ),
    "self-attention": UNetConfig(
        in_channels=4,
        out_channels=2,
        block_out_channels=(16, 32, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        mid_block_type="UNetMidBlock2D",
        layers_per_block=1,
        cross_attention_dim=None,
        num_attention_heads=(2, 4, 4),
        resnet_time_scale_shift="scale_shift",
        resample_type="resnet",
        num_class_embeds=5,
        norm_num_groups=8,
    ),
}
SIZES = ((8, 8), (17, 23), (4, 7))  # of the latent: a power of two, odd, and smaller than the number of levels allows


def make(name: str) -> UNet:
    torch.manual_seed(0)
    return UNet(CONFIGS[name]).eval()


def inputs(config: UNetConfig, batch: int = 2, size: tuple[int, int] = (8, 8), seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    arguments = {
        "sample": torch.randn(batch, config.in_channels, *size, generator=generator),
        "timestep": torch.randint(0, 1000, (batch,), generator=generator),
    }
    if config.cross_attention_dim is not None:
        arguments["encoder_hidden_states"] = torch.randn(batch, 5, config.cross_attention_dim, generator=generator)
    if config.num_class_embeds is not None:
        arguments["class_labels"] = torch.randint(0, config.num_class_embeds, (batch,), generator=generator)
    return arguments


def to(arguments: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in arguments.items()}


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_fast_equals_reference(name, size):
    unet, arguments = make(name), inputs(CONFIGS[name], size=size)
    leaves = [t.requires_grad_() for t in arguments.values() if t.is_floating_point()]
    fast = unet(**arguments).sample
    with ldm_fast.use_impl("reference"):
        reference = unet(**arguments).sample
        wanted = gradients(unet, reference, *leaves)
    assert fast.shape == (2, CONFIGS[name].out_channels, *size)
    assert relative_error(fast, reference) <= 1e-5
    assert_same_gradients(gradients(unet, fast, *leaves), wanted)


@pytest.mark.parametrize("impl", [None, "reference"], ids=["best", "reference"])
@pytest.mark.parametrize("name", CONFIGS)
def test_reference_in_float64_agrees_with_plain_pytorch(name, impl):
    """The models say what they should, whoever computes the ops: float64 leaves no room for rounding."""
    unet, arguments = make(name).double(), to(inputs(CONFIGS[name], size=(9, 6)), torch.float64)
    with torch.no_grad(), ldm_fast.use_impl(impl):
        ours = unet(**arguments).sample
    with torch.no_grad(), eager_ops():
        plain = unet(**arguments).sample
    assert relative_error(ours, plain) <= 1e-6  # the reference's softmax and timestep embedding are float32


@pytest.mark.parametrize("impl", [None, "reference"], ids=["best", "reference"])
@pytest.mark.parametrize("name", CONFIGS)
def test_bfloat16_error(name, impl):
    """Against float64 on the same (rounded) weights and inputs, at most twice the error of bf16 eager PyTorch."""
    unet, arguments = make(name).bfloat16(), to(inputs(CONFIGS[name], batch=4, size=(16, 16)), torch.bfloat16)
    with torch.no_grad():
        with ldm_fast.use_impl(impl):
            ours = unet(**arguments).sample
        with eager_ops():
            eager = unet(**arguments).sample
            exact = unet.double()(**to(arguments, torch.float64)).sample
    assert ours.dtype == torch.bfloat16
    assert relative_error(ours, exact) <= 2 * relative_error(eager, exact)


@torch.no_grad()
def test_timestep_in_every_form():
    unet, arguments = make("cross-attention"), inputs(CONFIGS["cross-attention"])
    wanted = unet(**{**arguments, "timestep": torch.tensor([37, 37])}).sample
    for timestep in (
        37,
        37.0,
        np.int64(37),
        np.array([37, 37]),
        torch.tensor(37),
        torch.tensor(37.0),
        torch.tensor([37]),
        torch.tensor([37.0, 37.0]),
    ):
        assert torch.equal(unet(**{**arguments, "timestep": timestep}).sample, wanted), timestep
    assert not torch.allclose(unet(**{**arguments, "timestep": 38}).sample, wanted)


@torch.no_grad()
def test_timesteps_belong_to_their_images():
    unet, arguments = make("cross-attention"), inputs(CONFIGS["cross-attention"])
    both = unet(**{**arguments, "timestep": torch.tensor([3, 900])}).sample
    for i, t in enumerate((3, 900)):
        one = unet(**{**arguments, "timestep": t}).sample[i]
        torch.testing.assert_close(both[i], one, rtol=0, atol=1e-6)


@torch.no_grad()
def test_return_dict_false_is_a_tuple():
    unet, arguments = make("cross-attention"), inputs(CONFIGS["cross-attention"])
    output = unet(**arguments, return_dict=False)
    assert isinstance(output, tuple) and len(output) == 1
    assert torch.equal(output[0], unet(**arguments).sample)


@torch.no_grad()
def test_context_mask_is_the_same_as_a_shorter_context():
    unet, arguments = make("cross-attention"), inputs(CONFIGS["cross-attention"])
    context = arguments["encoder_hidden_states"]
    shorter = unet(**{**arguments, "encoder_hidden_states": context[:, :3]}).sample
    boolean = torch.arange(5).expand(2, 5) < 3
    for mask in (boolean, boolean.float()):
        masked = unet(**arguments, encoder_attention_mask=mask).sample
        assert relative_error(masked, shorter) <= 1e-6
    assert relative_error(unet(**arguments).sample, shorter) > 1e-3


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_channels_last_gives_the_same_numbers(name):
    unet, arguments = make(name), inputs(CONFIGS[name], size=(17, 23))
    wanted = unet(**arguments).sample
    arguments["sample"] = arguments["sample"].contiguous(memory_format=torch.channels_last)
    assert relative_error(unet(**arguments).sample, wanted) <= 1e-5
    assert relative_error(unet.to(memory_format=torch.channels_last)(**arguments).sample, wanted) <= 1e-5


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch(name):
    unet, arguments = make(name), inputs(CONFIGS[name], batch=3, size=(7, 5))
    together = unet(**arguments).sample
    for i in range(3):
        alone = unet(**{key: t[i : i + 1] for key, t in arguments.items()}).sample
        assert relative_error(alone, together[i : i + 1]) <= 2e-6


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_every_parameter_and_input_counts(name):
    """A weight that nothing reads would pass every comparison of fast and reference."""
    unet, arguments = make(name), inputs(CONFIGS[name])
    leaves = [t.requires_grad_() for t in arguments.values() if t.is_floating_point()]
    with torch.enable_grad():
        found = gradients(unet, unet(**arguments).sample, *leaves)
    assert len(found) == len(list(unet.parameters())) + len(leaves)
    assert all(g.isfinite().all() for g in found.values())
    biases_of_keys = {n for n in found if n.endswith("to_k.bias")}
    assert not [n for n, g in found.items() if not g.any() and n not in biases_of_keys]


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("cross-attention", {"sample": torch.zeros(2, 4, 8, 8)}, r"sample must be \(B, 3, H, W\), got \(2, 4, 8, 8\)"),
        ("cross-attention", {"sample": torch.zeros(3, 8, 8)}, r"sample must be \(B, 3, H, W\)"),
        ("cross-attention", {"encoder_hidden_states": None}, "encoder_hidden_states is missing"),
        (
            "cross-attention",
            {"encoder_hidden_states": torch.zeros(2, 5, 25)},
            r"must be \(2, L, 24\), got \(2, 5, 25\)",
        ),
        (
            "cross-attention",
            {"encoder_hidden_states": torch.zeros(3, 5, 24)},
            r"must be \(2, L, 24\), got \(3, 5, 24\)",
        ),
        ("cross-attention", {"encoder_hidden_states": torch.zeros(2, 24)}, r"must be \(2, L, 24\)"),
        ("cross-attention", {"timestep": torch.zeros(3)}, r"must be a number or a tensor \(2,\), got \(3,\)"),
        ("cross-attention", {"timestep": [3, 3, 3]}, r"must be a number or a tensor \(2,\), got \[3, 3, 3\]"),
        ("cross-attention", {"timestep": None}, r"must be a number or a tensor \(2,\), got None"),
        (
            "cross-attention",
            {"sample": torch.zeros(2, 3, 8, 8).half()},
            "must be torch.float32 as the weights are, got",
        ),
        (
            "cross-attention",
            {"encoder_hidden_states": torch.zeros(2, 5, 24).double()},
            "encoder_hidden_states must be torch.float32 as the weights are, got torch.float64",
        ),
        ("cross-attention", {"encoder_attention_mask": torch.ones(2, 4, dtype=torch.bool)}, r"must be \(2, 5\), got"),
        ("self-attention", {"class_labels": None}, "needs class_labels"),
        ("self-attention", {"class_labels": torch.zeros(2)}, "class_labels must be int64, got torch.float32"),
        ("self-attention", {"class_labels": torch.zeros(3, dtype=torch.int64)}, r"class_labels must be \(2,\)"),
    ],
)
def test_errors(name, change, message):
    with pytest.raises(ValueError, match=message):
        make(name)(**{**inputs(CONFIGS[name]), **change})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"down_block_types": ("DownBlock2D",)}, "needs 2 entries"),
        ({"down_block_types": ("DownBlock2D", "UpBlock2D")}, "down_block_types must be one of"),
        ({"norm_num_groups": 5}, "norm_num_groups 5 must divide"),
        ({"resample_type": "bilinear"}, "resample_type must be one of"),
        ({"num_attention_heads": 3}, "do not divide into 3 heads"),
        ({"num_attention_heads": 0}, "do not divide into 0 heads"),
        ({"norm_num_groups": None}, "norm_num_groups must be a positive number, got None"),
        ({"layers_per_block": (1, 0)}, r"layers_per_block must be a positive number, got \(1, 0\)"),
        ({"class_embed_type": "simple_projection"}, "needs projection_class_embeddings_input_dim"),
        ({"encoder_hid_dim": 20}, "encoder_hid_dim 20 needs encoder_hid_dim_type"),
        ({"class_embed_type": "learned"}, "class_embed_type must be one of None, timestep, identity"),
        ({"transformer_layers_per_block": (1, 2, 3)}, "transformer_layers_per_block needs one value or 2"),
        ({"transformer_layers_per_block": ((1,), 1)}, "needs reverse_transformer_layers_per_block"),
        (
            {"transformer_layers_per_block": ((1, 2), 1), "reverse_transformer_layers_per_block": (1, 1)},
            r"transformer_layers_per_block needs one depth for a level or 1, got \(1, 2\)",
        ),
        (
            {"reverse_transformer_layers_per_block": ((1, 2, 3), 1)},
            r"reverse_transformer_layers_per_block needs one depth for a level or 2, got \(1, 2, 3\)",
        ),
    ],
)
def test_config_errors(change, message):
    with pytest.raises(ValueError, match=message):
        UNet(dataclasses.replace(CONFIGS["cross-attention"], **change))


ONE_LEVEL = dataclasses.replace(
    CONFIGS["cross-attention"], block_out_channels=(16,), down_block_types=("CrossAttnDownBlock2D",)
)


def compiled_equals_eager(config: UNetConfig, backend: str, *sizes: tuple[int, int], dynamic: bool = False) -> None:
    """Outputs and, where gradients are on, the gradients of all parameters; one compilation for all sizes."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    unet = UNet(config).eval()
    compiled = torch.compile(unet, fullgraph=True, backend=backend, dynamic=dynamic)
    for size in sizes:
        arguments = inputs(config, size=size)
        got, wanted = compiled(**arguments).sample, unet(**arguments).sample
        assert relative_error(got, wanted) <= 1e-5
        if torch.is_grad_enabled():
            assert_same_gradients(gradients(unet, got), gradients(unet, wanted))


@pytest.mark.filterwarnings("error:ldm_fast")  # what PyTorch has to say of our ops, such as outputs that share memory
@pytest.mark.parametrize("name", CONFIGS)
def test_compile_fullgraph(name):
    compiled_equals_eager(CONFIGS[name], "aot_eager", (9, 7))


@pytest.mark.slow
def test_compile_trains_at_every_size():
    compiled_equals_eager(ONE_LEVEL, "aot_eager", (9, 7), (6, 8), dynamic=True)


@pytest.mark.slow
def test_inductor_runs_at_every_size():
    with torch.no_grad():
        compiled_equals_eager(ONE_LEVEL, "inductor", (9, 7), (6, 8), dynamic=True)


@pytest.mark.slow
def test_inductor_trains():
    """At one size: with dynamic ones PyTorch 2.13's inductor fails on this model even without any of our ops."""
    compiled_equals_eager(ONE_LEVEL, "inductor", (9, 7))


def test_saved_weights_give_the_same_numbers():
    unet, arguments = make("self-attention"), inputs(CONFIGS["self-attention"])
    other = UNet(unet.config).eval()
    other.load_state_dict(unet.state_dict())
    with torch.no_grad():
        assert torch.equal(other(**arguments).sample, unet(**arguments).sample)
