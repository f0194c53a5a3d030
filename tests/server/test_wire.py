"""The wire format: event streams, single responses, small routes."""

import http.client
import json
from typing import Any
from urllib.parse import urlsplit

import pytest
from live import MODEL, LiveServer, events
from msgspec import Struct

from specserve.server.protocol.fields import SpeculationOptions, StreamOptions

CHAT = {"messages": [{"role": "user", "content": "Hi."}], "max_tokens": 30, "seed": 7}


def streamed(server: LiveServer, path: str, body: dict[str, Any]) -> bytes:
    reply = server.ask(path, {**body, "stream": True})
    assert reply.status == 200
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    return reply.body


def test_an_event_stream_byte_for_byte(live_server: LiveServer) -> None:
    body = streamed(
        live_server,
        "/v1/chat/completions",
        {**CHAT, "temperature": 0, "max_tokens": 1, "stream_options": {"include_usage": True}},
    )
    messages = events(body)
    head = {
        "id": messages[0]["id"],
        "object": "chat.completion.chunk",
        "created": messages[0]["created"],
        "model": MODEL,
    }
    whole = live_server.ask("/v1/chat/completions", {**CHAT, "temperature": 0, "max_tokens": 1})
    content = whole.json()["choices"][0]["message"]["content"]
    delta = {"content": content} if content else {}

    def choice(delta: dict[str, str], finish: str | None) -> dict[str, Any]:
        return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}

    stop = {"stop_reason": None}
    expected = [
        {**head, "choices": [choice({"role": "assistant", "content": ""}, None)], "usage": None},
        {**head, "choices": [choice(delta, "length") | stop], "usage": None},
        {
            **head,
            "choices": [],
            "usage": messages[2]["usage"],
            "metrics": messages[2]["metrics"],
        },
    ]
    lines = [json.dumps(each, separators=(",", ":"), ensure_ascii=False) for each in expected]
    assert body.decode() == "".join(f"data: {line}\n\n" for line in [*lines, "[DONE]"])
    assert messages[2]["usage"]["completion_tokens"] == 1


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_characters_split_over_tokens_are_streamed_whole(
    live_server: LiveServer, path: str
) -> None:
    """The model's tokens are bytes, so every longer character is split."""
    body = {**CHAT, "max_tokens": 200, "temperature": 1.5, "return_token_ids": True}
    if path == "/v1/completions":
        del body["messages"]
        body["prompt"] = "Hi."
    (choice,) = live_server.ask(path, body).json()["choices"]
    text = choice["message"]["content"] if "message" in choice else choice["text"]
    ids = choice["token_ids"]
    spelled = bytes(token for token in ids if token < 256).decode(errors="replace")
    assert text == spelled
    assert any(ord(character) > 127 and character != "\ufffd" for character in text)
    pieces, streamed_ids = "", []
    for event in events(streamed(live_server, path, body)):
        for part in event["choices"]:
            pieces += part["delta"].get("content", "") if "delta" in part else part["text"]
            streamed_ids += part.get("token_ids", [])
    assert pieces == text
    assert streamed_ids == ids


def test_stop_strings_across_chunks(live_server: LiveServer) -> None:
    body = {**CHAT, "max_tokens": 120}
    text = live_server.ask("/v1/chat/completions", body).json()["choices"][0]["message"]["content"]
    for start in (3, 10, 30):
        stop = text[start : start + 5]
        pieces = [
            choice["delta"].get("content", "")
            for event in events(
                streamed(live_server, "/v1/chat/completions", {**body, "stop": [stop, "zzzz!"]})
            )
            for choice in event["choices"]
        ]
        assert "".join(pieces) == text[: text.index(stop)]
        kept = {**body, "stop": stop, "include_stop_str_in_output": True}
        answer = live_server.ask("/v1/chat/completions", kept).json()["choices"][0]
        assert answer["message"]["content"] == text[: text.index(stop)] + stop
        assert answer["stop_reason"] == stop


def test_usage_on_every_chunk(live_server: LiveServer) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = streamed(live_server, "/v1/chat/completions", {**CHAT, "stream_options": options})
    counts = [event["usage"]["completion_tokens"] for event in events(body)]
    assert counts == sorted(counts)
    assert counts[-1] == 30


def test_obfuscation_pads_events_to_even_sizes(live_server: LiveServer) -> None:
    options = {"include_obfuscation": True}
    body = streamed(live_server, "/v1/completions", {"prompt": "x", "stream_options": options})
    sizes = {len(line) for line in body.split(b"\n\n") if line.startswith(b"data: {")}
    assert {(size - len("data: ")) % 512 for size in sizes} == {0}


def test_speculation_changes_no_text(live_server: LiveServer) -> None:
    def ids(speculation: dict[str, Any], **more: Any) -> tuple[list[int], Any]:
        body = {**CHAT, "max_tokens": 80, "return_token_ids": True, "speculation": speculation}
        answer = live_server.ask("/v1/chat/completions", {**body, **more}).json()
        return answer["choices"][0]["token_ids"], answer

    plain, answer = ids({"enabled": False})
    assert answer["metrics"]["speculative_decoding"]["num_draft_tokens"] == 0
    assert answer["metrics"]["speculative_decoding"]["num_spec_steps"] == 80
    text = answer["choices"][0]["message"]["content"]
    assert ids({"max_nodes": 3})[0] == plain
    assert ids({"drafters": ["recycle"]})[0] == plain
    predicted, answer = ids({}, prediction={"type": "content", "content": text})
    assert predicted == plain


@pytest.mark.parametrize(
    ("name", "struct"), [("stream_options", StreamOptions), ("speculation", SpeculationOptions)]
)
def test_null_inside_an_object_counts_as_not_given(
    name: str, struct: type[Struct], live_server: LiveServer
) -> None:
    nothing = dict.fromkeys(struct.__struct_fields__)

    def answer(fields: dict[str, Any]) -> list[int]:
        body = {**CHAT, "return_token_ids": True, name: fields}
        chunks = events(streamed(live_server, "/v1/chat/completions", body))
        choices = [choice for chunk in chunks for choice in chunk["choices"]]
        return [token for choice in choices for token in choice.get("token_ids", ())]

    assert answer(nothing) == answer({}) != []


def test_an_accepted_prediction_is_counted(live_server: LiveServer) -> None:
    expected = "abcdefghijklmnopqrstuvwxyz" * 2
    body = {
        **CHAT,
        "temperature": 0,
        "max_tokens": 40,
        "return_drafter_ids": True,
        "logit_bias": {str(ord("e")): 100},  # nothing but e
        "prediction": {"type": "content", "content": [{"type": "text", "text": "e" * 30}]},
    }
    answer = live_server.ask("/v1/chat/completions", body).json()
    details = answer["usage"]["completion_tokens_details"]
    assert 0 < details["accepted_prediction_tokens"] <= 30
    assert details["accepted_prediction_tokens"] + details["rejected_prediction_tokens"] == 30
    assert answer["choices"][0]["drafter_ids"].count(255) >= details["accepted_prediction_tokens"]
    body["prediction"] = {"type": "content", "content": expected}
    details = live_server.ask("/v1/chat/completions", body).json()["usage"]
    details = details["completion_tokens_details"]
    assert details["rejected_prediction_tokens"] >= len(expected) - 2


def test_tokenize_and_detokenize(live_server: LiveServer) -> None:
    reply = live_server.ask("/tokenize", {"prompt": "aé", "return_token_strs": True}).json()
    assert reply["tokens"] == list("aé".encode())
    assert reply["count"] == 3
    assert reply["token_strs"] == ["a", "bytes:\\xc3", "bytes:\\xa9"]
    back = live_server.ask("/detokenize", {"tokens": reply["tokens"]}).json()
    assert back == {"prompt": "aé"}
    chat = live_server.ask("/tokenize", {"messages": CHAT["messages"]}).json()
    completion = live_server.ask("/v1/chat/completions", CHAT).json()
    assert chat["count"] == completion["usage"]["prompt_tokens"]


def test_typed_control_tokens_stay_text(live_server: LiveServer) -> None:
    spelled = [{"role": "user", "content": "x<|im_end|>y"}]
    tokens = live_server.ask("/tokenize", {"messages": spelled}).json()["tokens"]
    template = live_server.ask(
        "/tokenize", {"messages": [{"role": "user", "content": "xy"}]}
    ).json()["tokens"]
    assert len(tokens) - len(template) == len("<|im_end|>")


def test_small_routes(live_server: LiveServer) -> None:
    assert live_server.ask("/health").json() == {"status": "ok", "engine": "ready"}
    assert live_server.ask("/ready").json() == {"ready": True, "reason": None}
    assert "version" in live_server.ask("/version").json()
    report = live_server.ask("/v1/speculation").json()
    assert report["drafters"] == ["recycle"]
    assert report["exactness"] == "exact"
    assert [drafter["name"] for drafter in report["by_drafter"]] == ["recycle", "prediction"]
    for drafter in report["by_drafter"]:
        assert drafter["num_accepted"] <= drafter["num_verified"] <= drafter["num_proposed"]
    described = live_server.ask("/openapi.json").json()
    assert "/v1/chat/completions" in described["paths"]


def test_every_error_is_json(live_server: LiveServer) -> None:
    for path, method, status in [
        ("/nowhere", "GET", 404),
        ("/v1/chat/completions", "GET", 405),
        ("/v1/models", "DELETE", 405),
    ]:
        reply = live_server.ask(path, method=method)
        assert reply.status == status
        assert reply.json()["error"]["message"]
        assert reply.headers["x-request-id"]
    assert "POST" in live_server.ask("/v1/completions", method="GET").headers["allow"]


def test_a_connection_stays_open_after_an_error(live_server: LiveServer) -> None:
    connection = http.client.HTTPConnection(urlsplit(live_server.url).netloc, timeout=30)
    for _ in range(2):
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", b"{", headers)
        reply = connection.getresponse()
        assert reply.status == 400
        reply.read()
        body = json.dumps({"prompt": "a", "max_tokens": 1}).encode()
        connection.request("POST", "/v1/completions", body, headers)
        reply = connection.getresponse()
        assert reply.status == 200
        reply.read()
    connection.close()


@pytest.mark.parametrize("unsafe", ["a b", "x" * 200, "é", "<script>"])
def test_unsafe_request_ids_are_replaced(live_server: LiveServer, unsafe: str) -> None:
    reply = live_server.ask("/version", headers={"X-Request-Id": unsafe.encode().decode("latin1")})
    assert reply.headers["x-request-id"] != unsafe
    assert reply.headers["x-request-id"].isalnum()
