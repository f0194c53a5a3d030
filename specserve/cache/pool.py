"""The pool of KV block ids and their reference counts. Knows no tokens and no tensors.

A block is in exactly one of three states: free; used (refcount > 0); idle (refcount 0, its content
kept for the prefix cache until the block is needed; the least recently used is evicted first).
"""

from collections import OrderedDict, deque
from collections.abc import Callable


class BlockPool:
    """Hands out block ids 0 .. num_blocks - 1.

    `on_evict(block_id)` is called when an idle block is reused and so loses its content.
    """

    def __init__(self, num_blocks: int, on_evict: Callable[[int], None]) -> None:
        self.num_blocks = num_blocks
        self._free = deque(range(num_blocks))
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._ref_counts = [0] * num_blocks
        self._on_evict = on_evict

    @property
    def num_available(self) -> int:
        """Number of blocks that `take` can still hand out."""
        return len(self._free) + len(self._idle)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_available

    @property
    def num_idle(self) -> int:
        return len(self._idle)

    def take(self) -> int:
        """Take a free block, else the least recently used idle one, and set its refcount to 1.

        The caller checks `num_available` first.
        """
        if self._free:
            block_id = self._free.popleft()
        else:
            block_id, _ = self._idle.popitem(last=False)
            self._on_evict(block_id)
        self._ref_counts[block_id] = 1
        return block_id

    def share(self, block_id: int) -> None:
        """Add a reference to a used or idle block."""
        self._idle.pop(block_id, None)
        self._ref_counts[block_id] += 1

    def release(self, block_id: int, *, keep: bool) -> None:
        """Drop a reference; at refcount 0 the block becomes idle if `keep`, else free."""
        self._ref_counts[block_id] -= 1
        assert self._ref_counts[block_id] >= 0, f"block {block_id} released twice"
        if self._ref_counts[block_id] == 0:
            if keep:
                self._idle[block_id] = None
            else:
                self._free.append(block_id)

    def is_idle(self, block_id: int) -> bool:
        return block_id in self._idle

    def check_integrity(self, users: dict[int, int]) -> None:
        """Assert that the pool agrees with `users`: block_id -> number of tables that hold it."""
        free, idle = set(self._free), set(self._idle)
        assert len(free) == len(self._free), "a block is free twice"
        assert not free & idle, "a block is both free and idle"
        for block_id, count in enumerate(self._ref_counts):
            assert count == users.get(block_id, 0), (
                f"block {block_id}: refcount {count}, but {users.get(block_id, 0)} tables hold it"
            )
            assert (count == 0) == (block_id in free or block_id in idle), (
                f"block {block_id}: refcount {count}, free {block_id in free}, "
                f"idle {block_id in idle}"
            )
