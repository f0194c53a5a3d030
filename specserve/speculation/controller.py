"""What measured costs decide in a step: who is drafted for, and which drafted nodes are verified.

Without them everyone is drafted for and every node is verified. Host only.
"""

from collections.abc import Mapping, Sequence

from specserve.speculation.cost_model import PassCosts
from specserve.speculation.node_selection import Selection
from specserve.speculation.policy import FixedPolicy, MeasuredPolicy, Policy
from specserve.step import Entry, StepPlan
from specserve.tree import DraftTree


class Pricing:
    def __init__(self, max_nodes: int, costs: PassCosts | None) -> None:
        self.policy: Policy = FixedPolicy(max_nodes)
        self._costs = costs
        self._selection: Selection | None = None
        if costs is not None:
            self.policy = MeasuredPolicy(max_nodes, costs)
            self._selection = Selection(costs)

    def worthwhile(self, plan: StepPlan, proposed: dict[str, DraftTree]) -> dict[str, DraftTree]:
        """The proposed trees, by sequence id, without the nodes that are not worth their rows."""
        if self._selection is None:
            return proposed
        num_rows = sum(entry.num_prefill + (entry.num_nodes > 0) for entry in plan.entries)
        return self._selection.worthwhile(proposed, num_rows, _mean_context(plan.decoding))

    def learn_pass(self, plan: StepPlan, trees: Mapping[str, DraftTree], seconds: float) -> None:
        """A pass over these trees has taken so long; nothing is learned from prompts."""
        entries = plan.decoding
        if self._costs is None or not entries or any(entry.num_prefill for entry in plan.entries):
            return
        num_rows = sum(len(trees[entry.seq.id]) for entry in entries)
        self._costs.add_pass(num_rows, _mean_context(entries), seconds)

    def learn_host(self, seconds: float) -> None:
        """A step has taken so long besides its pass."""
        if self._costs is not None:
            self._costs.add_host(seconds)

    def step_seconds(self) -> tuple[float, float] | None:
        """Of a step without drafts, and of a node more; None: not measured."""
        if self._costs is None:
            return None
        seconds = self._costs.seconds(1, 8)
        return seconds[0], (seconds[7] - seconds[3]) / 4


def _mean_context(entries: Sequence[Entry]) -> float:
    """Tokens before the rows of a pass."""
    return sum(entry.seq.num_committed for entry in entries) / max(len(entries), 1)
