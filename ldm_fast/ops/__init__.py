"""The public ops, and who computes them.

    from ldm_fast import ops
    out = ops.attention(q, k, v)

Each op has a file with its arguments, schema and gradient; `dispatch.py` holds the table of implementations, and
`reference.py` defines what is correct.
"""

from ldm_fast.ops.attention_op import attention
from ldm_fast.ops.codebook_op import nearest_codebook, nearest_codebook_stats
from ldm_fast.ops.dispatch import use_impl
from ldm_fast.ops.explain import explain
from ldm_fast.ops.group_norm_op import group_norm_apply, group_norm_silu, group_norm_stats, merge_group_norm_stats
from ldm_fast.ops.native import warn_of_other_versions

__all__ = [
    "attention",
    "explain",
    "group_norm_apply",
    "group_norm_silu",
    "group_norm_stats",
    "merge_group_norm_stats",
    "nearest_codebook",
    "nearest_codebook_stats",
    "use_impl",
]

warn_of_other_versions()
