"""What every refusal looks like, and how a server shows that it is none the worse for it."""

import json
import re
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from live import LiveServer, Reply
from prometheus_client.parser import text_string_to_metric_families

from specserve.server.errors import MAX_MESSAGE

CHAT = "/v1/chat/completions"
COMPLETION = "/v1/completions"
MINIMAL: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "Hi."}], "max_tokens": 2},
    COMPLETION: {"prompt": "Hi.", "max_tokens": 2},
}
IDLE = (
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "specserve:open_streams",
    "specserve:kv_slots_allocated",
)
_GOOD = {"prompt": "All is well.", "max_tokens": 8, "seed": 3, "return_token_ids": True}
_INSIDE = re.compile(r'Traceback|File "|, line \d|\.py\b|0x[0-9a-f]{6,}|site-packages')
_PLACES = {str(Path.cwd()), sys.prefix, tempfile.gettempdir(), str(Path.home())} - {"/"}


@dataclass(frozen=True, slots=True)
class VitalSigns:
    engine_pid: int
    num_restarts: float
    ids: tuple[int, ...]  # of the answer to a good request


def vital_signs(server: LiveServer) -> VitalSigns:
    """The same every time from a server that is well: it answers, and then nothing is in use."""
    reply = server.ask(COMPLETION, _GOOD)
    assert reply.status == 200, reply
    ids = tuple(reply.json()["choices"][0]["token_ids"])
    end = time.monotonic() + 10
    while any((gauges := scrape(server))[name] for name in IDLE):
        assert time.monotonic() < end, {name: gauges[name] for name in IDLE}
        time.sleep(0.02)
    return VitalSigns(server.engine_pid(), gauges["specserve:engine_restarts_total"], ids)


def scrape(server: LiveServer) -> dict[str, float]:
    """All metrics of one moment, each summed over its labels."""
    sums: dict[str, float] = {}
    text = server.ask("/metrics").body.decode()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
    return sums


def assert_refused(reply: Reply, status: int, param: str | None = None) -> dict[str, Any]:
    """The error: in OpenAI's form, with `param` named, and with nothing of the inside in it."""
    assert reply.status == status, reply
    assert reply.headers["content-type"].startswith("application/json"), reply
    assert len(reply.body) < 4 * MAX_MESSAGE
    body = reply.json()
    assert set(body) == {"error"}
    error: dict[str, Any] = body["error"]
    assert_error(error)
    assert error["param"] == param, error
    return error


def assert_error(error: dict[str, Any]) -> None:
    assert set(error) == {"message", "type", "param", "code"}
    message = error["message"]
    assert isinstance(error["type"], str)
    assert 0 < len(message) <= MAX_MESSAGE + 3
    assert error["param"] is None or len(error["param"]) <= 100
    everything = json.dumps(error, ensure_ascii=False)
    assert not _INSIDE.search(everything), everything
    assert not any(place in everything for place in _PLACES), everything
