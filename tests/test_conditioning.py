"""Tokenizer, encoders and conditioning keys. Parity with the published encoders is tested in the golden tests."""

import json
import warnings

import pytest
import torch

from ldm_fast.configs.encoders import ClassEmbedderConfig, SpatialRescalerConfig, TransformerConfig
from ldm_fast.diffusion.condition import CONDITIONING_KEYS, Condition, unet_arguments
from ldm_fast.models.encoders import ClassEmbedder, SpatialRescaler, TextEncoder, TransformerEmbedder
from ldm_fast.models.tokenizers import PAD, START, UNKNOWN, WordTokenizer, split_words

CAPTIONS = ["red apple", "woman: medium-light skin tone", "piñata", "keycap 10", "man’s shoe"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", []),
        ("  \n\t ", []),
        ("Red APPLE", ["red", "apple"]),
        ("medium-light", ["medium", "-", "light"]),
        ("PIÑATA!", ["pinata", "!"]),
        ("man’s", ["man", "'", "s"]),
        ("snake_case 10", ["snake", "case", "10"]),
        ("straße", ["strasse"]),
        ("a🍎b", ["a", "🍎", "b"]),
        ("re\u200bd\u202e ap\u200dple\ufeff\u00ad", ["red", "apple"]),
        ("\u200b\u202e", []),
    ],
)
def test_split_words(text, words):
    assert split_words(text) == words


def test_vocabulary_depends_only_on_the_set_of_captions():
    tokenizer = WordTokenizer.from_captions(CAPTIONS)
    assert tokenizer.vocabulary[:3] == (PAD, UNKNOWN, START)
    assert tokenizer.vocabulary == WordTokenizer.from_captions([*reversed(CAPTIONS), *CAPTIONS]).vocabulary
    assert {"pinata", "-", "10", "'"} <= set(tokenizer.vocabulary)


def test_tokens():
    tokenizer = WordTokenizer.from_captions(["a b c"], max_length=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokens = tokenizer(["b", "", "c B a"])
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == [[2, 4, 0, 0], [0, 0, 0, 0], [2, 5, 4, 3]]
    assert tokenizer("b").tolist() == [[2, 4, 0, 0]]
    assert tokenizer([]).shape == (0, 4)


def test_unknown_words_are_named_with_the_nearest_known_one():
    tokenizer = WordTokenizer.from_captions(CAPTIONS, max_length=8)
    with pytest.warns(UserWarning, match=r"'aple' \(nearest known word: 'apple'\), 'zzzz'$") as caught:
        tokens = tokenizer(["aple zzzz aple apple"])
    assert len(caught) == 1
    assert tokens[0].tolist()[1:4] == [1, 1, 1] and tokens[0, 4] == tokenizer.vocabulary.index("apple")


def test_a_long_prompt_is_cut_with_a_warning():
    tokenizer = WordTokenizer.from_captions(CAPTIONS, max_length=8)
    with pytest.warns(UserWarning, match="10000 words; only the first 7 are used, 9993 are cut off") as caught:
        tokens = tokenizer(["apple " * 10_000])
    assert len(caught) == 1
    assert tokens.tolist() == tokenizer(["apple " * 7]).tolist()


@pytest.mark.parametrize(
    ("vocabulary", "max_length", "message"),
    [
        (["a", "b", "c"], 8, "starts with <pad>"),
        ([PAD, UNKNOWN, START, "a", "a"], 8, "twice"),
        ([PAD, UNKNOWN, START], 1, "max_length is 1"),
    ],
)
def test_bad_vocabularies(vocabulary, max_length, message):
    with pytest.raises(ValueError, match=message):
        WordTokenizer(vocabulary, max_length)


def test_a_prompt_must_be_a_string():
    with pytest.raises(TypeError, match="must be a str, not int"):
        WordTokenizer.from_captions(CAPTIONS)([3])


@pytest.fixture
def text_encoder():
    torch.manual_seed(0)
    return TextEncoder.from_tokenizer(WordTokenizer.from_captions(CAPTIONS, 8), width=12, depth=2, heads=2, head_dim=5)


def test_text_encoder(text_encoder):
    context = text_encoder(["red apple", "", "apple red"])
    assert context.shape == (3, 8, 12)
    assert not torch.allclose(context[0], context[2])  # the order of words matters
    torch.testing.assert_close(context[1:2], text_encoder.unconditional(1))
    assert text_encoder.unconditional(5).shape == (5, 8, 12)
    torch.testing.assert_close(text_encoder("red apple"), context[:1])


def test_text_encoder_config_survives_json(text_encoder):
    again = json.loads(json.dumps(text_encoder.config.vocabulary))
    assert WordTokenizer(again, 8)(CAPTIONS).tolist() == text_encoder.tokenizer(CAPTIONS).tolist()


def test_transformer_matches_pytorchs_encoder():
    """Ours computes the same as nn.TransformerEncoderLayer (norm_first) with the same weights, in float64."""
    torch.manual_seed(0)
    config = TransformerConfig(vocab_size=11, width=16, depth=1, max_length=7, heads=2, head_dim=8)
    ours = TransformerEmbedder(config).double()
    theirs = torch.nn.TransformerEncoderLayer(
        16, 2, 64, dropout=0.0, activation="gelu", batch_first=True, norm_first=True, dtype=torch.float64
    )
    layer = ours.layers[0]
    with torch.no_grad():
        qkv = torch.cat([layer.attention.to_q.weight, layer.attention.to_k.weight, layer.attention.to_v.weight])
        theirs.self_attn.in_proj_weight.copy_(qkv)
        theirs.self_attn.in_proj_bias.zero_()
    for mine, its in (
        (layer.attention.to_out, theirs.self_attn.out_proj),
        (layer.attention_norm, theirs.norm1),
        (layer.feed_forward_norm, theirs.norm2),
        (layer.feed_forward[0], theirs.linear1),
        (layer.feed_forward[2], theirs.linear2),
    ):
        its.load_state_dict(mine.state_dict())
    tokens = torch.randint(11, (3, 5))
    embedded = ours.token_embedding(tokens) + ours.position_embedding.weight[:5]
    torch.testing.assert_close(ours(tokens), ours.norm(theirs(embedded)))


def test_transformer_refuses_too_many_tokens():
    model = TransformerEmbedder(TransformerConfig(vocab_size=5, width=4, depth=1, max_length=3, heads=1, head_dim=4))
    with pytest.raises(ValueError, match=r"\(1, 4\).*L <= 3"):
        model(torch.zeros(1, 4, dtype=torch.int64))


def test_class_embedder():
    model = ClassEmbedder(ClassEmbedderConfig(num_classes=4, width=6, null_class=3))
    context = model([2, 0])
    assert context.shape == (2, 1, 6)
    torch.testing.assert_close(context[:, 0], model.embedding.weight[[2, 0]])
    torch.testing.assert_close(model.unconditional(2)[1, 0], model.embedding.weight[3])
    with pytest.raises(ValueError, match=r"label 4 is not in 0..3"):
        model([0, 4])
    with pytest.raises(ValueError, match="no null class"):
        ClassEmbedder(ClassEmbedderConfig(4, 6)).unconditional(1)
    for labels in (["cat", "dog"], [1.9], torch.ones(1)):
        with pytest.raises(TypeError, match="labels must be integers, got"):
            model(labels)
    assert model([]).shape == model.unconditional(0).shape == (0, 1, 6)


def test_spatial_rescaler():
    model = SpatialRescaler(SpatialRescalerConfig(in_channels=2, out_channels=3, n_stages=2, multiplier=0.5))
    assert model(torch.randn(1, 2, 16, 12)).shape == (1, 3, 4, 3)
    constant = model(torch.ones(1, 2, 8, 8))
    expected = model.channel_mapper.weight.sum(1).reshape(1, 3, 1, 1).expand(1, 3, 2, 2)
    torch.testing.assert_close(constant, expected)


PARTS = {
    "crossattn": torch.full((2, 5, 8), 2.0),
    "concat": torch.full((2, 3, 4, 4), 3.0),
    "adm": torch.tensor([1, 0]),
}


@pytest.mark.parametrize("key", CONDITIONING_KEYS)
def test_unet_arguments(key):
    z = torch.ones(2, 4, 4, 4)
    needed = CONDITIONING_KEYS[key]
    arguments = unet_arguments(key, z, Condition(**{name: PARTS[name] for name in needed}))
    expected = torch.cat([z, PARTS["concat"]], 1) if "concat" in needed else z
    torch.testing.assert_close(arguments.pop("sample"), expected)
    if "crossattn" in needed:
        assert arguments.pop("encoder_hidden_states") is PARTS["crossattn"]
    if "adm" in needed:
        assert arguments.pop("class_labels") is PARTS["adm"]
    assert arguments == {}


@pytest.mark.parametrize("key", [key for key, needed in CONDITIONING_KEYS.items() if needed])
def test_unet_arguments_need_what_the_key_says(key):
    with pytest.raises(ValueError, match=f"key '{key}' needs"):
        unet_arguments(key, torch.ones(2, 4, 4, 4), Condition())


def test_unet_arguments_refuse_what_they_cannot_use():
    with pytest.raises(ValueError, match="needs \\[\\], got \\['crossattn'\\]"):
        unet_arguments(None, torch.ones(2, 4, 4, 4), Condition(crossattn=PARTS["crossattn"]))
    with pytest.raises(ValueError, match="unknown conditioning key 'film'"):
        unet_arguments("film", torch.ones(2, 4, 4, 4), Condition())
    with pytest.raises(ValueError, match="concat is 4 x 4, the latent 4 x 6; give a size that fits"):
        unet_arguments("concat", torch.ones(2, 4, 4, 6), Condition(concat=PARTS["concat"]))


def test_condition():
    condition = Condition(crossattn=torch.arange(3.0).reshape(3, 1, 1), adm=torch.arange(3))
    assert condition[1:].adm.tolist() == [1, 2] and condition[1:].concat is None
    assert condition.cat(condition[:1]).crossattn.flatten().tolist() == [0, 1, 2, 0]
    with pytest.raises(ValueError, match="batch sizes differ"):
        Condition(crossattn=torch.zeros(2, 1, 1), adm=torch.zeros(3))
    with pytest.raises(ValueError, match="one has"):
        condition.cat(Condition(adm=torch.zeros(3)))
    with pytest.raises(ValueError, match=r"crossattn is \(3, 1, 1\) in one, \(3, 2, 1\) in the other"):
        condition.cat(Condition(crossattn=torch.zeros(3, 2, 1), adm=torch.zeros(3)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_map_is_brought_to_the_weights_dtype(dtype):
    encoder = SpatialRescaler(SpatialRescalerConfig(in_channels=3, out_channels=2)).to(dtype)
    for x in (torch.ones(1, 3, 8, 8), torch.ones(1, 3, 8, 8, dtype=torch.uint8)):
        assert encoder(x).dtype == dtype
    assert encoder.to("meta")(x).is_meta
