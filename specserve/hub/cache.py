"""Directories that are built once and then found again.

Owns the cache folder: a finished directory carries a manifest of what it was built from, appears
in one rename, and is built again when the manifest no longer fits. Knows nothing of models.
"""

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import msgspec

from specserve.hub.errors import HubError

_MANIFEST = "specserve.json"
Manifest = Mapping[str, str | int]  # what a directory was built from


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/specserve`, or `~/.cache/specserve`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "specserve"


def build_once(directory: Path, manifest: Manifest, build: Callable[[Path], None]) -> Path:
    """`directory`, built by `build(empty_directory)` unless its manifest says it is there.

    Several processes may ask at once: one builds, the others wait for it. Raises `HubError` when
    the cache folder cannot be written; what `build` raises passes through and leaves nothing.
    """
    if _is_built(directory, manifest):
        return directory
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with _locked(directory.with_name(f".{directory.name}.lock")):
            if not _is_built(directory, manifest):  # another process may have built it meanwhile
                _build(directory, manifest, build)
    except OSError as error:
        raise HubError(
            f"cache folder {directory.parent}: {error}; make room or give another folder"
        ) from error
    return directory


def _is_built(directory: Path, manifest: Manifest) -> bool:
    try:
        return (
            msgspec.json.decode((directory / _MANIFEST).read_bytes(), type=dict[str, str | int])
            == manifest
        )
    except (OSError, msgspec.MsgspecError):
        return False


def _build(directory: Path, manifest: Manifest, build: Callable[[Path], None]) -> None:
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
    partial.mkdir()
    try:
        build(partial)
        (partial / _MANIFEST).write_bytes(msgspec.json.encode(manifest))
        shutil.rmtree(directory, ignore_errors=True)
        partial.rename(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
