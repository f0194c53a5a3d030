"""The `eagle` drafter: an EAGLE head proposes a dynamic tree (EAGLE, Li et al. 2024 and 2025).

A published head of EAGLE-1, 2, 3 or 3.1 (`checkpoint`) reads draft inputs (`draft_inputs`): an
auxiliary hidden state of the target and the token after it. For committed tokens these are the
target's own hidden states; from the root's successors on the head's output takes their place. The
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
from specserve.speculation.drafter import DraftContext, DraftError, DraftOptions, Feedback
from specserve.step import EntryView
from specserve.tree import MAX_NODES, DraftTree, build_tree, root_tree
from specserve_drafts.compatibility import shipped_head
from specserve_drafts.eagle.checkpoint import read_head
from specserve_drafts.eagle.draft_inputs import BlockContents, Track
from specserve_drafts.eagle.head import DraftHead, HeadRows, head_kv_spec, lay_out
from specserve_drafts.eagle.quantized_head import QuantizedHead, can_be_quantized
from specserve_drafts.expansion import Growth, LookPrice, rank, take
from specserve_kernels.dispatch import native_host
from specserve_kernels.draft_head import DraftSampling, ExpansionLimits, ExpansionTask

# LM head rows that a quantized head takes from the target with cost-aware verification. All 49152
# rows of SmolLM2 gained 0.02 tokens per forward pass more, at 4 ms a draft (drafts/LOG.md).
_PRICED_VOCAB = 12288
# Draft inputs of a sequence that may be pending until the next proposal; more are computed at
# once, as their hidden states take memory.
_MAX_PENDING = 128
# Static trees: the assumed conditional acceptance probability of a candidate by its rank. Not
# measured.
_STATIC = torch.tensor([0.5, 0.15, 0.08, 0.05] + [0.03] * (MAX_NODES - 4))


class EagleOptions(DraftOptions, frozen=True, forbid_unknown_fields=True):
    branching: int = 8  # candidates kept per node; 1 drafts a chain
    beam: int = 2  # nodes of a tree that are expanded per forward pass of the head
    max_depth: int = 8
    # Nodes of a lower path probability are never expanded; expanding them gained nothing
    # (drafts/LOG.md, 2026-11-26).
    min_probability: float = 0.05
    static: bool = False  # one tree shape for all, by candidate rank; for comparison only
    # LM head rows to keep: the first ones; of the target's own LM head the most frequent tokens.
    # None: all; but _PRICED_VOCAB if the head is quantized, uses the target's LM head, and
    # verification is cost-aware.
    draft_vocab: int | None = None
    # Target layers whose input hidden states the head reads; None: as in the checkpoint.
    aux_layers: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class _Asked:
    """A sequence to propose a tree for."""

    seq: SequenceView
    state: SamplingState
    budget: int
    track: Track
    slot_list: Tensor  # int32, slots of the draft inputs before the root, then of root and nodes

    def at_once(self) -> ExpansionTask:
        """The task for the kernel that grows the whole tree in one call."""
        tokens, params, track = self.seq.tokens, self.state.params, self.track
        root = len(tokens) - 1
        return ExpansionTask(
            self.slot_list,
            track.count(root),
            tokens[root - track.num_pending : root],
            track.latest(),
            tokens[root],
            root - 1,
            self.budget,
            DraftSampling(
                params.temperature, params.top_k, params.top_p, params.min_p, self.state.seed
            ),
            root + 1,
        )


class _Draft:
    """One tree that is grown one forward pass at a time.

    row: [hidden_size], the hidden state of the root's draft input.
    """

    def __init__(self, asked: _Asked, row: Tensor) -> None:
        self.growth = Growth(asked.seq, asked.state, asked.budget)
        self._track, self._slot_list, self._row = asked.track, asked.slot_list, row
        self._rows: list[Tensor] = []  # outputs of the evaluated nodes, each [hidden_size]

    def fresh(self) -> HeadRows:
        """The segment of the fresh nodes."""
        growth, root = self.growth, self.growth.seq.num_tokens - 1
        depths = np.array([node.depth for node in growth.fresh], np.int64)
        return HeadRows(
            self._slot_list,
            self._track.count(root),
            growth.num_done,
            [node.token for node in growth.fresh],
            root - 1 + depths,
            np.array([node.word for node in growth.fresh], np.uint64),
        )

    def inputs(self) -> list[Tensor]:
        """The hidden state [hidden_size] of every fresh node's draft input: its parent's output."""
        fresh = self.growth.fresh
        return [self._row if node.parent < 0 else self._rows[node.parent] for node in fresh]

    def keep(self, outputs: Iterator[Tensor]) -> None:
        """Store the head's output [hidden_size] of every fresh node."""
        self._rows += [next(outputs) for _ in self.growth.fresh]


class EagleDrafter:
    Options: ClassVar[type[DraftOptions]] = EagleOptions
    needs_topk = 0

    def __init__(self, options: DraftOptions, path: Path | None, target: Path) -> None:
        assert isinstance(options, EagleOptions)
        path = path or shipped_head(target)
        if path is None:
            raise DraftError(
                "draft: no 'eagle' head ships for this target; give the directory of one, or make "
                "one: specserve tune eagle --help"
            )
        for name in ("branching", "beam", "max_depth"):
            if not 1 <= (value := getattr(options, name)) <= MAX_NODES:
                raise DraftError(
                    f"draft.options.eagle.{name}: {value} is out of range; "
                    f"expected 1 to {MAX_NODES}"
                )
        if not 0.0 <= options.min_probability <= 1.0:
            raise DraftError(
                f"draft.options.eagle.min_probability: {options.min_probability}; use 0 to 1"
            )
        try:
            shape = ModelShape.from_dir(target)
        except ModelError as error:
            raise DraftError(f"draft: {error}") from error
        self._options = options
        self._target = target
        self._file = read_head(path, shape, aux_layers=options.aux_layers)
        if options.draft_vocab is not None:
            self._file = self._file.cut(options.draft_vocab, target)
        self._num_positions = max(
            shape.max_position_embeddings, self._file.shape.max_position_embeddings
        )
        self.aux_layers: tuple[int, ...] = tuple(sorted(set(self._file.shape.aux_layers)))
        self._tracks: dict[str, Track] = {}  # by sequence id
        host = native_host()
        self._lay_out = None if host is None else host.build_tree

    def kv_spec(self, dtype: torch.dtype) -> KVSpec | None:
        return head_kv_spec(self._file.shape, dtype)

    def bind(self, context: DraftContext) -> None:
        assert context.storage is not None
        self._context, self._storage = context, context.storage
        self._price = LookPrice(self._options.min_probability, context.step_seconds)
        sample = context.embed(torch.zeros(1, dtype=torch.int64, device=context.device))
        self.head = self._load(sample.dtype)
        ids = self._file.token_ids
        self._token_ids = None if ids is None else ids.to(context.device)
        size = self._file.shape.target_hidden_size
        places = [context.aux_layers.index(layer) for layer in self._file.shape.aux_layers]
        self._columns = [slice(place * size, (place + 1) * size) for place in places]
        self._takes_all = places == list(range(len(context.aux_layers)))
        num_blocks = self._storage.data.shape[2] // context.block_size
        self._contents = BlockContents(num_blocks, context.block_size, len(places) * size, sample)

    def propose(self, seqs: Sequence[SequenceView], budgets: Sequence[int]) -> list[DraftTree]:
        asked = [self._begin(seq, budget) for seq, budget in zip(seqs, budgets, strict=True)]
        at_once: list[_Asked] = []
        by_passes: list[_Asked] = []
        in_kernel = isinstance(self.head, QuantizedHead) and not self._options.static
        for one in asked:
            if one is not None:
                # The kernel does not support logit adjustments such as bias and penalties.
                supported = in_kernel and not one.state.has_logit_adjustments
                (at_once if supported else by_passes).append(one)
        trees = self._grow_at_once(at_once) | self._grow_by_passes(by_passes)
        for one in (*at_once, *by_passes):
            one.track.settle(1)  # the root's draft KV is final: it is from the target's own state
        return [trees.get(seq.id) or root_tree(seq.tokens[-1]) for seq in seqs]

    def _grow_at_once(self, asked: Sequence[_Asked]) -> dict[str, DraftTree]:
        """Trees by sequence id, grown in one kernel call."""
        if not asked:
            return {}
        assert isinstance(self.head, QuantizedHead)
        options, drafter_id = self._options, self._context.drafter_id
        least = self._price.min_probability
        limits = ExpansionLimits(options.branching, options.beam, options.max_depth, least)
        tasks, started = [one.at_once() for one in asked], time.perf_counter()
        expanded = self.head.expand(limits, self._storage, tasks)
        self._price.took(time.perf_counter() - started, max(tree.num_passes for tree in expanded))
        return {
            one.seq.id: DraftTree(
                *self._lay_out(tree.tokens, tree.parents, tree.path_probs, drafter_id)
            )
            if self._lay_out is not None
            else build_tree(tree.tokens, tree.parents, tree.path_probs, drafter_id)
            for one, tree in zip(asked, expanded, strict=True)
        }

    def _grow_by_passes(self, asked: Sequence[_Asked]) -> dict[str, DraftTree]:
        """Trees by sequence id, grown by one forward pass of the head per expansion step."""
        if not asked:
            return {}
        options, started, num_passes = self._options, time.perf_counter(), 0
        min_probability = self._price.min_probability
        drafts: list[_Draft] = []
        chains: list[HeadRows] = []
        rows: list[Tensor] = []
        fused = self.head.fuse(torch.cat([one.track.latest() for one in asked]))
        sizes = [one.track.num_pending + 1 for one in asked]
        for one, piece in zip(asked, torch.split(fused, sizes), strict=True):
            chains += one.track.pending(one.seq.tokens, one.slot_list)
            rows.append(piece[:-1])
            drafts.append(_Draft(one, piece[-1]))
        while growing := [d for d in drafts if d.growth.num_done < len(d.growth.nodes)]:
            fresh = [row for draft in growing for row in draft.inputs()]
            out = self._forward(
                chains + [draft.fresh() for draft in growing],
                torch.cat([*rows, torch.stack(fresh)]),
            )[-len(fresh) :]
            chains, rows = [], []
            self._rank([draft.growth for draft in growing], self.head.logits(out))
            outputs = iter(out.unbind())
            for draft in growing:
                draft.keep(outputs)
                draft.growth.pick(options.beam, options.max_depth, min_probability)
            num_passes += 1
        self._price.took(time.perf_counter() - started, num_passes)
        drafter_id = self._context.drafter_id
        return {draft.growth.seq.id: draft.growth.tree(drafter_id) for draft in drafts}

    def _load(self, dtype: torch.dtype) -> DraftHead | QuantizedHead:
        """The head: quantized if the target is, the kernels support it and the shape allows it."""
        context, make = self._context, self._context.kernels.quantized_draft_head
        embedding = context.quantized_embedding
        if make is not None and embedding is not None and can_be_quantized(self._file.shape):
            if not self._file.shape.own_head:
                num_rows = self._file.shape.vocab_size
                if context.priced:
                    num_rows = min(_PRICED_VOCAB, num_rows)
                self._file = self._file.cut(num_rows, self._target)
            return QuantizedHead(self._file, make, self._num_positions, embedding)
        return DraftHead(
            self._file,
            context.kernels,
            dtype=dtype,
            device=context.device,
            num_positions=self._num_positions,
            embed=context.embed,
            final_norm=context.final_norm,
            unembed=context.unembed,
        )

    def observe(self, feedback: Feedback) -> None:
        """Store the hidden states of all committed tokens until the next proposal."""
        states = feedback.output.aux_hidden_states
        if states is None:
            return  # these tokens become a missing range
        first = 0
        for entry in feedback.entries:
            start, places = _settled(entry, feedback)
            if places:
                self._follow(entry.seq, start, self._wanted(_rows(states, first, places)))
            first += entry.num_prefill
            if entry.num_nodes:
                first += len(feedback.trees[entry.seq.id])

    def _wanted(self, states: Tensor) -> Tensor:
        """The columns of this head's layers; `states` has the layers that all drafters need."""
        if self._takes_all:
            return states
        return torch.cat([states[:, columns] for columns in self._columns], dim=-1)

    def forget(self, seq_id: str) -> None:
        self._tracks.pop(seq_id, None)

    def _begin(self, seq: SequenceView, budget: int) -> _Asked | None:
        """The inputs for a tree; None if the hidden state of the token before the root was not
        observed."""
        track = self._tracks.get(seq.id)
        root = seq.num_tokens - 1
        if track is None or not track.rows or track.num_seen != root:
            return None
        self._contents.name(track, seq.table)
        slot_list = track.slots_up_to(root + max(budget - 1, 1), seq.table)
        return _Asked(seq, self._context.sampling_state(seq), budget, track, slot_list)

    def _follow(self, seq: SequenceView, start: int, rows: Tensor) -> None:
        """Store the hidden states of tokens start, start + 1, ... that the target has computed.

        rows: [n, num_aux_layers * target_hidden_size].
        """
        track = self._tracks.get(seq.id)
        if track is not None and track.num_seen == start + len(rows):
            return  # a repeated call: `observe` is retried if it raised for another sequence
        if track is None or track.num_seen != start:
            track = self._tracks[seq.id] = self._contents.begin(seq.table, start)
        if track.num_pending >= _MAX_PENDING:
            chains = list(track.pending(seq.tokens, track.slots_up_to(track.num_seen, seq.table)))
            batch = lay_out(chains, self._context.device)
            self.head.write_kv(batch, self.head.fuse(track.latest()[:-1]), self._storage)
            track.settle()
        self._contents.name(track, seq.table)
        self._contents.write(track, seq.table, rows)
        track.extend(rows)

    def _forward(self, parts: Sequence[HeadRows], rows: Tensor) -> Tensor:
        """The head's output [num_rows, hidden_size]; `rows` has the same shape."""
        return self.head(lay_out(parts, self._context.device), rows, self._storage)

    def _rank(self, growing: Sequence[Growth], logits: Tensor) -> None:
        """Add candidates of the fresh nodes; logits: [num_fresh, draft_vocab_size]."""
        branching, ids = min(self._options.branching, logits.shape[1]), self._token_ids
        if all(growth.state.plain_greedy for growth in growing):
            log_probs, best = logits.log_softmax(-1).topk(branching)
            tokens = best if ids is None else ids[best]
        else:
            if ids is not None or logits.shape[1] < self._context.vocab_size:
                whole = logits.new_full((len(logits), self._context.vocab_size), -torch.inf)
                whole[:, slice(logits.shape[1]) if ids is None else ids] = logits
                logits = whole
            tokens, log_probs = rank(growing, logits, self._context.sampler, branching)
        if self._options.static:
            log_probs = _STATIC[:branching].to(log_probs.device).log().expand_as(log_probs)
        take(growing, tokens, log_probs)


def _rows(states: Tensor, first: int, places: Sequence[int]) -> Tensor:
    """Rows first + places[0], first + places[1], ...; `places` is ascending."""
    if places[-1] - places[0] == len(places) - 1:  # consecutive, the usual case: no copy
        return states[first + places[0] : first + places[-1] + 1]
    return states[torch.tensor([first + place for place in places], device=states.device)]


def _settled(entry: EntryView, feedback: Feedback) -> tuple[int, list[int]]:
    """The tokens of a sequence that a forward pass committed: the position of the first, and their
    rows among the entry's, of which the prefill chunk comes before the tree (`plan_segments`)."""
    seq, num_prefill = entry.seq, entry.num_prefill
    places = list(range(num_prefill))
    if not entry.num_nodes:
        return seq.num_committed - num_prefill, places
    path = feedback.results[seq.id].path
    return seq.num_tokens - 1 - num_prefill, places + [num_prefill + node for node in path]
