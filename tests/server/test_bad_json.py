"""Bodies that are no JSON object, or an unusual one: 1 to 13 of BAD_INPUTS.md."""

import gzip
import http.client
import json
import random
from urllib.parse import urlsplit

import pytest
from live import LiveServer, Reply
from refusal import CHAT, COMPLETION, MINIMAL, assert_refused

GOOD = json.dumps(MINIMAL[COMPLETION]).encode()
UNREADABLE = {
    "1 empty": b"",
    "1 blank": b" \r\n\t ",
    "2 cut in an object": b"{",
    "2 cut in a string": b'{"prompt": "a',
    "2 cut in an escape": b'{"prompt": "\\u00',
    "2 trailing comma": b'{"prompt": "a",}',
    "2 two of them": GOOD + GOOD,
    "2 Python": b"{'prompt': 'a'}",
    "2 a comment": b'{"prompt": "a" /* yes */}',
    "3 a list": b"[]",
    "3 a list of objects": b"[" + GOOD + b"]",
    "3 a string": b'"x"',
    "3 null": b"null",
    "3 a number": b"1",
    "3 true": b"true",
    "4 nested lists": b"[" * 100_000,
    "4 nested lists that end": b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "4 nested objects": b'{"prompt":' * 100_000 + b"1" + b"}" * 100_000,
    "5 a long number alone": b"9" * 5000,
    "6 NaN": b'{"prompt": "a", "temperature": NaN}',
    "6 Infinity": b'{"prompt": "a", "temperature": Infinity}',
    "6 -Infinity in a list": b'{"prompt": [-Infinity]}',
    "8 half a character": rb'{"prompt": "\ud800"}',
    "8 the other half": rb'{"prompt": "\udc00 a"}',
    "8 halves in disorder": rb'{"prompt": "\udc00\ud800"}',
    "8 half a name": rb'{"\ud83d": 1, "prompt": "a"}',
    "8 half a character in UTF-8": b'{"prompt": "\xed\xa0\x80"}',
    "9 no UTF-8": b'{"prompt": "\xff\xfe"}',
    "9 too long a form": b'{"prompt": "\xc0\x80"}',
    "9 beyond Unicode": b'{"prompt": "\xf4\x90\x80\x80"}',
    "9 BOM": b"\xef\xbb\xbf" + GOOD,
    "9 UTF-16": GOOD.decode().encode("utf-16"),
    "9 UTF-16 without a mark": GOOD.decode().encode("utf-16-le"),
    "9 UTF-32": GOOD.decode().encode("utf-32"),
    "10 NUL in a string": b'{"prompt": "a\0b"}',
    "10 NUL behind it": GOOD + b"\0",
    "10 only NUL": b"\0" * 100,
}


@pytest.mark.parametrize("body", UNREADABLE.values(), ids=UNREADABLE.keys())
def test_bodies_that_are_no_json_object(survivor: LiveServer, body: bytes) -> None:
    for path in (COMPLETION, CHAT, "/tokenize", "/detokenize"):
        assert_refused(survivor.ask(path, body), 400, "body")


@pytest.mark.parametrize(
    "number", [b"9" * 5000, b"-" + b"9" * 5000, b"1e999", b"1E400", b"-1e999", b"9" * 400 + b".5"]
)
def test_numbers_too_large_to_decode(survivor: LiveServer, number: bytes) -> None:
    """5 and 6."""
    for field in (b"temperature", b"seed", b"max_tokens"):
        body = b'{"prompt": "a", "top_p": 1, "%b": %b}' % (field, number)
        assert_refused(survivor.ask(COMPLETION, body), 400, field.decode())
    body = b'{"prompt": "a", "logit_bias": {"1": 1, "2": %b}}' % number
    assert_refused(survivor.ask(COMPLETION, body), 400, "logit_bias")
    body = b'{"prompt": [[1, %b]]}' % number
    assert_refused(survivor.ask(COMPLETION, body), 400, "prompt")


@pytest.mark.parametrize("depth", [10, 100, 500, 900, 990, 1100, 2000, 2500, 2990, 3100, 10_000])
def test_nesting_at_every_depth(survivor: LiveServer, depth: int) -> None:
    """4: a depth that one parser accepts, the next may refuse."""
    deep = b"[" * depth + b"]" * depth
    for path, body in [
        (COMPLETION, b'{"prompt": %b}' % deep),
        (COMPLETION, b'{"prompt": "a", "stop": %b}' % deep),
        (COMPLETION, b'{"prompt": "a", "tools": %b}' % deep),
        (COMPLETION, b'{"prompt": "a", "what": %b}' % deep),
        (COMPLETION, b'{"prompt": "a", "what": %b}' % (b'{"a":' * depth + b"1" + b"}" * depth)),
        (CHAT, b'{"messages": %b}' % deep),
        (CHAT, b'{"messages": [{"role": "user", "content": %b}]}' % deep),
        (CHAT, b'{"messages": [{"role": "user", "content": "a", "what": %b}]}' % deep),
    ]:
        param = survivor.ask(path, body).json()["error"]["param"]
        assert_refused(survivor.ask(path, body), 400, param)
        assert param.split("[")[0].split(".")[0] in {
            *("body", "prompt", "stop", "tools", "what", "messages")
        }


@pytest.mark.parametrize(
    ("text", "seed"),
    [
        (b'{"seed": 1, "seed": 2, "prompt": "a"}', 2),  # 7: the last one counts
        (rb'{"se\u0065d": 2, "prompt": "a"}', 2),
        (rb'{"seed": 2, "prompt": "\u0061"}', 2),
        (b'\r\n {"seed" : 2 ,\t"prompt": "a"}\n', 2),
        (b'{"seed": 2, "prompt": "a", "temperature": 1E0}', 2),
        (b'{"seed": 2, "prompt": "a", "presence_penalty": -0.0}', 2),
        (b'{"seed": 2, "prompt": "a", "temperature": 1.0000000000000000000000000001}', 2),
        (b'{"seed": 2, "prompt": "a", "temperature": 1, "user": null}', 2),
    ],
)
def test_unusual_but_valid_json(survivor: LiveServer, text: bytes, seed: int) -> None:
    expected = survivor.ask(COMPLETION, {"prompt": "a", "seed": seed}).json()
    answer = survivor.ask(COMPLETION, text)
    assert answer.status == 200, answer
    assert answer.json()["choices"] == expected["choices"]


def test_the_last_of_two_equal_keys_counts(survivor: LiveServer) -> None:
    """7."""
    body = b'{"prompt": "a", "max_tokens": 2, "temperature": 1, "temperature": 9}'
    assert_refused(survivor.ask(COMPLETION, body), 400, "temperature")
    body = b'{"prompt": "a", "max_tokens": 2, "temperature": 9, "temperature": 1}'
    assert survivor.ask(COMPLETION, body).status == 200


def test_nul_and_other_control_characters_are_text(survivor: LiveServer) -> None:
    """10."""
    text = "".join(map(chr, range(32))) + "\x7f\x80\u2028\ufeff\uffff\U0010ffff"
    answer = survivor.ask(COMPLETION, {"prompt": text, "max_tokens": 1, "echo": True})
    assert answer.json()["choices"][0]["text"].startswith(text)
    chat = {"messages": [{"role": "user", "content": text}], "max_tokens": 1}
    answer = survivor.ask(CHAT, chat)
    assert answer.status == 200
    more = {"user": text, "cache_salt": text, "metadata": {text: text}, "stop": [text]}
    assert survivor.ask(CHAT, {**chat, **more}).status == 200


@pytest.mark.parametrize(
    "given",
    [
        "text/plain",
        "application/x-www-form-urlencoded",
        "application/json; charset=utf-16",
        "x",
        "",
    ],
)
def test_other_content_types(survivor: LiveServer, given: str) -> None:
    """11."""
    for path in (COMPLETION, CHAT, "/tokenize", "/detokenize"):
        reply = survivor.ask(path, GOOD, headers={"Content-Type": given})
        assert_refused(reply, 415)


def test_random_bytes(survivor: LiveServer) -> None:
    """12: noise, and good bodies with a few bytes changed."""
    noise = random.Random(7)
    connection = http.client.HTTPConnection(urlsplit(survivor.url).netloc, timeout=30)
    statuses = set()
    for index in range(300):
        path = (COMPLETION, CHAT)[index % 2]
        body = bytearray(json.dumps(MINIMAL[path]).encode())
        if index % 5 == 0:
            body = bytearray(noise.randbytes(noise.randrange(200)))
        for _ in range(noise.randrange(1, 4)):
            at = noise.randrange(len(body) + 1)
            match noise.randrange(3):
                case 0:
                    body[at:at] = noise.randbytes(noise.randrange(1, 4))
                case 1:
                    del body[at : at + noise.randrange(1, 8)]
                case _:
                    body[at : at + 1] = noise.choice(b'{}[]",:\\0-e').to_bytes()
        connection.request("POST", path, bytes(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        headers = {name.lower(): value for name, value in answer.getheaders()}
        reply = Reply(answer.status, headers, answer.read())
        statuses.add(reply.status)
        if reply.status != 200:
            assert_refused(reply, reply.status, reply.json()["error"]["param"])
    connection.close()
    assert statuses <= {200, 400, 404}, statuses  # 404: another model
    assert 400 in statuses


def test_bodies_over_the_limit(survivor: LiveServer) -> None:
    """13."""
    body = {**MINIMAL[COMPLETION], "prompt": "a" * (9 * 2**20)}
    error = assert_refused(survivor.ask(COMPLETION, body), 413)
    assert error["type"] == "request_too_large"


def test_compressed_bodies_are_refused(survivor: LiveServer) -> None:
    """13: 300 MB in 300 kB."""
    bomb = gzip.compress(b" " * 50_000_000, compresslevel=1)
    for encoding in ("gzip", "deflate", "br", "zstd"):
        reply = survivor.ask(COMPLETION, bomb, headers={"Content-Encoding": encoding})
        assert_refused(reply, 415)


def test_unknown_field_names(survivor: LiveServer) -> None:
    """Unknown, empty, non-ASCII, eight megabytes long, half a million of them."""
    for name, param in [
        ("temprature", "temprature"),
        ("__class__", "__class__"),
        ("", "body"),
        ("pr\u043empt", "pr\u043empt"),  # a Cyrillic o
        ("温度", "温度"),
        ("k" * (8 * 2**20 - 100), "k" * 80 + "..."),
    ]:
        body = {**MINIMAL[COMPLETION], name: 1}
        reply = survivor.ask(COMPLETION, json.dumps(body, ensure_ascii=False).encode(), timeout=5)
        assert_refused(reply, 400, param)
    many = {f"a{index}": 1 for index in range(500_000)}
    assert_refused(survivor.ask(COMPLETION, many), 400, "a0")
