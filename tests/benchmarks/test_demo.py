"""The demo on a tiny model: the default drafters against plain decoding."""

from pathlib import Path

import pytest
from tiny_chat import write_tiny_chat

from specserve_benchmarks import demo


def test_the_demo_shows_the_default_drafters(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(demo, "TARGET", str(write_tiny_chat(tiny_model, tmp_path / "tiny")))
    monkeypatch.setenv("COLUMNS", "160")
    assert demo.main([]) == 0
    shown = capsys.readouterr().out
    assert shown.count(" none ") == shown.count(" auto ") == len(demo.PROMPTS)
    assert "with and without speculation: identical" in shown
