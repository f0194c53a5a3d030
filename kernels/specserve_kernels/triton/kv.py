"""KV writes and commits on CUDA, one launch each for any number of rows, moves and layers."""

import triton
import triton.language as tl
from torch import Tensor

from specserve_kernels.triton.compile import kernel

MOVES_AT_ONCE = 16


def kv_write(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """In place: write row i of k and v to slots[i] of the caches; see `Kernels.kv_write`."""
    num_rows, num_heads, head_dim = k.shape
    row_stride = (head_dim, 1)
    k = k if k.stride()[1:] == row_stride else k.contiguous()
    v = v if v.stride()[1:] == row_stride else v.contiguous()
    size = num_heads * head_dim
    if num_rows:
        block = triton.next_power_of_2(size)
        write_row[(num_rows,)](
            k,
            v,
            k_cache,
            v_cache,
            slots,
            k.stride(0),
            v.stride(0),
            SIZE=size,
            BLOCK=block,
            enable_fp_fusion=False,
        )


def kv_commit(kv: Tensor, src: Tensor, dst: Tensor) -> None:
    """In place: move slots src[i] -> dst[i] in every layer; see `Kernels.kv_commit`."""
    num_layers, two, num_slots, num_heads, head_dim = kv.shape
    if len(src):
        move_rows[(num_layers * two, num_heads)](
            kv,
            src,
            dst,
            len(src),
            num_slots,
            NUM_HEADS=num_heads,
            HEAD_DIM=head_dim,
            DIM=triton.next_power_of_2(head_dim),
            MOVES=MOVES_AT_ONCE,
            enable_fp_fusion=False,
        )


@kernel
def write_row(
    k: tl.tensor,
    v: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    slots: tl.tensor,
    k_stride: int,
    v_stride: int,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Grid (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    offset = tl.arange(0, BLOCK)
    if slot >= 0:
        inside = offset < SIZE
        new_k = tl.load(k + row * k_stride + offset, mask=inside)
        new_v = tl.load(v + row * v_stride + offset, mask=inside)
        tl.store(k_cache + slot * SIZE + offset, new_k, mask=inside)
        tl.store(v_cache + slot * SIZE + offset, new_v, mask=inside)


@kernel
def move_rows(
    kv: tl.tensor,  # [planes, num_slots, NUM_HEADS, HEAD_DIM], a plane is K or V of one layer
    src: tl.tensor,
    dst: tl.tensor,
    num_moves: int,
    num_slots: int,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    MOVES: tl.constexpr,
) -> None:
    """Grid (planes, heads). No other program touches this plane and head, in any slot."""
    plane = kv + tl.program_id(0).to(tl.int64) * num_slots * NUM_HEADS * HEAD_DIM
    column = tl.program_id(1) * HEAD_DIM + tl.arange(0, DIM)
    for start in range(0, num_moves, MOVES):
        move = start + tl.arange(0, MOVES)
        source = tl.load(src + move, mask=move < num_moves, other=0)
        target = tl.load(dst + move, mask=move < num_moves, other=0)
        moved = (move < num_moves)[:, None] & (tl.arange(0, DIM) < HEAD_DIM)[None, :]
        source = (source * NUM_HEADS * HEAD_DIM)[:, None] + column[None, :]
        target = (target * NUM_HEADS * HEAD_DIM)[:, None] + column[None, :]
        rows = tl.load(plane + source, mask=moved)
        # NOTE: a target may be a source of this iteration or an earlier one, so that no warp may
        # write before all warps have read.
        tl.debug_barrier()
        tl.store(plane + target, rows, mask=moved)
        tl.debug_barrier()
