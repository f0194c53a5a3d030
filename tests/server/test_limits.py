"""The operator's limits: requests at them are served, requests over them refused by name."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from live import LiveServer, start_server
from refusal import CHAT, COMPLETION, assert_refused

HI = {"role": "user", "content": "Hi."}


@pytest.fixture(scope="module")
def strict(chat_model: Path) -> Iterator[LiveServer]:
    limits = ["--max-prompt-tokens", "40", "--max-output-tokens", "30", "--request-timeout", "5"]
    with start_server(chat_model, *limits, "--max-body-bytes", "2KiB") as server:
        yield server


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (COMPLETION, {"prompt": "a" * 41}, "prompt"),
        (COMPLETION, {"prompt": [[1], [1] * 41]}, "prompt"),
        (CHAT, {"messages": [{**HI, "content": "a" * 60}]}, "messages"),
        (COMPLETION, {"prompt": "a", "max_tokens": 31}, "max_tokens"),
        (CHAT, {"messages": [HI], "max_completion_tokens": 31}, "max_completion_tokens"),
        (COMPLETION, {"prompt": "a", "request_timeout": 5.1}, "request_timeout"),
        (COMPLETION, {"prompt": ["a"] * 100, "n": 3}, "n"),  # however idle it is: 36 and 256
    ],
)
def test_requests_over_the_limits_are_refused(
    strict: LiveServer, path: str, body: dict[str, Any], param: str
) -> None:
    assert_refused(strict.ask(path, body), 400, param)


def test_a_body_over_the_limit_is_refused(strict: LiveServer) -> None:
    body = {"prompt": "a", "user": "b" * 100, "stop": ["c" * 500] * 4}
    assert_refused(strict.ask(COMPLETION, body), 413)


def test_requests_at_the_limits_are_served(strict: LiveServer) -> None:
    body: dict[str, Any] = {"prompt": "a" * 40, "max_tokens": 30, "ignore_eos": True}
    answer = strict.ask(COMPLETION, {**body, "request_timeout": 5}).json()
    assert answer["usage"] == {
        "prompt_tokens": 40,
        "completion_tokens": 30,
        "total_tokens": 70,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_max_tokens_defaults_to_the_limit(strict: LiveServer) -> None:
    reply = strict.ask(CHAT, {"messages": [HI], "ignore_eos": True})
    assert reply.json()["usage"]["completion_tokens"] == 30
