"""Atomic writes: a reader sees the old file or the new one, even if the writer is killed or several
processes write."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
from safetensors import SafetensorError


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary path to write to, which replaces `path` at the end unless the body raised.

    Raises ValueError, naming the file, if it cannot be written.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.touch()
        mode = part.stat().st_mode
        yield part
        part.chmod(mode)  # safetensors creates files that only their owner may read
        part.replace(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be written: {error}") from error
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented JSON, atomically. Raises ValueError, as `atomic_write`."""
    with atomic_write(path) as part:
        part.write_bytes(msgspec.json.format(msgspec.json.encode(value), indent=2))
