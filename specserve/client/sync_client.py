"""The synchronous client: the asynchronous one on an event loop thread of its own.

So there is one implementation, and it works from any number of threads, inside a running loop
(Jupyter) as well, and Ctrl-C cancels the request that is waited for.
"""

from collections import deque
from collections.abc import Sequence
from types import TracebackType
from typing import Self, Unpack

from specserve.client.async_client import DEFAULT_URL, AsyncClient
from specserve.client.async_stream import AsyncStream
from specserve.client.loop_thread import LoopThread
from specserve.client.request import Messages, Options, Prompt
from specserve.client.types import Completion, Delta, Model, SpeculationReport


class Client:
    """A specserve server, or another one with OpenAI's API. For any number of threads.

    `timeout` is for a whole call, retries and stream included (seconds; None: no limit),
    `connect_timeout` for each connection. Refused or lost connections and the statuses 408, 429,
    502, 503 and 504 are tried again `max_retries` times, when the server says (Retry-After) if
    that fits in the timeout; never once an answer has begun. Errors are `SpecserveError`s;
    arguments that cannot be sent raise ValueError or TypeError.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        timeout: float | None = 600.0,
        connect_timeout: float = 5.0,
        max_retries: int = 2,
    ) -> None:
        self._client = AsyncClient(
            url,
            api_key=api_key,
            timeout=timeout,
            connect_timeout=connect_timeout,
            max_retries=max_retries,
        )
        self._thread = LoopThread(self._client.close)

    @property
    def url(self) -> str:
        return self._client.url

    def complete(self, prompt: Prompt, **options: Unpack[Options]) -> Completion:
        """Go on with a text or with token ids."""
        return self._thread.run(self._client.complete(prompt, **options))

    def chat(self, messages: Messages, **options: Unpack[Options]) -> Completion:
        """Answer a chat; text alone is one message of a user."""
        return self._thread.run(self._client.chat(messages, **options))

    def stream(self, prompt: Prompt, **options: Unpack[Options]) -> "Stream":
        """`complete`, piece by piece. The request is sent when the stream is first used."""
        return Stream(self._thread, self._client.stream(prompt, **options))

    def stream_chat(self, messages: Messages, **options: Unpack[Options]) -> "Stream":
        """`chat`, piece by piece. The request is sent when the stream is first used."""
        return Stream(self._thread, self._client.stream_chat(messages, **options))

    def models(self) -> tuple[Model, ...]:
        return self._thread.run(self._client.models())

    def tokenize(self, text: str | Messages) -> tuple[int, ...]:
        """Token ids of a text, or of a chat in the model's template."""
        return self._thread.run(self._client.tokenize(text))

    def detokenize(self, token_ids: Sequence[int]) -> str:
        return self._thread.run(self._client.detokenize(token_ids))

    def health(self) -> bool:
        """Whether the server is alive; it may still be starting."""
        return self._thread.run(self._client.health())

    def ready(self) -> bool:
        """Whether the server takes requests now."""
        return self._thread.run(self._client.ready())

    def version(self) -> str:
        return self._thread.run(self._client.version())

    def speculation(self) -> SpeculationReport:
        """The drafters, and what became of their proposals."""
        return self._thread.run(self._client.speculation())

    def metrics(self) -> str:
        """The server's metrics in Prometheus' text format."""
        return self._thread.run(self._client.metrics())

    def close(self) -> None:
        """Ends every call that is under way, in other threads too. Can be called again."""
        self._thread.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class Stream:
    """An answer as it comes: iterate it, then ask for its `result`.

    with client.stream("Once upon a time") as stream:
        for delta in stream:
            print(delta.text, end="")

    The request is sent on first use. Leaving the context, closing the stream or dropping it hangs
    up, which makes the server stop generating. `usage` and `stats` are on the last delta.
    """

    def __init__(self, thread: LoopThread, stream: AsyncStream) -> None:
        self._thread = thread
        self._stream = stream
        self._arrived: deque[Delta] = deque()

    def result(self) -> Completion:
        """Read what is left; the whole answer. Raises SpecserveError."""
        return self._thread.run(self._stream.result())

    def close(self) -> None:
        """Hang up. Can be called again."""
        self._arrived.clear()
        self._thread.call_soon(self._stream.abandon)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Delta:
        if not self._arrived:
            self._arrived.extend(self._thread.run(self._stream.batch()))
        if not self._arrived:
            raise StopIteration
        return self._arrived.popleft()

    def __enter__(self) -> Self:
        self._thread.run(self._stream.open())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self._thread.call_soon(self._stream.abandon)
