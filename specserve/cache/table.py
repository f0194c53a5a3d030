"""The block table of one sequence: reserve, commit, rollback.

The same table indexes the storage of the target and of the draft models. Slots [0, num_committed)
hold valid KV; slots up to `capacity` are reserved, with undefined content. Only full committed
blocks have a hash.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from specserve.cache.pool import BlockPool
from specserve.read_only import ReadOnlyList


@dataclass(slots=True)
class BlockTable:
    block_size: int
    block_ids: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)  # hashes of the leading full committed blocks
    num_committed: int = 0  # tokens whose KV is valid
    pending_hashes: set[bytes] = field(default_factory=set)  # to be published
    tenant: str = ""  # to which the blocks belong

    @property
    def capacity(self) -> int:
        """Number of slots in the blocks of the table."""
        return len(self.block_ids) * self.block_size

    def blocks_for(self, num_slots: int) -> int:
        """Number of additional blocks needed for a capacity of `num_slots`."""
        return max(0, -(-num_slots // self.block_size) - len(self.block_ids))

    def reserve(self, num_slots: int, take: Callable[[str, int], list[int] | None]) -> bool:
        """Grow the capacity to at least `num_committed + num_slots`.

        `take` is a method of the pool, such as `BlockPool.take`. Returns False and changes nothing
        if the pool has too few blocks.
        """
        missing = self.blocks_for(self.num_committed + num_slots)
        if not missing:
            return True
        taken = take(self.tenant, missing)
        if taken is None:
            return False
        self.block_ids.extend(taken)
        return True

    def commit(self, num_tokens: int) -> None:
        """Mark the next `num_tokens` reserved slots as holding valid KV."""
        self.num_committed += num_tokens
        assert self.num_committed <= self.capacity, "committed past the reserved slots"

    def rollback(self, pool: BlockPool) -> None:
        """Release the blocks that lie wholly past the commit point."""
        needed = -(-self.num_committed // self.block_size)
        for block_id in self.block_ids[needed:]:
            pool.release(block_id, keep=False)
        del self.block_ids[needed:]

    def slots(self, start: int, count: int) -> list[int]:
        """Storage slots of the `count` positions from `start` on."""
        size, blocks = self.block_size, self.block_ids
        positions = range(start, start + count)
        return [blocks[position // size] * size + position % size for position in positions]


class TableView:
    """A read-only view of a block table, for drafters."""

    __slots__ = ("_table",)

    def __init__(self, table: BlockTable) -> None:
        self._table = table

    @property
    def block_size(self) -> int:
        return self._table.block_size

    @property
    def block_ids(self) -> ReadOnlyList[int]:
        return ReadOnlyList(self._table.block_ids)

    @property
    def hashes(self) -> ReadOnlyList[bytes]:
        return ReadOnlyList(self._table.hashes)

    @property
    def num_committed(self) -> int:
        return self._table.num_committed

    @property
    def capacity(self) -> int:
        return self._table.capacity

    def slots(self, start: int, count: int) -> list[int]:
        """See `BlockTable.slots`."""
        return self._table.slots(start, count)
