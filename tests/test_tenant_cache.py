"""What a tenant finds in the prefix cache depends on its own requests, not on those of others."""

from dataclasses import dataclass

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from specserve.cache.manager import Denied, KVCacheManager
from specserve.cache.prefix import prefix_hashes
from specserve.cache.table import BlockTable

BLOCK, NUM_BLOCKS = 8, 24
OTHERS = ("alice", "carol")
MOST_RUNNING = 10  # blocks that the others may use together


class Cache:
    """A KV cache, and requests that are run on it without a model."""

    def __init__(self, num_blocks: int = NUM_BLOCKS) -> None:
        self.kv = KVCacheManager(num_blocks, BLOCK)

    def admit(self, tenant: str, first: int, length: int) -> BlockTable | None:
        """Prefill a prompt of `length` tokens that is named by its first one; None if denied."""
        tokens = tokens_of(first, length)
        hashes = prefix_hashes(tokens, BLOCK, tenant)
        table = self.kv.admit(length, hashes, tenant=tenant, spare_blocks=0)
        if isinstance(table, Denied):
            return None
        self.num_cached = table.num_committed
        self.kv.commit(table, length - table.num_committed - 1, ())
        self.kv.publish(table, tokens, tenant)
        return table

    def run(self, tenant: str, first: int, length: int) -> int:
        """Prefill and release a prompt; returns how many of its tokens were cached."""
        table = self.admit(tenant, first, length)
        assert table is not None
        num_cached = self.num_cached
        self.kv.release(table)
        return num_cached


def tokens_of(first: int, length: int) -> list[int]:
    return [first] + [7] * (length - 1)


@dataclass
class Prompt:
    first: int
    length: int  # tokens of prompt and output
    num_output: int


@dataclass
class Load:
    """What happens to the others during a request of the observed tenant."""

    started: list[tuple[str, int, int]]  # tenant, name of the prompt, tokens
    num_ended: int  # of those, before the request starts
    tree_sizes: list[int]  # of the observed request, step by step: they depend on the load


prompts = st.builds(
    Prompt, first=st.integers(0, 4), length=st.integers(12, 48), num_output=st.integers(1, 11)
)
loads = st.builds(
    Load,
    started=st.lists(
        st.tuples(st.sampled_from(OTHERS), st.integers(0, 9), st.integers(1, 70)), max_size=6
    ),
    num_ended=st.integers(0, 6),
    tree_sizes=st.lists(st.integers(1, 20), min_size=1, max_size=4),
)


def observed_hits(own: list[Prompt], others: list[Load]) -> list[int]:
    """The cached tokens of each of the `own` prompts, which run one after the other."""
    cache, hits = Cache(), []
    running: list[BlockTable] = []
    for tenant in ("observer", *OTHERS):
        cache.run(tenant, 99, 1)
    for prompt, load in zip(own, others, strict=True):
        for tenant, first, length in load.started:
            needed = -(-length // BLOCK)
            while running and sum(len(t.block_ids) for t in running) + needed > MOST_RUNNING:
                cache.kv.release(running.pop(0))
            if (table := cache.admit(tenant, first, length)) is not None:
                running.append(table)
        for _ in range(min(load.num_ended, len(running))):
            cache.kv.release(running.pop())
        hits.append(generate(cache, prompt, load.tree_sizes))
        cache.kv.check_integrity(running)
    return hits


def generate(cache: Cache, prompt: Prompt, tree_sizes: list[int]) -> int:
    """Run a request of the observer with trees of the given sizes; returns its cached tokens."""
    tokens = tokens_of(prompt.first, prompt.length)
    num_tokens, step = prompt.length - prompt.num_output, 0
    table = cache.admit("observer", prompt.first, num_tokens)
    assert table is not None
    num_cached = cache.num_cached
    while num_tokens < prompt.length:
        num_nodes = tree_sizes[step % len(tree_sizes)]
        assert cache.kv.reserve(table, 1)
        if not cache.kv.reserve_tree(table, num_nodes):
            num_nodes = 1
        num_accepted = min(num_nodes, prompt.length - num_tokens)
        cache.kv.commit(table, 0, range(num_accepted))
        num_tokens += num_accepted
        cache.kv.publish(table, tokens[:num_tokens], "observer")
        step += 1
    cache.kv.release(table)
    return num_cached


@given(data=st.data(), own=st.lists(prompts, min_size=2, max_size=12))
@settings(max_examples=200, deadline=None)
def test_hits_are_a_function_of_own_requests(data: st.DataObject, own: list[Prompt]) -> None:
    others = [data.draw(loads) for _ in own]
    quiet = [Load([], 0, [1])] * len(own)
    assert observed_hits(own, others) == observed_hits(own, quiet)


def test_the_size_of_a_tree_does_not_change_what_is_evicted() -> None:
    """The tree of the fourth request reaches into a new block before the one before it is full."""
    lengths = ((0, 12, 1), (1, 17, 1), (0, 12, 1), (1, 18, 2), (1, 18, 1))
    own = [Prompt(*each) for each in lengths]
    small, large = ([Load([], 0, [size])] * len(own) for size in (1, 2))
    assert observed_hits(own, small) == observed_hits(own, large)


def test_the_only_tenant_may_fill_the_cache() -> None:
    cache = Cache()
    for first in range(8):
        cache.run("alice", first, 3 * BLOCK + 1)
    assert cache.kv.pool.num_idle == NUM_BLOCKS - 1
    again = [cache.run("alice", first, 3 * BLOCK + 1) for first in range(1, 8)]
    assert again == [3 * BLOCK] * 7


def test_a_new_tenant_takes_its_share_from_the_only_one() -> None:
    cache = Cache()
    for first in range(8):
        cache.run("alice", first, 3 * BLOCK + 1)
    cache.run("bob", 0, 1)
    assert cache.kv.pool.num_idle == NUM_BLOCKS // 4
    assert cache.run("alice", 7, 3 * BLOCK + 1) == 3 * BLOCK, "the latest prompt was evicted"


@pytest.mark.parametrize("carols", [1, BLOCK + 1, 4 * BLOCK])
@pytest.mark.parametrize(("excess", "kept"), [(12, True), (13, False)])
def test_running_sequences_may_displace_all_of_the_cache(
    carols: int, excess: int, kept: bool
) -> None:
    """The limit does not depend on how much another tenant (carol) has cached."""
    cache, share = Cache(), NUM_BLOCKS // 6
    cache.run("carol", 0, carols)
    cache.run("bob", 0, BLOCK + 1)
    table = cache.admit("alice", 0, (share + excess) * BLOCK)
    assert table is not None
    for tenant in ("carol", "bob"):
        assert kept or cache.run(tenant, 0, BLOCK + 1) == 0
    assert cache.run("bob", 0, BLOCK + 1) == (BLOCK if kept else 0)
    cache.kv.release(table)
    cache.run("bob", 0, BLOCK + 1)
    assert cache.run("bob", 0, BLOCK + 1) == BLOCK, "nothing is cached although there is room again"
