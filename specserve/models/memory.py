"""Free memory, and a check whether something fits in it before it is allocated."""

import os
from pathlib import Path
from typing import Final

import torch

from specserve.models.fields import ModelError

_MEMINFO: Final = Path("/proc/meminfo")
_GIB: Final = 2**30


def check_memory(num_bytes: int, device: torch.device, what: str, fix: str) -> None:
    """Raise `ModelError` if `num_bytes` exceed the free memory of `device`.

    `what` is the subject of the message and `fix` its advice. Sizes below 256 MiB always pass.
    """
    if num_bytes < _GIB // 4:
        return
    available = _available(device)
    if num_bytes > available:
        raise ModelError(
            f"{what} takes {num_bytes / _GIB:.1f} GiB and {available / _GIB:.1f} GiB are free on "
            f"{device}; {fix}"
        )


def free_memory(device: torch.device) -> int:
    """Free memory of the device, in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _available(device: torch.device) -> int:
    """`free_memory`, on the host with free swap and file caches, in bytes."""
    if device.type == "cuda" or not _MEMINFO.exists():
        return free_memory(device)
    lines = _MEMINFO.read_text(encoding="utf-8").splitlines()
    kib = {
        name: int(value.split()[0]) for name, _, value in (line.partition(":") for line in lines)
    }
    return 1024 * (kib["MemAvailable"] + kib["SwapFree"])
