"""The pool of KV block ids and their reference counts. Knows no tokens and no tensors.

A block is in exactly one of three states: free; used (refcount > 0); idle (refcount 0, its content
kept for the prefix cache). Used and idle blocks belong to the tenant that took them. Two rules
limit the idle blocks. They never look at the idle blocks of other tenants, so that no tenant can
tell from its own cache hits how much others have cached. The *share* of a tenant is all blocks if
it is the only one so far, else half of the blocks divided by the number of tenants so far.

1. The used and the idle blocks of a tenant together are at most its share, or it has no idle ones.
   Its own least recently used ones are evicted.
2. If the used blocks beyond the shares of their tenants, the *excess*, reach into the shares of
   others, all idle blocks of all tenants are evicted, and none are kept as long as this is so.
"""

from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(slots=True)
class _Tenant:
    num_used: int = 0
    idle: OrderedDict[int, None] = field(default_factory=OrderedDict)  # least recently used first


class BlockPool:
    """Hands out block ids 0 .. num_blocks - 1.

    `on_evict(block_id)` is called when an idle block becomes free and so loses its content.
    """

    def __init__(self, num_blocks: int, on_evict: Callable[[int], None]) -> None:
        self.num_blocks = num_blocks
        self._free = deque(range(num_blocks))
        self._ref_counts = [0] * num_blocks
        self._on_evict = on_evict
        self._tenants: dict[str, _Tenant] = {}  # all so far
        self._owners = [_Tenant()] * num_blocks  # by block id; of a free block, the latest
        self._tree_blocks: set[int] = set()  # of `take_for_tree`; `num_used` does not count them
        self._num_idle = 0
        self._share = num_blocks
        self._num_excess = 0
        self._most_excess = 0  # blocks outside the shares of all tenants

    @property
    def num_available(self) -> int:
        """Number of blocks that `take` can still hand out."""
        return len(self._free) + self._num_idle

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_available

    @property
    def num_idle(self) -> int:
        return self._num_idle

    def take(self, tenant: str, num_blocks: int) -> list[int] | None:
        """Take blocks for `tenant`, each with a refcount of 1; None if too few are available.

        Evicts idle blocks by the rules of this module. Free blocks are taken first.
        """
        if num_blocks > self.num_available:
            return None
        owner = self._tenants.get(tenant) or self._add_tenant(tenant)
        self._add_used(owner, num_blocks)
        self._apply_rules(owner)
        if num_blocks > len(self._free):  # tree blocks (`take_for_tree`) fill the room for excess
            self._evict_all()
        return self._hand_out(owner, num_blocks)

    def take_for_tree(self, tenant: str, num_blocks: int) -> list[int] | None:
        """Like `take`, for blocks of which most are released again after the step.

        With several tenants it takes free blocks only: the size of a tree depends on the load, so
        what others run would decide what is evicted. Call `keep_tree_block` for those that stay.
        """
        if len(self._tenants) <= 1:
            return self.take(tenant, num_blocks)
        if num_blocks > len(self._free):
            return None
        block_ids = self._hand_out(self._tenants[tenant], num_blocks)
        self._tree_blocks.update(block_ids)
        return block_ids

    def keep_tree_block(self, block_id: int) -> None:
        """The block holds committed tokens now. If it is of `take_for_tree`, apply the rules."""
        if block_id in self._tree_blocks:
            self._tree_blocks.remove(block_id)
            owner = self._owners[block_id]
            self._add_used(owner, 1)
            self._apply_rules(owner)

    def share(self, block_id: int) -> None:
        """Add a reference to a used or idle block."""
        if self._ref_counts[block_id] == 0:
            owner = self._owners[block_id]
            del owner.idle[block_id]
            self._num_idle -= 1
            self._add_used(owner, 1)
        self._ref_counts[block_id] += 1

    def release(self, block_id: int, *, keep: bool) -> None:
        """Drop a reference; at refcount 0 the block becomes idle if `keep`, else free.

        An idle block is evicted at once if the rules of this module leave no room for it.
        """
        self._ref_counts[block_id] -= 1
        assert self._ref_counts[block_id] >= 0, f"block {block_id} released twice"
        if self._ref_counts[block_id] > 0:
            return
        owner = self._owners[block_id]
        if block_id in self._tree_blocks:
            self._tree_blocks.remove(block_id)
        else:
            self._add_used(owner, -1)
        if keep:
            owner.idle[block_id] = None
            self._num_idle += 1
            self._apply_rules(owner)
        else:
            self._free.append(block_id)

    def is_idle(self, block_id: int) -> bool:
        return block_id in self._owners[block_id].idle

    def _add_tenant(self, name: str) -> _Tenant:
        """Add a tenant, which makes the shares of all others smaller."""
        added = self._tenants[name] = _Tenant()
        count = len(self._tenants)
        self._share = self.num_blocks if count == 1 else self.num_blocks // (2 * count)
        self._most_excess = self.num_blocks - self._share * count
        self._num_excess = sum(map(self._excess, self._tenants.values()))
        for tenant in self._tenants.values():
            self._apply_rules(tenant)
        return added

    def _excess(self, tenant: _Tenant) -> int:
        return max(0, tenant.num_used - self._share)

    def _add_used(self, tenant: _Tenant, change: int) -> None:
        before = self._excess(tenant)
        tenant.num_used += change
        self._num_excess += self._excess(tenant) - before

    def _apply_rules(self, tenant: _Tenant) -> None:
        """Apply rule 1 to `tenant`, whose blocks have changed, and rule 2."""
        surplus = tenant.num_used + len(tenant.idle) - self._share
        if surplus > 0:
            self._evict(tenant, min(surplus, len(tenant.idle)))
        if self._num_excess > self._most_excess:
            self._evict_all()

    def _evict_all(self) -> None:
        for tenant in self._tenants.values():
            self._evict(tenant, len(tenant.idle))

    def _evict(self, tenant: _Tenant, num_blocks: int) -> None:
        for _ in range(num_blocks):
            block_id, _ = tenant.idle.popitem(last=False)
            self._on_evict(block_id)
            self._free.append(block_id)
        self._num_idle -= num_blocks

    def _hand_out(self, owner: _Tenant, num_blocks: int) -> list[int]:
        block_ids = [self._free.popleft() for _ in range(num_blocks)]
        for block_id in block_ids:
            self._ref_counts[block_id] = 1
            self._owners[block_id] = owner
        return block_ids

    def check_integrity(self, users: dict[int, int]) -> None:
        """Assert that the pool agrees with `users`: block_id -> number of tables that hold it."""
        tenants = self._tenants.values()
        free, idle = set(self._free), {block_id for tenant in tenants for block_id in tenant.idle}
        assert len(free) == len(self._free), "a block is free twice"
        assert len(idle) == self._num_idle == sum(len(tenant.idle) for tenant in tenants)
        assert not free & idle, "a block is both free and idle"
        used = [self._owners[block_id] for block_id in users if block_id not in self._tree_blocks]
        for tenant in tenants:
            assert tenant.num_used == sum(owner is tenant for owner in used)
            assert all(self._owners[block_id] is tenant for block_id in tenant.idle)
        assert self._num_excess == sum(map(self._excess, tenants))
        for block_id, count in enumerate(self._ref_counts):
            assert count == users.get(block_id, 0), (
                f"block {block_id}: refcount {count}, but {users.get(block_id, 0)} tables hold it"
            )
            assert (count == 0) == (block_id in free or block_id in idle), (
                f"block {block_id}: refcount {count}, free {block_id in free}, "
                f"idle {block_id in idle}"
            )
