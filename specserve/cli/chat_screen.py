"""The output of a chat: on a terminal, or as plain text."""

import sys
from collections import deque
from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter
from typing import Final

from rich.console import Console

from specserve.client import Delta, SpeculationReport

_STYLES: Final = ("green", "cyan", "magenta", "yellow", "blue")
_PREDICTION_STYLE: Final = "bright_green"
# Replaces control characters, so that a model's text cannot send commands to the terminal.
_CONTROLS: Final = {
    code: "" if chr(code) == "\r" else "\ufffd"
    for code in (*range(0x20), *range(0x7F, 0xA0))
    if chr(code) not in "\n\t"
}


class PlainScreen:
    """Writes answers to stdout unchanged, notes and errors (on one line) to stderr."""

    def show(self, delta: Delta) -> None:
        print(delta.text, end="", flush=True)

    def end_answer(self) -> None:
        print(flush=True)

    def note(self, text: str) -> None:
        print(text, file=sys.stderr)

    def error(self, text: str) -> None:
        print(f"specserve: error: {_one_line(text)}", file=sys.stderr)


class TerminalScreen:
    """Writes to a terminal. With a `report`, tokens are coloured by drafter id.

    The deltas must then hold logprobs, which give the bytes of each token.
    """

    def __init__(self, console: Console, report: SpeculationReport | None = None) -> None:
        self._console = console
        self._report = report
        self._runs = DrafterRuns()

    def show(self, delta: Delta) -> None:
        for text, drafter_id in self._runs.feed(delta):
            style = None if self._report is None else self._style(drafter_id)
            self._write(text, style)

    def end_answer(self) -> None:
        self._runs = DrafterRuns()
        self._write("\n")

    def note(self, text: str) -> None:
        self._write(f"{text}\n", "dim")

    def error(self, text: str) -> None:
        self._write(f"error: {_one_line(text)}\n", "red")

    def legend(self) -> None:
        """Show the colour of each drafter, if tokens are coloured."""
        if self._report is not None:
            self._write("tokens by drafter: target")
            for drafter_id, name in enumerate(self._report.drafters, start=1):
                self._write("  ")
                self._write(name, self._style(drafter_id))
            self._write("\n")

    def _style(self, drafter_id: int) -> str | None:
        assert self._report is not None
        if drafter_id == 0:
            return None
        if drafter_id > len(self._report.drafters):
            return _PREDICTION_STYLE
        return _STYLES[(drafter_id - 1) % len(_STYLES)]

    def _write(self, text: str, style: str | None = None) -> None:
        self._console.out(text.translate(_CONTROLS), style=style, end="", highlight=False)
        self._console.file.flush()


Screen = PlainScreen | TerminalScreen


class DrafterRuns:
    """Splits streamed text into runs of characters with the same drafter id.

    A character belongs to the token that holds its first byte. Text may arrive later than its
    tokens, so the lengths of tokens are queued until their text arrives.
    """

    def __init__(self) -> None:
        self._waiting: deque[tuple[int, int]] = deque()  # (number of bytes, drafter id)
        self._spent = 0  # bytes of the first waiting token that have been shown

    def feed(self, delta: Delta) -> Iterator[tuple[str, int]]:
        """Yields the (text, drafter id) of each run in the text of `delta`."""
        for logprob, drafter_id in zip(delta.logprobs, delta.drafter_ids, strict=False):
            raw = logprob.token.encode() if logprob.raw is None else logprob.raw
            self._waiting.append((len(raw), drafter_id))
        drafter_ids = [self._drafter_of(char) for char in delta.text]
        for drafter_id, run in groupby(zip(delta.text, drafter_ids, strict=True), itemgetter(1)):
            yield "".join(char for char, _ in run), drafter_id

    def _drafter_of(self, char: str) -> int:
        """The drafter id of the next character, `char`; 0 if its token is unknown."""
        while self._waiting and self._spent >= self._waiting[0][0]:
            self._spent -= self._waiting.popleft()[0]
        self._spent += len(char.encode())
        return self._waiting[0][1] if self._waiting else 0


def _one_line(text: str) -> str:
    return " ".join(text.split()).translate(_CONTROLS)
