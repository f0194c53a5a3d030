"""Parts of an answer that are encoded before the whole: encoding at once blocks the event loop."""

from typing import TypeVar, cast

import msgspec

T = TypeVar("T")


def encoded(value: T) -> T:
    """`value` as a JSON text that `msgspec.json.encode` copies where it would encode `value`."""
    return cast(T, msgspec.Raw(msgspec.json.encode(value)))
