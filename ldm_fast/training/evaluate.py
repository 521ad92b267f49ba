"""The metrics of the model card: how well the first stage keeps emojis, and how well words find their emoji.

first stage    PSNR of reconstructed held-out images; share of the codebook in use over all images
text to image  rank of the true image among all of them, by L2 distance over RGB averaged to 16x16
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm_fast.pipelines.latent_diffusion import LatentDiffusion
from ldm_fast.training.image_set import ImageSet

Report = Callable[[str, int, int], None]  # what is being measured, done, of how many
FINGERPRINT = 16


def evaluate(
    model: LatentDiffusion,
    data: ImageSet,
    *,
    seen: int = 200,
    held_out: int | None = None,
    seed: int = 0,
    batch_size: int = 48,
    report: Report | None = None,
) -> dict[str, float | int]:
    """All metrics of `model` on `data`, at the model's default sampling settings.

    seen: so many random captions of training images (chosen by `seed`); held_out: the first so many held-out ones,
    default all. Image i of either group is generated from seed + i. Returns a flat dictionary.
    """
    report = report or (lambda what, done, total: None)
    if data.captions is None:
        raise ValueError("evaluate: the images have no captions")
    if model.cond_stage is None or not model.cond_stage.takes_text:
        raise ValueError("evaluate: this model takes no words, and how well words find their emoji is what is measured")
    metrics = first_stage_metrics(model, data, batch_size, report)
    fingerprints = fingerprint(data.images)
    held = data.held_out.nonzero().flatten().tolist()[:held_out]
    trained = (~data.held_out).nonzero().flatten().tolist()
    chosen = random.Random(seed).sample(trained, min(seen, len(trained)))
    for group, rows in (("seen", chosen), ("held_out", held)):
        ranks = text_to_image_ranks(model, data, rows, fingerprints, group, seed, batch_size, report)
        metrics[f"{group}_count"] = len(rows)
        for top in (1, 5):
            metrics[f"{group}_top{top}"] = float((ranks <= top).double().mean()) if rows else float("nan")
    return metrics


@torch.no_grad()
def first_stage_metrics(model: LatentDiffusion, data: ImageSet, batch_size: int, report: Report) -> dict[str, float]:
    """Mean PSNR over the held-out images (of uint8 reconstructions), and PSNR of their pooled error; and for a VQ-reg
    first stage the share of codes that at least one latent of any image takes."""
    quantize = getattr(model.first_stage, "quantize", None)
    used = set()
    errors = []
    for first in range(0, len(data), batch_size):
        images = data.images[first : first + batch_size].permute(0, 2, 3, 1)
        held = data.held_out[first : first + batch_size]
        z = model.encode(images)
        if quantize is not None:
            used.update(quantize(z / model.scaling_factor).indices.unique().tolist())
        if held.any():
            difference = model.decode(z[held]).double() - images[held].double()
            errors.append(difference.square().flatten(1).mean(1))
        report("first stage", min(first + batch_size, len(data)), len(data))
    error = torch.cat(errors).clamp(min=1e-4) if errors else torch.full((1,), float("nan"), dtype=torch.float64)
    metrics = {"psnr": float(_psnr(error).mean()), "psnr_pooled": float(_psnr(error.mean()))}
    if quantize is not None:
        metrics["codebook_usage"] = len(used) / quantize.embedding.num_embeddings
    return metrics


def _psnr(mean_square: Tensor) -> Tensor:
    return 10 * torch.log10(255**2 / mean_square)


def fingerprint(images: Tensor) -> Tensor:
    """uint8 (N, 3, H, W) -> RGB averaged to 16x16, float64 (N, 768); exact where 16 divides both sides."""
    parts = [F.adaptive_avg_pool2d(part.double(), FINGERPRINT).flatten(1) for part in images.split(256)]
    return torch.cat(parts)


def rank(picture: Tensor, candidates: Tensor, truth: int) -> int:
    """1 + the number of candidates (N, D) strictly closer to picture (D,) than candidate `truth`: equal ones tie."""
    distance = (candidates - picture).square().sum(1)
    return 1 + int((distance < distance[truth]).sum())


def text_to_image_ranks(
    model: LatentDiffusion,
    data: ImageSet,
    rows: list[int],
    fingerprints: Tensor,
    group: str,
    seed: int,
    batch_size: int,
    report: Report,
) -> Tensor:
    """Rank of the true image for pictures generated from the captions of `rows`, (len(rows),) int64."""
    if not rows:
        return torch.zeros(0, dtype=torch.int64)

    def progress(done: int, total: int) -> None:
        report(f"text to image, {group.replace('_', ' ')}", done, total)

    size = tuple(data.images.shape[2:])
    pictures = model.generate(
        [data.captions[i] for i in rows], seed=seed, size=size, batch_size=batch_size, progress=progress
    )
    generated = fingerprint(pictures.permute(0, 3, 1, 2))
    return torch.tensor([rank(picture, fingerprints, i) for picture, i in zip(generated, rows, strict=True)])


def table(metrics: dict[str, float | int]) -> str:
    """The metrics for people."""
    lines = [
        f"{'first stage, held-out images':<38}PSNR {metrics['psnr']:.2f} dB (pooled {metrics['psnr_pooled']:.2f} dB)",
    ]
    if "codebook_usage" in metrics:
        lines.append(f"{'codebook, all images':<38}{metrics['codebook_usage']:.1%} of the codes in use")
    for group, words in (("seen", "seen in training"), ("held_out", "held out")):
        name = f"text to image, {metrics[f'{group}_count']} {words}"
        lines.append(f"{name:<38}top-1 {metrics[f'{group}_top1']:.1%}, top-5 {metrics[f'{group}_top5']:.1%}")
    return "\n".join(lines)


def json_line(metrics: dict[str, float | int]) -> str:
    rounded = {k: round(v, 5) if isinstance(v, float) else v for k, v in metrics.items()}
    return json.dumps({k: None if v != v else v for k, v in rounded.items()})
