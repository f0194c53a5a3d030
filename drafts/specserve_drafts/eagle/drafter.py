"""The `eagle` drafter: an EAGLE head proposes a dynamic tree (EAGLE, Li et al. 2024 and 2025).

A published head of EAGLE-1, 2, 3 or 3.1 (`checkpoint`) reads draft inputs (`draft_inputs`). The
tree is grown best-first by path probability: EAGLE-2's dynamic tree (arXiv 2406.16858, section 4),
cut to the budget during expansion. Candidates are ranked by log q at temperature 0, else by
log q / T + g with the target's Gumbel noise g.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from specserve.cache.storage import KVSpec
from specserve.models.fields import ModelError
from specserve.models.shape import ModelShape
from specserve.sampling import SamplingState
from specserve.sequence import SequenceView
from specserve.speculation.drafter import (
    DraftContext,
    DraftError,
    DraftOptions,
    Feedback,
    NodeCount,
    Probability,
)
from specserve.tree import MAX_NODES, DraftTree, build_tree, root_tree
from specserve_drafts.compatibility import pretrained_head
from specserve_drafts.eagle.checkpoint import read_head
from specserve_drafts.eagle.draft_inputs import DraftInputs, HeadKV
from specserve_drafts.eagle.head import DraftHead, HeadSegment, build_head_batch
from specserve_drafts.eagle.quantized_head import can_be_quantized, read_weights
from specserve_drafts.expansion import (
    ExpansionThreshold,
    TreeExpansion,
    add_ranked,
    rank_candidates,
)
from specserve_kernels.dispatch import fused_models
from specserve_kernels.draft_head import (
    DraftSampling,
    ExpansionLimits,
    ExpansionTask,
    QuantizedDraftHead,
)

# LM head rows that a quantized head takes from the target with cost-aware verification. All 49152
# rows of SmolLM2 gained 0.02 tokens per forward pass more, at 4 ms a draft (drafts/LOG.md).
_COST_AWARE_VOCAB = 12288
# Draft inputs of a sequence that may be pending until the next proposal; more are computed at
# once, as their hidden states take memory.
_MAX_PENDING = 128
# Static trees: the assumed conditional acceptance probability of a candidate by its rank. Not
# measured.
_STATIC_PROBABILITIES = torch.tensor([0.5, 0.15, 0.08, 0.05] + [0.03] * (MAX_NODES - 4))


class EagleOptions(DraftOptions, frozen=True, forbid_unknown_fields=True):
    branching: NodeCount = 8  # candidates kept per node; 1 drafts a chain
    beam: NodeCount = 2  # nodes of a tree that are expanded per forward pass of the head
    max_depth: NodeCount = 8
    # Nodes of a lower path probability are never expanded; expanding them gained nothing
    # (drafts/LOG.md, 2026-11-26).
    min_probability: Probability = 0.05
    static: bool = False  # one tree shape for all, by candidate rank; for comparison only
    # LM head rows to keep: the first ones; of the target's own LM head the most frequent tokens.
    # None: all; but _COST_AWARE_VOCAB if the head is quantized, uses the target's LM head, and
    # verification is cost-aware.
    draft_vocab: int | None = None
    # Target layers whose input hidden states the head reads; None: as in the checkpoint.
    aux_layers: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class _TreeTask:
    """A sequence to propose a tree for."""

    seq: SequenceView
    state: SamplingState
    budget: int
    kv: DraftInputs
    slot_list: Tensor  # int32, slots of the draft inputs before the root, then of root and nodes

    def in_one_call(self) -> ExpansionTask:
        """The task for the kernel that expands the whole tree in one call."""
        tokens, kv, params = self.seq.tokens, self.kv, self.state.params
        root = len(tokens) - 1
        return ExpansionTask(
            self.slot_list,
            kv.num_inputs(root),
            tokens[root - kv.num_pending : root],
            kv.pending_states(),
            tokens[root],
            root - 1,
            self.budget,
            DraftSampling(
                params.temperature, params.top_k, params.top_p, params.min_p, self.state.seed
            ),
            root + 1,
        )


class _StepwiseExpansion(TreeExpansion):
    """A tree that is expanded by one forward pass per expansion step."""

    def __init__(self, task: _TreeTask, root_state: Tensor) -> None:
        """root_state: [hidden_size], the hidden state of the root's draft input."""
        super().__init__(task.seq, task.state, task.budget)
        self._kv, self._slot_list, self._root_state = task.kv, task.slot_list, root_state
        self._outputs: list[Tensor] = []  # of the evaluated nodes, each [hidden_size]

    def segment(self) -> HeadSegment:
        """The segment of the selected nodes."""
        root = self.seq.num_tokens - 1
        return HeadSegment(
            self._slot_list,
            self._kv.num_inputs(root),
            self.num_evaluated,
            [node.token for node in self.selected],
            root - 1 + np.array([node.depth for node in self.selected], np.int64),
            np.array([node.ancestors for node in self.selected], np.uint64),
        )

    def hidden_states(self) -> list[Tensor]:
        """The hidden state [hidden_size] in each selected node's draft input: the output of its
        parent."""
        return [
            self._root_state if node.parent < 0 else self._outputs[node.parent]
            for node in self.selected
        ]

    def store(self, outputs: Iterator[Tensor]) -> None:
        """Store the head's output [hidden_size] of every selected node."""
        self._outputs += [next(outputs) for _ in self.selected]


class EagleDrafter:
    Options: ClassVar[type[DraftOptions]] = EagleOptions
    needs_topk = 0

    def __init__(self, options: DraftOptions, path: Path | None, target: Path) -> None:
        assert isinstance(options, EagleOptions)
        path = path or pretrained_head(target)
        if path is None:
            raise DraftError(
                "draft: there is no pretrained 'eagle' head for this target; give the directory "
                "of one, or make one: specserve tune eagle --help"
            )
        try:
            shape = ModelShape.from_dir(target)
        except ModelError as error:
            raise DraftError(f"draft: {error}") from error
        self._options = options
        self._target = target
        self._file = read_head(path, shape, aux_layers=options.aux_layers)
        if options.draft_vocab is not None:
            self._file = self._file.with_draft_vocab(options.draft_vocab, target)
        self._num_positions = max(
            shape.max_position_embeddings, self._file.shape.max_position_embeddings
        )
        self.aux_layers: tuple[int, ...] = tuple(sorted(set(self._file.shape.aux_layers)))
        self._inputs: dict[str, DraftInputs] = {}  # by sequence id

    def kv_spec(self, dtype: torch.dtype) -> KVSpec | None:
        shape = self._file.shape
        return KVSpec(shape.num_layers, shape.num_kv_heads, shape.head_dim, dtype)

    def bind(self, context: DraftContext) -> None:
        assert context.storage is not None
        self._context, self._storage = context, context.storage
        self._threshold = ExpansionThreshold(self._options.min_probability, context.step_seconds)
        sample = context.target.embed(torch.zeros(1, dtype=torch.int64, device=context.device))
        self.head = self._load(sample.dtype)
        ids = self._file.token_ids
        self._token_ids = None if ids is None else ids.to(context.device)
        size = self._file.shape.target_hidden_size * len(self._file.shape.aux_layers)
        num_blocks = self._storage.data.shape[2] // context.block_size
        self._kv = HeadKV(num_blocks, size, sample)

    def propose(self, seqs: Sequence[SequenceView], budgets: Sequence[int]) -> list[DraftTree]:
        in_one_call: list[_TreeTask] = []
        stepwise: list[_TreeTask] = []
        in_kernel = not isinstance(self.head, DraftHead) and not self._options.static
        for seq, budget in zip(seqs, budgets, strict=True):
            task = self._tree_task(seq, budget)
            if task is not None:
                # The kernel does not support logit adjustments such as bias and penalties.
                supported = in_kernel and not task.state.has_logit_adjustments
                (in_one_call if supported else stepwise).append(task)
        trees = self._expand_in_one_call(in_one_call) | self._expand_stepwise(stepwise)
        for task in (*in_one_call, *stepwise):
            # The root's draft KV is final: it is from the target's own hidden state.
            task.kv.mark_written(1)
        return [trees.get(seq.id) or root_tree(seq.tokens[-1]) for seq in seqs]

    def _expand_in_one_call(self, tasks: Sequence[_TreeTask]) -> dict[str, DraftTree]:
        """Trees by sequence id, expanded in one kernel call."""
        if not tasks:
            return {}
        assert not isinstance(self.head, DraftHead)
        options, threshold = self._options, self._threshold.min_probability
        limits = ExpansionLimits(options.branching, options.beam, options.max_depth, threshold)
        inputs, started = [task.in_one_call() for task in tasks], time.perf_counter()
        expanded = self.head.expand(limits, self._storage.data, inputs)
        num_steps = max(tree.num_passes for tree in expanded)
        self._threshold.record(time.perf_counter() - started, num_steps)
        return {
            task.seq.id: build_tree(tree.tokens, tree.parents, tree.path_probs)
            for task, tree in zip(tasks, expanded, strict=True)
        }

    def _expand_stepwise(self, tasks: Sequence[_TreeTask]) -> dict[str, DraftTree]:
        """Trees by sequence id, expanded by one forward pass of the head per expansion step."""
        if not tasks:
            return {}
        options, started, num_steps = self._options, time.perf_counter(), 0
        threshold = self._threshold.min_probability
        expansions: list[_StepwiseExpansion] = []
        pending: list[HeadSegment] = []
        pending_states: list[Tensor] = []
        fused = self.head.fuse(torch.cat([task.kv.pending_states() for task in tasks]))
        sizes = [task.kv.num_pending + 1 for task in tasks]
        for task, states in zip(tasks, torch.split(fused, sizes), strict=True):
            pending += task.kv.pending_segments(task.seq.tokens, task.slot_list)
            pending_states.append(states[:-1])
            expansions.append(_StepwiseExpansion(task, states[-1]))
        while active := [expansion for expansion in expansions if expansion.selected]:
            inputs = [state for expansion in active for state in expansion.hidden_states()]
            segments = pending + [expansion.segment() for expansion in active]
            states = torch.cat([*pending_states, torch.stack(inputs)])
            out = self.head(build_head_batch(segments, states, self._storage))[-len(inputs) :]
            pending, pending_states = [], []
            self._add_candidates(active, self.head.logits(out))
            outputs = iter(out.unbind())
            for expansion in active:
                expansion.store(outputs)
                expansion.select_next(options.beam, options.max_depth, threshold)
            num_steps += 1
        self._threshold.record(time.perf_counter() - started, num_steps)
        return {expansion.seq.id: expansion.tree() for expansion in expansions}

    def _load(self, dtype: torch.dtype) -> DraftHead | QuantizedDraftHead:
        """The head: quantized if the target is, the kernels support it and the shape allows it."""
        context, fused = self._context, fused_models(self._context.kernels)
        embedding = context.target.packed_embedding
        if fused is not None and embedding is not None and can_be_quantized(self._file.shape):
            if not self._file.shape.own_head:
                num_rows = self._file.shape.vocab_size
                if context.step_seconds is not None:
                    num_rows = min(_COST_AWARE_VOCAB, num_rows)
                self._file = self._file.with_draft_vocab(num_rows, self._target)
            return fused.draft_head(read_weights(self._file, self._num_positions, embedding))
        target, num_positions = context.target, self._num_positions
        return DraftHead(self._file, context.kernels, target, num_positions, dtype, context.device)

    def observe(self, feedback: Feedback) -> None:
        """Store the hidden states of all committed tokens until the next proposal."""
        for seq in feedback.seqs:
            committed = feedback.committed(seq)
            states = feedback.hidden_states(self._file.shape.aux_layers, committed.rows)
            if states is None:
                return  # these tokens become a missing range
            start, kv = committed.start, self._inputs.get(seq.id)
            if kv is not None and kv.num_observed == start + len(states):
                continue  # a repeated call: `observe` is retried if it raised for another sequence
            if kv is None or kv.num_observed != start:
                kv = self._inputs[seq.id] = self._kv.start(seq.table, start)
            if kv.num_pending >= _MAX_PENDING:
                self._write_pending(seq, kv)
            self._kv.record(kv, seq.table)
            self._kv.observe(kv, seq.table, states)

    def forget(self, seq_id: str) -> None:
        self._inputs.pop(seq_id, None)

    def _tree_task(self, seq: SequenceView, budget: int) -> _TreeTask | None:
        """The inputs for a tree; None if the hidden state of the token before the root was not
        observed."""
        kv = self._inputs.get(seq.id)
        root = seq.num_tokens - 1
        if kv is None or not kv.hidden_states or kv.num_observed != root:
            return None
        self._kv.record(kv, seq.table)
        slot_list = kv.slots_up_to(root + max(budget - 1, 1), seq.table)
        return _TreeTask(seq, self._context.sampling_state(seq), budget, kv, slot_list)

    def _write_pending(self, seq: SequenceView, kv: DraftInputs) -> None:
        """Compute the draft KV of the pending draft inputs."""
        slot_list = kv.slots_up_to(kv.num_observed, seq.table)
        pending = list(kv.pending_segments(seq.tokens, slot_list))
        states = self.head.fuse(kv.pending_states()[:-1])
        self.head.write_kv(build_head_batch(pending, states, self._storage))
        kv.mark_written()

    def _add_candidates(self, expansions: Sequence[TreeExpansion], logits: Tensor) -> None:
        """Add successors of the selected nodes; logits: [num_selected, draft_vocab_size]."""
        branching, ids = min(self._options.branching, logits.shape[1]), self._token_ids
        if all(expansion.state.plain_greedy for expansion in expansions):
            log_probs, best = logits.log_softmax(-1).topk(branching)
            tokens = best if ids is None else ids[best]
        else:
            if ids is not None or logits.shape[1] < self._context.vocab_size:
                whole = logits.new_full((len(logits), self._context.vocab_size), -torch.inf)
                whole[:, slice(logits.shape[1]) if ids is None else ids] = logits
                logits = whole
            sampler = self._context.sampler
            tokens, log_probs = rank_candidates(expansions, logits, sampler, branching)
        if self._options.static:
            static = _STATIC_PROBABILITIES[:branching].to(log_probs.device)
            log_probs = static.log().expand_as(log_probs)
        add_ranked(expansions, tokens, log_probs)
