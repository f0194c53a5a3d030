"""Products with quantised weights: every build against the definition, and rows alone or not."""

import ctypes
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specserve_kernels.cases import LINEAR_CASES, LinearCase
from specserve_kernels.cpu import linear
from specserve_kernels.cpu.native import load, runnable_builds
from specserve_kernels.packing import (
    GROUP,
    PackedWeight,
    WeightFormat,
    pack_int4,
    pack_int8,
    quantize_int8,
    unpack,
)
from specserve_kernels.torch_ref.linear import packed_linear, quantize_rows

ROW_COUNTS = (1, 2, 3, 5, 8, 9, 16, 31, 64, 65, 150)


@pytest.fixture(params=runnable_builds())
def library(request: pytest.FixtureRequest) -> ctypes.CDLL:
    return load(request.param)


def case_name(case: LinearCase) -> str:
    return f"{case.format.name.lower()}-{case.num_outputs}x{case.num_inputs}"


each_case = pytest.mark.parametrize("case", LINEAR_CASES, ids=case_name)


@each_case
def test_agrees_with_the_definition(library: ctypes.CDLL, case: LinearCase) -> None:
    weight, x = case.weight(), case.rows(11)
    ours, twin = linear.packed_linear(library, x, weight), packed_linear(x, weight)
    # float32 sums of a few dozen groups: relative to what is added up, not to what is left.
    size = packed_linear(x.abs(), _magnitudes(weight)).clamp_min(1e-3)
    assert ours.shape == (11, case.num_outputs)
    assert ((ours - twin).abs() / size).max() < 5e-6


@each_case
def test_rows_never_see_each_other(library: ctypes.CDLL, case: LinearCase) -> None:
    weight, x = case.weight(), case.rows(max(ROW_COUNTS))
    alone = torch.cat([linear.packed_linear(library, row, weight) for row in torch.split(x, 1)])
    for num_rows in ROW_COUNTS:
        for start in (0, max(ROW_COUNTS) - num_rows):
            rows = slice(start, start + num_rows)
            together = linear.packed_linear(library, x[rows], weight)
            assert torch.equal(together, alone[rows]), f"{num_rows} rows from {start}"


@each_case
def test_threads_do_not_matter(library: ctypes.CDLL, case: LinearCase) -> None:
    weight, x = case.weight(), case.rows(40)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(linear.packed_linear(library, x, weight))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_rows_are_quantised_as_defined(library: ctypes.CDLL) -> None:
    x = torch.randn(30, 3 * GROUP, generator=torch.Generator().manual_seed(0))
    x[1] = 0
    x[2, :5] = torch.tensor([0.5, 1.5, -2.5, 127.0, -126.5])  # ties
    x[3] *= 1e-38
    x[4] *= 1e36
    x[5, 40], x[6, 70], x[7, 0] = torch.nan, torch.inf, -torch.inf
    rows = linear.quantize_rows(library, x)
    values, scales = quantize_rows(x)
    assert torch.equal(rows.values, values)
    assert torch.equal(rows.scales.nan_to_num(-1), scales.nan_to_num(-1))
    assert torch.equal(rows.scales.isnan().any(1), ~x.isfinite().all(1))
    sums = torch.unflatten(values, 1, (-1, GROUP)).sum(2, dtype=torch.int32)
    assert torch.equal(rows.sums, sums)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("weight_format", WeightFormat)
def test_a_value_that_is_not_finite_spoils_its_row_only(
    library: ctypes.CDLL, weight_format: WeightFormat, bad: float
) -> None:
    case = LinearCase(weight_format, 48, 64)
    x = case.rows(5)
    good = linear.packed_linear(library, x, case.weight())
    x[3, 7] = bad
    spoilt = linear.packed_linear(library, x, case.weight())
    assert not spoilt[3].isfinite().any()
    others = torch.tensor([0, 1, 2, 4])
    assert torch.equal(spoilt[others], good[others])


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 40), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_packing_keeps_every_weight(num_outputs: int, num_groups: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (num_outputs, num_groups * GROUP)
    scales = torch.randn(num_outputs, num_groups, generator=generator).half()
    minimums = torch.randn(num_outputs, num_groups, generator=generator).half()
    wide, offset = (x.float().repeat_interleave(GROUP, 1) for x in (scales, minimums))

    nibbles = torch.randint(0, 16, shape, generator=generator, dtype=torch.uint8)
    assert torch.equal(unpack(pack_int4(nibbles, scales, minimums)), nibbles * wide + offset)
    bytes_ = torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)
    assert torch.equal(unpack(pack_int8(bytes_, scales)), bytes_ * wide)


def test_quantised_weights_are_near() -> None:
    weight = torch.randn(20, 96, generator=torch.Generator().manual_seed(1))
    weight[3, :GROUP] = 0
    weight[4, :GROUP] *= 1e-9  # their scale is zero in float16
    groups = torch.unflatten(weight, 1, (-1, GROUP))
    step = groups.abs().amax(-1, keepdim=True) / 127
    error = (torch.unflatten(unpack(quantize_int8(weight)), 1, (-1, GROUP)) - groups).abs()
    # Half a step, and what the scale loses in float16: up to 127 steps of it.
    assert (error <= step * (0.5 + 127 / 2048) + 1e-7).all()


@pytest.mark.parametrize("shape", [(16, 33), (0, 32), (16, 0), (32,)])
def test_other_shapes_are_refused_by_name(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="groups of 32"):
        quantize_int8(torch.zeros(shape))
    with pytest.raises(ValueError, match="one float16 per group"):
        pack_int8(torch.zeros(16, 64, dtype=torch.int8), torch.zeros(16, 1).half())


def _magnitudes(weight: PackedWeight) -> PackedWeight:
    """A weight at least as large everywhere: what a sum of magnitudes is made of."""
    return quantize_int8(unpack(weight).abs() * 1.1)


@pytest.mark.skipif(not runnable_builds(), reason="built without a compiler")
def test_the_best_build_is_what_the_system_says_of_the_cpu() -> None:
    flags = set(Path("/proc/cpuinfo").read_text().split())
    expected = ["portable"]
    if {"avx2", "fma", "f16c", "bmi2"} <= flags:
        expected.append("avx2")
        if {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512_vnni"} <= flags:
            expected.append("avx512")
            if "avx512_bf16" in flags:
                expected.append("avx512bf16")
    assert list(runnable_builds()) == expected
