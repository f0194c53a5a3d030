"""Builds the aiohttp application: its routes and its middlewares. Starts nothing."""

import time
from collections.abc import Collection
from typing import Final, cast

from aiohttp import web
from aiohttp.typedefs import Handler

from specserve.server.auth import PRINCIPAL, SCOPE, Keyring, Scope, authorise
from specserve.server.connections import Connection
from specserve.server.cors import cross_origin_headers, preflights
from specserve.server.error_mapping import as_api_error, no_such_route
from specserve.server.held_bodies import TAKE_BYTES
from specserve.server.routes import chat, completions, models, status, tokens
from specserve.server.service import ARRIVED, REQUEST_ID, SERVICE, Service, request_id

# Every route, and the scope that its API key must have; None: it needs no key.
ROUTES: Final[tuple[tuple[web.RouteDef, Scope | None], ...]] = (
    (web.post("/v1/chat/completions", chat.chat_completions), Scope.INFERENCE),
    (web.post("/v1/completions", completions.completions), Scope.INFERENCE),
    (web.get("/v1/models", models.list_models), Scope.INFERENCE),
    (web.get("/v1/models/{model:.+}", models.get_model), Scope.INFERENCE),
    (web.post("/tokenize", tokens.tokenize), Scope.INFERENCE),
    (web.post("/detokenize", tokens.detokenize), Scope.INFERENCE),
    (web.get("/health", status.health), None),
    (web.get("/ready", status.ready), None),
    (web.get("/version", status.version), None),
    (web.get("/metrics", status.metrics), Scope.METRICS),
    (web.get("/v1/speculation", status.speculation), Scope.INFERENCE),
    (web.get("/openapi.json", status.openapi_json), None),
    (web.get("/docs", status.docs), None),
)


def build_app(
    service: Service, keyring: Keyring, allowed_origins: Collection[str] = ()
) -> web.Application:
    """The application. aiohttp's `client_max_size` is not used: `read_body` bounds the body."""
    scopes: dict[object, Scope | None] = {route.handler: scope for route, scope in ROUTES}
    app = web.Application(middlewares=[render_errors, authorise(keyring, scopes), accept])
    if allowed_origins:
        app.middlewares.insert(1, preflights(allowed_origins))
        app.on_response_prepare.append(cross_origin_headers(allowed_origins))
    app[SERVICE] = service
    app.add_routes([route for route, _ in ROUTES])
    return app


@web.middleware
async def render_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn every exception into an error response, add common headers, and count the request."""
    request[REQUEST_ID] = request_id(request)
    request[ARRIVED] = started = time.monotonic()
    try:
        response = await handler(request)
    except web.HTTPNotFound:
        response = no_such_route(request).response()
    except Exception as error:
        response = as_api_error(error).response()
    if not response.prepared:
        response.headers["X-Request-Id"] = request[REQUEST_ID]
        response.headers["X-Content-Type-Options"] = "nosniff"
    resource = request.match_info.route.resource
    route = "none" if resource is None else resource.canonical
    request.app[SERVICE].metrics.answered(route, response.status, time.monotonic() - started)
    return response


@web.middleware
async def accept(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Count the request as accepted and its body as held, unless its route is public.

    Raises APIError (503) if too many requests are accepted and, on routes with the scope
    `inference`, during a drain.
    """
    required = request.get(SCOPE)
    if required is None:
        return await handler(request)
    service, key = request.app[SERVICE], request[PRINCIPAL].name
    if required is Scope.INFERENCE and (error := service.shutting_down()) is not None:
        raise error
    service.accepted.add(key)
    cast(Connection, request.protocol).protect()
    with service.bodies.hold(key) as request[TAKE_BYTES]:
        return await handler(request)
