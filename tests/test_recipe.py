"""Recipes: fields have types, and errors name the field at fault."""

import dataclasses

import pytest

from ldm_fast.configs.from_dict import to_dict
from ldm_fast.training.fingerprint import Fingerprint
from ldm_fast.training.recipe import ConfigError, LoopConfig, Recipe, load_recipe, parse_recipe, shipped_recipes

MINIMAL = """
name = "minimal"
[data]
kind = "synthetic"
size = 16
[first_stage.vq]
block_out_channels = [8, 16]
norm_num_groups = 4
[first_stage.loop]
steps = 2
batch_size = 4
learning_rate = 1e-3
[second_stage]
condition = "none"
[second_stage.unet]
block_out_channels = [16]
down_block_types = ["DownBlock2D"]
mid_block_type = "UNetMidBlock2D"
norm_num_groups = 4
[second_stage.loop]
steps = 2
batch_size = 4
learning_rate = 1
"""


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_load(name):
    recipe = load_recipe(name)
    assert isinstance(recipe, Recipe) and recipe.name == name


def test_values_get_the_types_of_their_fields():
    recipe = parse_recipe(MINIMAL)
    assert recipe.first_stage.vq.block_out_channels == (8, 16)
    assert isinstance(recipe.second_stage.loop.learning_rate, float)
    assert recipe.first_stage.kl is None and recipe.second_stage.unet.num_attention_heads == 8


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("batch_size = 4", "batchsize = 4", r"first_stage\.loop\.batchsize.*did you mean 'batch_size'"),
        ("size = 16", "sise = 16", r"data\.sise.*did you mean 'size'"),
        ("steps = 2", 'steps = "2"', r"first_stage\.loop\.steps: needs a whole number, got '2'"),
        ("steps = 2", "steps = 2.5", r"first_stage\.loop\.steps: needs a whole number, got 2\.5"),
        ("steps = 2", "steps = true", r"first_stage\.loop\.steps: needs a whole number, got True"),
        ("steps = 2", "steps = 0", r"first_stage\.loop: steps must be at least 1"),
        ("learning_rate = 1e-3", "learning_rate = -1.0", r"learning_rate must be positive"),
        ("learning_rate = 1e-3", "learning_rate = nan", r"learning_rate must be positive"),
        ("learning_rate = 1e-3", "learning_rate = 1e-3\nwarmup_steps = -1", r"warmup_steps must not be negative"),
        ("learning_rate = 1e-3", "learning_rate = 1e-3\ngrad_clip = -1", r"grad_clip must be positive, got -1\.0"),
        (
            "[first_stage.vq]",
            "[first_stage]\nquantize_from = 2\n[first_stage.vq]",
            "quantize_from is 2; between",
        ),
        ("[first_stage.vq]", "[first_stage]\nshift = -1\n[first_stage.vq]", r"shift must not be negative"),
        ("[first_stage.vq]", "[first_stage]\ndisc_layers = 0\n[first_stage.vq]", r"disc_layers must be at least 1"),
        ("learning_rate = 1e-3", 'learning_rate = "fast"', r"learning_rate: needs a number"),
        ('kind = "synthetic"', 'kind = "emojis"', r"data\.kind: 'emojis' is not one of.*did you mean 'emoji'"),
        ('kind = "synthetic"\n', "", r"data\.kind: this field is missing; it is one of"),
        ("[8, 16]", '[8, "x"]', r"first_stage\.vq\.block_out_channels\[1\]: needs a whole number"),
        ("[8, 16]", "16", r"block_out_channels: needs a list of a whole number"),
        ("[8, 16]", "[8, 18]", r"first_stage\.vq: .*norm_num_groups 4 must divide 18"),
        ("[first_stage.vq]", "[first_stage.vqq]", r"first_stage\.vqq.*did you mean 'vq'"),
        ('condition = "none"', "", r"second_stage: condition \"text\" needs the section text"),
        ('condition = "none"', 'condition = "class"', r"condition \"class\" needs a unet with cross attention"),
        ('mid_block_type = "UNetMidBlock2D"\n', "", r"condition \"none\" needs a unet with no cross attention"),
        ('condition = "none"', 'condition = "none"\nmin_snr_gamma = 0', r"min_snr_gamma must be positive, got 0\.0"),
        ("[second_stage.loop]", "[second_stage.sampling]\nsteps = 2000\n[second_stage.loop]", r"between 1 and 1000"),
        (
            "[second_stage.loop]",
            '[second_stage.sampling]\nsampler = "dimm"\n[second_stage.loop]',
            r"second_stage: sampling\.sampler must be one of ddim, .*, got 'dimm'",
        ),
        ("[second_stage.loop]", "[second_stage.sampling]\neta = 2\n[second_stage.loop]", r"sampling\.eta in \[0, 1\]"),
        ('name = "minimal"', 'name = "minimal"\nseed = -1', r"seed must be in \[0, 2\^31\), got -1"),
        ('name = "minimal"', "", r"name: this field is missing"),
        ('name = "minimal"', 'name = "minimal', r"not valid TOML"),
        ('name = "minimal"', 'name = "minimal"\nfirst_stage = 3', r"TOML|first_stage"),
        (
            "[second_stage.loop]\nsteps = 2",
            "[second_stage.loop]\nsteps = 2\nbetas = [0.9]",
            r"second_stage\.loop\.betas: needs 2 values, got 1",
        ),
    ],
)
def test_errors_name_the_field(old, new, message):
    assert old in MINIMAL
    with pytest.raises(ConfigError, match=message):
        parse_recipe(MINIMAL.replace(old, new, 1), "mine.toml")


def test_a_text_encoder_must_be_as_wide_as_the_context():
    stage = load_recipe("tiny").second_stage
    with pytest.raises(ValueError, match=r"text\.width is 24, but the unet takes a context of width 16"):
        dataclasses.replace(stage, text=dataclasses.replace(stage.text, width=24))


def test_exactly_one_kind_of_first_stage():
    with pytest.raises(ConfigError, match="first_stage: give exactly one of the sections vq and kl"):
        parse_recipe(MINIMAL + "[first_stage.kl]\nblock_out_channels = [32]\n")


def test_an_unknown_recipe_is_an_error_that_lists_the_known_ones(tmp_path):
    with pytest.raises(ConfigError, match="no recipe 'emojo': give emoji, tiny or the path"):
        load_recipe("emojo")
    with pytest.raises(ConfigError, match="cannot read the recipe"):
        load_recipe(tmp_path / "none.toml")


def test_load_by_path_and_round_trip(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(MINIMAL)
    recipe = load_recipe(path)
    assert recipe == parse_recipe(MINIMAL)
    assert to_dict(recipe)["first_stage"]["vq"]["block_out_channels"] == [8, 16]


def test_fingerprint_leaves_out_what_has_no_influence():
    loop = parse_recipe(MINIMAL).first_stage.loop
    same = dataclasses.replace(loop, checkpoint_every=7)
    other = dataclasses.replace(loop, batch_size=5)
    assert Fingerprint.of(loop) == Fingerprint.of(same)
    assert Fingerprint.of(other).changes(Fingerprint.of(loop).fields) == {"batch_size": "batch_size: 4 -> 5"}
    earlier = {**Fingerprint.of(loop).fields, "sample_every": 7}  # from a version in which this field had an influence
    assert Fingerprint.of(loop).changes(earlier) == {}


def test_a_field_that_an_earlier_version_lacked_is_no_change_at_its_default():
    loop = parse_recipe(MINIMAL).first_stage.loop
    earlier = {name: value for name, value in Fingerprint.of(loop).fields.items() if name != "lr_restarts"}
    assert Fingerprint.of(loop).changes(earlier) == {}
    restarted = dataclasses.replace(loop, lr_restarts=(1,))
    assert Fingerprint.of(restarted).changes(earlier) == {"lr_restarts": "lr_restarts: None -> [1]"}


@pytest.mark.parametrize("restarts", [(0,), (5, 5), (7, 6), (10,)])
def test_restarts_lie_between_the_first_and_the_last_step(restarts):
    with pytest.raises(ValueError, match="lr_restarts must rise"):
        LoopConfig(steps=10, batch_size=1, learning_rate=1.0, lr_restarts=restarts)
