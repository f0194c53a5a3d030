"""Fair sharing between tenants (API keys): which one is served next, and how much one may queue.

Every queue uses it: in front of the engine, in the scheduler, and in front of the tokenizer pool.
Knows tenant names and amounts only.
"""

from collections.abc import Collection, Iterable


class ServiceCounters:
    """The tenant that was served least goes next.

    This is the virtual token counter of Sheng et al. 2024, "Fairness in Serving Large Language
    Models". When a tenant that had nothing waiting returns, its counter is raised to the lowest
    counter of the waiting tenants, so that an idle tenant does not accumulate credit.
    """

    def __init__(self) -> None:
        self._served: dict[str, float] = {}
        self._floor = 0.0  # the counter of a tenant that is not in `_served`

    def __len__(self) -> int:
        """Number of tenants with a counter of their own."""
        return len(self._served)

    def served(self, tenant: str) -> float:
        """The service counter of `tenant`, in the unit of `take` and `charge`."""
        return self._served.get(tenant, self._floor)

    def join(self, tenant: str, waiting: Iterable[str]) -> None:
        """`tenant` had nothing waiting and now has. `waiting`: the tenants already waiting."""
        least = min(map(self.served, waiting), default=self._floor)
        self._served[tenant] = max(self.served(tenant), least)

    def take(self, tenant: str, amount: float, *, waiting: bool) -> None:
        """`tenant` is served `amount`. `waiting`: whether any tenant, itself too, still waits."""
        self._floor = max(self._floor, self.served(tenant))
        self.charge(tenant, amount)
        if not waiting:  # so no tenant with a lower counter is owed service
            self._floor = max(self._floor, self.served(tenant))

    def charge(self, tenant: str, amount: float) -> None:
        """Add `amount` to the counter: service that was not known when `take` was called."""
        self._served[tenant] = self.served(tenant) + amount

    def forget(self, present: Collection[str]) -> None:
        """Drop counters of absent tenants that do not exceed a new one's; all if none is there."""
        if not present:
            self._served.clear()
            self._floor = 0.0
            return
        for tenant, served in list(self._served.items()):
            if tenant not in present and served <= self._floor:
                del self._served[tenant]


def room(limit: int, held: int, own: int, *, shared: bool) -> int:
    """How much more of `limit` a tenant may take that holds `own`, if all together hold `held`.

    This is all that is left, or, if the limit is `shared` with other tenants, as much as the tenant
    leaves free: ceil((limit - held - own) / 2) more (dynamic thresholds: Choudhury and Hahne 1998).
    Never negative.
    """
    left = limit - held
    return max(0, -((own - left) // 2) if shared else left)
