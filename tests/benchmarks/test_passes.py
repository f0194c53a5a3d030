"""The benchmark of forward passes: a whole run with a tiny model, and its table."""

from pathlib import Path

import msgspec
import pytest
from tiny import write_tiny_llama

from specserve_benchmarks.passes import Report, main


def test_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specserve_benchmarks.bandwidth.SIZE", 2**20)
    write_tiny_llama(tmp_path, seed=0)
    flags = ["--target", str(tmp_path), "--dtype", "float32", "--format", "none"]
    out = tmp_path / "result"
    sizes = ["--rows", "1", "5", "--contexts", "3", "40", "--repeats", "2"]
    assert main([*flags, *sizes, "--out", str(out)]) == 0
    report = msgspec.json.decode(out.with_suffix(".json").read_bytes(), type=Report)
    assert [(cell.context, cell.num_rows) for cell in report.cells] == [
        *((3, 1), (3, 5)),
        *((40, 1), (40, 5)),
    ]
    assert all(len(cell.seconds) == 2 for cell in report.cells)
    text = out.with_suffix(".md").read_text()
    first, later = (cell.median_ms for cell in report.cells[:2])
    assert f"| 5 | {later:.2f} ({later / first:.2f}) |" in text
    assert text.splitlines()[0] in capsys.readouterr().out


def test_a_format_that_is_not_possible(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny_llama(tmp_path, seed=0, head_dim=6)
    assert main(["--target", str(tmp_path), "--format", "int8"]) == 2
    assert "quantization" in capsys.readouterr().err
