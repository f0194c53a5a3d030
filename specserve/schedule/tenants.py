"""What tenants share in the engine: places, KV, and the prompt rows of a pass. Host only.

With one tenant nothing here decides anything. A tenant may use what the others do not want; what
they want is shared by three rules. A free place goes to the tenant with the fewest sequences
running, then to the one served least. A tenant that has two fewer than another takes one of its
places, and the other's last in line is preempted. And of a pass one tenant takes no more time than
it takes for any other, and what it left unused before: its sequences take turns, its prompts come
in small pieces.
"""

import math
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from specserve.fair_share import Turns
from specserve.schedule.cost import PassCosts
from specserve.sequence import Sequence, Status

_QUANTUM: Final = 32  # tokens that a sequence emits before it makes way for one of no more
_RECOMPUTED: Final = 8  # tokens that it loses by that, for one that it has emitted since
_ROWS_OF_A_PASS: Final = 16  # that a pass costs beside its own, where nothing was measured
_SHARE: Final = 0.5  # of the time of another in a pass, for who runs more
_CHUNK: Final = 8  # rows; a part of a prompt is a multiple of them
_LARGEST_CHUNK: Final = 512  # rows of a tenant in a pass with others
_LATELY: Final = 256  # passes
_ROWS_OF_A_GUEST: Final = 64  # of prompts, while others may come back at any moment


@dataclass(slots=True)
class _Tenant:
    num_seqs: int = 0  # waiting and running
    running: list[Sequence] = field(default_factory=list)  # by priority, then age
    credit: float = math.inf  # seconds it may add to passes of others
    pays: bool = False  # others are in the pass that is planned
    prices: list[float] = field(default_factory=list)  # of that pass, by rows that it adds
    seen_at: int = 0  # the last pass that was planned with something of it


class Tenants:
    """Every tenant that has been here, by the name its requests carry."""

    def __init__(self, max_rows: int, costs: PassCosts | None) -> None:
        self._max_rows = max_rows
        self._costs = costs
        self._all: dict[str, _Tenant] = {}
        self._turns = Turns()
        self._num_planned = 0
        self._num_turns = 0  # of sequences that decoded beside other tenants
        self.present: set[str] = set()  # that have a sequence waiting or running

    @property
    def several(self) -> bool:
        return len(self.present) > 1

    @property
    def only_one(self) -> bool:
        """There never was another."""
        return len(self._all) <= 1

    def arrive(self, tenant: str) -> None:
        """One more sequence of this tenant waits."""
        its = self._all.setdefault(tenant, _Tenant())
        if its.num_seqs == len(its.running):
            self._turns.join(tenant, [name for name in self.present if self._waits(name)])
        its.num_seqs += 1
        self.present.add(tenant)

    def leave(self, tenant: str) -> None:
        """One of its sequences is over, and does not run any more."""
        its = self._all[tenant]
        its.num_seqs -= 1
        if not its.num_seqs:
            self.present.discard(tenant)
            self._turns.forget(self.present)

    def start(self, seq: Sequence, running: Iterable[Sequence]) -> None:
        """It runs, beside the others of its tenant. `running`: all, by priority, then age."""
        tenant = seq.request.tenant
        self._all[tenant].running = [s for s in running if s.request.tenant == tenant]
        self._turns.take(tenant, seq.num_pending, waiting=any(map(self._waits, self.present)))

    def stop(self, seq: Sequence) -> None:
        self._all[seq.request.tenant].running.remove(seq)

    def charge(self, tenant: str, num_tokens: int) -> None:
        """Tokens that were emitted for it."""
        self._turns.charge(tenant, num_tokens)

    def in_turn(self) -> list[str]:
        """The tenants that are here, whose turn it is first."""
        if len(self.present) == 1:
            return list(self.present)
        return sorted(self.present, key=lambda name: (self._running(name), self._served(name)))

    def last_in_line(self, arrivals: dict[str, tuple[int, int]]) -> Sequence:
        """The sequence that is preempted first: of the tenant that runs the most, the lowest
        priority, of these the youngest. `arrivals`: (-priority, arrival) by sequence id."""
        lasts = [its.running[-1] for its in self._all.values() if its.running]
        return max(lasts, key=lambda seq: (self._running(seq.request.tenant), arrivals[seq.id][1]))

    def makes_way(self, tenant: str) -> Sequence | None:
        """Whose place this tenant may have, if it has fewer than another."""
        others = [its for name, its in self._all.items() if name != tenant and its.running]
        if not others:
            return None
        most = max(others, key=lambda its: len(its.running))
        victim, own = most.running[-1], self._running(tenant)
        if len(most.running) >= own + 2 or (own == 0 and _has_had_its_turn(victim)):
            return victim
        return None

    def is_within_share(self, tenant: str, num_blocks: int, total: int) -> bool:
        """Whether so many more blocks are within its share of the `total`."""
        held = sum(len(seq.table.block_ids) for seq in self._all[tenant].running)
        return (held + num_blocks) * len(self.present) <= total

    def is_next(self, tenant: str) -> bool:
        """Whether it runs nothing and was served least."""
        return not self._running(tenant) and min(self.present, key=self._served) == tenant

    def most_prompt_rows(self) -> int:
        """Of a pass. Fewer for a tenant that is alone while another was here lately: that one
        would have to wait for the end of the pass."""
        self._num_planned += 1
        for tenant in self.present:
            self._all[tenant].seen_at = self._num_planned
        lately = sum(its.seen_at > self._num_planned - _LATELY for its in self._all.values())
        return _ROWS_OF_A_GUEST if lately > 1 and not self.several else self._max_rows

    def decoding(self, ready: list[Sequence], prompts: dict[str, int]) -> list[Sequence]:
        """Who of those that are `ready` decodes in this pass, beside running prompts of so many
        tokens by tenant.

        Those of one tenant take no longer than the pass takes for any other, half as long if it
        runs more, and what it has left of earlier passes: they take turns. So a tenant has its
        share of the time, whatever others send.
        """
        share = self._max_rows // max(len(prompts), 1)
        roots = {tenant: [s for s in ready if s.request.tenant == tenant] for tenant in self._all}
        rows = {
            tenant: len(roots[tenant]) + min(prompts.get(tenant, 0), share)
            for tenant in self.present
        }
        chosen: list[Sequence] = []
        for tenant, its in self._all.items():
            others = {other: count for other, count in rows.items() if other != tenant and count}
            its.pays, own = bool(others), roots[tenant]
            if its.pays:
                lightest = min(others, key=others.__getitem__)
                self._earn(its, others[lightest], _mean_context(roots[lightest]))
                if len(own) > others[lightest]:
                    own.sort(key=lambda seq: seq.last_turn)
                    own = own[: self._fits(its, others[lightest], len(own), own)]
                    self.spend(tenant, len(own))
            chosen += own
        for seq in chosen:
            self._num_turns += 1
            seq.last_turn = self._num_turns
        return chosen

    def allowances(self, num_roots: int, wanting: dict[str, int]) -> dict[str, int]:
        """Rows of prompts that every tenant of `wanting` may add to the pass, by what it wants."""
        allowances: dict[str, int] = {}
        for tenant, wanted in wanting.items():
            its = self._all[tenant]
            allowances[tenant] = wanted
            if its.pays:
                fits = self._fits(its, num_roots, min(wanted, _LARGEST_CHUNK), its.running)
                if fits < wanted and num_roots + fits < self._max_rows:
                    fits = fits // _CHUNK * _CHUNK
                allowances[tenant] = fits
        return allowances

    def _fits(self, its: _Tenant, beside: int, wanted: int, seqs: list[Sequence]) -> int:
        """Rows that its credit pays for, beside others."""
        first = max(beside, 1)
        its.prices = self._seconds(first, first + wanted, _mean_context(seqs))
        return bisect_right(its.prices, its.prices[0] + its.credit) - 1

    def spend(self, tenant: str, rows: int) -> None:
        """So many of the rows that it was allowed are in the pass."""
        its = self._all[tenant]
        if its.pays and rows:
            its.credit = max(0.0, its.credit - (its.prices[rows] - its.prices[0]))

    def _earn(self, its: _Tenant, num_rows: int, context: float) -> None:
        """For a pass with so many rows of another, after `context` tokens in the mean."""
        largest = min(self._max_rows, _LARGEST_CHUNK)
        most = self._seconds(largest, largest, 0.0)[0]
        earned = self._seconds(num_rows, num_rows, context)[0]
        if len(its.running) > min(len(self._all[tenant].running) for tenant in self.present):
            earned *= _SHARE
        its.credit = min(most, its.credit + earned)

    def _seconds(self, first: int, last: int, context: float) -> list[float]:
        if self._costs is not None:
            return self._costs.seconds(first, last, context)
        return [float(_ROWS_OF_A_PASS + rows) for rows in range(first, last + 1)]

    def _running(self, tenant: str) -> int:
        return len(self._all[tenant].running)

    def _served(self, tenant: str) -> float:
        return self._turns.served(tenant)

    def _waits(self, tenant: str) -> bool:
        its = self._all[tenant]
        return its.num_seqs > len(its.running)


def _has_had_its_turn(seq: Sequence) -> bool:
    """It has emitted enough since it was admitted to be worth its computing again."""
    assert seq.status is Status.RUNNING
    return seq.num_since_admitted >= max(_QUANTUM, seq.num_tokens // _RECOMPUTED)


def _mean_context(seqs: list[Sequence]) -> float:
    """Tokens before the rows of a pass."""
    return sum(seq.num_committed for seq in seqs) / max(len(seqs), 1)
