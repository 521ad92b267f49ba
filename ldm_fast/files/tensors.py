"""Files of tensors, read by memory map and without running anything that is in them.

A file is what its first bytes say, whatever its name: safetensors, or PyTorch's pickles, which go through
`torch.load(weights_only=True)`. That refuses everything but tensors and plain values. The published checkpoints also
hold what their trainer left behind (callbacks, configuration objects, NumPy numbers): classes on the list below are
replaced by one that takes any argument and does nothing, so that neither their code nor their package is needed.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm_fast.files.atomic import reason, replacing


class CheckpointError(ValueError):
    """A checkpoint cannot be written or read, or is not what it should be; the message names it and says why."""


HARMLESS_PACKAGES = ("pytorch_lightning", "lightning", "lightning_fabric", "omegaconf", "argparse")
HARMLESS = (
    "numpy.dtype",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    "numpy.ndarray",
    "collections.defaultdict",
    "typing.Any",
    *(f"{module}.{name}" for module in ("builtins", "__builtin__") for name in ("dict", "list", "int", "float", "str")),
)
OTHER_FILES = {
    b"version https://git-lfs": "it is a pointer of Git LFS, not the file itself (git lfs pull)",
    b"<": "it is a web page",
}


@dataclass
class TensorFile:
    """tensors: those of the state dict, on the CPU; a page of one is read from the disk when it is first looked at.
    metadata: safetensors' header. others: what stands beside the state dict in a pickle (epoch, optimizer_states, …).
    """

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    others: dict[str, Any] = field(default_factory=dict)


def read_tensors(path: str | Path) -> TensorFile:
    """The tensors of a .safetensors file or of a PyTorch pickle (.ckpt, .pt, .pth, .bin).

    The file has to stay as it is while its tensors are in use; writing to them does not change it.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is empty, cut short, not a checkpoint, or refused since it could run code.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        with open(path, "rb") as file:
            start = file.read(64)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {reason(error)}") from error
    if start[4:9] == b"\0\0\0\0{":  # eight bytes that are the header's length, of which any may be the first, and JSON
        return _read_safetensors(path)
    if start.startswith((b"PK\x03\x04", b"\x80")):
        if path.suffix == ".safetensors":
            raise CheckpointError(f"{path} is not what its name says but a pickle of PyTorch; call it .ckpt to load it")
        return _read_pickle(path, zipped=start.startswith(b"PK"))
    what = "its first bytes are those of neither safetensors nor a pickle" if start else "it is empty"
    for mark, other in OTHER_FILES.items():
        what = other if start.startswith(mark) else what
    raise CheckpointError(f"{path} is not a whole safetensors file or PyTorch checkpoint: {what}")


def _read_safetensors(path: Path) -> TensorFile:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            return TensorFile(path, tensors, file.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file (cut short or damaged): {error}") from error


def read_each(path: Path, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Reads these tensors of a .safetensors file into memory of their own, one at a time, in the order of their names.

    `tensors` have the shapes and dtypes; they may be on the meta device. Only what the caller keeps stays in memory,
    whereas a page of a file mapped by `read_tensors` stays once it has been looked at.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
            for name, like in sorted(tensors.items()):
                tensor = torch.empty_like(like, device="cpu")
                start, end = header[name]["data_offsets"]
                file.seek(8 + length + start)
                if file.readinto(_bytes(tensor)) != end - start:
                    raise CheckpointError(f"{path} is not a whole safetensors file: it ends within {name}")
                yield name, tensor
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {reason(error)}") from error


# Digests


def tensors_digest(tensors: Mapping[str, Tensor], start: bytes = b"") -> str:
    """SHA-256, in hexadecimal digits, of `start` and of names, dtypes, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256(start)
    for name, tensor in sorted(tensors.items()):
        add_to_digest(digest, name, tensor)
    return digest.hexdigest()


def add_to_digest(digest: hashlib._Hash, name: str, tensor: Tensor) -> None:
    """Feeds one tensor to a digest, as `tensors_digest` does."""
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(_bytes(tensor.detach().cpu().contiguous()))


def _bytes(tensor: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The bytes of a contiguous tensor on the CPU, in its own memory."""
    return tensor.reshape(-1).view(torch.uint8).numpy()


# Pickles


class _Inert:
    """In the place of an object that is none of a model's business: takes anything, does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Inert:
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _read_pickle(path: Path, zipped: bool) -> TensorFile:
    try:
        named = torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipped else []
    except pickle.UnpicklingError:  # uses what no checkpoint needs; `torch.load` says what it is
        named = []
    except Exception as error:  # of any kind: the bytes come from anywhere
        raise CheckpointError(
            f"{path} is not a whole PyTorch checkpoint (cut short or damaged): {_line(error)}"
        ) from error
    refused = sorted(name for name in named if not _is_harmless(name))
    if refused:
        raise CheckpointError(
            f"{path} is refused, and nothing in it was run: beside tensors its pickle names {', '.join(refused)}, and "
            "unpickling would call that. Get the model as .safetensors, or, if you trust its source, load it elsewhere "
            "and save its state dict alone"
        )
    try:
        with torch.serialization.safe_globals([(_Inert, name) for name in named]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:
        raise CheckpointError(
            f"{path} cannot be read as tensors and plain values alone, and nothing in it was run: {_line(error)}"
        ) from error
    return _state_dict_of(path, content)


def _is_harmless(name: str) -> bool:
    return name in HARMLESS or name.partition(".")[0] in HARMLESS_PACKAGES


def _line(error: Exception) -> str:
    """The sentence of PyTorch's long message that says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return next((line for line in lines if "GLOBAL" in line or "Unsupported" in line), lines[0])[:300]


def _state_dict_of(path: Path, content: Any) -> TensorFile:
    others: dict[str, Any] = {}
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        others = {str(key): value for key, value in content.items() if key != "state_dict"}
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"{path} holds no state dict but a {type(content).__name__}")
    wrong = [str(key) for key, value in content.items() if not isinstance(key, str) or not _is_plain(value)]
    if wrong:
        raise CheckpointError(
            f"{path}: {len(wrong)} entries of its state dict are not dense tensors: {', '.join(wrong)}"
        )
    return TensorFile(path, {key: tensor.detach() for key, tensor in content.items()}, others=others)


def _is_plain(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized


# Folders in diffusers' form, and writing


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. CheckpointError if there is none, or it is something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent} holds no {path.name}") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object but a {type(content).__name__}")
    return content


def read_shards(index: Path) -> TensorFile:
    """The tensors of a model that is spread over several files; `index` says which is where."""
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or any(Path(str(name)).name != name for name in where.values()):
        raise CheckpointError(f"{index} has no weight_map of names to files beside it")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(where.values())):
        tensors |= read_tensors(index.with_name(name)).tensors
    wrong = sorted(where.keys() ^ tensors.keys())
    if wrong:
        raise CheckpointError(f"{index}: the files and their index do not hold the same names: {', '.join(wrong)}")
    return TensorFile(index, tensors)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a .safetensors file, whole or not at all. Raises OSError with the path."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        with replacing(path) as unfinished:
            unfinished.touch()
            mode = unfinished.stat().st_mode
            save_file(plain, unfinished, metadata)
            unfinished.chmod(mode)  # as that of any new file; safetensors lets only its owner read it
    except SafetensorError as error:  # what it makes of a full disk
        raise OSError(f"{path}: cannot write: {error}") from error
