"""How many tree nodes each sequence may verify in this step. Host only."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from specserve.sequence import SequenceState
from specserve.speculation.cost_model import PassCosts
from specserve.step import VerifyResult
from specserve.tree import DraftTree

_MEMORY: Final = 16.0  # passes of a sequence that its gain is a mean of
_LONG_MEMORY: Final = 64.0  # passes that what all have in common is a mean of
_PAUSES: Final = (4, 16)  # passes without a draft: the first time, and at most


class Policy(Protocol):
    def budgets(self, seqs: Sequence[SequenceState], spare_rows: int) -> list[int]:
        """Nodes per sequence, root included (at least 1).

        The roots are paid for; `spare_rows` is what all other nodes may take together.
        """
        ...

    def settle(
        self, trees: Mapping[str, DraftTree], results: Mapping[str, VerifyResult], seconds: float
    ) -> None:
        """What came of a pass whose trees took so long to draft; both by sequence id."""
        ...

    def forget(self, seq_id: str) -> None: ...


class FixedPolicy:
    """The same budget for everyone, shared out evenly when rows are short."""

    def __init__(self, max_nodes: int) -> None:
        self._max_nodes = max_nodes

    def budgets(self, seqs: Sequence[SequenceState], spare_rows: int) -> list[int]:
        share = spare_rows // len(seqs) if seqs else 0
        return [1 + min(self._max_nodes - 1, share, useful_nodes(seq)) for seq in seqs]

    def settle(
        self, trees: Mapping[str, DraftTree], results: Mapping[str, VerifyResult], seconds: float
    ) -> None:
        pass

    def forget(self, seq_id: str) -> None:
        pass


@dataclass(slots=True)
class _Record:
    """Of one sequence."""

    gain: float  # tokens a pass that its drafts were good for, less what its nodes cost
    pause: int = 0  # passes until it is tried again
    next_pause: int = _PAUSES[0]


class MeasuredPolicy:
    """The same budget, but only for sequences that are worth the drafters' time.

    That time is gone before anyone sees a proposal, so the proposals before decide: a sequence for
    which they were good for less than what the batch would have emitted meanwhile is left out, and
    tried again after a pause that doubles.
    """

    def __init__(self, max_nodes: int, costs: PassCosts) -> None:
        self._equal = FixedPolicy(max_nodes)
        self._costs = costs
        self._records: dict[str, _Record] = {}
        self._gain = 1.0  # of all sequences; to begin with, any
        self._seconds = 0.0  # of drafting for one sequence
        self._asked: set[str] = set()  # in this step
        self._context = 0.0  # tokens before the rows of this step, in the mean

    def budgets(self, seqs: Sequence[SequenceState], spare_rows: int) -> list[int]:
        budgets = self._equal.budgets(seqs, spare_rows)
        if not seqs:
            return budgets
        self._context = sum(seq.num_committed for seq in seqs) / len(seqs)
        step = self._costs.seconds(len(seqs), len(seqs), self._context)[0]
        meanwhile = self._seconds * len(seqs) / step
        chosen = [
            budget if budget > 1 and self._is_worth(seq.id, meanwhile) else 1
            for seq, budget in zip(seqs, budgets, strict=True)
        ]
        self._asked = {seq.id for seq, budget in zip(seqs, chosen, strict=True) if budget > 1}
        return chosen

    def settle(
        self, trees: Mapping[str, DraftTree], results: Mapping[str, VerifyResult], seconds: float
    ) -> None:
        asked = [seq_id for seq_id in self._asked if seq_id in results]
        if not asked:
            return
        self._seconds += (seconds / len(asked) - self._seconds) / (
            _MEMORY if self._seconds else 1.0
        )
        num_nodes = sum(len(tree) for tree in trees.values()) - len(trees)
        costs = self._costs.seconds(len(trees), len(trees) + num_nodes, self._context)
        price = (costs[-1] / costs[0] - 1.0) * len(trees) / max(num_nodes, 1)  # tokens a node
        for seq_id in asked:
            # What was to be expected of the nodes, not what came of them: the same, less noisy.
            tree = trees[seq_id]
            gain = sum(tree.path_probs.tolist()) - 1.0 - price * (len(tree) - 1)
            record = self._records.setdefault(seq_id, _Record(self._gain))
            record.gain += (gain - record.gain) / _MEMORY
            self._gain += (gain - self._gain) / _LONG_MEMORY

    def forget(self, seq_id: str) -> None:
        self._records.pop(seq_id, None)

    def _is_worth(self, seq_id: str, meanwhile: float) -> bool:
        """`meanwhile`: tokens the batch emits in the time of drafting for one sequence."""
        record = self._records.get(seq_id)
        if record is None:
            return True
        if record.gain >= meanwhile:
            record.pause, record.next_pause = 0, _PAUSES[0]
            return True
        if record.pause == 0:
            record.pause = record.next_pause
            record.next_pause = min(2 * record.next_pause, _PAUSES[1])
            return True
        record.pause -= 1
        return False


def useful_nodes(seq: SequenceState) -> int:
    """Drafted nodes that can still matter to a request: 0 once one more token ends it."""
    wanted = seq.request.speculation
    if not wanted.enabled:
        return 0
    remaining = seq.request.sampling.max_tokens - seq.num_output - 1
    return remaining if wanted.max_nodes is None else min(remaining, wanted.max_nodes - 1)
