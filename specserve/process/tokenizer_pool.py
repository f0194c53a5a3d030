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
from types import MappingProxyType
from typing import Any, Final

from specserve.engine.limits import Limits
from specserve.process.tokenizer_messages import (
    Call,
    Chat,
    Encode,
    Refused,
    Result,
    Setup,
    TokenizerJob,
)
from specserve.process.tokenizer_process import OUT_OF_TIME, TokenizerProcess
from specserve.process.tokenizer_queue import PendingJob, TokenizerQueue
from specserve.text import TokenizerError
from specserve.text.chat_messages import read_messages
from specserve.text.chat_tools import check_text
from specserve.types import RequestError

logger = logging.getLogger(__name__)

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
        time_limit: seconds of processor time that one job may take.
        memory_limit: bytes that one job may need beyond the loaded tokenizer.
        compile_limit: seconds of processor time to compile the chat template and render three
            short chats with it.
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
        self._num_processes = workers
        self._unfinished: set[PendingJob] = set()
        self._queue = TokenizerQueue(max_waiting + workers, workers, shared=shared)
        self._processes: set[TokenizerProcess] = set()
        self._tasks: list[asyncio.Task[None]] = []
        self._max_token_bytes: int | None = None
        self._on_done = on_done

    @property
    def pids(self) -> list[int]:
        """The process ids of the running processes."""
        return [process.pid for process in self._processes]

    @property
    def num_waiting(self) -> int:
        """Number of jobs that no process has started."""
        return len(self._queue)

    async def start(self) -> None:
        """Return when the first process is ready. Raises TokenizerError for unusable files."""
        assert not self._tasks
        started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._tasks = [
            asyncio.create_task(self._run_processes(started)) for _ in range(self._num_processes)
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
        return await self._ids(Encode(text, add_special, param), max_tokens, tenant)

    async def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] = (),
        template_kwargs: Mapping[str, Any] = MappingProxyType({}),
        max_tokens: int | None = None,
        tenant: str = "",
    ) -> tuple[int, ...]:
        """Token ids of a chat (see `Tokenizer.chat`), with `max_tokens` as in `encode`.

        Raises RequestError or TokenizerUnavailable.
        """
        plain = tuple(read_messages(messages))
        shown = tuple(map(dict, tools))
        job = Chat(
            plain, add_generation_prompt, continue_final_message, shown, dict(template_kwargs)
        )
        return await self._ids(job, max_tokens, tenant)

    async def call(self, name: str, body: bytes, limits: Limits, *, tenant: str = "") -> bytes:
        """The result of the handler `name` of `module` for the body of a request.

        Raises RequestError or TokenizerUnavailable.
        """
        answer = await self._submit(Call(name, body, limits), tenant)
        assert isinstance(answer, bytes)
        return answer

    async def _ids(
        self, job: Encode | Chat, max_tokens: int | None, tenant: str
    ) -> tuple[int, ...]:
        size, longest = job.num_bytes, self._max_token_bytes
        if size > _MAX_TEXT_BYTES:
            raise RequestError(
                job.param, f"{size} bytes given; at most {_MAX_TEXT_BYTES} are allowed"
            )
        if max_tokens is not None and longest is not None and size > max_tokens * longest:
            raise RequestError(
                job.param, f"{size} bytes cannot fit the context of {max_tokens} tokens"
            )
        answer = await self._submit(job, tenant)
        assert isinstance(answer, tuple)
        return answer

    async def _submit(self, job: TokenizerJob, tenant: str) -> tuple[int, ...] | bytes:
        if not self._tasks:
            raise TokenizerUnavailable("the tokenizer processes are not running")
        if not self._queue.has_room(tenant):
            raise TokenizerUnavailable("too many prompts wait to be tokenized; try again later")
        pending = PendingJob(job, tenant, asyncio.get_running_loop().create_future())
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

    async def _run_processes(self, started: "asyncio.Future[None]") -> None:
        """Run one process at a time and replace it whenever it ends, until cancelled.

        `started` gets a result when the first process is ready, or the exception of its start.
        """
        delay = 0.0
        last: PendingJob | None = None  # the job that ended the last process
        while True:
            await asyncio.sleep(delay)
            try:
                process, ready = await TokenizerProcess.start(self._module, self._setup)
            except TokenizerError as error:
                if not started.done():
                    started.set_exception(error)
                if started.cancelled() or started.exception() is not None:
                    return  # `start` raises it
                logger.error("no tokenizer process: %s", error)
                delay = min(_MAX_DELAY, 2 * delay + 0.5)
                if not self._processes:
                    self._fail_unfinished("the tokenizer cannot be loaded at the moment")
                continue
            finally:
                # Until here the job counts as running. Otherwise another job of its kind would
                # occupy the other process, and all jobs would wait for this start.
                if last is not None:
                    self._queue.done(last)
                    last = None
            delay = 0.0
            self._max_token_bytes = ready.max_token_bytes
            if not started.done():
                started.set_result(None)
            last = await self._run_jobs(process)

    async def _run_jobs(self, process: TokenizerProcess) -> PendingJob | None:
        """Run jobs until the process ends; returns the job that ended it, None if there is none."""
        self._processes.add(process)
        try:
            while (pending := await self._next_job(process)) is not None:
                await self._run_job(process, pending)
                if process.ended:
                    return pending
                self._queue.done(pending)
            return None
        finally:
            self._processes.discard(process)
            await process.end()

    async def _next_job(self, process: TokenizerProcess) -> PendingJob | None:
        """The next job that is not cancelled, or None if the process ended."""
        while not process.ended:
            getting = asyncio.create_task(self._queue.get())
            try:
                await asyncio.wait({getting, process.incoming}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                getting.cancel()
            if getting.done() and not getting.cancelled():
                pending = getting.result()
                if not pending.answer.done():
                    return pending
                self._queue.done(pending)
        return None

    async def _run_job(self, process: TokenizerProcess, pending: PendingJob) -> None:
        """Run one job in the process, which may have ended afterwards."""
        try:
            process.send(pending.job)
            answer = await process.answer(self._setup.time_limit)
        except TimeoutError as error:
            logger.warning("a tokenizer process is replaced: %s", error)
            pending.fail(TokenizerUnavailable(f"tokenizing it: {error}; try again later"))
            await process.end()
            return
        match answer:
            case Result(value):
                pending.succeed(value)
            case Refused(field, message):
                pending.fail(RequestError(field, message))
            case _:
                status = await process.end()
                logger.warning("a tokenizer process ended with status %s and is replaced", status)
                self._fail_or_retry(pending, status)

    def _fail_or_retry(self, pending: PendingJob, status: int) -> None:
        """Fail or requeue a job whose process ended, because of the job or for another reason."""
        param = pending.job.param
        if status == -signal.SIGABRT:  # the tokenizers library aborts when out of memory
            pending.fail(RequestError(param, "it needs too much memory; send less"))
            return
        if status == OUT_OF_TIME:
            limit = f"{self._setup.time_limit:g} s of processor time"
            reason = f"tokenizing it took longer than {limit}; send less, or raise template_timeout"
            pending.fail(RequestError(param, reason))
            return
        pending.num_attempts += 1
        # Every process may have been dead when it got the job: allow one attempt more than that.
        if pending.num_attempts > self._num_processes:
            reason = f"tokenizing it failed {pending.num_attempts} times; see the server's log"
            pending.fail(TokenizerUnavailable(reason))
        else:
            self._queue.put(pending)
