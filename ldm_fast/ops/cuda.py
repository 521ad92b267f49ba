"""The ops by the CUDA kernels: tensors become addresses, shapes, strides and a stream for `ldm_fast._native_cuda`."""

from __future__ import annotations

import torch
from torch import Tensor

from ldm_fast.ops.native import load_module

_native_cuda, _missing = load_module("_native_cuda")
_DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
_OLDEST = (8, 0)  # compute capability the kernels are compiled for
_MOST_CODES, _MOST_NUMBERS = 2**31 - 1, 2**31 - 33  # of a codebook, and in a vector
_MOST_COUNTED = 2**32 - 1  # vectors that nearest_codebook_stats can count


def unavailable() -> str | None:
    """Return why no CUDA kernel can run here, and what would change that; None if they can."""
    if _native_cuda is None:
        return _missing
    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} is built without CUDA: install a CUDA build of PyTorch"
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device: an NVIDIA GPU and its driver are needed"
    info = _native_cuda.build_info()
    if info.driver_version // 1000 < info.runtime_version // 1000:
        built, driver = _version(info.runtime_version), _version(info.driver_version)
        return (
            f"the CUDA kernels are built with CUDA {built}, and the driver runs at most {driver}: update the driver, "
            "or put an older nvcc on PATH and install ldm_fast again"
        )
    return None


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def nearest_codebook_unsupported(z: Tensor, codebook: Tensor) -> str | None:
    """Return why the kernels cannot take these inputs, z (B, S, d) and codebook (K, d); None if they can."""
    if z.device.type != "cuda" or codebook.device != z.device:
        return f"it needs tensors on one CUDA device, got z on {z.device} and codebook on {codebook.device}"
    if z.dtype not in _DTYPES or codebook.dtype != z.dtype:
        return f"it needs float32, float16 or bfloat16 for both, got z {z.dtype} and codebook {codebook.dtype}"
    if codebook.shape[0] > _MOST_CODES or codebook.shape[1] > _MOST_NUMBERS:
        return f"it needs at most 2^31 - 1 codes of at most 2^31 - 33 numbers, got {tuple(codebook.shape)}"
    capability = torch.cuda.get_device_capability(z.device)
    if capability < _OLDEST:
        return f"it needs a GPU of compute capability 8.0 or newer, {z.device} has {capability[0]}.{capability[1]}"
    return None


def nearest_codebook(z: Tensor, codebook: Tensor) -> Tensor:
    """See `ops.nearest_codebook`: z (B, S, d) → (B, S), on the current stream of z's device.

    Does not synchronise and can be captured in a CUDA graph.
    """
    index = torch.empty(z.shape[:2], dtype=torch.int64, device=z.device)
    _search_codebook(z, codebook, index, None, None)
    return index


def nearest_codebook_stats_unsupported(z: Tensor, codebook: Tensor) -> str | None:
    """See `nearest_codebook_unsupported`."""
    if z.shape[0] * z.shape[1] > _MOST_COUNTED:
        return f"it needs at most 2^32 - 1 vectors, got {z.shape[0] * z.shape[1]}"
    return nearest_codebook_unsupported(z, codebook)


def nearest_codebook_stats(z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See `ops.nearest_codebook_stats`. Does not synchronise and can be captured in a CUDA graph.

    The sums are added up in float64 in an order that depends on the indices alone: the same bits on every run.
    """
    index = torch.empty(z.shape[:2], dtype=torch.int64, device=z.device)
    counts = torch.empty(codebook.shape[0], dtype=torch.int64, device=z.device)
    sums = torch.empty(codebook.shape, dtype=torch.float32, device=z.device)
    _search_codebook(z, codebook, index, counts, sums)
    return index, counts, sums


def _search_codebook(z: Tensor, codebook: Tensor, index: Tensor, counts: Tensor | None, sums: Tensor | None) -> None:
    device = z.device.index
    size = _native_cuda.nearest_codebook_workspace(
        n=index.numel(), k=codebook.shape[0], d=codebook.shape[1], stats=counts is not None, device=device
    )
    # Freed when this returns, but safe: the allocator gives it to nobody but this stream.
    workspace = torch.empty(size, dtype=torch.uint8, device=z.device)
    _native_cuda.nearest_codebook(
        z=z.data_ptr(),
        z_shape=z.shape,
        z_strides=z.stride(),
        codebook=codebook.data_ptr(),
        k=codebook.shape[0],
        codebook_strides=codebook.stride(),
        out=index.data_ptr(),
        counts=0 if counts is None else counts.data_ptr(),
        sums=0 if sums is None else sums.data_ptr(),
        workspace=workspace.data_ptr(),
        dtype=_DTYPES[z.dtype],
        device=device,
        stream=torch.cuda.current_stream(z.device).cuda_stream,
    )
