"""What can go wrong between a client and a server, as exceptions.

Every one is a `SpecserveError`, and its text is a sentence for people. An answer with an error
status is an `APIStatusError`; the rest is about connections, time and streams.
"""

from typing import Final

import msgspec
from msgspec import Struct

_MAX_QUOTED: Final = 200  # characters of an answer that is not ours


class SpecserveError(Exception):
    """Base of everything this client raises about a request."""


class APIStatusError(SpecserveError):
    """The server answered with an error status.

    `param` names the field at fault, `code` is for programs, `request_id` for the server's log,
    `retry_after` is in seconds; each is None where the server did not say.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | int | None = None,
        request_id: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.request_id = request_id
        self.retry_after = retry_after


class BadRequest(APIStatusError):
    """400, 413, 415, 422: the request itself has to change."""


class AuthenticationError(APIStatusError):
    """401: no API key, or one the server does not know."""


class PermissionDenied(APIStatusError):
    """403: the API key is not for this."""


class NotFound(APIStatusError):
    """404: no such model or route."""


class RateLimited(APIStatusError):
    """429: too much at once; `retry_after` says when there may be room."""


class ServerError(APIStatusError):
    """5xx: the server failed."""


class Unavailable(ServerError):
    """502, 503, 504: starting, draining, restarting, or nothing behind the proxy."""


class ConnectionFailed(SpecserveError):
    """The server could not be reached, or hung up before its answer was complete."""


class TimedOut(SpecserveError):
    """The answer was not complete within `timeout`."""


class UnexpectedAnswer(SpecserveError):
    """The answer is not one a specserve server gives."""


class StreamBroken(SpecserveError):
    """A stream ended without saying that it was complete."""


class GenerationFailed(SpecserveError):
    """The server reported a failure in the middle of a stream."""

    def __init__(self, message: str, *, param: str | None, code: str | int | None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code


class ErrorDetail(Struct, frozen=True):
    """The `error` object of an answer."""

    message: str = ""
    type: str | None = None
    param: str | None = None
    code: str | int | None = None


class _ErrorBody(Struct, frozen=True):
    error: ErrorDetail


_CLASSES: Final[dict[int, type[APIStatusError]]] = {
    400: BadRequest,
    413: BadRequest,
    415: BadRequest,
    422: BadRequest,
    401: AuthenticationError,
    403: PermissionDenied,
    404: NotFound,
    429: RateLimited,
    502: Unavailable,
    503: Unavailable,
    504: Unavailable,
}


def status_error(
    status: int, body: bytes, *, request_id: str | None, retry_after: float | None
) -> APIStatusError:
    """The exception for an answer with an error status, whatever its body is."""
    try:
        detail = msgspec.json.decode(body, type=_ErrorBody).error
    except msgspec.MsgspecError:
        detail = ErrorDetail(quote(body))
    kind = _CLASSES.get(status, ServerError if status >= 500 else APIStatusError)
    return kind(
        status,
        detail.message or "no reason given",
        param=detail.param,
        code=detail.code,
        request_id=request_id,
        retry_after=retry_after,
    )


def quote(body: bytes) -> str:
    """The beginning of an answer that is not ours, on one line."""
    text = " ".join(body[: 4 * _MAX_QUOTED].decode(errors="replace").split())
    return "".join(char if char.isprintable() else "\ufffd" for char in text)[:_MAX_QUOTED]
