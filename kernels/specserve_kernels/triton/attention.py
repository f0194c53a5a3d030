"""Plan and launches of the Triton attention; the kernels are in `attention_kernels`.

The plan cuts segments into tiles of rows and their contexts into splits of a fixed length, so the
order of every sum is fixed. Segments with tiles of the same size share a launch; all layers share
the plan.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import triton
from torch import Tensor

from specserve_kernels.ops import Plan
from specserve_kernels.segments import Segments
from specserve_kernels.triton.attention_kernels import attend_split, merge_splits

MAX_BLOCK_M = 64  # rows of a tile, unless one KV head has more query heads
MERGE_LANES = 16  # rows per program of the merge kernel
# Context slots per split, by the rows of its tile. The partial result that a split writes grows
# with the rows, so larger tiles have longer splits.
SPLIT_OF_BLOCK_M = {16: 256, 32: 512}
LONGEST_SPLIT = 1024  # for all larger tiles


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch: the segments whose tiles have `block_m` rows."""

    block_m: int
    split: int
    tree_n: int  # columns for the tree nodes, enough for every segment
    work: Tensor  # [num_work, 4] int32: segment, first row, split, partial or -1
    merges: Tensor  # [num_merges, 4] int32: segment, first row, first partial, splits
    num_partials: int


@dataclass(frozen=True, slots=True)
class DevicePlan:
    launches: tuple[Launch, ...]
    segments: Tensor  # [num_segments, 4] int32: first row, rows, context length, first node
    tables: Tensor  # [num_segments, max_blocks] int32
    words: Tensor  # [num_rows] int64 ancestor words


class AttentionPlan:
    """Built on the host once per forward pass, copied to each device at its first use."""

    def __init__(self, segments: Segments, num_kv_heads: int, group_size: int) -> None:
        self.num_kv_heads = num_kv_heads
        self.group_size = group_size
        self.block_size = segments.block_size
        self.num_used_rows = int(segments.cu_rows[-1])
        num_rows = np.diff(segments.cu_rows)
        self._segments = np.stack(
            [segments.cu_rows[:-1], num_rows, segments.context_lens, segments.first_nodes], axis=1
        ).astype(np.int32)
        self._tables = segments.block_tables.astype(np.int32)
        self._words = segments.ancestors.view(np.int64)
        smallest = max(16, _power_of_2(group_size))
        wanted = [_power_of_2(rows * group_size) for rows in num_rows.tolist()]
        self._block_m = np.clip(wanted, smallest, max(MAX_BLOCK_M, smallest)).astype(np.int64)
        self._on_device: dict[torch.device, DevicePlan] = {}

    def on(self, device: torch.device) -> DevicePlan:
        if device not in self._on_device:
            launches = tuple(self._launch(m, device) for m in np.unique(self._block_m).tolist())
            self._on_device[device] = DevicePlan(
                launches,
                _copy(self._segments, device),
                _copy(self._tables, device),
                _copy(self._words, device),
            )
        return self._on_device[device]

    def _launch(self, block_m: int, device: torch.device) -> Launch:
        split = SPLIT_OF_BLOCK_M.get(block_m, LONGEST_SPLIT)
        members = np.flatnonzero(self._block_m == block_m)
        _, num_rows, context, first_nodes = self._segments[members].T
        work: list[tuple[int, int, int, int]] = []
        merges: list[tuple[int, int, int, int]] = []
        num_partials = 0
        for segment, rows, length in zip(
            members.tolist(), num_rows.tolist(), context.tolist(), strict=True
        ):
            num_splits = max(1, -(-length // split))
            for first_row in range(0, rows, block_m // self.group_size):
                if num_splits == 1:
                    work.append((segment, first_row, 0, -1))
                    continue
                merges.append((segment, first_row, num_partials, num_splits))
                work += [(segment, first_row, s, num_partials + s) for s in range(num_splits)]
                num_partials += num_splits
        return Launch(
            block_m,
            split,
            max(16, _power_of_2(int((first_nodes + num_rows).max()))),
            _copy(np.array(work, np.int32), device),
            _copy(np.array(merges, np.int32).reshape(-1, 4), device),
            num_partials,
        )


def paged_tree_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    plan: Plan,
    *,
    scale: float,
    window: int = 0,
) -> Tensor:
    """[num_rows, num_heads, head_dim] in q's dtype; see `Kernels.paged_tree_attention`."""
    assert isinstance(plan, AttentionPlan), "a plan belongs to the backend that made it"
    if q.stride()[1:] != (q.shape[2], 1):
        q = q.contiguous()
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if plan.num_used_rows < q.shape[0]:
        out[plan.num_used_rows :].zero_()
    device_plan = plan.on(q.device)
    for launch in device_plan.launches:
        _run(launch, plan, device_plan, q, k_cache, v_cache, out, scale, window)
    return out


def _run(
    launch: Launch,
    plan: AttentionPlan,
    on_device: DevicePlan,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    out: Tensor,
    scale: float,
    window: int,
) -> None:
    """Compute the rows of one launch's segments into `out`."""
    head_dim, heads = q.shape[2], plan.num_kv_heads
    shape = _shape(plan, head_dim, launch.block_m)
    partials = launch.num_partials * heads * launch.block_m
    partial_out = torch.empty(partials * head_dim, dtype=torch.float32, device=q.device)
    partial_stats = torch.empty(partials * 2, dtype=torch.float32, device=q.device)
    wide = k_cache.dtype.itemsize * shape["DIM"] > 256  # a K tile of 64 rows exceeds 16 KB
    attend_split[(launch.work.shape[0], heads)](
        q,
        k_cache,
        v_cache,
        out,
        partial_out,
        partial_stats,
        launch.work,
        on_device.segments,
        on_device.words,
        on_device.tables,
        q.stride(0),
        on_device.tables.stride(0),
        scale * math.log2(math.e),
        window,
        **shape,
        BLOCK_SIZE=plan.block_size,
        BLOCK_N=32 if wide else 64,
        TREE_N=launch.tree_n,
        SPLIT=launch.split,
        WINDOWED=window > 0,
        num_warps=8 if launch.block_m > MAX_BLOCK_M else 4,
        num_stages=2 if wide else 3,
        enable_fp_fusion=True,
    )
    if launch.num_partials:
        grid = (launch.merges.shape[0], heads, triton.cdiv(launch.block_m, MERGE_LANES))
        merge_splits[grid](
            partial_out,
            partial_stats,
            out,
            launch.merges,
            on_device.segments,
            **shape,
            LANES=MERGE_LANES,
            enable_fp_fusion=True,
        )


def _shape(plan: AttentionPlan, head_dim: int, block_m: int) -> dict[str, int]:
    """The constants that both kernels take."""
    return {
        "NUM_KV_HEADS": plan.num_kv_heads,
        "GROUP": plan.group_size,
        "HEAD_DIM": head_dim,
        "DIM": max(16, _power_of_2(head_dim)),
        "BLOCK_M": block_m,
    }


def _power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _copy(array: npt.NDArray[np.int32] | npt.NDArray[np.int64], device: torch.device) -> Tensor:
    """Copy to the device; to CUDA asynchronously, from pinned memory."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
