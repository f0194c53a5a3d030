"""Costs of forward passes: measured once, kept in the cache folder, improved by later starts."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny import EngineFactory

from specserve.engine import measure
from specserve.speculation.cost_model import CostModel

Seconds = Callable[[int, int], float]  # of a forward pass, by rows and context


def line(rows: int, context: int) -> float:
    return (4.0 + rows + 0.01 * context) / 1000


class Machine:
    """A machine with a clock of its own, on which the start of an engine takes no time but that of
    the forward passes that are timed."""

    def __init__(
        self, make_engine: EngineFactory, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.now, self.num_timed = 1e6, 0
        self.seconds: Seconds = line
        self._make_engine, self._cache = make_engine, cache
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
        clock = SimpleNamespace(perf_counter=lambda: self.now, time=lambda: self.now)
        monkeypatch.setattr(measure, "time", clock)
        monkeypatch.setattr(measure, "_timed", lambda runner, seq, point: self._timed(*point))

    def start(self, **settings: str) -> CostModel:
        parts = self._make_engine("none", **settings).parts
        measure.measure_costs(parts)
        return parts.cost_model

    @property
    def files(self) -> list[Path]:
        return list((self._cache / "specserve" / "pass-costs").iterdir())

    def _timed(self, rows: int, context: int) -> float:
        self.num_timed += 1
        seconds = self.seconds(rows, context)
        self.now += seconds
        return seconds


@pytest.fixture
def machine(make_engine: EngineFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(make_engine, tmp_path, monkeypatch)


def test_a_later_start_takes_a_moment_and_uses_the_stored_times_at_its_own_speed(
    machine: Machine,
) -> None:
    first, started = machine.start(), machine.now
    machine.seconds = lambda rows, context: 3 * line(rows, context)
    again = machine.start()
    assert machine.now - started < 0.6, "two passes may exceed the budget"
    for context in (100.0, 400.0):
        expected = [3 * each for each in first.seconds(1, 80, context)]
        assert again.seconds(1, 80, context) == pytest.approx(expected)


def test_times_of_a_disturbed_start_improve(machine: Machine) -> None:
    expected = machine.start().seconds(1, 80, 300.0)
    machine.files[0].unlink()
    machine.seconds = lambda rows, context: (1 + machine.num_timed % 5) * line(rows, context)
    assert machine.start().seconds(1, 80, 300.0) != pytest.approx(expected)
    machine.seconds = line
    for _ in range(40):
        costs = machine.start()
    assert costs.seconds(1, 80, 300.0) == pytest.approx(expected)


def test_old_times_are_measured_again(machine: Machine) -> None:
    machine.start()
    machine.seconds = lambda rows, context: rows / 1000
    machine.now += 8 * 86400
    assert machine.start().seconds(1, 3) == pytest.approx([0.001, 0.002, 0.003])


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{}",
        '{"since":1e6,"passes":[]}',
        '{"since":1e6,"passes":[[1,128,0.1]]}',
        '{"since":1e6,"passes":[[1,128,-0.1]]}',
    ],
)
def test_a_damaged_file_is_replaced(content: str, machine: Machine) -> None:
    expected = machine.start().seconds(1, 80)
    machine.files[0].write_text(content)
    assert machine.start().seconds(1, 80) == pytest.approx(expected)
    assert len(machine.files[0].read_text()) > len(content)


def test_a_cache_folder_that_cannot_be_written_is_no_error(
    machine: Machine, tmp_path: Path
) -> None:
    (tmp_path / "specserve").write_text("a file in place of the folder")
    assert machine.start().is_measured


def test_other_settings_have_times_of_their_own(machine: Machine) -> None:
    for dtype in ("float32", "bfloat16", "float32"):
        machine.start(dtype=dtype)
    assert len(machine.files) == 2
