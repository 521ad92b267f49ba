"""A network over an image in overlapping tiles, blended where they meet: the memory of one tile, whatever the size.

Each tile is computed as if there were nothing around it, so the result differs from that of the whole image. Blending
hides the seams. The grid and the linear blend are diffusers'.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def in_tiles(function: Callable[[Tensor], Tensor], x: Tensor, size: int, out_size: int, overlap: float) -> Tensor:
    """Apply `function` to x (B, C, H, W) in tiles of `size`, one every `size` · (1 - `overlap`) pixels.

    out_size: the side of what `function` makes of a whole tile. ValueError if the tiles would not advance.
    """
    stride = int(size * (1 - overlap))
    blend = int(out_size * overlap)
    kept = out_size - blend  # of each tile; the rest lies under the next one
    if stride < 1 or kept < 1:
        raise ValueError(
            f"tiling: tiles of {size} (output {out_size}) that overlap by {overlap} of their size do not advance; "
            "larger tiles or a smaller overlap are needed"
        )
    rows: list[Tensor] = []
    above: list[Tensor] = []
    for top in range(0, x.shape[2], stride):
        row: list[Tensor] = []
        for column, left in enumerate(range(0, x.shape[3], stride)):
            tile = function(x[:, :, top : top + size, left : left + size])
            if above:
                tile = _blend(above[column], tile, blend, dim=2)
            if row:
                tile = _blend(row[-1], tile, blend, dim=3)
            row.append(tile)
        rows.append(torch.cat([tile[:, :, :kept, :kept] for tile in row], dim=3))
        above = row
    return torch.cat(rows, dim=2)


def _blend(before: Tensor, tile: Tensor, extent: int, dim: int) -> Tensor:
    """Return `tile`, its first `extent` rows (dim 2) or columns (dim 3) faded in over the last ones of `before`."""
    extent = min(before.shape[dim], tile.shape[dim], extent)
    weight = torch.arange(extent, device=tile.device, dtype=tile.dtype) / max(extent, 1)
    weight = weight[:, None] if dim == 2 else weight
    old = before.narrow(dim, before.shape[dim] - extent, extent)
    seam = old * (1 - weight) + tile.narrow(dim, 0, extent) * weight
    return torch.cat([seam, tile.narrow(dim, extent, tile.shape[dim] - extent)], dim)
