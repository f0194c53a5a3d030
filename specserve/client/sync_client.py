"""The synchronous client: runs the asynchronous one on an event loop in a background thread.

So there is one implementation, any number of threads can use a client, even a thread that runs an
event loop itself (Jupyter), and Ctrl-C cancels the request in progress.
"""

from collections import deque
from collections.abc import Callable, Coroutine
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Self, TypeVar, Unpack

from specserve.client.async_client import DEFAULT_URL, AsyncClient
from specserve.client.async_stream import AsyncStream
from specserve.client.connection import Settings
from specserve.client.loop_thread import LoopThread
from specserve.client.request import Messages, Options, Prompt, lists_options
from specserve.client.types import Completion, Delta

P = ParamSpec("P")
T = TypeVar("T")


def _blocking(
    method: Callable[Concatenate[AsyncClient, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate["Client", P], T]:
    """The method of `Client` that runs `method` of its AsyncClient and waits for the result."""

    @wraps(method)
    def run(client: "Client", /, *args: P.args, **kwargs: P.kwargs) -> T:
        return client._thread.run(method(client._client, *args, **kwargs))

    return run


class Client:
    """A client of a specserve server, or of another server with OpenAI's API. It is thread-safe.

    `timeout` (default 600) limits a whole call, including retries and the stream, and
    `connect_timeout` (default 5) each connection attempt, both in seconds (`timeout` None: no
    limit). After a refused or lost connection or a status 408, 429, 502, 503 or 504, a call is
    retried up to `max_retries` times (default 2), after the wait that Retry-After gives, if that
    fits in the timeout; never after an answer with status 200 has begun. Errors are
    `SpecserveError`s; invalid arguments raise ValueError or TypeError.
    """

    def __init__(self, url: str = DEFAULT_URL, **settings: Unpack[Settings]) -> None:
        self._client = AsyncClient(url, **settings)
        self.url = self._client.url
        self._thread = LoopThread(self._client.close)

    complete = _blocking(AsyncClient.complete)
    chat = _blocking(AsyncClient.chat)
    models = _blocking(AsyncClient.models)
    tokenize = _blocking(AsyncClient.tokenize)
    detokenize = _blocking(AsyncClient.detokenize)
    health = _blocking(AsyncClient.health)
    ready = _blocking(AsyncClient.ready)
    version = _blocking(AsyncClient.version)
    speculation = _blocking(AsyncClient.speculation)
    metrics = _blocking(AsyncClient.metrics)

    @lists_options
    def stream(self, prompt: Prompt, **options: Unpack[Options]) -> "Stream":
        """`complete` as a stream of deltas. The request is sent when the stream is first used."""
        return Stream(self._thread, self._client.stream(prompt, **options))

    @lists_options
    def stream_chat(self, messages: Messages, **options: Unpack[Options]) -> "Stream":
        """`chat` as a stream of deltas. The request is sent when the stream is first used."""
        return Stream(self._thread, self._client.stream_chat(messages, **options))

    def close(self) -> None:
        """Abort all calls in progress, also in other threads. Further calls have no effect."""
        self._thread.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
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

    def __exit__(self, *error: object) -> None:
        self.close()

    def __del__(self) -> None:
        self._thread.call_soon(self._stream.abandon)
