"""Server-sent events out of bytes that come in any pieces. Knows no HTTP and no JSON."""

import re
from typing import Final

_LINE_END: Final = re.compile(rb"\r\n|\n|\r")
_BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"


class SSEDecoder:
    """Cuts a stream into the data of its events.

    Lines end with LF, CR LF or CR, and may be cut anywhere, within a character too; data of
    several lines is joined by LF; comments and fields other than `data` are passed over. An event
    counts when the empty line after it has arrived.
    """

    def __init__(self) -> None:
        self._line = bytearray()  # the beginning of a line whose end has not arrived
        self._data: list[bytes] = []
        self._after_cr = False
        self._at_start = True

    def feed(self, chunk: bytes) -> list[bytes]:
        """The data of the events that `chunk` completes, in order."""
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
        """One whole line; the data of the event it ends."""
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
