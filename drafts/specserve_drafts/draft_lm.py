"""The `draft_lm` drafter: a small causal LM proposes a tree for a large one (Leviathan et al. 2023,
Chen et al. 2023).

Its KV is in a storage of its own, indexed by the target's block tables. Candidates are ranked by
log q + g with the target's sampler and Gumbel noise g, so a draft model whose distribution agrees
with the target's is accepted at any temperature. The tree is grown best-first by path probability.
Only the root is proposed for a sequence that fills the draft model's context, or that contains a
token id for which the draft model has no embedding row: models of one family often share a
tokenizer but pad their vocabularies to different sizes.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from specserve.batch import SegmentRows, build_batch, prefill_segments
from specserve.cache.storage import KVSpec
from specserve.models.shape import ModelShape
from specserve.sequence import SequenceView
from specserve.speculation.drafter import (
    DraftContext,
    DraftError,
    DraftOptions,
    Feedback,
    NodeCount,
)
from specserve.text import Tokenizer, same_vocabulary
from specserve.tree import MAX_NODES, DraftTree, root_tree
from specserve_drafts.draft_kv import DraftKV, DraftKVState
from specserve_drafts.expansion import TreeExpansion, add_ranked, rank_candidates

_MAX_PENDING = 256  # tokens without draft KV in one forward pass of the draft model


class DraftLMOptions(DraftOptions, frozen=True, forbid_unknown_fields=True):
    branching: NodeCount = 3  # candidates kept per node; 1 drafts a chain
    beam: NodeCount = 2  # nodes of a tree that are expanded per forward pass of the draft model
    max_depth: NodeCount = 8


class DraftLM:
    Options: ClassVar[type[DraftOptions]] = DraftLMOptions
    aux_layers: tuple[int, ...] = ()
    needs_topk = 0

    def __init__(self, options: DraftOptions, path: Path | None, target: Path) -> None:
        assert isinstance(options, DraftLMOptions)
        if path is None:
            raise DraftError("draft: 'draft_lm' needs a checkpoint; give its directory or alias")
        difference = same_vocabulary(Tokenizer(path), Tokenizer(target))
        if difference is not None:
            raise DraftError(
                f"draft: {path} has another vocabulary than the target: {difference}; "
                "use a draft model that was trained with the target's tokenizer"
            )
        self._options = options
        self._path = path
        self._shape = ModelShape.from_dir(path)
        self._kv = DraftKV()
        self._kv_states: dict[str, DraftKVState] = {}  # by sequence id
        self._num_readable: dict[str, int] = {}  # leading tokens with an embedding row, likewise

    def kv_spec(self, dtype: torch.dtype) -> KVSpec | None:
        shape = self._shape
        return KVSpec(shape.num_layers, shape.num_kv_heads, shape.head_dim, dtype)

    def bind(self, context: DraftContext) -> None:
        assert context.storage is not None
        self._context, self._storage = context, context.storage
        self._model = context.load_model(self._path)

    def propose(self, seqs: Sequence[SequenceView], budgets: Sequence[int]) -> list[DraftTree]:
        context = self._shape.max_position_embeddings
        limits = [min(b, context + 1 - s.num_tokens) for s, b in zip(seqs, budgets, strict=True)]
        expansions = [
            TreeExpansion(seq, self._context.sampling_state(seq), limit)
            for seq, limit in zip(seqs, limits, strict=True)
            if limit > 1 and self._can_read(seq)
        ]
        drafted = [expansion.seq for expansion in expansions]
        pending = [row for s in drafted for row in self._missing_segments(s, s.num_tokens - 1)]
        while active := [expansion for expansion in expansions if expansion.selected]:
            logits = self._forward(pending + [_selected_rows(expansion) for expansion in active])
            pending = []
            sampler, options = self._context.sampler, self._options
            add_ranked(active, *rank_candidates(active, logits, sampler, options.branching))
            for expansion in active:
                expansion.select_next(options.beam, options.max_depth)
        for seq in drafted:
            self._kv_states[seq.id].num_with_kv = seq.num_tokens  # the root has draft KV too
        trees = {expansion.seq.id: expansion.tree() for expansion in expansions}
        return [trees.get(seq.id) or root_tree(seq.tokens[-1]) for seq in seqs]

    def observe(self, feedback: Feedback) -> None:
        """Compute draft KV for prefill chunks, so that the first proposal need not process the
        whole prompt."""
        chunks = [
            (seq, min(seq.num_committed, self._shape.max_position_embeddings))
            for seq in feedback.seqs
            if seq.id not in feedback.results and self._can_read(seq)
        ]
        pending = [row for seq, end in chunks for row in self._missing_segments(seq, end)]
        if pending:
            self._forward(pending)
        for seq, end in chunks:
            state = self._kv_states[seq.id]
            state.num_with_kv = max(state.num_with_kv, end)

    def forget(self, seq_id: str) -> None:
        self._kv_states.pop(seq_id, None)
        self._num_readable.pop(seq_id, None)

    def _can_read(self, seq: SequenceView) -> bool:
        """Whether the draft model has an embedding row for every token of `seq`.

        Must be checked before the lookup: an index out of range is a fatal error on a GPU.
        """
        num_rows = self._shape.vocab_size
        if num_rows >= self._context.vocab_size:
            return True
        start = self._num_readable.get(seq.id, 0)
        tokens = seq.tokens[start:]
        readable = next((i for i, token in enumerate(tokens) if token >= num_rows), len(tokens))
        self._num_readable[seq.id] = start + readable
        return readable == len(tokens)

    def _missing_segments(self, seq: SequenceView, end: int) -> list[SegmentRows]:
        """Segments of the tokens before `end` that have no draft KV.

        Runs forward passes over the first of them if they exceed _MAX_PENDING; the caller
        runs the returned rest and then updates `num_with_kv`.
        """
        table = seq.table
        state = self._kv_states.get(seq.id)
        if state is None:
            state = self._kv_states[seq.id] = DraftKVState(self._kv.num_shared(table))
        self._kv.record(state, table)
        start = state.num_with_kv
        self._kv.drop(table, start, end + 1)  # with the root
        segments = list(prefill_segments(table, start, seq.tokens[start:end]))
        while sum(len(segment.tokens) for segment in segments) > _MAX_PENDING:
            self._forward(segments[: _MAX_PENDING // MAX_NODES])
            del segments[: _MAX_PENDING // MAX_NODES]
        return segments

    def _forward(self, rows: Sequence[SegmentRows]) -> Tensor:
        """Logits [num_logit_rows, target vocab_size] float32; -inf for ids that the draft model
        lacks."""
        context = self._context
        batch = build_batch(rows, context.block_size, self._model.row_multiple, context.device)
        logits = self._model(batch, self._storage).logits
        missing = context.vocab_size - logits.shape[1]
        return functional.pad(logits, (0, missing), value=-torch.inf)


def _selected_rows(expansion: TreeExpansion) -> SegmentRows:
    selected = expansion.selected
    return SegmentRows(
        expansion.seq.table,
        expansion.seq.num_tokens - 1,
        expansion.num_evaluated,
        [node.token for node in selected],
        [node.depth for node in selected],
        [node.ancestors for node in selected],
        wants_logits=True,
    )
