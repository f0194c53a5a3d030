"""Decodes a request body into a Struct. Every mistake is a `RequestError` that names the field."""

import re
from collections.abc import Iterable
from difflib import get_close_matches
from functools import cache
from itertools import chain
from typing import Any, Final, TypeVar

import msgspec
from msgspec import inspect

from specserve.types import RequestError

T = TypeVar("T", bound=msgspec.Struct)
_type_info = cache(inspect.type_info)

UNSUPPORTED: Final = {
    **dict.fromkeys(
        (
            *("tools", "tool_choice", "functions", "function_call", "parallel_tool_calls"),
            *("response_format", "structured_outputs", "guided_json", "guided_regex"),
            "guided_choice",
        ),
        "structured output is not supported yet; leave it out",
    ),
    "chat_template": "requests cannot bring a template; the model's own is used",
    "chat_template_kwargs": "only chats have a template; leave it out",
    "suffix": "inserting text is not supported by this model; leave it out",
    "modalities": "this model writes text only; leave it out",
    "audio": "this model writes text only; leave it out",
    "reasoning_effort": "only chats have a template that may use it; leave it out",
    "verbosity": "this model has no such setting; leave it out",
    "web_search_options": "nothing is ever fetched; leave it out",
    "logits_processors": "requests cannot bring code; leave it out",
    "best_of": "choosing among more samples is not supported; ask for all of them with n",
    "use_beam_search": "beam search is not supported; leave it out",
}
# Values of unsupported fields that are accepted because they ask for the default behaviour.
_NO_EFFECT_VALUES: Final[dict[str, list[Any]]] = {
    "response_format": [{"type": "text"}],
    "tool_choice": ["none"],
    "modalities": [["text"]],
    "best_of": [1],
    "use_beam_search": [False],
    "parallel_tool_calls": [True, False],
}
_PATH: Final = re.compile(r"(.*) - at `(?:key in )?\$(.*)`$", re.DOTALL)
_STEPS: Final = re.compile(r"\.([^.[\]]+)|\[(\d+|\.\.\.)\]")
_FIELD: Final = re.compile(r"(?:unknown|required) field `(.*)`$", re.DOTALL)
_GOT: Final = re.compile(r", got \w+$")
_MAX_QUOTED: Final = 40  # characters of a string value that a message quotes


def decode(body: bytes, request_type: type[T]) -> T:
    """The request in `body`. Raises RequestError, also for unknown and unsupported fields."""
    fields = _decode_object(body)
    known = request_type.__struct_fields__
    for name in list(fields):
        if name in known:
            continue
        if name not in UNSUPPORTED:
            shown = _shortened(name)  # finding names similar to a long one would take seconds
            raise RequestError(shown, f"unknown field; {_suggestion(shown, known)}")
        value = fields.pop(name)
        if value is not None and value not in _NO_EFFECT_VALUES.get(name, []):
            raise RequestError(name, UNSUPPORTED[name])
    request: T = convert(fields, request_type)
    return request


def convert(value: object, wanted: Any, name: str = "") -> Any:
    """`value`, the content of the field `name`, converted to the type `wanted`.

    Raises RequestError.
    """
    try:
        return msgspec.convert(value, wanted)
    except msgspec.ValidationError as error:
        raise _request_error(str(error), name, value, wanted) from None


def _decode_object(body: bytes) -> dict[str, Any]:
    try:
        value = msgspec.json.decode(body)
    except RecursionError:
        raise RequestError("body", "nested too deeply") from None
    except msgspec.ValidationError:
        raise RequestError(
            _field_with_bad_number(body), "holds a number too large to read"
        ) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RequestError("body", f"not valid JSON in UTF-8 ({error})") from None
    if not isinstance(value, dict):
        raise RequestError("body", f"expected a JSON object, got {type(value).__name__}")
    return value


def _field_with_bad_number(body: bytes) -> str:
    """The top-level field with a number too large to decode, which the decoder does not name."""
    try:
        fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    except msgspec.ValidationError:
        return "body"
    for name, raw in fields.items():
        try:
            msgspec.json.decode(raw)
        except msgspec.ValidationError:
            return _shortened(name)
    return "body"


def _request_error(message: str, name: str, value: object, wanted: Any) -> RequestError:
    """The decoder's message, rewritten to start with the field and to end with the value.

    "Expected `int` <= 64 - at `$.n`" becomes "n: expected int <= 64, got 99".
    """
    path, steps = name, list[str]()
    if match := _PATH.match(message):
        message, place = match[1], match[2]
        # The decoder does not name the keys of an object.
        path = (name + place.replace("[...]", "")).lstrip(".")
        steps = [step[1] or step[2] for step in _STEPS.finditer(place)]
    choices = _allowed(_type_info(wanted), steps)
    if match := _FIELD.search(message):
        field = _shortened(match[1])
        unknown = f"unknown field; {_suggestion(field, choices)}"
        message = unknown if "unknown" in message else "required, but missing"
        return RequestError(_shortened(f"{path}.{field}".lstrip(".")), message)
    message = message.replace("`", "").replace(" | null", "")
    message = message[:1].lower() + message[1:]
    if message.startswith("invalid enum"):
        message += f"; use {' or '.join(map(repr, choices))}"
    elif "..." not in steps:
        message = _GOT.sub("", message) + f", got {_quoted(_value_at(value, steps), message)}"
    return RequestError(_shortened(path), message)


def _allowed(kind: inspect.Type, steps: list[str]) -> list[str]:
    """What is allowed at the path `steps` of a `kind`: field names, or the values of a Literal."""
    match kind:
        case inspect.Metadata():
            return _allowed(kind.type, steps)
        case inspect.UnionType():
            return list(chain.from_iterable(_allowed(other, steps) for other in kind.types))
        case inspect.ListType() if steps:
            return _allowed(kind.item_type, steps[1:])
        case inspect.StructType() if steps:
            fields = (field for field in kind.fields if field.name == steps[0])
            return list(chain.from_iterable(_allowed(field.type, steps[1:]) for field in fields))
        case inspect.StructType():
            return [field.name for field in kind.fields]
        case inspect.LiteralType() if not steps:
            return [str(value) for value in kind.values]
    return []


def _suggestion(name: str, known: Iterable[str]) -> str:
    close = get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else "remove it"


def _value_at(value: Any, steps: list[str]) -> Any:
    for step in steps:
        value = value[step] if isinstance(value, dict) else value[int(step)]
    return value


def _quoted(value: Any, message: str) -> str:
    """A short form of `value`: its length if that is the mistake, its type, or its JSON."""
    match value:
        case str() | list() | dict() if "of length" in message:
            return str(len(value))
        case list() | dict():
            return "array" if isinstance(value, list) else "object"
        case str() if len(value) > _MAX_QUOTED:
            value = f"{value[:_MAX_QUOTED]}..."
    return msgspec.json.encode(value).decode()[: 2 * _MAX_QUOTED]


def _shortened(name: str) -> str:
    return (name if len(name) <= 80 else f"{name[:80]}...") or "body"
