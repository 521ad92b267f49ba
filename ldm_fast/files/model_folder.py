"""The weights of one model in a folder, as diffusers names them: one file or several, perhaps of a variant."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ldm_fast.files.atomic import replacing, write_atomically
from ldm_fast.files.tensors import write_tensors

WEIGHTS = "diffusion_pytorch_model"  # diffusers' name of the file
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def weight_files(kind: str, variant: str | None) -> tuple[str, str]:
    """Return the names of the file and of the index of shards; `kind` is "safetensors" or "bin"."""
    middle = f".{variant}" if variant else ""
    return f"{WEIGHTS}{middle}.{kind}", f"{WEIGHTS}.{kind}.index{middle}.json"


def write_weights(
    folder: Path, tensors: Mapping[str, Tensor], kind: str, variant: str | None, max_shard_size: int | str
) -> set[str]:
    """Write the weights, each file whole or not at all, and return the names of the files.

    While shards are replaced there is no index, so an interrupted write leaves nothing that would be read as a model.
    """
    name, index = weight_files(kind, variant)
    shards = split(tensors, max_shard_size)
    if len(shards) == 1:
        _write(folder / name, tensors)
        return {name}
    count, total = len(shards), sum(tensor.nbytes for tensor in tensors.values())
    names = [name.replace(f".{kind}", f"-{i:05d}-of-{count:05d}.{kind}") for i in range(1, count + 1)]
    (folder / index).unlink(missing_ok=True)
    for file, shard in zip(names, shards, strict=True):
        _write(folder / file, shard)
    where = {key: file for file, shard in zip(names, shards, strict=True) for key in shard}
    content = json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2, sort_keys=True)
    write_atomically(folder / index, f"{content}\n".encode())
    return {*names, index}


def remove_weights(folder: Path, kind: str, variant: str | None, keep: set[str]) -> None:
    """Remove the weights of a model saved here before, which could be read instead of those in `keep`."""
    name, index = weight_files(kind, variant)
    shard = re.compile(re.escape(name.removesuffix(f".{kind}")) + r"-\d{5}-of-\d{5}\." + kind)
    for path in list(folder.iterdir()):
        if path.name not in keep and (path.name in (name, index) or shard.fullmatch(path.name)):
            path.unlink(missing_ok=True)


def split(tensors: Mapping[str, Tensor], max_size: int | str) -> list[dict[str, Tensor]]:
    """Split tensors, in their order, into parts of at most `max_size` bytes; a larger tensor is a part by itself.

    max_size: a number of bytes, or a string such as "5GB". ValueError for anything else.
    """
    most = _bytes(max_size)
    large = [{name: tensor} for name, tensor in tensors.items() if tensor.nbytes > most]
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if tensor.nbytes > most:
            continue
        if size + tensor.nbytes > most:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return [shard for shard in shards if shard] + large


def _bytes(size: int | str) -> int:
    number = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]b)\s*", size, re.IGNORECASE) if isinstance(size, str) else None
    if number is not None:
        size = int(float(number[1]) * UNITS[number[2].upper()])
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"max_shard_size must be a number of bytes or a string such as '5GB', got {size!r}")
    return size


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    if path.suffix == ".safetensors":
        write_tensors(path, tensors, {"format": "pt"})
        return
    plain = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    own = {name: t.clone() if t.untyped_storage().nbytes() > t.nbytes else t for name, t in plain.items()}
    with replacing(path) as unfinished:
        torch.save(own, unfinished)
