"""From bytes to a checked request: every mistake is a `RequestError` that names the field."""

import re
from difflib import get_close_matches
from typing import Any, Final, TypeVar

import msgspec

from specserve.types import RequestError

T = TypeVar("T", bound=msgspec.Struct)

_LATER: Final = "comes with structured output, which this version does not have; leave it out"
UNSUPPORTED: Final = {
    **dict.fromkeys(
        ("tools", "tool_choice", "functions", "function_call", "parallel_tool_calls"), _LATER
    ),
    **dict.fromkeys(
        ("response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice"),
        _LATER,
    ),
    "chat_template": "requests cannot bring a template; the model's own is used",
    "chat_template_kwargs": "the model's template takes no arguments here; leave it out",
    "suffix": "inserting text is not supported by this model; leave it out",
    "modalities": "this model writes text only; leave it out",
    "audio": "this model writes text only; leave it out",
    "reasoning_effort": "this model has no such setting; leave it out",
    "verbosity": "this model has no such setting; leave it out",
    "web_search_options": "nothing is ever fetched; leave it out",
    "logits_processors": "requests cannot bring code; leave it out",
    "prompt_logprobs": "logprobs of the prompt are not supported; leave it out",
    "use_beam_search": "beam search is not supported; leave it out",
}
# What these say is what happens anyway.
_HARMLESS: Final[dict[str, list[Any]]] = {
    "response_format": [{"type": "text"}],
    "tool_choice": ["none"],
    "modalities": [["text"]],
    "use_beam_search": [False],
    "parallel_tool_calls": [True, False],
}
_PATH: Final = re.compile(r"(.*) - at `(?:key in )?\$(.*)`$", re.DOTALL)
_FIELD: Final = re.compile(r"(?:unknown|required) field `(.*)`$", re.DOTALL)


def decode(body: bytes, request_type: type[T]) -> T:
    """The request in `body`. Raises RequestError."""
    fields = decode_object(body)
    known = request_type.__struct_fields__
    for name in list(fields):
        if name in known:
            continue
        if name not in UNSUPPORTED:
            shown = _short(name)  # comparing a long one would take seconds
            close = get_close_matches(shown, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else "; remove it"
            raise RequestError(shown, f"unknown field{hint}")
        value = fields.pop(name)
        if value is not None and value not in _HARMLESS.get(name, []):
            raise RequestError(name, UNSUPPORTED[name])
    request: T = convert(fields, request_type)
    return request


def convert(value: object, wanted: Any, name: str = "") -> Any:
    """`value`, which stands in the field `name`, as a `wanted`. Raises RequestError."""
    try:
        return msgspec.convert(value, wanted)
    except msgspec.ValidationError as error:
        raise _named(str(error), name) from None


def decode_object(body: bytes) -> dict[str, Any]:
    """A JSON object. Raises RequestError for anything else."""
    try:
        value = msgspec.json.decode(body)
    except RecursionError:
        raise RequestError("body", "nested too deeply") from None
    except msgspec.ValidationError:
        raise RequestError(_unreadable(body), "holds a number too large to read") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RequestError("body", f"not valid JSON in UTF-8 ({error})") from None
    if not isinstance(value, dict):
        raise RequestError("body", f"expected a JSON object, got {type(value).__name__}")
    return value


def _unreadable(body: bytes) -> str:
    """The field with a number that nothing holds; the decoder does not say which."""
    try:
        fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    except msgspec.ValidationError:
        return "body"
    for name, raw in fields.items():
        try:
            msgspec.json.decode(raw)
        except msgspec.ValidationError:
            return _short(name)
    return "body"


def _named(message: str, path: str) -> RequestError:
    """The decoder's words with the field in front: `Expected `int`, got `str` - at `$.n``."""
    if match := _PATH.match(message):
        # It does not tell the keys of an object.
        message, path = match[1], (path + match[2].replace("[...]", "")).lstrip(".")
    if match := _FIELD.search(message):
        path = f"{path}.{match[1]}".lstrip(".")
        message = "unknown field; remove it" if "unknown" in message else "required, but missing"
    message = message.replace("`", "").replace(" | null", "")
    return RequestError(_short(path), message[:1].lower() + message[1:])


def _short(name: str) -> str:
    return (name if len(name) <= 80 else f"{name[:80]}...") or "body"
