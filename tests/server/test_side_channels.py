"""One API key learns nothing about the acceptance of another key's requests."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import pytest
from live import LiveServer, start_server

from specserve.server.openapi import openapi

KEYS: Final = {"alice": "a" * 16, "bob": "b" * 16, "watcher": "w" * 16}
DRAFTED: Final = {"prompt": "ab ab ab ab ab", "max_tokens": 60, "temperature": 0}


@pytest.fixture(scope="module")
def server(chat_model: Path) -> Iterator[LiveServer]:
    keys = " ".join(
        f"{name}:{'metrics,inference' if name == 'watcher' else 'inference'}:{key}"
        for name, key in KEYS.items()
    )
    flags = ("--draft", "ngram", "--no-cost-aware")
    with start_server(chat_model, *flags, SPECSERVE_API_KEYS=keys) as live:
        yield live


def ask(server: LiveServer, name: str, path: str, body: Any = None) -> Any:
    return server.ask(path, body, headers={"Authorization": f"Bearer {KEYS[name]}"})


def everything(server: LiveServer) -> dict[str, bytes]:
    """The answers of all GET routes for the key of alice."""
    paths = [path for path, methods in openapi()["paths"].items() if "get" in methods]
    replies = {path: ask(server, "alice", path.format(model="tiny-chat")) for path in paths}
    assert replies.pop("/metrics").status == 403
    assert {reply.status for reply in replies.values()} == {200}
    assert len(replies) > 5
    return {path: reply.body for path, reply in replies.items()}


def test_no_route_reveals_the_load_of_another_key(server: LiveServer) -> None:
    before = everything(server)
    with ThreadPoolExecutor() as pool:
        theirs = [
            pool.submit(ask, server, "bob", "/v1/completions", DRAFTED | {"n": 4}) for _ in range(3)
        ]
        while not all(reply.done() for reply in theirs):
            assert everything(server) == before
        assert [reply.result().status for reply in theirs] == [200] * 3
    assert everything(server) == before
    totals = ask(server, "watcher", "/v1/speculation").json()
    assert totals["requests"] == "all"
    assert totals["num_accepted_tokens"] > 0
    assert totals["by_drafter"]


def test_a_key_sees_its_own_requests(server: LiveServer) -> None:
    before = ask(server, "alice", "/v1/speculation").json()
    assert before["requests"] == "own"
    assert not {"num_running", "by_drafter"} & set(before)
    answer = ask(server, "alice", "/v1/completions", DRAFTED).json()
    own = answer["metrics"]["speculative_decoding"]
    after = ask(server, "alice", "/v1/speculation").json()
    assert own["num_accepted_draft_tokens"] > 0
    for total, part in (
        ("num_draft_tokens", "num_draft_tokens"),
        ("num_accepted_tokens", "num_accepted_draft_tokens"),
    ):
        assert after[total] - before[total] == own[part]
    assert 0 < after["num_drafts"] - before["num_drafts"] <= own["num_spec_steps"]
