"""A tokenizer process as its parent sees it: start, send a job, await the answer, end."""

import asyncio
import logging
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

_START_TIMEOUT: Final = 120.0  # seconds for a process to start and read a tokenizer


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
        stage = Stage(_START_TIMEOUT, f"{setup.directory}: the tokenizer was not loaded in time")
        answer: FromTokenizer | None = stage
        try:
            process.send(setup)
            while isinstance(answer, Stage):
                stage = answer
                answer = await process.answer(stage.time_limit)
        except TimeoutError:
            raise TokenizerError(f"{stage.problem} (after {stage.time_limit:g} s)") from None
        finally:
            if not isinstance(answer, Ready):
                status = await process.end()
        if isinstance(answer, Ready):
            return process, answer
        if isinstance(answer, Failed):
            raise TokenizerError(answer.error)
        raise TokenizerError(f"{stage.problem} (its process ended with status {status})")

    @property
    def ended(self) -> bool:
        """Whether the process, which has no job, has ended."""
        return self.incoming.done()

    def send(self, message: Setup | TokenizerJob) -> None:
        self._child.frames.send(message)

    async def answer(self, time_limit: float) -> FromTokenizer | None:
        """The next message; None if the process ended. Raises TimeoutError after `time_limit` s."""
        await asyncio.wait({self.incoming}, timeout=time_limit)
        if not self.incoming.done():
            raise TimeoutError
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
