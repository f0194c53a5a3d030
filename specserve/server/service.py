"""What every handler needs, in one place: handed around, never global."""

import asyncio
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

from aiohttp import web

from specserve.config import EngineConfig
from specserve.process.engine_process import EngineProcess
from specserve.process.messages import EngineInfo
from specserve.process.text_process import TextProcess
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
    draining: bool = False
    created: int = field(default_factory=lambda: int(time.time()))
    _num_answers: int = 0
    _all_answered: asyncio.Event = field(default_factory=asyncio.Event)

    def now(self) -> int:
        """Unix seconds, for `created`."""
        return int(time.time())

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Around an answer that has to reach its client before the server stops."""
        self._num_answers += 1
        try:
            yield
        finally:
            self._num_answers -= 1
            if not self._num_answers:
                self._all_answered.set()

    async def all_answered(self) -> None:
        """Return when no answer is being given."""
        while self._num_answers:
            self._all_answered.clear()
            await self._all_answered.wait()

    def not_ready(self) -> APIError | None:
        """Why nothing can be served now: a 503 that says when to come again, or None."""
        if self.draining:
            error = APIError.unavailable(
                "the server is shutting down", self.config.server.drain_timeout
            )
            error.headers["Connection"] = "close"
            return error
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
