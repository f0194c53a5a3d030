"""Requests that are under way while a test does something to their server."""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from live import LiveServer, Reply, events

SHORT = {"prompt": "Once", "max_tokens": 24, "seed": 5, "return_token_ids": True}
_STEPS = 20  # after which every sequence that runs has shown something


def long_request(max_tokens: int, **more: Any) -> dict[str, Any]:
    """A request that generates exactly `max_tokens` tokens, one per forward pass."""
    return {
        "prompt": "abc",
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "seed": 1,
        "return_token_ids": True,
        "speculation": {"enabled": False},
        **more,
    }


@contextmanager
def under_way(
    server: LiveServer, bodies: Sequence[dict[str, Any]]
) -> Iterator[list["Future[Reply]"]]:
    """The replies to completions that run or wait by now, every one of them."""

    def num_accepted() -> float:
        running = server.metric("vllm:num_requests_running")
        return running + server.metric("vllm:num_requests_waiting")

    def num_steps() -> float:
        return server.metric("specserve:steps_total")

    with ThreadPoolExecutor(len(bodies)) as pool:
        replies = [pool.submit(server.ask, "/v1/completions", body) for body in bodies]
        wait_until(lambda: num_accepted() == len(bodies))
        before = num_steps()
        wait_until(lambda: num_steps() >= before + _STEPS)
        yield replies


def wait_until(holds: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"still not so after {seconds} s"
        time.sleep(0.02)


def short_answer(server: LiveServer) -> list[int]:
    """The same ids every time, from a server that is well."""
    reply = server.ask("/v1/completions", SHORT)
    assert reply.status == 200, reply
    ids: list[int] = reply.json()["choices"][0]["token_ids"]
    return ids


def streamed_ids(body: bytes) -> list[int]:
    """The token ids of an event stream of one choice that went well."""
    messages = events(body)
    assert not any("error" in message for message in messages), messages[-1]
    return [
        token
        for message in messages
        for choice in message["choices"]
        for token in choice["token_ids"]
    ]


def stream_error(body: bytes) -> str:
    """The message of an event stream that was broken off."""
    *_, last = events(body)
    message: str = last["error"]["message"]
    return message
