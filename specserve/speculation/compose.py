"""Merges the proposals of several drafters into one tree per sequence.

Of all calibrated proposals the nodes of the largest path probability are kept, whichever drafter
proposed them. Errors of drafters do not leave this module; see `failures`.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from specserve.sequence import SequenceView
from specserve.speculation.calibration import new_calibration
from specserve.speculation.controller import SpeculationController
from specserve.speculation.counts import DrafterCounts
from specserve.speculation.drafter import Drafter, Feedback
from specserve.speculation.failures import Failures
from specserve.speculation.prediction import PredictedTexts
from specserve.tree import MAX_NODES, TARGET_ID, DraftTree, root_tree


@dataclass(slots=True)
class _Proposals:
    """What was proposed for one sequence in this step."""

    seq: SequenceView
    budget: int
    trees: list[DraftTree] = field(default_factory=list)
    # Expensive drafters that were used, and the merged tree before each.
    expensive: list[tuple[str, DraftTree]] = field(default_factory=list)


class ComposedDrafter:
    """All drafters of an engine, used as one. `controller` decides which of several are used."""

    def __init__(
        self, drafters: Mapping[str, Drafter], vocab_size: int, controller: SpeculationController
    ) -> None:
        self.names = tuple(drafters)
        self.drafters = drafters
        self.counts = DrafterCounts(len(drafters))
        # An only drafter is never left out.
        self._controller = controller if len(drafters) > 1 else SpeculationController(0, None)
        # Drafters that need hidden states of the target, of every token of a text.
        self._followers = {name for name, drafter in drafters.items() if drafter.aux_layers}
        self._drafter_ids = {
            name: np.array([TARGET_ID] + [drafter_id] * (MAX_NODES - 1), np.uint8)
            for drafter_id, name in enumerate(drafters, start=1)
        }
        self._vocab_size = vocab_size
        self._failures = Failures()
        self._calibration = new_calibration()
        self._predictions = None if set(drafters) == {"none"} else PredictedTexts()
        self._proposals: dict[str, _Proposals] = {}  # in this step, by sequence id
        self._unused: dict[str, frozenset[str]] = {}  # drafters that skip a request, by its id

    @property
    def active(self) -> list[str]:
        """The drafters that were not switched off after repeated failures."""
        return [name for name in self.names if name not in self._failures.off]

    @property
    def num_failures(self) -> dict[str, int]:
        """Calls that failed, by drafter."""
        return {name: self._failures.counts[name] for name in self.names}

    def propose(self, seqs: Sequence[SequenceView], budgets: Sequence[int]) -> list[DraftTree]:
        """Return one merged, calibrated tree per sequence, of at most `budgets[i]` nodes.

        The root counts, so a sequence of budget 1 is not drafted for.
        """
        proposals = [_Proposals(seq, budget) for seq, budget in zip(seqs, budgets, strict=True)]
        drafted_for = [each for each in proposals if each.budget > 1]
        for name in self.active:
            chosen = [each for each in drafted_for if self._uses(name, each)]
            if chosen:
                self._call_propose(name, {each.seq.id: each for each in chosen})
        self._add_predictions(drafted_for)
        self._proposals = {each.seq.id: each for each in proposals}
        return [self._merged(each) for each in proposals]

    def wants_aux_hidden_states(self, seqs: Sequence[SequenceView]) -> bool:
        """Whether a drafter needs the hidden states of a forward pass over these sequences."""
        return any(name in self._followers and self._observes(name, seqs) for name in self.active)

    def observe(self, feedback: Feedback) -> None:
        """Learn from a step, and let the drafters learn from it."""
        verified = [feedback.trees[seq_id] for seq_id in feedback.results]
        self.counts.record_outcome(verified, feedback.results.values())
        for seq in feedback.seqs:
            result = feedback.results.get(seq.id)
            if result is not None and (proposals := self._proposals[seq.id]).trees:
                self._calibration.record_outcome(not seq.greedy, proposals.trees, result.emitted)
                self._record_gains(proposals, feedback.trees[seq.id], result.emitted)
        for name in self.active:
            if self._observes(name, feedback.seqs):
                started = time.perf_counter()
                self._call_observe(name, feedback)
                _record_time(self._controller.record_observe_time, name, started, feedback.seqs)

    def forget(self, seq_id: str) -> None:
        """Drop everything kept for a sequence that was finished or preempted."""
        self._unused.pop(seq_id, None)
        if self._predictions is not None:
            self._predictions.forget(seq_id)
        for name in self.drafters:
            self._call_forget(name, seq_id)
        self._failures.forget(seq_id)

    def _uses(self, name: str, proposals: _Proposals) -> bool:
        seq = proposals.seq
        if self._failures.leaves_out(name, seq.id):
            return False
        if seq.speculation.drafters is not None:
            return name in seq.speculation.drafters
        if name in self._unused_by(seq):
            return False
        if not self._controller.is_expensive(name, not seq.greedy):
            return True
        if self._controller.is_paused(name, not seq.greedy):
            return False
        proposals.expensive.append((name, self._merged(proposals)))
        return True

    def _unused_by(self, seq: SequenceView) -> frozenset[str]:
        """Drafters that skip a whole request, because they were paused when it came.

        Only drafters that need the hidden states of every token: copying these takes time as well,
        and a drafter that missed some of them cannot join later.
        """
        if seq.id not in self._unused:
            candidates = self._followers if seq.speculation.drafters is None else ()
            paused = [n for n in candidates if self._controller.is_paused(n, not seq.greedy)]
            self._unused[seq.id] = frozenset(paused)
        return self._unused[seq.id]

    def _observes(self, name: str, seqs: Sequence[SequenceView]) -> bool:
        return any(name not in self._unused_by(seq) for seq in seqs)

    def _merged(self, proposals: _Proposals) -> DraftTree:
        """The trees proposed so far as one."""
        seq, trees = proposals.seq, proposals.trees
        if not trees:
            return root_tree(seq.tokens[-1])
        return DraftTree(*self._calibration.merged(not seq.greedy, trees, proposals.budget))

    def _record_gains(self, proposals: _Proposals, tree: DraftTree, emitted: Sequence[int]) -> None:
        """Record how many tokens each expensive drafter added: those emitted, less what the tree
        before it, pruned to the size of the verified `tree`, would have emitted."""
        sampled, num_emitted = not proposals.seq.greedy, len(emitted)
        for name, before in reversed(proposals.expensive):
            without = _num_emitted(before, len(tree), emitted)
            self._controller.record_gain(name, sampled, num_emitted - without)
            num_emitted = without

    def _add_predictions(self, drafted_for: Sequence[_Proposals]) -> None:
        if self._predictions is None:
            return
        for each in drafted_for:
            if (tree := self._predictions.propose(each.seq, each.budget)) is not None:
                self.counts.propose([tree])
                each.trees.append(tree)

    def _call_propose(self, name: str, proposals: dict[str, _Proposals]) -> None:
        """Add the trees of one drafter; `proposals` are by sequence id."""

        def call(seq_ids: Sequence[str]) -> None:
            chosen, started = [proposals[seq_id] for seq_id in seq_ids], time.perf_counter()
            seqs = tuple(each.seq for each in chosen)
            proposed = list(
                self.drafters[name].propose(seqs, tuple(each.budget for each in chosen))
            )
            drafter_ids, vocab_size = self._drafter_ids[name], self._vocab_size
            trees = [
                checked_tree(tree, each.seq, each.budget, vocab_size, drafter_ids)
                for each, tree in zip(chosen, proposed, strict=True)
            ]
            self.counts.propose(trees)
            for each, tree in zip(chosen, trees, strict=True):
                if len(tree) > 1:
                    each.trees.append(tree)
            _record_time(self._controller.record_draft_time, name, started, seqs)

        self._failures.call(name, "propose", tuple(proposals), call)

    def _call_observe(self, name: str, feedback: Feedback) -> None:
        observe, failures = self.drafters[name].observe, self._failures
        seq_ids = [seq.id for seq in feedback.seqs if not failures.leaves_out(name, seq.id)]
        if seq_ids:
            failures.call(name, "observe", seq_ids, lambda ids: observe(feedback.only(ids)))

    def _call_forget(self, name: str, seq_id: str) -> None:
        drafter = self.drafters[name]
        self._failures.call(name, "forget", [seq_id], lambda _: drafter.forget(seq_id))


def checked_tree(
    tree: DraftTree,
    seq: SequenceView,
    budget: int,
    vocab_size: int,
    drafter_ids: npt.NDArray[np.uint8],
) -> DraftTree:
    """A copy of a drafter's tree, which the drafter cannot change, with other `drafter_ids`.

    Raises ValueError if it is not valid for the sequence.
    """
    tokens = np.array(tree.tokens, np.int32)
    copy = DraftTree(
        tokens,
        np.array(tree.parents, np.int16),
        np.array(tree.path_probs, np.float32),
        drafter_ids[: len(tokens)],
    )
    copy.validate(vocab_size, budget)
    if tokens[0] != seq.tokens[-1]:
        raise ValueError("the root is not the sequence's last token")
    return copy


def _record_time(
    record: Callable[[str, bool, float], None],
    name: str,
    started: float,
    seqs: Sequence[SequenceView],
) -> None:
    seconds = (time.perf_counter() - started) / len(seqs)
    for sampled in {not seq.greedy for seq in seqs}:
        record(name, sampled, seconds)


def _num_emitted(tree: DraftTree, num_nodes: int, emitted: Sequence[int]) -> int:
    """Tokens of `emitted` that verifying the best `num_nodes` of a tree would have emitted."""
    node = count = 0
    for token in emitted:
        child = tree.child_of.get((node, token))
        if child is None or (tree.path_probs > tree.path_probs[child]).sum() >= num_nodes:
            break
        node, count = child, count + 1
    return count + 1
