"""The KV cache under random sequences of operations: no block leaks or is shared by mistake.

Every salt belongs to a tenant of its own. The test records with which tokens each slot was last
written. The committed slots of a table must always hold its own tokens, however blocks were shared,
moved or evicted.
"""

from collections import Counter

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import (
    Bundle,
    MultipleResults,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)

from specserve.cache.manager import Denied, KVCacheManager
from specserve.cache.prefix import prefix_hashes
from specserve.cache.table import BlockTable

BLOCK = 8
SALTS = ("", "alice", "bob")


class Owner:
    """A sequence as the cache sees it."""

    def __init__(self, tokens: list[int], salt: str, table: BlockTable) -> None:
        self.tokens, self.salt, self.table = tokens, salt, table

    @property
    def pending(self) -> int:
        return len(self.tokens) - self.table.num_committed


Owners = Owner | MultipleResults[Owner]


class KVCacheMachine(RuleBasedStateMachine):
    owners: Bundle[Owner] = Bundle("owners")
    waiting: Bundle[Owner] = Bundle("waiting")

    @initialize(num_blocks=st.integers(2, 24))
    def start(self, num_blocks: int) -> None:
        self.kv = KVCacheManager(num_blocks, BLOCK)
        self.written: dict[int, tuple[str, tuple[int, ...]]] = {}  # slot -> what its KV stands for
        self.live: list[Owner] = []
        self.tenants: set[str] = set()  # admitted so far

    def write(self, owner: Owner, first_slot: int, tokens: list[int], context: list[int]) -> None:
        """KV of `tokens` behind `context`, at consecutive slots of the owner's table."""
        slots = owner.table.slots(first_slot, len(tokens))
        for index, slot in enumerate(slots):
            self.written[slot] = (owner.salt, (*context, *tokens[: index + 1]))

    @rule(
        target=owners,
        shared=st.integers(0, 3),
        tail=st.lists(st.integers(0, 2), min_size=1, max_size=12),
        salt=st.sampled_from(SALTS),
        spare=st.integers(0, 1),
    )
    def admit(self, shared: int, tail: list[int], salt: str, spare: int) -> Owners:
        """Few distinct prompts, so that prefixes really are shared."""
        tokens = [7] * (shared * BLOCK) + tail
        return self.admitted(Owner(tokens, salt, BlockTable(BLOCK)), spare)

    @rule(target=owners, owner=consumes(waiting))
    def resume(self, owner: Owner) -> Owners:
        return self.admitted(owner, 0)

    def admitted(self, owner: Owner, spare: int) -> Owners:
        available = self.kv.pool.num_available
        hashes = prefix_hashes(owner.tokens, BLOCK, owner.salt)
        table = self.kv.admit(len(owner.tokens), hashes, tenant=owner.salt, spare_blocks=spare)
        if isinstance(table, Denied):
            assert self.kv.pool.num_available == available, "a denial took blocks"
            return multiple()
        assert self.kv.pool.num_available >= spare
        assert table.num_committed < len(owner.tokens), "nothing left to compute"
        owner.table = table
        self.live.append(owner)
        self.tenants.add(owner.salt)
        return owner

    @rule(owner=owners, rows=st.integers(1, 20))
    def chunk(self, owner: Owner, rows: int) -> None:
        """A prefill chunk without a tree."""
        rows = min(rows, owner.pending - 1)
        if owner not in self.live or rows < 1:
            return
        start = owner.table.num_committed
        self.write(owner, start, owner.tokens[start : start + rows], owner.tokens[:start])
        self.kv.commit(owner.table, rows, ())
        self.kv.publish(owner.table, owner.tokens, owner.salt)

    @rule(owner=owners, data=st.data(), num_nodes=st.integers(1, 12))
    def verify(self, owner: Owner, data: st.DataObject, num_nodes: int) -> None:
        """A tree behind the rest of the prompt: accept any path through it, roll back the rest."""
        if owner not in self.live:
            return
        table, num_prefill = owner.table, owner.pending - 1
        before = (list(table.block_ids), table.num_committed)
        if not self.kv.reserve(table, num_prefill + 1):
            assert (list(table.block_ids), table.num_committed) == before
            return
        if not self.kv.reserve_tree(table, num_prefill + num_nodes):
            num_nodes = 1
        start = table.num_committed
        self.write(owner, start, owner.tokens[start:], owner.tokens[:start])
        later = data.draw(st.sets(st.integers(1, num_nodes - 1)) if num_nodes > 1 else st.just({0}))
        path = sorted({0} | set(later))
        drafted = [data.draw(st.integers(0, 2)) for _ in path[1:]]
        root = start + num_prefill
        node_slots = table.slots(root, num_nodes)
        for node in range(1, num_nodes):
            self.written[node_slots[node]] = ("rejected", ())
        for depth, node in enumerate(path[1:]):
            content = (*owner.tokens, *drafted[: depth + 1])
            self.written[node_slots[node]] = (owner.salt, content)
        for source, destination in self.kv.commit(table, num_prefill, path):
            self.written[destination] = self.written[source]
        owner.tokens += [*drafted, 1]
        assert owner.pending == 1
        assert table.capacity - table.num_committed < BLOCK, "rollback kept a whole block"
        self.kv.publish(table, owner.tokens, owner.salt)

    @rule(owner=owners, num_slots=st.integers(1, 20))
    def reserve_then_abort(self, owner: Owner, num_slots: int) -> None:
        if owner in self.live and self.kv.reserve(owner.table, num_slots):
            self.leave(owner)

    @rule(owner=consumes(owners))
    def finish(self, owner: Owner) -> None:
        if owner in self.live:
            self.leave(owner)

    @rule(target=waiting, owner=consumes(owners))
    def preempt(self, owner: Owner) -> Owners:
        if owner not in self.live:
            return multiple()
        self.leave(owner)
        return owner

    def leave(self, owner: Owner) -> None:
        self.live.remove(owner)
        self.kv.release(owner.table)

    @invariant()
    def sound(self) -> None:
        if not hasattr(self, "kv"):
            return
        self.kv.check_integrity(owner.table for owner in self.live)
        for owner in self.live:
            committed = owner.table.num_committed
            for position, slot in enumerate(owner.table.slots(0, committed)):
                expected = (owner.salt, tuple(owner.tokens[: position + 1]))
                assert self.written[slot] == expected, "a committed slot holds another's KV"

    @invariant()
    def cached_within_shares(self) -> None:
        if not hasattr(self, "kv") or not self.tenants:
            return
        pool, num_tenants = self.kv.pool, len(self.tenants)
        share = pool.num_blocks if num_tenants == 1 else pool.num_blocks // (2 * num_tenants)
        used: dict[str, set[int]] = {tenant: set() for tenant in self.tenants}
        for owner in self.live:
            used[owner.salt].update(owner.table.block_ids)
        idle = Counter(
            self.written[block_id * BLOCK][0]
            for block_id in range(pool.num_blocks)
            if pool.is_idle(block_id)
        )
        assert idle.total() == pool.num_idle
        for tenant, blocks in used.items():
            assert not idle[tenant] or len(blocks) + idle[tenant] <= share
        if sum(max(share, len(blocks)) for blocks in used.values()) > pool.num_blocks:
            assert not idle, "blocks are cached though used ones reach into shares of others"

    def teardown(self) -> None:
        if hasattr(self, "kv"):
            for owner in list(self.live):
                self.leave(owner)
            self.kv.check_integrity([])
            assert self.kv.pool.num_available == self.kv.pool.num_blocks, "blocks leaked"


TestKVCache = KVCacheMachine.TestCase
TestKVCache.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
