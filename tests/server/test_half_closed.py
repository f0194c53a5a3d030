"""Clients that send FIN after their request and wait for the answer, as many libraries have them.

62 of BAD_INPUTS.md. The interim answers they get meanwhile disturb none of them.
"""

import asyncio
import http.client
import json
import socket
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from live import LiveServer, events
from load import long_request, wait_until
from openai import DefaultHttpxClient, OpenAI
from refusal import COMPLETION
from wire import dial, post

LONG = long_request(400)
STREAM = LONG | {"stream": True}


def assert_whole(answer: Any) -> None:
    assert len(answer["choices"][0]["token_ids"]) == 400


def test_http_client(survivor: LiveServer) -> None:
    for body in (LONG, STREAM):
        connection = http.client.HTTPConnection(urlsplit(survivor.url).netloc, timeout=60)
        connection.request("POST", COMPLETION, json.dumps(body))
        connection.sock.shutdown(socket.SHUT_WR)
        with connection.getresponse() as response:
            assert response.status == 200
            answer = response.read()
        connection.close()
        if body is LONG:
            assert_whole(json.loads(answer))
        else:
            assert len(events(answer)) > 100


def test_aiohttp(survivor: LiveServer) -> None:
    sockets: list[socket.socket] = []

    def make(address: Any) -> socket.socket:
        sockets.append(socket.socket(*address[:3]))
        sockets[-1].setblocking(False)
        return sockets[-1]

    async def ask() -> None:
        connector = aiohttp.TCPConnector(socket_factory=make)
        async with aiohttp.ClientSession(survivor.url, connector=connector) as session:
            asking = asyncio.ensure_future(session.post(COMPLETION, json=LONG))
            await asyncio.sleep(0.1)
            sockets[0].shutdown(socket.SHUT_WR)
            async with await asking as response:
                assert response.status == 200
                assert_whole(await response.json())

    asyncio.run(ask())


def test_openai(survivor: LiveServer) -> None:
    streams: list[Any] = []
    closed: list[Any] = []

    def trace(event: str, info: dict[str, Any]) -> None:
        if event == "connection.connect_tcp.complete":
            streams.append(info["return_value"])
        elif event == "http11.send_request_body.complete":
            closed.append(streams[0].get_extra_info("socket"))
            closed[-1].shutdown(socket.SHUT_WR)

    def on_request(request: Any) -> None:
        request.extensions["trace"] = trace

    with DefaultHttpxClient(event_hooks={"request": [on_request]}) as http_client:
        client = OpenAI(
            base_url=f"{survivor.url}/v1", api_key="-", http_client=http_client, max_retries=0
        )
        answer = client.completions.create(
            model="tiny-chat",
            prompt="abc",
            max_tokens=400,
            extra_body={"ignore_eos": True, "speculation": {"enabled": False}},
        )
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 400
    assert closed


def test_a_disconnect_is_noticed_soon(survivor: LiveServer) -> None:
    """The client sends FIN and disconnects: its KV is released long before the answer's end."""
    before = survivor.metric("vllm:generation_tokens_total")
    wires = [dial(survivor) for _ in range(8)]
    for wire in wires:
        wire.send(post(json.dumps(LONG).encode()))
        wire.half_close()
    wait_until(lambda: survivor.metric("vllm:num_requests_running") > 0)
    for wire in wires:
        wire.close()
    survivor.wait_until_idle()
    assert survivor.metric("vllm:generation_tokens_total") - before < 8 * 400 / 2
