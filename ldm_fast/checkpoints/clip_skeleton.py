"""CLIP's text model in a single-file checkpoint: its parameters, and transformers' model around them.

Stable Diffusion 1.x stores OpenAI's CLIP under transformers' names; 2.x and the larger encoder of XL store OpenCLIP's.
"""

from __future__ import annotations

import torch
from torch import nn

from ldm_fast.configs.encoders import CLIPShape
from ldm_fast.models.tokenizers import require_transformers

HEAD_WIDTH = 64  # in every published text model


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


def as_transformers(skeleton: CLIPSkeleton) -> nn.Module:
    """Return transformers' CLIPTextModel, or CLIPTextModelWithProjection, around the skeleton's parameters."""
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
        # The pooled vector is taken at the end-of-text token, which has the highest number. The published
        # configurations say so by a 2.
        eos_token_id=2,
        bos_token_id=0,
        pad_token_id=1,
    )
    build = transformers.CLIPTextModel if shape.projection is None else transformers.CLIPTextModelWithProjection
    with torch.device("meta"):
        model: nn.Module = build(config)
    inside = "text_model." if any(name.startswith("text_model.") for name in model.state_dict()) else ""
    tensors = skeleton.state_dict()
    model.load_state_dict(
        {name if name.startswith("text_projection") else inside + name: t for name, t in tensors.items()}, assign=True
    )
    for module in model.modules():
        if "position_ids" in module._buffers:  # counted, not stored
            module.position_ids = torch.arange(shape.max_length)[None]
    return model.eval()
