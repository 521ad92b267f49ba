"""Text encoders of transformers: tiny random CLIP models against diffusers' pipelines, and BERT's tokens."""

from __future__ import annotations

import json
import warnings

import pytest
import torch

from ldm_fast.configs.encoders import TransformerConfig
from ldm_fast.models.clip import CLIPTextEncoder, CLIPTextEncoders, load_text_encoder
from ldm_fast.models.encoders import BertTextEncoder, TextEncoder, TransformerEmbedder
from ldm_fast.models.tokenizers import WordPieceTokenizer, WordTokenizer

transformers = pytest.importorskip("transformers")

LENGTH = 12
PROMPTS = ["a red cat", "", "two dogs"]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "cat", "##s", "dog", "[MASK]", ","]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a diffusers pipeline: two text encoders with random weights, and a tokenizer of letters."""
    path = tmp_path_factory.mktemp("pipeline")
    tokens = [*LETTERS, *(f"{c}</w>" for c in LETTERS), "ca", "cat</w>", "<|startoftext|>", "<|endoftext|>"]
    source = path / "source"
    source.mkdir()
    (source / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (source / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")
    for i, build in (("", transformers.CLIPTextModel), ("_2", transformers.CLIPTextModelWithProjection)):
        torch.manual_seed(len(i))
        config = transformers.CLIPTextConfig(
            vocab_size=len(tokens),
            hidden_size=16 + 8 * len(i),
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            max_position_embeddings=LENGTH,
            projection_dim=10,
            bos_token_id=len(tokens) - 2,
            eos_token_id=len(tokens) - 1,
            pad_token_id=len(tokens) - 1,
        )
        build(config).save_pretrained(path / f"text_encoder{i}")
        tokenizer = transformers.CLIPTokenizer.from_pretrained(source, model_max_length=LENGTH)
        tokenizer.save_pretrained(path / f"tokenizer{i}")
    return path


def encoder(folder, i: str = "", **options) -> CLIPTextEncoder:
    return CLIPTextEncoder.from_pretrained(folder, model=f"text_encoder{i}", tokenizer=f"tokenizer{i}", **options)


def pipeline(kind: str, **parts):
    """A diffusers pipeline that can do nothing but encode prompts."""
    diffusers = pytest.importorskip("diffusers")
    cls = getattr(diffusers, kind)
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
        cross_attention_dim=8,
    )
    if kind == "StableDiffusionPipeline":
        parts.update(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    return cls(vae=vae, unet=unet, scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False), **parts)


@pytest.mark.parametrize("skip", [0, 1, 3])
@torch.no_grad()
def test_one_encoder_equals_stable_diffusion(folder, skip):
    ours = encoder(folder, skip=skip)
    model = ours.model
    if not hasattr(model, "text_model"):  # where diffusers looks for the norm that it applies after skipping
        object.__setattr__(model, "text_model", model)
    pipe = pipeline("StableDiffusionPipeline", text_encoder=model, tokenizer=ours.tokenizer)
    wanted, unconditional = pipe.encode_prompt(PROMPTS, "cpu", 1, True, clip_skip=skip or None)
    assert torch.equal(ours(PROMPTS), wanted) and wanted.shape == (3, LENGTH, 16)
    if skip == 0:  # diffusers skips no layers in the unconditional context
        torch.testing.assert_close(ours.unconditional(3), unconditional)
        assert not torch.equal(wanted, encoder(folder, skip=1)(PROMPTS))
    assert torch.equal(ours.unconditional(2)[1:], ours([""]))


@pytest.mark.parametrize("zero", [True, False])
@torch.no_grad()
def test_two_encoders_equal_stable_diffusion_xl(folder, zero):
    options = {"skip": 1, "final_norm": False}
    parts = [encoder(folder, **options), encoder(folder, "_2", **options)]
    ours = CLIPTextEncoders(parts, zero_unconditional=zero)
    first, second = ours.encoders
    pipe = pipeline(
        "StableDiffusionXLPipeline",
        text_encoder=first.model,
        tokenizer=first.tokenizer,
        text_encoder_2=second.model,
        tokenizer_2=second.tokenizer,
        force_zeros_for_empty_prompt=zero,
    )
    context, none, pooled, pooled_none = pipe.encode_prompt(PROMPTS, device="cpu")
    got = ours.encode(PROMPTS)
    assert torch.equal(got.context, context) and context.shape == (3, LENGTH, 16 + 32)
    assert torch.equal(got.pooled, pooled) and pooled.shape == (3, 10)
    assert torch.equal(ours(PROMPTS), context)
    got = ours.encode_unconditional(3)
    torch.testing.assert_close(tuple(got), (none, pooled_none))  # diffusers computes three rows, we repeat one
    torch.testing.assert_close(ours.unconditional(3), none)
    assert bool(none.any()) is not zero


@torch.no_grad()
def test_load_text_encoder(folder, tmp_path):
    both = load_text_encoder(folder)
    assert isinstance(both, CLIPTextEncoders) and both.zero_unconditional
    wanted = [encoder(folder, i, skip=1, final_norm=False).encode(PROMPTS) for i in ("", "_2")]
    assert torch.equal(both(PROMPTS), torch.cat([w.context for w in wanted], -1))
    assert torch.equal(both.encode(PROMPTS).pooled, wanted[1].pooled)

    def only(*numbers: str):
        path = tmp_path / f"only{''.join(numbers)}"
        path.mkdir()
        for i in numbers:
            for part in ("text_encoder", "tokenizer"):
                (path / f"{part}{i}").symlink_to(folder / f"{part}{i}")
        return path

    assert torch.equal(load_text_encoder(only(""))(PROMPTS), encoder(folder)(PROMPTS))
    refiner = only("_2")
    (refiner / "model_index.json").write_text(json.dumps({"force_zeros_for_empty_prompt": False}))
    refiner = load_text_encoder(refiner, dtype=torch.bfloat16)
    assert not refiner.zero_unconditional
    assert refiner(PROMPTS).shape == (3, LENGTH, 32) and refiner(PROMPTS).dtype == torch.bfloat16


@torch.no_grad()
def test_pooled_vector(folder):
    """It is taken at the first end of text. Without a projection it is the normalised state, whatever is skipped."""
    model = encoder(folder, skip=2)
    ends = [len(model.tokenizer(prompt).input_ids) - 1 for prompt in PROMPTS]
    last = encoder(folder)(PROMPTS)
    assert torch.equal(model.encode(PROMPTS).pooled, torch.stack([last[i, end] for i, end in enumerate(ends)]))
    assert model.encode_unconditional(4).pooled.shape == (4, 16)


def test_a_long_prompt_is_cut_with_a_warning(folder):
    model = encoder(folder)
    with pytest.warns(UserWarning, match=r"15 tokens long; only 12 are used, cut off: 'cat e f'$") as caught:
        long = model(["a b c d cat cat cat a b c cat e f", "a"])
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(long[0], model("a b c d cat cat cat a b c")[0])


def test_clip_errors(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder .*text_encoder_3"):
        encoder(folder, "_3")
    with pytest.raises(ValueError, match="skip must be between 0 and the model's 3 layers, got 4"):
        encoder(folder, skip=4)
    with pytest.raises(TypeError, match="must be a str, not int"):
        encoder(folder)([1])
    short = encoder(folder)
    short.max_length = 5
    with pytest.raises(ValueError, match=r"must have the same max_length, got \[5, 12\]"):
        CLIPTextEncoders([short, encoder(folder)])


def test_missing_weights_are_named(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    for part in ("text_encoder", "tokenizer"):
        (tmp_path / part).mkdir()
        for file in (folder / part).iterdir():
            (tmp_path / part / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "text_encoder" / "model.safetensors"
    tensors = load_file(weights)
    gone = next(name for name in tensors if name.endswith("final_layer_norm.weight"))
    save_file({name: t for name, t in tensors.items() if name != gone}, weights, {"format": "pt"})
    with pytest.raises(ValueError, match=r"text_encoder lacks 1 tensors: .*final_layer_norm.weight"):
        encoder(tmp_path)


# BERT


def test_bert_tokens(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(PIECES) + "\n")
    tokenizer = WordPieceTokenizer.from_file(path, max_length=7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokens = tokenizer(["A red, CATS", "", "dogs bird"])
    assert tokens.tolist() == [[2, 4, 5, 10, 6, 7, 3], [2, 3, 0, 0, 0, 0, 0], [2, 8, 7, 1, 3, 0, 0]]
    assert tokens.dtype == torch.int64 and len(tokenizer) == len(PIECES)
    with pytest.warns(UserWarning, match="9 tokens long; only 7 are used, cut off: 'cat dog'"):
        assert tokenizer("a red a red a cat dog").tolist() == [[2, 4, 5, 4, 5, 4, 3]]
    with pytest.raises(ValueError, match=r"lacks \[CLS\], \[SEP\]"):
        WordPieceTokenizer(["[PAD]", "[UNK]", "a"])


SIZES = {"width": 16, "depth": 2, "heads": 2, "head_dim": 4}


@torch.no_grad()
def test_bert_text_encoder_equals_diffusers_ldmbert():
    module = pytest.importorskip("diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion")
    torch.manual_seed(0)
    transformer = TransformerEmbedder(TransformerConfig(vocab_size=len(PIECES), max_length=7, **SIZES))
    config = module.LDMBertConfig(
        vocab_size=len(PIECES),
        max_position_embeddings=7,
        encoder_layers=2,
        encoder_ffn_dim=64,
        encoder_attention_heads=2,
        head_dim=4,
        d_model=16,
    )
    bert = module.LDMBertModel(config).eval()
    names = {
        "token_embedding": "embed_tokens",
        "position_embedding": "embed_positions",
        "attention_norm": "self_attn_layer_norm",
        "attention.to_q": "self_attn.q_proj",
        "attention.to_k": "self_attn.k_proj",
        "attention.to_v": "self_attn.v_proj",
        "attention.to_out": "self_attn.out_proj",
        "feed_forward_norm": "final_layer_norm",
        "feed_forward.0": "fc1",
        "feed_forward.2": "fc2",
        "norm": "layer_norm",
    }
    for path, ours in transformer.named_modules():
        layer, _, name = path.partition(".")[2].partition(".") if path.startswith("layers.") else ("", "", path)
        if name in names:
            theirs = bert.model.get_submodule(f"layers.{layer}.{names[name]}" if layer else names[name])
            theirs.load_state_dict(ours.state_dict())
    encoder = BertTextEncoder.from_transformer(WordPieceTokenizer(PIECES, max_length=7), transformer)
    wanted = bert(encoder.tokenizer(["red cats", "", "a dog"]))[0]
    torch.testing.assert_close(encoder(["red cats", "", "a dog"]), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(encoder.unconditional(2), wanted[1:2].expand(2, -1, -1), rtol=1e-5, atol=1e-5)


def test_a_text_encoder_from_its_halves():
    tokenizer = WordTokenizer.from_captions(["a b"], max_length=5)
    transformer = TransformerEmbedder(TransformerConfig(vocab_size=5, max_length=5, **SIZES))
    encoder = TextEncoder.from_transformer(tokenizer, transformer)
    assert torch.equal(encoder("b a"), transformer(tokenizer("b a")))
    again = TextEncoder(encoder.config)
    again.load_state_dict(encoder.state_dict())
    assert torch.equal(again("b a"), encoder("b a"))
    with pytest.raises(
        ValueError, match=r"TextEncoder: the tokenizer has 4 tokens and max_length 5, the transformer 5 "
    ):
        TextEncoder.from_transformer(WordTokenizer.from_captions(["a"], max_length=5), transformer)
