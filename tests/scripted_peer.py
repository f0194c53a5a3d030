"""An HTTP server that does what a test says, on a thread: for faults a real one cannot be told
to have."""

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

from aiohttp import web
from multidict import CIMultiDict

from specserve import Client

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
DONE = b"data: [DONE]\n\n"
OK = {"id": "c1", "model": "m", "choices": [{"index": 0, "text": "fine", "finish_reason": "stop"}]}


class ScriptedPeer:
    """Answers the i-th request with the i-th script, and every one after with the last.

    `requests` are the bodies, `headers` and `times` (of the loop's clock) those of each request
    in order; `gone` is set when a client hangs up before its answer is complete.
    """

    def __init__(self, scripts: tuple[Handler, ...]) -> None:
        self._scripts = scripts
        self.url = ""
        self.paths: list[str] = []
        self.bodies: list[Any] = []
        self.headers: list[CIMultiDict[str]] = []
        self.times: list[float] = []
        self.gone = threading.Event()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        number = len(self.paths)
        self.paths.append(f"{request.method} {request.path}")
        self.times.append(asyncio.get_running_loop().time())
        self.headers.append(request.headers.copy())
        body = await request.read()
        self.bodies.append(json.loads(body) if body else None)
        try:
            return await self._scripts[min(number, len(self._scripts) - 1)](request)
        except (asyncio.CancelledError, ConnectionError):
            self.gone.set()
            raise


@contextmanager
def scripted_peer(*scripts: Handler) -> Iterator[ScriptedPeer]:
    peer = ScriptedPeer(scripts)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def start() -> web.AppRunner:
        app = web.Application(client_max_size=2**26)
        app.router.add_route("*", "/{path:.*}", peer.handle)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        peer.url = f"http://{host}:{port}"
        return runner

    runner = asyncio.run_coroutine_threadsafe(start(), loop).result(10)
    try:
        yield peer
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


@contextmanager
def client_of(*scripts: Handler, **settings: Any) -> Iterator[tuple[Client, ScriptedPeer]]:
    with scripted_peer(*scripts) as peer, Client(peer.url, **settings) as client:
        yield client, peer


def answers(body: Any, status: int = 200, **headers: str) -> Handler:
    """JSON, or bytes as they are."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}

    async def handler(request: web.Request) -> web.Response:
        if isinstance(body, bytes):
            return web.Response(status=status, body=body, headers=named)
        return web.json_response(body, status=status, headers=named)

    return handler


def fails(status: int, message: str = "no", **more: Any) -> Handler:
    headers = {name: more.pop(name) for name in ("Retry_After", "X_Request_Id") if name in more}
    detail = {"message": message, "type": "t", "param": None, "code": None, **more}
    return answers({"error": detail}, status, **headers)


def hangs_up() -> Handler:
    """Before a byte of an answer."""

    async def handler(request: web.Request) -> web.Response:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    return handler


def streams(*pieces: Any, end: bool = True, pause: float = 0.0) -> Handler:
    """An event stream: JSON values become events, bytes go as they are. `end` False: cut off."""

    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for piece in pieces:
            data = piece if isinstance(piece, bytes) else event(piece)
            await response.write(data)
            await asyncio.sleep(pause)
        if end:
            await response.write_eof()
        else:
            assert request.transport is not None
            request.transport.abort()
        return response

    return handler


def event(value: Any) -> bytes:
    return b"data: %b\n\n" % json.dumps(value).encode()


def never() -> Handler:
    """Accepts the request and says nothing."""

    async def handler(request: web.Request) -> web.Response:
        await asyncio.sleep(3600)
        return web.Response()

    return handler


def endless(piece: Any, pause: float = 0.01) -> Handler:
    """A stream that goes on until the client hangs up."""
    return streams(*[piece] * 100_000, pause=pause)


def chunk(text: str, **more: Any) -> dict[str, Any]:
    """A chunk of a streamed completion."""
    return {"id": "c1", "model": "m", "choices": [{"index": 0, "text": text, **more}]}
