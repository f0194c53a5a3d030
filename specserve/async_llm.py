"""`LLM` for asyncio programs: prompts in, completions or streamed text out."""

import asyncio
import secrets
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager, suppress
from pathlib import Path
from typing import Final, Self, TypedDict, Unpack

from msgspec.structs import replace

from specserve.async_engine import AsyncEngine, merge
from specserve.completion import (
    Delta,
    DeltaCollector,
    Generation,
    GenerationFailed,
    failed,
    generation,
)
from specserve.config import ENGINE_DEFAULTS, EngineSettings, llm_config
from specserve.engine.metrics import EngineInfo
from specserve.field_help import ENGINE_HELP, lists_fields
from specserve.hub import resolve
from specserve.inputs import Conversations, Prompts, as_batch, as_chats, per_prompt
from specserve.types import (
    Prompt,
    Request,
    RequestError,
    SamplingParams,
    SpeculationParams,
    read_prompt,
)


class RequestOptions(TypedDict, total=False):
    """Keyword arguments of `AsyncLLM.generate`, `chat` and `stream`."""

    timeout: float | None
    priority: int
    tenant: str
    cache_salt: str


_OPTIONS_HELP: Final = {
    "timeout": "seconds after which TimeoutError is raised",
    "priority": "of the waiting requests of one tenant, those with a higher one run first",
    "tenant": "who asks; tenants share the engine and the prefix cache evenly",
    "cache_salt": "cached prefixes are shared only between requests with the same salt",
}
_lists_options: Final = lists_fields(
    RequestOptions, _OPTIONS_HELP, {"timeout": None, "priority": 0, "tenant": "", "cache_salt": ""}
)


class AsyncLLM:
    """`LLM` for asyncio programs: all requests of all tasks share the forward passes.

    The model runs in a process of its own, and so do tokenizer and chat template; one that ends or
    hangs is replaced. Use it in `async with`, or call `start` and `close`; otherwise requests raise
    RuntimeError. It serves one event loop. `engine` tells how the processes are (`state`, `info`,
    `stats`).
    """

    @lists_fields(EngineSettings, ENGINE_HELP, ENGINE_DEFAULTS)
    def __init__(
        self,
        target: str | None = None,
        *,
        draft: str | Sequence[str] | None = None,
        config_file: Path | None = None,
        progress: Callable[[str, float], None] | None = None,
        **settings: Unpack[EngineSettings],
    ) -> None:
        """Find the model `target`, download it if necessary, and load its tokenizer.

        `start` loads the rest. The arguments are those of `LLM`. Raises ConfigError, HubError or
        TokenizerError, all subclasses of ValueError. The settings and their defaults:
        """
        self.config = llm_config(target, draft, config_file, settings)
        directory = resolve(self.config.target.target, progress=progress)
        self.engine = AsyncEngine(self.config, directory)
        self._is_open = False
        self._num_running = 0  # requests
        self._idle = asyncio.Event()
        self._idle.set()

    async def start(self) -> None:
        """Start the processes and wait until the model is loaded, unless that has been done.

        Raises EngineFailed if it cannot be loaded, and TokenizerError.
        """
        if self._is_open:
            return
        try:
            await self.engine.start()
            await self.engine.wait_ready()
        except BaseException:
            await self.engine.stop()
            raise
        self._is_open = True

    async def close(self, drain_timeout: float = 0.0) -> bool:
        """Refuse new requests, let running ones end, and end the processes.

        After `drain_timeout` seconds, requests that still run raise EngineUnavailable or
        TokenizerUnavailable. Returns whether there were none. `start` opens it again.
        """
        self._is_open = False
        with suppress(TimeoutError):
            async with asyncio.timeout(drain_timeout):
                await self._idle.wait()
        drained = self._idle.is_set()
        await self.engine.stop()
        return drained

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    @_lists_options
    async def generate(
        self,
        prompts: Prompts,
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        speculation: SpeculationParams | None = None,
        predictions: str | Sequence[str | None] | None = None,
        **options: Unpack[RequestOptions],
    ) -> list[Generation]:
        """Generate completions. Returns one Generation per prompt, in order.

        The arguments are those of `LLM.generate`. A request that cannot be served has finish_reason
        "error"; other requests are not affected. Cancelling the call ends its requests. Raises
        ValueError if a list has the wrong length, TimeoutError, and EngineUnavailable or
        TokenizerUnavailable (with `retry_after` in seconds). The other options and their defaults:
        """
        batch = as_batch(prompts)
        params = per_prompt("sampling", sampling or self.default_sampling_params, len(batch))
        expected: list[str | None] = per_prompt("predictions", predictions, len(batch))
        tasks = [
            asyncio.create_task(self._generation(prompt, own, speculation, prediction, options))
            for prompt, own, prediction in zip(batch, params, expected, strict=True)
        ]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:  # after an exception, others still run
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    @_lists_options
    async def chat(
        self,
        messages: Conversations,
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        speculation: SpeculationParams | None = None,
        predictions: str | Sequence[str | None] | None = None,
        **options: Unpack[RequestOptions],
    ) -> list[Generation]:
        """Answer a conversation, or each of several. Returns one Generation per conversation.

        A conversation is a list of messages such as {"role": "user", "content": "Hello"}, or a
        string, which stands for one user message. Raises what `generate` raises. The other options
        and their defaults:
        """
        return await self.generate(
            as_chats(messages),
            sampling,
            speculation=speculation,
            predictions=predictions,
            **options,
        )

    @_lists_options
    async def stream(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        *,
        speculation: SpeculationParams | None = None,
        prediction: str | None = None,
        **options: Unpack[RequestOptions],
    ) -> AsyncGenerator[Delta, None]:
        """Generate the completions of one prompt, and yield their text and tokens as they come.

        The joined text is that of `generate`. Closing the generator, or cancelling the task that
        iterates over it, ends the request and frees its KV. Raises RequestError if the request
        cannot be served, GenerationFailed if the engine fails on it, TimeoutError, and
        EngineUnavailable or TokenizerUnavailable (with `retry_after` in seconds). The other options
        and their defaults:
        """
        params = sampling or self.default_sampling_params
        with self._counted():
            request = await self._request(prompt, params, speculation, prediction, options)
            async with aclosing(self._deltas(request)) as deltas:
                async for delta in deltas:
                    yield delta

    async def encode(self, prompt: Prompt, *, tenant: str = "") -> tuple[int, ...]:
        """The token ids of a prompt, computed in a tokenizer process.

        Raises RequestError if the prompt cannot be encoded or does not fit the context, and
        EngineUnavailable or TokenizerUnavailable. Tenants take turns when prompts wait.
        """
        pool, max_tokens = self.engine.tokenizer_pool, self._ready_info().limits.max_model_len
        match read_prompt(prompt):
            case str(text):
                return await pool.encode(text, max_tokens=max_tokens, tenant=tenant)
            case list(messages):
                return await pool.chat(messages, max_tokens=max_tokens, tenant=tenant)
            case ids:
                return ids

    @property
    def default_sampling_params(self) -> SamplingParams:
        """See `LLM`. Raises RuntimeError after `close`, and EngineUnavailable."""
        return self._ready_info().default_sampling

    def _ready_info(self) -> EngineInfo:
        if not self._is_open:
            raise RuntimeError("this AsyncLLM is closed; use it in `async with`, or call `start`")
        return self.engine.process.ready_info()

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """Count a request, for which `close` may wait. Raises RuntimeError or EngineUnavailable."""
        self._ready_info()
        self._num_running += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._num_running -= 1
            if not self._num_running:
                self._idle.set()

    async def _generation(
        self,
        prompt: Prompt,
        params: SamplingParams,
        speculation: SpeculationParams | None,
        prediction: str | None,
        options: RequestOptions,
    ) -> Generation:
        """The result of one prompt, which says so if the request cannot be served."""
        ids: tuple[int, ...] = ()
        collectors = defaultdict[int, DeltaCollector](lambda: DeltaCollector(params))
        try:
            with self._counted():
                request = await self._request(prompt, params, speculation, prediction, options)
                ids = request.prompt_ids
                async with aclosing(self._deltas(request)) as deltas:
                    async for delta in deltas:
                        collectors[delta.index].add(delta)
        except (RequestError, GenerationFailed) as error:
            return failed(ids, error, params)
        return generation(ids, [collectors[index] for index in range(params.n)])

    async def _request(
        self,
        prompt: Prompt,
        params: SamplingParams,
        speculation: SpeculationParams | None,
        prediction: str | None,
        options: RequestOptions,
    ) -> Request:
        """The encoded request. Raises RequestError if something cannot be encoded."""
        timeout, tenant = options.get("timeout"), options.get("tenant", "")
        arrived = time.monotonic()
        speculation = speculation or SpeculationParams()
        async with asyncio.timeout(timeout):
            ids = await self.encode(prompt, tenant=tenant)
            if prediction is not None:
                expected = await self.engine.tokenizer_pool.encode(
                    prediction,
                    add_special=False,
                    param="prediction",
                    max_tokens=self._ready_info().limits.max_model_len,
                    tenant=tenant,
                )
                speculation = replace(speculation, prediction=expected)
        return Request(
            id=secrets.token_hex(8),
            prompt_ids=ids,
            sampling=params,
            speculation=speculation,
            deadline=None if timeout is None else arrived + timeout,
            priority=options.get("priority", 0),
            cache_salt=options.get("cache_salt", ""),
            arrived_at=arrived,
            tenant=tenant,
        )

    async def _deltas(self, request: Request) -> AsyncGenerator[Delta, None]:
        """The deltas of all `n` sequences. Closing it ends them.

        Raises RequestError if the engine cannot serve the request.
        """
        self._ready_info().limits.check(request)
        streams = [
            self.engine.stream(replace(request, id=f"{request.id}-{index}", sampling=own), index)
            for index, own in enumerate(request.sampling.samples())
        ]
        async with aclosing(merge(streams)) as parts:
            async for part in parts:
                yield Delta.of(part.text, part.tokens, part.choice)
