"""GET /health, /ready, /version, /metrics, /v1/speculation, /openapi.json"""

from typing import Literal

import msgspec
from aiohttp import web

from specserve import __version__
from specserve.engine.metrics import DrafterStats, EngineInfo, EngineStats
from specserve.server.auth import Scope, principal, public, scope
from specserve.server.errors import APIError
from specserve.server.key_speculation import KeyTotals
from specserve.server.openapi import openapi
from specserve.server.protocol.others import (
    DrafterReport,
    Health,
    Readiness,
    SpeculationReport,
    Version,
)
from specserve.server.routes.reply import reply
from specserve.server.service import SERVICE


@public
async def health(request: web.Request) -> web.Response:
    """Liveness: 503 only if the engine cannot be started; a dead engine is restarted here."""
    state = request.app[SERVICE].engine.state
    failed = state == "failed"
    return reply(Health("failed" if failed else "ok", state), status=503 if failed else 200)


@public
async def ready(request: web.Request) -> web.Response:
    """Readiness: 200 if the engine is warm, the queue has room and the server is not draining."""
    service = request.app[SERVICE]
    error = service.not_ready()
    if error is None and service.admission.full:
        error = APIError.unavailable("the queue is full", service.admission.retry_after)
    if error is None:
        return reply(Readiness(True, None))
    return reply(Readiness(False, error.message), status=503, headers=error.headers)


@public
async def version(request: web.Request) -> web.Response:
    return reply(Version(__version__))


@public
async def openapi_json(request: web.Request) -> web.Response:
    return web.json_response(openapi())


@scope(Scope.METRICS)
async def metrics(request: web.Request) -> web.Response:
    body, content_type = request.app[SERVICE].metrics.render(request.headers.get("Accept", ""))
    return web.Response(body=body, headers={"Content-Type": content_type})


@scope(Scope.INFERENCE)
async def speculation(request: web.Request) -> web.Response:
    """Totals of all requests for a key with the scope `metrics`, else those of the caller's key."""
    service, caller = request.app[SERVICE], principal(request)
    info = service.engine_info()
    if Scope.METRICS not in caller.scopes:
        return reply(_report(info, "own", service.key_speculation.of(caller.name)))
    stats = service.engine.stats
    assert stats is not None, "an engine that is ready has sent its first numbers"
    report = msgspec.structs.replace(
        _report(info, "all", stats),
        num_running=stats.num_running,
        by_drafter=tuple(map(_drafter_report, (*stats.drafters, stats.predictions))),
    )
    return reply(report)


def _report(
    info: EngineInfo, requests: Literal["all", "own"], counts: EngineStats | KeyTotals
) -> SpeculationReport:
    return SpeculationReport(
        requests=requests,
        drafters=info.limits.drafters,
        exactness="exact" if info.exact else "fast",
        max_nodes=info.max_nodes,
        num_drafts=counts.num_drafts,
        num_draft_tokens=counts.num_draft_tokens,
        num_accepted_tokens=counts.num_accepted_tokens,
        mean_acceptance_length=1 + counts.num_accepted_tokens / max(counts.num_drafts, 1),
    )


def _drafter_report(drafter: DrafterStats) -> DrafterReport:
    return DrafterReport(
        name=drafter.name,
        active=drafter.active,
        num_failures=drafter.num_failures,
        num_proposed=drafter.num_proposed,
        num_verified=drafter.num_verified,
        num_accepted=drafter.num_accepted,
        acceptance_rate=drafter.num_accepted / max(drafter.num_verified, 1),
        verified_by_depth=drafter.verified_by_depth,
        accepted_by_depth=drafter.accepted_by_depth,
    )
