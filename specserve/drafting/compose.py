"""Several drafters, one tree: every proposal calibrated and merged, the best nodes kept whoever
proposed them.

A drafter that raises is left out of that step, and out of the run after `MAX_FAILURES` in a row
of one of its methods: a broken draft costs speed, never a request.
"""

import logging
import time
from collections import Counter
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Final

from specserve.drafting.base import Drafter, Feedback
from specserve.drafting.calibration import Calibration
from specserve.drafting.counts import SourceCounts
from specserve.drafting.prediction import PredictedTexts
from specserve.drafting.worth import Worth
from specserve.sequence import Sequence
from specserve.step import Entry
from specserve.tree import DraftTree, root_tree
from specserve_kernels.dispatch import native_host

MAX_FAILURES: Final = 3
logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Asking:
    """A sequence in one step, and what was proposed for it."""

    seq: Sequence
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
        self._vocab_size = vocab_size
        self._failures: Counter[tuple[str, str]] = Counter()  # in a row, by name and method
        self._off: set[str] = set()
        self.counts = SourceCounts(len(drafters))
        self._calibration = Calibration()
        self._predictions = None if set(drafters) == {"none"} else PredictedTexts()
        self._asking: dict[str, _Asking] = {}  # in this step, by sequence id
        self._left_out: dict[str, frozenset[str]] = {}  # drafters, by sequence id
        self._begun = 0.0  # this step, in seconds
        host = native_host()
        self._validate = DraftTree.validate if host is None else host.validate

    @property
    def active(self) -> list[str]:
        return [name for name in self.names if name not in self._off]

    def propose(self, seqs: Seq[Sequence], budgets: Seq[int]) -> list[DraftTree]:
        """One merged tree per sequence, within its budget. Budget 1 asks nobody.

        Its scores are calibrated: what the drafters' records make of what they claim.
        """
        asking = [_Asking(seq, budget) for seq, budget in zip(seqs, budgets, strict=True)]
        self._begun = time.perf_counter()
        if self._worth is not None:
            self._worth.begin_step()
        for name in self.active:
            asked = [one for one in asking if one.budget > 1 and self._asks(name, one)]
            if asked:
                trees = self._ask(name, [o.seq for o in asked], [o.budget for o in asked])
                for one, tree in zip(asked, trees, strict=False):
                    if len(tree) > 1:
                        one.propose(tree)
        self._add_predictions(asking)
        self._asking = {one.seq.id: one for one in asking}
        return [self._merged(one) for one in asking]

    def wants_taps(self, entries: Seq[Entry]) -> bool:
        """Whether somebody follows the target's rows in a pass over these."""
        return any(
            self.drafters[name].needs_taps and self._hears(name, entries) for name in self.active
        )

    def _hears(self, name: str, entries: Seq[Entry]) -> bool:
        return any(name not in self._left_out_of(entry.seq) for entry in entries)

    def _asks(self, name: str, one: "_Asking") -> bool:
        seq, worth = one.seq, self._worth
        drafters = seq.request.speculation.drafters
        if drafters is not None:
            return name in drafters
        if worth is None:
            return True
        if name in self._left_out_of(seq):
            return False
        if not worth.is_dear(name, noisy := _is_noisy(seq)):
            return True
        before = self._merged(one)
        promised = float(before.scores.sum())
        if not worth.asks(name, noisy, promised):
            return False
        one.judged.append((name, promised, before))
        return True

    def _merged(self, one: "_Asking") -> DraftTree:
        """What was proposed so far as one tree."""
        if one.merged is None:
            one.merged = (
                self._calibration.merged(one.seq.id, _is_noisy(one.seq), one.trees, one.budget)
                if one.trees
                else root_tree(one.seq.tokens[-1])
            )
        return one.merged

    def _left_out_of(self, seq: Sequence) -> frozenset[str]:
        """Drafters that follow the target's rows, and were paused when the request came.

        For such following is a part of the price. What they miss of a text they cannot make up
        for, so they are tried again in another request.
        """
        if (out := self._left_out.get(seq.id)) is None:
            paused: list[str] = []
            if self._worth is not None and seq.request.speculation.drafters is None:
                noisy = _is_noisy(seq)
                paused = [
                    name
                    for name, drafter in self.drafters.items()
                    if drafter.needs_taps and not self._worth.follows(name, noisy)
                ]
            out = self._left_out[seq.id] = frozenset(paused)
        return out

    def _judge(self, worth: Worth, one: "_Asking", tree: DraftTree, emitted: Seq[int]) -> None:
        """What each of the dear ones added; the others' tree is cut to the size of this one."""
        after = len(emitted)
        for name, promised, before in reversed(one.judged):
            without = _num_emitted(before, len(tree), emitted)
            worth.judge(name, _is_noisy(one.seq), promised, after - without)
            after = without

    def observe(self, feedback: Feedback) -> None:
        verified = [feedback.trees[seq_id] for seq_id in feedback.verdicts]
        self.counts.settle(verified, feedback.verdicts.values())
        for entry in feedback.entries:
            seq, verdict = entry.seq, feedback.verdicts.get(entry.seq.id)
            if verdict is not None and (one := self._asking[seq.id]).trees:
                self._calibration.settle(seq.id, _is_noisy(seq), one.trees, verdict.emitted)
                if self._worth is not None:
                    self._judge(self._worth, one, feedback.trees[seq.id], verdict.emitted)
        for name in self.active:
            if not self._hears(name, feedback.entries):
                continue
            started = time.perf_counter()
            try:
                self.drafters[name].observe(feedback)
                self._failures[name, "observe"] = 0
            except Exception:
                self._failed(name, "observe")
            if self._worth is not None:
                seconds = (time.perf_counter() - started) / len(feedback.entries)
                for noisy in {_is_noisy(entry.seq) for entry in feedback.entries}:
                    self._worth.followed(name, noisy, seconds)
        if self._worth is not None and verified and not any(e.num_chain for e in feedback.entries):
            num_tokens = sum(len(verdict.emitted) for verdict in feedback.verdicts.values())
            self._worth.end_step(time.perf_counter() - self._begun, num_tokens)

    def forget(self, seq_id: str) -> None:
        self._calibration.forget(seq_id)
        self._left_out.pop(seq_id, None)
        if self._predictions is not None:
            self._predictions.forget(seq_id)
        for name, drafter in self.drafters.items():
            try:
                drafter.forget(seq_id)
                self._failures[name, "forget"] = 0
            except Exception:
                self._failed(name, "forget")

    def _add_predictions(self, asking: Seq["_Asking"]) -> None:
        if self._predictions is None:
            return
        for one in asking:
            if one.budget <= 1:
                continue
            if (tree := self._predictions.propose(one.seq, one.budget)) is not None:
                self.counts.propose([tree])
                one.propose(tree)

    def _ask(self, name: str, seqs: list[Sequence], budgets: list[int]) -> list[DraftTree]:
        """The drafter's trees, checked; none at all if it fails."""
        started = time.perf_counter()
        try:
            trees = self.drafters[name].propose(seqs, budgets)
            if len(trees) != len(seqs):
                raise ValueError(f"{len(trees)} trees for {len(seqs)} sequences")
            for seq, tree, budget in zip(seqs, trees, budgets, strict=True):
                self._validate(tree, self._vocab_size, budget)
                if tree.tokens[0] != seq.tokens[-1]:
                    raise ValueError("the root is not the sequence's last token")
            self.counts.propose(trees)
        except Exception:
            self._failed(name, "propose")
            return []
        self._failures[name, "propose"] = 0
        if self._worth is not None:
            seconds = (time.perf_counter() - started) / len(seqs)
            for noisy in {_is_noisy(seq) for seq in seqs}:
                self._worth.took(name, noisy, seconds)
        return trees

    def _failed(self, name: str, method: str) -> None:
        self._failures[name, method] += 1
        if self._failures[name, method] == MAX_FAILURES:
            self._off.add(name)
        fate = "switched off" if name in self._off else "skipped in this step"
        logger.exception("drafter %r failed in %s (%s)", name, method, fate)


def _num_emitted(tree: DraftTree, num_nodes: int, emitted: Seq[int]) -> int:
    """Tokens of a pass over the best `num_nodes` of a tree, where the target drew `emitted`."""
    node = count = 0
    for token in emitted:
        child = tree.child_of.get((node, token))
        if child is None or (tree.scores > tree.scores[child]).sum() >= num_nodes:
            break
        node, count = child, count + 1
    return count + 1


def _is_noisy(seq: Sequence) -> bool:
    return not seq.request.sampling.greedy
