"""Error responses in OpenAI's nested form, for every kind of error.

An error contains no traceback, no path of the machine, and only as much of the input as helps to
find the mistake.
"""

import msgspec
from aiohttp import web

from specserve.server.protocol.others import ErrorDetail, ErrorResponse

MAX_MESSAGE = 500  # characters

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "request_too_large",
    415: "invalid_request_error",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class APIError(Exception):
    """An error response. Raised by handlers and rendered by the outermost middleware."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers or {}

    @classmethod
    def unavailable(cls, message: str, retry_after: float, status: int = 503) -> "APIError":
        return cls(status, message, headers={"Retry-After": str(max(1, round(retry_after)))})

    def body(self) -> bytes:
        """The JSON of the error, with the message cut to `MAX_MESSAGE` characters."""
        message = self.message
        if len(message) > MAX_MESSAGE:
            message = message[:MAX_MESSAGE] + "..."
        # A JSON string can hold lone surrogates, which UTF-8 cannot encode.
        message = message.encode(errors="replace").decode()
        kind = TYPES.get(self.status, "api_error")
        return msgspec.json.encode(ErrorResponse(ErrorDetail(message, kind, self.param, self.code)))

    def response(self) -> web.Response:
        return web.Response(
            status=self.status,
            body=self.body(),
            content_type="application/json",
            headers=self.headers,
        )
