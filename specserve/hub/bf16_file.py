"""Writing a safetensors file of bfloat16 tensors that do not fit in memory together.

Owns the header and the rounding. The tensors come as float32 rows, a few at a time.
"""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Struct

Rows = Iterable[npt.NDArray[np.float32]]


class Bf16Tensor(Struct, frozen=True):
    """A tensor to write: its shape, and its rows in order, cut wherever the source likes."""

    shape: tuple[int, ...]
    rows: Rows


def write_bf16(path: Path, tensors: Mapping[str, Bf16Tensor]) -> Iterable[int]:
    """Write `tensors` in order; yields the bytes written after each one."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + 2 * math.prod(tensor.shape)
        header[name] = {"dtype": "BF16", "shape": tensor.shape, "data_offsets": (start, end)}
    encoded = msgspec.json.encode(header)
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors.values():
            before = stream.tell()
            for rows in tensor.rows:
                stream.write(to_bf16(rows).tobytes())
            assert stream.tell() - before == 2 * math.prod(tensor.shape)
            yield stream.tell() - 8 - len(encoded)


def to_bf16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """The bits of the nearest bfloat16, ties to even. NaN stays NaN."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)
