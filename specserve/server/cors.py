"""Access from web pages of other origins (CORS).

A browser lets a page read the answer to a request to another origin only if the answer names the
page's origin. A request with a JSON body or an API key is not even sent before a preflight, an
OPTIONS request without credentials, has been answered so.
"""

from collections.abc import Awaitable, Callable, Collection
from typing import Final

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

_EXPOSED: Final = "Retry-After, X-Request-Id"  # response headers that pages may read
_PREFLIGHT: Final = {
    "Access-Control-Allow-Methods": "GET, HEAD, POST",
    "Access-Control-Allow-Headers": "*, Authorization",  # `*`: all others
    "Access-Control-Max-Age": "7200",  # seconds; browsers ask again after them
}


def preflights(origins: Collection[str]) -> Middleware:
    """A middleware that answers the preflights of pages of `origins` ("*": of all pages).

    Preflights of other origins get what any OPTIONS request gets. It must precede authorisation.
    """

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        asks = request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers
        if asks and _allowed(request, origins) is not None:
            return web.Response(status=204, headers=_PREFLIGHT)
        return await handler(request)

    return middleware


def cross_origin_headers(
    origins: Collection[str],
) -> Callable[[web.Request, web.StreamResponse], Awaitable[None]]:
    """A function for `on_response_prepare`: it adds the headers for `origins` to every answer.

    Errors and streams are answers, too. Unless all origins are allowed, an answer depends on the
    request's origin, which caches must know (Vary).
    """

    async def add_headers(request: web.Request, response: web.StreamResponse) -> None:
        if "*" not in origins:
            response.headers.add("Vary", "Origin")
        if (origin := _allowed(request, origins)) is not None:
            response.headers["Access-Control-Allow-Origin"] = origin
            response.headers["Access-Control-Expose-Headers"] = _EXPOSED

    return add_headers


def _allowed(request: web.Request, origins: Collection[str]) -> str | None:
    """The value of Access-Control-Allow-Origin for this request; None: its origin is not allowed.

    "*" lets pages read the answer, but browsers send no cookies or certificates then.
    """
    if "*" in origins:
        return "*"
    origin = request.headers.get("Origin")
    return origin if origin in origins else None
