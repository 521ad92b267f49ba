"""Parameter names of CLIP's text model inside single-file checkpoints.

Stable Diffusion 1.x stores OpenAI's CLIP under transformers' names; 2.x and the larger encoder of XL store OpenCLIP's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from ldm_fast.configs.encoders import CLIPShape

HF, OPEN_CLIP = "transformer.text_model.", "model."
OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
    **{f"self_attn.{part}_proj.{kind}": f"attn.in_proj_{kind}" for part in "qkv" for kind in ("weight", "bias")},
}


def with_text_model(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors under the names of OpenAI's CLIP; some programs leave "text_model." out of them."""
    short, parts = HF.removesuffix("text_model."), ("embeddings.", "encoder.", "final_layer_norm.")
    starts = tuple(short + part for part in parts)
    return {
        HF + name.removeprefix(short) if name.startswith(starts) else name: tensor for name, tensor in tensors.items()
    }


def clip_names(config: CLIPShape) -> Iterator[tuple[str, str]]:
    """Pair the modules, ours with theirs, and the parameters that lie outside of theirs."""
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
    """Return the sizes of the CLIP text model that has these names and shapes; None if it is no such model."""
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
