"""The benchmark of starting: a whole run with a tiny model, and its table."""

from pathlib import Path

import msgspec
import pytest
from tiny_chat import write_byte_chat

from specserve_benchmarks.startup import COMMANDS, Report, main


def test_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_byte_chat(tmp_path / "model")
    out = tmp_path / "result"
    assert main(["--target", str(model), "--repeats", "1", "--out", str(out)]) == 0
    report = msgspec.json.decode(out.with_suffix(".json").read_bytes(), type=Report)
    assert [(start.tree, start.command) for start in report.starts] == [
        ("this", command) for command in COMMANDS
    ]
    assert all(start.wall_s > 0 and start.processor_s > 0 for start in report.starts)
    assert "importing torch" in [name for name, _, _ in report.stages["generate"]]
    assert "measuring what a pass costs" in [name for name, _, _ in report.stages["serve"]]
    text = out.with_suffix(".md").read_text()
    wall = report.starts[1].wall_s
    assert f"| this | serve | {wall:.2f} ({wall:.2f} to {wall:.2f}) |" in text
    assert text.splitlines()[0] in capsys.readouterr().out


def test_a_folder_that_is_no_source_tree(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["--tree", f"old={tmp_path}"])
    assert "has no folder specserve/cli" in capsys.readouterr().err
