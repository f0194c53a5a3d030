"""Which tokens have valid draft KV: of a sequence, and in the blocks of the prefix cache.

The draft KV of a token is in the slot that the target's block table has for the token. That of
drafted nodes is never counted, so nothing has to be undone when they are rejected. A block that the
prefix cache gives to another sequence still has its draft KV if it was written for this content,
which the hash of the block identifies. Knows nothing of the model that computes the KV.
"""

from dataclasses import dataclass

from specserve.cache.table import TableView


@dataclass(slots=True)
class DraftKVState:
    """The draft KV of one sequence: tokens [0, num_with_kv) have it, except those of `missing`."""

    num_with_kv: int
    missing: tuple[int, int] = (0, 0)  # first, end
    num_recorded_blocks: int = 0  # leading blocks that `DraftKV.record` has handled


class DraftKV:
    """Which blocks hold draft KV, and of which content."""

    def __init__(self) -> None:
        self._hashes: dict[int, bytes] = {}  # block id -> hash of the content

    def num_shared(self, table: TableView) -> int:
        """Leading tokens of a sequence whose blocks hold their draft KV already."""
        num_blocks = 0
        for block_id, block_hash in zip(table.block_ids, table.hashes, strict=False):
            if self._hashes.get(block_id) != block_hash:
                break
            num_blocks += 1
        return num_blocks * table.block_size

    def record(self, state: DraftKVState, table: TableView) -> None:
        """Record the blocks that have a hash by now and draft KV for all of their tokens."""
        size, (first, last) = table.block_size, state.missing
        end = min(state.num_with_kv // size, len(table.hashes))
        for index in range(state.num_recorded_blocks, end):
            if (index + 1) * size <= first or index * size >= last or first == last:
                self._hashes[table.block_ids[index]] = table.hashes[index]
            state.num_recorded_blocks = index + 1

    def drop(self, table: TableView, first: int, end: int) -> None:
        """Forget the content of the blocks of tokens [first, end), which is about to be written."""
        size = table.block_size
        for block_id in table.block_ids[first // size : -(-end // size)]:
            self._hashes.pop(block_id, None)
