"""The tokenizer pool: tokenizes texts and renders chat templates in processes that can be killed.

Both can take seconds, during which a thread could not be stopped. This module owns the processes;
`tokenizer_queue` selects the next job. Invariant: a process has one job at a time, so that a job
that takes too long or crashes its process affects no other job.
"""

import asyncio
import logging
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from specserve.engine.limits import Limits
from specserve.process.child import Child
from specserve.process.frames import FrameError
from specserve.process.tokenizer_messages import (
    Call,
    Chat,
    Encode,
    Failed,
    FromTokenizer,
    Ids,
    Ready,
    Refused,
    Result,
    Setup,
    Stage,
    TokenizerJob,
)
from specserve.process.tokenizer_queue import PendingJob, TokenizerQueue
from specserve.text import TokenizerError
from specserve.text.chat_messages import check_text, read_messages
from specserve.types import RequestError

logger = logging.getLogger(__name__)

_START_TIMEOUT: Final = 120.0  # seconds for a process to start and read a tokenizer
_MAX_DELAY: Final = 30.0  # seconds; upper bound of the delay between attempts to start a process
_MAX_TEXT_BYTES: Final = 2**27  # below `frames.MAX_FRAME`


class TokenizerUnavailable(Exception):
    """The job could not be done now; a retry after `retry_after` seconds may succeed."""

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class TokenizerPool:
    """Runs `Tokenizer.encode` and `.chat` of the model directory `target`, for one event loop.

    Arguments:
        module: the program of the processes; it defines the handlers that `call` can name.
        time_limit: seconds that one job may take in a process.
        memory_limit: bytes that one job may need beyond the loaded tokenizer.
        compile_limit: seconds to compile the chat template and render three short chats with it.
        workers: number of processes. With two, one long job does not block the others.
        max_waiting: most jobs that may wait.
        shared: several tenants use the pool, so that none may fill the queue.
        on_done: called with the duration of each job in seconds, waiting included.
    """

    def __init__(
        self,
        target: Path,
        *,
        module: str = "specserve.process.tokenizer_main",
        time_limit: float = 10.0,
        memory_limit: int = 2**31,
        compile_limit: float = 10.0,
        workers: int = 2,
        max_waiting: int = 1024,
        shared: bool = False,
        on_done: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        self._module = module
        self._setup = Setup(str(target), time_limit, memory_limit, compile_limit)
        self._num_workers = workers
        self._unfinished: set[PendingJob] = set()
        self._queue = TokenizerQueue(max_waiting + workers, workers, shared=shared)
        self._workers: set[_Worker] = set()
        self._tasks: list[asyncio.Task[None]] = []
        self._max_token_bytes: int | None = None
        self._on_done = on_done

    @property
    def pids(self) -> list[int]:
        """The process ids of the running processes."""
        return [worker.pid for worker in self._workers]

    @property
    def num_waiting(self) -> int:
        """Number of jobs that no process has started."""
        return len(self._queue)

    async def start(self) -> None:
        """Return when the first process is ready. Raises TokenizerError for unusable files."""
        assert not self._tasks
        started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._tasks = [
            asyncio.create_task(self._run_worker(started)) for _ in range(self._num_workers)
        ]
        try:
            await started
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """End the processes; unfinished jobs fail with TokenizerUnavailable."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._fail_unfinished("the server is stopping")

    async def encode(
        self,
        text: str,
        *,
        allow_special: bool = False,
        add_special: bool = True,
        param: str = "prompt",
        max_tokens: int | None = None,
        tenant: str = "",
    ) -> tuple[int, ...]:
        """Token ids of a text. Raises RequestError naming `param`, or TokenizerUnavailable.

        Text whose number of bytes rules out that it fits `max_tokens` is refused at once; the
        result may still be longer than `max_tokens`.
        """
        check_text(param, text)
        num_bytes = len(text.encode())
        self._check_size(param, num_bytes, max_tokens)
        job = Encode(text, allow_special, add_special, param)
        return await self._ids(job, num_bytes, tenant)

    async def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        max_tokens: int | None = None,
        tenant: str = "",
    ) -> tuple[int, ...]:
        """Token ids of a chat, with `max_tokens` as in `encode`.

        Raises RequestError or TokenizerUnavailable.
        """
        plain = read_messages(messages)
        num_bytes = sum(len(message["content"].encode()) for message in plain)
        self._check_size("messages", num_bytes, max_tokens)
        job = Chat(tuple(plain), add_generation_prompt, continue_final_message)
        return await self._ids(job, num_bytes, tenant)

    async def call(self, name: str, body: bytes, limits: Limits, *, tenant: str = "") -> bytes:
        """The result of the handler `name` of `module` for the body of a request.

        Raises RequestError or TokenizerUnavailable.
        """
        answer = await self._submit(Call(name, body, limits), len(body), tenant)
        assert isinstance(answer, Result)
        return answer.data

    async def _ids(self, job: Encode | Chat, num_bytes: int, tenant: str) -> tuple[int, ...]:
        answer = await self._submit(job, num_bytes, tenant)
        assert isinstance(answer, Ids)
        return answer.ids

    def _check_size(self, param: str, num_bytes: int, max_tokens: int | None) -> None:
        if num_bytes > _MAX_TEXT_BYTES:
            raise RequestError(
                param, f"{num_bytes} bytes given; at most {_MAX_TEXT_BYTES} are allowed"
            )
        if max_tokens is None or self._max_token_bytes is None:
            return
        if num_bytes > max_tokens * self._max_token_bytes:
            raise RequestError(
                param, f"{num_bytes} bytes cannot fit the context of {max_tokens} tokens"
            )

    async def _submit(self, job: TokenizerJob, num_bytes: int, tenant: str) -> Ids | Result:
        if not self._tasks:
            raise TokenizerUnavailable("the tokenizer processes are not running")
        if not self._queue.has_room(tenant):
            raise TokenizerUnavailable("too many prompts wait to be tokenized; try again later")
        pending = PendingJob(job, tenant, num_bytes, asyncio.get_running_loop().create_future())
        self._unfinished.add(pending)
        self._queue.put(pending)
        started = time.monotonic()
        try:
            return await pending.answer
        finally:
            self._unfinished.discard(pending)
            self._queue.discard(pending)
            self._on_done(time.monotonic() - started)

    def _fail_unfinished(self, reason: str) -> None:
        for pending in self._unfinished:
            pending.fail(TokenizerUnavailable(reason))

    async def _run_worker(self, started: "asyncio.Future[None]") -> None:
        """Run one process and replace it whenever it ends, until cancelled.

        `started` gets a result when the first process is ready, or the exception of its start.
        """
        delay = 0.0
        while True:
            await asyncio.sleep(delay)
            try:
                worker, ready = await _Worker.start(self._module, self._setup)
            except TokenizerError as error:
                if not started.done():
                    started.set_exception(error)
                    return
                logger.error("no tokenizer process: %s", error)
                delay = min(_MAX_DELAY, 2 * delay + 0.5)
                if not self._workers:
                    self._fail_unfinished("the tokenizer cannot be loaded at the moment")
                continue
            delay = 0.0
            self._max_token_bytes = ready.max_token_bytes
            self._workers.add(worker)
            if not started.done():
                started.set_result(None)
            try:
                while (pending := await self._next_job(worker)) is not None:
                    try:
                        await self._serve(worker, pending)
                    finally:
                        self._queue.done(pending)
            finally:
                self._workers.discard(worker)
                await worker.end()

    async def _next_job(self, worker: "_Worker") -> "PendingJob | None":
        """The next job that is not cancelled, or None if the process ended."""
        while not worker.incoming.done():
            getting = asyncio.create_task(self._queue.get())
            try:
                await asyncio.wait({getting, worker.incoming}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                getting.cancel()
            if getting.done() and not getting.cancelled():
                pending = getting.result()
                if not pending.answer.done():
                    return pending
                self._queue.done(pending)
        return None

    async def _serve(self, worker: "_Worker", pending: "PendingJob") -> None:
        """Run one job in the process, which may have ended afterwards."""
        limit, param = self._setup.time_limit, pending.job.param
        try:
            worker.send(pending.job)
            answer = await worker.answer(limit)
        except TimeoutError:
            logger.warning("a tokenizer process took longer than %g s and is replaced", limit)
            pending.fail(RequestError(param, f"tokenizing it took longer than {limit:g} s"))
            await worker.end()
            return
        match answer:
            case Ids() | Result():
                pending.succeed(answer)
            case Refused(field, message):
                pending.fail(RequestError(field, message))
            case _:
                status = await worker.end()
                logger.warning("a tokenizer process ended with status %s and is replaced", status)
                self._fail_or_retry(pending, status)

    def _fail_or_retry(self, pending: "PendingJob", status: int) -> None:
        """Fail or requeue a job whose process ended, because of the job or for another reason."""
        if status == -signal.SIGABRT:  # the tokenizers library aborts when out of memory
            pending.fail(RequestError(pending.job.param, "it needs too much memory; send less"))
            return
        pending.num_attempts += 1
        # Every process may have been dead when it got the job: allow one attempt more than that.
        if pending.num_attempts > self._num_workers:
            pending.fail(
                TokenizerUnavailable(
                    f"tokenizing it failed {pending.num_attempts} times; see the server's log"
                )
            )
        else:
            self._queue.put(pending)


class _Worker:
    """A tokenizer process, which does one job at a time."""

    def __init__(self, child: Child[FromTokenizer]) -> None:
        self._child = child
        self.pid = child.pid
        self._received: list[FromTokenizer] = []
        self.incoming = asyncio.create_task(self._receive())  # done while it has no job: it ended

    @classmethod
    async def start(cls, module: str, setup: Setup) -> "tuple[_Worker, Ready]":
        """Start a process and wait until its tokenizer is loaded. Raises TokenizerError."""
        try:
            worker = cls(await Child.start(module, FromTokenizer))
        except OSError as error:
            raise TokenizerError(f"no tokenizer process can be started ({error})") from error
        stage = Stage(_START_TIMEOUT, f"{setup.directory}: the tokenizer was not loaded in time")
        answer: FromTokenizer | None = stage
        try:
            worker.send(setup)
            while isinstance(answer, Stage):
                stage = answer
                answer = await worker.answer(stage.time_limit)
        except TimeoutError:
            raise TokenizerError(f"{stage.problem} (after {stage.time_limit:g} s)") from None
        finally:
            if not isinstance(answer, Ready):
                status = await worker.end()
        if isinstance(answer, Ready):
            return worker, answer
        if isinstance(answer, Failed):
            raise TokenizerError(answer.error)
        raise TokenizerError(f"{stage.problem} (its process ended with status {status})")

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
        self._child.kill()
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
