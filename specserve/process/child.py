"""A child process and the socket to it: start, exchange messages, end.

Invariant: only the child holds the other end of the socket, so that the end of the stream means
the end of the child.
"""

import asyncio
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

from specserve.process.frames import FrameStream

T = TypeVar("T")
_START: Final = "specserve.process.without_gc"  # the child turns on garbage collection
_POLL_S: Final = 0.01  # seconds between checks whether the child has ended


@dataclass(frozen=True, slots=True)
class Child(Generic[T]):
    """A running child; `frames` carries the messages. Create with `start`, end with `reap`."""

    process: subprocess.Popen[bytes]
    frames: FrameStream[T]

    @classmethod
    async def start(cls, module: str, message_type: Any) -> "Child[T]":
        """Run `python -m module FD`, which sends messages of `message_type`. Raises OSError."""
        our_end, child_end = socket.socketpair()
        with child_end:
            frames: FrameStream[T] = await FrameStream.open(our_end, message_type)
            # PYTHONPATH and -P give the child this process's import path, without the working
            # directory that -m would add. A process group of its own keeps a Ctrl-C in the terminal
            # from the child. A session of its own would, too, but Linux may divide the processors
            # among sessions first (sched_autogroup_enabled). The child is killed when the thread
            # that starts it ends (parent_death.py): that of the event loop, which in `serve` is the
            # main thread.
            path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
            try:
                process = subprocess.Popen(
                    [sys.executable, "-P", "-m", _START, module, str(child_end.fileno())],
                    env=os.environ | {"PYTHONPATH": path},
                    stdin=subprocess.DEVNULL,
                    pass_fds=[child_end.fileno()],
                    process_group=0,
                )
            except BaseException:
                await frames.close()
                raise
        return cls(process, frames)

    async def reap(self, timeout: float) -> int:
        """Close the socket, wait until the child ends, and return its exit code.

        The child is killed after `timeout` seconds. Completes even if the caller is cancelled.
        """
        reaping = asyncio.create_task(self._reap(timeout))
        try:
            return await asyncio.shield(reaping)
        finally:
            await asyncio.wait([reaping])

    async def _reap(self, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        await self.frames.close()
        while (code := self.process.poll()) is None:
            if time.monotonic() >= deadline:
                self.process.kill()
            await asyncio.sleep(_POLL_S)
        return code
