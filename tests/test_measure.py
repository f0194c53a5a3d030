"""Costs of forward passes: measured once, kept in the cache folder, checked at every start."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import EngineFactory

from specserve.engine import measure
from specserve.engine.parts import EngineParts

Seconds = Callable[[int, int], float]  # of a forward pass, by rows and context


@pytest.fixture
def start(
    make_engine: EngineFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Seconds], tuple[EngineParts, int]]:
    """Starts an engine on a machine of the given speed; returns its parts and how many forward
    passes were timed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def start(seconds: Seconds) -> tuple[EngineParts, int]:
        timed: list[tuple[int, int]] = []

        def fake(runner: object, seq: object, point: tuple[int, int]) -> float:
            timed.append(point)
            return seconds(*point)

        monkeypatch.setattr(measure, "_timed", fake)
        parts = make_engine("none").parts
        measure.measure_costs(parts)
        return parts, len(timed)

    return start


def line(rows: int, context: int) -> float:
    return 4.0 + rows + 0.01 * context


def slower(rows: int, context: int) -> float:
    return 3 * line(rows, context)


def steeper(rows: int, context: int) -> float:
    return 1.0 + rows


def stored(tmp_path: Path) -> Path:
    (file,) = (tmp_path / "specserve" / "pass-costs").iterdir()
    return file


def test_a_later_start_uses_the_stored_costs_at_its_own_speed(
    start: Callable[[Seconds], tuple[EngineParts, int]],
) -> None:
    first, num_measured = start(line)
    again, num_checked = start(slower)
    assert num_checked < num_measured / 5
    for context in (100.0, 400.0):
        expected = [3 * each for each in first.cost_model.seconds(1, 80, context)]
        assert again.cost_model.seconds(1, 80, context) == pytest.approx(expected)


def test_costs_that_changed_are_measured_again(
    start: Callable[[Seconds], tuple[EngineParts, int]],
) -> None:
    start(line)
    changed, _ = start(steeper)
    assert changed.cost_model.seconds(1, 3) == [2.0, 3.0, 4.0]
    again, _ = start(steeper)
    assert again.cost_model.seconds(1, 3) == [2.0, 3.0, 4.0], "the new costs are stored"


@pytest.mark.parametrize(
    "content", ["", "{}", '{"samples":{"1":0,"8":1},"context":128,"fixed":0,"per_row":0}']
)
def test_a_damaged_file_is_replaced(
    content: str, start: Callable[[Seconds], tuple[EngineParts, int]], tmp_path: Path
) -> None:
    start(line)
    good = stored(tmp_path).read_bytes()
    stored(tmp_path).write_text(content)
    parts, _ = start(line)
    assert parts.cost_model.is_measured
    assert stored(tmp_path).read_bytes() == good


def test_a_cache_folder_that_cannot_be_written_is_no_error(
    start: Callable[[Seconds], tuple[EngineParts, int]], tmp_path: Path
) -> None:
    (tmp_path / "specserve").write_text("a file in place of the folder")
    parts, _ = start(line)
    assert parts.cost_model.is_measured


def test_other_settings_have_costs_of_their_own(
    make_engine: EngineFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(measure, "_timed", lambda runner, seq, point: line(*point))
    for dtype in ("float32", "bfloat16", "float32"):
        measure.measure_costs(make_engine("none", dtype=dtype).parts)
    assert len(list((tmp_path / "specserve" / "pass-costs").iterdir())) == 2
