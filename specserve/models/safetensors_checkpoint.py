"""The safetensors files of a model directory, checked before anything is mapped.

Owns the file layout: which files, which tensors, where and how big. Knows no model. Invariant: a
checkpoint that was built describes bytes that are all there.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct
from safetensors import safe_open
from torch import Tensor

from specserve.models.fields import Fields, ModelError, read_json
from specserve.models.tensor_entry import TensorEntry
from specserve_kernels.packing import PackedWeight

SINGLE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
INTEGERS: Mapping[str, int] = {"I64": 8, "I32": 4, "BOOL": 1}  # and the bytes of one


class SafetensorsCheckpoint:
    """A `Checkpoint` of one file, or of the files that an index lists.

    Tensors are floats, or of the dtypes in `also`. Raises `ModelError` for files that are missing,
    cut short, overlapping or not safetensors.
    """

    def __init__(self, path: Path, also: Mapping[str, int] | None = None) -> None:
        self.path = path
        self.entries: dict[str, TensorEntry] = {}
        self.quantized = False
        self._open: dict[Path, Any] = {}
        for file in _files(path):
            for name, entry in _read_entries(file, {**_ITEM_BYTES, **(also or {})}):
                if name in self.entries:
                    raise ModelError(f"{file}: {name} is also in {self.entries[name].file.name}")
                self.entries[name] = entry

    def floats(self, name: str) -> Tensor:
        file = self.entries[name].file
        if file not in self._open:
            self._open[file] = safe_open(file, framework="pt")
        tensor: Tensor = self._open[file].get_tensor(name)
        return tensor

    def packed(self, name: str) -> PackedWeight | None:
        return None


class _Header(Struct):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def _files(path: Path) -> list[Path]:
    single, index = path / SINGLE_FILE, path / INDEX
    if single.is_file():
        return [single]
    names = Fields(read_json(index), str(index)).section("weight_map").values.values()
    files = []
    for name in sorted({str(name) for name in names}):
        if Path(name).name != name:
            raise ModelError(f"{index}: {name!r} is not a plain file name")
        if not (path / name).is_file():
            raise ModelError(f"{index}: {name} is listed but not there; fetch it again")
        files.append(path / name)
    if not files:
        raise ModelError(f"{index}: weight_map lists no files")
    return files


def _read_entries(file: Path, sizes: Mapping[str, int]) -> Iterator[tuple[str, TensorEntry]]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        header_size = int.from_bytes(stream.read(8), "little")
        if size < 8 or header_size > min(size - 8, _MAX_HEADER_BYTES):
            raise ModelError(
                f"{file}: the header claims {header_size} bytes but the file has {size}; "
                f"it is cut short or not safetensors; fetch it again"
            )
        raw = stream.read(header_size)
    try:
        parsed = msgspec.json.decode(raw, type=dict[str, Any])
        parsed.pop("__metadata__", None)
        headers = msgspec.convert(parsed, dict[str, _Header])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ModelError(f"{file}: not a safetensors header ({error})") from None
    _check_layout(file, headers, size - 8 - header_size, sizes)
    for name, header in headers.items():
        yield name, TensorEntry(file, header.dtype, header.shape)


def _check_layout(
    file: Path, headers: dict[str, _Header], num_bytes: int, sizes: Mapping[str, int]
) -> None:
    """The tensors must follow one another from 0 to the end of the file, each of its own size."""
    end = 0
    for name, header in sorted(headers.items(), key=lambda item: item[1].data_offsets):
        if header.dtype not in sizes:
            raise ModelError(
                f"{file}: {name} has dtype {header.dtype}; supported: {', '.join(sizes)}; "
                f"use the checkpoint that is not quantised"
            )
        first, last = header.data_offsets
        expected = math.prod(header.shape) * sizes[header.dtype]
        if first != end or last - first != expected or min(header.shape, default=0) < 0:
            raise ModelError(
                f"{file}: {name} {list(header.shape)} {header.dtype} lies at bytes {first} to "
                f"{last}; expected {end} to {end + expected}; the file is damaged"
            )
        end = last
    if end != num_bytes:
        raise ModelError(
            f"{file}: the tensors take {end} bytes but {num_bytes} follow the header; the file is "
            f"cut short or damaged; fetch it again"
        )
