"""Products with quantised weights: every native build against the reference; exactness."""

import ctypes
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specserve_kernels.cases import LINEAR_CASES, LinearCase
from specserve_kernels.cpu import linear
from specserve_kernels.cpu.native import load, runnable_builds
from specserve_kernels.quantized_weight import (
    GROUP,
    QuantizedWeight,
    WeightFormat,
    dequantize,
    pack_int4,
    pack_int8,
    quantize_int8,
)
from specserve_kernels.torch_ref.linear import quantize_rows, quantized_linear

ROW_COUNTS = (1, 2, 3, 5, 8, 9, 16, 31, 64, 65, 150)


@pytest.fixture(params=runnable_builds())
def library(request: pytest.FixtureRequest) -> ctypes.CDLL:
    return load(request.param)


def case_name(case: LinearCase) -> str:
    return f"{case.format.name.lower()}-{case.num_outputs}x{case.num_inputs}"


each_case = pytest.mark.parametrize("case", LINEAR_CASES, ids=case_name)


@each_case
def test_matches_the_reference(library: ctypes.CDLL, case: LinearCase) -> None:
    weight, x = case.weight(), case.rows(11)
    native, reference = linear.quantized_linear(library, x, weight), quantized_linear(x, weight)
    # The error of a float32 sum is relative to the sum of magnitudes.
    size = quantized_linear(x.abs(), _magnitudes(weight)).clamp_min(1e-3)
    assert native.shape == (11, case.num_outputs)
    assert ((native - reference).abs() / size).max() < 5e-6


@each_case
def test_rows_do_not_depend_on_each_other(library: ctypes.CDLL, case: LinearCase) -> None:
    weight, x = case.weight(), case.rows(max(ROW_COUNTS))
    alone = torch.cat([linear.quantized_linear(library, row, weight) for row in torch.split(x, 1)])
    for num_rows in ROW_COUNTS:
        for start in (0, max(ROW_COUNTS) - num_rows):
            rows = slice(start, start + num_rows)
            together = linear.quantized_linear(library, x[rows], weight)
            assert torch.equal(together, alone[rows]), f"{num_rows} rows from {start}"


@each_case
def test_threads_do_not_change_bits(library: ctypes.CDLL, case: LinearCase) -> None:
    weight, x = case.weight(), case.rows(40)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(linear.quantized_linear(library, x, weight))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_quantized_rows_match_the_reference(library: ctypes.CDLL) -> None:
    x = torch.randn(90, GROUP, generator=torch.Generator().manual_seed(0))
    x[1] = 0
    x[2, :5] = torch.tensor([0.5, 1.5, -2.5, 127.0, -126.5])  # ties
    x[3] *= 1e-38
    x[4] *= 1e36
    x[5, 8], x[6, 7], x[7, 0] = torch.nan, torch.inf, -torch.inf
    identity = pack_int8(torch.eye(GROUP, dtype=torch.int8), torch.ones(GROUP, 1).half())
    restored = linear.quantized_linear(library, x, identity)
    values, scales = quantize_rows(x)
    torch.testing.assert_close(restored, values * scales, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("weight_format", WeightFormat)
def test_a_non_finite_value_affects_its_row_only(
    library: ctypes.CDLL, weight_format: WeightFormat, bad: float
) -> None:
    case = LinearCase(weight_format, 48, 64)
    x = case.rows(5)
    good = linear.quantized_linear(library, x, case.weight())
    x[3, 7] = bad
    bad_out = linear.quantized_linear(library, x, case.weight())
    assert not bad_out[3].isfinite().any()
    others = torch.tensor([0, 1, 2, 4])
    assert torch.equal(bad_out[others], good[others])


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 40), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_pack_and_dequantize_round_trip(num_outputs: int, num_groups: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (num_outputs, num_groups * GROUP)
    scales = torch.randn(num_outputs, num_groups, generator=generator).half()
    minimums = torch.randn(num_outputs, num_groups, generator=generator).half()
    scale, minimum = (x.float().repeat_interleave(GROUP, 1) for x in (scales, minimums))

    nibbles = torch.randint(0, 16, shape, generator=generator, dtype=torch.uint8)
    assert torch.equal(dequantize(pack_int4(nibbles, scales, minimums)), nibbles * scale + minimum)
    bytes_ = torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)
    assert torch.equal(dequantize(pack_int8(bytes_, scales)), bytes_ * scale)


def test_quantization_error_is_bounded() -> None:
    weight = torch.randn(20, 96, generator=torch.Generator().manual_seed(1))
    weight[3, :GROUP] = 0
    weight[4, :GROUP] *= 1e-9  # the scale is zero in float16
    groups = torch.unflatten(weight, 1, (-1, GROUP))
    step = groups.abs().amax(-1, keepdim=True) / 127
    error = (torch.unflatten(dequantize(quantize_int8(weight)), 1, (-1, GROUP)) - groups).abs()
    # Half a step, and the rounding of the scale to float16, times up to 127 steps.
    assert (error <= step * (0.5 + 127 / 2048) + 1e-7).all()


@pytest.mark.parametrize("shape", [(16, 33), (0, 32), (16, 0), (32,)])
def test_unsupported_shapes_raise(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="multiple of 32"):
        quantize_int8(torch.zeros(shape))
    with pytest.raises(ValueError, match="one float16 per group"):
        pack_int8(torch.zeros(16, 64, dtype=torch.int8), torch.zeros(16, 1).half())


def _magnitudes(weight: QuantizedWeight) -> QuantizedWeight:
    """A weight of at least the same magnitudes, all positive."""
    return quantize_int8(dequantize(weight).abs() * 1.1)


@pytest.mark.skipif(not runnable_builds(), reason="built without a compiler")
def test_runnable_builds_match_cpuinfo() -> None:
    flags = set(Path("/proc/cpuinfo").read_text().split())
    expected = ["portable"]
    if {"avx2", "fma", "f16c", "bmi2"} <= flags:
        expected.append("avx2")
        if {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512_vnni"} <= flags:
            expected.append("avx512")
            if "avx512_bf16" in flags:
                expected.append("avx512bf16")
    assert list(runnable_builds()) == expected
