"""KV block accounting for all sequences: admission through the prefix cache, reserve, commit,
publish and release.

Runs on the host only: it returns the slot moves of a commit, and the engine applies them to the
tensors.
"""

import enum
from collections.abc import Iterable, Sequence

from specserve.cache.pool import BlockPool
from specserve.cache.prefix import PrefixCache, chain_hash, root_hash
from specserve.cache.table import BlockTable


class Denied(enum.Enum):
    """Why a sequence cannot be admitted in this step."""

    NO_ROOM = enum.auto()  # not enough free blocks or places
    IN_FLIGHT = enum.auto()  # a running sequence is about to publish the next block of the prompt


class KVCacheManager:
    """The block pool and the prefix cache, and the operations on block tables that use both."""

    def __init__(self, num_blocks: int, block_size: int, *, prefix_caching: bool = True) -> None:
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self.prefix = PrefixCache()
        self.pool = BlockPool(num_blocks, on_evict=self.prefix.evict)
        self._pending_hashes: set[bytes] = set()  # running sequences will publish these

    @property
    def num_slots(self) -> int:
        return self.pool.num_blocks * self.block_size

    def admit(
        self,
        num_tokens: int,
        hashes: Sequence[bytes],
        *,
        tenant: str = "",
        spare_blocks: int,
        max_cached: int | None = None,
    ) -> BlockTable | Denied:
        """Return a block table with room for `num_tokens`, its cached prefix already committed.

        `hashes` are the `prefix_hashes` of the tokens; at most the first `max_cached` tokens come
        from the cache (None: no limit). New blocks belong to `tenant`. Returns
        `Denied.NO_ROOM` if fewer than `spare_blocks` available blocks would remain. Returns
        `Denied.IN_FLIGHT` if the first block that is not cached is pending: a running sequence is
        about to publish it, and waiting avoids computing and storing that block twice.
        """
        if not self.prefix_caching:
            hashes = ()
        shared: list[int] = []
        most = len(hashes) if max_cached is None else max_cached // self.block_size
        for block_hash in hashes[:most]:
            block_id = self.prefix.lookup(block_hash)
            if block_id is None:
                break
            shared.append(block_id)
        missing = hashes[len(shared) :]
        if missing and missing[0] in self._pending_hashes and len(shared) < most:
            return Denied.IN_FLIGHT
        num_cached = len(shared) * self.block_size
        table = BlockTable(
            self.block_size, list(shared), list(hashes[: len(shared)]), num_cached, tenant=tenant
        )
        idle = sum(self.pool.is_idle(block_id) for block_id in shared)
        if self.pool.num_available - idle - table.blocks_for(num_tokens) < spare_blocks:
            return Denied.NO_ROOM
        for block_id in shared:
            self.pool.share(block_id)
        reserved = table.reserve(num_tokens - table.num_committed, self.pool.take)
        assert reserved, "admission counted the blocks wrongly"
        table.pending_hashes.update(set(missing) - self._pending_hashes)
        self._pending_hashes |= table.pending_hashes
        return table

    def reserve(self, table: BlockTable, num_slots: int) -> bool:
        """Reserve `num_slots` slots past the commit point; False if the pool has too few blocks."""
        return table.reserve(num_slots, self.pool.take)

    def reserve_tree(self, table: BlockTable, num_slots: int) -> bool:
        """Like `reserve`, with the slots of a tree. With several tenants it evicts no block."""
        pool = self.pool
        return table.reserve(num_slots, pool.take_for_tree if self.prefix_caching else pool.take)

    def commit(
        self, table: BlockTable, num_prefill: int, path: Sequence[int]
    ) -> list[tuple[int, int]]:
        """Commit a prefill chunk of `num_prefill` tokens, then the tree nodes of `path`.

        `path` is ascending; it is empty, or begins with the root. Node i was written at position
        num_committed + num_prefill + i. Returns the moves (source slot, destination slot), in
        ascending order, that make the accepted path contiguous. If `path` is not empty, the blocks
        past the new commit point are released.
        """
        moves = []
        if path and path[-1] >= len(path):  # a node before the last one was rejected
            slots = table.slots(table.num_committed + num_prefill, path[-1] + 1)
            moves = [(slots[node], slots[at]) for at, node in enumerate(path) if node != at]
        table.commit(num_prefill + len(path))
        if path:  # an unfinished prompt keeps the blocks reserved at admission
            table.rollback(self.pool)
        return moves

    def publish(self, table: BlockTable, tokens: Sequence[int], salt: str) -> None:
        """Hash the committed blocks that have become full, and add them to the prefix cache.

        Call it when the commits of the step have released the tree blocks of all sequences. Blocks
        are kept and published one by one, as if each token had been committed in a step of its own:
        what is evicted does not depend on the trees.
        """
        if not self.prefix_caching:
            return
        for index in range(len(table.hashes), len(table.block_ids)):
            block_id, start = table.block_ids[index], index * self.block_size
            self.pool.keep_tree_block(block_id)
            if start + self.block_size > table.num_committed:
                break
            parent = table.hashes[-1] if table.hashes else root_hash(salt)
            block_hash = chain_hash(parent, tokens[start : start + self.block_size])
            self.prefix.insert(block_hash, block_id)
            table.hashes.append(block_hash)
            self._drop_pending(table, {block_hash})

    def release(self, table: BlockTable) -> None:
        """Release every block; published blocks stay in the prefix cache until they are evicted.

        The last block is released first, so that eviction takes the end of a prefix before its
        beginning.
        """
        self._drop_pending(table, set(table.pending_hashes))
        for block_id in reversed(table.block_ids):
            self.pool.release(block_id, keep=block_id in self.prefix)
        table.block_ids.clear()
        table.hashes.clear()
        table.num_committed = 0

    def _drop_pending(self, table: BlockTable, hashes: set[bytes]) -> None:
        """`hashes` are no longer pending for `table`: published, or given up."""
        dropped = table.pending_hashes & hashes
        table.pending_hashes -= dropped
        self._pending_hashes -= dropped

    def check_integrity(self, tables: Iterable[BlockTable]) -> None:
        """Assert that pool, prefix cache and tables agree."""
        users: dict[int, int] = {}
        pending: list[bytes] = []
        for table in tables:
            assert table.num_committed <= table.capacity
            assert len(table.hashes) * self.block_size <= table.num_committed
            assert len(set(table.block_ids)) == len(table.block_ids), "a table holds a block twice"
            for block_id in table.block_ids:
                users[block_id] = users.get(block_id, 0) + 1
            pending.extend(table.pending_hashes)
        assert len(pending) == len(self._pending_hashes), "a pending hash is lost or doubled"
        assert set(pending) == self._pending_hashes, "a pending hash has no table"
        self.pool.check_integrity(users)
        self.prefix.check_integrity()
