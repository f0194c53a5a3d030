"""The command that measures what a hostile key costs another one."""

from pathlib import Path

import msgspec
import pytest
from tiny_chat import write_byte_chat

from specserve_evals import two_keys
from specserve_evals.hostile_key import ATTACKS
from specserve_evals.two_keys import Load, Report, find_failures


def test_a_short_run(tmp_path: Path) -> None:
    """Times are not judged here; that every request of the load is answered is."""
    model = write_byte_chat(tmp_path / "tiny-chat", context=8192)
    out = tmp_path / "report.json"
    engine = ["--kv-memory", "64MiB", "--device", "cpu"]
    arguments = ["--target", str(model), "--seconds", "2", "--rate", "4", "--rounds", "1"]
    two_keys.main([*arguments, "--out", str(out), "--", *engine])
    report = msgspec.json.decode(out.read_bytes(), type=Report)
    assert not report.alone.errors
    assert not report.beside.errors
    assert len(report.alone.ttft_s) == len(report.beside.ttft_s) == 8
    assert not report.left_behind
    assert set(report.hostile_answers) == set(ATTACKS), "an attack was never answered"
    assert not any(
        status.startswith("5") for each in report.hostile_answers.values() for status in each
    )
    assert str(tmp_path) not in out.read_text()


@pytest.mark.parametrize(
    ("beside", "left", "failure"),
    [
        (Load([0.2] * 100), [], None),
        (Load([0.1] * 90 + [0.3] * 10), [], "p99 TTFT is 3.00 times that without attacks"),
        (Load([0.1] * 100, errors=["429: no"]), [], "during the attacks: 429: no"),
        (Load([0.1] * 100), ["3 tasks"], "not released: 3 tasks"),
    ],
)
def test_what_fails_a_run(beside: Load, left: list[str], failure: str | None) -> None:
    found = find_failures(Load([0.1] * 100), beside, left)
    assert len(found) == (failure is not None)
    assert failure is None or failure in found[0]
