"""What the ops are tried on: one table of cases for the tests, the benchmarks and the static checks.

    for case in CASES["attention"]:
        inputs = make_inputs("attention", case, torch.float32)
        ops.attention(**inputs)

`TOLERANCE` and `wrong_codes` judge the result; `bytes_moved` and `flops` say what it costs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm_fast.ops.codebook_op import nearest_codebook_stats

# Error allowed to an op, relative to the largest element of the exact result, for rounding that result and the sums in
# it. The tests add twice the error of eager PyTorch in the same dtype, which grows with the condition of the data.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}

# A group of at most this many bytes is read once; a larger one has left the core's cache when it is normalised.
GROUP_ON_CHIP = 1 << 20


@dataclass(frozen=True)
class Attention:
    """q (B, H, N, D), k and v (B, H, M, D)."""

    B: int
    H: int
    N: int
    M: int
    D: int
    mask: str = "none"  # or bool, additive, key_padding, per_query, masked_row, masked_row_additive
    layout: str = "heads_first"  # or heads_last: memory (B, N, H, D); one_projection: (B, N, 3, H, D); rows_sliced
    data: str = "normal"  # or large_logits (scores to ±1e3), constant, one_hot
    scale: float | None = None
    acceptance: bool = False  # a size of the benchmarks, too large for tests

    def __str__(self) -> str:
        return _id((self.B, self.H, self.N, self.M, self.D), self.mask, self.layout, self.data, scale=self.scale)


@dataclass(frozen=True)
class GroupNormSilu:
    """x of `shape` (B, C, *spatial)."""

    shape: tuple[int, ...]
    groups: int
    layout: str = "contiguous"  # or channels_last, sliced (neither: every second pixel of a wider x)
    affine: str = "both"  # or weight, bias, none
    modulation: str = "none"  # or both, scale, shift
    activation: str | None = "silu"
    data: str = "normal"  # or offset (mean 1e3, std 1), constant, large (up to float16's range)
    float32_affine: bool = False  # weight and bias in float32 whatever x is
    acceptance: bool = False

    def __str__(self) -> str:
        return _id(
            self.shape,
            f"g{self.groups}",
            self.layout,
            "affine" if self.affine == "both" else f"affine_{self.affine}",
            f"modulation_{self.modulation}" if self.modulation != "none" else "none",
            self.activation or "no_activation",
            self.data,
            "float32_affine" if self.float32_affine else "none",
        )


@dataclass(frozen=True)
class NearestCodebook:
    """N vectors of width d (a map of (B, H, W) of them if `map` is given) and K codes."""

    N: int
    K: int
    d: int
    map: tuple[int, int, int] | None = None
    layout: str = "rows"  # or columns (transposed), wide (a slice of wider rows), channels_last (of a map)
    data: str = "normal"  # or lattice, duplicates, offset, huge, denormal, trained (near codes), kmeans (learned codes)
    acceptance: bool = False

    def __str__(self) -> str:
        shape = f"map{'x'.join(map(str, self.map))}" if self.map else "none"
        return _id((), f"n{self.N}-k{self.K}-d{self.d}", shape, self.layout, self.data)


Case = Attention | GroupNormSilu | NearestCodebook
_ORDINARY = ("none", "heads_first", "normal", "contiguous", "affine", "silu", "rows")


def _id(shape: tuple[int, ...], *parts: str, **numbers: float | None) -> str:
    """Return the shape and whatever is out of the ordinary, as in 2x8x64x77x40-bool."""
    words = ["x".join(map(str, shape))] if shape else []
    words += [part for part in parts if part not in _ORDINARY]
    return "-".join(words + [f"{name}{value}" for name, value in numbers.items() if value is not None])


def _sd_attention() -> list[Attention]:
    """Return the attention of Stable Diffusion 1.x, XL and a first stage at 512², batch 2, for the benchmarks."""
    shapes = [
        *((2, 8, 4096, 77, 40), (2, 8, 1024, 77, 80), (2, 8, 256, 77, 160), (2, 10, 4096, 77, 64)),
        *((2, 8, 4096, 4096, 40), (2, 8, 1024, 1024, 80), (2, 20, 1024, 1024, 64), (1, 1, 4096, 4096, 512)),
    ]
    return [Attention(*shape, layout="heads_last", acceptance=True) for shape in shapes]


_SPLIT = (
    *(GroupNormSilu((0, 4, 3, 3), 2), GroupNormSilu((2, 4, 0, 3), 2), GroupNormSilu((1, 1), 1)),
    *(GroupNormSilu((3, 6), 3), GroupNormSilu((3, 10, 7), 5), GroupNormSilu((2, 6, 2, 3, 5), 3)),
    *(
        GroupNormSilu(shape, 32, layout, data=data)
        for shape, data in (((2, 96, 5, 7), "normal"), ((1, 64, 40, 41), "normal"), ((2, 64, 12, 12), "offset"))
        for layout in ("contiguous", "channels_last")
    ),
    *(GroupNormSilu((2, 64, 12, 12), 32, data=data) for data in ("constant", "large")),
    *(GroupNormSilu((2, 6, 5, 7), 3, "sliced"), GroupNormSilu((1, 12, 150, 151), 2)),
    GroupNormSilu((2, 12, 5, 3), 4, "channels_last", modulation="both", affine="none", data="offset"),
    GroupNormSilu((2, 12, 5, 3), 4, activation=None, modulation="scale", affine="bias"),
)

CASES: dict[str, tuple[Any, ...]] = {
    "attention": (
        # Empty, one, odd, prime; less than a vector, a tile, and one more.
        *(Attention(2, 3, 0, 5, 8), Attention(0, 3, 4, 5, 8), Attention(1, 2, 5, 0, 8), Attention(1, 1, 1, 1, 1)),
        *(Attention(2, 3, 7, 13, 3), Attention(2, 1, 17, 1, 5), Attention(1, 1, 1, 131, 7), Attention(3, 2, 31, 2, 17)),
        *(Attention(1, 2, 65, 33, 31), Attention(1, 1, 5, 129, 65), Attention(1, 1, 67, 257, 40)),
        # Head widths of Stable Diffusion and of the zoo, with its 77 words and with itself.
        *(Attention(2, 2, 37, 77, D) for D in (24, 32, 40, 48, 64, 80, 96, 128, 160)),
        *(Attention(1, 2, 64, 64, D, layout="one_projection") for D in (40, 64, 80, 160)),
        Attention(1, 2, 150, 150, 40),
        # Many keys: the error of a sum of this length must not be that of adding one by one.
        *(Attention(1, 1, 64, 4096, D) for D in (40, 512)),
        *(Attention(1, 1, 19, 23, D) for D in (257, 384, 512, 576, 960, 1024)),
        # Views.
        Attention(2, 3, 21, 77, 40, layout="heads_last"),
        Attention(2, 3, 13, 13, 5, layout="one_projection"),
        Attention(2, 3, 11, 19, 8, layout="rows_sliced"),
        Attention(2, 3, 29, 77, 40, scale=0.37, layout="heads_last"),
        # Masks.
        *(Attention(2, 3, 11, 77, 40, mask=mask) for mask in ("bool", "additive", "key_padding", "per_query")),
        *(Attention(2, 3, 11, 19, 8, mask=mask) for mask in ("masked_row", "masked_row_additive")),
        Attention(1, 2, 70, 150, 40, mask="masked_row", layout="heads_last"),
        Attention(1, 1, 9, 150, 320, mask="key_padding"),
        # Data.
        *(Attention(1, 2, 21, 77, 40, data=data) for data in ("large_logits", "constant", "one_hot")),
        Attention(1, 1, 40, 200, 16, data="large_logits"),
        *_sd_attention(),
    ),
    "group_norm_silu": (
        # Empty, one pixel, one channel for each group, odd, prime, zero to three spatial dimensions.
        *(GroupNormSilu((0, 4, 3, 3), 2), GroupNormSilu((2, 4, 0, 3), 2), GroupNormSilu((1, 1), 1)),
        *(GroupNormSilu((3, 6), 3), GroupNormSilu((2, 6, 1, 1), 6), GroupNormSilu((2, 64, 1, 1), 32)),
        *(GroupNormSilu((3, 10, 7), 5), GroupNormSilu((2, 3, 5, 7), 3), GroupNormSilu((1, 26, 13, 11), 2)),
        *(GroupNormSilu((2, 6, 2, 3, 5), 3), GroupNormSilu((1, 7, 31, 1), 1), GroupNormSilu((2, 33, 4, 5), 11)),
        # Channel counts of Stable Diffusion and of the zoo, in both layouts.
        *(
            GroupNormSilu((2, C, side, side), 32, layout)
            for C, side in ((32, 9), (96, 5), (224, 8), (320, 8), (960, 3), (2560, 2))
            for layout in ("contiguous", "channels_last")
        ),
        GroupNormSilu((1, 64, 40, 41), 32),
        GroupNormSilu((1, 64, 40, 41), 32, "channels_last"),
        # Layouts.
        *(GroupNormSilu((2, 6, 5, 7), 3, layout) for layout in ("channels_last", "sliced")),
        *(GroupNormSilu((2, 6, 2, 3, 5), 3, "channels_last"), GroupNormSilu((2, 1, 5, 7), 1, "channels_last")),
        # Without weights, activation; with modulation; mixed dtypes.
        *(GroupNormSilu((2, 12, 5, 3), 4, affine=affine) for affine in ("none", "weight", "bias")),
        *(GroupNormSilu((2, 12, 5, 3), 4, modulation=modulation) for modulation in ("both", "scale", "shift")),
        GroupNormSilu((2, 12, 5, 3), 4, "channels_last", modulation="both", affine="none"),
        GroupNormSilu((2, 12, 5, 3), 4, activation=None),
        GroupNormSilu((2, 12, 5, 3), 4, "channels_last", activation=None, modulation="both"),
        GroupNormSilu((2, 64, 6, 6), 32, float32_affine=True),
        GroupNormSilu((2, 64, 6, 6), 32, "channels_last", modulation="both", float32_affine=True),
        # Data.
        *(
            GroupNormSilu((2, 64, 12, 12), 32, layout, data=data)
            for data in ("offset", "constant", "large")
            for layout in ("contiguous", "channels_last")
        ),
        # Stable Diffusion 1.x, batch 2, and a first stage at 512².
        *(GroupNormSilu((2, 320, 64, 64), 32, layout, acceptance=True) for layout in ("contiguous", "channels_last")),
        *(GroupNormSilu((2, C, s, s), 32, acceptance=True) for C, s in ((640, 32), (1280, 16), (2560, 8))),
        GroupNormSilu((1, 128, 512, 512), 32, acceptance=True),
    ),
    # The two halves of group_norm_silu: every layout, slab and rest of a vector. Everything else they share with the
    # whole.
    "group_norm_stats": _SPLIT,
    "group_norm_apply": _SPLIT,
    "nearest_codebook": (
        *(NearestCodebook(0, 17, 4), NearestCodebook(1, 1, 1), NearestCodebook(5, 1, 3), NearestCodebook(1, 17, 4)),
        *(NearestCodebook(33, 300, d) for d in (1, 2, 3, 4, 5, 7, 8, 13, 16, 17, 31, 64, 100, 257)),
        *(NearestCodebook(130, K, 4) for K in (2, 15, 16, 17, 1025)),
        *(NearestCodebook(1031, 65, d) for d in (3, 24)),
        # Maps and strides.
        *(NearestCodebook(70, 33, d, map=(2, 5, 7)) for d in (3, 4, 16, 40)),
        *(NearestCodebook(0, 33, 4, map=(2, 0, 7)), NearestCodebook(1, 33, 4, map=(1, 1, 1))),
        NearestCodebook(70, 33, 4, map=(2, 5, 7), layout="channels_last"),
        *(NearestCodebook(45, 70, d, layout=layout) for d in (3, 4, 40) for layout in ("columns", "wide")),
        # Data.
        *(
            NearestCodebook(120, 300, d, data=data)
            for d in (1, 4, 16, 64)
            for data in ("lattice", "duplicates", "offset", "huge", "denormal", "trained")
        ),
        *(NearestCodebook(120, 300, d, data="kmeans") for d in (3, 8, 40)),
        # What a VQ-reg first stage asks (d 3 and 4), and wider codes.
        *(
            NearestCodebook(*shape, data=data, acceptance=True)
            for shape in ((16384, 16384, 4), (65536, 8192, 3), (16384, 8192, 8))
            for data in ("normal", "kmeans")
        ),
        NearestCodebook(16384, 8192, 8, data="trained", acceptance=True),
        NearestCodebook(16384, 1024, 64, acceptance=True),
        NearestCodebook(4096, 16384, 256, acceptance=True),
    ),
}
CASES["nearest_codebook_stats"] = CASES["nearest_codebook"]


def make_inputs(
    op: str, case: Case, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
) -> dict[str, Any]:
    """Return the op's keyword arguments for a case; `ops.<op>(**make_inputs(...))` runs it.

    The numbers are drawn in float32 on the CPU and then rounded, so every dtype and device gets the same ones.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def finish(tensor: Tensor) -> Tensor:
        return tensor.to(device, dtype) if tensor.is_floating_point() else tensor.to(device)

    return _MAKERS[op](case, normal, finish)


# ---- attention ----


def _attention_inputs(
    case: Attention, normal: Callable[..., Tensor], finish: Callable[[Tensor], Tensor]
) -> dict[str, Any]:
    B, H, N, M, D = case.B, case.H, case.N, case.M, case.D
    if case.layout == "one_projection":
        assert N == M, "q, k and v of one projection have one length"
        q, k, v = finish(_attention_data(case, normal(B, N, 3, H, D))).permute(2, 0, 3, 1, 4)
    else:
        q, k, v = (_attention_layout(case, normal, finish, length) for length in (N, M, M))
    if case.data == "one_hot":  # every query agrees with one key alone
        q, k = (torch.zeros_like(t) for t in (q, k))
        for t in (q, k):
            rows = torch.arange(t.shape[2], device=t.device)
            t[:, :, rows, rows % D] = 30.0
    mask = _attention_mask(case, normal)
    return {"q": q, "k": k, "v": v, "mask": None if mask is None else finish(mask), "scale": case.scale}


def _attention_layout(
    case: Attention, normal: Callable[..., Tensor], finish: Callable[[Tensor], Tensor], length: int
) -> Tensor:
    if case.layout == "heads_last":
        return finish(_attention_data(case, normal(case.B, length, case.H, case.D))).transpose(1, 2)
    if case.layout == "rows_sliced":  # every second row, and part of each
        wide = normal(case.B, case.H, 2 * length, case.D + 3)
        return finish(_attention_data(case, wide))[:, :, ::2, 1 : case.D + 1]
    return finish(_attention_data(case, normal(case.B, case.H, length, case.D)))


def _attention_data(case: Attention, x: Tensor) -> Tensor:
    if case.data == "large_logits":  # |q · k| / sqrt(D) reaches 1e3 at 4 standard deviations
        return x * math.sqrt(250.0)
    return torch.full_like(x, 0.7) if case.data == "constant" else x


def _attention_mask(case: Attention, normal: Callable[..., Tensor]) -> Tensor | None:
    B, H, N, M = case.B, case.H, case.N, case.M
    if case.mask == "none":
        return None
    if case.mask == "key_padding":  # a different number of words in each row of the batch, at least one
        kept = torch.tensor([1 + (M - 1) * (b + 1) // (B + 1) for b in range(B)])
        return (torch.arange(M) < kept[:, None])[:, None, None]  # (B, 1, 1, M)
    if case.mask == "per_query":
        mask = normal(N, M) > 0
    elif case.mask == "additive":
        return normal(1, H, N, M)
    else:
        mask = normal(B, H, N, M) > -0.5
    mask[..., 0] = True
    if case.mask.startswith("masked_row"):
        mask[0, 0, N // 2] = False
        mask[-1, -1, -1] = False
    if case.mask == "masked_row_additive":
        return torch.zeros(mask.shape).masked_fill_(~mask, float("-inf"))
    return mask


# ---- group_norm_silu ----


def _group_norm_silu_inputs(
    case: GroupNormSilu, normal: Callable[..., Tensor], finish: Callable[[Tensor], Tensor]
) -> dict[str, Any]:
    batch, channels = case.shape[:2]
    if case.layout == "sliced":
        x = _group_norm_silu_data(case, normal(*case.shape[:-1], 2 * case.shape[-1]))
        x = finish(x)[..., ::2]
    else:
        x = finish(_group_norm_silu_data(case, normal(*case.shape)))
    if case.layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)

    def optional(present: bool, *shape: int, around: float = 0.0) -> Tensor | None:
        tensor = 0.5 * normal(*shape) + around
        return finish(tensor) if present else None

    weight = optional(case.affine in ("both", "weight"), channels, around=1.0)
    bias = optional(case.affine in ("both", "bias"), channels)
    if case.float32_affine:
        weight, bias = (None if t is None else t.float() for t in (weight, bias))
    return {
        "x": x,
        "num_groups": case.groups,
        "weight": weight,
        "bias": bias,
        "eps": 1e-5,
        "activation": case.activation,
        "scale": optional(case.modulation in ("both", "scale"), batch, channels),
        "shift": optional(case.modulation in ("both", "shift"), batch, channels),
    }


def _group_norm_stats_inputs(
    case: GroupNormSilu, normal: Callable[..., Tensor], finish: Callable[[Tensor], Tensor]
) -> dict[str, Any]:
    inputs = _group_norm_silu_inputs(case, normal, finish)
    return {"x": inputs["x"], "num_groups": case.groups}


def _group_norm_apply_inputs(
    case: GroupNormSilu, normal: Callable[..., Tensor], finish: Callable[[Tensor], Tensor]
) -> dict[str, Any]:
    """The statistics are those of an image three times as large as x, with another mean."""
    inputs = _group_norm_silu_inputs(case, normal, finish)
    x = inputs.pop("x")
    groups = x.double().reshape(x.shape[0], case.groups, -1) if x.numel() else x.new_zeros(x.shape[0], case.groups, 1)
    count, mean = torch.full_like(groups[..., 0], groups.shape[-1]), groups.mean(-1)
    squares = (groups - mean[..., None]).square().sum(-1)
    stats = torch.stack([3 * count, mean + 0.1 * (squares / count).sqrt(), 3 * squares], dim=-1).double()
    return {"x": x, "stats": stats, **inputs}


def _group_norm_silu_data(case: GroupNormSilu, x: Tensor) -> Tensor:
    if case.data == "offset":
        return x + 1e3
    if case.data == "large":
        return x.clamp(-4, 4) * 1.5e4
    return torch.full_like(x, 0.7) if case.data == "constant" else x


# ---- nearest_codebook ----


def _nearest_codebook_inputs(
    case: NearestCodebook, normal: Callable[..., Tensor], finish: Callable[[Tensor], Tensor]
) -> dict[str, Any]:
    codebook = _nearest_codebook_data(case, normal(case.K, case.d))
    if case.data == "duplicates":  # each code stands in several places
        codebook = codebook[torch.arange(case.K) % max(1, case.K // 4)]
    if case.data == "kmeans":
        codebook = _kmeans(normal(4 * case.K, case.d), codebook)
    z = _nearest_codebook_data(case, normal(case.N, case.d))
    if case.data == "trained":
        z = codebook[torch.arange(case.N) * 7 % case.K] + 0.1 * z
    z, codebook = finish(z), finish(codebook)
    if case.map is not None:
        z = z.reshape(*case.map, case.d).permute(0, 3, 1, 2)  # (B, d, H, W)
        z = z.contiguous(
            memory_format=torch.channels_last if case.layout == "channels_last" else torch.contiguous_format
        )
    elif case.layout == "columns":
        z, codebook = (t.T.contiguous().T for t in (z, codebook))
    elif case.layout == "wide":
        z, codebook = (torch.cat([t, t + 1], dim=1)[:, : case.d] for t in (z, codebook))
    return {"z": z, "codebook": codebook}


def _kmeans(samples: Tensor, codebook: Tensor, rounds: int = 6) -> Tensor:
    """Return a codebook that follows its data, as trained ones do: codes are the means of the samples next to them."""
    for _ in range(rounds):
        _, counts, sums = nearest_codebook_stats(samples, codebook)
        codebook = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], codebook)
    return codebook


def _nearest_codebook_data(case: NearestCodebook, x: Tensor) -> Tensor:
    if case.data == "lattice":  # small integers: distances are exact, and many are equal
        return (2 * x).round().clamp(-4, 4)
    if case.data == "offset":
        return x + 1e4
    return x * {"huge": 1e15, "denormal": 1e-40}.get(case.data, 1.0)


def wrong_codes(z: Tensor, codebook: Tensor, indices: Tensor) -> Tensor:
    """Return which rows of z (N, d), finite, got an index that the documented float32 distance does not allow: (N,).

    Judged in float64. The float32 value of ½‖e‖² - ⟨z, e⟩ is off by at most u · (d + 1) · (½‖e‖² + Σ|z_i e_i|) with
    u = 2^-24 (and by d + 1 roundings among the denormals), so a code may exceed the smallest value by its own bound and
    that of the winner, no more. Only the first of equal codes is right.
    """
    z, codebook = z.detach().double(), codebook.detach().double()
    codes = codebook.shape[0]
    half_norms = codebook.square().sum(-1) / 2
    first = _first_of_equals(codebook)
    wrong = first[indices] != indices
    rows = max(1, (1 << 22) // codes)
    for start in range(0, z.shape[0], rows):
        part = slice(start, start + rows)
        distances = half_norms - z[part] @ codebook.T  # (rows, K)
        least, winner = distances.min(-1)
        excess = distances.gather(1, indices[part, None])[:, 0] - least
        wrong[part] |= excess > _rounding(z[part], codebook[winner]) + _rounding(z[part], codebook[indices[part]])
    return wrong


def _first_of_equals(codebook: Tensor) -> Tensor:
    """Return, for each code, the lowest index of a code equal to it: (K,)."""
    numbers = torch.arange(codebook.shape[0], device=codebook.device)
    kind = torch.unique(codebook, dim=0, return_inverse=True)[1]
    return torch.full_like(numbers, codebook.shape[0]).scatter_reduce_(0, kind, numbers, "amin")[kind]


def _rounding(z: Tensor, code: Tensor) -> Tensor:
    magnitude = code.square().sum(-1) / 2 + (z * code).abs().sum(-1)
    return (z.shape[1] + 1) * (2.0**-24 * magnitude + 2.0**-149)


_MAKERS: dict[str, Callable[..., dict[str, Any]]] = {
    "attention": _attention_inputs,
    "group_norm_silu": _group_norm_silu_inputs,
    "group_norm_stats": _group_norm_stats_inputs,
    "group_norm_apply": _group_norm_apply_inputs,
    "nearest_codebook": _nearest_codebook_inputs,
    "nearest_codebook_stats": _nearest_codebook_inputs,
}


# ---- costs ----


def bytes_moved(op: str, case: Case, dtype: torch.dtype = torch.float32) -> int:
    """Return the bytes the forward pass cannot avoid moving: every input is read once, every output written once.

    group_norm_silu reads a group larger than GROUP_ON_CHIP twice, for the statistics and to normalise it.
    """
    size = dtype.itemsize
    if isinstance(case, Attention):
        return 2 * case.B * case.H * (case.N + case.M) * case.D * size
    if isinstance(case, GroupNormSilu):
        whole = math.prod(case.shape) * size
        passes = {"group_norm_stats": 1, "group_norm_apply": 2}
        in_cache = whole <= GROUP_ON_CHIP * case.shape[0] * case.groups
        return whole * passes.get(op, 2 if in_cache else 3)
    statistics = case.K * (8 + 4 * case.d) if op == "nearest_codebook_stats" else 0
    return (case.N + case.K) * case.d * size + case.N * 8 + statistics


def flops(op: str, case: Case) -> int:
    """Return the floating-point operations of the forward pass: those of the products.

    group_norm_silu has a nominal 8 for each number: 3 for the statistics, 2 for the affine map and 3 for the SiLU,
    whose exponential counts as one.
    """
    if isinstance(case, Attention):
        return 4 * case.B * case.H * case.N * case.M * case.D
    if isinstance(case, GroupNormSilu):
        return {"group_norm_silu": 8, "group_norm_stats": 3, "group_norm_apply": 5}[op] * math.prod(case.shape)
    return 2 * case.N * case.K * case.d
