"""Checks the chat messages of a request and converts them to one plain form.

Knows OpenAI's message format, but no chat templates. Every invalid message raises a `RequestError`
that names the field, such as messages[2].content[0].type.
"""

from collections.abc import Mapping, Sequence
from reprlib import repr as short
from typing import Final

from specserve.types import RequestError

Message = Mapping[str, object]  # {"role": ..., "content": ...}
PlainMessage = dict[str, str]  # role, content, and optionally name
ROLES: Final = ("system", "developer", "user", "assistant")
USER_TEXT_FIELDS: Final = ("content", "name")  # fields of a message that hold user text
MAX_MESSAGES: Final = 2048
MAX_NAME: Final = 256  # characters

_NO_TOOLS: Final = "tools are not supported yet"
_TOOL_ROLES: Final = ("tool", "function")
_TOOL_FIELDS: Final = ("tool_calls", "tool_call_id", "function_call")
_MAX_KEY: Final = 64  # characters of an unknown field's name that an error quotes


def read_messages(messages: Sequence[Message]) -> list[PlainMessage]:
    """The messages with their contents as strings.

    Unknown fields are accepted if they are null or an empty list, because clients send an
    assistant's answer back with all its fields. Raises `RequestError` for the first invalid field.
    """
    if isinstance(messages, str) or not isinstance(messages, Sequence) or not messages:
        raise RequestError("messages", "expected a list of at least one message")
    if len(messages) > MAX_MESSAGES:
        raise RequestError(
            "messages", f"{len(messages)} messages given; at most {MAX_MESSAGES} are allowed"
        )
    return [_read(f"messages[{index}]", message) for index, message in enumerate(messages)]


def check_text(name: str, text: str) -> None:
    """Raise `RequestError`, naming the field `name`, for text with a lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            name, f"character {error.start} is a lone surrogate; send valid Unicode"
        ) from None


def _read(at: str, message: Message) -> PlainMessage:
    if not isinstance(message, Mapping):
        raise RequestError(at, f"{short(message)} is no object with role and content")
    role = _string(f"{at}.role", message.get("role"))
    if role in _TOOL_ROLES:
        raise RequestError(f"{at}.role", f"{role!r}: {_NO_TOOLS}")
    if role not in ROLES:
        raise RequestError(f"{at}.role", f"{short(role)} is not one of {', '.join(ROLES)}")
    _check_fields(at, message)
    content = message.get("content")
    if content is None and role == "assistant":
        raise RequestError(
            f"{at}.content", f"null goes with tool calls, and {_NO_TOOLS}; send text"
        )
    plain = {"role": role, "content": _text(f"{at}.content", content)}
    if message.get("name") is not None:
        name = plain["name"] = _string(f"{at}.name", message["name"])
        if len(name) > MAX_NAME:
            raise RequestError(
                f"{at}.name", f"{len(name)} characters given; at most {MAX_NAME} are allowed"
            )
    return plain


def _check_fields(at: str, message: Message) -> None:
    """Raise `RequestError` for an unsupported field, unless it is null or an empty list."""
    for key, value in message.items():
        if key in ("role", "content", "name") or value is None or value == []:
            continue
        if key in _TOOL_FIELDS:
            raise RequestError(f"{at}.{key}", _NO_TOOLS)
        raise RequestError(
            f"{at}.{str(key)[:_MAX_KEY]}", "unknown field; a message has role, content and name"
        )


def _text(at: str, content: object) -> str:
    """The content as one string; a list of text parts is concatenated."""
    if not isinstance(content, list | tuple):
        return _string(at, content, "a string or a list of text parts")
    if not content:
        raise RequestError(at, "an empty list; send a string or at least one text part")
    return "".join(_part(f"{at}[{index}]", part) for index, part in enumerate(content))


def _part(at: str, part: object) -> str:
    if not isinstance(part, dict):
        raise RequestError(at, f"{short(part)} is no object with type and text")
    kind = _string(f"{at}.type", part.get("type"))
    if kind != "text":
        raise RequestError(
            f"{at}.type", f"{short(kind)} is not supported by this model; send text parts"
        )
    for key, value in part.items():
        if key not in ("type", "text") and value is not None:
            raise RequestError(
                f"{at}.{str(key)[:_MAX_KEY]}", "unknown field; a part has type and text"
            )
    return _string(f"{at}.text", part.get("text"))


def _string(at: str, value: object, expected: str = "a string") -> str:
    if not isinstance(value, str):
        raise RequestError(at, f"{short(value)} is not {expected}")
    check_text(at, value)
    return value
