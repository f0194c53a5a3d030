"""The settings in force as TOML that `--config` reads."""

from typing import Any

import msgspec

from specserve.config import EngineConfig


def show_config(config: EngineConfig) -> str:
    """Every setting by section. TOML has no null, so a setting without a value is a comment."""
    sections = msgspec.to_builtins(config)
    return "\n".join(
        f"[{name}]\n{''.join(_line(*item) for item in values.items())}"
        for name, values in sections.items()
    ).rstrip()


def _line(name: str, value: Any) -> str:
    return f"# {name}: not given\n" if value is None else f"{name} = {_value(value)}\n"


def _value(value: Any) -> str:
    """A value in TOML. Nulls in drafter options, which flags can give, are left out."""
    match value:
        case str():
            return _quoted(value)
        case dict():
            items = [f"{_quoted(k)} = {_value(v)}" for k, v in value.items() if v is not None]
            return f"{{ {', '.join(items)} }}" if items else "{}"
        case list() | tuple():
            return f"[{', '.join(map(_value, value))}]"
        case bool():
            return str(value).lower()
    return str(value)  # numbers; infinity and NaN are the same words in both


def _quoted(text: str) -> str:
    """A basic string: JSON's, but for DEL, which TOML wants escaped."""
    return msgspec.json.encode(text).decode().replace("\x7f", "\\u007f")
