"""CLIP as τ_θ: the text encoders of Stable Diffusion, through the package transformers.

| model | encoder | layers left out | last norm |
|---|---|---|---|
| Stable Diffusion 1.x | CLIP ViT-L/14 | 0 | yes |
| Stable Diffusion 2.x | OpenCLIP ViT-H/14 | 1 (0 in diffusers' files: they lack the last layer) | yes |
| Stable Diffusion XL | CLIP ViT-L/14 and OpenCLIP ViT-bigG/14 (refiner: the latter alone), side by side | 1 | no |
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ldm_fast.models.tokenizers import as_list, padded_ids, require_transformers, warn_of_cut_prompts


class EncodedText(NamedTuple):
    """Prompts as a UNet takes them."""

    context: Tensor  # (B, L, C) for cross attention
    pooled: Tensor  # (B, P): the whole prompt as one vector


class CLIPTextEncoder(nn.Module):
    """Prompts → context (B, L, C); L is 77 for all published models.

    Args:
        model: transformers' CLIPTextModel or CLIPTextModelWithProjection; the latter projects the pooled vector.
        tokenizer: its CLIPTokenizer.
        skip: how many of the last layers are left out (diffusers' clip_skip).
        final_norm: whether the model's last norm is applied to the context.
    """

    takes_text = has_unconditional = True

    def __init__(self, model: Any, tokenizer: Any, *, skip: int = 0, final_norm: bool = True):
        super().__init__()
        layers = model.config.num_hidden_layers
        if not 0 <= skip <= layers:
            raise ValueError(f"CLIPTextEncoder: skip must be between 0 and the model's {layers} layers, got {skip}")
        self.model: Any = model  # transformers has no types for what it is
        self.tokenizer = tokenizer
        self.skip, self.final_norm = skip, final_norm
        self.max_length = min(tokenizer.model_max_length, model.config.max_position_embeddings)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        model: str = "text_encoder",
        tokenizer: str = "tokenizer",
        skip: int = 0,
        final_norm: bool = True,
        dtype: torch.dtype | None = None,
        variant: str | None = None,
    ) -> CLIPTextEncoder:
        """Load the encoder from a local folder that holds `model` and `tokenizer`, as diffusers' pipelines do.

        `variant` is a part of the weights' file name ("fp16"). Nothing is loaded from the network.

        Raises:
            FileNotFoundError: a folder is missing.
            ValueError: weights are missing.
        """
        transformers = require_transformers()
        folders = [Path(path) / name for name in (model, tokenizer)]
        for folder in folders:
            if not folder.is_dir():
                raise FileNotFoundError(f"CLIPTextEncoder: there is no folder {folder}")
        kind = json.loads((folders[0] / "config.json").read_text()).get("architectures", [])
        projected = "CLIPTextModelWithProjection" in kind
        build = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
        loaded, report = build.from_pretrained(
            folders[0], local_files_only=True, variant=variant, output_loading_info=True
        )
        if missing := sorted(report["missing_keys"]):
            raise ValueError(f"CLIPTextEncoder: {folders[0]} lacks {len(missing)} tensors: {', '.join(missing)}")
        vocabulary = transformers.CLIPTokenizer.from_pretrained(folders[1], local_files_only=True)
        return cls(loaded.to(dtype or torch.float32).eval(), vocabulary, skip=skip, final_norm=final_norm)

    def encode(self, prompts: str | Sequence[str]) -> EncodedText:
        """Return context and pooled vector. Warns (UserWarning) of a prompt that is cut."""
        prompts = as_list(prompts)
        tokens = padded_ids(self.tokenizer, prompts, self.max_length)  # (B, L)
        warn_of_cut_prompts(self.tokenizer, prompts, self.max_length)
        out = self.model(tokens.to(self.model.device), output_hidden_states=True)
        pooled = out.text_embeds if hasattr(out, "text_embeds") else out.pooler_output
        context = out.hidden_states[-1 - self.skip]
        if self.final_norm:
            context = getattr(self.model, "text_model", self.model).final_layer_norm(context)
        return EncodedText(context, pooled)

    def forward(self, prompts: str | Sequence[str]) -> Tensor:
        """Return the context (B, L, C)."""
        return self.encode(prompts).context

    def unconditional(self, batch: int) -> Tensor:
        """Return the context of the empty prompt, (batch, L, C)."""
        return self.encode_unconditional(batch).context

    def encode_unconditional(self, batch: int) -> EncodedText:
        """Return context and pooled vector of the empty prompt."""
        return EncodedText(*(t.expand(batch, *t.shape[1:]) for t in self.encode([""])))


class CLIPTextEncoders(nn.Module):
    """Several CLIP text encoders of the same prompts: their contexts side by side, and the last one's pooled vector.

    zero_unconditional: zeros mean "no condition", not the empty prompt (Stable Diffusion XL base).
    """

    takes_text = has_unconditional = True

    def __init__(self, encoders: Sequence[CLIPTextEncoder], *, zero_unconditional: bool = False):
        super().__init__()
        lengths = [encoder.max_length for encoder in encoders]
        if len(set(lengths)) != 1:
            raise ValueError(f"CLIPTextEncoders: encoders must have the same max_length, got {lengths}")
        self.encoders = nn.ModuleList(encoders)
        self.zero_unconditional = zero_unconditional

    def encode(self, prompts: str | Sequence[str]) -> EncodedText:
        """Return the context (B, L, C_1 + C_2 + …) and the pooled vector."""
        encoded: list[EncodedText] = [encoder.encode(prompts) for encoder in self.encoders]  # type: ignore[operator]
        return EncodedText(torch.cat([e.context for e in encoded], dim=-1), encoded[-1].pooled)

    def forward(self, prompts: str | Sequence[str]) -> Tensor:
        """Return the context (B, L, C_1 + C_2 + …)."""
        return self.encode(prompts).context

    def unconditional(self, batch: int) -> Tensor:
        """Return the context of "no condition", (batch, L, C_1 + C_2 + …)."""
        return self.encode_unconditional(batch).context

    def encode_unconditional(self, batch: int) -> EncodedText:
        """Return context and pooled vector of "no condition"."""
        empty = self.encode([""])
        tensors = (torch.zeros_like(t) if self.zero_unconditional else t for t in empty)
        return EncodedText(*(t.expand(batch, *t.shape[1:]) for t in tensors))


def load_text_encoder(
    path: str | Path, dtype: torch.dtype | None = None, variant: str | None = None
) -> CLIPTextEncoder | CLIPTextEncoders:
    """Load what encodes the prompts of the diffusers pipeline in the folder `path`: Stable Diffusion 1.x, 2.x or XL.

    Nothing is loaded from the network. FileNotFoundError if the folder holds no text encoder.
    """
    path = Path(path)
    if not (path / "text_encoder_2").is_dir():
        return CLIPTextEncoder.from_pretrained(path, dtype=dtype, variant=variant)
    encoders = [
        CLIPTextEncoder.from_pretrained(
            path,
            model=f"text_encoder{i}",
            tokenizer=f"tokenizer{i}",
            skip=1,
            final_norm=False,
            dtype=dtype,
            variant=variant,
        )
        for i in ("", "_2")
        if (path / f"text_encoder{i}").is_dir()  # the refiner has the second alone
    ]
    index = path / "model_index.json"
    about = json.loads(index.read_text()) if index.is_file() else {}
    return CLIPTextEncoders(encoders, zero_unconditional=about.get("force_zeros_for_empty_prompt", True))
