"""Adapter to the CUDA kernels: tensors in, addresses, shapes, strides and a stream on to `ldm_fast._native_cuda`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

try:
    from ldm_fast import _native_cuda
except ImportError as error:
    _native_cuda, _import_error = None, error

_DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
_OLDEST = (8, 0)  # compute capability the kernels are compiled for
_CHUNK_DIM = 16  # up to this d the kernels need no workspace


def unavailable() -> str | None:
    """Why no CUDA kernel can run here, with what would change that; None if they can."""
    if _native_cuda is None:
        return f"the CUDA kernels are not built: put nvcc on PATH and install ldm_fast again ({_import_error})"
    if not torch.cuda.is_available():
        if torch.version.cuda is None:
            return f"PyTorch {torch.__version__} is built without CUDA: install a CUDA build of PyTorch"
        return "PyTorch finds no CUDA device: it takes an NVIDIA GPU and its driver"
    return None


def build_info() -> dict[str, Any]:
    """What the extension was compiled with and sees.

    `built` and, if so, `architectures` ([80, …]), `runtime` and `driver` ("13.0"; None where there is no driver).
    """
    if _native_cuda is None:
        return {"built": False, "message": str(_import_error)}
    info = _native_cuda.build_info()
    return {
        "built": True,
        "runtime": _version(info.runtime_version),
        "driver": _version(info.driver_version) if info.driver_version else None,
        "architectures": list(info.architectures),
    }


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def nearest_codebook_unsupported(z: Tensor, codebook: Tensor) -> str | None:
    """Why the kernels cannot take these inputs; None if they can."""
    if z.device.type != "cuda" or codebook.device != z.device:
        return f"it needs tensors on one CUDA device, got z on {z.device} and codebook on {codebook.device}"
    if z.dtype not in _DTYPES or codebook.dtype != z.dtype:
        return f"it needs float32, float16 or bfloat16 for both, got z {z.dtype} and codebook {codebook.dtype}"
    if codebook.shape[0] >= 2**31 or codebook.shape[1] >= 2**31 - 17:
        return f"it needs fewer than 2^31 codes of fewer than 2^31 - 17 numbers, got {tuple(codebook.shape)}"
    capability = torch.cuda.get_device_capability(z.device)
    if capability < _OLDEST:
        return f"it needs a GPU of compute capability 8.0 or newer, {z.device} has {capability[0]}.{capability[1]}"
    return None


def nearest_codebook(z: Tensor, codebook: Tensor) -> Tensor:
    """argmin over k of ½‖e_k‖² - ⟨z_n, e_k⟩ in float32, on the current stream of z's device.

    z (N, d) and codebook (K, d), any strides → int64 (N,). Equal distances: the lowest index. A NaN distance never
    wins; a row of nothing but NaN gives 0. Does not synchronise and can be captured in a CUDA graph.
    """
    (n, d), k = z.shape, codebook.shape[0]
    out = torch.empty(n, dtype=torch.int64, device=z.device)
    half_norms = torch.empty(k, dtype=torch.float32, device=z.device) if d > _CHUNK_DIM else None
    _native_cuda.nearest_codebook(
        z=z.data_ptr(),
        z_row_stride=z.stride(0),
        z_column_stride=z.stride(1),
        codebook=codebook.data_ptr(),
        codebook_row_stride=codebook.stride(0),
        codebook_column_stride=codebook.stride(1),
        out=out.data_ptr(),
        half_norms=0 if half_norms is None else half_norms.data_ptr(),
        n=n,
        k=k,
        d=d,
        dtype=_DTYPES[z.dtype],
        device=z.device.index,
        stream=torch.cuda.current_stream(z.device).cuda_stream,
    )
    return out
