"""The provenance of a result: command, data, versions and machine.

Every result of an eval or a benchmark has one. It contains no host name and no absolute path.
"""

import hashlib
import re
import shlex
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import torch
from msgspec import Struct

from specserve.cli.machine import first_line, processor, versions
from specserve.engine.device import Platform

_FLAG: Final = re.compile(r"[\w.-]+=")  # what precedes a value in the same argument


class DataFile(Struct, frozen=True):
    name: str
    sha256: str

    @classmethod
    def of(cls, file: Path) -> "DataFile":
        """Hash `file`. Raises ValueError if it cannot be read."""
        try:
            with file.open("rb") as stream:
                return cls(file.name, hashlib.file_digest(stream, "sha256").hexdigest())
        except OSError as error:
            raise ValueError(f"{file} cannot be read: {error.strerror}") from error

    @property
    def label(self) -> str:
        return f"{self.name} (sha256 {self.sha256[:12]}...)"


def checkpoint_label(folder: Path) -> str:
    """A short hash of a checkpoint's config and tensors; other files in `folder` do not count."""
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    hashes = [
        f"{file.name} {DataFile.of(file).sha256}"
        for file in files
        if file.is_file() and not file.name.startswith("run-")  # state of `specserve tune`
    ]
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()[:12]


class Provenance(Struct, frozen=True):
    date: str  # UTC, ISO 8601
    command: str
    revision: str | None  # commit of the source, with "-dirty" if there are uncommitted changes
    versions: dict[str, str]
    processor: dict[str, str]
    gpu: str | None
    engine: dict[str, str]  # device, dtype, kernels, exactness, threads
    data: DataFile | None


def collect(
    module: str, arguments: Sequence[str], platform: Platform, data: Path | None
) -> Provenance:
    """The provenance of a run of `python -m module arguments` on `platform` with the file `data`.

    Raises ValueError if `data` cannot be read.
    """
    on_gpu = platform.device.type == "cuda"
    return Provenance(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        command=shlex.join(["python", "-m", module, *map(_without_folder, arguments)]),
        revision=_revision(),
        versions={check.name: check.value for check in versions() if check.status == "ok"},
        processor={check.name: check.value for check in processor()},
        gpu=torch.cuda.get_device_name(platform.device) if on_gpu else None,
        engine={
            "device": str(platform.device),
            "dtype": str(platform.dtype).removeprefix("torch."),
            "kernels": platform.kernels.name,
            "exactness": "exact" if platform.exact else "fast",
            "threads": str(torch.get_num_threads()),
        },
        data=None if data is None else DataFile.of(data),
    )


def markdown(provenance: Provenance) -> str:
    """The provenance as a Markdown list."""
    known = provenance.versions
    lines = [
        f"command: `{provenance.command}`",
        f"date: {provenance.date}, revision: {provenance.revision or 'unknown'}",
        f"machine: {provenance.processor['model']}, {provenance.processor['cores']}"
        + (f", {provenance.gpu}" if provenance.gpu else ""),
        "engine: " + ", ".join(f"{name} {value}" for name, value in provenance.engine.items()),
        "versions: " + ", ".join(f"{name} {version}" for name, version in known.items()),
    ]
    if provenance.data is not None:
        lines.append(f"data: {provenance.data.name}, sha256 {provenance.data.sha256}")
    return "\n".join(f"- {line}" for line in lines)


def _without_folder(argument: str) -> str:
    """Cut absolute paths, and paths with "..", to their names.

    Commas separate several paths, and a path may follow `--flag=`.
    """

    def shown(part: str) -> str:
        flag = _FLAG.match(part)
        prefix = "" if flag is None else flag[0]
        path = Path(part.removeprefix(prefix))
        return prefix + path.name if path.is_absolute() or ".." in path.parts else part

    return ",".join(map(shown, argument.split(",")))


def _revision() -> str | None:
    folder = str(Path(__file__).parent)
    return first_line(["git", "-C", folder, "describe", "--always", "--dirty", "--abbrev=12"])
