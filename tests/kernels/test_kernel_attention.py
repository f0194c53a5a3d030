"""Exact backends against dense attention in float64, one row at a time."""

import itertools

import numpy as np
import pytest
import torch
from exact_kernels import each_exact_kernels
from torch import Tensor

from specserve_kernels.cases import ATTENTION_CASES, AttentionCase, AttentionInputs
from specserve_kernels.ops import Kernels
from specserve_kernels.segments import Segments


def visible_slots(segments: Segments, segment: int, row: int, window: int) -> list[int]:
    """The slots that a row attends to, by the definition in segments.py."""
    context = int(segments.context_lens[segment])
    first_node = int(segments.first_nodes[segment])
    start = int(segments.cu_rows[segment])
    word = int(segments.ancestors[start + row])
    assert word >> (first_node + row) == 1, "a row is its own last ancestor"
    nodes = [node for node in range(64) if word >> node & 1]
    places = [(position, position) for position in range(context)]
    places += [(context + depth, context + node) for depth, node in enumerate(nodes)]
    own_position = places[-1][0]
    table, size = segments.block_tables[segment], segments.block_size
    return [
        int(table[place // size]) * size + place % size
        for position, place in places
        if not window or position > own_position - window
    ]


def dense_attention(inputs: AttentionInputs, group_size: int, window: int) -> Tensor:
    """[num_rows, num_heads, head_dim] float64."""
    out = torch.zeros_like(inputs.q, dtype=torch.float64)
    segments = inputs.segments
    for segment, (start, end) in enumerate(itertools.pairwise(segments.cu_rows)):
        for row in range(end - start):
            slots = visible_slots(segments, segment, row, window)
            keys = inputs.k_cache[slots].double().repeat_interleave(group_size, dim=1)
            values = inputs.v_cache[slots].double().repeat_interleave(group_size, dim=1)
            scores = torch.einsum("hd,shd->hs", inputs.q[start + row].double(), keys)
            weights = torch.softmax(scores * inputs.scale, dim=1)
            out[start + row] = torch.einsum("hs,shd->hd", weights, values)
    return out


@each_exact_kernels
@pytest.mark.parametrize("case", ATTENTION_CASES, ids=lambda case: case.name)
def test_matches_dense_attention(kernels: Kernels, case: AttentionCase) -> None:
    inputs = case.build(torch.device("cpu"))
    plan = kernels.plan_attention(inputs.segments, case.num_kv_heads, case.group_size)
    out = kernels.paged_tree_attention(
        inputs.q, inputs.k_cache, inputs.v_cache, plan, scale=inputs.scale, window=case.window
    )
    expected = dense_attention(inputs, case.group_size, case.window)
    assert out.dtype == case.dtype
    tolerance = 3e-6 if case.dtype == torch.float32 else 1e-2
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


@each_exact_kernels
def test_one_plan_for_several_windows(kernels: Kernels) -> None:
    case = next(case for case in ATTENTION_CASES if case.name == "mixed")
    inputs = case.build(torch.device("cpu"))
    plan = kernels.plan_attention(inputs.segments, case.num_kv_heads, case.group_size)
    for window in (0, 5, 0):
        out = kernels.paged_tree_attention(
            inputs.q, inputs.k_cache, inputs.v_cache, plan, scale=inputs.scale, window=window
        )
        expected = dense_attention(inputs, case.group_size, window)
        torch.testing.assert_close(out.double(), expected, rtol=3e-6, atol=3e-6)


@each_exact_kernels
def test_padding_only_gives_zeros(kernels: Kernels) -> None:
    none = np.zeros(0, np.int32)
    tables = np.zeros((0, 1), np.int32)
    segments = Segments(np.zeros(1, np.int32), none, none, none.astype(np.uint64), tables, 4, 16)
    plan = kernels.plan_attention(segments, 1, 2)
    cache = torch.full((16, 1, 8), torch.nan)
    out = kernels.paged_tree_attention(torch.ones(4, 2, 8), cache, cache, plan, scale=1.0)
    assert torch.equal(out, torch.zeros(4, 2, 8))
