"""An event loop in a background thread, so that synchronous code can run coroutines."""

import asyncio
import concurrent.futures
import threading
import weakref
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import closing, suppress
from typing import Any, TypeVar

from specserve.client.errors import ConnectionFailed

T = TypeVar("T")


class LoopThread:
    """Runs coroutines on behalf of any number of threads.

    When it is closed or deleted, the loop cancels all coroutines, awaits `at_end()` and ends.
    """

    def __init__(self, at_end: Callable[[], Awaitable[None]]) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=_serve, args=(self._loop,), name="specserve-client", daemon=True
        )
        self._lock = threading.Lock()  # no coroutine is submitted after `_end`
        self._end = weakref.finalize(self, _end, self._loop, at_end)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the loop, wait, and return its result.

        An exception in the waiting thread, such as KeyboardInterrupt, cancels the coroutine. Raises
        RuntimeError if the loop has ended or the process was forked since, and ConnectionFailed if
        the loop ends during the call.
        """
        with self._lock:
            if not (self._end.alive and self._thread.is_alive()):  # threads do not survive a fork
                coroutine.close()
                raise RuntimeError("the client is closed, or from before a fork; make a new one")
            future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise ConnectionFailed("the client was closed during the call") from None
        except BaseException:
            future.cancel()
            raise

    def call_soon(self, function: Callable[[], object]) -> None:
        """Run a function on the loop without waiting for it. Does nothing if the loop has ended."""
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(function)

    def close(self) -> None:
        """Cancel all coroutines and wait for the thread to end. Further calls have no effect."""
        with self._lock:
            self._end()
        if threading.current_thread() is not self._thread:
            self._thread.join()


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    with closing(loop):
        loop.run_forever()


def _end(loop: asyncio.AbstractEventLoop, at_end: Callable[[], Awaitable[None]]) -> None:
    async def finish() -> None:
        try:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            await at_end()
            await loop.shutdown_asyncgens()
        finally:
            loop.call_soon(loop.stop)

    asyncio.run_coroutine_threadsafe(finish(), loop)
