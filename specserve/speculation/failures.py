"""Drafters that fail: a broken draft costs speed, never an answer.

A call that fails is made again for one sequence at a time, and a drafter that fails for one alone
is left out of that request. After `MAX_FAILURES` failed calls of one method in a row the drafter is
switched off.
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
    """The failures of all drafters. A drafter may raise anything, even SystemExit."""

    def __init__(self) -> None:
        self.off: set[str] = set()  # drafters that are switched off
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
    """Whatever a drafter raises while it is loaded becomes an error that names the drafter."""
    try:
        yield
    except ValueError:  # its message says what is wrong
        raise
    except BaseException as error:
        raise_interrupt(error)
        raise DraftError(
            f"draft: {name!r} could not be loaded: {type(error).__name__}: {error}"
        ) from error


def raise_interrupt(error: BaseException) -> None:
    """Raise `error` again if it may come from a signal handler of this process, such as Ctrl-C.

    Handlers run in the main thread. Python's own handler raises KeyboardInterrupt between two
    instructions, but one that a drafter raises comes from a `raise` instruction, and stays here.
    If there are other handlers, nothing can be told, so `error` is raised.
    """
    if isinstance(error, Exception) or threading.current_thread() is not threading.main_thread():
        return
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    if any(callable(h) and h is not signal.default_int_handler for h in handlers):
        raise error
    if isinstance(error, KeyboardInterrupt) and signal.default_int_handler in handlers:
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        code = b"" if trace is None else trace.tb_frame.f_code.co_code[trace.tb_lasti :]
        if not code or opname[code[0]] != "RAISE_VARARGS":
            raise error
