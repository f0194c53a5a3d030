"""Generates one command line flag per field of a settings Struct.

Only flags that were given are set in the namespace. Other settings keep their value of the
configuration file or the default of the Struct.
"""

import argparse
import types
from collections.abc import Callable, Mapping
from typing import Any, Final, Literal, Union, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Struct

_PLAIN: Final[dict[Any, dict[str, Any]]] = {
    bool: {"action": argparse.BooleanOptionalAction},
    int: {"type": int, "metavar": "N"},
    float: {"type": float, "metavar": "X"},
    str: {"metavar": "TEXT"},
}


def add_flags(
    group: argparse._ArgumentGroup,
    struct: type[Struct],
    help_texts: Mapping[str, str],
    *,
    skip: frozenset[str] = frozenset(),
    aliases: Mapping[str, str] | None = None,
    prefix: str = "",
) -> None:
    """Add one flag per field of `struct` to `group`, except for the fields in `skip`.

    `help_texts` and `aliases` (a second flag) are by field name. `prefix`, such as "speculation_",
    distinguishes fields of the same name. Raises KeyError for a field without a help text.
    """
    hints = get_type_hints(struct)
    for info in msgspec.structs.fields(struct):
        if info.name in skip:
            continue
        dest = prefix + info.name
        names = [f"--{dest.replace('_', '-')}"]
        if aliases and info.name in aliases:
            names.append(aliases[info.name])
        rule, _ = flag_type(hints[info.name])
        repeatable = "; repeatable" if rule.get("action") == "append" else ""
        group.add_argument(
            *names,
            dest=dest,
            default=argparse.SUPPRESS,
            help=help_texts[info.name] + repeatable + default_text(info.default),
            **rule,
        )


def given(args: argparse.Namespace, struct: type[Struct], prefix: str = "") -> dict[str, Any]:
    """The fields of `struct` that the command line sets, by name; `prefix` as in `add_flags`."""
    hints = get_type_hints(struct)
    return {
        name: flag_type(hints[name])[1](getattr(args, prefix + name))
        for name in struct.__struct_fields__
        if hasattr(args, prefix + name)
    }


def flag_type(hint: Any) -> tuple[dict[str, Any], Callable[[Any], Any]]:
    """How a field type is parsed; `X | None` as X. Raises TypeError for an unknown type.

    Returns keyword arguments of `add_argument`, and what turns its result into the field's value.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        (hint,) = (argument for argument in arguments if argument is not type(None))
        return flag_type(hint)
    if origin is tuple:
        metavar = "ID" if arguments[0] is int else "TEXT"
        return {"action": "append", "type": arguments[0], "metavar": metavar}, tuple
    if hint == dict[int, float]:
        return {"action": "append", "type": _bias, "metavar": "ID=BIAS"}, dict
    if hint == dict[str, dict[str, Any]]:
        return {"action": "append", "type": _option, "metavar": "DRAFTER.KEY=X"}, _nest
    if origin is Literal:
        return {"choices": arguments}, _unchanged
    if hint in _PLAIN:
        return _PLAIN[hint], _unchanged
    raise TypeError(f"no flag can be made of the type {hint}")


def _unchanged(value: Any) -> Any:
    return value


def _bias(text: str) -> tuple[int, float]:
    token, _, bias = text.partition("=")
    try:
        return int(token), float(bias)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not ID=BIAS, a token id and a number, such as 42=-5"
        ) from None


def _option(text: str) -> tuple[str, str, Any]:
    """'ngram.max_match=3' -> ('ngram', 'max_match', 3). The value is JSON, or else a string."""
    path, equals, value = text.partition("=")
    drafter, dot, key = path.rpartition(".")
    if not (equals and dot and drafter and key):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not DRAFTER.KEY=X, such as ngram.max_match=3"
        )
    try:
        return drafter, key, msgspec.json.decode(value)
    except msgspec.DecodeError:
        return drafter, key, value


def _nest(options: list[tuple[str, str, Any]]) -> dict[str, dict[str, Any]]:
    nested: dict[str, dict[str, Any]] = {}
    for drafter, key, value in options:
        nested.setdefault(drafter, {})[key] = value
    return nested


def default_text(default: Any) -> str:
    """A default for the help text; empty for what has none: None, and empty values."""
    values = default if isinstance(default, tuple) else (default,)
    shown = " ".join(map(_shown, values))
    return f" (default: {shown})" if shown else ""


def _shown(value: Any) -> str:
    match value:
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:g}"
        case int() | str():
            return str(value)
    return ""
