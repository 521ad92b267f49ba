"""Files of tensors, mapped into memory and read without running anything that is in them.

The first bytes of a file decide what it is, not its name: safetensors, or a pickle of PyTorch. Pickles go through
`torch.load(weights_only=True)`, which refuses everything but tensors and plain values. Published checkpoints also hold
what their trainer left behind (callbacks, configuration objects, NumPy numbers). The classes of these, listed below,
are replaced by one that takes any argument and does nothing, so neither their code nor their package is needed.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ldm_fast.files.atomic import reason, replacing
from ldm_fast.files.file_names import readable_by_others


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or read, or is not what it should be. The message names it and says why."""


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
CONTAINERS = ("state_dict", "model_state_dict", "model", "module")  # keys under which trainers store a state dict
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}  # in the names of weights
CONTAINERS_OFF, WRAPPERS_OFF = "containers around the weights, taken off", "prefixes of wrappers, taken off the names"
OTHER_FILES = {
    b"version https://git-lfs": "it is a pointer of Git LFS, not the file itself (git lfs pull)",
    b"<": "it is a web page",
}


@dataclass
class TensorFile:
    """What a file of tensors holds.

    tensors: the state dict, on the CPU. A page of a tensor is read from the disk when it is first looked at.
    metadata: the strings in the header of a safetensors file.
    others: what stands beside the state dict in a pickle (epoch, optimizer_states, …).
    wrappers: what was taken off: the names of containers around the state dict, and of wrappers within its names.
    """

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    others: dict[str, Any] = field(default_factory=dict)
    wrappers: dict[str, list[str]] = field(default_factory=dict)


def read_tensors(path: str | Path) -> TensorFile:
    """Map the tensors of a .safetensors file or of a PyTorch pickle (.ckpt, .pt, .pth, .bin).

    The file has to stay as it is while its tensors are in use. Writing to them does not change it.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is empty, cut short, not a checkpoint, or refused because it could run code.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {reason(error)}") from error
    if start[4:9] == b"\0\0\0\0{":  # the header's length in eight bytes, the first of which may be any, and JSON
        return _read_safetensors(path)
    if start.startswith((b"PK\x03\x04", b"\x80")):
        if path.suffix == ".safetensors":
            raise CheckpointError(f"{path} is not what its name says but a pickle of PyTorch; name it .ckpt to load it")
        return _read_pickle(path, zipped=start.startswith(b"PK"))
    unknown = "its first bytes are those of neither safetensors nor a pickle" if start else "it is empty"
    what = next((other for mark, other in OTHER_FILES.items() if start.startswith(mark)), unknown)
    raise CheckpointError(f"{path} is not a whole safetensors file or PyTorch checkpoint: {what}")


def _read_safetensors(path: Path) -> TensorFile:
    try:
        with readable_by_others(path) as name, safe_open(name, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            return _unwrapped(TensorFile(path, tensors, file.metadata() or {}))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file (cut short or damaged): {error}") from error


def read_each(path: Path, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Read these tensors of a .safetensors file into memory of their own, one at a time, in the order of their names.

    `tensors` give the shapes and dtypes, and may be on the meta device. Only what the caller keeps stays in memory; the
    pages that `read_tensors` maps all stay once they have been looked at.
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


LABEL = "{name} {dtype} {shape}"


def tensors_digest(tensors: Mapping[str, Tensor], start: bytes = b"", label: str = LABEL) -> str:
    """Return the SHA-256, as hexadecimal digits, of `start` and of the tensors in the order of their names.

    label: what is hashed before the bytes of each tensor. Files hold digests with several labels, so none may change.
    """
    digest = hashlib.sha256(start)
    for name, tensor in sorted(tensors.items()):
        add_to_digest(digest, name, tensor, label)
    return digest.hexdigest()


def add_to_digest(digest: hashlib._Hash, name: str, tensor: Tensor, label: str = LABEL) -> None:
    """Feed one tensor to a digest, as `tensors_digest` does."""
    digest.update(label.format(name=name, dtype=tensor.dtype, shape=tuple(tensor.shape)).encode())
    digest.update(_bytes(tensor.detach().cpu().contiguous()))


def _bytes(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor on the CPU."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


# Pickles


class _Inert:
    """Stands for an object that has nothing to do with the model: takes anything, does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Inert:
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _read_pickle(path: Path, zipped: bool) -> TensorFile:
    with readable_by_others(path) as name:
        return _state_dict_of(path, _unpickled(path, name, zipped))


def _unpickled(path: Path, name: str | Path, zipped: bool) -> Any:
    """Return what a pickle holds, read by `name`. Errors call it `path`."""
    try:
        named = torch.serialization.get_unsafe_globals_in_checkpoint(name) if zipped else []
    except pickle.UnpicklingError:  # it uses what no checkpoint needs; `torch.load` says what
        named = []
    except Exception as error:  # of any kind: the bytes may be anything
        raise CheckpointError(
            f"{path} is not a whole PyTorch checkpoint (cut short or damaged): {_line(error)}"
        ) from error
    refused = sorted(name for name in named if not _is_harmless(name))
    if refused:
        raise CheckpointError(
            f"{path} is refused, and nothing in it was run: beside tensors its pickle names {', '.join(refused)}, and "
            "unpickling would call that. Get the model as .safetensors; or, if you trust its source, load it elsewhere "
            "and save its state dict alone"
        )
    try:
        with torch.serialization.safe_globals([(_Inert, name) for name in named]):
            return torch.load(name, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:
        raise CheckpointError(
            f"{path} cannot be read as tensors and plain values alone; nothing in it was run: {_line(error)}"
        ) from error


def _is_harmless(name: str) -> bool:
    return name in HARMLESS or name.partition(".")[0] in HARMLESS_PACKAGES


def _line(error: Exception) -> str:
    """Return the line of PyTorch's long message that says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return next((line for line in lines if "GLOBAL" in line or "Unsupported" in line), lines[0])[:300]


def _state_dict_of(path: Path, content: Any) -> TensorFile:
    others: dict[str, Any] = {}
    containers: list[str] = []
    while isinstance(content, Mapping) and (inner := _container(content)) is not None:
        others |= {str(key): value for key, value in content.items() if key != inner}
        containers.append(inner)
        content = content[inner]
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"{path} holds no state dict but a {type(content).__name__}")
    wrong = [str(key) for key, value in content.items() if not isinstance(key, str) or not _is_plain(value)]
    if wrong:
        raise CheckpointError(
            f"{path}: {len(wrong)} entries of its state dict are not dense tensors: {', '.join(wrong)}"
        )
    file = _unwrapped(TensorFile(path, {key: tensor.detach() for key, tensor in content.items()}, others=others))
    unusual = [name for name in containers if name != "state_dict"]
    return replace(file, wrappers={**({CONTAINERS_OFF: unusual} if unusual else {}), **file.wrappers})


def _container(content: Mapping[Any, Any]) -> str | None:
    """Return the key under which a dictionary holds a state dict, or a container of one."""
    return next((key for key in CONTAINERS if isinstance(content.get(key), Mapping)), None)


def _unwrapped(file: TensorFile) -> TensorFile:
    """Return the tensors under the names that they had before torch.compile, DistributedDataParallel and the like."""
    found = sorted({part for name in file.tensors for part in name.split(".")[:-1]} & WRAPPERS)
    if not found:
        return file
    names = {name: unwrapped_name(name) for name in file.tensors}
    twice = sorted(name for name, plain in names.items() if name != plain and plain in file.tensors)
    if twice or len(set(names.values())) < len(names):
        raise CheckpointError(f"{file.path} holds weights with and without the prefix of a wrapper: {', '.join(twice)}")
    tensors = {names[name]: tensor for name, tensor in file.tensors.items()}
    return replace(file, tensors=tensors, wrappers={WRAPPERS_OFF: [f"{part}." for part in found]})


def unwrapped_name(name: str) -> str:
    """Return the name of a weight without those of the wrappers around its modules."""
    *modules, last = name.split(".")
    return ".".join([*(part for part in modules if part not in WRAPPERS), last])


def _is_plain(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized


# Folders as diffusers writes them, and writing


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file. CheckpointError if there is no such file, or something else in it."""
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
    """Map the tensors of a model that is spread over several files. `index` says which tensor is in which."""
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or any(Path(str(name)).name != name for name in where.values()):
        raise CheckpointError(f"{index} has no weight_map of names to files beside it")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(where.values())):
        tensors |= read_tensors(index.with_name(name)).tensors
    wrong = sorted({unwrapped_name(name) for name in where} ^ tensors.keys())
    if wrong:
        raise CheckpointError(f"{index}: the files and their index do not hold the same names: {', '.join(wrong)}")
    return TensorFile(index, tensors)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a .safetensors file, whole or not at all. Raises OSError with the path."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        with replacing(path) as unfinished:
            unfinished.touch()
            mode = unfinished.stat().st_mode
            save_file(plain, unfinished, metadata)
            unfinished.chmod(mode)  # as that of any new file; safetensors lets only its owner read it
    except SafetensorError as error:  # what safetensors makes of a full disk
        raise OSError(f"{path}: cannot write: {error}") from error
