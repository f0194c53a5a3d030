"""The block table of one sequence: reserve, commit, rollback.

Indexes target and draft storage alike. Slots [0, num_committed) hold valid KV; slots up to the
capacity are reserved and may hold anything; only full committed blocks carry a hash.
"""

from dataclasses import dataclass, field

from specserve.cache.pool import BlockPool
from specserve.read_only import ReadOnlyList


@dataclass(slots=True)
class BlockTable:
    block_size: int
    block_ids: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)  # of the leading full committed blocks
    num_committed: int = 0  # tokens whose KV is valid
    promised: set[bytes] = field(default_factory=set)  # hashes this table will publish

    @property
    def capacity(self) -> int:
        """Slots the table owns."""
        return len(self.block_ids) * self.block_size

    def blocks_for(self, num_slots: int) -> int:
        """How many blocks are missing to hold `num_slots` slots in all."""
        return max(0, -(-num_slots // self.block_size) - len(self.block_ids))

    def reserve(self, num_slots: int, pool: BlockPool) -> bool:
        """Own at least `num_committed + num_slots` slots; False, and no change, if short."""
        missing = self.blocks_for(self.num_committed + num_slots)
        if missing > pool.num_available:
            return False
        self.block_ids.extend(pool.take() for _ in range(missing))
        return True

    def commit(self, num_tokens: int) -> None:
        """The next `num_tokens` reserved slots hold valid KV."""
        self.num_committed += num_tokens
        assert self.num_committed <= self.capacity, "committed past the reserved slots"

    def rollback(self, pool: BlockPool) -> None:
        """Give back the blocks wholly past the commit point."""
        needed = -(-self.num_committed // self.block_size)
        for block_id in self.block_ids[needed:]:
            pool.release(block_id, keep=False)
        del self.block_ids[needed:]

    def slots(self, start: int, count: int) -> list[int]:
        """[count] storage slots of positions start, start + 1, ..."""
        size, blocks = self.block_size, self.block_ids
        positions = range(start, start + count)
        return [blocks[position // size] * size + position % size for position in positions]


class TableView:
    """A block table as drafters see it: nothing of it can be changed."""

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
