"""The ops by PyTorch's own kernels, under the contract of ours: log-sum-exp and gradients included.

They run if they were measured to be faster than ours on the machine at hand, or if ours are not built.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ldm_fast.ops.torch_private import amx_is_used, flash_attention_for_cpu, flash_attention_for_cpu_backward

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def attention_unsupported(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> str | None:
    """See `dispatch.Implementation`."""
    if flash_attention_for_cpu is None or flash_attention_for_cpu_backward is None:
        return f"PyTorch {torch.__version__} has no attention for CPUs that returns log-sum-exps"
    if not q.is_cpu:
        return f"runs on CPU tensors, q is on {q.device}"
    if q.dtype not in _DTYPES:
        return f"computes float32, bfloat16 and float16, q is {q.dtype}"
    return None


def attention_preferred(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> bool:
    """Whether PyTorch's attention was measured to be faster than the native kernels: bfloat16 on tile units (AMX).

    On an Intel Sapphire Rapids, two threads, ours ran at 0.19 to 0.47 × of it in self attention with 1024 and 4096
    keys, at 0.7 × with 77 keys and heads 160 wide; at 1 to 1.6 × with 77 keys and heads 40 to 80 wide.
    """
    return q.dtype is torch.bfloat16 and mask is None and (k.shape[2] > 128 or q.shape[3] > 80) and amx_is_used()


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """See `reference.attention`; the last stride of q, k and v is 1."""
    out, lse = flash_attention_for_cpu(q, k, v, attn_mask=_bias(mask, q), scale=scale)
    if mask is not None:  # of a row whose keys are all masked it has no number
        lse = lse.masked_fill(~_attends(mask).any(-1), float("-inf"))
    return out.transpose(1, 2).contiguous().transpose(1, 2), lse.contiguous()  # out is like q, and mostly so already


def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.attention_backward`; the last strides are 1."""
    if mask is not None:
        lse = lse.masked_fill(lse == float("-inf"), 0.0)
    dq, dk, dv = flash_attention_for_cpu_backward(
        grad.to(q.dtype), q, k, v, out, lse, 0.0, False, attn_mask=_bias(mask, q), scale=scale
    )
    return dq, dk, dv


def _attends(mask: Tensor) -> Tensor:
    return mask if mask.dtype is torch.bool else mask > float("-inf")


def _bias(mask: Tensor | None, q: Tensor) -> Tensor | None:
    """Return a mask (B, H, N, M) as PyTorch's kernel takes it, added to the scores; what is expanded stays so."""
    if mask is None:
        return None
    small = mask[tuple(slice(1 if stride == 0 else None) for stride in mask.stride())]
    if mask.dtype is torch.bool:
        small = torch.zeros(small.shape, dtype=q.dtype).masked_fill(~small, float("-inf"))
    return small.to(torch.float32 if small.dtype is torch.float32 else q.dtype).expand(mask.shape)
