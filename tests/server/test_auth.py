"""API keys: parsing, authentication, scopes, and that no message contains a key."""

import asyncio
import logging
from pathlib import Path

import pytest
from aiohttp import test_utils, web
from aiohttp.typedefs import Handler
from hypothesis import given
from hypothesis import strategies as st

from specserve.config import ConfigError, ServerConfig
from specserve.server.auth import (
    ANONYMOUS,
    KEYS_VARIABLE,
    PRINCIPAL,
    Keyring,
    Scope,
    authorise,
    load_keyring,
)
from specserve.server.errors import APIError

ALICE, BOB, ROOT = "alice-0123456789", "bob-0123456789-é", "root:0123456789ab"
ENTRIES = [
    ("line 1", f"alice:inference:{ALICE}"),
    ("line 2", f"bob:inference,metrics:{BOB}"),
    ("line 3", f"root:admin:{ROOT}"),
]
RING = Keyring(ENTRIES)


def bearer(key: str) -> str:
    return f"Bearer {key}"


def who(authorization: str | bytes | None, api_key: str | None = None) -> str | None:
    caller = RING.authenticate(authorization, api_key)
    return None if caller is None else caller.name


@pytest.mark.parametrize(
    ("authorization", "name"),
    [
        (bearer(ALICE), "alice"),
        (bearer(BOB), "bob"),
        (bearer(ROOT), "root"),
        (f"bEARER {ALICE}", "alice"),
        (bearer(ALICE).encode(), "alice"),
        (None, None),
        ("", None),
        ("Bearer", None),
        ("Bearer ", None),
        (f"Bearer  {ALICE}", None),
        (f"Bearer\t{ALICE}", None),
        (f"Basic {ALICE}", None),
        (ALICE, None),
        (bearer(ALICE + "x"), None),
        (bearer(ALICE[:-1]), None),
        (bearer(ALICE.upper()), None),
        (bearer("x" * 8192), None),
        (bearer("\udcff\udcfe" * 8), None),
        (bearer("\ud800"), None),
        (b"Bearer \xff\xfe", None),
        (bearer("\0" * 16), None),
    ],
)
def test_bearer(authorization: str | bytes | None, name: str | None) -> None:
    assert who(authorization) == name


def test_x_api_key_counts_without_authorization() -> None:
    assert who(None, ALICE) == "alice"
    assert who(None, bearer(ALICE)) is None
    assert who(bearer(BOB), ALICE) == "bob"
    assert who("Bearer nonsense", ALICE) is None


@given(st.one_of(st.none(), st.binary(), st.text(st.characters(exclude_categories=()))))
def test_no_header_raises(header: str | bytes | None) -> None:
    assert RING.authenticate(header, header) is None


def test_the_key_is_compared_with_every_known_key(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bytes] = []

    def compare(known: bytes, digest: bytes) -> bool:
        compared.append(known)
        return known == digest

    monkeypatch.setattr("specserve.server.auth.hmac.compare_digest", compare)
    assert who(bearer(ALICE)) == "alice"  # the first one
    assert len(compared) == len(set(compared)) == 3


def test_keys_are_not_stored() -> None:
    inside = repr(vars(RING)) + "".join(repr(RING.authenticate(bearer(ROOT))))
    assert not any(key in inside for key in (ALICE, BOB, ROOT))


def test_without_keys_every_caller_is_anonymous() -> None:
    assert Keyring().authenticate(None) is ANONYMOUS
    assert Keyring().authenticate("Basic x") is ANONYMOUS
    assert Scope.ADMIN not in ANONYMOUS.scopes


@pytest.mark.parametrize(
    ("key", "scopes"),
    [
        (ALICE, {Scope.INFERENCE}),
        (BOB, {Scope.INFERENCE, Scope.METRICS}),
        (ROOT, {Scope.INFERENCE, Scope.METRICS, Scope.ADMIN}),
    ],
)
def test_scopes(key: str, scopes: set[Scope]) -> None:
    caller = RING.authenticate(bearer(key))
    assert caller is not None
    assert caller.scopes == scopes


def test_salts_differ_by_key_and_are_stable() -> None:
    callers = [RING.authenticate(bearer(key)) for key in (ALICE, BOB, ROOT)]
    salts = [caller.cache_salt for caller in callers if caller is not None]
    assert len(set(salts)) == 3
    assert all(len(salt) == 64 for salt in salts)
    (again,) = [Keyring(ENTRIES[:1]).authenticate(bearer(ALICE))]
    assert again is not None
    assert again.cache_salt == salts[0]


@pytest.mark.parametrize(
    ("lines", "line", "words"),
    [
        (["alice"], 1, "name:scopes:key"),
        (["alice:0123456789abcdefgh"], 1, "name:scopes:key"),
        (["", "# keys", "alice:0123456789abcdefgh:inference"], 3, "use inference, metrics, admin"),
        (["alice:inference;admin:0123456789abcdefgh"], 1, "use inference, metrics, admin"),
        (["alice::0123456789abcdefgh"], 1, "use inference, metrics, admin"),
        (["0123 456789abcdefgh:inference:alice"], 1, "a name is"),
        ([":inference:0123456789abcdefgh"], 1, "a name is"),
        (["alice:inference:0123456789abcde"], 1, "16 to 1024 bytes"),
        (["alice:inference:" + "0123456789abcdefgh" * 100], 1, "16 to 1024 bytes"),
        (["alice:inference:0123456789 abcdefgh"], 1, "no spaces"),
        (
            ["alice:inference:0123456789abcdefgh", "alice:inference:abcdefgh0123456789"],
            2,
            "its name is used twice",
        ),
        (
            ["alice:inference:0123456789abcdefgh", "bob:inference:0123456789abcdefgh"],
            2,
            "its key is used twice",
        ),
    ],
)
def test_an_invalid_entry_is_located_but_not_quoted(
    tmp_path: Path, lines: list[str], line: int, words: str
) -> None:
    file = tmp_path / "keys"
    file.write_text("\n".join(lines))
    with pytest.raises(ConfigError) as caught:
        load_keyring(ServerConfig(api_key_file=str(file)), {})
    assert f"{file} line {line}: " in str(caught.value)
    assert words in str(caught.value)
    assert "0123" not in str(caught.value)


def test_keys_from_file_and_environment(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# ours\n\n  {ENTRIES[0][1]}  \n{ENTRIES[1][1]}\n", encoding="utf-8")
    file.chmod(0o600)
    environ = {KEYS_VARIABLE: f" {ENTRIES[2][1]}\n  x:metrics:abcdefghabcdefgh", "OTHER": "1"}
    ring = load_keyring(ServerConfig(api_key_file=str(file)), environ)
    assert len(ring) == 4
    assert environ == {"OTHER": "1"}  # a child inherits no keys
    assert not caplog.records
    file.chmod(0o640)
    load_keyring(ServerConfig(api_key_file=str(file)), {})
    (record,) = caplog.records
    assert (record.levelno, str(file) in record.message) == (logging.WARNING, True)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read"),
        (b"", "holds no key"),
        (b"# x\n", "holds no key"),
        (b"\xff", "UTF-8"),
    ],
)
def test_an_invalid_key_file_is_located(tmp_path: Path, content: bytes | None, words: str) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=f"api_key_file: .*keys .*{words}"):
        load_keyring(ServerConfig(api_key_file=str(file)), {})


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("", "holds no key"),
        (" ", "holds no key"),
        ("a:metrics:0123456789abcdefgh x", "key 2: expe"),
    ],
)
def test_an_invalid_variable_is_named(value: str, words: str) -> None:
    with pytest.raises(ConfigError, match=f"{KEYS_VARIABLE}: {words}"):
        load_keyring(ServerConfig(), {KEYS_VARIABLE: value})


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "192.168.0.1", "example.org", "127.1", "localhost."]
)
def test_other_machines_need_keys(host: str) -> None:
    with pytest.raises(ConfigError, match=r"host: .*--api-key-file or .*--allow-public"):
        load_keyring(ServerConfig(host=host), {})
    assert len(load_keyring(ServerConfig(host=host, allow_public=True), {})) == 0
    assert len(load_keyring(ServerConfig(host=host), {KEYS_VARIABLE: ENTRIES[0][1]})) == 1


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_needs_no_keys(host: str) -> None:
    assert len(load_keyring(ServerConfig(host=host), {})) == 0


async def health(request: web.Request) -> web.Response:
    return web.json_response(request[PRINCIPAL].name)


async def infer(request: web.Request) -> web.Response:
    return web.json_response(request[PRINCIPAL].name)


async def stop(request: web.Request) -> web.Response:
    return web.json_response(request[PRINCIPAL].name)


async def unlisted(request: web.Request) -> web.Response:
    return web.json_response("secret")


@web.middleware
async def render(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except APIError as error:
        return error.response()
    except KeyError:
        return web.json_response(status=500)


def build(keyring: Keyring) -> web.Application:
    scopes: dict[object, Scope | None] = {health: None, infer: Scope.INFERENCE, stop: Scope.ADMIN}
    app = web.Application(middlewares=[render, authorise(keyring, scopes)])
    app.router.add_get("/health", health)
    app.router.add_post("/v1/{kind}/infer", infer)
    app.router.add_get("/admin", stop)
    return app


def ask(
    app: web.Application, method: str, path: str, **headers: str
) -> tuple[int, dict[str, str], object]:
    async def ask() -> tuple[int, dict[str, str], object]:
        async with (
            test_utils.TestClient(test_utils.TestServer(app)) as client,
            client.request(method, path, headers=headers) as response,
        ):
            return response.status, dict(response.headers), await response.json()

    return asyncio.run(ask())


@pytest.mark.parametrize(
    ("method", "path", "key", "status"),
    [
        ("GET", "/health", None, 200),
        ("GET", "/health", "nonsense", 200),
        ("POST", "/v1/x/infer", None, 401),
        ("POST", "/v1/x/infer", "nonsense", 401),
        ("POST", "/v1/x/infer", ALICE, 200),
        ("POST", "/v1/x/infer", ROOT, 200),
        ("POST", "/v1/%78/%69nfer", None, 401),
        ("POST", "/v1/health/infer", None, 401),
        ("GET", "/admin", ALICE, 403),
        ("GET", "/admin", ROOT, 200),
        ("GET", "/nowhere", None, 404),
        ("GET", "/v1/x/infer", None, 405),
    ],
)
def test_a_route_requires_its_scope(method: str, path: str, key: str | None, status: int) -> None:
    @web.middleware
    async def unknown(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except web.HTTPException as error:
            return web.json_response(status=error.status)

    app = build(RING)
    app.middlewares.insert(0, unknown)
    headers = {} if key is None else {"Authorization": bearer(key)}
    assert ask(app, method, path, **headers)[0] == status


def test_a_refusal_says_what_to_send() -> None:
    status, headers, body = ask(build(RING), "POST", "/v1/x/infer")
    assert (status, headers["WWW-Authenticate"]) == (401, "Bearer")
    assert body == {
        "error": {
            "message": "no API key given; send the header 'Authorization: Bearer KEY'",
            "type": "authentication_error",
            "param": None,
            "code": "invalid_api_key",
        }
    }
    _, _, body = ask(build(RING), "GET", "/admin", **{"X-API-Key": BOB.replace("é", "e")})
    assert "unknown API key" in str(body)
    assert "0123" not in str(body)
    _, _, body = ask(build(RING), "GET", "/admin", **{"X-API-Key": ALICE})
    assert "the scope 'admin'" in str(body)


def test_a_handler_knows_the_caller() -> None:
    assert ask(build(RING), "POST", "/v1/x/infer", **{"X-API-Key": ALICE})[2] == "alice"
    assert ask(build(Keyring()), "POST", "/v1/x/infer")[2] == "anonymous"
    assert ask(build(Keyring()), "GET", "/admin")[0] == 403


def test_a_route_without_an_entry_for_its_scope_is_refused() -> None:
    app = build(RING)
    app.router.add_get("/unlisted", unlisted)
    assert ask(app, "GET", "/unlisted", Authorization=bearer(ROOT))[0] == 500
