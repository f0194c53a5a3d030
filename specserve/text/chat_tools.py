"""Checks what a chat template is given beside texts: tools, tool calls in messages, variables.

All of it is only shown to the model; nothing is called here. Every mistake raises a `RequestError`
that names the field.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from reprlib import repr as short
from typing import Any, Final

from specserve.types import RequestError

MAX_TOOLS: Final = 128  # tools of a request, and tool calls of a message
MAX_VARIABLES: Final = 64
_MAX_DEPTH: Final = 64  # of nested JSON
_MAX_KEY: Final = 64  # characters of a name that an error quotes


def check_text(name: str, text: str) -> None:
    """Raise `RequestError`, naming the field `name`, for text with a lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            name, f"character {error.start} is a lone surrogate; send valid Unicode"
        ) from None


def read_string(at: str, value: object, expected: str = "a string") -> str:
    if not isinstance(value, str):
        raise RequestError(at, f"{short(value)} is not {expected}")
    check_text(at, value)
    return value


def read_tool_calls(at: str, calls: object) -> list[dict[str, Any]]:
    """The tool calls of a message, their arguments as an object, as templates expect them."""
    return [_read_call(f"{at}[{index}]", call) for index, call in enumerate(_list(at, calls))]


def read_tools(tools: object) -> list[dict[str, Any]]:
    """The tools of a request, unchanged."""
    read = _list("tools", tools)
    for index, tool in enumerate(read):
        at = f"tools[{index}]"
        read_string(f"{at}.function.name", _function(at, tool).get("name"))
        for _ in strings(at, tool):
            pass
    return read


def read_variables(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Variables for a template, of any JSON type."""
    at = "chat_template_kwargs"
    if len(variables) > MAX_VARIABLES:
        raise RequestError(at, f"{len(variables)} variables; at most {MAX_VARIABLES} are allowed")
    for _ in strings(at, variables):
        pass
    return dict(variables)


def strings(at: str, value: object, depth: int = 0) -> Iterator[tuple[str, str]]:
    """Every string in a JSON value, keys included, each with the name of the field that has it."""
    if depth > _MAX_DEPTH:
        raise RequestError(at, f"nested more than {_MAX_DEPTH} deep")
    match value:
        case str():
            check_text(at, value)
            yield at, value
        case list() | tuple():
            for index, item in enumerate(value):
                yield from strings(f"{at}[{index}]", item, depth + 1)
        case dict():
            for key, item in value.items():
                inner = f"{at}.{str(key)[:_MAX_KEY]}"
                check_text(at, str(key))
                yield inner, str(key)
                yield from strings(inner, item, depth + 1)


def with_strings(value: Any, change: Callable[[str], str]) -> Any:
    """A copy of a JSON value with `change` applied to every string, keys included."""
    match value:
        case str():
            return change(value)
        case list() | tuple():
            return [with_strings(item, change) for item in value]
        case dict():
            return {change(str(key)): with_strings(item, change) for key, item in value.items()}
    return value


def _read_call(at: str, call: object) -> dict[str, Any]:
    function = _function(at, call)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, dict):
        raise RequestError(f"{at}.function.arguments", "not the JSON text of an object")
    for _ in strings(f"{at}.function.arguments", arguments):
        pass
    assert isinstance(call, dict)
    return {
        "id": read_string(f"{at}.id", call.get("id")),
        "type": "function",
        "function": {
            "name": read_string(f"{at}.function.name", function.get("name")),
            "arguments": arguments,
        },
    }


def _function(at: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RequestError(at, f"{short(value)} is no object with type and function")
    if value.get("type") != "function":
        raise RequestError(f"{at}.type", f"{short(value.get('type'))} is not 'function'")
    function = value.get("function")
    if not isinstance(function, dict):
        raise RequestError(f"{at}.function", f"{short(function)} is no object")
    return function


def _list(at: str, value: object) -> list[Any]:
    if not isinstance(value, list | tuple) or not 1 <= len(value) <= MAX_TOOLS:
        raise RequestError(at, f"expected a list of 1 to {MAX_TOOLS} objects")
    return list(value)
