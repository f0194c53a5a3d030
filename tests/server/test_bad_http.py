"""Malformed HTTP, and requests for what does not exist: 43 to 50 of BAD_INPUTS.md."""

import json
from typing import Any, Final

from live import LiveServer
from refusal import CHAT, COMPLETION, MINIMAL, assert_refused
from wire import GOOD, get, post, wire

LINE: Final = f"POST {COMPLETION} HTTP/1.1\r\nHost: here\r\n".encode()


NOT_HTTP: Final = {
    "43 a header of 9 kB": LINE + b"a: " + b"b" * 9000 + b"\r\n\r\n",
    "43 a header that never ends": LINE + b"a: " + b"b" * 10**6,
    "43 300 headers": LINE + b"".join(b"a%d: b\r\n" % index for index in range(300)) + b"\r\n",
    "43 a URL of 9 kB": b"GET /" + b"b" * 9000 + b" HTTP/1.1\r\nHost: here\r\n\r\n",
    "43 a method of 9 kB": b"G" * 9000 + b" / HTTP/1.1\r\nHost: here\r\n\r\n",
    "44 a length and chunks": LINE
    + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "44 two lengths": LINE + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
    "44 a negative length": LINE + b"Content-Length: -2\r\n\r\n{}",
    "44 a length with a sign": LINE + b"Content-Length: +2\r\n\r\n{}",
    "44 a length that is no number": LINE + b"Content-Length: 0x2\r\n\r\n{}",
    "44 an endless length": LINE + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n",
    "44 chunks of chunks": LINE + b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n",
    "44 a bad chunk": LINE + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n{}\r\n",
    "another version": b"GET /health HTTP/9.9\r\nHost: here\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 100,
    "NUL in a header": LINE + b"a: b\0c\r\n\r\n",
    "noise": bytes(range(1, 256)) * 4,
}


def test_malformed_http(survivor: LiveServer) -> None:
    """43 and 44: answered, and then the connection is closed."""
    for kind, data in NOT_HTTP.items():
        with wire(survivor) as connection:
            connection.send(data)
            error = assert_refused(connection.reply(), 400)
            assert "bbb" not in error["message"], kind
            assert connection.closed(), kind


def test_nothing_after_a_malformed_request_is_read(survivor: LiveServer) -> None:
    """44: bytes that a proxy may have taken for a body are not read as a second request."""
    for framing in (
        "Content-Length: 3\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: chunked\r\nContent-Length: 3",
        "Content-Length: 3\r\nContent-Length: 99",
    ):
        with wire(survivor) as connection:
            connection.send(LINE + f"{framing}\r\n\r\n0\r\n\r\n".encode() + get("/version"))
            assert_refused(connection.reply(), 400)
            assert connection.closed()


def test_a_length_of_ten_gigabytes(survivor: LiveServer) -> None:
    """45: refused before the body arrives."""
    with wire(survivor) as connection:
        connection.send(LINE + b"Content-Length: 10000000000\r\n\r\nabc")
        assert_refused(connection.reply(), 413)
        assert connection.closed()
    with wire(survivor) as connection:
        connection.send(LINE + b"Transfer-Encoding: chunked\r\n\r\n2540be400\r\nabc")
        connection.send(b"d" * (9 * 2**20))
        assert_refused(connection.reply(), 413)


METHODS: Final = ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND")


READ_ONLY: Final = (
    *("/v1/models", "/v1/models/tiny-chat", "/v1/speculation", "/metrics"),
    *("/health", "/ready", "/version", "/openapi.json", "/docs"),
)


def test_wrong_methods(survivor: LiveServer) -> None:
    """48."""
    routes = {path: {"POST"} for path in (COMPLETION, CHAT, "/tokenize", "/detokenize")}
    routes |= {path: {"GET", "HEAD"} for path in READ_ONLY}
    with wire(survivor) as connection:
        for path, allowed in routes.items():
            for method in METHODS:
                if method in allowed:
                    continue
                connection.send(get(path, method=method))
                reply = connection.reply()
                message = assert_refused(reply, 405)["message"]
                assert message.endswith(f"use {', '.join(sorted(allowed))}")
                assert set(reply.headers["allow"].upper().split(",")) == allowed
                assert reply.json()["error"]["message"].endswith(", ".join(sorted(allowed)))
            connection.send(get(path, method="HEAD"))
            reply = connection.reply(with_body=False)
            assert reply.status == (200 if "HEAD" in allowed else 405)


PATHS: Final = [
    *("/", "//", "/v1", "/v1/", "/v2/chat/completions", "/index.html", "/favicon.ico", "/.env"),
    *("/v1/chat", "/v1/chat/completions/", "/v1/completions/x", "/v1/embeddings", "/v1/audio"),
    *("/v1//completions", "//v1/completions", "/V1/completions", "/v1/completions;a=b"),
    *("/%00", "/%0d%0aX-Evil:%201", "/..%2f..%2fetc%2fpasswd", "/../../etc/passwd", "/%ff%fe"),
    *("/v1/%2e%2e/%2e%2e/etc/passwd", "/health/..;/metrics", "/doc", "/admin", "/" + "a" * 7000),
    "/v1/completions%00",
]
MISSPELT: Final = {
    "/v1/chat/completion": f"POST {CHAT}",
    "/chat/completions": f"POST {CHAT}",
    "/v1/v1/chat/completions": f"POST {CHAT}",
    "/V1/Chat/Completions/": f"POST {CHAT}",
    "/completion": f"POST {COMPLETION}",
    "/models": "GET /v1/models",
    "/v1/tokenize": "POST /tokenize",
    "/healthz": "GET /health",
}
NO_MODELS: Final = [
    *("gpt-4", "%00", "%ff", "..%2f..%2fetc%2fpasswd", "../../etc/passwd", "tiny-chat/"),
    *("tiny-chat%0d%0aX-Evil:%201", "Tiny-Chat", "%25", "a" * 7000, "%F0%9F%98%80", "a/b/c"),
]


def test_unknown_paths(survivor: LiveServer) -> None:
    """48."""
    with wire(survivor) as connection:
        for path in PATHS:
            for request in (get(path), post(path=path)):
                connection.send(request)
                reply = connection.reply()
                message = assert_refused(reply, 404)["message"]
                assert [route for route in (CHAT, *READ_ONLY[2:]) if route not in message] == []
                assert "x-evil" not in reply.headers
        for path, route in MISSPELT.items():
            connection.send(get(path))
            message = assert_refused(connection.reply(), 404)["message"]
            assert message.startswith(f"there is no route {path}; did you mean {route}? Routes:")
        for name in NO_MODELS:
            connection.send(get(f"/v1/models/{name}"))
            reply = connection.reply()
            param = "model" if reply.json()["error"]["code"] else None  # else it is no name at all
            assert_refused(reply, 404, param)
            assert "x-evil" not in reply.headers


def test_query_strings_and_absolute_urls(survivor: LiveServer) -> None:
    """47, 48: the path selects the route; a query has no effect."""
    with wire(survivor) as connection:
        for path in (
            *("/version?", "/version?a=%ff", "/version?" + "a=b&" * 1500, "/version#a"),
            *("/v%65rsion", "http://here/version", "http://elsewhere:1/version"),
        ):
            connection.send(get(path))
            assert connection.reply().status == 200, path
        connection.send(post(path=f"{COMPLETION}?max_tokens=0&stream=true"))
        assert connection.reply().json()["usage"]["completion_tokens"] == 2
        for host in ("a/health?", "", "a b", "[::1", "127.0.0.1:99999"):
            connection.send(f"GET /version HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
            assert connection.reply().status == 200, host
    for line in (b"GET /version HTTP/1.0", b"GET /version"):
        with wire(survivor) as connection:
            connection.send(line + b"\r\n\r\n")
            assert connection.reply().status == 200
            assert connection.closed()


def test_credentials_without_configured_keys(survivor: LiveServer) -> None:
    """49: ignored by a server without keys. With keys: test_security.py."""
    with wire(survivor) as connection:
        for value in ("", "Bearer", "Bearer  x", "Basic YTpi", "Bearer \xff\xfe", "x" * 8000):
            connection.send(post(GOOD, f"Authorization: {value}", f"X-API-Key: {value[:100]}"))
            assert connection.reply().status == 200


def test_a_connection_stays_open_after_every_refusal(survivor: LiveServer) -> None:
    """50: one after the other, then all of them at once."""
    refused: list[tuple[bytes, int]] = [
        (post(b"{"), 400),
        (post(b"[" * 50_000), 400),
        (post(b'{"prompt": "a", "temperature": 9}'), 400),
        (post(b'{"prompt": "a", "model": "b"}'), 404),
        (post(GOOD, "Content-Type: text/plain"), 415),
        (post(b"x" * 1000, "Content-Encoding: gzip"), 415),
        (post(path="/nowhere"), 404),
        (get(COMPLETION), 405),
        (post(path="/health"), 405),
        (get("/health", "Expect: tea"), 417),
        (post(b'{"prompt": "' + b"a" * 10**6 + b'"}'), 400),
    ]
    with wire(survivor) as connection:
        for request, status in refused:
            for again in (request, post()):
                connection.send(again)
                reply = connection.reply()
                assert reply.status == (status if again is request else 200), again[:200]
        small = [(request, status) for request, status in refused if len(request) < 1000]
        pairs = [pair for each in small for pair in (each, (post(), 200))] * 3
        connection.send(b"".join(request for request, _ in pairs))
        for request, status in pairs:
            assert connection.reply().status == status, request[:200]


def test_expect_headers(survivor: LiveServer) -> None:
    """50: a client that is refused because of its headers need not send a body."""
    for headers, status in (
        (f"Content-Length: {len(GOOD)}", 200),
        ("Content-Length: 3\r\nContent-Type: text/plain", 415),
        ("Content-Length: 10000000000", 413),
    ):
        with wire(survivor) as connection:
            connection.send(LINE + f"Expect: 100-continue\r\n{headers}\r\n\r\n".encode())
            assert connection.reply().status == 100
            if status == 200:
                connection.send(GOOD)
            assert connection.reply().status == status


def test_upgrades_are_ignored(survivor: LiveServer) -> None:
    """50: the header that curl --http2 sends; the request is answered normally."""
    for upgrade in ("h2c", "websocket", "TLS/1.2", "x" * 1000):
        headers = (f"Upgrade: {upgrade}", "Connection: Upgrade, HTTP2-Settings")
        for request in (
            post(GOOD, *headers),
            get("/version", *headers, "HTTP2-Settings: AAMAAABk"),
        ):
            with wire(survivor) as connection:
                for again in (request, post()):
                    connection.send(again)
                    assert connection.reply().status == 200


IDS: Final[dict[str, Any]] = {
    "harmless": "abc-123.4:5_6",
    "CR and LF spelled": "a%0d%0aX-Evil: 1",
    "backslashes": "a\\r\\nX-Evil: 1",
    "Latin-1": "\xe9",
    "8000 bytes": "x" * 8000,
    "empty": "",
    "HTML": "<script>alert(1)</script>",
    "JSON": '"}, {"a": "',
    "a path": "../../etc/passwd",
    "a tab": "a\tb",
}


def test_request_ids(survivor: LiveServer) -> None:
    """50: an unsafe id is not repeated in a header or a body."""
    stream = json.dumps(MINIMAL[COMPLETION] | {"stream": True}).encode()
    for kind, given in IDS.items():
        for body in (GOOD, b"{", stream):
            with wire(survivor) as connection:
                connection.send(post(body, f"X-Request-Id: {given}"))
                reply = connection.reply()
                assert (reply.headers["x-request-id"] == given) == (kind == "harmless")
                assert "x-evil" not in reply.headers
                assert not given or kind == "harmless" or given.encode() not in reply.body
    for line in (
        "X-Request-Id: a\r\nX-Evil: 1",
        "X-Request-Id: a\rX-Evil: 1",
        "X-Request-Id: a\n b",
    ):
        with wire(survivor) as connection:
            connection.send(post(GOOD, line))
            reply = connection.reply()
            assert reply.status in (200, 400)
            assert "x-evil" not in reply.headers
    with wire(survivor) as connection:
        connection.send(post(GOOD, "X-Request-Id: " + "x" * 10_000))
        assert_refused(connection.reply(), 400)
        assert connection.closed()
    with wire(survivor) as connection:
        connection.send(post(GOOD, "X-Request-Id: one", "X-Request-Id: two"))
        assert connection.reply().headers["x-request-id"] in ("one", "two")
