"""The plan of one step and its verification results. Host only, no tensors."""

from dataclasses import dataclass

from specserve.sequence import SequenceState
from specserve.types import FinishReason, PromptLogprobs, TokenLogprobs


@dataclass(frozen=True, slots=True)
class Entry:
    """One sequence in one step."""

    seq: SequenceState
    num_prefill: int  # first pending tokens: the prefill chunk, computed without logits
    num_nodes: int  # budget of the tree, root (last pending token) included; 0: the prompt goes on

    @property
    def scored_rows(self) -> range:
        """The rows of the prefill chunk whose next token is a prompt token to be scored.

        Row 0 is the first of the chunk. They are consecutive over the chunks of a prompt, and after
        a preemption go on where they ended.
        """
        seq = self.seq
        if not seq.is_scored:
            return range(0)
        start = seq.num_committed
        end = min(self.num_prefill, seq.num_prompt - 1 - start)
        return range(max(seq.num_scored, 1) - 1 - start, end)


@dataclass(frozen=True, slots=True)
class StepPlan:
    entries: tuple[Entry, ...]

    @property
    def decoding(self) -> list[Entry]:
        """Entries that verify a tree in this step."""
        return [entry for entry in self.entries if entry.num_nodes > 0]


@dataclass(frozen=True, slots=True)
class FinishInfo:
    """Why a request ends. `stop_reason` is the stop string or token id that ended it."""

    reason: FinishReason
    stop_reason: str | int | None = None


@dataclass(frozen=True, slots=True)
class VerifyResult:
    """The verification result of one entry with a tree."""

    path: tuple[int, ...]  # tree nodes whose KV is committed, ascending, the root first
    emitted: tuple[int, ...]
    drafter_ids: tuple[int, ...]  # drafter id per emitted token, see `tree.TARGET_ID`
    num_accepted: int  # emitted tokens that the tree proposed
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish: FinishInfo | None = None  # None: the request continues
    error: str | None = None  # why the request fails, or None


Results = dict[str, VerifyResult]  # by sequence id
# By sequence id, the logprobs of the next prompt tokens, or why they cannot be computed.
Scores = dict[str, PromptLogprobs | str]
