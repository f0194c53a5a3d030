"""EngineConfig: frozen Structs, filled from a TOML file, flags or keyword arguments.

An unknown key is an error that names it. Field names are unique over all sections, so flags and
keyword arguments need no section.
"""

import re
import tomllib
from collections.abc import Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final, Literal, TypedDict
from urllib.parse import urlsplit

import msgspec
from msgspec import Struct

from specserve.files import quoted

MAX_MODEL_NAME: Final = 256  # characters of the name that requests pass as `model`

_ORIGIN: Final = re.compile(r"[a-z][a-z0-9+.-]*://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:[0-9]+)?")
_DEFAULT_PORTS: Final = {"http": 80, "https": 443}
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class ConfigError(ValueError):
    """An invalid setting; the message names the setting, its value and the fix."""


def parse_bytes(name: str, text: str) -> int:
    """The bytes of a size such as '512MiB', '2GB', '1.5G' or '4096'. Units are powers of 1024.

    Raises ConfigError, naming the setting `name`, if `text` is not a positive size.
    """
    cleaned = text.strip().upper().removesuffix("B").removesuffix("I")
    unit = cleaned[-1:] if cleaned[-1:] in "KMGT" else ""
    try:
        size = int(float(cleaned.removesuffix(unit)) * _UNITS[unit])
    except (ValueError, OverflowError):
        size = -1
    if size <= 0:
        raise ConfigError(f"{name}: {text!r} is not a size; write it like '2GiB' or '512MiB'")
    return size


def check_model_name(name: str) -> None:
    """Raise ConfigError for a name that no request can pass as `model`."""
    if not 0 < len(name) <= MAX_MODEL_NAME or not name.isprintable():
        raise ConfigError(
            f"served_model_name: {name[:40]!r} ({len(name)} characters) cannot be asked for; give "
            f"1 to {MAX_MODEL_NAME} printable characters"
        )


def check_origins(origins: Collection[str]) -> None:
    """Raise ConfigError unless these are origins as browsers send them, or "*" alone."""
    for origin in origins:
        if origin == "*" and len(origins) > 1:
            raise ConfigError("allowed_origins: '*' allows all pages; give it alone")
        if origin == "*" or (_ORIGIN.fullmatch(origin) and origin == _origin_of(origin)):
            continue
        meant = _origin_of(origin)
        fix = repr(meant) if _ORIGIN.fullmatch(meant) else "scheme://host[:port], one each time"
        raise ConfigError(
            f"allowed_origins: {origin[:80]!r} is not an origin as browsers send it; write {fix}, "
            "or '*' for all"
        )


def _origin_of(url: str) -> str:
    """The origin of a URL in the form that browsers send; an empty string if it has none."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        return ""
    shown = "" if port in (None, _DEFAULT_PORTS.get(parts.scheme)) else f":{port}"
    return f"{parts.scheme}://{f'[{host}]' if ':' in host else host}{shown}"


def _in_range(name: str, value: float | None, low: float, high: float) -> None:
    if value is not None and not low <= value <= high:
        raise ConfigError(f"{name}: {value} is out of range; expected {low} to {high}")


class TargetConfig(Struct, frozen=True, forbid_unknown_fields=True):
    target: str = "smollm2-135m"  # alias, directory, .gguf file or hub id
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantization: Literal["auto", "none", "int8", "int4"] = "auto"  # of the weights
    device: str = "auto"  # auto, cpu, cuda, cuda:N
    max_model_len: int | None = None  # tokens of prompt and output together; None: the model's
    exactness: Literal["auto", "exact", "fast"] = "auto"  # see `engine.device.Platform`
    threads: int | None = None  # CPU threads; None: torch's choice
    generation_config: str = "auto"  # defaults of sampling: the model's (auto), none, a directory


class CacheConfig(Struct, frozen=True, forbid_unknown_fields=True):
    block_size: int = 16  # tokens per KV block
    kv_memory: str | None = None  # such as "2GiB"; None: a part of the free memory
    prefix_caching: bool = True


class DraftConfig(Struct, frozen=True, forbid_unknown_fields=True):
    # Names or checkpoints of drafters, whose trees are merged; 'a,b' is read as two of them.
    draft: tuple[str, ...] = ("auto",)
    max_nodes: int = 8  # nodes of a sequence's tree, root included
    cost_aware: bool = True  # leave out drafters and nodes that cost more time than they save
    options: dict[str, dict[str, Any]] = {}  # by drafter name


class ScheduleConfig(Struct, frozen=True, forbid_unknown_fields=True):
    max_num_seqs: int = 32  # sequences that run together
    max_num_batched_tokens: int = 256  # tokens of one forward pass: tree nodes and prompt tokens


_SERVER_RANGES: Final[Mapping[str, tuple[float, float]]] = {
    "port": (0, 65535),
    "body_timeout": (0.1, 3600),
    "keepalive_timeout": (0.1, 3600),
    "max_connections": (1, 65536),
    "max_queued_requests": (1, 100_000),
    "max_queued_tokens": (1, 10**9),
    "max_prompt_tokens": (1, 2**24),
    "max_output_tokens": (1, 2**24),
    "request_timeout": (0.1, 86400),
    "write_timeout": (0.1, 3600),
    "drain_timeout": (0, 3600),
    "heartbeat_timeout": (1, 3600),
    "template_timeout": (0.1, 60),
    "stream_interval": (0, 1024),
    "status_interval": (0, 3600),
}


class ServerConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """Settings of the server, used by `serve` only. Times are in seconds."""

    host: str = "127.0.0.1"
    port: int = 8000  # 0: a free one
    served_model_name: str | None = None  # None: the target's name
    api_key_file: str | None = None
    allow_public: bool = False  # serve other machines and all web pages without API keys
    allowed_origins: tuple[str, ...] = ()  # of the web pages that may use the server; "*": all
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    max_body_bytes: str = "8MiB"
    body_timeout: float = 30.0  # for the whole body of a request
    keepalive_timeout: float = 30.0  # of an idle connection; also for the headers of a request
    max_connections: int = 1024  # with accepted requests; an eighth more (16 at least) may be open
    max_queued_requests: int = 256  # sequences waiting for the engine
    max_queued_tokens: int = 1_000_000  # prompt tokens of the waiting sequences
    max_prompt_tokens: int | None = None  # per prompt; None: what the context has room for
    max_output_tokens: int | None = None  # per sequence; None: until the context is full
    request_timeout: float = 600.0  # a request's time limit; it may set a shorter one
    write_timeout: float = 30.0  # a client that reads nothing for so long is disconnected
    drain_timeout: float = 30.0  # for accepted requests to finish, after a stop signal
    heartbeat_timeout: float = 30.0  # of silence, then the engine is restarted; longer in a step
    template_timeout: float = 5.0  # of processor time, to render one chat or tokenize one text
    stream_interval: int = 0  # tokens per streamed event; 0: the tokens of one forward pass
    status_interval: float = 10.0  # between status lines; 0: none

    def __post_init__(self) -> None:
        for name in ("host", "served_model_name", "api_key_file", "ssl_certfile", "ssl_keyfile"):
            if getattr(self, name) == "":
                raise ConfigError(f"{name}: is empty; leave it out for the default")
        if self.served_model_name is not None:
            check_model_name(self.served_model_name)
        check_origins(self.allowed_origins)
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            missing = "ssl_certfile" if self.ssl_certfile is None else "ssl_keyfile"
            raise ConfigError(f"{missing}: is missing; TLS needs both ssl_certfile and ssl_keyfile")
        size = parse_bytes("max_body_bytes", self.max_body_bytes)
        if not 2**10 <= size <= 2**28:
            raise ConfigError(
                f"max_body_bytes: {self.max_body_bytes!r} is out of range; expected 1KiB to 256MiB"
            )
        for name, (low, high) in _SERVER_RANGES.items():
            _in_range(name, getattr(self, name), low, high)


class EngineConfig(Struct, frozen=True, forbid_unknown_fields=True):
    target: TargetConfig = TargetConfig()
    cache: CacheConfig = CacheConfig()
    draft: DraftConfig = DraftConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    server: ServerConfig = ServerConfig()

    def __post_init__(self) -> None:
        _in_range("threads", self.target.threads, 1, 1024)
        _in_range("max_model_len", self.target.max_model_len, 2, 2**24)
        if self.cache.block_size not in (8, 16, 32, 64, 128):
            raise ConfigError(
                f"block_size: {self.cache.block_size} is not supported; use 8, 16, 32, 64 or 128"
            )
        _in_range("max_nodes", self.draft.max_nodes, 1, 64)
        if not self.draft.draft:
            raise ConfigError("draft: no drafter given; use 'none' to decode plainly")
        if "none" in self.draft.draft and len(self.draft.draft) > 1:
            raise ConfigError(
                f"draft: 'none' cannot be combined with others, got {list(self.draft.draft)}"
            )
        if len(set(self.draft.draft)) < len(self.draft.draft):
            raise ConfigError(f"draft: {list(self.draft.draft)} names one twice; give each once")
        num_seqs, num_tokens = self.schedule.max_num_seqs, self.schedule.max_num_batched_tokens
        _in_range("max_num_seqs", num_seqs, 1, 4096)
        _in_range("max_num_batched_tokens", num_tokens, num_seqs, 65536)
        if self.cache.kv_memory is not None:
            parse_bytes("kv_memory", self.cache.kv_memory)


class EngineSettings(TypedDict, total=False):
    """The keyword arguments of `LLM` and `AsyncLLM`, beside `target` and `draft`.

    They are the fields of the engine's sections of `EngineConfig`; `field_help` describes them.
    """

    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    quantization: Literal["auto", "none", "int8", "int4"]
    device: str
    max_model_len: int | None
    exactness: Literal["auto", "exact", "fast"]
    threads: int | None
    generation_config: str
    block_size: int
    kv_memory: str | None
    prefix_caching: bool
    max_nodes: int
    cost_aware: bool
    options: dict[str, dict[str, Any]]
    max_num_seqs: int
    max_num_batched_tokens: int


SECTION_TYPES: Final[Mapping[str, type[Struct]]] = {
    section.name: section.type for section in msgspec.structs.fields(EngineConfig)
}
ALL_SECTIONS: Final = EngineConfig.__struct_fields__
ENGINE_SECTIONS: Final = tuple(name for name in ALL_SECTIONS if name != "server")
ENGINE_DEFAULTS: Final[Mapping[str, Any]] = {
    field.name: field.default_factory() if field.default is msgspec.NODEFAULT else field.default
    for section in ENGINE_SECTIONS
    for field in msgspec.structs.fields(SECTION_TYPES[section])
}


def load_config(
    settings: Mapping[str, Any],
    file: Path | None = None,
    *,
    sections: Collection[str] = ENGINE_SECTIONS,
) -> EngineConfig:
    """Load the configuration from a TOML `file`, overridden by `settings` (field name -> value).

    `settings` may hold fields of `sections` only; the file may have all sections. Raises
    ConfigError on an unknown key, a wrong type or a value out of range.
    """
    merged: dict[str, dict[str, Any]] = {} if file is None else _read_sections(file)
    section_of = {
        name: section for section, kind in SECTION_TYPES.items() for name in kind.__struct_fields__
    }
    for name, value in settings.items():
        if name not in section_of:
            known = [key for key in section_of if section_of[key] in sections]
            raise unknown_setting(name, name, known)
        if section_of[name] not in sections:
            raise ConfigError(
                f"{name}: is a setting of the {section_of[name]}, which does not run here; "
                "leave it out"
            )
        merged.setdefault(section_of[name], {})[name] = value
    if "draft" in (chosen := merged.get("draft", {})):
        merged["draft"] = {**chosen, "draft": _split_drafts(chosen["draft"])}
    try:
        return msgspec.convert(merged, EngineConfig)
    except msgspec.ValidationError as error:
        reason = error.__cause__ or _misread(str(error), merged)  # the cause: a ConfigError
        raise ConfigError(f"{'' if file is None else f'{file}: '}{reason}") from error


def _split_drafts(value: Any) -> Any:
    """'a,b', ['a', 'b'] and ['a,b'] are the same drafters. Other types are left to the decoder."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        return value
    parts = [part.strip() for text in texts for part in text.split(",")]
    if not all(parts):
        raise ConfigError(f"draft: {value!r} has an empty name; write NAME or NAME,NAME")
    return parts


def llm_config(
    target: str | None,
    draft: str | Sequence[str] | None,
    file: Path | None,
    settings: Mapping[str, Any],
) -> EngineConfig:
    """`load_config` for the arguments of `LLM` and `AsyncLLM`. Raises ConfigError."""
    named: dict[str, Any] = dict(settings)
    if target is not None:
        named["target"] = target
    if draft is not None:
        named["draft"] = draft
    return load_config(named, file)


def _misread(message: str, sections: dict[str, dict[str, Any]]) -> str:
    """The decoder's error message, prefixed with the setting and its value."""
    reason, _, place = message.replace("`", "").replace(" | null", "").partition(" - at $.")
    section, _, name = place.partition(".")
    name = name.partition("[")[0]
    value = quoted(sections.get(section, {}).get(name))
    return f"{section}.{name}: {value}; {reason[:1].lower()}{reason[1:]}"


def read_toml(setting: str, file: Path) -> dict[str, Any]:
    """The contents of the TOML file that `setting` names. Raises ConfigError."""
    try:
        return tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"{setting}: {file} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{setting}: {file} is not valid TOML: {error}") from error


def _read_sections(file: Path) -> dict[str, dict[str, Any]]:
    sections = read_toml("config", file)
    for name, values in sections.items():
        if name not in SECTION_TYPES:
            raise unknown_setting(f"{file}: {name}", name, SECTION_TYPES)
        if not isinstance(values, dict):
            raise ConfigError(f"{file}: {name}: is a section; write [{name}] and its keys below")
        known = SECTION_TYPES[name].__struct_fields__
        for key in values:
            if key not in known:
                raise unknown_setting(f"{file}: {name}.{key}", key, known)
    return sections


def unknown_setting(path: str, name: str, known: Iterable[str]) -> ConfigError:
    """The error for the setting `name`, found at `path`, which is not one of the `known` ones."""
    close = get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
    return ConfigError(f"{path}: unknown setting; {hint}")
