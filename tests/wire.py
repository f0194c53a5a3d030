"""Raw bytes to a live server, and the answers that come back over the same connection."""

import json
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final
from urllib.parse import urlsplit

from live import LiveServer, Reply
from refusal import COMPLETION, MINIMAL

GOOD: Final = json.dumps(MINIMAL[COMPLETION]).encode()


class Wire:
    """One connection, and the answers that come over it."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._answers = connection.makefile("rb")

    def send(self, data: bytes) -> None:
        self._connection.sendall(data)

    def reply(self, *, with_body: bool = True) -> Reply:
        """The next answer; of one without a length, such as a stream, the head only."""
        head = []
        while line := self._answers.readline().decode("latin1").removesuffix("\r\n"):
            head.append(line)
        assert head, "the server closed the connection"
        headers = dict(line.lower().split(": ", 1) for line in head[1:])
        length = int(headers.get("content-length", "0")) if with_body else 0
        return Reply(int(head[0].split()[1]), headers, self._answers.read(length))

    def read(self, size: int) -> bytes:
        """What has come, but at least one byte and at most `size`; none if the server closed."""
        return self._answers.read1(size)

    def half_close(self) -> None:
        """Nothing more is sent; answers still come."""
        self._connection.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """Gone at once, without a goodbye; nothing happens if it is closed already."""
        if self._connection.fileno() >= 0:
            linger = struct.pack("ii", 1, 0)
            self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.close()

    def close(self) -> None:
        self._answers.close()
        self._connection.close()

    def closed(self) -> bool:
        """True when the server has closed, which has to come soon."""
        try:
            return self._answers.read(1) == b""
        except ConnectionResetError:
            return True


def dial(server: LiveServer, *, narrow: bool = False) -> Wire:
    """A connection that the caller closes; a narrow one holds little of what nobody reads."""
    address = urlsplit(server.url)
    connection = socket.socket()
    connection.settimeout(10)
    if narrow:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        # The system sizes the server's buffer by the packets we take.
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
    connection.connect((address.hostname, address.port))
    return Wire(connection)


@contextmanager
def wire(server: LiveServer) -> Iterator[Wire]:
    connection = dial(server)
    try:
        yield connection
    finally:
        connection.close()


def post(body: bytes = GOOD, *headers: str, path: str = COMPLETION) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: here", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode("latin1") + body


def get(path: str, *headers: str, method: str = "GET") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: here", *headers]
    return "\r\n".join([*lines, "", ""]).encode("latin1")
