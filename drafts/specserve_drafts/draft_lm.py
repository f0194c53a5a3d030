"""A small causal LM drafts for a large one (Leviathan et al. 2023, Chen et al. 2023), as a tree.

Its KV lives in the target's blocks, in a storage of its own. Candidates are ranked by
log q + g with the target's sampler and the target's noise, so a draft that agrees with the target
is accepted whatever the temperature. The tree grows best-first by path score.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from specserve.batch import SegmentRows, build_batch, chain_segments
from specserve.cache.storage import KVSpec
from specserve.cache.table import BlockTable
from specserve.drafting.base import DraftContext, DraftError, DraftOptions, Feedback
from specserve.models.loader import load_model
from specserve.models.shape import ModelShape
from specserve.sampling import Row, SamplingState
from specserve.sequence import Sequence
from specserve.text import Tokenizer, same_vocabulary
from specserve.tree import MAX_NODES, WORD, DraftTree, build_tree

_MAX_CATCH_UP_ROWS = 256  # rows of one pass over tokens the draft has not seen


class DraftLMOptions(DraftOptions, frozen=True, forbid_unknown_fields=True):
    branching: int = 3  # candidates kept per node; 1 drafts a chain
    beam: int = 2  # nodes looked at per draft pass
    max_depth: int = 8


@dataclass(frozen=True, slots=True)
class _Node:
    token: int
    parent: int  # index among the evaluated nodes, -1 for the root
    score: float
    depth: int
    word: int  # ancestors among the evaluated nodes


class _Growth:
    """One tree while it grows: evaluated nodes, in cache order, and the candidates they brought."""

    def __init__(self, seq: Sequence, state: SamplingState, budget: int) -> None:
        self.seq, self.state, self.budget = seq, state, budget
        self.nodes = [_Node(seq.tokens[-1], -1, 1.0, 0, 1)]
        self.pool: list[_Node] = []  # not evaluated; `word` is the parent's
        self.num_done = 0  # nodes whose KV and candidates are there

    def pick(self, beam: int, max_depth: int) -> bool:
        """Move the best candidates to the nodes of the next pass; False if there are none.

        One node of the budget is left for a leaf: evaluating all would be evaluating in vain.
        """
        self.num_done = len(self.nodes)
        room = min(beam, self.budget - 1 - len(self.nodes))
        deep_enough = [node for node in self.pool if node.depth < max_depth]
        for node in sorted(deep_enough, key=lambda node: -node.score)[: max(room, 0)]:
            self.pool.remove(node)
            self.nodes.append(replace(node, word=node.word | 1 << len(self.nodes)))
        return len(self.nodes) > self.num_done

    def fresh_rows(self) -> SegmentRows:
        fresh = self.nodes[self.num_done :]
        return SegmentRows(
            self.seq.table,
            self.seq.num_tokens - 1,
            self.num_done,
            [node.token for node in fresh],
            np.array([node.depth for node in fresh], np.int32),
            np.array([node.word for node in fresh], WORD),
            wants_logits=True,
        )

    def sampler_rows(self) -> list[Row]:
        return [
            Row(self.state, self.seq.num_tokens + node.depth, self._path(node))
            for node in self.nodes[self.num_done :]
        ]

    def add_candidates(self, index: int, tokens: list[int], probabilities: list[float]) -> None:
        """Successors of evaluated node `num_done + index`."""
        parent = self.num_done + index
        node = self.nodes[parent]
        for token, probability in zip(tokens, probabilities, strict=True):
            if probability > 0.0:
                score = node.score * probability
                self.pool.append(_Node(token, parent, score, node.depth + 1, node.word))

    def tree(self, source: int) -> DraftTree:
        leaves = sorted(self.pool, key=lambda node: -node.score)[: self.budget - len(self.nodes)]
        nodes = self.nodes + leaves
        return build_tree(
            [node.token for node in nodes],
            [node.parent for node in nodes],
            [node.score for node in nodes],
            source,
        )

    def _path(self, node: _Node) -> tuple[int, ...]:
        tokens: list[int] = []
        while node.parent >= 0:
            tokens.append(node.token)
            node = self.nodes[node.parent]
        return tuple(reversed(tokens))


class DraftLM:
    Options: ClassVar[type[DraftOptions]] = DraftLMOptions
    needs_taps: tuple[int, ...] = ()
    needs_topk = 0

    def __init__(self, options: DraftOptions, path: Path | None, target: Path) -> None:
        assert isinstance(options, DraftLMOptions)
        if path is None:
            raise DraftError("draft: 'draft_lm' needs a checkpoint; give its directory or alias")
        for name in ("branching", "beam", "max_depth"):
            if not 1 <= (value := getattr(options, name)) <= MAX_NODES:
                raise DraftError(
                    f"draft.options.draft_lm.{name}: {value} is out of range; "
                    f"expected 1 to {MAX_NODES}"
                )
        difference = same_vocabulary(Tokenizer(path), Tokenizer(target))
        if difference is not None:
            raise DraftError(
                f"draft: {path} has another vocabulary than the target: {difference}; "
                "use a draft model that was trained with the target's tokenizer"
            )
        self._options = options
        self._path = path
        self._shape = ModelShape.from_dir(path)
        self._num_valid: dict[str, int] = {}  # tokens whose draft KV is there, by sequence id
        # Content of each block in the draft's storage, as the prefix cache names it.
        self._filled: dict[int, bytes] = {}

    def kv_spec(self, dtype: torch.dtype) -> KVSpec | None:
        shape = self._shape
        return KVSpec(shape.num_layers, shape.num_kv_heads, shape.head_dim, dtype)

    def bind(self, context: DraftContext) -> None:
        assert context.storage is not None
        self._context, self._storage = context, context.storage
        self._model = load_model(
            self._path,
            kernels=context.kernels,
            dtype=context.dtype,
            device=context.device,
            exact=context.exact,
            quantization=context.quantization,
        )

    def propose(self, seqs: Seq[Sequence], budgets: Seq[int]) -> list[DraftTree]:
        growths = [
            _Growth(seq, self._context.sampling_state(seq), budget)
            for seq, budget in zip(seqs, budgets, strict=True)
        ]
        missed = [segment for seq in seqs for segment in self._catch_up(seq, seq.num_tokens - 1)]
        while growing := [growth for growth in growths if growth.num_done < len(growth.nodes)]:
            logits = self._forward(missed + [growth.fresh_rows() for growth in growing])
            missed = []
            self._rank(growing, logits)
            for growth in growing:
                growth.pick(self._options.beam, self._options.max_depth)
        for seq in seqs:
            self._num_valid[seq.id] = seq.num_tokens  # the root is in the cache too
        return [growth.tree(self._context.source) for growth in growths]

    def observe(self, feedback: Feedback) -> None:
        """Follow prompt chunks, so that the first proposal does not have the prompt to read."""
        chunks = [entry.seq for entry in feedback.entries if not entry.num_nodes]
        missed = [segment for seq in chunks for segment in self._catch_up(seq, seq.num_committed)]
        if missed:
            self._forward(missed)

    def forget(self, seq_id: str) -> None:
        self._num_valid.pop(seq_id, None)

    def _catch_up(self, seq: Sequence, end: int) -> list[SegmentRows]:
        """Rows for the tokens before `end` that the draft has not seen; they count as seen."""
        table = seq.table
        if seq.id not in self._num_valid:
            self._num_valid[seq.id] = self._num_shared(table)
        start = self._num_valid[seq.id]
        for index in range(min(start // table.block_size, len(table.hashes))):
            self._filled[table.block_ids[index]] = table.hashes[index]
        segments = list(chain_segments(table, start, seq.tokens[start:end]))
        while sum(len(segment.tokens) for segment in segments) > _MAX_CATCH_UP_ROWS:
            self._forward(segments[: _MAX_CATCH_UP_ROWS // MAX_NODES])
            del segments[: _MAX_CATCH_UP_ROWS // MAX_NODES]
        self._num_valid[seq.id] = max(start, end)
        return segments

    def _num_shared(self, table: BlockTable) -> int:
        """Leading tokens whose draft KV came with the blocks of the prefix cache."""
        blocks = zip(table.block_ids, table.hashes, strict=False)
        matching = takewhile(lambda block: self._filled.get(block[0]) == block[1], blocks)
        return sum(1 for _ in matching) * table.block_size

    def _forward(self, rows: Seq[SegmentRows]) -> Tensor:
        """[num_logit_rows, vocab_size of the target] float32."""
        context = self._context
        batch = build_batch(rows, context.block_size, self._model.row_multiple, context.device)
        logits = self._model(batch, self._storage).logits
        missing = context.vocab_size - logits.shape[1]
        return functional.pad(logits, (0, missing), value=-torch.inf)

    def _rank(self, growing: Seq[_Growth], logits: Tensor) -> None:
        """Candidates of the nodes just evaluated, by log q + g."""
        rows = [row for growth in growing for row in growth.sampler_rows()]
        sampler = self._context.sampler
        perturbed = sampler.perturb(sampler.process(logits, rows), rows)
        best = perturbed.log_softmax(-1).topk(self._options.branching)
        tokens, probabilities = best.indices.tolist(), best.values.exp().tolist()
        row = 0
        for growth in growing:
            for index in range(len(growth.nodes) - growth.num_done):
                growth.add_candidates(index, tokens[row], probabilities[row])
                row += 1
