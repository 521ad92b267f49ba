"""FreeU (Si et al., arXiv:2309.11497): on the way up, more of the backbone and less of the skips' low frequencies."""

from __future__ import annotations

import torch
from torch import Tensor

THRESHOLD = 1  # frequencies below it, in either direction, are scaled


def apply_freeu(
    resolution_idx: int, hidden_states: Tensor, res_hidden_states: Tensor, *, s1: float, s2: float, b1: float, b2: float
) -> tuple[Tensor, Tensor]:
    """Return hidden states and skip, (B, C, H, W) each, as FreeU changes them at the two lowest resolutions.

    b1 and b2 are factors of the first half of the backbone's channels, s1 and s2 of the skip's low frequencies.
    """
    if resolution_idx > 1:
        return hidden_states, res_hidden_states
    b, s = (b1, s1) if resolution_idx == 0 else (b2, s2)
    half = hidden_states.shape[1] // 2
    first, second = hidden_states[:, :half], hidden_states[:, half:]
    return torch.cat([first * b, second], dim=1), scale_low_frequencies(res_hidden_states, s)


def scale_low_frequencies(x: Tensor, scale: float) -> Tensor:
    """Return x (B, C, H, W) with its lowest frequencies multiplied by `scale`, in x's dtype."""
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    frequencies = torch.fft.fftshift(torch.fft.fftn(wide, dim=(-2, -1)), dim=(-2, -1))
    height, width = x.shape[-2:]
    mask = torch.ones(height, width, dtype=wide.dtype, device=x.device)
    middle = [slice(max(0, n // 2 - THRESHOLD), n // 2 + THRESHOLD) for n in (height, width)]
    mask[middle[0], middle[1]] = scale
    back = torch.fft.ifftn(torch.fft.ifftshift(frequencies * mask, dim=(-2, -1)), dim=(-2, -1))
    out: Tensor = back.real.to(x.dtype)
    return out
