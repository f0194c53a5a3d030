"""Decodes server-sent events from chunks of bytes. It knows neither HTTP nor JSON."""

import re
from typing import Final

_LINE_END: Final = re.compile(rb"\r\n|\n|\r")
_BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"


class SSEDecoder:
    """Extracts the data of each event from a stream that is split into chunks at any byte.

    Lines end with LF, CR LF or CR. The `data` lines of an event are joined by LF; comments, other
    fields and events without data are ignored. An event is complete when the empty line after it
    has arrived.
    """

    def __init__(self) -> None:
        self._line = bytearray()  # an incomplete line
        self._data: list[bytes] = []
        self._after_cr = False
        self._at_start = True

    def feed(self, chunk: bytes) -> list[bytes]:
        """The data of each event that `chunk` completes, in order."""
        if not chunk:
            return []
        if self._after_cr and chunk.startswith(b"\n"):
            chunk = chunk[1:]
        self._after_cr = chunk.endswith(b"\r")
        first, *rest = _LINE_END.split(chunk)
        self._line += first
        events = []
        for part in rest:
            event = self._take(bytes(self._line))
            if event is not None:
                events.append(event)
            self._line = bytearray(part)
        return events

    def _take(self, line: bytes) -> bytes | None:
        """Process one complete line. Returns the data of the event that it ends, if any."""
        if self._at_start:
            line = line.removeprefix(_BYTE_ORDER_MARK)
            self._at_start = False
        if not line:
            data, self._data = self._data, []
            return b"\n".join(data) if data else None
        name, _, value = line.partition(b":")
        if name == b"data":
            self._data.append(value.removeprefix(b" "))
        return None
