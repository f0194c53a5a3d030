"""Cached directories: each is built once, put in place by a single rename, and reused."""

import fcntl
import os
import shutil
from collections.abc import Callable, Mapping
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
    """Return `directory`; call `build(empty_directory)` first unless its manifest is `manifest`.

    Safe for concurrent processes: one builds while the others wait for a file lock. Raises
    `HubError` for an `OSError`, such as an unwritable cache folder. Other exceptions from `build`
    propagate. A failed build leaves no partial directory.
    """
    if read_manifest(directory) == manifest:
        return directory
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with directory.with_name(f".{directory.name}.lock").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if read_manifest(directory) != manifest:  # another process may have built it meanwhile
                _build(directory, manifest, build)
    except OSError as error:
        raise HubError(
            f"cache folder {directory.parent}: {error}; make room or give another folder"
        ) from error
    return directory


def read_manifest(directory: Path) -> Manifest:
    """What the cached `directory` was built from; empty if it was not built."""
    try:
        stored = (directory / _MANIFEST).read_bytes()
        return msgspec.json.decode(stored, type=dict[str, str | int])
    except (OSError, msgspec.MsgspecError):
        return {}


def _build(directory: Path, manifest: Manifest, build: Callable[[Path], None]) -> None:
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # remains of a killed process
    partial.mkdir()
    try:
        build(partial)
        (partial / _MANIFEST).write_bytes(msgspec.json.encode(manifest))
        shutil.rmtree(directory, ignore_errors=True)
        partial.rename(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
