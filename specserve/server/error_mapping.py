"""Maps every exception that a handler can raise to the error response for the client."""

import logging
from collections import defaultdict
from difflib import get_close_matches
from typing import Final

from aiohttp import web

from specserve.completion import GenerationFailed
from specserve.process.engine_process import EngineUnavailable
from specserve.process.tokenizer_pool import TokenizerUnavailable
from specserve.server.admission import QueueFull
from specserve.server.errors import APIError
from specserve.types import RequestError

logger = logging.getLogger(__name__)
_MAX_PATH: Final = 60  # characters of an unknown path that are compared and quoted
_SIMILAR: Final = 0.75  # smallest similarity (difflib) at which a route is suggested


def as_api_error(error: Exception) -> APIError:
    """The error response for `error`. Unknown exceptions are logged and become a 500."""
    match error:
        case APIError():
            return error
        case RequestError():
            return APIError(400, str(error), param=error.param)
        case QueueFull():
            return APIError.unavailable(str(error), error.retry_after, status=429)
        case EngineUnavailable() | TokenizerUnavailable():
            return APIError.unavailable(str(error), error.retry_after)
        case GenerationFailed():
            return APIError(500, str(error), code="generation_failed")
        case web.HTTPMethodNotAllowed():
            methods = ", ".join(sorted(error.allowed_methods))
            message = f"{error.method[:20]} is not allowed on this route; use {methods}"
            return APIError(405, message, headers=_allow(error))
        case web.HTTPException():
            return APIError(error.status, f"{error.reason}", headers=_allow(error))
    logger.exception("a handler failed", exc_info=error)
    return APIError(500, "internal error; the server's log has more")


def no_such_route(request: web.Request) -> APIError:
    """The 404 for a path that no route has. It names the most similar route and lists all."""
    methods: defaultdict[str, list[str]] = defaultdict(list)  # by path
    paths: defaultdict[str, list[str]] = defaultdict(list)  # by method
    for route in request.app.router.routes():
        if route.resource is not None and route.method != "HEAD":
            methods[route.resource.canonical].append(route.method)
            paths[route.method].append(route.resource.canonical)
    path = request.path[:_MAX_PATH]
    hint = ""
    if similar := get_close_matches(path.lower(), methods, n=1, cutoff=_SIMILAR):
        hint = f"; did you mean {'/'.join(methods[similar[0]])} {similar[0]}?"
    listed = "; ".join(f"{method} {', '.join(each)}" for method, each in sorted(paths.items()))
    return APIError(404, f"there is no route {path}{hint or '.'} Routes: {listed}")


def _allow(error: web.HTTPException) -> dict[str, str]:
    return {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}
