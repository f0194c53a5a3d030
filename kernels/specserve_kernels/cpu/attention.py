"""Paged tree attention by the native kernel, which needs no plan beyond the segments."""

import ctypes
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from specserve_kernels.cpu.native import num_threads
from specserve_kernels.segments import Segments
from specserve_kernels.torch_ref.tiles import AttentionPlan

_LANES = 16
_MAX_HEAD_DIM = 256
_MAX_GROUP = 32
_ADDRESS = ctypes.c_void_p
_SIZE = ctypes.c_int64


class CSegments(ctypes.Structure):
    """The C structure, field by field as in attention.h, of `segments`, which the caller keeps."""

    _fields_ = [
        ("cu_rows", _ADDRESS),
        ("context_lens", _ADDRESS),
        ("ancestors", _ADDRESS),
        ("block_tables", _ADDRESS),
        ("num_segments", _SIZE),
        ("max_blocks", _SIZE),
        ("block_size", _SIZE),
    ]

    @classmethod
    def of(cls, segments: Segments) -> "CSegments":
        return cls(
            segments.cu_rows.ctypes.data,
            segments.context_lens.ctypes.data,
            segments.ancestors.ctypes.data,
            segments.block_tables.ctypes.data,
            *segments.block_tables.shape,
            segments.block_size,
        )


class _Shape(ctypes.Structure):
    _fields_ = [
        ("num_kv_heads", _SIZE),
        ("group_size", _SIZE),
        ("head_dim", _SIZE),
        ("scale", ctypes.c_float),
        ("window", _SIZE),
    ]


@dataclass(frozen=True)
class SegmentPlan:
    """The segments of a forward pass and the numbers of heads."""

    segments: Segments
    num_kv_heads: int
    group_size: int

    @cached_property
    def reference(self) -> AttentionPlan:
        """The plan of the torch kernel, for shapes that the native kernel does not support."""
        return AttentionPlan(self.segments, self.num_kv_heads, self.group_size)


def supports(head_dim: int, group_size: int, dtype: torch.dtype) -> bool:
    """Whether the native kernel supports K and V of this shape and dtype."""
    fits = head_dim % _LANES == 0 and head_dim <= _MAX_HEAD_DIM and group_size <= _MAX_GROUP
    return fits and dtype in (torch.float32, torch.bfloat16)


def paged_tree_attention(
    library: ctypes.CDLL,
    q: Tensor,  # [num_rows, num_heads, head_dim]
    k_cache: Tensor,  # [num_slots, num_kv_heads, head_dim], as v_cache
    v_cache: Tensor,
    plan: SegmentPlan,
    scale: float,
    window: int,
) -> Tensor:  # [num_rows, num_heads, head_dim], dtype of q
    """See `Kernels.paged_tree_attention`; `supports` must hold."""
    assert k_cache.is_contiguous(), "the cache must be contiguous"
    assert v_cache.is_contiguous(), "the cache must be contiguous"
    queries = q.float().contiguous()
    out = torch.zeros_like(queries)
    library.specserve_attention(
        ctypes.byref(CSegments.of(plan.segments)),
        ctypes.byref(_Shape(plan.num_kv_heads, plan.group_size, q.shape[2], scale, window)),
        queries.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        k_cache.dtype == torch.float32,
        out.data_ptr(),
        num_threads(),
    )
    return out.to(q.dtype)
