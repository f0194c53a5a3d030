"""The asynchronous client: one method per route of the server."""

from collections.abc import Sequence
from typing import Final, Self, TypeVar, Unpack

from msgspec import Struct

from specserve.client.answers import Answer, read_json, whole
from specserve.client.async_stream import AsyncStream
from specserve.client.connection import Call, Connection, Settings
from specserve.client.errors import ConnectionFailed, TimedOut, Unavailable
from specserve.client.request import (
    Messages,
    Options,
    Prompt,
    as_messages,
    chat_body,
    completion_body,
    encode_body,
    lists_options,
)
from specserve.client.types import Completion, Model, SpeculationReport

T = TypeVar("T")
DEFAULT_URL: Final = "http://127.0.0.1:8000"
_COMPLETIONS: Final = "/v1/completions"
_CHAT: Final = "/v1/chat/completions"
_PROBE_S: Final = 5.0  # timeout of `health` and `ready`, in seconds


class AsyncClient:
    """`Client` for asyncio, with the same arguments and methods. It serves one event loop.

    Use it as an async context manager, or call `close` at the end.
    """

    def __init__(self, url: str = DEFAULT_URL, **settings: Unpack[Settings]) -> None:
        self._connection = Connection(url, **settings)
        self.url = self._connection.url

    @lists_options
    async def complete(self, prompt: Prompt, **options: Unpack[Options]) -> Completion:
        """Continue a text or token ids."""
        body = completion_body(prompt, options, stream=False)
        return whole(await self._fetch(Answer, _call(_COMPLETIONS, body, options)))

    @lists_options
    async def chat(self, messages: Messages, **options: Unpack[Options]) -> Completion:
        """Answer a chat. A string stands for one user message."""
        body = chat_body(messages, options, stream=False)
        return whole(await self._fetch(Answer, _call(_CHAT, body, options)))

    @lists_options
    def stream(self, prompt: Prompt, **options: Unpack[Options]) -> AsyncStream:
        """`complete` as a stream of deltas. The request is sent when the stream is first used."""
        body = completion_body(prompt, options, stream=True)
        return AsyncStream(self._connection, _call(_COMPLETIONS, body, options))

    @lists_options
    def stream_chat(self, messages: Messages, **options: Unpack[Options]) -> AsyncStream:
        """`chat` as a stream of deltas. The request is sent when the stream is first used."""
        body = chat_body(messages, options, stream=True)
        return AsyncStream(self._connection, _call(_CHAT, body, options))

    async def models(self) -> tuple[Model, ...]:
        """The models of the server."""
        return (await self._fetch(_ModelList, Call("/v1/models"))).data

    async def tokenize(self, text: str | Messages) -> tuple[int, ...]:
        """The token ids of a text, or of a chat in the model's chat template."""
        name, value = ("prompt", text) if isinstance(text, str) else ("messages", as_messages(text))
        return (await self._fetch(_Tokens, Call("/tokenize", encode_body({name: value})))).tokens

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """The text of token ids."""
        body = encode_body({"tokens": list(token_ids)})
        return (await self._fetch(_Text, Call("/detokenize", body))).prompt

    async def health(self) -> bool:
        """Whether the server answers and its engine has not failed; it may still be starting.

        Raises SpecserveError if the answer is an error other than 502, 503 or 504.
        """
        return await self._probe("/health")

    async def ready(self) -> bool:
        """Whether the server accepts requests now. Raises like `health`."""
        return await self._probe("/ready")

    async def version(self) -> str:
        """The version of specserve on the server."""
        return (await self._fetch(_Version, Call("/version"))).version

    async def speculation(self) -> SpeculationReport:
        """The drafters, and how many of their proposals were verified and accepted."""
        return await self._fetch(SpeculationReport, Call("/v1/speculation"))

    async def metrics(self) -> str:
        """The metrics of the server, in the text format of Prometheus."""
        return (await self._connection.fetch(Call("/metrics"))).decode(errors="replace")

    async def close(self) -> None:
        """Abort all calls in progress. The client cannot be used afterwards."""
        await self._connection.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def _fetch(self, kind: type[T], call: Call) -> T:
        return read_json(await self._connection.fetch(call), kind)

    async def _probe(self, path: str) -> bool:
        try:
            await self._connection.fetch(Call(path, timeout=_PROBE_S, retried=False))
        except (Unavailable, ConnectionFailed, TimedOut):
            return False
        return True


class _ModelList(Struct, frozen=True):
    data: tuple[Model, ...]


class _Tokens(Struct, frozen=True):
    tokens: tuple[int, ...]


class _Text(Struct, frozen=True):
    prompt: str


class _Version(Struct, frozen=True):
    version: str


def _call(path: str, body: bytes, options: Options) -> Call:
    return Call(path, body, options.get("request_id"), options.get("timeout"))
