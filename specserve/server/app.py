"""Builds the aiohttp application: its routes and its middlewares. Starts nothing."""

import time
from collections.abc import Awaitable, Callable

from aiohttp import web

from specserve.server.auth import (
    PRINCIPAL,
    Keyring,
    Scope,
    authorise,
    check_routes,
    principal,
    required_scope,
)
from specserve.server.connections import protect_connection
from specserve.server.error_mapping import as_api_error
from specserve.server.held_bodies import BODY
from specserve.server.routes import chat, completions, models, status, tokens
from specserve.server.service import ARRIVED, REQUEST_ID, SERVICE, Service, request_id

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def build_app(service: Service, keyring: Keyring) -> web.Application:
    """The application. aiohttp's `client_max_size` is not used: `read_body` bounds the body."""
    app = web.Application(middlewares=[render_errors, authorise(keyring), accept, hold_body])
    app[SERVICE] = service
    app.router.add_post("/v1/chat/completions", chat.chat_completions)
    app.router.add_post("/v1/completions", completions.completions)
    app.router.add_get("/v1/models", models.list_models)
    app.router.add_get("/v1/models/{model:.+}", models.get_model)
    app.router.add_post("/tokenize", tokens.tokenize)
    app.router.add_post("/detokenize", tokens.detokenize)
    app.router.add_get("/health", status.health)
    app.router.add_get("/ready", status.ready)
    app.router.add_get("/version", status.version)
    app.router.add_get("/metrics", status.metrics)
    app.router.add_get("/v1/speculation", status.speculation)
    app.router.add_get("/openapi.json", status.openapi_json)
    check_routes(app)
    return app


@web.middleware
async def accept(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Count the request as accepted; runs after `authorise`.

    A drain waits for the answers to accepted requests, and their connections are not closed to make
    room for others. Requests for public routes are not counted. Raises APIError (503) if too many
    requests are accepted and, on routes with the scope `inference`, during a drain.
    """
    service, required = request.app[SERVICE], required_scope(request)
    if required is not None:
        if required is Scope.INFERENCE and (error := service.shutting_down()) is not None:
            raise error
        service.accepted.add(principal(request).name)
        protect_connection(request)
    return await handler(request)


@web.middleware
async def render_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """The outermost middleware: turns every exception into an error response of OpenAI's form.

    It also adds the common response headers and counts the request in the metrics.
    """
    service = request.app[SERVICE]
    request[REQUEST_ID] = request_id(request)
    request[ARRIVED] = started = time.monotonic()
    try:
        response = await handler(request)
    except Exception as error:
        response = as_api_error(error).response()
    if not response.prepared:
        response.headers["X-Request-Id"] = request[REQUEST_ID]
        response.headers["X-Content-Type-Options"] = "nosniff"
    route = request.match_info.route.resource
    service.metrics.answered(
        route.canonical if route is not None else "none",
        response.status,
        time.monotonic() - started,
    )
    return response


@web.middleware
async def hold_body(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Count the bytes of the request's body as held until the request is over."""
    if PRINCIPAL not in request:  # no route matched
        return await handler(request)
    with request.app[SERVICE].bodies.hold(request[PRINCIPAL].name) as request[BODY]:
        return await handler(request)
