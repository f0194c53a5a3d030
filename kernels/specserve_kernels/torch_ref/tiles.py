"""The plan of the torch attention: which query rows are multiplied with which KV chunks.

Index arithmetic only. A row's positions are 0 .. context_len + depth; `Tile.slots` has the slot of
each. Rows with the same slots at the same positions form a group. A segment that is a chain is one
group. In a tree with side branches, all rows form a group for the chunks before the tree's first
one; from that chunk on every row is a group of its own.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from specserve_kernels.segments import MAX_SEGMENT_ROWS, Segments

KV_CHUNK = 128
# Scores per tile, so that they stay in the CPU cache. A tile holds at least one group, however
# long its context is.
MAX_TILE_ELEMENTS = 1 << 20

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Tile:
    """Groups padded to the same rows and chunks. Padding rows repeat the group's last row."""

    query_rows: Tensor  # [groups * kv_heads * chunks * rows] int64 into q as [num_rows * num_heads]
    rows: Tensor  # [groups * kv_heads * rows] int64, the same without the repetition per chunk
    slots: Tensor  # [groups * kv_heads * chunks * KV_CHUNK] int64 into [num_slots * kv_heads]
    hidden: Tensor | None  # [groups, 1, chunks - first_hidden, rows, KV_CHUNK] float32, -inf or 0
    first_hidden: int  # all rows see all of the chunks before this one
    num_groups: int
    shape: tuple[int, int, int, int]  # groups * kv_heads, chunks, rows, KV_CHUNK
    continues: bool  # whether another tile holds the earlier chunks of these rows

    @property
    def num_rows(self) -> int:
        return self.shape[2]

    def to(self, device: torch.device) -> "Tile":
        return replace(
            self,
            query_rows=self.query_rows.to(device),
            rows=self.rows.to(device),
            slots=self.slots.to(device),
            hidden=None if self.hidden is None else self.hidden.to(device),
        )


@dataclass(frozen=True, slots=True)
class _Groups:
    """Groups of one tile: segment rows [first, first + count) over chunks [begin, end)."""

    segment: Ints  # [groups]
    first: Ints
    count: Ints
    begin: Ints
    end: Ints


class Scratch:
    """Buffers that all layers of a forward pass reuse; new ones would cause page faults."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Uninitialized, with `like`'s dtype and device; valid until `name` is taken again."""
        size = math.prod(shape)
        key = (name, like.dtype, like.device)
        if key not in self._buffers or self._buffers[key].numel() < size:
            self._buffers[key] = like.new_empty(size)
        return self._buffers[key][:size].view(shape)

    def gather(self, name: str, source: Tensor, index: Tensor) -> Tensor:
        """source[index] as float32, [len(index), head_dim]."""
        rows = self.take(name, (len(index), source.shape[1]), source)
        torch.index_select(source, 0, index, out=rows)
        if source.dtype == torch.float32:
            return rows
        widened = self.take(name, tuple(rows.shape), torch.empty(0, device=source.device))
        return widened.copy_(rows)


class AttentionPlan:
    """The tiles of one forward pass, built at the first use of each window and device."""

    def __init__(self, segments: Segments, num_kv_heads: int, group_size: int) -> None:
        self._segments = segments
        self._num_kv_heads = num_kv_heads
        self._group_size = group_size
        self._cu_rows = segments.cu_rows.astype(np.int64)
        self._num_rows = np.diff(self._cu_rows)
        self._context = segments.context_lens.astype(np.int64)
        self._tables = segments.block_tables.astype(np.int64)
        row_segment = np.repeat(np.arange(len(self._num_rows)), self._num_rows)
        bits = segments.ancestors[:, None] >> np.arange(MAX_SEGMENT_ROWS, dtype=np.uint64) & 1
        depth = bits.sum(axis=1, dtype=np.int64) - 1
        # [rows, 64]: the row's ancestor at each depth; at its own depth the row's node itself
        self._ancestors = np.argsort(bits == 0, axis=1, kind="stable")
        self._limit = self._context[row_segment] + depth
        self._max_depth = np.maximum.reduceat(depth, self._cu_rows[:-1]) if len(depth) else depth
        # A tree is a chain if and only if its last node is as deep as its index.
        self._branching = self._max_depth < segments.first_nodes + self._num_rows - 1
        self.scratch = Scratch()
        self._built: dict[tuple[int, torch.device], tuple[tuple[Tile, ...], ...]] = {}

    def batches(self, window: int, device: torch.device) -> tuple[tuple[Tile, ...], ...]:
        """Batches of tiles, in execution order. Tiles of a batch may share rows, batches do not."""
        key = (window, device)
        if key not in self._built:
            self._built[key] = tuple(
                tuple(tile.to(device) for tile in self._build(batch, window))
                for batch in self._batched_segments(window)
            )
        return self._built[key]

    def _first_chunk(self, lowest_position: Ints, window: int) -> Ints:
        if window == 0:
            return np.zeros_like(lowest_position)
        return np.maximum(lowest_position - window + 1, 0) // KV_CHUNK

    def _batched_segments(self, window: int) -> Iterator[Ints]:
        """Batches of segments of similar size, so that padding is small and tiles are bounded."""
        rows = _bucket(self._num_rows * self._group_size)
        chunks = (self._context + self._max_depth) // KV_CHUNK + 1
        chunks -= self._first_chunk(self._context, window)
        order = np.lexsort((-chunks, rows, self._branching))
        batch: list[int] = []
        for segment in order.tolist():
            if batch:
                head = batch[0]
                per_segment = rows[head] * chunks[head] * KV_CHUNK * self._num_kv_heads
                alike = (
                    self._branching[segment] == self._branching[head]
                    and rows[segment] == rows[head]
                    and 2 * chunks[segment] + 2 >= chunks[head]
                )
                if not alike or (len(batch) + 1) * per_segment > MAX_TILE_ELEMENTS:
                    yield np.array(batch)
                    batch = []
            batch.append(segment)
        if batch:
            yield np.array(batch)

    def _build(self, batch: Ints, window: int) -> Iterator[Tile]:
        """The tiles of a batch, in ascending order of their chunks."""
        count, context = self._num_rows[batch], self._context[batch]
        none = np.zeros_like(batch)
        begin = self._first_chunk(context, window)
        if not self._branching[batch].any():
            end = (context + self._max_depth[batch]) // KV_CHUNK + 1
            yield self._tile(_Groups(batch, none, count, begin, end), window, continues=False)
            return
        own = context // KV_CHUNK  # the first chunk with positions of the tree
        shared = bool((own > begin).any())
        if shared:
            yield self._tile(_Groups(batch, none, count, begin, own), window, continues=False)
        owner = np.repeat(np.arange(len(batch)), count)
        row = np.arange(len(owner)) - np.repeat(np.cumsum(count) - count, count)
        end = self._limit[self._cu_rows[batch[owner]] + row] // KV_CHUNK + 1
        alone = _Groups(batch[owner], row, np.ones_like(row), own[owner], end)
        yield self._tile(alone, window, continues=shared)

    def _tile(self, groups: _Groups, window: int, *, continues: bool) -> Tile:
        num_groups, size = len(groups.segment), self._group_size
        num_rows = int(_bucket(groups.count.max() * size))
        num_chunks = int((groups.end - groups.begin).max())
        packed = np.minimum(np.arange(num_rows), groups.count[:, None] * size - 1)
        row = (self._cu_rows[groups.segment] + groups.first)[:, None] + packed // size
        limit = np.minimum(self._limit[row], groups.end[:, None] * KV_CHUNK - 1)  # [groups, rows]
        position = groups.begin[:, None] * KV_CHUNK + np.arange(num_chunks * KV_CHUNK)
        hidden = position[:, None, :] > limit[:, :, None]
        if window > 0:
            hidden |= position[:, None, :] <= (self._limit[row] - window)[:, :, None]
        hidden = hidden.reshape(num_groups, num_rows, num_chunks, KV_CHUNK)
        partial = np.flatnonzero(hidden.any(axis=(0, 1, 3)))
        first_hidden = int(partial[0]) if len(partial) else num_chunks
        penalty = np.where(hidden[:, :, first_hidden:], np.float32(-np.inf), np.float32(0.0))
        penalty = np.ascontiguousarray(penalty.swapaxes(1, 2))[:, None]

        heads = np.arange(self._num_kv_heads)[:, None]
        query = (row * (self._num_kv_heads * size) + packed % size)[:, None] + heads * size
        slot = self._slots(groups, np.minimum(position, limit.max(axis=1, keepdims=True)))
        repeated = np.repeat(query[:, :, None], num_chunks, axis=2)
        return Tile(
            query_rows=torch.from_numpy(repeated.ravel()),
            rows=torch.from_numpy(query.ravel()),
            slots=torch.from_numpy((slot[:, None] * self._num_kv_heads + heads).ravel()),
            hidden=torch.from_numpy(penalty) if len(partial) else None,
            first_hidden=first_hidden,
            num_groups=num_groups,
            shape=(num_groups * self._num_kv_heads, num_chunks, num_rows, KV_CHUNK),
            continues=continues,
        )

    def _slots(self, groups: _Groups, position: Ints) -> Ints:
        """[groups, positions]: the slot of each position on the path of the group's last row.

        The caller clamps positions to the group's end, so that masked entries are slots of the
        same sequence: a NaN in another sequence's slot would survive a weight of zero.
        """
        context = self._context[groups.segment][:, None]
        last_row = self._cu_rows[groups.segment] + groups.first + groups.count - 1
        depth = np.clip(position - context, 0, MAX_SEGMENT_ROWS - 1)
        above = np.take_along_axis(self._ancestors[last_row], depth, axis=1)
        place = np.maximum(np.where(position < context, position, context + above), 0)
        block_size = self._segments.block_size
        block = self._tables[groups.segment[:, None], place // block_size]
        slots: Ints = block * block_size + place % block_size
        return slots


def _bucket(num_rows: Ints) -> Ints:
    """Round up to one of few multiples of 8; below 8 rows a matmul's bits depend on the number."""
    step = np.maximum(8, np.exp2(np.ceil(np.log2(num_rows)) - 2).astype(np.int64))
    padded: Ints = -(-num_rows // step) * step
    return padded
