"""The kernel benchmark: every case runs, and each byte is counted once."""

import time
from pathlib import Path

import msgspec
import pytest
import torch

from specserve_benchmarks import kernels
from specserve_benchmarks.kernels import Report, seconds_per_call
from specserve_kernels.dispatch import select_kernels


def test_the_measured_time_is_that_of_the_call() -> None:
    measured = seconds_per_call(lambda: time.sleep(0.02), torch.device("cpu"))
    assert 0.02 <= measured < 0.2


def test_a_run(tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "kernels.json"
    flags = ["--target", str(tiny_model), "--device", "cpu", "--dtype", "float32"]
    assert kernels.main([*flags, "--rows", "1", "3", "--contexts", "32", "--out", str(out)]) == 0
    report = msgspec.json.decode(out.read_bytes(), type=Report)
    in_use = select_kernels(torch.device("cpu")).name
    assert {timing.backend for timing in report.timings} == {"torch", in_use}
    reference = [timing for timing in report.timings if timing.backend == "torch"]
    found = {(t.kernel, t.context, t.num_rows): t for t in reference}
    assert set(found) == {
        (kernel, context, num_rows)
        for kernel, context in (
            ("paged_tree_attention", 32),
            ("kv_write", None),
            ("kv_commit", None),
            ("gumbel_argmax", None),
            ("model step", 32),
        )
        for num_rows in (1, 3)
    }
    assert all(timing.seconds > 0 for timing in report.timings)
    slot = 2 * 2 * 8 * 4  # K and V, 2 heads of 8 floats
    assert found["paged_tree_attention", 32, 3].num_bytes == 35 * slot
    assert found["kv_commit", None, 3].num_bytes == 2 * 3 * 2 * slot  # read and write, 2 layers
    step = found["model step", 32, 1].num_bytes, found["model step", 32, 3].num_bytes
    assert step[1] - step[0] == 2 * 2 * slot  # 2 more rows of KV, 2 layers


def test_a_context_longer_than_the_models_is_refused(
    tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--target", str(tiny_model), "--device", "cpu", "--contexts", "5000"]
    assert kernels.main(flags) == 2
    assert "contexts: 5000" in capsys.readouterr().err
