"""Figures of merit: PSNR of reconstructions, use of a codebook, and how well a picture is found among others."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

THUMBNAIL = 16


def psnr(mean_square: Tensor, peak: float = 255.0) -> Tensor:
    """PSNR in dB of mean squared errors of pictures with values from 0 to `peak`, float64 in the input's shape.

    Errors below 1e-4 (of 8-bit levels, squared) count as that, so identical pictures have 88.1 dB.
    """
    squares = mean_square.double().clamp(min=1e-4 * (peak / 255) ** 2)
    return 20 * math.log10(peak) - 10 * squares.log10()


def reconstruction_psnr(mean_squares: Tensor, peak: float = 255.0) -> dict[str, float]:
    """The mean PSNR of images with these mean squared errors (N,), and the PSNR of their pooled error."""
    pooled = mean_squares.double().mean()
    return {"psnr": float(psnr(mean_squares, peak).mean()), "psnr_pooled": float(psnr(pooled, peak))}


def codebook_usage(counts: Tensor) -> float:
    """The share of codes that were chosen at all. counts: (codes,) int64, how often each was."""
    return float((counts > 0).double().mean())


def codebook_perplexity(counts: Tensor) -> float:
    """exp of the entropy of the codes' use: the number of codes that, used equally, would carry as much."""
    share = counts.double() / counts.sum()
    return float(torch.special.entr(share).sum().exp())


def thumbnails(images: Tensor) -> Tensor:
    """uint8 (N, 3, H, W) -> RGB averaged to 16×16, float64 (N, 768); exact if 16 divides both sides."""
    parts = [F.adaptive_avg_pool2d(part.double(), THUMBNAIL).flatten(1) for part in images.split(256)]
    return torch.cat(parts)


def rank(picture: Tensor, candidates: Tensor, truth: int) -> int:
    """1 + the number of candidates (N, D) strictly closer to picture (D,) than candidate `truth`: equal ones tie."""
    distance = (candidates - picture).square().sum(1)
    return 1 + int((distance < distance[truth]).sum())
