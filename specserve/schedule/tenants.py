"""What tenants share in the engine: places, KV, and the prompt rows of a pass. Host only.

With one tenant nothing here decides anything. A tenant may use what the others do not want; what
they want is shared by three rules. A free place goes to the tenant with the fewest sequences
running, then to the one served least. A tenant that has two fewer than another takes one of its
places, and the other's last in line is preempted. And the prompts of one tenant do not take longer
in a pass than what it does for the others, or than they left unused before.
"""

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
_CHUNK: Final = 8  # rows; a part of a prompt is a multiple of them
_CURRENT: Final = 64  # passes after which costs are looked up again


@dataclass(slots=True)
class _Tenant:
    num_seqs: int = 0  # waiting and running
    running: list[Sequence] = field(default_factory=list)  # by priority, then age
    credit: float | None = None  # seconds its prompts may add to passes of others; None: the most
    pays: bool = False  # others are in the pass that is planned


class Tenants:
    """Every tenant that has been here, by the name its requests carry."""

    def __init__(self, max_rows: int, costs: PassCosts | None) -> None:
        self._max_rows = max_rows
        self._costs = costs
        self._all: dict[str, _Tenant] = {}
        self._turns = Turns()
        self._seconds: list[float] = []
        self._num_planned = 0
        self.present: set[str] = set()  # that have a sequence waiting or running

    @property
    def several(self) -> bool:
        return len(self.present) > 1

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

    def allowances(self, decoding: Iterable[Sequence], wanting: dict[str, int]) -> dict[str, int]:
        """Rows of prompts that every tenant of `wanting` may add to the pass, by what it wants.

        No more than take the time that the pass takes for the others, and what it has left of
        earlier ones: so a tenant that decodes has at least its share of the time, whatever
        prompts of others there are.
        """
        roots = dict.fromkeys(self.present, 0)
        for seq in decoding:
            roots[seq.request.tenant] += 1
        num_roots = sum(roots.values())
        costs = self._current_costs()
        most = costs[-1] - costs[1]
        share = self._max_rows // max(len(wanting), 1)
        prompts = {name: min(rows, share) for name, rows in wanting.items()}
        allowances: dict[str, int] = {}
        for name, its in self._all.items():
            credit = most if its.credit is None else its.credit
            others = num_roots - roots.get(name, 0)
            others += sum(rows for other, rows in prompts.items() if other != name)
            its.credit = min(most, credit + costs[min(others, self._max_rows)])
            its.pays = others > 0
            if name not in wanting:
                continue
            allowances[name] = wanting[name]
            if its.pays:
                end = bisect_right(costs, costs[max(num_roots, 1)] + its.credit) - 1
                fits = end - num_roots
                if end < self._max_rows and fits < wanting[name]:
                    allowances[name] = fits // _CHUNK * _CHUNK
        return allowances

    def spend(self, tenant: str, num_roots: int, rows: int) -> None:
        """So many rows of its prompts are in the pass."""
        costs, its = self._seconds, self._all[tenant]
        if its.pays and its.credit is not None:
            last = min(num_roots + rows, self._max_rows)
            its.credit = max(0.0, its.credit - (costs[last] - costs[max(num_roots, 1)]))

    def _current_costs(self) -> list[float]:
        """Seconds of a pass, by its rows."""
        if self._num_planned % _CURRENT == 0:
            if self._costs is not None:
                self._seconds = [0.0, *self._costs.seconds(1, self._max_rows)]
            else:
                rows = range(1, self._max_rows + 1)
                self._seconds = [0.0, *(float(_ROWS_OF_A_PASS + number) for number in rows)]
        self._num_planned += 1
        return self._seconds

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
