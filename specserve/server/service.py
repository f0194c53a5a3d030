"""The objects that every handler needs, stored in the application instead of globals."""

import re
import secrets
import time
from dataclasses import dataclass, field
from typing import Final

from aiohttp import web

from specserve.async_engine import AsyncEngine
from specserve.config import EngineConfig
from specserve.engine.metrics import EngineInfo
from specserve.server.accepted import AcceptedRequests
from specserve.server.admission import Admission
from specserve.server.errors import APIError
from specserve.server.held_bodies import HeldBodies
from specserve.server.key_speculation import KeySpeculation
from specserve.server.metrics import ServerMetrics
from specserve.server.turns import Turns
from specserve.text.token_bytes import TokenBytes

RETRY_STARTING: Final = 2.0  # seconds, for Retry-After while the engine starts
_SAFE_ID: Final = re.compile(r"[A-Za-z0-9._:-]{1,128}")


@dataclass(slots=True, kw_only=True)
class Service:
    """The parts of one server."""

    config: EngineConfig
    model_name: str
    engine: AsyncEngine
    token_bytes: TokenBytes
    admission: Admission
    bodies: HeldBodies
    metrics: ServerMetrics
    key_speculation: KeySpeculation = field(default_factory=KeySpeculation)
    accepted: AcceptedRequests
    turns: Turns
    draining: bool = False
    created: int = field(default_factory=lambda: int(time.time()))

    def now(self) -> int:
        """Unix seconds, for `created`."""
        return int(time.time())

    def not_ready(self) -> APIError | None:
        """Why the server takes no new request now: a 503 with Retry-After, or None if it does."""
        return self.shutting_down() or self.no_engine()

    def shutting_down(self) -> APIError | None:
        """The 503 for new requests during a drain, else None."""
        if not self.draining:
            return None
        error = APIError.unavailable(
            "the server is shutting down", self.config.server.drain_timeout
        )
        error.headers["Connection"] = "close"
        return error

    def no_engine(self) -> APIError | None:
        """The 503 for an accepted request while there is no ready engine, else None."""
        if self.engine.state == "failed":
            return APIError.unavailable("the engine could not be started", 60.0)
        if self.engine.state != "ready":
            return APIError.unavailable(f"the engine is {self.engine.state}", RETRY_STARTING)
        return None

    def engine_info(self) -> EngineInfo:
        """The engine's properties. Raises APIError (503) until an engine has been ready."""
        if self.engine.info is None:
            raise APIError.unavailable(f"the engine is {self.engine.state}", RETRY_STARTING)
        return self.engine.info

    def check_model(self, name: str | None) -> None:
        if name is not None and name != self.model_name:
            raise APIError(
                404,
                f"model: {name!r} is not served here; this server has {self.model_name!r}",
                param="model",
                code="model_not_found",
            )


SERVICE: Final = web.AppKey("service", Service)
ARRIVED: Final = web.RequestKey("arrived", float)  # time.monotonic() seconds
REQUEST_ID: Final = web.RequestKey("request_id", str)


def request_id(request: web.Request) -> str:
    """The client's X-Request-Id if it has only safe characters, else a new random id."""
    own = request.headers.get("X-Request-Id", "")
    return own if _SAFE_ID.fullmatch(own) else secrets.token_hex(12)
