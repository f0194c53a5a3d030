"""The exceptions of the clients, all with a readable message."""

from typing import Final

import msgspec
from msgspec import Struct

_MAX_QUOTED: Final = 200  # characters quoted of an unexpected answer


class SpecserveError(Exception):
    """Base class of the errors with which a request can end."""


class APIStatusError(SpecserveError):
    """The server answered with an error status.

    `param` names the invalid field. `code` is a machine-readable reason. `request_id` identifies
    the request in the server's log. `retry_after` is the time in seconds to wait before another
    attempt. Each is None if the server did not send it.
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
    """400, 413, 415, 422: the request is invalid or too large."""


class AuthenticationError(APIStatusError):
    """401: the API key is missing or unknown."""


class PermissionDenied(APIStatusError):
    """403: the API key lacks the scope of this route."""


class NotFound(APIStatusError):
    """404: the model or route does not exist."""


class RateLimited(APIStatusError):
    """429: too many requests; another attempt may succeed after `retry_after` seconds."""


class ServerError(APIStatusError):
    """5xx: the server failed."""


class Unavailable(ServerError):
    """502, 503, 504: the server is starting, draining, overloaded or unreachable, or timed out."""


class ConnectionFailed(SpecserveError):
    """The server was not reached, or the connection ended before the answer was complete."""


class TimedOut(SpecserveError):
    """The answer was not complete within `timeout`."""


class UnexpectedAnswer(SpecserveError):
    """The answer does not have the format of a specserve server."""


class StreamBroken(SpecserveError):
    """A stream ended, or was closed, before its end marker `[DONE]`."""


class GenerationFailed(SpecserveError):
    """The server sent an error event within a stream."""

    def __init__(self, message: str, *, param: str | None, code: str | int | None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code


class ErrorDetail(Struct, frozen=True):
    """The `error` object in the JSON of an answer or event."""

    message: str = ""
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
    """The exception for an answer with an error status. A body without `error` is quoted."""
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
    """The beginning of an unexpected answer, as one printable line."""
    text = " ".join(body[: 4 * _MAX_QUOTED].decode(errors="replace").split())
    return "".join(char if char.isprintable() else "\ufffd" for char in text)[:_MAX_QUOTED]
