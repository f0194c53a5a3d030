"""The synchronous client: runs the asynchronous one on an event loop in a background thread.

So there is one implementation, any number of threads can use a client, even a thread that runs an
event loop itself (Jupyter), and Ctrl-C cancels the request in progress.
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
    """A client of a specserve server, or of another server with OpenAI's API. It is thread-safe.

    `timeout` limits a whole call, including retries and the stream, and `connect_timeout` each
    connection attempt, both in seconds (`timeout` None: no limit). After a refused or lost
    connection or a status 408, 429, 502, 503 or 504, a call is retried up to `max_retries` times,
    after the wait that Retry-After gives, if that fits in the timeout; never after an answer with
    status 200 has begun. Errors are `SpecserveError`s; invalid arguments raise ValueError or
    TypeError.
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
        """Continue a text or token ids."""
        return self._thread.run(self._client.complete(prompt, **options))

    def chat(self, messages: Messages, **options: Unpack[Options]) -> Completion:
        """Answer a chat. A string stands for one user message."""
        return self._thread.run(self._client.chat(messages, **options))

    def stream(self, prompt: Prompt, **options: Unpack[Options]) -> "Stream":
        """`complete` as a stream of deltas. The request is sent when the stream is first used."""
        return Stream(self._thread, self._client.stream(prompt, **options))

    def stream_chat(self, messages: Messages, **options: Unpack[Options]) -> "Stream":
        """`chat` as a stream of deltas. The request is sent when the stream is first used."""
        return Stream(self._thread, self._client.stream_chat(messages, **options))

    def models(self) -> tuple[Model, ...]:
        """The models of the server."""
        return self._thread.run(self._client.models())

    def tokenize(self, text: str | Messages) -> tuple[int, ...]:
        """The token ids of a text, or of a chat in the model's chat template."""
        return self._thread.run(self._client.tokenize(text))

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """The text of token ids."""
        return self._thread.run(self._client.detokenize(token_ids))

    def health(self) -> bool:
        """Whether the server answers and its engine has not failed; it may still be starting.

        Raises SpecserveError if the answer is an error other than 502, 503 or 504.
        """
        return self._thread.run(self._client.health())

    def ready(self) -> bool:
        """Whether the server accepts requests now. Raises like `health`."""
        return self._thread.run(self._client.ready())

    def version(self) -> str:
        """The version of specserve on the server."""
        return self._thread.run(self._client.version())

    def speculation(self) -> SpeculationReport:
        """The drafters, and how many of their proposals were verified and accepted."""
        return self._thread.run(self._client.speculation())

    def metrics(self) -> str:
        """The metrics of the server, in the text format of Prometheus."""
        return self._thread.run(self._client.metrics())

    def close(self) -> None:
        """Abort all calls in progress, also in other threads. Further calls have no effect."""
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
    """A streamed answer: iterate over its deltas; `result` then returns the whole answer.

    with client.stream("Once upon a time") as stream:
        for delta in stream:
            print(delta.text, end="")

    The request is sent on first use. Leaving the context, `close` and the deletion of the object
    close the connection, so that the server stops generating. The last delta has `usage` and
    `stats`. Iteration raises SpecserveError.
    """

    def __init__(self, thread: LoopThread, stream: AsyncStream) -> None:
        self._thread = thread
        self._stream = stream
        self._arrived: deque[Delta] = deque()

    def result(self) -> Completion:
        """Read the rest and return the whole answer. Raises SpecserveError."""
        return self._thread.run(self._stream.result())

    def close(self) -> None:
        """Close the connection. Further calls have no effect."""
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
