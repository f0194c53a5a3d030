"""Decides what is drafted and what is verified in a step, from costs and observed gains.

In the order of a step: `budgets` says for which sequences trees are drafted, `is_paused` which
drafters are left out, `select_nodes` which drafted nodes are verified; the `record` methods learn
from the outcome. Host only.

A gain is a number of tokens per step. It is compared with the tokens that the whole batch would
have emitted in the time that was spent.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from specserve.sequence import SequenceState
from specserve.speculation.cost_model import CostModel
from specserve.speculation.node_selection import select_nodes
from specserve.step import Entry, StepPlan, VerifyResult
from specserve.tree import DraftTree

_SEQUENCE_MEMORY: Final = 16  # drafts over which the gain of a sequence is averaged
_ALL_MEMORY: Final = 64  # drafts over which the gain of all sequences is averaged
_SEQUENCE_PAUSES: Final = (4, 16)  # steps without drafting: the first pause, and the longest

_DRAFTER_MEMORY: Final = 96  # drafts over which a drafter's gain is averaged: it is noisy
_DRAFTER_PAUSES: Final = (128, 4096)  # steps without a drafter: the first pause, and the longest
_TRIAL: Final = 32  # drafts before a drafter is paused
_SHORT_TRIAL: Final = 8  # drafts that suffice if it gains less than _HOPELESS of what it needs
_HOPELESS: Final = 0.4
_MARGIN: Final = 1.1  # the gain that a drafter needs, relative to its cost; at 1 it breaks even
_FREE: Final = 0.02  # of the time of a step: a drafter that takes less is always used


@dataclass(slots=True)
class Mean:
    """The mean of the first `memory` values, then one in which old values fade."""

    memory: int
    value: float = 0.0
    count: int = 0

    def add(self, value: float) -> None:
        self.count += 1
        self.value += (value - self.value) / min(self.count, self.memory)


@dataclass(slots=True)
class _Pause:
    """Steps until something that did not pay is tried again; each pause doubles the next one."""

    shortest: int
    longest: int
    left: int = 0
    next: int = 0

    def begin(self) -> None:
        self.left = max(self.next, self.shortest)
        self.next = min(2 * self.left, self.longest)


@dataclass(slots=True)
class _SequenceRecord:
    gain: float  # tokens per draft, less the cost of verifying its nodes
    pause: _Pause = field(default_factory=lambda: _Pause(*_SEQUENCE_PAUSES))


@dataclass(slots=True)
class _DrafterRecord:
    """Of one drafter, in greedy or in sampled requests. Seconds are per sequence and step."""

    draft_seconds: Mean = field(default_factory=lambda: Mean(_DRAFTER_MEMORY))
    observe_seconds: Mean = field(default_factory=lambda: Mean(_DRAFTER_MEMORY))
    gain: Mean = field(default_factory=lambda: Mean(_DRAFTER_MEMORY))  # tokens per draft
    pause: _Pause = field(default_factory=lambda: _Pause(*_DRAFTER_PAUSES))


class SpeculationController:
    """`max_nodes` is the largest tree, root included. Without `costs` nothing is left out, neither
    a sequence, nor a drafter, nor a node."""

    def __init__(self, max_nodes: int, costs: CostModel | None) -> None:
        self._max_nodes = max_nodes
        self._costs = costs
        self._sequences: dict[str, _SequenceRecord] = {}
        self._gain = 1.0  # mean over all sequences; before the first draft, an arbitrary value
        self._draft_seconds = 0.0  # of drafting for one sequence, by all drafters
        self._drafted_for: set[str] = set()  # sequences, in this step
        self._context = 0.0  # mean number of tokens of the sequences of this step
        self._drafters: defaultdict[tuple[str, bool], _DrafterRecord] = defaultdict(_DrafterRecord)
        self._step_seconds = Mean(_DRAFTER_MEMORY)
        self._step_tokens = Mean(_DRAFTER_MEMORY)
        self._seconds = self._forward_seconds = 0.0  # of all steps before this one

    def budgets(self, seqs: Sequence[SequenceState], spare_rows: int) -> list[int]:
        """The largest tree per sequence, in nodes, root included; 1 if it is not drafted for.

        `spare_rows`, the rows of all drafted nodes together, are divided evenly. A sequence is
        drafted for if its earlier drafts gained more than the batch would have emitted in the time
        of drafting; otherwise it is tried again after a pause.
        """
        share = spare_rows // len(seqs) if seqs else 0
        budgets = [1 + min(self._max_nodes - 1, share, _useful_nodes(seq)) for seq in seqs]
        if self._costs is None or not seqs:
            return budgets
        for record in self._drafters.values():
            record.pause.left -= record.pause.left > 0
        self._context = sum(seq.num_committed for seq in seqs) / len(seqs)
        step = self._costs.seconds(len(seqs), len(seqs), self._context)[0]
        needed = self._draft_seconds * len(seqs) / step
        chosen = [
            budget if budget > 1 and self._pays(seq.id, needed) else 1
            for seq, budget in zip(seqs, budgets, strict=True)
        ]
        self._drafted_for = {seq.id for seq, budget in zip(seqs, chosen, strict=True) if budget > 1}
        return chosen

    def is_expensive(self, drafter: str, sampled: bool) -> bool:
        """Whether the drafter takes so long that it is only used where it pays."""
        seconds = self._drafters[drafter, sampled].draft_seconds.value
        return self._costs is not None and seconds > _FREE * self._step_seconds.value

    def is_paused(self, drafter: str, sampled: bool) -> bool:
        """Whether an expensive drafter is left out for now, because it did not pay."""
        return self._drafters[drafter, sampled].pause.left > 0

    def select_nodes(self, plan: StepPlan, trees: dict[str, DraftTree]) -> dict[str, DraftTree]:
        """The trees, by sequence id, without the nodes that are not worth verifying."""
        if self._costs is None:
            return trees
        num_rows = sum(entry.num_prefill + (entry.num_nodes > 0) for entry in plan.entries)
        return select_nodes(trees, self._costs, num_rows, _mean_context(plan.decoding))

    def record_draft_time(self, drafter: str, sampled: bool, seconds: float) -> None:
        """Learn from the time that a drafter needs to draft for one sequence."""
        self._drafters[drafter, sampled].draft_seconds.add(seconds)

    def record_observe_time(self, drafter: str, sampled: bool, seconds: float) -> None:
        """Learn from the time that a drafter needs to observe a step of one sequence."""
        self._drafters[drafter, sampled].observe_seconds.add(seconds)

    def record_gain(self, drafter: str, sampled: bool, gain: float) -> None:
        """Learn that `gain` more tokens were emitted than without this drafter.

        The drafter is paused if the mean gain does not pay for its time.
        """
        record = self._drafters[drafter, sampled]
        record.gain.add(gain)
        if record.gain.count < _SHORT_TRIAL or not self._step_seconds.value:
            return
        seconds = record.draft_seconds.value + record.observe_seconds.value
        needed = _MARGIN * seconds / self._step_seconds.value * self._step_tokens.value
        on_trial = record.gain.count < _TRIAL
        if record.gain.value < (_HOPELESS if on_trial else 1.0) * needed:
            record.pause.begin()
            record.gain = Mean(_DRAFTER_MEMORY)
        elif not on_trial:
            record.pause.next = 0

    def record_step(
        self,
        plan: StepPlan,
        trees: Mapping[str, DraftTree],
        results: Mapping[str, VerifyResult],
        seconds: Mapping[str, float],
        propose_seconds: float,
    ) -> None:
        """Learn from a verified step; `trees` and `results` are by sequence id.

        `seconds` is the time spent so far in all steps, by stage; one stage is "forward".
        """
        if self._costs is None:
            return
        step = sum(seconds.values()) - self._seconds
        forward = seconds["forward"] - self._forward_seconds
        self._seconds, self._forward_seconds = sum(seconds.values()), seconds["forward"]
        host = step - forward
        self._costs.record_host(host)
        entries = plan.decoding
        if entries and not any(entry.num_prefill for entry in plan.entries):
            num_rows = sum(len(trees[entry.seq.id]) for entry in entries)
            self._costs.record_pass(num_rows, _mean_context(entries), forward)
            self._step_seconds.add(step)
            self._step_tokens.add(sum(len(result.emitted) for result in results.values()))
        drafted_for = [seq_id for seq_id in self._drafted_for if seq_id in results]
        if drafted_for:
            self._record_drafts(self._costs, trees, drafted_for, propose_seconds)

    def forget(self, seq_id: str) -> None:
        self._sequences.pop(seq_id, None)

    def _record_drafts(
        self,
        costs: CostModel,
        trees: Mapping[str, DraftTree],
        drafted_for: Sequence[str],
        seconds: float,
    ) -> None:
        """Learn what drafting gained per sequence: expected tokens, less the cost of the nodes.

        The expected number is less noisy than the accepted one and has the same mean.
        """
        self._draft_seconds += (seconds / len(drafted_for) - self._draft_seconds) / (
            _SEQUENCE_MEMORY if self._draft_seconds else 1
        )
        num_nodes = sum(len(tree) for tree in trees.values()) - len(trees)
        costs_by_nodes = costs.seconds(len(trees), len(trees) + num_nodes, self._context)
        more = costs_by_nodes[-1] / costs_by_nodes[0] - 1.0
        tokens_per_node = more * len(trees) / max(num_nodes, 1)
        for seq_id in drafted_for:
            tree = trees[seq_id]
            gain = sum(tree.path_probs.tolist()) - 1.0 - tokens_per_node * (len(tree) - 1)
            record = self._sequences.setdefault(seq_id, _SequenceRecord(self._gain))
            record.gain += (gain - record.gain) / _SEQUENCE_MEMORY
            self._gain += (gain - self._gain) / _ALL_MEMORY

    def _pays(self, seq_id: str, needed: float) -> bool:
        """Whether a sequence is drafted for, where a gain of `needed` tokens would break even."""
        record = self._sequences.get(seq_id)
        if record is None:
            return True
        pause = record.pause
        if record.gain >= needed:
            pause.left = pause.next = 0
            return True
        if pause.left == 0:
            pause.begin()
            return True
        pause.left -= 1
        return False


def _mean_context(entries: Sequence[Entry]) -> float:
    """The mean number of tokens before the rows of a forward pass."""
    return sum(entry.seq.num_committed for entry in entries) / max(len(entries), 1)


def _useful_nodes(seq: SequenceState) -> int:
    """Drafted nodes that a request has a use for: none if one more token ends it."""
    wanted = seq.request.speculation
    if not wanted.enabled:
        return 0
    remaining = max(0, seq.request.sampling.max_tokens - seq.num_output - 1)
    return remaining if wanted.max_nodes is None else min(remaining, wanted.max_nodes - 1)
