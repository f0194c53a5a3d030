"""What the clients send and what they make of answers, against a scripted peer. The happy path
against the real server is in tests/server/test_our_client.py."""

import socket
import threading
from typing import Any

import pytest
from scripted_peer import (
    DONE,
    OK,
    answers,
    chunk,
    client_of,
    fails,
    never,
    scripted_peer,
    streams,
)

from specserve import Client
from specserve.client import (
    APIStatusError,
    Choice,
    Completion,
    Delta,
    SpeculationOptions,
    SpeculationReport,
    SpeculativeDecoding,
    Stats,
    StreamBroken,
    TokenLogprob,
    TopLogprob,
    UnexpectedAnswer,
    Usage,
)
from specserve.client.connection import base_url


def test_options_become_fields() -> None:
    with client_of(answers(OK)) as (client, peer):
        client.complete(
            [1, 2],
            model="m",
            temperature=0.5,
            logit_bias={5: -100},
            stop=("a", "b"),
            stop_token_ids=(7,),
            seed=None,
            logprobs=3,
            speculation=SpeculationOptions(max_nodes=4, drafters=("ngram",)),
            prediction="soon",
            request_id="r-1",
            extra={"echo": True},
        )
        client.chat("hi", logprobs=0, stop="x", speculation={"enabled": False})
        client.stream_chat([{"role": "user", "content": "hi"}], n=2).close()
        client.stream("x").close()
    body, chat = peer.bodies
    assert body == {
        "prompt": [1, 2],
        "model": "m",
        "temperature": 0.5,
        "logit_bias": {"5": -100},
        "stop": ["a", "b"],
        "stop_token_ids": [7],
        "logprobs": 3,
        "speculation": {"max_nodes": 4, "drafters": ["ngram"]},
        "prediction": {"type": "content", "content": "soon"},
        "echo": True,
        "return_token_ids": True,
        "return_drafter_ids": True,
    }
    assert peer.headers[0]["X-Request-Id"] == "r-1"
    assert "Authorization" not in peer.headers[0]
    assert chat == {
        "messages": [{"role": "user", "content": "hi"}],
        "logprobs": True,
        "top_logprobs": 0,
        "stop": "x",
        "speculation": {"enabled": False},
        "return_token_ids": True,
        "return_drafter_ids": True,
    }


def test_a_stream_that_is_never_used_sends_nothing() -> None:
    with client_of(never()) as (client, peer):
        stream = client.stream("x")
        stream.close()
        with pytest.raises(StreamBroken, match="is closed"), stream:
            pass
    assert peer.paths == []


def test_a_prompt_of_megabytes_arrives() -> None:
    with client_of(fails(503, Retry_After="0"), answers(OK)) as (client, peer):
        client.complete("x" * 3_000_000)
    assert [len(body["prompt"]) for body in peer.bodies] == [3_000_000] * 2


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"temprature": 1}, TypeError, "temprature"),
        ({"temperature": float("nan")}, ValueError, "temperature"),
        ({"logit_bias": {1: float("inf")}}, ValueError, "logit_bias"),
        ({"speculation": {"max_nods": 3}}, ValueError, "speculation.*max_nods"),
        ({"timeout": 0}, ValueError, "timeout"),
        ({"request_id": "a\r\nb"}, ValueError, "header"),
    ],
)
def test_what_cannot_be_sent_is_refused(
    options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with client_of(answers(OK)) as (client, peer):
        with pytest.raises(error, match=words):
            client.complete("x", **options)
        with pytest.raises(error, match=words):
            client.stream_chat("x", **options).result()
    assert peer.paths == []


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("http://h:1", "http://h:1"),
        ("http://h:1/", "http://h:1"),
        ("https://h/v1/", "https://h"),
        ("http://[::1]:80/models/a", "http://[::1]:80/models/a"),
    ],
)
def test_urls(url: str, base: str) -> None:
    assert base_url(url) == base


@pytest.mark.parametrize(
    "url", ["h:1", "localhost:8000", "", "ftp://h", "http://", "http://h:x", "http://h/?a=1"]
)
def test_a_url_that_is_none(url: str) -> None:
    with pytest.raises(ValueError, match=r"^url: .*http://127.0.0.1:8000"):
        Client(url)


def test_settings_that_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"^timeout"):
        Client(timeout=-1)
    with pytest.raises(ValueError, match=r"^connect_timeout"):
        Client(connect_timeout=0)
    with pytest.raises(ValueError, match=r"^max_retries"):
        Client(max_retries=-1)
    for key in ["", "a\nb", "clé"]:
        with pytest.raises(ValueError, match=r"^api_key: empty") as caught:
            Client(api_key=key)
        assert not key or key not in str(caught.value)
    with pytest.raises(ValueError, match="api_key"):
        Client("http://me:secret@h")


def test_the_key_is_sent_to_the_server_only() -> None:
    with scripted_peer(answers(OK)) as other:
        elsewhere = answers(b"", 307, Location=f"{other.url}/v1/completions")
        with client_of(elsewhere, api_key="secret") as (client, peer):
            with pytest.raises(APIStatusError, match="307"):
                client.complete("x")
            assert peer.headers[0]["Authorization"] == "Bearer secret"
        assert other.paths == []


def test_a_completion_is_read_whole() -> None:
    choice = {
        "index": 1,
        "text": "a b",
        "finish_reason": "stop",
        "stop_reason": 7,
        "token_ids": [4, 5],
        "drafter_ids": [0, 255],
        "prompt_token_ids": [9, 8],
        "logprobs": {
            "tokens": ["a", " b"],
            "token_logprobs": [-0.5, -1],
            "top_logprobs": [{"a": -0.5, "c": -2.0}, {}],
            "text_offset": [0, 1],
        },
    }
    metrics = {
        "time_to_first_token_ms": 5,
        "mean_itl_ms": None,
        "later": 1,
        "speculative_decoding": {
            "mean_acceptance_length": 1.5,
            "draft_acceptance_rate": 0.25,
            "acceptance_histogram": [1, 1],
            "num_spec_steps": 2,
            "num_accepted_draft_tokens": 1,
            "num_draft_tokens": 4,
            "num_spec_tokens": 1,
        },
    }
    usage = {
        "prompt_tokens": 2,
        "completion_tokens": 3,
        "total_tokens": 5,
        "prompt_tokens_details": {"cached_tokens": 1},
        "completion_tokens_details": {
            "accepted_prediction_tokens": 2,
            "rejected_prediction_tokens": 0,
        },
    }
    first = {"index": 0, "text": "x", "finish_reason": "length"}
    answer = {"id": "c", "model": "m", "choices": [choice, first]}
    with client_of(answers({**answer, "usage": usage, "metrics": metrics})) as (client, _):
        completion = client.complete("p")
    assert completion == Completion(
        id="c",
        model="m",
        prompt_ids=(9, 8),
        choices=(
            Choice(0, "x", finish_reason="length"),
            Choice(
                index=1,
                text="a b",
                token_ids=(4, 5),
                drafter_ids=(0, 255),
                finish_reason="stop",
                stop_reason=7,
                logprobs=(
                    TokenLogprob("a", -0.5, (TopLogprob("a", -0.5), TopLogprob("c", -2.0))),
                    TokenLogprob(" b", -1.0),
                ),
            ),
        ),
        usage=Usage(2, 3, 5, cached_tokens=1, accepted_prediction_tokens=2),
        stats=Stats(
            time_to_first_token_ms=5.0,
            speculative_decoding=SpeculativeDecoding(1.5, 0.25, (1, 1), 2, 1, 4, 1),
        ),
    )
    assert (completion.text, completion.finish_reason) == ("x", "length")


def chat_chunk(delta: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"id": "c", "model": "m", "choices": [{"index": 0, "delta": delta, **more}]}


def test_a_chat_stream_is_read_and_collected() -> None:
    top = {"token": "x", "logprob": -2.0, "bytes": [120]}
    token = {"token": "bytes:\\xc3", "logprob": -1.0, "bytes": [0xC3], "top_logprobs": [top]}
    events = (
        b": keep-alive\n\n",
        {**chat_chunk({"role": "assistant", "content": ""}), "prompt_token_ids": [1]},
        chat_chunk({}, token_ids=[3], drafter_ids=[0], logprobs={"content": [token]}),
        chat_chunk({"content": "é"}, token_ids=[4, 5], drafter_ids=[1, 0]),
        b": keep-alive\r\n\r\n",
        chat_chunk({}, finish_reason="stop", stop_reason="END"),
        {"id": "c", "choices": [], "usage": {"completion_tokens": 3}, "metrics": {}},
        DONE,
    )
    with client_of(streams(*events)) as (client, _):
        with client.stream_chat("hi") as stream:
            deltas = list(stream)
        completion = stream.result()
    likely = (TopLogprob("x", -2.0, b"x"),)
    logprob = TokenLogprob("bytes:\\xc3", -1.0, likely, b"\xc3")
    assert deltas == [
        Delta(token_ids=(3,), drafter_ids=(0,), logprobs=(logprob,)),
        Delta(text="é", token_ids=(4, 5), drafter_ids=(1, 0)),
        Delta(finish_reason="stop", stop_reason="END"),
        Delta(usage=Usage(completion_tokens=3), stats=Stats()),
    ]
    assert completion == Completion(
        id="c",
        model="m",
        choices=(Choice(0, "é", (3, 4, 5), (0, 1, 0), (logprob,), "stop", "END"),),
        prompt_ids=(1,),
        usage=Usage(completion_tokens=3),
    )


def test_result_reads_what_was_not_iterated() -> None:
    with client_of(streams(chunk("a"), chunk("b"), chunk("c"), DONE)) as (client, _):
        stream = client.stream("x")
        assert next(stream).text == "a"
        assert stream.result().text == "abc"
        assert stream.result().text == "abc"


def test_what_follows_done_does_not_count_and_the_connection_is_used_again() -> None:
    ports = set()
    script = streams(chunk("a"), DONE, chunk("b"), b"data: {\n\n")

    async def handler(request: Any) -> Any:
        ports.add(request.transport.get_extra_info("peername"))
        return await script(request)

    with client_of(handler) as (client, _):
        assert [client.stream("x").result().text for _ in range(5)] == ["a"] * 5
    assert len(ports) == 1


@pytest.mark.parametrize(
    "body", [b"<html>hello</html>", b"", b"[]", b'{"choices": []}', b'{"choices": 3}', b"\xff{}"]
)
def test_an_answer_of_something_else(body: bytes) -> None:
    with client_of(answers(body)) as (client, _):
        with pytest.raises(UnexpectedAnswer):
            client.complete("x")
        with pytest.raises(UnexpectedAnswer, match="sent no events"):
            client.stream("x").result()


def test_something_that_is_no_http() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def greet() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(b"SSH-2.0-x\r\n\r\n")

        thread = threading.Thread(target=greet)
        thread.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        with Client(url) as client, pytest.raises(UnexpectedAnswer, match="does not speak HTTP"):
            client.complete("x")
        thread.join()


def test_small_routes() -> None:
    report = {
        "drafters": ["ngram", "tiny"],
        "max_nodes": 16,
        "by_drafter": [{"name": "ngram", "num_verified": 3, "verified_by_depth": [2, 1]}],
    }
    replies = [
        {"object": "list", "data": [{"id": "m", "max_model_len": 64, "root": "/"}]},
        {"count": 2, "tokens": [1, 2]},
        {"count": 1, "tokens": [3]},
        {"prompt": "text"},
        {"version": "1.2"},
        report,
    ]
    scripts = [*map(answers, replies), answers(b"a 1\n"), answers({}), fails(503), answers({})]
    with client_of(*scripts) as (client, peer):
        assert [(model.id, model.max_model_len) for model in client.models()] == [("m", 64)]
        assert client.tokenize("a") == (1, 2)
        assert client.tokenize([{"role": "user", "content": "a"}]) == (3,)
        assert client.detokenize([5, 6]) == "text"
        assert client.version() == "1.2"
        speculation = client.speculation()
        assert client.metrics() == "a 1\n"
        assert client.health()
        assert not client.ready()
        assert client.ready()
    assert peer.bodies[1:4] == [
        {"prompt": "a"},
        {"messages": [{"role": "user", "content": "a"}]},
        {"tokens": [5, 6]},
    ]
    assert peer.paths[-3:] == ["GET /health", "GET /ready", "GET /ready"]
    assert speculation.by_drafter[0].verified_by_depth == (2, 1)
    names = [speculation.name_of(drafter_id) for drafter_id in (0, 1, 2, 3, 255)]
    assert names == ["target", "ngram", "tiny", "drafter 3", "prediction"]
    assert SpeculationReport(()).name_of(0) == "target"
