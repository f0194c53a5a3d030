"""GET /health, /ready, /version, /metrics, /v1/speculation, /openapi.json, /docs"""

import msgspec
from aiohttp import web
from msgspec import structs

from specserve import __version__
from specserve.engine.metrics import DrafterStats, EngineStats
from specserve.server.auth import PRINCIPAL, Scope
from specserve.server.errors import APIError
from specserve.server.protocol.others import (
    DrafterReport,
    Health,
    Readiness,
    SpeculationReport,
    Version,
)
from specserve.server.routes.reply import reply
from specserve.server.service import RETRY_STARTING, SERVICE


async def health(request: web.Request) -> web.Response:
    """Liveness: 503 only if the engine cannot be started; a dead engine is restarted here."""
    state = request.app[SERVICE].engine.state
    failed = state == "failed"
    return reply(Health("failed" if failed else "ok", state), status=503 if failed else 200)


async def ready(request: web.Request) -> web.Response:
    """Readiness: 200 if the engine is warm, the queue has room and the server is not draining."""
    service = request.app[SERVICE]
    error = service.shutting_down() or service.no_engine()
    if error is None and service.admission.full:
        error = APIError.unavailable("the queue is full", service.admission.retry_after)
    if error is None:
        return reply(Readiness(True, None))
    return reply(Readiness(False, error.message), status=503, headers=error.headers)


async def version(request: web.Request) -> web.Response:
    return reply(Version(__version__))


async def openapi_json(request: web.Request) -> web.Response:
    from specserve.server.openapi import openapi  # here, so that a server starts sooner

    return web.Response(body=msgspec.json.encode(openapi()), content_type="application/json")


async def docs(request: web.Request) -> web.Response:
    from specserve.server.docs_page import CONTENT_SECURITY_POLICY, docs_page

    headers = {"Content-Security-Policy": CONTENT_SECURITY_POLICY}
    return web.Response(text=docs_page(), content_type="text/html", headers=headers)


async def metrics(request: web.Request) -> web.Response:
    body, content_type = request.app[SERVICE].metrics.render(request.headers.get("Accept", ""))
    return web.Response(body=body, headers={"Content-Type": content_type})


async def speculation(request: web.Request) -> web.Response:
    """Totals of all requests for a key with the scope `metrics`, else those of the caller's key."""
    service, caller = request.app[SERVICE], request[PRINCIPAL]
    info, every = service.engine_info(), Scope.METRICS in caller.scopes
    counts = service.engine.stats if every else service.key_totals[caller.name]
    if counts is None:  # the engine is being restarted
        raise APIError.unavailable(f"the engine is {service.engine.state}", RETRY_STARTING)
    report = SpeculationReport(
        requests="all" if every else "own",
        drafters=info.limits.drafters,
        exactness="exact" if info.exact else "fast",
        max_nodes=info.max_nodes,
        num_drafts=counts.num_drafts,
        num_draft_tokens=counts.num_draft_tokens,
        num_accepted_tokens=counts.num_accepted_tokens,
        mean_acceptance_length=1 + counts.num_accepted_tokens / max(counts.num_drafts, 1),
    )
    if isinstance(counts, EngineStats):
        by_drafter = tuple(map(_drafter_report, (*counts.drafters, counts.predictions)))
        report = structs.replace(report, num_running=counts.num_running, by_drafter=by_drafter)
    return reply(report)


def _drafter_report(drafter: DrafterStats) -> DrafterReport:
    return DrafterReport(
        **structs.asdict(drafter),
        num_verified=drafter.num_verified,
        num_accepted=drafter.num_accepted,
        acceptance_rate=drafter.num_accepted / max(drafter.num_verified, 1),
    )
