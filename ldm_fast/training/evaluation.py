"""The figures of the model card: how well the first stage keeps emojis, and how well words find their emoji.

first stage    PSNR of reconstructed held-out images; share of the codebook in use over all images
text to image  rank of the true image among all of them, by L2 distance over RGB averaged to 16×16
"""

from __future__ import annotations

import functools
import json
import math
import random
from collections.abc import Callable

import torch

from ldm_fast.models.autoencoder import VQModel
from ldm_fast.pipelines.latent_diffusion import LatentDiffusion
from ldm_fast.training.image_set import ImageSet
from ldm_fast.training.metrics import codebook_usage, rank, reconstruction_psnr, thumbnails

Report = Callable[[str, int, int], None]  # what is being measured, done, of how many
Metrics = dict[str, float]


def evaluate(
    model: LatentDiffusion,
    data: ImageSet,
    *,
    seen: int = 200,
    held_out: int | None = None,
    seed: int = 0,
    batch_size: int = 48,
    report: Report | None = None,
) -> Metrics:
    """Measure all metrics of `model` on `data`, at the model's default sampling settings.

    Args:
        seen: how many captions of training images to use, chosen at random by `seed`.
        held_out: how many held-out captions, the first ones; default: all.
        seed: image i of either group is generated from seed + i.
        report: called with what is being measured, how much is done, and of how much.

    Returns a flat dictionary. ValueError if the model takes no words or the images have no captions.
    """
    report = report or (lambda what, done, total: None)
    if data.captions is None:
        raise ValueError("evaluate: the images have no captions")
    if model.cond_stage is None or not model.cond_stage.takes_text:
        raise ValueError("evaluate: this model takes no words, and how well words find their emoji is what is measured")
    metrics = first_stage_metrics(model, data, batch_size, report)
    candidates = thumbnails(data.images)
    size = (data.images.shape[2], data.images.shape[3])
    held = data.held_out.nonzero().flatten().tolist()[:held_out]
    trained = (~data.held_out).nonzero().flatten().tolist()
    chosen = random.Random(seed).sample(trained, min(seen, len(trained)))
    for group, rows in (("seen", chosen), ("held_out", held)):
        ranks = torch.zeros(0)
        if rows:
            captions = [data.captions[i] for i in rows]
            progress = functools.partial(report, f"text to image, {group.replace('_', ' ')}")
            pictures = model.generate(captions, seed=seed, size=size, batch_size=batch_size, progress=progress)
            drawn = thumbnails(pictures.permute(0, 3, 1, 2))
            ranks = torch.tensor([rank(picture, candidates, i) for picture, i in zip(drawn, rows, strict=True)])
        metrics[f"{group}_count"] = len(rows)
        for top in (1, 5):
            metrics[f"{group}_top{top}"] = float((ranks <= top).double().mean())  # nan if there are none
    return metrics


@torch.no_grad()
def first_stage_metrics(model: LatentDiffusion, data: ImageSet, batch_size: int, report: Report) -> Metrics:
    """Measure the PSNR of 8-bit reconstructions of held-out images: its mean, and that of their pooled error.

    For a VQ-reg first stage also the share of codes that at least one latent of any image takes.
    """
    quantize = model.first_stage.quantize if isinstance(model.first_stage, VQModel) else None
    counts = torch.zeros(0 if quantize is None else quantize.embedding.num_embeddings, dtype=torch.int64)
    errors = [torch.zeros(0, dtype=torch.float64)]
    for index in torch.arange(len(data)).split(batch_size):
        images, held = data.images[index].permute(0, 2, 3, 1), data.held_out[index]
        z = model.encode(images)
        if quantize is not None:
            indices = quantize(z / model.scaling_factor).indices
            counts += torch.bincount(indices.flatten().cpu(), minlength=len(counts))
        if held.any():
            difference = model.decode(z[held]).double() - images[held].double()
            errors.append(difference.square().flatten(1).mean(1))
        report("first stage", int(index[-1]) + 1, len(data))
    metrics = reconstruction_psnr(torch.cat(errors))  # nan if nothing is held out
    return metrics if quantize is None else {**metrics, "codebook_usage": codebook_usage(counts)}


def table(metrics: Metrics) -> str:
    """Format the metrics for people."""
    lines = [
        f"{'first stage, held-out images':<38}PSNR {metrics['psnr']:.2f} dB (pooled {metrics['psnr_pooled']:.2f} dB)",
    ]
    if "codebook_usage" in metrics:
        lines.append(f"{'codebook, all images':<38}{metrics['codebook_usage']:.1%} of the codes in use")
    for group, words in (("seen", "seen in training"), ("held_out", "held out")):
        name = f"text to image, {metrics[f'{group}_count']} {words}"
        lines.append(f"{name:<38}top-1 {metrics[f'{group}_top1']:.1%}, top-5 {metrics[f'{group}_top5']:.1%}")
    return "\n".join(lines)


def json_line(metrics: Metrics) -> str:
    """Format the metrics for programs; what could not be measured is null."""
    return json.dumps({name: None if math.isnan(value) else round(value, 5) for name, value in metrics.items()})
