"""Reading a JSON object field by field, with errors a user can act on.

Owns the wording "file: field = value: what is wrong; what to do". Knows no model.
"""

from pathlib import Path
from typing import Any, NoReturn

import msgspec

MAX_JSON_BYTES = 64 * 2**20


class ModelError(ValueError):
    """A model directory that cannot be used as it is; the message says why and what to do."""


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises `ModelError` when it is missing, too big or no object."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise ModelError(
            f"{path}: cannot be read ({error.strerror}); is it a model directory?"
        ) from None
    if size > MAX_JSON_BYTES:
        raise ModelError(f"{path}: {size} bytes is too big for JSON (limit {MAX_JSON_BYTES})")
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ModelError(f"{path}: not a JSON object ({error}); fetch the file again") from None


class Fields:
    """Typed access to one JSON object. Every getter raises `ModelError` naming the field."""

    def __init__(self, values: dict[str, Any], source: str) -> None:
        self.values = values
        self.source = source

    def fail(self, name: str, reason: str) -> NoReturn:
        raise ModelError(f"{self.source}: {name} = {self.values.get(name)!r}: {reason}")

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self.values.get(name) is not None

    def integer(self, name: str, default: int | None = None, *, low: int = 1) -> int:
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value < 2**31:
            self.fail(name, f"expected an integer of at least {low}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e12:
            self.fail(name, "expected a number above 0")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            self.fail(name, "expected true or false")
        return value

    def section(self, name: str) -> "Fields":
        """A nested object; an absent or null one reads as empty."""
        value = self.values.get(name)
        if value is None:
            value = {}
        if not isinstance(value, dict):
            self.fail(name, "expected an object")
        return Fields(value, f"{self.source}: {name}")

    def token_ids(self, name: str) -> tuple[int, ...]:
        """A token id, a list of them, or nothing."""
        value = self.values.get(name)
        ids = () if value is None else tuple(value) if isinstance(value, list) else (value,)
        if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
            self.fail(name, "expected a token id or a list of token ids")
        return ids

    def _get(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        if value is None:
            if default is None:
                raise ModelError(f"{self.source}: {name} is missing; the model needs it")
            return default
        return value
