"""Every row of BAD_INPUTS.md names tests that exist."""

import re
from pathlib import Path

TABLE = Path(__file__).parent / "BAD_INPUTS.md"
TESTS = Path(__file__).parent.parent


def test_every_bad_input_has_a_test() -> None:
    rows = re.findall(r"^\| (\d+) \|.*\| (.*) \|$", TABLE.read_text(), re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 63))
    for number, tests in rows:
        named = re.findall(r"`([\w/]+\.py)::(\w+)`", tests)
        assert named, number
        for file, test in named:
            source = (TESTS / file).read_text()
            assert re.search(rf"^(def|class) {test}\b", source, re.MULTILINE), (number, file, test)
