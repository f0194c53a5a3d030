"""A tokenizer process as its parent sees it: start, send a job, await the answer, end."""

import asyncio
import logging
import signal
from typing import Final

from specserve.process.child import Child
from specserve.process.frames import FrameError
from specserve.process.tokenizer_messages import (
    Failed,
    FromTokenizer,
    Ready,
    Setup,
    Stage,
    TokenizerJob,
)
from specserve.text import TokenizerError

logger = logging.getLogger(__name__)

_START_TIME: Final = 6.0  # seconds of processor time for a process to start

# Wall time that is allowed per second of processor time. A long job has a low priority
# (`tokenizer_main`) and may get less than a tenth of a processor that the engine uses.
_WALL_FACTOR: Final = 20.0

OUT_OF_TIME: Final = -signal.SIGPROF  # exit status of a process that reached its time limit


class TokenizerProcess:
    """A running process, which does one job at a time.

    `incoming` waits for its next message. If it completes while the process has no job, the process
    has ended.
    """

    def __init__(self, child: Child[FromTokenizer]) -> None:
        self._child = child
        self.pid = child.process.pid
        self._received: list[FromTokenizer] = []
        self.incoming = asyncio.create_task(self._receive())

    @classmethod
    async def start(cls, module: str, setup: Setup) -> "tuple[TokenizerProcess, Ready]":
        """Start a process and wait until its tokenizer is loaded. Raises TokenizerError."""
        try:
            process = cls(await Child.start(module, FromTokenizer))
        except OSError as error:
            raise TokenizerError(f"no tokenizer process can be started ({error})") from error
        stage = Stage(_START_TIME, f"{setup.directory}: the tokenizer was not loaded in time")
        answer: FromTokenizer | None = stage
        try:
            process.send(setup)
            while isinstance(answer, Stage):
                stage = answer
                answer = await process.answer(stage.time_limit)
        except TimeoutError as error:
            raise TokenizerError(f"{stage.problem} ({error})") from None
        finally:
            if not isinstance(answer, Ready):
                status = await process.end()
        if isinstance(answer, Ready):
            return process, answer
        if isinstance(answer, Failed):
            raise TokenizerError(answer.error)
        if status == OUT_OF_TIME:
            reason = f"it needs more than {stage.time_limit:g} s of processor time"
        else:
            reason = f"its process ended with status {status}"
        raise TokenizerError(f"{stage.problem} ({reason})")

    @property
    def ended(self) -> bool:
        """Whether the process, which has no job, has ended."""
        return self.incoming.done()

    def send(self, message: Setup | TokenizerJob) -> None:
        self._child.frames.send(message)

    async def answer(self, time_limit: float) -> FromTokenizer | None:
        """The next message; None if the process ended, which limits its own processor time.

        Raises TimeoutError if the process got so little of the machine that it neither answered
        nor reached its limit of `time_limit` seconds in `_WALL_FACTOR` times as long.
        """
        wall_limit = _WALL_FACTOR * time_limit
        await asyncio.wait({self.incoming}, timeout=wall_limit)
        if not self.incoming.done():
            raise TimeoutError(f"no result after {wall_limit:g} s; the machine is overloaded")
        answer = self.incoming.result()
        if answer is not None:
            self.incoming = asyncio.create_task(self._receive())
        return answer

    async def end(self) -> int:
        """Kill the process unless it has ended; returns its exit status."""
        self._child.process.kill()
        status = await self._child.reap(0.0)
        self.incoming.cancel()
        await asyncio.wait({self.incoming})
        return status

    async def _receive(self) -> FromTokenizer | None:
        if not self._received:
            try:
                self._received = await self._child.frames.receive() or []
            except FrameError:
                logger.exception("a tokenizer process sent an invalid message")
        return self._received.pop(0) if self._received else None
