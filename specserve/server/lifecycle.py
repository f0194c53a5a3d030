"""The life of a server: start, serve, drain, stop.

SIGTERM and SIGINT start a drain: accepted requests are finished within `drain_timeout`, and new
ones get a 503. A second signal stops at once; streams that are still open end with an error event.
"""

import asyncio
import logging
import signal
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Final

from aiohttp import web

from specserve.config import ConfigError, EngineConfig, ServerConfig
from specserve.engine.metrics import EngineInfo
from specserve.server.app import build_app
from specserve.server.auth import load_keyring
from specserve.server.connections import RUNNER_OPTIONS
from specserve.server.event_loop_lag import watch_lag
from specserve.server.listener import listen, raise_file_limit
from specserve.server.service import Service
from specserve.server.status_line import print_status

logger = logging.getLogger(__name__)
# Seconds within which a repeated signal counts as the same one: `timeout` and similar programs
# signal a process and then its whole group.
_SAME_SIGNAL_S: Final = 0.25

OnReady = Callable[[str, str, EngineInfo], None]  # URL, model name, info


async def serve(config: EngineConfig, target: Path, on_ready: OnReady) -> bool:
    """Serve until a signal. Returns whether every accepted request was answered.

    Calls `on_ready(url, model_name, info)` once the engine is ready. Raises ConfigError,
    TokenizerError, EngineFailed or OSError if the server cannot start.
    """
    async with open_server(config, target) as (service, url):
        signals = _Signals()
        ready = asyncio.create_task(service.engine.wait_ready())
        stopped = asyncio.create_task(signals.first.wait())
        try:
            await asyncio.wait({ready, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if ready.done():
                on_ready(url, service.model_name, ready.result())
                await stopped
            return await _drain(service, signals)
        finally:
            ready.cancel()
            stopped.cancel()


@asynccontextmanager
async def open_server(config: EngineConfig, target: Path) -> AsyncIterator[tuple[Service, str]]:
    """Yields the service of a listening server, whose engine is still starting, and its URL."""
    keyring = load_keyring(config.server)
    raise_file_limit(config.server)
    service = Service(config, target, shared=len(keyring) > 1)
    app = build_app(service, keyring, config.server.allowed_origins)
    runner = web.AppRunner(app, **RUNNER_OPTIONS)
    async with AsyncExitStack() as stack:  # calls the following in reverse order
        stack.push_async_callback(runner.cleanup)
        # Open requests end with an error; `cleanup` gives their handlers time to send it.
        stack.push_async_callback(service.stop)
        await service.engine.start()
        await runner.setup()
        server, tls = config.server, _tls(config.server)
        listener = await listen(runner, server, tls)
        stack.callback(listener.close)
        service.metrics.connections.set_function(partial(len, listener))
        stack.callback(asyncio.create_task(watch_lag(service.metrics)).cancel)
        if server.status_interval:
            status = asyncio.create_task(print_status(service, server.status_interval))
            stack.callback(status.cancel)
        host, port = listener.address
        host = f"[{host}]" if ":" in host else host
        yield service, f"{'http' if tls is None else 'https'}://{host}:{port}"


class _Signals:
    """The first signal (drain) and the second (stop now), without repeats of the same one."""

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()
        self._last, self._last_at = "", 0.0
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number.name)

    def _on_signal(self, name: str) -> None:
        now = asyncio.get_running_loop().time()
        repeated = self.first.is_set()
        if repeated and name == self._last and now - self._last_at < _SAME_SIGNAL_S:
            return
        self._last, self._last_at = name, now
        logger.info("%s: %s", name, "stopping now" if repeated else "draining")
        (self.second if repeated else self.first).set()


async def _drain(service: Service, signals: _Signals) -> bool:
    service.draining = True
    idle = asyncio.create_task(service.accepted.all_answered())
    now = asyncio.create_task(signals.second.wait())
    timeout = service.config.server.drain_timeout
    await asyncio.wait({idle, now}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    num_cut = len(service.accepted)
    if num_cut:
        why = "second signal" if now.done() else f"drain_timeout ({timeout:g} s) has passed"
        logger.warning("%s: %d accepted requests are cut off", why, num_cut)
    idle.cancel()
    now.cancel()
    return not num_cut


def _tls(server: ServerConfig) -> ssl.SSLContext | None:
    if server.ssl_certfile is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(server.ssl_certfile, server.ssl_keyfile)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"ssl_certfile: {server.ssl_certfile} with ssl_keyfile {server.ssl_keyfile} cannot be "
            f"used ({error.strerror or error}); give PEM files that belong together"
        ) from error
    return context
