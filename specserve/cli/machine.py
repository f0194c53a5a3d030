"""Checks of `specserve doctor` that need no torch: versions, processor, compilers, cache folder."""

import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final, Literal

from msgspec import Struct

from specserve import __version__
from specserve.hub.cache import default_cache_dir

REQUIRED: Final = (
    *("torch", "numpy", "msgspec", "safetensors", "tokenizers", "huggingface-hub"),
    *("gguf", "jinja2", "rich", "aiohttp", "prometheus-client", "uvloop"),
)
OPTIONAL: Final = {"triton": "GPU kernels"}
# Instruction sets that the torch and native kernels use, and the flags in /proc/cpuinfo of which
# at least one is set if the CPU has them.
CPU_FEATURES: Final = {
    "AVX2": ("avx2",),
    "AVX512": ("avx512f",),
    "VNNI": ("avx512_vnni", "avx_vnni"),
    "BF16": ("avx512_bf16", "amx_bf16", "bf16"),
    "AMX": ("amx_tile",),
}
CPUINFO: Final = Path("/proc/cpuinfo")
_TIMEOUT_S: Final = 20  # seconds that a command may take


class Check(Struct, frozen=True, omit_defaults=True):
    """A finding and its `fix`, if one is known. "broken": specserve fails until this is fixed."""

    section: str
    name: str
    value: str
    status: Literal["ok", "note", "broken"] = "ok"  # note: something optional is missing
    fix: str | None = None


def versions() -> list[Check]:
    """Python, specserve, and the required and optional packages."""
    missing = [
        Check("versions", name, "not installed", "broken", f"pip install {name}")
        for name in REQUIRED
    ] + [
        Check("versions", name, f"not installed; only needed for {purpose}", "note")
        for name, purpose in OPTIONAL.items()
    ]
    return [
        Check("versions", "python", platform.python_version()),
        Check("versions", "specserve", __version__),
        *(_installed(check.name) or check for check in missing),
    ]


def processor(cpuinfo: Path = CPUINFO) -> list[Check]:
    """Model, usable cores and instruction sets of the CPU."""
    fields = _cpu_fields(cpuinfo)
    model = fields.get("model name") or platform.processor() or platform.machine()
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    has = [name for name, marks in CPU_FEATURES.items() if flags.intersection(marks)]
    lacks = [name for name in CPU_FEATURES if name not in has]
    features = f"{' '.join(has) or 'none'} (not there: {' '.join(lacks) or 'none'})"
    return [
        Check("processor", "model", model),
        Check("processor", "cores", f"{len(os.sched_getaffinity(0))} usable of {os.cpu_count()}"),
        Check("processor", "instructions", features),
    ]


def compilers() -> list[Check]:
    """The C and C++ compilers: $CC and $CXX, else the first of the usual names that is found."""
    return [
        _compiler("C", os.environ.get("CC"), ("cc", "gcc", "clang")),
        _compiler("C++", os.environ.get("CXX"), ("c++", "g++", "clang++")),
    ]


def cache_folder(folder: Path | None = None) -> list[Check]:
    """The folder of downloaded models: whether it is writable, its size, and the free space."""
    folder = folder or default_cache_dir()
    parent = next(path for path in (folder, *folder.parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        fix = "make it writable, or set XDG_CACHE_HOME to a folder that is"
        return [Check("cache", "folder", f"{folder}: cannot be written", "broken", fix)]
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    free = shutil.disk_usage(parent).free
    return [
        Check("cache", "folder", str(folder)),
        Check("cache", "in use", f"{gib(size)}, {gib(free)} free"),
    ]


def gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def first_line(command: Sequence[str]) -> str | None:
    """The first line that a command prints; None if there is none or the command fails."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.splitlines()), None)


def _installed(name: str) -> Check | None:
    try:
        return Check("versions", name, version(name))
    except PackageNotFoundError:
        return None


def _cpu_fields(cpuinfo: Path) -> dict[str, str]:
    """The fields of the first processor; empty if the file cannot be read."""
    try:
        entry = cpuinfo.read_text(encoding="utf-8").split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in entry.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _compiler(language: str, chosen: str | None, usual: Sequence[str]) -> Check:
    candidates = (chosen,) if chosen else usual
    for candidate in candidates:
        words = candidate.split()  # CC may contain flags
        if shutil.which(words[0]):
            return Check("compilers", language, first_line([*words, "--version"]) or candidate)
    value = f"none found (looked for {', '.join(candidates)})"
    fix = "install gcc or clang; Triton compiles its launchers with it"
    return Check("compilers", language, value, "note", fix)
