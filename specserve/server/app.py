"""The routes and what wraps them. Makes the application; starts nothing."""

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
from specserve.server.connections import keep_place
from specserve.server.failures import as_api_error
from specserve.server.held_bodies import BODY
from specserve.server.routes import chat, completions, models, status, tokens
from specserve.server.service import ARRIVED, REQUEST_ID, SERVICE, Service, request_id

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def build_app(service: Service, keyring: Keyring) -> web.Application:
    """`client_max_size` plays no part: `read_body` has its own limit."""
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
    """After `authorise`: from here on the request is answered, whoever else comes or stops it.

    Requests for public routes cost nothing and promise nothing.
    """
    service, required = request.app[SERVICE], required_scope(request)
    if required is not None:
        if required is Scope.INFERENCE and (error := service.shutting_down()) is not None:
            raise error
        service.accepted.add(principal(request).name)
        keep_place(request)
    return await handler(request)


@web.middleware
async def render_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """The outermost layer: whatever happens inside, the client gets OpenAI's error form."""
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
    """What the request's body holds is given back when it is over."""
    if PRINCIPAL not in request:  # there is no such route
        return await handler(request)
    with request.app[SERVICE].bodies.hold(request[PRINCIPAL].name) as request[BODY]:
        return await handler(request)
