"""The listening port: bounds the number of connections and performs the TLS handshake.

A connection counts from the moment the system hands it over, TLS handshake included. At the limit
a new connection is not refused: instead the connection that has been without an accepted request
for the longest is closed. Such a connection exists, because at most `max_connections` requests are
accepted and the limit (`connection_limit`) is higher.
"""

import asyncio
import logging
import resource
import ssl
from typing import Final, cast

from aiohttp import web

from specserve.config import ConfigError, ServerConfig
from specserve.server.connections import Connection, OpenConnections

logger = logging.getLogger(__name__)

_HANDSHAKE_S: Final = 10.0  # seconds for a TLS handshake
# Open files beyond the connections: the server's own, and connections not yet counted.
_EXTRA_FILES: Final = 256


def connection_limit(config: ServerConfig) -> int:
    """Most open connections: `max_connections`, plus at least 16 for others such as `/health`."""
    return config.max_connections + max(16, config.max_connections // 8)


def raise_file_limit(config: ServerConfig) -> None:
    """Raise the soft limit on open files to what is needed. Raises ConfigError if impossible."""
    needed = connection_limit(config) + _EXTRA_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    except (OSError, ValueError):
        raise ConfigError(
            f"max_connections: {config.max_connections} needs {needed} open files and the system "
            f"allows {hard} (ulimit -Hn); raise that, or lower max_connections"
        ) from None


class Listener:
    """The server's port and its open connections. `listen` creates one."""

    def __init__(
        self, server: web.Server, config: ServerConfig, tls: ssl.SSLContext | None
    ) -> None:
        self._server = server
        self._config = config
        self._tls = tls
        self._connections: OpenConnections = {}
        self._handshakes: set[asyncio.Task[None]] = set()
        self.tcp_server: asyncio.Server | None = None

    @property
    def address(self) -> tuple[str, int]:
        """The host and port that the server listens on."""
        assert self.tcp_server is not None
        host, port = self.tcp_server.sockets[0].getsockname()[:2]
        return host, port

    def __len__(self) -> int:
        """Number of open connections."""
        return len(self._connections)

    def close(self) -> None:
        """Stop listening and cancel pending TLS handshakes; other connections stay open."""
        assert self.tcp_server is not None
        self.tcp_server.close()
        for task in self._handshakes:
            task.cancel()

    def on_connection(self, raw: asyncio.Transport, pending: "_PendingConnection") -> None:
        if len(self) >= connection_limit(self._config):
            oldest = next((each for each, busy in self._connections.items() if not busy), raw)
            self._connections.pop(oldest, None)
            oldest.abort()
            if oldest is raw:
                return
        self._connections[raw] = False
        if self._tls is None:
            self._attach(raw, raw, pending)
            return
        task = asyncio.create_task(self._handshake(raw, pending, self._tls))
        self._handshakes.add(task)
        task.add_done_callback(self._handshakes.discard)

    async def _handshake(
        self, raw: asyncio.Transport, pending: "_PendingConnection", tls: ssl.SSLContext
    ) -> None:
        raw.set_write_buffer_limits(high=0)  # or TLS would count bytes in this buffer as sent
        transport: asyncio.Transport | None = None
        try:
            transport = await _start_tls(raw, pending, tls)
        except OSError as error:
            logger.debug("no TLS handshake: %s", error)
        finally:
            if transport is None or transport.is_closing() or raw not in self._connections:
                self._connections.pop(raw, None)
                raw.abort()
            else:
                self._attach(raw, transport, pending)

    def _attach(
        self, raw: asyncio.Transport, transport: asyncio.Transport, pending: "_PendingConnection"
    ) -> None:
        connection = Connection(self._server, self._connections, raw, self._config)
        transport.set_protocol(connection)
        connection.connection_made(transport)
        if received := pending.pop_received():
            connection.data_received(received)


async def listen(
    runner: web.AppRunner, config: ServerConfig, tls: ssl.SSLContext | None = None
) -> Listener:
    """Open the server's port for `runner`, whose `setup` must have been called.

    The caller must close the result before `runner.cleanup()`. Raises OSError.
    """
    assert runner.server is not None
    listener = Listener(runner.server, config, tls)
    listener.tcp_server = await asyncio.get_running_loop().create_server(
        lambda: _PendingConnection(listener), config.host, config.port
    )
    return listener


class _PendingConnection(asyncio.Protocol):
    """The protocol of a connection until `Connection` replaces it."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._received = bytearray()  # before TLS starts, or with the end of its handshake

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._listener.on_connection(cast(asyncio.Transport, transport), self)

    def data_received(self, data: bytes) -> None:
        self._received += data

    def pop_received(self) -> bytes:
        received, self._received = bytes(self._received), bytearray()
        return received


async def _start_tls(
    raw: asyncio.Transport, pending: _PendingConnection, tls: ssl.SSLContext
) -> asyncio.Transport | None:
    """The TLS transport over `raw`. Raises OSError if the handshake fails."""
    loop = asyncio.get_running_loop()
    handshake = asyncio.create_task(
        loop.start_tls(raw, pending, tls, server_side=True, ssl_handshake_timeout=_HANDSHAKE_S)
    )
    try:
        await asyncio.sleep(0)
        # By now `start_tls` has replaced the protocol of `raw`, and reading is paused until the TLS
        # setup, which is scheduled, has run. With uvloop, bytes may have arrived before that.
        protocol = cast(asyncio.BufferedProtocol, raw.get_protocol())
        loop.call_soon(_feed, protocol, pending.pop_received())
        return await handshake
    finally:
        handshake.cancel()


def _feed(protocol: asyncio.BufferedProtocol, data: bytes) -> None:
    while data:
        buffer = memoryview(protocol.get_buffer(len(data)))
        size = min(len(buffer), len(data))
        buffer[:size] = data[:size]
        protocol.buffer_updated(size)
        data = data[size:]
