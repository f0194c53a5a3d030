"""The state of one request in the engine, and a read-only view of it for drafters.

The meaning of the lengths:

    tokens [0, num_prompt)               the prompt
    tokens [num_prompt, num_tokens)      emitted
    tokens [0, num_committed)            committed: their target KV is valid
    tokens [num_committed, num_tokens)   pending; the last of them is the root of the next tree
"""

import enum
from dataclasses import dataclass, field

from specserve.cache.table import BlockTable, TableView
from specserve.read_only import ReadOnlyList
from specserve.types import Request, SpecStats, SpeculationParams


class Status(enum.Enum):
    WAITING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()


@dataclass(slots=True)
class SpecCounts:
    """The running totals from which `SpecStats` are made."""

    num_steps: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    num_emitted: int = 0
    histogram: list[int] = field(default_factory=list)
    drafted_by_depth: list[int] = field(default_factory=list)

    def record(self, drafted: int, draft_depth: int, accepted: int, emitted: int) -> None:
        """Count one verification: its drafted nodes without the root, and the depth of the deepest.

        `accepted` drafted tokens were accepted, and `emitted` tokens emitted.
        """
        self.num_steps += 1
        self.num_drafted += drafted
        self.num_accepted += accepted
        self.num_emitted += emitted
        self.histogram.extend([0] * (accepted + 1 - len(self.histogram)))
        self.histogram[accepted] += 1
        self.drafted_by_depth.extend([0] * (draft_depth - len(self.drafted_by_depth)))
        for depth in range(draft_depth):
            self.drafted_by_depth[depth] += 1

    def freeze(self) -> SpecStats:
        depths = range(1, len(self.histogram))
        return SpecStats(
            num_spec_steps=self.num_steps,
            num_draft_tokens=self.num_drafted,
            num_accepted_draft_tokens=self.num_accepted,
            num_emitted_tokens=self.num_emitted,
            acceptance_histogram=tuple(self.histogram),
            drafted_by_depth=tuple(self.drafted_by_depth),
            accepted_by_depth=tuple(sum(self.histogram[depth:]) for depth in depths),
        )


@dataclass(slots=True, eq=False)
class SequenceState:
    """The mutable state of one request, owned by the scheduler."""

    request: Request
    tokens: list[int]
    table: BlockTable
    status: Status = Status.WAITING
    num_cached: int = 0  # prompt tokens taken from the prefix cache at first admission
    num_preemptions: int = 0
    last_turn: int = 0  # number of its latest decoding turn, see `Tenants.decoding`
    num_when_admitted: int = 0  # `num_tokens` at the latest admission
    num_scored: int = 0  # prompt tokens whose entry of `prompt_logprobs` was returned
    prefix_hashes: list[bytes] = field(default_factory=list)
    counts: SpecCounts = field(default_factory=SpecCounts)

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_output(self) -> int:
        return len(self.tokens) - len(self.request.prompt_ids)

    @property
    def num_since_admitted(self) -> int:
        """Tokens emitted since the latest admission."""
        return len(self.tokens) - self.num_when_admitted

    @property
    def num_committed(self) -> int:
        return self.table.num_committed

    @property
    def is_scored(self) -> bool:
        """Whether logprobs of prompt tokens are still to be computed."""
        wanted = self.request.sampling.prompt_logprobs is not None
        return wanted and self.num_scored < self.num_prompt

    @property
    def num_cacheable(self) -> int:
        """Tokens that may come from the prefix cache: no row that gives a wanted logprob."""
        return max(0, self.num_scored - 1) if self.is_scored else self.num_tokens

    @property
    def num_pending(self) -> int:
        """Tokens without valid KV: 1 while decoding, the root of the next tree."""
        return len(self.tokens) - self.table.num_committed


class SequenceView:
    """A live, read-only view of a sequence, for drafters."""

    __slots__ = ("_seq", "_tokens")

    def __init__(self, seq: SequenceState) -> None:
        self._seq = seq
        self._tokens = ReadOnlyList(seq.tokens)

    @property
    def id(self) -> str:
        return self._seq.request.id

    @property
    def tokens(self) -> ReadOnlyList[int]:
        """Prompt and output. A slice is a copy, so slices should be short."""
        return self._tokens

    @property
    def num_prompt(self) -> int:
        return self._seq.num_prompt

    @property
    def num_tokens(self) -> int:
        return len(self._seq.tokens)

    @property
    def num_output(self) -> int:
        return self._seq.num_output

    @property
    def num_committed(self) -> int:
        return self._seq.table.num_committed

    @property
    def status(self) -> Status:
        return self._seq.status

    @property
    def table(self) -> TableView:
        """A view of the current block table. After a preemption the sequence has a new table."""
        return TableView(self._seq.table)

    @property
    def greedy(self) -> bool:
        return self._seq.request.sampling.greedy

    @property
    def speculation(self) -> SpeculationParams:
        return self._seq.request.speculation

    @property
    def cache_salt(self) -> str:
        return self._seq.request.cache_salt
