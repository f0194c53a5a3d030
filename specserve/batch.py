"""The input and output of a forward pass: flattens prompt chunks and trees into tensors.

Host lists become device tensors here, once per pass. Knows no scheduling and no models.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from specserve.cache.table import BlockTable, TableView
from specserve.step import Entry
from specserve.tree import DraftTree
from specserve_kernels.segments import MAX_SEGMENT_ROWS, Segments

# Ancestor words of a chain: node i sees nodes 0..i.
_CHAIN_WORDS = [(2 << i) - 1 for i in range(MAX_SEGMENT_ROWS)]
_CHAIN_DEPTHS = list(range(MAX_SEGMENT_ROWS))


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """The input of one forward pass, one row per token; rows past the last segment are padding."""

    input_ids: Tensor  # [num_rows] int64; padding: 0
    positions: Tensor  # [num_rows] int64, RoPE positions; padding: 0
    slots: Tensor  # [num_rows] int64, KV slot to write; padding: -1, none
    logit_rows: Tensor  # [num_logit_rows] int64, rows whose logits are wanted
    segments: Segments


@dataclass(frozen=True, slots=True)
class ModelOutput:
    """The output of one forward pass."""

    logits: Tensor  # [num_logit_rows, vocab_size] float32
    topk: Tensor | None = None  # [num_logit_rows, k] int64, best first; -1: logits not finite
    # [num_rows, num_aux_layers * hidden_size], rows as in `plan_segments`.
    aux_hidden_states: Tensor | None = None
    # [num_scored_rows, hidden_size]: the residual stream before the final norm, in the rows
    # `Entry.scored_rows` of all entries; None without such rows.
    scored_states: Tensor | None = None


@dataclass(frozen=True, slots=True)
class SegmentRows:
    """Consecutive nodes of one tree that follows the first `context_len` tokens of a table."""

    table: BlockTable | TableView
    context_len: int
    first_node: int  # the KV of the nodes before it is in the cache already
    tokens: Sequence[int]
    depths: Sequence[int]
    ancestors: Sequence[int]  # ancestor words, as in `DraftTree`
    wants_logits: bool


def joined(outputs: Sequence[ModelOutput]) -> ModelOutput:
    """Concatenate outputs into that of one pass over all their rows, without `topk`."""
    states = [out.aux_hidden_states for out in outputs if out.aux_hidden_states is not None]
    scored = [out.scored_states for out in outputs if out.scored_states is not None]
    return ModelOutput(
        torch.cat([output.logits for output in outputs]),
        aux_hidden_states=torch.cat(states) if states else None,
        scored_states=torch.cat(scored) if scored else None,
    )


def prefill_segments(
    table: BlockTable | TableView, start: int, tokens: Sequence[int]
) -> Iterator[SegmentRows]:
    """Split known tokens from position `start` on into segments of up to 64, without logits."""
    for offset in range(0, len(tokens), MAX_SEGMENT_ROWS):
        piece = tokens[offset : offset + MAX_SEGMENT_ROWS]
        n = len(piece)
        yield SegmentRows(
            table, start + offset, 0, piece, _CHAIN_DEPTHS[:n], _CHAIN_WORDS[:n], False
        )


def tree_segment(
    table: BlockTable, context_len: int, tree: DraftTree, first_node: int = 0
) -> SegmentRows:
    """The segment of the nodes of `tree` from `first_node` on, with logits."""
    return SegmentRows(
        table,
        context_len,
        first_node,
        tree.tokens[first_node:].tolist(),
        tree.depths[first_node:],
        tree.ancestors[first_node:],
        True,
    )


def plan_segments(entries: Sequence[Entry], trees: dict[str, DraftTree]) -> Iterator[SegmentRows]:
    """The target's segments of one step: per entry its prompt chunk, then its tree."""
    for entry in entries:
        seq = entry.seq
        start, root = seq.num_committed, seq.num_committed + entry.num_prefill
        yield from prefill_segments(seq.table, start, seq.tokens[start:root])
        if entry.num_nodes:
            yield tree_segment(seq.table, root, trees[seq.id])


def build_batch(
    rows: Sequence[SegmentRows], block_size: int, row_multiple: int, device: torch.device
) -> ForwardBatch:
    """Flatten segments into tensors on `device`, padded to a multiple of `row_multiple` rows."""
    # Lists first, one array of each at the end: between passes each numpy call costs microseconds.
    ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    logit_rows: list[int] = []
    cu_rows = [0]
    for segment in rows:
        first, context_len = len(ids), segment.context_len
        ids += segment.tokens
        positions += [context_len + depth for depth in segment.depths]
        slots += segment.table.slots(context_len + segment.first_node, len(ids) - first)
        if segment.wants_logits:
            logit_rows += range(first, len(ids))
        cu_rows.append(len(ids))
    num_rows = -(-len(ids) // row_multiple) * row_multiple
    padding = num_rows - len(ids)

    def tensor(values: list[int]) -> Tensor:
        return torch.as_tensor(np.array(values, np.int64), device=device)

    tables = [segment.table.block_ids for segment in rows]
    widest = max(map(len, tables))
    segments = Segments(
        cu_rows=np.array(cu_rows, np.int32),
        context_lens=np.array([segment.context_len for segment in rows], np.int32),
        first_nodes=np.array([segment.first_node for segment in rows], np.int32),
        ancestors=np.array([word for segment in rows for word in segment.ancestors], np.uint64),
        block_tables=np.array([[*ids, *[0] * (widest - len(ids))] for ids in tables], np.int32),
        num_rows=num_rows,
        block_size=block_size,
    )
    return ForwardBatch(
        tensor(ids + [0] * padding),
        tensor(positions + [0] * padding),
        tensor(slots + [-1] * padding),
        tensor(logit_rows),
        segments,
    )
