"""Drafters that fail: whose failure it is, and what becomes of the drafter.

A call that fails is made again for one sequence at a time, and whoever fails alone is left out of
that request. A drafter whose calls fail again and again, request after request, is switched off.
So a broken draft costs speed, never an answer, and a request never costs another its draft.
"""

import logging
import signal
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dis import opname
from typing import Final

from specserve.speculation.drafter import DraftError

MAX_FAILURES: Final = 8
logger = logging.getLogger(__name__)


class Failures:
    """Of all drafters. A drafter may raise anything, SystemExit as well."""

    def __init__(self) -> None:
        self.off: set[str] = set()  # drafters that are not asked any more
        self.counts: Counter[str] = Counter()  # calls that failed, by drafter
        self._in_a_row: Counter[tuple[str, str]] = Counter()  # calls, by drafter and method
        self._left_out: defaultdict[str, set[str]] = defaultdict(set)  # sequences, by drafter

    def leaves_out(self, name: str, seq_id: str) -> bool:
        return seq_id in self._left_out[name]

    def forget(self, seq_id: str) -> None:
        for left_out in self._left_out.values():
            left_out.discard(seq_id)

    def call(
        self, name: str, method: str, seq_ids: Sequence[str], call: Callable[[Sequence[str]], None]
    ) -> None:
        """`call` a drafter for all of these sequences or, if that fails, for each of them."""
        try:
            call(seq_ids)
        except BaseException as error:
            self._count(name, method, error)
        else:
            self._in_a_row.pop((name, method), None)
            return
        if name in self.off:
            return
        for seq_id in seq_ids:
            try:
                call((seq_id,))
            except BaseException as error:
                raise_interrupt(error)
                self._left_out[name].add(seq_id)
                kind = type(error).__name__
                logger.warning("drafter %r is left out of request %s: %s", name, seq_id, kind)

    def _count(self, name: str, method: str, error: BaseException) -> None:
        raise_interrupt(error)
        self.counts[name] += 1
        self._in_a_row[name, method] += 1
        if self._in_a_row[name, method] == MAX_FAILURES:
            self.off.add(name)
        fate = "switched off" if name in self.off else "tried again, a request at a time"
        logger.error("drafter %r failed in %s (%s)", name, method, fate, exc_info=error)


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Where a drafter is made ready: whatever it raises becomes an error that names it."""
    try:
        yield
    except ValueError:  # ours say what is wrong
        raise
    except BaseException as error:
        raise_interrupt(error)
        raise DraftError(
            f"draft: {name!r} could not be loaded: {type(error).__name__}: {error}"
        ) from error


def raise_interrupt(error: BaseException) -> None:
    """Raise what a drafter has raised if it is not the drafter's own but the user's Ctrl-C, or
    whatever else a signal handler of this process may have raised."""
    if _may_be_from_a_signal(error):
        raise error


def _may_be_from_a_signal(error: BaseException) -> bool:
    """Handlers run in the main thread, whatever it is doing. Python's own raises KeyboardInterrupt
    between two instructions, whereas a drafter needs one to raise it; of other handlers nothing is
    known."""
    if isinstance(error, Exception) or threading.current_thread() is not threading.main_thread():
        return False
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    if any(callable(h) and h is not signal.default_int_handler for h in handlers):
        return True
    if isinstance(error, KeyboardInterrupt) and signal.default_int_handler in handlers:
        return not _was_raised_by_an_instruction(error)
    return False


def _was_raised_by_an_instruction(error: BaseException) -> bool:
    innermost = error.__traceback__
    while innermost is not None and innermost.tb_next is not None:
        innermost = innermost.tb_next
    if innermost is None:
        return False
    code = innermost.tb_frame.f_code.co_code
    return opname[code[innermost.tb_lasti]] == "RAISE_VARARGS"
