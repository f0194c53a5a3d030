"""Messages over a Unix socket: a length of four bytes (big-endian), then a Struct in msgpack.

Provides a blocking end and an asyncio end. Decoding never executes code from the data. A frame that
is too long, or not a message of the expected type, is a `FrameError`, after which the stream is
unusable.
"""

import asyncio
import contextlib
import socket
from typing import Any, Final, Generic, TypeVar

import msgspec

MAX_FRAME: Final = 2**28  # bytes
_LENGTH: Final = 4  # bytes
_RECEIVE: Final = 2**18  # bytes per read

T = TypeVar("T")
_encoder = msgspec.msgpack.Encoder()


class FrameError(ValueError):
    """Bytes that are not a valid message, or a message that is too long."""


def encode_frame(message: msgspec.Struct) -> bytes:
    """The bytes of one message. Raises FrameError if it is longer than `MAX_FRAME`."""
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME:
        raise FrameError(f"a message of {len(body)} bytes is longer than {MAX_FRAME}")
    return len(body).to_bytes(_LENGTH, "big") + body


class FrameDecoder(Generic[T]):
    """Splits a byte stream into messages of one (union) type."""

    def __init__(self, message_type: Any) -> None:
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(message_type)
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[T]:
        """The messages that `data` completes, in order. Raises FrameError."""
        self._buffer += data
        messages: list[T] = []
        end = 0
        while len(self._buffer) >= (begin := end + _LENGTH):
            size = int.from_bytes(self._buffer[end:begin], "big")
            if size > MAX_FRAME:
                raise FrameError(f"a message of {size} bytes is longer than {MAX_FRAME}")
            if len(self._buffer) < begin + size:
                break
            end = begin + size
            try:
                messages.append(self._decoder.decode(self._buffer[begin:end]))
            except msgspec.MsgspecError as error:
                raise FrameError(f"not a message: {error}") from error
        del self._buffer[:end]
        return messages


class FrameSocket(Generic[T]):
    """The blocking end, for a process that waits for nothing else."""

    def __init__(self, sock: socket.socket, message_type: Any) -> None:
        self._sock = sock
        self._decoder: FrameDecoder[T] = FrameDecoder(message_type)

    def send(self, message: msgspec.Struct) -> None:
        self._sock.settimeout(None)
        self._sock.sendall(encode_frame(message))

    def receive(self, timeout: float | None) -> list[T] | None:
        """The messages that one read completes, or None if the peer has closed the connection.

        Waits up to `timeout` seconds for data (None: without limit) and returns an empty list if
        none arrives.
        """
        self._sock.settimeout(timeout)
        try:
            data = self._sock.recv(_RECEIVE)
        except (BlockingIOError, TimeoutError):
            return []
        except ConnectionError:
            return None
        return self._decoder.feed(data) if data else None


class FrameStream(Generic[T]):
    """The asyncio end, for a process that runs an event loop."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, message_type: Any
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._decoder: FrameDecoder[T] = FrameDecoder(message_type)

    @classmethod
    async def open(cls, sock: socket.socket, message_type: Any) -> "FrameStream[T]":
        reader, writer = await asyncio.open_unix_connection(sock=sock)
        return cls(reader, writer, message_type)

    def send(self, message: msgspec.Struct) -> None:
        """Queue a message; never blocks. Dropped if the connection is closed."""
        if not self._writer.is_closing():
            self._writer.write(encode_frame(message))

    async def receive(self) -> list[T] | None:
        """Wait for at least one message; None if the peer has closed the connection."""
        while True:
            try:
                data = await self._reader.read(_RECEIVE)
            except ConnectionError:
                return None
            if not data:
                return None
            if messages := self._decoder.feed(data):
                return messages

    async def close(self) -> None:
        """Close the socket at once; unsent data is dropped."""
        self._writer.transport.abort()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()
