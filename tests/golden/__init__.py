"""Outputs of the published latent-diffusion models, computed once in float32 on a CPU, and how to read them.

NAME.json holds `config` (constructor parameters of the original) and `state_dict` (key -> shape, dtype), NAME.npz the
inputs and outputs. The weights are a function of key and shape; see README.md.
"""

from __future__ import annotations

import gzip
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FOLDER = Path(__file__).parent


def config(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text())["config"]


def arrays(name: str) -> dict[str, Tensor]:
    with np.load(FOLDER / f"{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def state_dict(name: str) -> dict[str, Tensor]:
    shapes = json.loads((FOLDER / f"{name}.json").read_text())["state_dict"]
    return {key: weight(key, tuple(shape)) for key, (shape, _) in shapes.items()}


def weight(key: str, shape: tuple[int, ...]) -> Tensor:
    """Return normal numbers seeded by the key: scaled by 1/sqrt(fan in) for matrices, 0.1 for vectors; gains add 1."""
    w = np.random.Generator(np.random.PCG64(zlib.crc32(key.encode()))).standard_normal(shape, dtype=np.float32)
    if len(shape) > 1:
        w *= np.float32(int(np.prod(shape[1:])) ** -0.5)
    else:
        w *= np.float32(0.1)
        if key.endswith(("weight", ".g")):
            w += np.float32(1)
    return torch.from_numpy(w)


def zoo() -> dict[str, dict[str, Any]]:
    """Return the published configurations: constructor parameters and full-size key -> shape maps."""
    return json.loads(gzip.decompress((FOLDER / "zoo.json.gz").read_bytes()))
