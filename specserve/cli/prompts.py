"""Reads prompts from flags and JSONL files. Does not know the model or its chat template."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from specserve.config import ConfigError

Messages = list[dict[str, str]]
EXPECTED = 'a JSON string, {"prompt": ...}, {"messages": [...]} or {"turns": [...]}'


class Row(NamedTuple):
    """A line of a JSONL file and the prompt that it holds."""

    place: str  # FILE:LINE
    line: str
    prompt: str | Messages


def read_prompts(texts: Sequence[str], file: Path | None) -> list[str | Messages]:
    """The prompts in `texts`, then those of `file`. Raises ConfigError if there are none."""
    prompts: list[str | Messages] = list(texts)
    if file is not None:
        prompts += [row.prompt for row in read_rows(file)]
    if not prompts:
        raise ConfigError("prompt: there is none; give --prompt TEXT or --prompts FILE.jsonl")
    return prompts


def read_rows(file: Path) -> list[Row]:
    """The prompts of a JSONL file, without blank lines. Raises ConfigError if it has no prompts."""
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError(f"prompts: {file} cannot be read: {reason}") from error
    places = [f"{file}:{number}" for number in range(1, len(lines) + 1)]
    rows = [
        Row(place, line, _read_row(line, place))
        for place, line in zip(places, lines, strict=True)
        if line.strip()
    ]
    if not rows:
        raise ConfigError(f"prompts: {file} is empty; expected lines of {EXPECTED}")
    return rows


def as_chat(prompt: str | Messages) -> Messages:
    """The prompt as chat messages; text becomes one user message."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def as_text(prompt: str | Messages) -> str:
    """The prompt as text. Raises ConfigError for chat messages, which need a chat template."""
    if not isinstance(prompt, str):
        raise ConfigError("raw: a prompt made of messages needs a chat template; leave out --raw")
    return prompt


def _read_row(line: str, place: str) -> str | Messages:
    try:
        row = msgspec.json.decode(line)
    except msgspec.DecodeError as error:
        raise ConfigError(f"prompts: {place} is not JSON ({error}); expected {EXPECTED}") from error
    prompt = _prompt_of(row)
    if prompt is None:
        raise ConfigError(f"prompts: {place} is no prompt; expected {EXPECTED}")
    return prompt


def _prompt_of(row: Any) -> str | Messages | None:
    if isinstance(row, str):
        return row
    if not isinstance(row, dict):
        return None
    try:
        if "messages" in row:
            messages = msgspec.convert(row["messages"], Messages)
            whole = all({"role", "content"} <= message.keys() for message in messages)
            return messages if messages and whole else None
        if "turns" in row:
            return next(iter(msgspec.convert(row["turns"], list[str])), None)
        return msgspec.convert(row.get("prompt"), str)
    except msgspec.ValidationError:
        return None
