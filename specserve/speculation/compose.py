"""Several drafters, one tree: every proposal calibrated and merged, the best nodes kept whoever
proposed them. What drafters do wrong stays here; see `failures`.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from specserve.sequence import SequenceView
from specserve.speculation.calibration import Calibration
from specserve.speculation.counts import DrafterCounts
from specserve.speculation.drafter import Drafter, Feedback
from specserve.speculation.drafter_gate import Worth
from specserve.speculation.failures import Failures
from specserve.speculation.prediction import PredictedTexts
from specserve.tree import MAX_NODES, TARGET_ID, DraftTree, root_tree
from specserve_kernels.dispatch import native_host


@dataclass(slots=True)
class _Asking:
    """A sequence in one step, and what was proposed for it."""

    seq: SequenceView
    budget: int
    trees: list[DraftTree] = field(default_factory=list)
    merged: DraftTree | None = None  # of the trees; None: not yet
    # Drafters whose time matters: the name, what the tree of those before promised, and that tree.
    judged: list[tuple[str, float, DraftTree]] = field(default_factory=list)

    def propose(self, tree: DraftTree) -> None:
        self.trees.append(tree)
        self.merged = None


class ComposedDrafter:
    """Not a drafter itself: the engine's one way to talk to all of them."""

    def __init__(
        self, drafters: dict[str, Drafter], vocab_size: int, worth: Worth | None = None
    ) -> None:
        """`worth`: of several drafters only those are asked that earn their time."""
        self._worth = worth if len(drafters) > 1 else None
        self.names = tuple(drafters)
        self.drafters = drafters
        # Drafters that want to follow the target's rows.
        self._followers = {name for name, drafter in drafters.items() if drafter.aux_layers}
        self._drafter_ids = {
            name: np.array([TARGET_ID] + [drafter_id] * (MAX_NODES - 1), np.uint8)
            for drafter_id, name in enumerate(drafters, start=1)
        }
        self._vocab_size = vocab_size
        self._failures = Failures()
        self.counts = DrafterCounts(len(drafters))
        self._calibration = Calibration()
        self._predictions = None if set(drafters) == {"none"} else PredictedTexts()
        self._asking: dict[str, _Asking] = {}  # in this step, by sequence id
        self._left_out: dict[str, frozenset[str]] = {}  # drafters, by sequence id
        self._begun = 0.0  # this step, in seconds
        host = native_host()
        self._validate = DraftTree.validate if host is None else host.validate

    @property
    def active(self) -> list[str]:
        return [name for name in self.names if name not in self._failures.off]

    @property
    def num_failures(self) -> dict[str, int]:
        """Calls that failed, by drafter."""
        return {name: self._failures.counts[name] for name in self.names}

    def propose(self, seqs: Sequence[SequenceView], budgets: Sequence[int]) -> list[DraftTree]:
        """One merged tree per sequence, within its budget. Budget 1 asks nobody.

        Its path probabilities are calibrated: what the drafters' records make of what they claim.
        """
        asking = [_Asking(seq, budget) for seq, budget in zip(seqs, budgets, strict=True)]
        self._begun = time.perf_counter()
        if self._worth is not None:
            self._worth.begin_step()
        for name in self.active:
            asked = [one for one in asking if one.budget > 1 and self._asks(name, one)]
            if asked:
                self._ask(name, {one.seq.id: one for one in asked})
        self._add_predictions(asking)
        self._asking = {one.seq.id: one for one in asking}
        return [self._merged(one) for one in asking]

    def wants_aux_hidden_states(self, seqs: Sequence[SequenceView]) -> bool:
        """Whether somebody follows the target's rows in a pass over these."""
        return any(name in self._followers and self._hears(name, seqs) for name in self.active)

    def _hears(self, name: str, seqs: Sequence[SequenceView]) -> bool:
        return any(name not in self._left_out_of(seq) for seq in seqs)

    def _asks(self, name: str, one: "_Asking") -> bool:
        seq, worth = one.seq, self._worth
        if self._failures.leaves_out(name, seq.id):
            return False
        drafters = seq.speculation.drafters
        if drafters is not None:
            return name in drafters
        if worth is None:
            return True
        if name in self._left_out_of(seq):
            return False
        if not worth.is_dear(name, sampled := not seq.greedy):
            return True
        before = self._merged(one)
        promised = float(before.path_probs.sum())
        if not worth.asks(name, sampled, promised):
            return False
        one.judged.append((name, promised, before))
        return True

    def _merged(self, one: "_Asking") -> DraftTree:
        """What was proposed so far as one tree."""
        if one.merged is None:
            one.merged = (
                self._calibration.merged(not one.seq.greedy, one.trees, one.budget)
                if one.trees
                else root_tree(one.seq.tokens[-1])
            )
        return one.merged

    def _left_out_of(self, seq: SequenceView) -> frozenset[str]:
        """Drafters that follow the target's rows, and were paused when the request came.

        For such following is a part of the price. What they miss of a text they cannot make up
        for, so they are tried again in another request.
        """
        if (out := self._left_out.get(seq.id)) is None:
            paused: list[str] = []
            if self._worth is not None and seq.speculation.drafters is None:
                paused = [
                    name
                    for name in self._followers
                    if not self._worth.follows(name, sampled=not seq.greedy)
                ]
            out = self._left_out[seq.id] = frozenset(paused)
        return out

    def _judge(self, worth: Worth, one: "_Asking", tree: DraftTree, emitted: Sequence[int]) -> None:
        """What each of the dear ones added; the others' tree is cut to the size of this one."""
        after = len(emitted)
        for name, promised, before in reversed(one.judged):
            without = _num_emitted(before, len(tree), emitted)
            worth.judge(name, not one.seq.greedy, promised, after - without)
            after = without

    def observe(self, feedback: Feedback) -> None:
        verified = [feedback.trees[seq_id] for seq_id in feedback.results]
        self.counts.settle(verified, feedback.results.values())
        for entry in feedback.entries:
            seq, result = entry.seq, feedback.results.get(entry.seq.id)
            if result is not None and (one := self._asking[seq.id]).trees:
                self._calibration.record_outcome(not seq.greedy, one.trees, result.emitted)
                if self._worth is not None:
                    self._judge(self._worth, one, feedback.trees[seq.id], result.emitted)
        seqs = [entry.seq for entry in feedback.entries]
        for name in self.active:
            if self._hears(name, seqs):
                started = time.perf_counter()
                self._tell(name, feedback)
                if self._worth is not None:
                    seconds = (time.perf_counter() - started) / len(seqs)
                    for sampled in {not seq.greedy for seq in seqs}:
                        self._worth.followed(name, sampled, seconds)
        if (
            self._worth is not None
            and verified
            and not any(e.num_prefill for e in feedback.entries)
        ):
            num_tokens = sum(len(result.emitted) for result in feedback.results.values())
            self._worth.end_step(time.perf_counter() - self._begun, num_tokens)

    def forget(self, seq_id: str) -> None:
        self._left_out.pop(seq_id, None)
        if self._predictions is not None:
            self._predictions.forget(seq_id)
        for name, drafter in self.drafters.items():
            self._failures.call(name, "forget", [seq_id], partial(_forget, drafter))
        self._failures.forget(seq_id)

    def _add_predictions(self, asking: Sequence["_Asking"]) -> None:
        if self._predictions is None:
            return
        for one in asking:
            if one.budget <= 1:
                continue
            if (tree := self._predictions.propose(one.seq, one.budget)) is not None:
                self.counts.propose([tree])
                one.propose(tree)

    def _ask(self, name: str, asked: dict[str, "_Asking"]) -> None:
        """Adds the drafter's trees to those who asked, by sequence id."""

        def ask(seq_ids: Sequence[str]) -> None:
            asking, started = [asked[seq_id] for seq_id in seq_ids], time.perf_counter()
            seqs, budgets = tuple(o.seq for o in asking), tuple(o.budget for o in asking)
            proposed = list(self.drafters[name].propose(seqs, budgets))
            trees = [
                self._checked(name, one, tree) for one, tree in zip(asking, proposed, strict=True)
            ]
            self.counts.propose(trees)
            for one, tree in zip(asking, trees, strict=True):
                if len(tree) > 1:
                    one.propose(tree)
            if self._worth is not None:
                seconds = (time.perf_counter() - started) / len(seqs)
                for sampled in {not seq.greedy for seq in seqs}:
                    self._worth.took(name, sampled, seconds)

        self._failures.call(name, "propose", tuple(asked), ask)

    def _checked(self, name: str, one: "_Asking", tree: DraftTree) -> DraftTree:
        """A copy, as the drafter may have kept what it gave; its nodes count for that drafter.

        Raises ValueError unless it is a tree for this sequence.
        """
        tokens = np.array(tree.tokens, np.int32)
        own = DraftTree(
            tokens,
            np.array(tree.parents, np.int16),
            np.array(tree.path_probs, np.float32),
            self._drafter_ids[name][: len(tokens)],
        )
        self._validate(own, self._vocab_size, one.budget)
        if tokens[0] != one.seq.tokens[-1]:
            raise ValueError("the root is not the sequence's last token")
        return own

    def _tell(self, name: str, feedback: Feedback) -> None:
        def tell(seq_ids: Sequence[str]) -> None:
            self.drafters[name].observe(feedback.only(seq_ids))

        seq_ids = [entry.seq.id for entry in feedback.entries]
        heard = tuple(s for s in seq_ids if not self._failures.leaves_out(name, s))
        if heard:
            self._failures.call(name, "observe", heard, tell)


def _forget(drafter: Drafter, seq_ids: Sequence[str]) -> None:
    for seq_id in seq_ids:
        drafter.forget(seq_id)


def _num_emitted(tree: DraftTree, num_nodes: int, emitted: Sequence[int]) -> int:
    """Tokens of a pass over the best `num_nodes` of a tree, where the target drew `emitted`."""
    node = count = 0
    for token in emitted:
        child = tree.child_of.get((node, token))
        if child is None or (tree.path_probs > tree.path_probs[child]).sum() >= num_nodes:
            break
        node, count = child, count + 1
    return count + 1
