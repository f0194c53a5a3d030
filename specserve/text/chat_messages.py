"""Checks the chat messages of a request and converts them to one plain form.

Knows OpenAI's message format, but no chat templates. Every invalid message raises a `RequestError`
that names the field, such as messages[2].content[0].type.
"""

from collections.abc import Mapping, Sequence
from reprlib import repr as short
from typing import Any, Final

from specserve.text.chat_tools import read_string, read_tool_calls
from specserve.types import RequestError

Message = Mapping[str, object]  # {"role": ..., "content": ...}
# role, content, and optionally name; tool_calls of an assistant; tool_call_id of a tool's message.
PlainMessage = dict[str, Any]
ROLES: Final = ("system", "developer", "user", "assistant", "tool")
MAX_MESSAGES: Final = 2048
MAX_NAME: Final = 256  # characters

_COMMON: Final = "role, content and name"
_FIELDS: Final = {
    "assistant": "role, content, name and tool_calls",
    "tool": "role, content, name and tool_call_id",
}
_MAX_KEY: Final = 64  # characters of an unknown field's name that an error quotes


def user_texts(message: PlainMessage) -> list[str]:
    """The fields that hold text of a user, which the template has to render.

    Not the name in a tool's message, which few templates show, nor a blank content beside calls.
    """
    if message["role"] == "tool":
        return ["content"]
    named = ["name"] if "name" in message else []
    blank = "tool_calls" in message and not message["content"].strip()
    return named if blank else ["content", *named]


def other_fields(message: PlainMessage) -> dict[str, Any]:
    """The fields with content of a user that are neither `user_texts` nor the role."""
    shown = ("role", "content", *user_texts(message))
    return {field: value for field, value in message.items() if field not in shown}


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


def _read(at: str, message: Message) -> PlainMessage:
    if not isinstance(message, Mapping):
        raise RequestError(at, f"{short(message)} is no object with role and content")
    role = read_string(f"{at}.role", message.get("role"))
    if role not in ROLES:
        raise RequestError(f"{at}.role", f"{short(role)} is not one of {', '.join(ROLES)}")
    plain: PlainMessage = {"role": role}
    for key, value in message.items():
        if key in ("role", "content") or value is None or value == []:
            continue
        match key:
            case "name":
                plain["name"] = read_string(f"{at}.name", value)
            case "tool_calls" if role == "assistant":
                plain["tool_calls"] = read_tool_calls(f"{at}.tool_calls", value)
            case "tool_call_id" if role == "tool":
                plain["tool_call_id"] = read_string(f"{at}.tool_call_id", value)
            case _:
                raise RequestError(
                    f"{at}.{str(key)[:_MAX_KEY]}",
                    f"unknown field; a message of role {role} has {_FIELDS.get(role, _COMMON)}",
                )
    if len(plain.get("name", "")) > MAX_NAME:
        raise RequestError(
            f"{at}.name", f"{len(plain['name'])} characters given; at most {MAX_NAME} are allowed"
        )
    if role == "tool" and "tool_call_id" not in plain:
        raise RequestError(f"{at}.tool_call_id", "missing; it names the call that this answers")
    content = message.get("content")
    if content is None and role == "assistant":
        if "tool_calls" not in plain:
            raise RequestError(f"{at}.content", "null goes with tool calls; send text")
        content = ""
    plain["content"] = _text(f"{at}.content", content)
    return plain


def _text(at: str, content: object) -> str:
    """The content as one string; a list of text parts is concatenated."""
    if not isinstance(content, list | tuple):
        return read_string(at, content, "a string or a list of text parts")
    if not content:
        raise RequestError(at, "an empty list; send a string or at least one text part")
    return "".join(_part(f"{at}[{index}]", part) for index, part in enumerate(content))


def _part(at: str, part: object) -> str:
    if not isinstance(part, dict):
        raise RequestError(at, f"{short(part)} is no object with type and text")
    kind = read_string(f"{at}.type", part.get("type"))
    if kind != "text":
        raise RequestError(
            f"{at}.type", f"{short(kind)} is not supported by this model; send text parts"
        )
    for key, value in part.items():
        if key not in ("type", "text") and value is not None:
            raise RequestError(
                f"{at}.{str(key)[:_MAX_KEY]}", "unknown field; a part has type and text"
            )
    return read_string(f"{at}.text", part.get("text"))
