"""What pages of other origins get (CORS): the allowed ones all answers, the others nothing."""

import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from live import LiveServer, Reply, events, start_server

from specserve.cli import main
from specserve.config import ConfigError, ServerConfig
from specserve.server.auth import load_keyring

KEY = "alice-0123456789abcdef"
ALLOWED = "https://chat.example.com"
OTHER = "http://localhost:3000"  # allowed, too
HOSTILE = [
    *("https://evil.example", "http://chat.example.com", "https://chat.example.com.evil.example"),
    *("https://chat.example.com:444", "https://chat.example.com:443", "https://CHAT.example.com"),
    *("https://chat.example.com/", "https://evilchat.example.com", "null", "", "*", "localhost"),
    *("https://chat.example.com https://evil.example", f"{OTHER}, {ALLOWED}", "http://localhost"),
]
QUESTION = {"prompt": "What comes next?", "max_tokens": 4}
BEARER = {"Authorization": f"Bearer {KEY}"}
ASKS = {
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type,x-stainless-lang",
}
PATHS = ["/v1/completions", "/v1/models", "/metrics", "/health", "/docs", "/nowhere"]


@pytest.fixture(scope="module")
def server(chat_model: Path) -> Iterator[LiveServer]:
    flags = ("--allowed-origins", ALLOWED, "--allowed-origins", OTHER)
    keys = f"alice:inference:{KEY}"
    with start_server(chat_model, *flags, SPECSERVE_API_KEYS=keys) as server:
        yield server


def permissions(reply: Reply) -> dict[str, str]:
    """The headers that give a page access."""
    names = [name for name in reply.headers if name.startswith("access-control-")]
    return {name: reply.headers[name] for name in names}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("origin", [ALLOWED, OTHER])
def test_a_preflight_needs_no_key(server: LiveServer, path: str, origin: str) -> None:
    reply = server.ask(path, method="OPTIONS", headers=ASKS | {"Origin": origin})
    assert (reply.status, reply.body) == (204, b"")
    assert reply.headers["vary"] == "Origin"
    given = permissions(reply)
    assert given["access-control-allow-origin"] == origin
    assert "POST" in given["access-control-allow-methods"]
    headers = {name.strip() for name in given["access-control-allow-headers"].split(",")}
    assert headers == {"*", "Authorization"}
    assert int(given["access-control-max-age"]) > 0
    assert "access-control-allow-credentials" not in given


@pytest.mark.parametrize("origin", HOSTILE)
def test_other_origins_get_nothing(server: LiveServer, origin: str) -> None:
    header = {"Origin": origin}
    for path in PATHS:
        asked = server.ask(path, method="OPTIONS", headers=header | ASKS)
        assert asked.status in (404, 405)
        for reply in (asked, server.ask(path, headers=header | BEARER)):
            assert permissions(reply) == {}
            assert reply.headers["vary"] == "Origin"
    reply = server.ask("/v1/completions", QUESTION | {"stream": True}, headers=header | BEARER)
    assert permissions(reply) == {}
    assert reply.headers["vary"] == "Origin"


def test_answers_errors_and_streams_name_the_origin(server: LiveServer) -> None:
    origin = {"Origin": ALLOWED}
    path = "/v1/completions"
    replies = {
        200: server.ask(path, QUESTION, headers=origin | BEARER),
        401: server.ask(path, QUESTION, headers=origin),
        400: server.ask(path, {"promt": "?"}, headers=origin | BEARER),
        403: server.ask("/metrics", headers=origin | BEARER),
        404: server.ask("/nowhere", headers=origin),
        405: server.ask(path, headers=origin),
        415: server.ask(path, b"?", headers=origin | BEARER | {"Content-Type": "text/plain"}),
        417: server.ask(path, QUESTION, headers=origin | BEARER | {"Expect": "a miracle"}),
    }
    stream = server.ask(path, QUESTION | {"stream": True}, headers=origin | BEARER)
    assert events(stream.body)
    for status, reply in (*replies.items(), (200, stream)):
        assert reply.status == status
        assert permissions(reply) == {
            "access-control-allow-origin": ALLOWED,
            "access-control-expose-headers": "Retry-After, X-Request-Id",
        }, status
        assert reply.headers["vary"] == "Origin"


def test_requests_without_an_origin_get_no_permission(server: LiveServer) -> None:
    reply = server.ask("/v1/models", headers=BEARER)
    assert (reply.status, permissions(reply)) == (200, {})
    assert reply.headers["vary"] == "Origin", "or a cache would answer an allowed page with this"
    assert server.ask("/v1/models", method="OPTIONS", headers={"Origin": ALLOWED}).status == 405


def test_a_star_allows_every_page_but_opens_no_route(chat_model: Path) -> None:
    keys = f"alice:inference:{KEY}"
    with start_server(chat_model, "--allowed-origins", "*", SPECSERVE_API_KEYS=keys) as server:
        for origin in ("https://anything.example", "null"):
            header = {"Origin": origin}
            replies = {
                204: server.ask("/v1/completions", method="OPTIONS", headers=header | ASKS),
                401: server.ask("/v1/completions", QUESTION, headers=header),
                200: server.ask("/v1/completions", QUESTION, headers=header | BEARER),
            }
            for status, reply in replies.items():
                assert reply.status == status
                assert permissions(reply)["access-control-allow-origin"] == "*"
                assert "access-control-allow-credentials" not in reply.headers


def test_a_page_cannot_start_work_without_a_preflight(live_server: LiveServer) -> None:
    """Browsers send bodies of these types, or of none, to any server without asking it first."""
    address = urlsplit(live_server.url)
    for kind in ("", "Content-Type: text/plain\r\n", "Content-Type: \r\n"):
        body = '{"prompt": "Hi.", "max_tokens": 1}'
        lines = f"Host: a\r\nOrigin: https://evil.example\r\nConnection: close\r\n{kind}"
        head = f"POST /v1/completions HTTP/1.1\r\n{lines}Content-Length: {len(body)}\r\n\r\n"
        with socket.create_connection((address.hostname, address.port), timeout=10) as connection:
            connection.sendall((head + body).encode())
            reply = b"".join(iter(lambda: connection.recv(65536), b""))
        assert reply.split()[1] == b"415", reply


@pytest.mark.parametrize(
    ("value", "fix"),
    [
        ("https://chat.example.com/", "write 'https://chat.example.com'"),
        ("https://chat.example.com/app?x#y", "write 'https://chat.example.com'"),
        ("https://chat.example.com:443", "write 'https://chat.example.com'"),
        ("http://LocalHost:80", "write 'http://localhost'"),
        ("https://me:secret@chat.example.com", "write 'https://chat.example.com'"),
        ("chat.example.com", "write scheme://host[:port]"),
        ("https://*.example.com", "write scheme://host[:port]"),
        ("https://bücher.example", "write scheme://host[:port]"),
        ("https://a.example,https://b.example", "one each time"),
        ("https://a.example https://b.example", "one each time"),
        ('["*"]', "'*' for all"),
        ("null", "write scheme://host[:port]"),
        ("http://[::1", "write scheme://host[:port]"),
        ("http://a:99999", "write scheme://host[:port]"),
        ("", "write scheme://host[:port]"),
    ],
)
def test_a_value_that_is_no_origin_is_refused_at_the_start(
    value: str, fix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "--print-config", "--allowed-origins", value]) == 2
    error = capsys.readouterr().err
    assert f"allowed_origins: {value!r} is not an origin" in error
    assert fix in error


@pytest.mark.parametrize(
    "value", ["http://[::1]:8080", "app://obsidian.md", "chrome-extension://abc", "http://10.0.0.1"]
)
def test_origins_of_every_kind(value: str) -> None:
    assert ServerConfig(allowed_origins=(value,)).allowed_origins == (value,)


def test_a_star_stands_alone_and_needs_keys() -> None:
    with pytest.raises(ConfigError, match="give it alone"):
        ServerConfig(allowed_origins=("*", ALLOWED))
    everyone = ServerConfig(allowed_origins=("*",))
    with pytest.raises(ConfigError, match=r"allowed_origins: '\*' .* --api-key-file .*"):
        load_keyring(everyone, {})
    assert load_keyring(everyone, {"SPECSERVE_API_KEYS": f"alice:inference:{KEY}"})
    assert not load_keyring(ServerConfig(allowed_origins=("*",), allow_public=True), {})
