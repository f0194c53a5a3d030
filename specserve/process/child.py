"""A child process of ours and the socket to it: started, listened to, ended without a trace.

The end of the stream is the end of the child: it alone holds the other end.
"""

import asyncio
import os
import socket
import subprocess
import sys
import time
from typing import Any, Final, Generic, TypeVar

from specserve.process.frames import FrameStream

T = TypeVar("T")
_POLL_S: Final = 0.01


class Child(Generic[T]):
    """`frames` carries its messages; use `start` to get one and `reap` to be rid of it."""

    def __init__(self, process: subprocess.Popen[bytes], frames: FrameStream[T]) -> None:
        self._process = process
        self.frames = frames

    @classmethod
    async def start(cls, module: str, message_type: Any) -> "Child[T]":
        """Run `python -m module FD`; what it sends is of `message_type`. Raises OSError."""
        ours, theirs = socket.socketpair()
        with theirs:
            frames: FrameStream[T] = await FrameStream.open(ours, message_type)
            try:
                process = _spawn(module, theirs)
            except BaseException:
                await frames.close()
                raise
        return cls(process, frames)

    @property
    def pid(self) -> int:
        return self._process.pid

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()

    async def reap(self, patience: float) -> int:
        """Close the socket and wait for the end; killed after `patience` seconds. The exit code.

        Goes on to the end even if the caller is cancelled.
        """
        reaping = asyncio.create_task(self._reap(patience))
        try:
            return await asyncio.shield(reaping)
        finally:
            await asyncio.wait([reaping])

    async def _reap(self, patience: float) -> int:
        deadline = time.monotonic() + patience
        await self.frames.close()
        while (code := self._process.poll()) is None:
            if time.monotonic() >= deadline:
                self._process.kill()
            await asyncio.sleep(_POLL_S)
        return code


def _spawn(module: str, sock: socket.socket) -> subprocess.Popen[bytes]:
    # The child imports what this process would: -m alone would look into the working directory.
    # In a session of its own, for a Ctrl-C in the terminal is not meant for it. It ends with the
    # thread that starts it here (parent.py): the one of the event loop, in `serve` the main one.
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    return subprocess.Popen(
        [sys.executable, "-P", "-m", module, str(sock.fileno())],
        env=os.environ | {"PYTHONPATH": path},
        stdin=subprocess.DEVNULL,
        pass_fds=[sock.fileno()],
        start_new_session=True,
    )
