"""Divides the engine between tenants: places, KV blocks and time in each forward pass. Host only.

There are `max_num_seqs` places for running sequences. With one tenant nothing here has an effect. A
tenant may use what the others leave unused; contended resources follow four rules. (1) A free
place goes to the tenant with the fewest running sequences, then to the one served least. (2) A
tenant with at least two running sequences fewer than another takes one of its places: the other's
last sequence is preempted. (3) A tenant adds to a pass no more time than the pass takes for any
other tenant, plus its unused time from earlier passes: its sequences decode in turns, and its
prompts are computed in small chunks. The time to draw tokens counts, too: it is measured per
tenant, because it depends on the sampling parameters. (4) A pass that computes the short prompts of
one tenant may leave out tenants with longer prompts or more sequences, see `give_way`.
"""

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from specserve.fair_share import ServiceCounters
from specserve.sequence import SequenceState, Status
from specserve.speculation.cost_model import CostModel

# The only running sequence of a tenant may be preempted for a tenant that runs none as soon as it
# has emitted, since its admission, at least _QUANTUM tokens and at least one token for each
# _RECOMPUTED_PER_TOKEN tokens that have to be recomputed after the preemption.
_QUANTUM: Final = 32
_RECOMPUTED_PER_TOKEN: Final = 8
_FIXED_PASS_ROWS: Final = 16  # fixed cost of a pass, in rows, where costs were not measured
_HEAVY_TENANT_FACTOR: Final = 0.5  # on the time of a tenant that runs more sequences than another
_DRAW_MEMORY: Final = 4.0  # passes over which the time to draw a token is averaged
_CHUNK: Final = 8  # rows: a prompt chunk that this limits is rounded down to a multiple
_LARGEST_CHUNK: Final = 512  # most prompt rows of a tenant in a pass shared with others
_RECENT_PASSES: Final = 256  # passes: how long a tenant that left counts as likely to return
# Rows: while another tenant may return, a pass of a lone tenant takes at most as long as one with
# this many rows and little context.
_LONE_TENANT_ROWS: Final = 64


@dataclass(slots=True)
class _Tenant:
    num_seqs: int = 0  # waiting and running
    # By descending priority, then arrival.
    running: list[SequenceState] = field(default_factory=list)
    credit: float = math.inf  # seconds that it may add to passes shared with others
    draw_seconds: float = 0.0  # to draw the tokens of one sequence in a pass, on average
    score_seconds: float = 0.0  # of a prompt row, to compute logprobs of the prompt, on average
    shares_pass: bool = False  # whether the pass being planned has rows of other tenants
    gives_way: bool = False  # whether the pass being planned leaves out its prompts, see `give_way`
    # Cost of that pass by number of rows that this tenant adds.
    pass_seconds_by_rows: list[float] = field(default_factory=list)
    seen_at: int = 0  # number of the latest planned pass in which it was present


class Tenants:
    """The state of every tenant seen so far, by the `tenant` of its requests."""

    def __init__(self, max_rows: int, costs: CostModel | None) -> None:
        self._max_rows = max_rows
        self._costs = costs
        self._all: dict[str, _Tenant] = {}
        self._service = ServiceCounters()
        self._num_planned = 0
        self._num_turns = 0  # turns given to sequences to decode, see `SequenceState.last_turn`
        self.present: set[str] = set()  # tenants with a sequence waiting or running

    @property
    def several(self) -> bool:
        return len(self.present) > 1

    def arrive(self, tenant: str) -> None:
        """A new sequence of this tenant is waiting."""
        its = self._all.setdefault(tenant, _Tenant())
        if its.num_seqs == len(its.running):
            self._service.join(tenant, [name for name in self.present if self._waits(name)])
        its.num_seqs += 1
        self.present.add(tenant)

    def leave(self, tenant: str) -> None:
        """A sequence of this tenant is finished; if it was running, `stop` was called before."""
        its = self._all[tenant]
        its.num_seqs -= 1
        if not its.num_seqs:
            self.present.discard(tenant)
            self._service.forget(self.present)

    def start(self, seq: SequenceState, running: Iterable[SequenceState]) -> None:
        """`seq` was admitted. `running`: all running sequences, by priority, then arrival."""
        tenant = seq.request.tenant
        self._all[tenant].running = [s for s in running if s.request.tenant == tenant]
        self._service.take(tenant, seq.num_pending, waiting=any(map(self._waits, self.present)))

    def stop(self, seq: SequenceState) -> None:
        """`seq` no longer runs: it is finished or preempted."""
        self._all[seq.request.tenant].running.remove(seq)

    def charge(self, tenant: str, num_tokens: int) -> None:
        """`num_tokens` were emitted for this tenant."""
        self._service.charge(tenant, num_tokens)

    def service_order(self) -> list[str]:
        """The present tenants in order of service: fewest running, then least served, first."""
        if len(self.present) == 1:
            return list(self.present)
        return sorted(self.present, key=lambda name: (self._running(name), self._served(name)))

    def last_in_line(self, arrivals: dict[str, tuple[int, int]]) -> SequenceState:
        """The sequence to preempt first when KV blocks are short.

        It is the one with the lowest priority, and of these the latest, of the tenant with the most
        running sequences. If tenants run equally many, the later of their candidates is chosen.
        `arrivals`: (-priority, arrival) by sequence id.
        """
        lasts = [its.running[-1] for its in self._all.values() if its.running]
        return max(lasts, key=lambda seq: (self._running(seq.request.tenant), arrivals[seq.id][1]))

    def victim_for(self, tenant: str) -> SequenceState | None:
        """The sequence to preempt for `tenant`, or None if it may not take a place.

        The candidate is the last sequence of the other tenant that runs the most. It is preempted
        if that tenant runs at least two more, or if `tenant` runs none and the candidate has
        emitted enough tokens since its admission (`_may_be_preempted`).
        """
        others = [its for name, its in self._all.items() if name != tenant and its.running]
        if not others:
            return None
        most = max(others, key=lambda its: len(its.running))
        victim, own = most.running[-1], self._running(tenant)
        if len(most.running) >= own + 2 or (own == 0 and _may_be_preempted(victim)):
            return victim
        return None

    def is_within_share(self, tenant: str, num_blocks: int, total: int) -> bool:
        """Whether its blocks and `num_blocks` more are at most its equal share of `total`."""
        held = sum(len(seq.table.block_ids) for seq in self._all[tenant].running)
        return (held + num_blocks) * len(self.present) <= total

    def is_next(self, tenant: str) -> bool:
        """Whether it runs no sequence and was served least of those present."""
        return not self._running(tenant) and min(self.present, key=self._served) == tenant

    @property
    def shared(self) -> bool:
        """Whether more than one tenant has been seen so far."""
        return len(self._all) > 1

    def begin_pass(self) -> int:
        """Begin to plan a pass. Returns the number of rows up to which prompts and trees fill it.

        They are fewer for a tenant that is alone if another was present within the last
        `_RECENT_PASSES` passes, because a request of that other has to wait for the pass to end.
        """
        if not self.shared:
            return self._max_rows
        self._num_planned += 1
        for tenant in self.present:
            its = self._all[tenant]
            its.seen_at = self._num_planned
            its.gives_way = its.gives_way and self.several
        recent = sum(its.seen_at > self._num_planned - _RECENT_PASSES for its in self._all.values())
        if recent < 2 or len(self.present) != 1:
            return self._max_rows
        (tenant,) = self.present
        running = self._all[tenant].running
        prompts = [seq for seq in running if seq.num_pending > 1]  # they add most of the rows
        longest = self._cost(_LONE_TENANT_ROWS, _LONE_TENANT_ROWS, 0.0)[0]
        seconds = self._cost(1, _LONE_TENANT_ROWS, _mean_context(prompts or running))
        score_seconds = self._all[tenant].score_seconds
        seconds = [cost + rows * score_seconds for rows, cost in enumerate(seconds)]
        least = len(running) - len(prompts) + _CHUNK
        return min(self._max_rows, max(least, bisect_right(seconds, longest)))

    def give_way(self, ready: list[SequenceState], prompts: dict[str, int]) -> None:
        """Decide which tenants the pass leaves out, so that others get their first tokens sooner.

        `ready`: the sequences that could decode. `prompts`: uncomputed prompt tokens per tenant,
        waiting ones included. The prompts of a tenant are short if the pass has room for all of
        them and its credit pays for them. The prompts of tenants with longer prompts or more
        running sequences are left out, but not twice in a row; their unused credit remains. The
        tenant that `is_next` is never left out, so that its next request can block the admission
        of others until there is room for it.
        """
        room = min(self._max_rows - len(ready), _LARGEST_CHUNK)
        short = {
            tenant
            for tenant, wanted in prompts.items()
            if wanted <= room
            and wanted == self._affordable(self._all[tenant], len(ready), wanted, ready)
        }
        for tenant, its in self._all.items():
            longer = tenant in prompts and tenant not in short
            holds_up_others = any(
                longer or len(its.running) > self._running(other)
                for other in short
                if other != tenant
            )
            its.gives_way = holds_up_others and not its.gives_way and not self.is_next(tenant)

    def decoding(self, ready: list[SequenceState], prompts: dict[str, int]) -> list[SequenceState]:
        """Choose which of the `ready` sequences decode in this pass.

        `prompts`: uncomputed tokens of running prompts, per tenant. The rows of a tenant may add as
        much time as the pass takes for the other tenant with the fewest rows (times
        `_HEAVY_TENANT_FACTOR` if it runs more sequences than another), plus its unused credit from
        earlier passes. If that is not enough for all its sequences, they decode in turns. So the
        load of one tenant does not reduce the share of time of another. No sequence decodes of a
        tenant that gives way if another one with a prompt runs fewer sequences.
        """
        share = self._max_rows // max(len(prompts), 1)
        roots = {tenant: [s for s in ready if s.request.tenant == tenant] for tenant in self._all}
        rows = {
            tenant: len(roots[tenant]) + min(prompts.get(tenant, 0), share)
            for tenant in self.present
        }
        chosen: list[SequenceState] = []
        for tenant, its in self._all.items():
            others = [other for other, count in rows.items() if other != tenant and count]
            its.shares_pass, own = bool(others), roots[tenant]
            if its.shares_pass:
                lightest = min(others, key=rows.__getitem__)
                earned = self._add_credit(its, rows[lightest], _mean_context(roots[lightest]))
                runs_more = any(
                    len(its.running) > self._running(other) for other in others if other in prompts
                )
                if its.gives_way and runs_more:
                    own = []
                elif len(own) > rows[lightest] or len(own) * its.draw_seconds > earned:
                    own.sort(key=lambda seq: seq.last_turn)
                    most = self._affordable(its, rows[lightest], len(own), own, its.draw_seconds)
                    own = own[:most]
                    self.spend(tenant, len(own))
            chosen += own
        for seq in chosen:
            self._num_turns += 1
            seq.last_turn = self._num_turns
        return chosen

    def allowances(self, num_roots: int, wanting: dict[str, int]) -> dict[str, int]:
        """Prompt rows that each tenant may add to a pass of `num_roots` decoding sequences.

        `wanting`: prompt rows that each tenant could use.
        """
        allowances: dict[str, int] = {}
        for tenant, wanted in wanting.items():
            its = self._all[tenant]
            rows = 0 if its.gives_way else wanted
            if its.shares_pass and rows:
                most = min(wanted, _LARGEST_CHUNK)
                rows = self._affordable(its, num_roots, most, its.running, its.score_seconds)
                if rows < wanted and num_roots + rows < self._max_rows:
                    rows = rows // _CHUNK * _CHUNK
            allowances[tenant] = rows
        return allowances

    def _affordable(
        self,
        its: _Tenant,
        beside: int,
        wanted: int,
        seqs: list[SequenceState],
        row_seconds: float = 0.0,
    ) -> int:
        """How many of the `wanted` rows the credit pays for, in a pass with `beside` other rows.

        `row_seconds`: what a row takes after the pass, to draw its token or to score it. Stores the
        cost of the pass with 0 .. `wanted` of these rows in `pass_seconds_by_rows`.
        """
        first = max(beside, 1)
        seconds = self._cost(first, first + wanted, _mean_context(seqs))
        seconds = [cost + rows * row_seconds for rows, cost in enumerate(seconds)]
        its.pass_seconds_by_rows = seconds
        return bisect_right(seconds, seconds[0] + its.credit) - 1

    def spend(self, tenant: str, rows: int) -> None:
        """Pay for `rows` of the rows that `_affordable` allowed in this pass."""
        its = self._all[tenant]
        if its.shares_pass and rows:
            seconds = its.pass_seconds_by_rows
            its.credit = max(0.0, its.credit - (seconds[rows] - seconds[0]))

    def record_draws(
        self, draws: Mapping[str, tuple[float, int]], scores: Mapping[str, tuple[float, int]]
    ) -> None:
        """Learn from the latest pass, by tenant: `draws` are the seconds of its draws and its
        sequences, `scores` the seconds in which prompt rows were scored and its prompt rows."""
        if self._costs is None:  # credits are not in seconds
            return
        for tenant, (seconds, num_seqs) in draws.items():
            its = self._all[tenant]
            its.draw_seconds += (seconds / num_seqs - its.draw_seconds) / _DRAW_MEMORY
        for tenant, (seconds, num_rows) in scores.items():
            its = self._all[tenant]
            its.score_seconds += (seconds / num_rows - its.score_seconds) / _DRAW_MEMORY

    def _add_credit(self, its: _Tenant, num_rows: int, context: float) -> float:
        """Add to the credit the seconds of a pass with `num_rows` rows of another tenant.

        `context`: mean context length of those rows, in tokens. The credit is capped at the cost of
        one pass of the largest size, or of a chunk of `_CHUNK` rows if its own contexts make that
        more expensive, and of one sequence to draw for or one chunk to score. Returns the seconds
        added.
        """
        largest = min(self._max_rows, _LARGEST_CHUNK)
        chunk = self._cost(_CHUNK + 1, _CHUNK + 1, _mean_context(its.running))
        extra = max(its.draw_seconds, _CHUNK * its.score_seconds)
        most = max(self._cost(largest, largest, 0.0)[0], chunk[0]) + extra
        earned = self._cost(num_rows, num_rows, context)[0]
        if len(its.running) > min(len(self._all[tenant].running) for tenant in self.present):
            earned *= _HEAVY_TENANT_FACTOR
        its.credit = min(most, its.credit + earned)
        return earned

    def _cost(self, first: int, last: int, context: float) -> list[float]:
        """Cost of steps with `first` .. `last` rows: seconds, or rows if nothing was measured."""
        if self._costs is not None:
            return self._costs.seconds(first, last, context)
        return [float(_FIXED_PASS_ROWS + rows) for rows in range(first, last + 1)]

    def _running(self, tenant: str) -> int:
        return len(self._all[tenant].running)

    def _served(self, tenant: str) -> float:
        return self._service.served(tenant)

    def _waits(self, tenant: str) -> bool:
        its = self._all[tenant]
        return its.num_seqs > len(its.running)


def _may_be_preempted(seq: SequenceState) -> bool:
    """Whether it has emitted enough since its admission to justify recomputing it later."""
    assert seq.status is Status.RUNNING
    return seq.num_since_admitted >= max(_QUANTUM, seq.num_tokens // _RECOMPUTED_PER_TOKEN)


def _mean_context(seqs: list[SequenceState]) -> float:
    """Mean context length of `seqs`, in tokens."""
    return sum(seq.num_committed for seq in seqs) / max(len(seqs), 1)
