"""What every handler needs, in one place: handed around, never global."""

import re
import secrets
import time
from dataclasses import dataclass, field
from typing import Final

from aiohttp import web

from specserve.config import EngineConfig
from specserve.process.engine_process import EngineProcess
from specserve.process.messages import EngineInfo
from specserve.process.text_process import TextProcess
from specserve.server.accepted import AcceptedRequests
from specserve.server.admission import Admission
from specserve.server.errors import APIError
from specserve.server.held_bodies import HeldBodies
from specserve.server.key_speculation import KeySpeculation
from specserve.server.metrics import ServerMetrics
from specserve.text import Tokenizer
from specserve.text.token_bytes import TokenBytes

RETRY_STARTING: Final = 2.0  # seconds
_SAFE_ID: Final = re.compile(r"[A-Za-z0-9._:-]{1,128}")


@dataclass(slots=True, kw_only=True)
class Service:
    """The parts of one server."""

    config: EngineConfig
    model_name: str
    engine: EngineProcess
    texts: TextProcess
    tokenizer: Tokenizer  # for decoding only: encoding would hold up everybody
    token_bytes: TokenBytes
    admission: Admission
    bodies: HeldBodies
    metrics: ServerMetrics
    key_speculation: KeySpeculation = field(default_factory=KeySpeculation)
    accepted: AcceptedRequests
    draining: bool = False
    created: int = field(default_factory=lambda: int(time.time()))

    def now(self) -> int:
        """Unix seconds, for `created`."""
        return int(time.time())

    def not_ready(self) -> APIError | None:
        """Why no new request is served now: a 503 that says when to come again, or None."""
        return self.shutting_down() or self.no_engine()

    def shutting_down(self) -> APIError | None:
        """Why none is accepted."""
        if not self.draining:
            return None
        error = APIError.unavailable(
            "the server is shutting down", self.config.server.drain_timeout
        )
        error.headers["Connection"] = "close"
        return error

    def no_engine(self) -> APIError | None:
        """Why one that has been accepted cannot be served."""
        if self.engine.state == "failed":
            return APIError.unavailable("the engine could not be started", 60.0)
        if self.engine.state != "ready":
            return APIError.unavailable(f"the engine is {self.engine.state}", RETRY_STARTING)
        return None

    def engine_info(self) -> EngineInfo:
        """Raises APIError while there is no engine to ask."""
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
    """The caller's X-Request-Id if it is harmless, else a fresh one."""
    own = request.headers.get("X-Request-Id", "")
    return own if _SAFE_ID.fullmatch(own) else secrets.token_hex(12)
