"""The only code that loads pickles: converts a state dict to safetensors in a separate process.

`specserve convert` runs this file as `python -P FILE SOURCE OUT MEMORY SECONDS`; it imports nothing
of specserve. With weights_only, torch's unpickler calls only functions that build tensors (since
torch 2.6; earlier versions have CVE-2025-32434). A small file can require much memory and time, so
both are limited. If the file is refused, the reason is printed and the exit status is 1.
"""

import re
import resource
import sys
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import save_file
from torch import Tensor

_DTYPES: Final = (  # dtypes that the tensors of a draft may have
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.bool),
)
_MOST_NAMES: Final = 5  # largest number of names in an error message


class Refused(ValueError):
    """The file is refused; the message gives the reason."""


def main(source: Path, out: Path, memory: int, seconds: int) -> int:
    """Convert `source` to `out` within `memory` more bytes and `seconds` of CPU time; 1: failed."""
    torch.set_num_threads(1)  # every thread takes up some of the memory limit
    _limit(memory, seconds)
    try:
        content: object = torch.load(source, map_location="cpu", weights_only=True)
        save_file(_separate(_tensors(content)), out)
    except Exception as error:  # a damaged or hostile file can cause any
        print(_reason(error, memory))
        return 1
    return 0


def _limit(memory: int, seconds: int) -> None:
    """Limit CPU time and, where /proc shows it, the address space; disable core dumps."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _lower(resource.RLIMIT_CPU, seconds)
    statm = Path("/proc/self/statm")
    if statm.exists():
        mapped = int(statm.read_text(encoding="utf-8").split()[0]) * resource.getpagesize()
        _lower(resource.RLIMIT_AS, mapped + memory)


def _lower(kind: int, limit: int) -> None:
    _, hard = resource.getrlimit(kind)
    soft = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(kind, (soft, hard))


def _tensors(content: object) -> dict[str, Tensor]:
    """The tensors of a state dict, by name. Raises Refused if `content` is anything else."""
    if not isinstance(content, dict):
        raise Refused(f"it holds a {type(content).__name__}; expected tensors by name")
    tensors: dict[str, Tensor] = {}
    others: list[str] = []
    for name, value in content.items():
        if isinstance(name, str) and _is_plain(value):
            tensors[name] = value.detach()
        else:
            others.append(f"{_shown(str(name))} ({_kind(value)})")
    if others:
        more = f" and {len(others) - _MOST_NAMES} more" if len(others) > _MOST_NAMES else ""
        raise Refused(
            f"it holds more than tensors by name: {', '.join(others[:_MOST_NAMES])}{more}; save "
            "the state dict alone"
        )
    if not tensors:
        raise Refused("it holds no tensors")
    return tensors


def _is_plain(value: object) -> bool:
    return (
        isinstance(value, Tensor)
        and value.layout is torch.strided
        and value.device.type == "cpu"
        and value.dtype in _DTYPES
    )


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.device.type} {value.layout} {value.dtype}".replace("torch.", "")
    return type(value).__name__


def _separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, contiguous and without shared memory, which safetensors does not support."""
    seen: set[int] = set()
    separate: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        separate[name] = (
            tensor.clone(memory_format=torch.contiguous_format)
            if storage in seen
            else tensor.contiguous()
        )
        seen.add(storage)
    return separate


def _reason(error: Exception, memory: int) -> str:
    """The reason to print. Torch's own messages are replaced: they advise to trust the file."""
    text = str(error)
    if isinstance(error, Refused):
        return text
    if isinstance(error, MemoryError) or "allocate memory" in text:
        return f"it needs more than the {memory / 2**30:.1f} GiB that a file of its size may have"
    if isinstance(error, OSError) or "I/O error" in text:  # the latter is safetensors'
        return f"it cannot be read, or the result not be written ({_shown(text)})"
    if wanted := re.search(r"GLOBAL (\S+)", text):
        return (
            f"it asks for {_shown(wanted[1])}, which is no tensor and could run code; only tensors "
            "by name are read"
        )
    if text.startswith("Weights only load failed"):
        found = re.search(r"(Unsupported operand|Can only|Trying to) [^.\n]+", text)
        text = found[0] if found else "unknown content"
    return f"it is damaged, or no state dict of torch.save ({_shown(text)})"


def _shown(text: str) -> str:
    """Text from the file, made safe to print: one short line of printable characters."""
    line = text.strip().splitlines()[0] if text.strip() else ""
    return "".join(char if char.isprintable() else "?" for char in line[:120])


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])))
