"""Which blocks of the prefix cache are known to hold draft KV."""

from specserve.cache.table import BlockTable, TableView
from specserve_drafts.draft_kv import DraftKV, DraftKVState


def view(block_ids: list[int], hashes: list[bytes]) -> TableView:
    return TableView(BlockTable(8, block_ids, hashes))


def test_a_block_is_shared_once_it_has_draft_kv_and_a_hash() -> None:
    kv, state = DraftKV(), DraftKVState(20)
    kv.record(state, view([5, 7, 9], [b"a"]))
    assert kv.num_shared(view([5, 7], [b"a", b"b"])) == 8, "block 7 had no hash"
    state.num_with_kv = 23
    table = view([5, 7, 9], [b"a", b"b", b"c"])
    kv.record(state, table)
    assert kv.num_shared(table) == 16, "one token of block 9 has no draft KV"
    assert kv.num_shared(view([7, 5], [b"b", b"a"])) == 16
    assert kv.num_shared(view([5, 7], [b"x", b"b"])) == 0, "another content"


def test_a_block_with_missing_draft_kv_is_not_shared() -> None:
    kv, table = DraftKV(), view([1, 2, 3, 4], [b"a", b"b", b"c", b"d"])
    kv.record(DraftKVState(32, missing=(12, 17)), table)
    assert kv.num_shared(table) == 8
    assert kv.num_shared(view([4], [b"d"])) == 8
    assert kv.num_shared(view([3], [b"c"])) == 0


def test_a_block_that_is_written_again_is_not_shared() -> None:
    kv, table = DraftKV(), view([1, 2, 3], [b"a", b"b", b"c"])
    kv.record(DraftKVState(24), table)
    kv.drop(table, 9, 16)
    assert kv.num_shared(table) == 8
    assert kv.num_shared(view([3], [b"c"])) == 8
