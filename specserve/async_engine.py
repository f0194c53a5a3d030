"""The engine for asyncio programs: prompts in, text deltas out. The HTTP server is built on it.

The model runs in a process of its own, and so do tokenizer and chat template (`process/`). This
process only turns token ids into text and imports no torch. It does not know HTTP.
"""

import asyncio
import secrets
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any, Final, Self, TypeVar

from msgspec.structs import replace

from specserve.config import EngineConfig, llm_config
from specserve.engine.metrics import EngineInfo, EngineStats
from specserve.hub import resolve
from specserve.process.engine_process import EngineProcess, EngineUnavailable, State
from specserve.process.tokenizer_pool import TokenizerPool
from specserve.text import Tokenizer
from specserve.text.output_text import OutputText
from specserve.text.text_delta import TextDelta
from specserve.text.token_chunk import TokenChunker
from specserve.types import (
    Prompt,
    Request,
    SamplingParams,
    SpeculationParams,
    TokenLogprobs,
    read_prompt,
)

T = TypeVar("T")
_RETRY_STOPPED: Final = 30.0  # seconds, `retry_after` of a request that comes during `stop`


class GenerationFailed(Exception):
    """The engine ended this request with an error; the message says why."""


class AsyncEngine:
    """An engine in a child process, with tokenizer processes, for one event loop.

    Use it in `async with`, or call `start`, `wait_ready` and `stop`. An engine process that ends or
    hangs is replaced; its open requests raise EngineUnavailable. Of the configuration's section
    `server` only heartbeat_timeout, template_timeout and stream_interval have an effect.
    """

    def __init__(
        self,
        config: EngineConfig,
        directory: Path,
        *,
        tokenizer_pool: TokenizerPool | None = None,
    ) -> None:
        """`directory` is the model directory; `load` finds it by the name of a model.

        Without a `tokenizer_pool` one is made. Raises TokenizerError if the tokenizer is unusable.
        """
        server = config.server
        self.config = config
        self.tokenizer = Tokenizer(directory)  # to decode only: encoding blocks the event loop
        self.tokenizer_pool = tokenizer_pool or TokenizerPool(
            directory, time_limit=server.template_timeout
        )
        self.process = EngineProcess(config, directory, heartbeat_timeout=server.heartbeat_timeout)
        self._stopping = False
        self._num_running = 0  # calls of `generate`
        self._idle = asyncio.Event()
        self._idle.set()

    @classmethod
    def load(
        cls,
        target: str | None = None,
        *,
        draft: str | Sequence[str] | None = None,
        config_file: Path | None = None,
        progress: Callable[[str, float], None] | None = None,
        **settings: Any,
    ) -> Self:
        """An engine, not started yet, with the arguments of `LLM`. May download the target.

        Raises ConfigError, HubError or TokenizerError, all subclasses of ValueError.
        """
        config = llm_config(target, draft, config_file, settings)
        return cls(config, resolve(config.target.target, progress=progress))

    @property
    def state(self) -> State:
        """Of the engine process. "failed" means that it cannot be started."""
        return self.process.state

    @property
    def info(self) -> EngineInfo | None:
        """Of the latest engine process that became ready: limits, drafters, dtype and so on."""
        return self.process.info

    @property
    def stats(self) -> EngineStats | None:
        """Totals of the current engine process, from its latest step; None until it is ready."""
        return self.process.stats

    async def __aenter__(self) -> Self:
        try:
            await self.start()
            await self.wait_ready()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Start the processes; the engine loads the model meanwhile.

        Raises TokenizerError if the tokenizer or the chat template cannot be used.
        """
        await self.process.start()  # first, because it takes longer
        try:
            await self.tokenizer_pool.start()
        except BaseException:
            await self.process.stop()
            raise
        self._stopping = False

    async def wait_ready(self) -> EngineInfo:
        """Wait until the engine is ready. Raises EngineFailed or EngineUnavailable."""
        return await self.process.wait_ready()

    async def stop(self, drain_timeout: float = 0.0) -> bool:
        """Refuse new requests, let running ones end, and end the processes.

        After `drain_timeout` seconds, calls of `generate` that still run raise EngineUnavailable or
        TokenizerUnavailable. Returns whether there were none.
        """
        self._stopping = True
        with suppress(TimeoutError):
            async with asyncio.timeout(drain_timeout):
                await self._idle.wait()
        drained = self._idle.is_set()
        await self.tokenizer_pool.stop()
        await self.process.stop()
        return drained

    async def encode(self, prompt: Prompt, *, tenant: str = "") -> tuple[int, ...]:
        """The token ids of a text or a chat, computed in a tokenizer process.

        Raises RequestError if the prompt cannot be encoded or does not fit the context, and
        EngineUnavailable or TokenizerUnavailable. Tenants take turns when prompts wait.
        """
        pool, max_tokens = self.tokenizer_pool, self.process.ready_info().limits.max_model_len
        match read_prompt(prompt):
            case str(text):
                return await pool.encode(text, max_tokens=max_tokens, tenant=tenant)
            case list(messages):
                return await pool.chat(messages, max_tokens=max_tokens, tenant=tenant)
            case ids:
                return ids

    async def generate(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        *,
        speculation: SpeculationParams | None = None,
        prediction: str | None = None,
        priority: int = 0,
        timeout: float | None = None,
        tenant: str = "",
        cache_salt: str = "",
    ) -> AsyncGenerator[TextDelta, None]:
        """The text of a prompt as it is generated. With `sampling.n` > 1, deltas of all choices.

        Without `sampling`, `info.default_sampling` is used: what the model recommends. A delta with
        `tokens.finish` is the last one of its choice. Closing the generator, or cancelling the task
        that iterates over it, ends the request in the engine. Logprobs of the prompt are in
        `delta.tokens.prompt_logprobs` of the first deltas of choice 0.

        `prediction` is an expected output text, which affects speed only. Of the waiting requests
        of a `tenant`, those with the highest `priority` run first; tenants share the engine evenly,
        and all tenants so far have equal parts of the prefix cache. Cached prefixes are shared at
        equal `cache_salt` only. Raises RequestError if the request cannot be served,
        EngineUnavailable or TokenizerUnavailable (with `retry_after` in seconds), GenerationFailed,
        and TimeoutError after `timeout` seconds.
        """
        if self._stopping:
            raise EngineUnavailable("the engine is being stopped", _RETRY_STOPPED)
        arrived = time.monotonic()
        params = sampling or self.process.ready_info().default_sampling
        deadline = None if timeout is None else arrived + timeout
        self._num_running += 1
        self._idle.clear()
        try:
            async with asyncio.timeout(timeout):
                ids = await self.encode(prompt, tenant=tenant)
                speculation = await self._with_prediction(speculation, prediction, tenant)
            request = Request(
                "", ids, params, speculation, deadline, priority, cache_salt, arrived, tenant
            )
            self.process.ready_info().limits.check(request)
            name = secrets.token_hex(8)
            streams = [
                self.stream(replace(request, id=f"{name}-{choice}", sampling=sample), choice)
                for choice, sample in enumerate(params.samples())
            ]
            async with aclosing(merge(streams)) as deltas:
                async for delta in deltas:
                    yield delta
        finally:
            self._num_running -= 1
            if not self._num_running:
                self._idle.set()

    async def stream(self, request: Request, choice: int = 0) -> AsyncGenerator[TextDelta, None]:
        """The text deltas of one sequence. `choice` is the index that they carry.

        Use with `contextlib.aclosing`; closing it ends the sequence. Raises RequestError,
        EngineUnavailable, GenerationFailed, and TimeoutError when `request.deadline` has passed.
        """
        chunker = TokenChunker(self.config.server.stream_interval)
        text = OutputText.of(request, self.tokenizer)
        logprobs: deque[TokenLogprobs] = deque()  # of tokens that a stop string may still cut
        async with aclosing(self.process.stream(request)) as outputs:
            async for output in outputs:
                if output.error is not None:
                    if output.finish == "abort":
                        raise TimeoutError(output.error)
                    raise GenerationFailed(output.error)
                for tokens in chunker.feed(output):
                    shown = text.feed(tokens.ids, tokens.finish, tokens.stop_reason)
                    offsets = tuple(text.pop_final_offsets())
                    logprobs += tokens.logprobs
                    final = tuple(logprobs.popleft() for _ in offsets) if logprobs else ()
                    yield TextDelta(choice, shown, tokens, final, offsets)

    async def _with_prediction(
        self, speculation: SpeculationParams | None, prediction: str | None, tenant: str
    ) -> SpeculationParams:
        params = speculation or SpeculationParams()
        if prediction is None:
            return params
        max_tokens = self.process.ready_info().limits.max_model_len
        ids = await self.tokenizer_pool.encode(
            prediction, add_special=False, param="prediction", max_tokens=max_tokens, tenant=tenant
        )
        return replace(params, prediction=ids)


async def merge(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    """The items of all streams as they arrive; each stream runs in a task of its own.

    The first exception of a stream closes all of them and is raised. Use with `aclosing`.
    """
    queue: asyncio.Queue[T | asyncio.Task[None]] = asyncio.Queue()

    async def run(stream: AsyncGenerator[T, None]) -> None:
        async with aclosing(stream) as items:
            async for item in items:
                queue.put_nowait(item)

    tasks = [asyncio.create_task(run(stream)) for stream in streams]
    for task in tasks:
        task.add_done_callback(queue.put_nowait)  # after the items of its stream
    try:
        num_running = len(tasks)
        while num_running:
            item = await queue.get()
            if isinstance(item, asyncio.Task):
                item.result()  # raises the exception of its stream
                num_running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
