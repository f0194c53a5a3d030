"""Python imports this at start-up where the folder is on its path: every request that an engine of
that process takes is appended to the file $RECORDED_REQUESTS, one JSON object per line.
"""

import os

import msgspec

from specserve.engine.engine import Engine
from specserve.types import Request

_submit = Engine.submit


def _record(self: Engine, request: Request) -> None:
    _submit(self, request)
    with open(os.environ["RECORDED_REQUESTS"], "ab") as sink:
        sink.write(msgspec.json.encode(request) + b"\n")


Engine.submit = _record  # type: ignore[method-assign]
