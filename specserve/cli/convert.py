"""`specserve convert`: converts the pickled weights of a draft checkpoint to safetensors."""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

_NAMES: Final = ("pytorch_model.bin", "medusa_lm_head.pt")  # of EAGLE-1 to 3 and of Medusa
_SUFFIXES: Final = (".bin", ".pt", ".pth")
_CHILD: Final = Path(__file__).with_name("convert_child.py")
_SPARE_MEMORY: Final = 2**30  # bytes that the child may use beyond 4 times the file's size
_TIME_LIMIT: Final = 600.0  # seconds


class ConvertError(ValueError):
    """The checkpoint cannot be converted. The message gives the reason and the fix."""

    def __init__(self, message: str) -> None:
        super().__init__(f"convert: {message}")


def run(args: argparse.Namespace) -> int:
    convert(args.source, args.out)
    print(args.out)
    return 0


def convert(source: Path, out: Path, *, time_limit: float = _TIME_LIMIT) -> None:
    """Create the directory `out` with model.safetensors and a copy of config.json.

    `source` is a weights file with a config.json in the same directory, or that directory.
    `time_limit` is in seconds. Raises ConvertError; then no files are left behind.
    """
    weights = _find(source)
    config = weights.parent / "config.json"
    if not config.is_file():
        raise ConvertError(
            f"{weights.parent} has no config.json; a draft needs the one it came with"
        )
    if os.path.lexists(out):
        raise ConvertError(f"{out} exists; give a new directory, or remove it")
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        copy = Path(shutil.copyfile(config, partial / "config.json"))
        converted = partial / "model.safetensors"
        _convert_weights(weights, converted, time_limit)
        converted.chmod(copy.stat().st_mode)  # the mode of safetensors' files is 0600
        partial.rename(out)
    except OSError as error:
        raise ConvertError(f"{out} cannot be written ({error.strerror})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _find(source: Path) -> Path:
    """The weights file of `source`. In a directory, one with a usual name has precedence."""
    if source.is_file():
        if source.suffix not in _SUFFIXES:
            raise ConvertError(
                f"{source} is no {', '.join(_SUFFIXES)} file; there is nothing to convert"
            )
        return source
    if not source.is_dir():
        raise ConvertError(f"{source} does not exist; give a directory or a weights file")
    try:
        found = sorted(file.name for file in source.iterdir() if file.suffix in _SUFFIXES)
    except OSError as error:
        raise ConvertError(f"{source} cannot be read ({error.strerror})") from error
    named = [name for name in found if name in _NAMES]
    chosen = named if len(named) == 1 else found
    if not chosen:
        raise ConvertError(f"{source} has no {', '.join(_SUFFIXES)} file to convert")
    if len(chosen) > 1:
        raise ConvertError(f"{source} has {', '.join(chosen)}; give the one file to convert")
    return source / chosen[0]


def _convert_weights(weights: Path, out: Path, time_limit: float) -> None:
    """Run `convert_child`, which writes `weights` to the safetensors file `out`."""
    memory = 4 * weights.stat().st_size + _SPARE_MEMORY  # for reading, a copy and writing
    command = [sys.executable, "-P", str(_CHILD), str(weights.resolve()), str(out.resolve())]
    command += [str(memory), str(int(time_limit) + 1)]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=time_limit,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ConvertError(
            f"{weights}: it took longer than {time_limit:g} s; nothing was written"
        ) from None
    if done.returncode == 1 and done.stdout.strip():
        raise ConvertError(f"{weights}: {done.stdout.strip()}")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ConvertError(
            f"{weights}: the process that reads it ended with status {done.returncode} ({last})"
        )
