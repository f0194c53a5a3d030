"""Access and leaks: keys and scopes on every route, TLS, caches, origins, packet sizes."""

import http.client
import json
import shutil
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import pytest
from live import LiveServer, events, start_server

from specserve.server.app import build_app
from specserve.server.auth import Keyring
from specserve.server.service import Service

ALICE, BOB, METER = "alice-0123456789abcdef", "bob-0123456789abcdefgh", "meter-0123456789abcdef"
KEYS = f"alice:inference:{ALICE} bob:inference,metrics:{BOB} meter:metrics:{METER}"
PUBLIC = {"/health", "/ready", "/version", "/openapi.json", "/docs"}
QUESTION = {"prompt": "What is it that comes next? " * 4, "max_tokens": 4, "seed": 1}


@pytest.fixture(scope="module")
def locked(chat_model: Path) -> Iterator[LiveServer]:
    with start_server(chat_model, "--stream-interval", "8", SPECSERVE_API_KEYS=KEYS) as server:
        yield server


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def all_routes() -> list[tuple[str, str]]:
    """Method and path of every route."""
    app = build_app(cast(Service, None), Keyring())
    routes = [
        (route.method, route.resource.canonical.replace("{model}", "tiny-chat"))
        for route in app.router.routes()
        if route.resource is not None
    ]
    assert {"/metrics", "/v1/completions", "/v1/models/tiny-chat"} < {path for _, path in routes}
    return routes


@pytest.mark.parametrize(("method", "path"), all_routes())
def test_only_the_public_routes_are_open(locked: LiveServer, method: str, path: str) -> None:
    body = b"{ no JSON, and nobody looks" if method == "POST" else None
    for headers in ({}, bearer("wrong-0123456789abcdef"), bearer(""), {"x-api-key": "\xff" * 20}):
        reply = locked.ask(path, body, method=method, headers=headers)
        assert reply.status == (200 if path in PUBLIC else 401), (path, headers)
        if reply.status == 401:
            assert reply.headers["www-authenticate"] == "Bearer"
            assert method == "HEAD" or reply.json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize(
    "given",
    [
        *("", "Bearer", "Bearer ", f"Bearer  {ALICE}", f"Bearer {ALICE} {ALICE}", f"Basic {ALICE}"),
        *(ALICE, f"Bearer {ALICE[:-1]}", f"Bearer {ALICE}x", f"Bearer {ALICE.upper()}"),
        *("Bearer \xff\xfe", "Bearer " + "x" * 8000, f"Bearer {ALICE}, Bearer {BOB}"),
    ],
)
def test_malformed_credentials(locked: LiveServer, given: str) -> None:
    reply = locked.ask("/v1/models", headers={"Authorization": given})
    assert (reply.status, reply.headers["www-authenticate"]) == (401, "Bearer")
    assert "0123" not in reply.body.decode()


def test_keys_have_their_scopes(locked: LiveServer) -> None:
    for key, models, metrics in [(ALICE, 200, 403), (BOB, 200, 200), (METER, 403, 200)]:
        assert locked.ask("/v1/models", headers=bearer(key)).status == models
        assert locked.ask("/metrics", headers=bearer(key)).status == metrics
        assert locked.ask("/v1/models", headers={"x-api-key": key}).status == models
    error = locked.ask("/v1/completions", QUESTION, headers=bearer(METER)).json()["error"]
    assert error["type"] == "permission_error"
    assert "inference" in error["message"]


@pytest.mark.parametrize(
    ("line", "host", "statuses"),
    [
        ("GET /v1/models HTTP/1.1", "a/health?", {400, 401}),
        ("GET /v1/models HTTP/1.1", "a/health#", {400, 401}),
        ("GET /v1/%6dodels HTTP/1.1", "a", {401}),
        ("GET http://a/v1/models HTTP/1.1", "a", {400, 401}),
        ("GET http://a/health/../v1/models HTTP/1.1", "a", {400, 401, 404}),
        ("GET http://a:0/health@b/v1/models HTTP/1.1", "a", {400, 401, 404}),
        ("GET //v1/models HTTP/1.1", "a", {400, 401, 404}),
        ("GET /v1//models HTTP/1.1", "a", {400, 401, 404}),
        ("GET /health/../v1/models HTTP/1.1", "a", {400, 401, 404}),
        ("GET /health%2f..%2fv1/models HTTP/1.1", "a", {400, 401, 404}),
        ("GET /V1/MODELS HTTP/1.1", "a", {401, 404}),
        ("GET /v1/models?/health HTTP/1.1", "a", {401}),
        ("GET /v1/models;/health HTTP/1.1", "a", {401, 404}),
        ("OPTIONS /v1/models HTTP/1.1", "a", {401, 405}),
        ("POST /v1/models HTTP/1.1", "a", {401, 405}),
        ("GET /metrics HTTP/1.0", "a", {401}),
    ],
)
def test_no_spelling_of_a_path_bypasses_the_keys(
    locked: LiveServer, line: str, host: str, statuses: set[int]
) -> None:
    reply = raw(locked, f"{line}\r\nHost: {host}\r\nConnection: close\r\n\r\n")
    status = int(reply.split(b" ", 2)[1])
    assert status in statuses, reply
    assert b"tiny-chat" not in reply
    assert b"vllm:" not in reply


def raw(server: LiveServer, text: str) -> bytes:
    """The bytes that the server returns for `data`."""
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port), timeout=10) as connection:
        connection.sendall(text.encode())
        return b"".join(iter(lambda: connection.recv(65536), b""))


def test_keys_do_not_leak(locked: LiveServer) -> None:
    """Keys appear in no other process, in no log and in no metric."""
    locked.ask("/v1/models", headers=bearer("a-wrong-key-that-is-a-secret-too"))
    children = locked.children()
    assert len(children) >= 2
    places = {command: Path(f"/proc/{pid}/environ").read_bytes() for pid, command in children}
    places["log"] = locked.log.read_bytes()
    places["metrics"] = locked.ask("/metrics", headers=bearer(BOB)).body
    for secret in (ALICE, BOB, METER, "a-wrong-key"):
        assert [name for name, place in places.items() if secret.encode() in place] == []


def test_cached_prefixes_are_not_shared_between_keys(locked: LiveServer) -> None:
    def num_cached(key: str, **more: Any) -> int:
        reply = locked.ask("/v1/completions", {**QUESTION, **more}, headers=bearer(key))
        count: int = reply.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
        return count

    assert num_cached(ALICE) == 0
    own = num_cached(ALICE)
    assert own >= 64
    assert num_cached(BOB) == 0, "another key's prompt shows"
    assert num_cached(BOB) == own
    assert num_cached(ALICE, cache_salt="one of my users") == 0
    assert num_cached(ALICE, cache_salt="one of my users") == own
    assert num_cached(ALICE, cache_salt="another") == 0


def test_cross_origin_requests_get_no_permission(locked: LiveServer) -> None:
    origin = {"Origin": "https://example.com", "Access-Control-Request-Method": "POST"}
    for method, path in [("OPTIONS", "/v1/completions"), ("GET", "/health"), ("GET", "/v1/models")]:
        for headers in (origin, origin | bearer(ALICE)):
            reply = locked.ask(path, method=method, headers=headers)
            assert not [name for name in reply.headers if name.startswith("access-control-")]


@pytest.mark.parametrize("speculation", [{}, {"enabled": False}])
def test_events_of_a_fixed_number_of_tokens(
    locked: LiveServer, speculation: dict[str, Any]
) -> None:
    """However many tokens a forward pass accepts."""
    body = {**QUESTION, "max_tokens": 60, "ignore_eos": True, "temperature": 0}
    body |= {"stream": True, "return_token_ids": True, "speculation": speculation}
    for length, expected in ((60, [8] * 7 + [4]), (64, [8] * 8)):
        reply = locked.ask("/v1/completions", body | {"max_tokens": length}, headers=bearer(ALICE))
        sizes = [
            len(choice["token_ids"]) for event in events(reply.body) for choice in event["choices"]
        ]
        assert sizes == expected


def test_other_machines_need_keys(chat_model: Path) -> None:
    command = [sys.executable, "-m", "specserve.cli", "serve", str(chat_model)]
    done = subprocess.run(
        [*command, "--host", "0.0.0.0", "--port", "0"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "host: 0.0.0.0 can be reached from other machines" in done.stderr
    assert "--api-key-file" in done.stderr
    assert "--allow-public" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes the certificate")
def test_https(chat_model: Path, tmp_path: Path) -> None:
    certificate, key, keys = (tmp_path / name for name in ("cert.pem", "key.pem", "keys"))
    command = f"openssl req -x509 -newkey rsa:2048 -nodes -days 1 -keyout {key} -out {certificate}"
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*command.split(), *names], check=True, capture_output=True)
    keys.write_text(f"# who\nalice:inference:{ALICE}\n")
    keys.chmod(0o600)
    flags = ("--ssl-certfile", str(certificate), "--ssl-keyfile", str(key))
    with start_server(chat_model, *flags, "--api-key-file", str(keys)) as server:
        assert server.url.startswith("https://127.0.0.1:")
        trusted = ssl.create_default_context(cafile=str(certificate))
        address = urlsplit(server.url).netloc
        connection = http.client.HTTPSConnection(address, timeout=30, context=trusted)
        for headers, status in ((bearer(ALICE), 200), ({}, 401)):
            headers = headers | {"Content-Type": "application/json"}
            connection.request("POST", "/v1/completions", json.dumps(QUESTION), headers)
            reply = connection.getresponse()
            assert (reply.status, bool(reply.read())) == (status, True)
        connection.close()
        plain = http.client.HTTPConnection(address, timeout=30)
        plain.request("GET", "/health")
        with pytest.raises((http.client.HTTPException, ConnectionError)):
            plain.getresponse()
        plain.close()
