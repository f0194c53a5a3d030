"""The objects that every handler needs, stored in the application instead of globals."""

import re
import secrets
import time
from collections import defaultdict
from pathlib import Path
from typing import Final

from aiohttp import web

from specserve.async_engine import AsyncEngine
from specserve.config import EngineConfig, check_model_name, parse_bytes
from specserve.engine.metrics import EngineInfo
from specserve.hub.resolve import base_name
from specserve.process.tokenizer_pool import TokenizerPool
from specserve.server import tokenizer_worker
from specserve.server.accepted import AcceptedRequests
from specserve.server.admission import Admission
from specserve.server.errors import APIError
from specserve.server.held_bodies import HeldBodies
from specserve.server.key_speculation import KeyTotals
from specserve.server.metrics import ServerMetrics
from specserve.server.turns import Turns
from specserve.text.token_bytes import TokenBytes

RETRY_STARTING: Final = 2.0  # seconds, for Retry-After while the engine starts
# Sequences admitted beyond `max_num_seqs`, so that the engine never waits for the next one.
_EXTRA_SEQUENCES: Final = 4
_SAFE_ID: Final = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class Service:
    """The parts of one server."""

    def __init__(self, config: EngineConfig, target: Path, *, shared: bool) -> None:
        """`target` is the model directory; `shared`: the server has several API keys.

        Raises ConfigError, and TokenizerError if the tokenizer cannot be read.
        """
        server = config.server
        self.config = config
        self.model_name = server.served_model_name or base_name(config.target.target)
        check_model_name(self.model_name)
        self.created = int(time.time())
        self.draining = False
        self.metrics = ServerMetrics(self.model_name)
        pool = TokenizerPool(
            target,
            module=tokenizer_worker.__name__,
            time_limit=server.template_timeout,
            shared=shared,
            on_done=self.metrics.tokenize_seconds.observe,
        )
        self.engine = AsyncEngine(config, target, tokenizer_pool=pool)
        self.engine.process.on_stats = self.metrics.on_stats
        self.token_bytes = TokenBytes(self.engine.tokenizer)
        self.accepted = AcceptedRequests(server.max_connections, shared=shared)
        self.max_body_bytes = parse_bytes("max_body_bytes", server.max_body_bytes)
        self.bodies = HeldBodies(self.max_body_bytes, shared=shared)
        self.turns = Turns(shared=shared)
        self.admission = Admission(
            config.schedule.max_num_seqs + _EXTRA_SEQUENCES,
            server.max_queued_requests,
            server.max_queued_tokens,
            shared=shared,
        )
        self.key_totals: defaultdict[str, KeyTotals] = defaultdict(KeyTotals)
        self.metrics.watch(self.engine.process, lambda: self.admission.num_waiting)
        self.metrics.body_bytes.set_function(lambda: self.bodies.num_bytes)
        self.metrics.tokenizer_jobs_waiting.set_function(lambda: pool.num_waiting)

    async def stop(self) -> None:
        """Refuse new requests and end the engine."""
        self.draining = True
        await self.engine.stop()

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
            message = f"model: {name!r} is not served here; this server has {self.model_name!r}"
            raise APIError(404, message, param="model", code="model_not_found")


SERVICE: Final = web.AppKey("service", Service)
ARRIVED: Final = web.RequestKey("arrived", float)  # time.monotonic() seconds
REQUEST_ID: Final = web.RequestKey("request_id", str)


def request_id(request: web.Request) -> str:
    """The client's X-Request-Id if it has only safe characters, else a new random id."""
    own = request.headers.get("X-Request-Id", "")
    return own if _SAFE_ID.fullmatch(own) else secrets.token_hex(12)
