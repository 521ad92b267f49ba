"""CLIP's text model inside a single-file checkpoint: what its shapes tell, its names, and transformers' model of it.

Stable Diffusion 1.x stores OpenAI's CLIP under transformers' names, 2.x and the larger encoder of XL store OpenCLIP's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

HEAD_WIDTH = 64  # of every published text model
HF, OPEN_CLIP = "transformer.text_model.", "model."
OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
    **{f"self_attn.{part}_proj.{kind}": f"attn.in_proj_{kind}" for part in "qkv" for kind in ("weight", "bias")},
}


@dataclass(frozen=True)
class CLIPShape:
    """Sizes of a CLIP text model. `projection`: width of the pooled vector, None where it is not projected."""

    vocab_size: int
    width: int
    layers: int
    inner: int
    max_length: int
    projection: int | None
    open_clip: bool


class CLIPSkeleton(nn.Module):
    """The parameters of CLIP's text model under transformers' names, without anything that computes."""

    def __init__(self, config: CLIPShape):
        super().__init__()
        self.config = config
        width = config.width
        self.embeddings = nn.ModuleDict(
            {
                "token_embedding": nn.Embedding(config.vocab_size, width),
                "position_embedding": nn.Embedding(config.max_length, width),
            }
        )
        layers = nn.ModuleList(_layer(config.width, config.inner) for _ in range(config.layers))
        self.encoder = nn.ModuleDict({"layers": layers})
        self.final_layer_norm = nn.LayerNorm(width)
        if config.projection is not None:
            self.text_projection = nn.Linear(width, config.projection, bias=False)


def _layer(width: int, inner: int) -> nn.ModuleDict:
    parts = ("q_proj", "k_proj", "v_proj", "out_proj")
    return nn.ModuleDict(
        {
            "self_attn": nn.ModuleDict({part: nn.Linear(width, width) for part in parts}),
            "layer_norm1": nn.LayerNorm(width),
            "mlp": nn.ModuleDict({"fc1": nn.Linear(width, inner), "fc2": nn.Linear(inner, width)}),
            "layer_norm2": nn.LayerNorm(width),
        }
    )


def with_text_model(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the names that OpenAI's CLIP was published with; some programs leave "text_model." out."""
    short, parts = HF.removesuffix("text_model."), ("embeddings.", "encoder.", "final_layer_norm.")
    starts = tuple(short + part for part in parts)
    return {
        HF + name.removeprefix(short) if name.startswith(starts) else name: tensor for name, tensor in tensors.items()
    }


def clip_names(config: CLIPShape) -> Iterator[tuple[str, str]]:
    """(ours, theirs) of modules, and of parameters that are none of a module of theirs."""
    if not config.open_clip:
        for module in ("embeddings", "encoder", "final_layer_norm"):
            yield module, HF + module
        yield "text_projection", "transformer.text_projection"
        return
    yield "embeddings.token_embedding", f"{OPEN_CLIP}token_embedding"
    yield "embeddings.position_embedding.weight", f"{OPEN_CLIP}positional_embedding"
    yield "final_layer_norm", f"{OPEN_CLIP}ln_final"
    yield "text_projection.weight", f"{OPEN_CLIP}text_projection"  # transposed
    for i in range(config.layers):
        for ours, theirs in OPEN_CLIP_LAYER.items():
            yield f"encoder.layers.{i}.{ours}", f"{OPEN_CLIP}transformer.resblocks.{i}.{theirs}"


def clip_shape(shapes: Mapping[str, tuple[int, ...]]) -> CLIPShape | None:
    """What the names and shapes under a checkpoint's prefix are of; None if not of a CLIP text model."""
    if f"{HF}embeddings.token_embedding.weight" in shapes:
        tokens, positions, layers, inner, projection = (
            f"{HF}embeddings.token_embedding.weight",
            f"{HF}embeddings.position_embedding.weight",
            f"{HF}encoder.layers.",
            f"{HF}encoder.layers.0.mlp.fc1.weight",
            shapes.get("transformer.text_projection.weight", (None,))[0],
        )
    elif f"{OPEN_CLIP}token_embedding.weight" in shapes:
        tokens, positions, layers, inner, projection = (
            f"{OPEN_CLIP}token_embedding.weight",
            f"{OPEN_CLIP}positional_embedding",
            f"{OPEN_CLIP}transformer.resblocks.",
            f"{OPEN_CLIP}transformer.resblocks.0.mlp.c_fc.weight",
            shapes.get(f"{OPEN_CLIP}text_projection", (None, None))[1],
        )
    else:
        return None
    numbers = {name.removeprefix(layers).partition(".")[0] for name in shapes if name.startswith(layers)}
    return CLIPShape(
        vocab_size=shapes[tokens][0],
        width=shapes[tokens][1],
        layers=len(numbers),
        inner=shapes[inner][0],
        max_length=shapes[positions][0],
        projection=projection,
        open_clip=tokens.startswith(OPEN_CLIP),
    )


def as_transformers(skeleton: CLIPSkeleton) -> nn.Module:
    """transformers' CLIPTextModel, or CLIPTextModelWithProjection, around the skeleton's parameters."""
    from ldm_fast.tokenizers import require_transformers

    transformers, shape = require_transformers(), skeleton.config
    config = transformers.CLIPTextConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=max(1, shape.width // HEAD_WIDTH),
        max_position_embeddings=shape.max_length,
        projection_dim=shape.projection or shape.width,
        hidden_act="gelu" if shape.open_clip else "quick_gelu",
        # The pooled vector is that of the last token of all, whose number is the highest; 2 is how the published
        # configurations say that.
        eos_token_id=2,
        bos_token_id=0,
        pad_token_id=1,
    )
    build = transformers.CLIPTextModel if shape.projection is None else transformers.CLIPTextModelWithProjection
    with torch.device("meta"):
        model = build(config)
    inside = "text_model." if any(name.startswith("text_model.") for name in model.state_dict()) else ""
    tensors = skeleton.state_dict()
    model.load_state_dict(
        {name if name.startswith("text_projection") else inside + name: t for name, t in tensors.items()}, assign=True
    )
    for module in model.modules():
        if "position_ids" in module._buffers:  # counted, not stored
            module.position_ids = torch.arange(shape.max_length)[None]
    return model.eval()
