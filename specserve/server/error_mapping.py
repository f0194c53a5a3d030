"""Maps every exception that a handler can raise to the error response for the client."""

import logging

from aiohttp import web

from specserve.async_engine import GenerationFailed
from specserve.process.engine_process import EngineUnavailable
from specserve.process.tokenizer_pool import TokenizerUnavailable
from specserve.server.admission import QueueFull
from specserve.server.errors import APIError
from specserve.types import RequestError

logger = logging.getLogger(__name__)


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
        case web.HTTPNotFound():
            return APIError(404, "there is no such route; /openapi.json lists all routes")
        case web.HTTPMethodNotAllowed():
            methods = ", ".join(sorted(error.allowed_methods))
            message = f"{error.method[:20]} is not allowed on this route; use {methods}"
            return APIError(405, message, headers=_allow(error))
        case web.HTTPException():
            return APIError(error.status, f"{error.reason}", headers=_allow(error))
    logger.exception("a handler failed", exc_info=error)
    return APIError(500, "internal error; the server's log has more")


def _allow(error: web.HTTPException) -> dict[str, str]:
    return {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}
