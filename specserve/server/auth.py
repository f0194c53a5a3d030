"""Authentication and authorisation: API keys, their scopes, and the scope each route requires.

Keys are stored only as SHA-256 digests, and no message contains a key. Authorisation depends on
the handler that the router matched, never on the request's path.
"""

import hashlib
import hmac
import ipaddress
import logging
import os
import re
import stat
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from specserve.config import ConfigError, ServerConfig
from specserve.server.errors import APIError

logger = logging.getLogger(__name__)

KEYS_VARIABLE: Final = "SPECSERVE_API_KEYS"
_MIN_KEY: Final = 16  # bytes
_MAX_KEY: Final = 1024  # bytes
_NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Scope(StrEnum):
    INFERENCE = "inference"
    METRICS = "metrics"
    ADMIN = "admin"  # implies the others


@dataclass(frozen=True, slots=True)
class Principal:
    """The caller of a request. `cache_salt` separates its cached prefixes from other keys'."""

    name: str
    scopes: frozenset[Scope]
    cache_salt: str = ""


ANONYMOUS: Final = Principal("anonymous", frozenset({Scope.INFERENCE, Scope.METRICS}))
PRINCIPAL: Final = web.RequestKey("principal", Principal)
SCOPE: Final = web.RequestKey("scope", Scope)  # that the route requires; absent if it is public


class Keyring:
    """The API keys of a server.

    Takes (location, entry) pairs, where an entry is `name:scopes:key`. Raises ConfigError, whose
    message names the location and never contains the entry.
    """

    def __init__(self, entries: Iterable[tuple[str, str]] = ()) -> None:
        self._keys: list[tuple[bytes, Principal]] = []
        for where, entry in entries:
            digest, principal = _parse(where, entry)
            if any(principal.name == other.name for _, other in self._keys):
                raise ConfigError(f"{where}: its name is used twice; give every key its own")
            if any(digest == other for other, _ in self._keys):
                raise ConfigError(f"{where}: its key is used twice; give every name its own")
            self._keys.append((digest, principal))

    def __len__(self) -> int:
        return len(self._keys)

    def authenticate(
        self, authorization: str | bytes | None, api_key: str | bytes | None = None
    ) -> Principal | None:
        """The owner of the key in the Authorization or x-api-key header; None without a known key.

        Authorization takes precedence. The key is compared with every known key, also after a
        match. A server without keys returns ANONYMOUS for every request.
        """
        if not self._keys:
            return ANONYMOUS
        if authorization is not None:
            scheme, _, key = _to_bytes(authorization).partition(b" ")
            if scheme.lower() != b"bearer":
                return None
        elif api_key is not None:
            key = _to_bytes(api_key)
        else:
            return None
        digest = hashlib.sha256(key).digest()
        found = [who for known, who in self._keys if hmac.compare_digest(known, digest)]
        return found[0] if found else None


def load_keyring(config: ServerConfig, environ: MutableMapping[str, str] = os.environ) -> Keyring:
    """The keys of `api_key_file` and of SPECSERVE_API_KEYS, which is removed from `environ`.

    The variable is removed so that child processes do not inherit it. Raises ConfigError for
    invalid keys, and if other machines or all web pages could use the server without a key.
    """
    entries: list[tuple[str, str]] = []
    if config.api_key_file is not None:
        entries += _read_file(Path(config.api_key_file))
    if KEYS_VARIABLE in environ:
        words = environ.pop(KEYS_VARIABLE).split()
        if not words:
            raise ConfigError(f"{KEYS_VARIABLE}: holds no key; unset it or add name:scopes:key")
        entries += [(f"{KEYS_VARIABLE}: key {at}", word) for at, word in enumerate(words, 1)]
    keyring = Keyring(entries)
    if keyring or config.allow_public:
        return keyring
    fix = (
        f"no API keys are given; give some with --api-key-file or {KEYS_VARIABLE}, or allow access "
        "without keys with --allow-public"
    )
    if not _is_loopback(config.host):
        raise ConfigError(f"host: {config.host} can be reached from other machines and {fix}")
    if "*" in config.allowed_origins:
        raise ConfigError(f"allowed_origins: '*' lets every web page use the server and {fix}")
    return keyring


def authorise(keyring: Keyring, scopes: Mapping[object, Scope | None]) -> Middleware:
    """A middleware that sets `request[PRINCIPAL]` and `request[SCOPE]`, or raises APIError.

    `scopes`: for every handler the scope that it requires; None if it needs no API key. The error
    is a 401 without a known API key and a 403 for a key without the scope.
    """

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        match = request.match_info
        if match.http_exception is None:  # otherwise no route matched: 404 or 405
            required = scopes[match.handler]
            if required is None:
                request[PRINCIPAL] = ANONYMOUS
            else:
                request[SCOPE] = required
                request[PRINCIPAL] = _authorised(keyring, request, required)
        return await handler(request)

    return middleware


def _authorised(keyring: Keyring, request: web.Request, required: Scope) -> Principal:
    authorization = request.headers.get("Authorization")
    api_key = request.headers.get("x-api-key")
    caller = keyring.authenticate(authorization, api_key)
    if caller is None:
        message = "unknown API key"
        if authorization is None and api_key is None:
            message = "no API key given; send the header 'Authorization: Bearer KEY'"
        raise APIError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
    if required not in caller.scopes:
        message = f"this needs an API key with the scope {required.value!r}"
        raise APIError(403, message, code="insufficient_scope")
    return caller


def _parse(where: str, entry: str) -> tuple[bytes, Principal]:
    """An entry's digest and owner. Error messages quote no field: a misplaced key could be any."""
    if entry.count(":") < 2:
        raise ConfigError(f"{where}: expected name:scopes:key")
    name, scopes, key = entry.split(":", 2)
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{where}: a name is up to 64 letters, digits, dots, dashes and _")
    wanted = {word.strip() for word in scopes.split(",")}
    if not wanted <= set(Scope):
        raise ConfigError(f"{where}: a scope is not known; use {', '.join(Scope)}")
    secret = key.encode()
    if not _MIN_KEY <= len(secret) <= _MAX_KEY or any(letter.isspace() for letter in key):
        raise ConfigError(f"{where}: a key has {_MIN_KEY} to {_MAX_KEY} bytes, and no spaces")
    allowed = Scope if Scope.ADMIN in wanted else map(Scope, wanted)
    digest = hashlib.sha256(secret).digest()
    salt = hmac.digest(digest, b"specserve cache salt", "sha256").hex()
    return digest, Principal(name, frozenset(allowed), salt)


def _read_file(file: Path) -> list[tuple[str, str]]:
    try:
        text = file.read_text(encoding="utf-8")
        mode = stat.S_IMODE(file.stat().st_mode)
    except OSError as error:
        raise ConfigError(f"api_key_file: {file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError:  # its message would contain bytes of the file
        raise ConfigError(f"api_key_file: {file} is not UTF-8 text") from None
    if mode & 0o077:
        logger.warning("api_key_file: other users can read %s; run chmod 600 on it", file)
    entries = [
        (f"api_key_file: {file} line {number}", line)
        for number, line in enumerate(map(str.strip, text.splitlines()), 1)
        if line and not line.startswith("#")
    ]
    if not entries:
        raise ConfigError(f"api_key_file: {file} holds no key; add lines of name:scopes:key")
    return entries


def _to_bytes(header: str | bytes) -> bytes:
    """Never raises: header bytes that are not UTF-8 reach a handler as lone surrogates."""
    return header if isinstance(header, bytes) else header.encode("utf-8", "surrogatepass")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
