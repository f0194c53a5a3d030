"""The KV tensors: memory is allocated ahead of its use, and slots in use are never touched."""

import resource

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specserve.cache.storage import KVSpec, KVStorage
from specserve_kernels.huge_pages import PAGE

CPU = torch.device("cpu")
SPEC = KVSpec(num_layers=4, num_kv_heads=2, head_dim=64, dtype=torch.bfloat16)
NUM_PLANES = 2 * SPEC.num_layers
PAGE_SLOTS = PAGE // (SPEC.bytes_per_slot // NUM_PLANES)
NUM_PAGES = 5  # of a plane

NUM_SLOTS = NUM_PAGES * PAGE_SLOTS

# First slot and number of slots that a pass writes to.
passes = st.lists(
    st.tuples(st.integers(0, NUM_SLOTS - 1), st.integers(1, PAGE_SLOTS // 4)), max_size=12
)


@settings(max_examples=20, deadline=None)
@given(passes)
def test_slots_that_were_written_are_not_changed(passes: list[tuple[int, int]]) -> None:
    storage = KVStorage(SPEC, NUM_SLOTS, CPU)
    storage.allocates_ahead = True
    expected = torch.zeros(NUM_SLOTS)
    for first, count in passes:
        written = torch.arange(first, min(first + count, NUM_SLOTS))
        storage.data[:, :, written] = 1
        expected[written] = 1
        storage.record_written(written)
        assert (storage.data.float().mean(dim=(0, 1, 3, 4)) == expected).all()


@pytest.mark.parametrize("ahead", [False, True])
def test_a_pass_after_others_allocates_no_memory(ahead: bool) -> None:
    """Without `allocates_ahead` the first write to the second page of all planes would."""
    storage = KVStorage(SPEC, NUM_SLOTS, CPU)
    storage.allocates_ahead = ahead
    for written in torch.split(torch.arange(PAGE_SLOTS), 64):
        storage.data[:, :, written] = 1
        before = _num_page_faults()
        storage.record_written(written)
        assert _num_page_faults() - before <= 4
    before = _num_page_faults()
    storage.data[:, :, PAGE_SLOTS, 0, 0] = 1
    assert (_num_page_faults() - before < NUM_PLANES // 2) == ahead


def _num_page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
