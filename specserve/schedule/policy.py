"""How many tree nodes each sequence may verify in this step. Host only."""

from collections.abc import Sequence as Seq
from typing import Protocol

from specserve.sequence import Sequence


class Policy(Protocol):
    def budgets(self, seqs: Seq[Sequence], spare_rows: int) -> list[int]:
        """Nodes per sequence, root included (at least 1).

        The roots are paid for; `spare_rows` is what all other nodes may take together.
        """
        ...


class FixedPolicy:
    """The same budget for everyone, shared out evenly when rows are short."""

    def __init__(self, max_nodes: int) -> None:
        self._max_nodes = max_nodes

    def budgets(self, seqs: Seq[Sequence], spare_rows: int) -> list[int]:
        share = spare_rows // len(seqs) if seqs else 0
        return [1 + min(self._max_nodes - 1, share, useful_nodes(seq)) for seq in seqs]


def useful_nodes(seq: Sequence) -> int:
    """Drafted nodes that can still matter to a request: 0 once one more token ends it."""
    wanted = seq.request.speculation
    if not wanted.enabled:
        return 0
    remaining = seq.request.sampling.max_tokens - seq.num_output - 1
    return remaining if wanted.max_nodes is None else min(remaining, wanted.max_nodes - 1)
