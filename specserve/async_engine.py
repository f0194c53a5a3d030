"""The engine for asyncio programs: requests in, text deltas out.

`AsyncLLM` and the HTTP server are built on it. The model runs in a process of its own, and so do
tokenizer and chat template (`process/`). This process only turns token ids into text and imports no
torch. It does not know HTTP.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Final, TypeVar

from specserve.completion import GenerationFailed
from specserve.config import EngineConfig
from specserve.engine.metrics import EngineInfo, EngineStats
from specserve.process.engine_process import EngineProcess, State
from specserve.process.tokenizer_pool import TokenizerPool
from specserve.text import Tokenizer
from specserve.text.output_text import OutputText
from specserve.text.text_delta import TextDelta
from specserve.text.token_chunk import TokenChunker
from specserve.types import Request, TokenLogprobs

T = TypeVar("T")
_MAX_WAITING: Final = 2**20  # prompts of this process; a server has a smaller limit of its own


class AsyncEngine:
    """An engine in a child process, with tokenizer processes, for one event loop.

    An engine process that ends or hangs is replaced; its open streams raise
    EngineUnavailable. Of the configuration's section `server` only heartbeat_timeout,
    template_timeout and stream_interval have an effect.
    """

    def __init__(
        self,
        config: EngineConfig,
        directory: Path,
        *,
        tokenizer_pool: TokenizerPool | None = None,
    ) -> None:
        """`directory` is the model directory.

        Without a `tokenizer_pool` one is made. Raises TokenizerError if the tokenizer is unusable.
        """
        server = config.server
        self.config = config
        self.tokenizer = Tokenizer(directory)  # to decode only: encoding blocks the event loop
        self.tokenizer_pool = tokenizer_pool or TokenizerPool(
            directory, time_limit=server.template_timeout, max_waiting=_MAX_WAITING
        )
        self.process = EngineProcess(config, directory, heartbeat_timeout=server.heartbeat_timeout)

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

    async def wait_ready(self) -> EngineInfo:
        """Wait until the engine is ready. Raises EngineFailed or EngineUnavailable."""
        return await self.process.wait_ready()

    async def stop(self) -> None:
        """End the processes; open streams raise EngineUnavailable."""
        await self.tokenizer_pool.stop()
        await self.process.stop()

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
