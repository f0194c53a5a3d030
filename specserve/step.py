"""What one step plans and what it settles, for the host. No tensors."""

from dataclasses import dataclass
from typing import NamedTuple

from specserve.sequence import Sequence, SequenceView
from specserve.types import FinishReason, TokenLogprobs


@dataclass(frozen=True, slots=True)
class Entry:
    """One sequence in one step.

    `num_chain` pending tokens are computed without looking at their logits; `num_nodes` is the
    budget of the tree that hangs from the last pending token, its root included. 0 nodes: the
    prompt is not finished in this step.
    """

    seq: Sequence
    num_chain: int
    num_nodes: int


class EntryView(NamedTuple):
    """An entry as drafters see it."""

    seq: SequenceView
    num_chain: int
    num_nodes: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    entries: tuple[Entry, ...]

    @property
    def decoding(self) -> list[Entry]:
        """Entries that verify a tree in this step."""
        return [entry for entry in self.entries if entry.num_nodes > 0]


@dataclass(frozen=True, slots=True)
class Ending:
    """Why a request is over. `stop_reason` is the stop string or token id that did it."""

    finish: FinishReason
    stop_reason: str | int | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """What verification settled for one entry with a tree."""

    path: tuple[int, ...]  # tree nodes whose KV is committed, ascending, the root first
    emitted: tuple[int, ...]
    sources: tuple[int, ...]  # per emitted token
    num_accepted: int
    logprobs: tuple[TokenLogprobs, ...] = ()
    ending: Ending | None = None
    error: str | None = None
