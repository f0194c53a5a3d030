"""Reads a JSON object field by field, with errors that tell the user what to do."""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, NoReturn

import msgspec

from specserve.files import FileError, is_there, quoted, read_file, short

MAX_JSON_BYTES: Final = 64 * 2**20
MAX_INTEGER: Final = 2**31 - 1
_SMALLEST, _LARGEST = 1e-12, 1e12  # default range of `number`: float32 can compute with these
_LISTED: Final = 5  # at most so many unread fields are named in one message


class ModelError(ValueError):
    """The model directory cannot be used as it is; the message says why and what to do."""


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in the file `path`.

    Raises `ModelError` if the file is missing, larger than `MAX_JSON_BYTES`, or not a JSON object.
    """
    try:
        content = read_file(path, MAX_JSON_BYTES)
    except FileError as error:
        hint = "" if is_there(path) else "; is it a model directory?"
        raise ModelError(f"{error}{hint}") from None
    try:
        return msgspec.json.decode(content, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        # Python writes NaN and Infinity, which the standard forbids; the getters reject them.
        with suppress(ValueError, RecursionError):
            found = json.loads(content.decode())
            if isinstance(found, dict):
                return found
        raise ModelError(f"{path}: not a JSON object ({error}); fetch the file again") from None


class Fields:
    """Typed access to one JSON object, which records the fields that were read.

    `source` names the object in messages. Typed getters treat null as absent and raise `ModelError`
    naming the field. `integer` and `number` without a default require the field.
    """

    def __init__(self, values: dict[str, Any], source: str) -> None:
        self.values = values
        self.source = source
        self._read: set[str] = set()

    def fail(self, name: str, reason: str) -> NoReturn:
        raise ModelError(f"{self.source}: {name} = {quoted(self.get(name))}: {reason}")

    def get(self, name: str, default: Any = None) -> Any:
        """The unchecked value; `default` if the field is absent, but not if it is null."""
        self._read.add(name)
        return self.values.get(name, default)

    def has(self, name: str) -> bool:
        """Whether the field is present and not null."""
        return self.get(name) is not None

    def integer(
        self, name: str, default: int | None = None, *, low: int = 1, high: int = MAX_INTEGER
    ) -> int:
        value = self._get(name, default)
        if type(value) is not int or not low <= value <= high:
            self.fail(name, f"expected an integer from {low} to {high}")
        return value

    def number(
        self,
        name: str,
        default: float | None = None,
        *,
        low: float = _SMALLEST,
        high: float = _LARGEST,
    ) -> float:
        value = self._get(name, default)
        if type(value) not in (int, float) or not low <= value <= high:
            self.fail(name, f"expected a number from {low:g} to {high:g}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            self.fail(name, "expected true or false")
        return value

    def section(self, name: str) -> "Fields":
        """A nested object; empty if the field is absent or null."""
        value = self.get(name)
        if value is None:
            value = {}
        if not isinstance(value, dict):
            self.fail(name, "expected an object")
        return Fields(value, f"{self.source}: {name}")

    def token_ids(self, name: str) -> tuple[int, ...]:
        """The ids in a field that holds one token id, a list of them, or null."""
        value = self.get(name)
        ids = () if value is None else tuple(value) if isinstance(value, list) else (value,)
        if any(type(i) is not int or i < 0 for i in ids):
            self.fail(name, "expected a token id or a list of token ids")
        return ids

    def reject_unread(self, harmless: Callable[[str], bool]) -> None:
        """Raise `ModelError` naming the fields that were not read and are not `harmless`.

        Fields that are null, false, zero or empty are exempt.
        """
        unread = [
            name
            for name, value in self.values.items()
            if value and name not in self._read and not harmless(name)
        ]
        if not unread:
            return
        listed = ", ".join(
            f"{short(name)} = {quoted(self.values[name])}" for name in unread[:_LISTED]
        )
        more = f" and {len(unread) - _LISTED} more" if len(unread) > _LISTED else ""
        raise ModelError(
            f"{self.source}: {listed}{more}: not supported, and may change what the model "
            f"computes; remove what you know to have no effect"
        )

    def _get(self, name: str, default: Any) -> Any:
        value = self.get(name)
        if value is None:
            if default is None:
                raise ModelError(f"{self.source}: {name} is missing; the model needs it")
            return default
        return value
