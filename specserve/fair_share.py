"""What tenants (API keys) share: whose turn it is, and how much of a queue one of them may fill.

Knows names and numbers only. Every queue of the server uses it: in front of the engine, inside of
it, and in front of the tokenizer.
"""

from collections.abc import Collection, Iterable


class Turns:
    """The tenant that was served least goes next (a virtual token counter: Sheng et al. 2024,
    "Fairness in Serving Large Language Models").

    One that had nothing waiting takes up the least of those that have, so that nobody saves up
    service.
    """

    def __init__(self) -> None:
        self._served: dict[str, float] = {}
        self._floor = 0.0  # of a tenant that nobody remembers

    def __len__(self) -> int:
        """Tenants whose service is remembered."""
        return len(self._served)

    def served(self, tenant: str) -> float:
        return self._served.get(tenant, self._floor)

    def join(self, tenant: str, waiting: Iterable[str]) -> None:
        """A tenant that had nothing waiting now has, beside those that are `waiting` already."""
        least = min(map(self.served, waiting), default=self._floor)
        self._served[tenant] = max(self.served(tenant), least)

    def take(self, tenant: str, amount: float, *, waiting: bool) -> None:
        """It is this one's turn: `amount` is served. `waiting`: others or more of it still wait."""
        self._floor = max(self._floor, self.served(tenant))
        self.charge(tenant, amount)
        if not waiting:  # nobody has a claim from before this one
            self._floor = max(self._floor, self.served(tenant))

    def charge(self, tenant: str, amount: float) -> None:
        """Service beyond what a turn was known to take."""
        self._served[tenant] = self.served(tenant) + amount

    def forget(self, present: Collection[str]) -> None:
        """Drop tenants that are not `present` and have no more than a new one; with nobody present
        all of them."""
        if not present:
            self._served.clear()
            self._floor = 0.0
            return
        for tenant, served in list(self._served.items()):
            if tenant not in present and served <= self._floor:
                del self._served[tenant]


def room(limit: int, held: int, own: int, *, shared: bool) -> int:
    """What a tenant that holds `own` may still take of `limit`, of which all hold `held`.

    Alone, whatever is left. Where others may come (`shared`), it may hold as much as it leaves
    free: so there is always room for one more tenant, and all of them together stay within the
    limit (dynamic thresholds: Choudhury and Hahne 1998).
    """
    left = limit - held
    return max(0, -((own - left) // 2) if shared else left)
