"""The `none` drafter: proposes the root alone, which is plain decoding, the baseline."""

from specserve.speculation.drafter import NoModelDrafter


class NoDrafter(NoModelDrafter):
    """Has nothing to add: a `NoModelDrafter` proposes the root alone."""
