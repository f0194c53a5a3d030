"""From chains and trees to the flat tensors of one pass, and what a pass gives back.

Host lists become device tensors here, once per pass. Knows nothing of scheduling or models.
"""

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from specserve.cache.table import BlockTable
from specserve.step import Entry
from specserve.tree import WORD, DraftTree
from specserve_kernels.ops import MAX_SEGMENT_ROWS, Segments

# Words of a chain: node i sees nodes 0..i.
_CHAIN_WORDS = np.array([(2 << i) - 1 for i in range(MAX_SEGMENT_ROWS)], WORD)
_CHAIN_DEPTHS = np.arange(MAX_SEGMENT_ROWS, dtype=np.int32)


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """One pass. Rows past the last segment are padding (slot -1, token 0, position 0)."""

    input_ids: Tensor  # [num_rows] int64
    positions: Tensor  # [num_rows] int64, RoPE positions
    slots: Tensor  # [num_rows] int64, where each row's K and V go; -1: nowhere
    logit_rows: Tensor  # [num_logit_rows] int64, rows whose logits are wanted
    segments: Segments


@dataclass(frozen=True, slots=True)
class ModelOutput:
    """What one pass returns."""

    logits: Tensor  # [num_logit_rows, vocab_size] float32
    topk: Tensor | None = None  # [num_logit_rows, k] int64, best first
    taps: Tensor | None = None  # [num_rows, num_taps * hidden_size], rows as in `plan_segments`


@dataclass(frozen=True, slots=True)
class SegmentRows:
    """Consecutive nodes of one tree that hangs from `context_len` tokens of a block table."""

    table: BlockTable
    context_len: int
    first_node: int  # nodes before it are in the cache already
    tokens: Seq[int] | npt.NDArray[np.int32]
    depths: npt.NDArray[np.int32]
    ancestors: npt.NDArray[np.uint64]
    wants_logits: bool


def joined(outputs: Seq[ModelOutput]) -> ModelOutput:
    """What one pass over the same rows would have returned, but for the best tokens."""
    taps = [output.taps for output in outputs if output.taps is not None]
    logits = torch.cat([output.logits for output in outputs])
    return ModelOutput(logits, taps=torch.cat(taps) if taps else None)


def chain_segments(table: BlockTable, start: int, tokens: Seq[int]) -> Iterator[SegmentRows]:
    """Known tokens at positions start, start + 1, ...: one chain per 64, no logits."""
    for offset in range(0, len(tokens), MAX_SEGMENT_ROWS):
        piece = tokens[offset : offset + MAX_SEGMENT_ROWS]
        n = len(piece)
        yield SegmentRows(
            table, start + offset, 0, piece, _CHAIN_DEPTHS[:n], _CHAIN_WORDS[:n], False
        )


def tree_segment(
    table: BlockTable, context_len: int, tree: DraftTree, first_node: int = 0
) -> SegmentRows:
    """The nodes of a tree from `first_node` on, with logits."""
    return SegmentRows(
        table,
        context_len,
        first_node,
        tree.tokens[first_node:],
        tree.depths[first_node:],
        tree.ancestors[first_node:],
        True,
    )


def plan_segments(entries: Seq[Entry], trees: dict[str, DraftTree]) -> Iterator[SegmentRows]:
    """The target's rows of one step: per entry its chain, then its tree."""
    for entry in entries:
        seq = entry.seq
        start, root = seq.num_committed, seq.num_committed + entry.num_chain
        yield from chain_segments(seq.table, start, seq.tokens[start:root])
        if entry.num_nodes:
            yield tree_segment(seq.table, root, trees[seq.id])


def build_batch(
    rows: Seq[SegmentRows], block_size: int, row_multiple: int, device: torch.device
) -> ForwardBatch:
    """Flatten segments, padded to a multiple of `row_multiple` rows."""
    lengths = [len(segment.tokens) for segment in rows]
    num_used = sum(lengths)
    num_rows = -(-num_used // row_multiple) * row_multiple
    ids = np.zeros(num_rows, np.int64)
    positions = np.zeros(num_rows, np.int64)
    slots = np.full(num_rows, -1, np.int64)
    cu_rows = np.zeros(len(rows) + 1, np.int32)
    np.cumsum(lengths, out=cu_rows[1:])
    logit_rows: list[npt.NDArray[np.int64]] = [np.empty(0, np.int64)]
    for segment, start, end in zip(rows, cu_rows[:-1], cu_rows[1:], strict=True):
        ids[start:end] = segment.tokens
        positions[start:end] = segment.context_len + segment.depths
        slots[start:end] = segment.table.slots(
            segment.context_len + segment.first_node, end - start
        )
        if segment.wants_logits:
            logit_rows.append(np.arange(start, end, dtype=np.int64))
    return ForwardBatch(
        torch.from_numpy(ids).to(device),
        torch.from_numpy(positions).to(device),
        torch.from_numpy(slots).to(device),
        torch.from_numpy(np.concatenate(logit_rows)).to(device),
        _segments(rows, cu_rows, num_rows, block_size),
    )


def _segments(
    rows: Seq[SegmentRows], cu_rows: npt.NDArray[np.int32], num_rows: int, block_size: int
) -> Segments:
    widest = max(len(segment.table.block_ids) for segment in rows)
    tables = np.zeros((len(rows), widest), np.int32)
    for index, segment in enumerate(rows):
        tables[index, : len(segment.table.block_ids)] = segment.table.block_ids
    return Segments(
        cu_rows=cu_rows,
        context_lens=np.array([segment.context_len for segment in rows], np.int32),
        first_nodes=np.array([segment.first_node for segment in rows], np.int32),
        ancestors=np.concatenate([segment.ancestors for segment in rows]),
        block_tables=tables,
        num_rows=num_rows,
        block_size=block_size,
    )
