"""KV writes and commits of the torch reference against one move at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from specserve_kernels.cases import COMMIT_MOVES
from specserve_kernels.torch_ref import TorchKernels

KERNELS = TorchKernels()


def one_by_one(kv: Tensor, moves: tuple[tuple[int, int], ...]) -> Tensor:
    expected = kv.clone()
    for source, destination in moves:
        expected[:, :, destination] = expected[:, :, source]
    return expected


def commit(kv: Tensor, moves: tuple[tuple[int, int], ...]) -> None:
    pairs = torch.tensor(moves, dtype=torch.int64).view(-1, 2)
    KERNELS.kv_commit(kv, pairs[:, 0].contiguous(), pairs[:, 1].contiguous())


@pytest.mark.parametrize("moves", COMMIT_MOVES, ids=len)
def test_commit_moves_in_ascending_order(moves: tuple[tuple[int, int], ...]) -> None:
    kv = torch.randn(3, 2, 64, 2, 8)
    expected = one_by_one(kv, moves)
    commit(kv, moves)
    assert torch.equal(kv, expected)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_commit_compacts_any_accepted_paths(data: st.DataObject) -> None:
    """Two sequences of 20 slots each; node a_k of a path moves to place k."""
    moves: list[tuple[int, int]] = []
    for root in (0, 20):
        path = sorted(data.draw(st.sets(st.integers(1, 19), max_size=10)))
        moves += [(root + node, root + place) for place, node in enumerate(path, 1)]
    kv = torch.arange(2 * 2 * 40.0).view(2, 2, 40, 1, 1)
    expected = one_by_one(kv, tuple(moves))
    commit(kv, tuple(moves))
    assert torch.equal(kv, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_write_skips_padding(dtype: torch.dtype) -> None:
    k, v = torch.randn(5, 2, 8), torch.randn(5, 2, 8)
    k_cache, v_cache = torch.zeros(10, 2, 8, dtype=dtype), torch.zeros(10, 2, 8, dtype=dtype)
    KERNELS.kv_write(k, v, k_cache, v_cache, torch.tensor([7, -1, 0, 9, -1]))
    for new, cache in ((k, k_cache), (v, v_cache)):
        expected = torch.zeros_like(cache)
        expected[[7, 0, 9]] = new[[0, 2, 3]].to(dtype)
        assert torch.equal(cache, expected)
