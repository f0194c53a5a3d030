"""The HTTP layer of the clients: one session, deadlines, retries. It does not interpret bodies.

A request is retried only as long as no answer with status 200 has begun.
"""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from io import BytesIO
from math import inf
from typing import Final, TypedDict
from urllib.parse import urlsplit
from weakref import WeakSet

import aiohttp

from specserve.client.errors import (
    APIStatusError,
    ConnectionFailed,
    SpecserveError,
    TimedOut,
    UnexpectedAnswer,
    status_error,
)
from specserve.client.retry import parse_retry_after, wait_before_retry

# Seconds. Shorter than servers keep idle connections, so that a request does not use one that
# the server is closing.
_KEEP_IDLE_S: Final = 4.0
_MAX_ERROR_BODY: Final = 65536  # bytes


class Deadline:
    """The end of the time limit of a call that starts now. `seconds` None: no limit."""

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds
        self._end = asyncio.get_running_loop().time() + (inf if seconds is None else seconds)

    @property
    def remaining(self) -> float:
        return self._end - asyncio.get_running_loop().time()

    @asynccontextmanager
    async def limit(self) -> AsyncIterator[None]:
        """Cancels the body of the context at the deadline, and raises TimedOut."""
        try:
            async with asyncio.timeout_at(None if self._seconds is None else self._end):
                yield
        except TimeoutError:
            raise TimedOut(f"no complete answer within {self._seconds:g} s") from None


@dataclass(frozen=True, slots=True)
class Call:
    """One HTTP request: POST if it has a body, else GET. `retried`: whether it may be retried."""

    path: str
    body: bytes | None = None  # JSON
    request_id: str | None = None
    timeout: float | None = None  # seconds; None: that of the connection
    retried: bool = True


class Settings(TypedDict, total=False):
    """Keyword arguments of the clients, see `Client`."""

    api_key: str | None
    timeout: float | None
    connect_timeout: float
    max_retries: int


class Connection:
    """An HTTP session for the event loop on which it is first used. Arguments: as of `Client`."""

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout: float | None = 600.0,
        connect_timeout: float = 5.0,
        max_retries: int = 2,
    ) -> None:
        self.url = base_url(url)
        self._headers = {"Accept-Encoding": "identity"}
        if api_key is not None:
            if not (api_key.isascii() and api_key.isprintable() and api_key.strip()):
                raise ValueError("api_key: empty, or with characters that no HTTP header can carry")
            self._headers["Authorization"] = f"Bearer {api_key.strip()}"
        self._timeout = _positive("timeout", timeout)
        self._connect_timeout = _positive("connect_timeout", connect_timeout)
        if max_retries < 0:
            raise ValueError(f"max_retries: {max_retries} is below 0; 0 means one attempt")
        self._max_retries = max_retries
        self._session: aiohttp.ClientSession | None = None
        self.loop: asyncio.AbstractEventLoop | None = None
        self._handed_out: WeakSet[aiohttp.ClientResponse] = WeakSet()
        self._closed = False

    def deadline(self, call: Call) -> Deadline:
        """The deadline of a call that starts now."""
        return Deadline(_positive("timeout", call.timeout) or self._timeout)

    async def fetch(self, call: Call) -> bytes:
        """Send the request and return the body of the answer. Raises SpecserveError."""
        deadline = self.deadline(call)
        response = await self.open(call, deadline)
        try:
            async with deadline.limit():
                return await response.read()
        except (aiohttp.ClientError, OSError) as error:
            raise ConnectionFailed(f"{self.url} hung up within its answer") from error
        finally:
            response.release()

    async def open(self, call: Call, deadline: Deadline) -> aiohttp.ClientResponse:
        """Send the request, with retries. Returns an answer with status 200, its body unread."""
        attempt = 0
        async with deadline.limit():
            while True:
                try:
                    return await self._attempt(call)
                except SpecserveError as error:
                    last = not call.retried or attempt == self._max_retries
                    wait = None if last else wait_before_retry(error, attempt)
                    if wait is None or wait >= deadline.remaining:
                        raise
                await asyncio.sleep(wait)
                attempt += 1

    async def close(self) -> None:
        """Abort all requests in progress. Further calls have no effect."""
        self._closed = True
        for response in list(self._handed_out):
            response.close()
        if self._session is not None:
            await self._session.close()

    async def _attempt(self, call: Call) -> aiohttp.ClientResponse:
        session, headers = self._open_session(), dict(self._headers)
        if call.body is not None:
            headers["Content-Type"] = "application/json"
        if call.request_id is not None:
            headers["X-Request-Id"] = call.request_id
        try:
            response = await session.request(
                "GET" if call.body is None else "POST",
                self.url + call.path,
                data=None if call.body is None else BytesIO(call.body),
                headers=headers,
                allow_redirects=False,
            )
        except aiohttp.ClientResponseError as error:
            raise UnexpectedAnswer(f"{self.url} does not speak HTTP: {error.message}") from error
        except (aiohttp.ClientError, OSError) as error:
            raise ConnectionFailed(self._why_not(error)) from error
        if response.status == 200:
            self._handed_out.add(response)
            return response
        raise await _status_error(response)

    def _open_session(self) -> aiohttp.ClientSession:
        if self._closed:
            raise RuntimeError("the client is closed; make a new one")
        loop = asyncio.get_running_loop()
        if self._session is None:
            self.loop = loop
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_IDLE_S),
                timeout=aiohttp.ClientTimeout(total=None, connect=self._connect_timeout),
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        if loop is not self.loop:
            raise RuntimeError("the client was used on another event loop; make one per loop")
        return self._session

    def _why_not(self, error: aiohttp.ClientError | OSError) -> str:
        if isinstance(error, aiohttp.ServerTimeoutError):
            return f"{self.url} accepted no connection within {self._connect_timeout:g} s"
        if isinstance(error, aiohttp.ClientConnectorCertificateError):
            return f"cannot trust {self.url}: {error.certificate_error}"
        if isinstance(error, aiohttp.ClientConnectorError):
            number, own_words = error.os_error.errno, error.os_error.strerror
            # asyncio replaces the system's message but keeps its positive errno.
            reason = os.strerror(number) if number and number > 0 else own_words
            return f"cannot connect to {self.url}: {reason or error.os_error}"
        return f"{self.url} hung up before answering"


def base_url(url: str) -> str:
    """`url` without a trailing "/" or "/v1", which OpenAI's clients have. Raises ValueError."""
    example = "give for example http://127.0.0.1:8000"
    try:
        parts = urlsplit(url)
        complete = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError as error:
        raise ValueError(f"url: {url!r} cannot be read ({error}); {example}") from None
    if not complete or parts.query or parts.fragment:
        raise ValueError(f"url: {url!r} is no http:// or https:// address; {example}")
    if parts.username is not None:
        raise ValueError("url: it holds a user name or password; give api_key instead")
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


async def _status_error(response: aiohttp.ClientResponse) -> APIStatusError:
    body = bytearray()
    try:
        while len(body) < _MAX_ERROR_BODY and (chunk := await response.content.readany()):
            body += chunk
    except (aiohttp.ClientError, OSError):
        pass  # use the part that has arrived
    finally:
        response.release()
    return status_error(
        response.status,
        bytes(body),
        request_id=response.headers.get("X-Request-Id"),
        retry_after=parse_retry_after(response.headers.get("Retry-After")),
    )


def _positive(name: str, seconds: float | None) -> float | None:
    if seconds is not None and not seconds > 0:
        raise ValueError(f"{name}: {seconds} is not above 0; give seconds")
    return seconds
