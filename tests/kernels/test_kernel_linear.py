"""Products with packed weights: every native build against the reference; exactness."""

import ctypes
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specserve_kernels.cases import LINEAR_CASES, LinearCase
from specserve_kernels.cpu import linear
from specserve_kernels.cpu.native import load, runnable_builds
from specserve_kernels.packed_weight import (
    GROUP,
    PackedWeight,
    WeightFormat,
    pack_floats,
    pack_int4,
    pack_int8,
    quantize_int8,
    unpack,
    unpack_rows,
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
def test_matches_the_reference(library: ctypes.CDLL, case: LinearCase) -> None:
    weight, x = case.weight(), case.rows(11)
    native, reference = linear.packed_linear(library, x, weight), packed_linear(x, weight)
    # The error of a float32 sum is relative to the sum of magnitudes.
    size = packed_linear(x.abs(), _magnitudes(weight)).clamp_min(1e-3)
    assert native.shape == (11, case.num_outputs)
    assert ((native - reference).abs() / size).max() < 5e-6


@each_case
def test_rows_do_not_depend_on_each_other(library: ctypes.CDLL, case: LinearCase) -> None:
    weight, x = case.weight(), case.rows(max(ROW_COUNTS))
    alone = torch.cat([linear.packed_linear(library, row, weight) for row in torch.split(x, 1)])
    for num_rows in ROW_COUNTS:
        for start in (0, max(ROW_COUNTS) - num_rows):
            rows = slice(start, start + num_rows)
            together = linear.packed_linear(library, x[rows], weight)
            assert torch.equal(together, alone[rows]), f"{num_rows} rows from {start}"


@each_case
def test_threads_do_not_change_bits(library: ctypes.CDLL, case: LinearCase) -> None:
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


def test_quantized_rows_match_the_reference(library: ctypes.CDLL) -> None:
    x = torch.randn(90, GROUP, generator=torch.Generator().manual_seed(0))
    x[1] = 0
    x[2, :5] = torch.tensor([0.5, 1.5, -2.5, 127.0, -126.5])  # ties
    x[3] *= 1e-38
    x[4] *= 1e36
    x[5, 8], x[6, 7], x[7, 0] = torch.nan, torch.inf, -torch.inf
    identity = pack_int8(torch.eye(GROUP, dtype=torch.int8), torch.ones(GROUP, 1).half())
    restored = linear.packed_linear(library, x, identity)
    values, scales = quantize_rows(x)
    torch.testing.assert_close(restored, values * scales, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("weight_format", WeightFormat)
def test_a_non_finite_value_affects_its_row_only(
    library: ctypes.CDLL, weight_format: WeightFormat, bad: float
) -> None:
    case = LinearCase(weight_format, 48, 64)
    x = case.rows(5)
    good = linear.packed_linear(library, x, case.weight())
    x[3, 7] = bad
    bad_out = linear.packed_linear(library, x, case.weight())
    assert not bad_out[3].isfinite().any()
    others = torch.tensor([0, 1, 2, 4])
    assert torch.equal(bad_out[others], good[others])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("num_outputs", [1, 16, 45])
def test_floats_are_packed_as_they_are(dtype: torch.dtype, num_outputs: int) -> None:
    weight = torch.randn(num_outputs, 96, generator=torch.Generator().manual_seed(2)).to(dtype)
    weight[0, :3] = torch.tensor([0.0, -0.0, torch.finfo(dtype).smallest_normal / 4])
    packed = pack_floats(weight)
    assert torch.equal(unpack(packed), weight.float())
    rows = torch.tensor([num_outputs - 1, 0, 0])
    assert torch.equal(unpack_rows(packed, rows), weight[rows].float())


def test_the_activations_of_float_weights_are_not_rounded(library: ctypes.CDLL) -> None:
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(3))
    identity = pack_floats(torch.eye(64, dtype=torch.bfloat16))
    assert torch.equal(linear.packed_linear(library, x, identity), x)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 40), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_pack_and_dequantize_round_trip(num_outputs: int, num_groups: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (num_outputs, num_groups * GROUP)
    scales = torch.randn(num_outputs, num_groups, generator=generator).half()
    minimums = torch.randn(num_outputs, num_groups, generator=generator).half()
    scale, minimum = (x.float().repeat_interleave(GROUP, 1) for x in (scales, minimums))

    nibbles = torch.randint(0, 16, shape, generator=generator, dtype=torch.uint8)
    assert torch.equal(unpack(pack_int4(nibbles, scales, minimums)), nibbles * scale + minimum)
    bytes_ = torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)
    assert torch.equal(unpack(pack_int8(bytes_, scales)), bytes_ * scale)


def test_quantization_error_is_bounded() -> None:
    weight = torch.randn(20, 96, generator=torch.Generator().manual_seed(1))
    weight[3, :GROUP] = 0
    weight[4, :GROUP] *= 1e-9  # the scale is zero in float16
    groups = torch.unflatten(weight, 1, (-1, GROUP))
    step = groups.abs().amax(-1, keepdim=True) / 127
    error = (torch.unflatten(unpack(quantize_int8(weight)), 1, (-1, GROUP)) - groups).abs()
    # Half a step, and the rounding of the scale to float16, times up to 127 steps.
    assert (error <= step * (0.5 + 127 / 2048) + 1e-7).all()


@pytest.mark.parametrize("shape", [(16, 33), (0, 32), (16, 0), (32,)])
def test_unsupported_shapes_raise(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="multiple of 32"):
        quantize_int8(torch.zeros(shape))
    with pytest.raises(ValueError, match="multiple of 32"):
        pack_floats(torch.zeros(shape))
    with pytest.raises(ValueError, match="float64 cannot be packed"):
        pack_floats(torch.zeros(16, 32, dtype=torch.float64))
    with pytest.raises(ValueError, match="one float16 per group"):
        pack_int8(torch.zeros(16, 64, dtype=torch.int8), torch.zeros(16, 1).half())


def _magnitudes(weight: PackedWeight) -> PackedWeight:
    """A weight of at least the same magnitudes, all positive."""
    return quantize_int8(unpack(weight).abs() * 1.1)


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
