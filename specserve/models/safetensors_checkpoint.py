"""The safetensors files of a model directory as a `Checkpoint`.

The place and size of each tensor are checked before one is read.
"""

import math
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec
import torch
from msgspec import Struct
from safetensors import safe_open
from torch import Tensor

from specserve.files import FileError, check_file, is_there, quoted, short
from specserve.models.fields import Fields, ModelError, read_json
from specserve.models.tensor_entry import TensorEntry, check_finite
from specserve_kernels.packed_weight import PackedWeight

SINGLE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_MAX_DIMS = 16
_FLOATS: Final = ("F64", "F32", "F16", "BF16")
INTEGERS: Final = ("I64", "I32", "BOOL")
_BITS: Final = re.compile(r"BOOL|[A-Z]+(\d+)(_\w+)?")  # bits per value; BOOL has 8


class SafetensorsCheckpoint:
    """A `Checkpoint` of one file, or of the files that an index file lists.

    Tensors can be read if their dtype is a float dtype or in `also`. Raises `ModelError` for files
    that are missing, truncated or not safetensors, for tensors that overlap or leave gaps, and for
    two tensors of the same name with different values.
    """

    def __init__(self, path: Path, also: Collection[str] = ()) -> None:
        self.path = path
        self.entries: dict[str, TensorEntry] = {}
        self.index: Mapping[str, str] = {}
        self.quantized = False
        self._open: dict[Path, Any] = {}
        files = [path / SINGLE_FILE]
        if not is_there(files[0]):
            self.index, files = _read_index(path)
        for file in files:
            for name, header in _read_headers(file):
                readable = header.dtype in (*_FLOATS, *also)
                self._add(name, TensorEntry(file, header.dtype, header.shape, readable))

    def floats(self, name: str, rows: Tensor | None = None) -> Tensor:
        entry = self.entries[name]
        if not entry.readable:
            raise ModelError(f"{entry.file}: {name} has dtype {entry.dtype}, not supported")
        tensor = self._read(entry, name)
        check_finite(entry, name, tensor)
        return tensor if rows is None else tensor[rows]

    def quantized_weight(self, name: str) -> PackedWeight | None:
        return None

    def _add(self, name: str, entry: TensorEntry) -> None:
        other = self.entries.setdefault(name, entry)
        if other is entry or (
            (entry.dtype, entry.shape) == (other.dtype, other.shape)
            and torch.equal(self._read(entry, name), self._read(other, name))
        ):
            return
        meant = self.index.get(name)
        hint = f"; the index says {short(meant)}" if meant else ""
        raise ModelError(
            f"{entry.file}: {short(name)} is also in {other.file.name}, with other "
            f"values{hint}; fetch the checkpoint again"
        )

    def _read(self, entry: TensorEntry, name: str) -> Tensor:
        if entry.file not in self._open:
            self._open[entry.file] = safe_open(entry.file, framework="pt")
        tensor: Tensor = self._open[entry.file].get_tensor(name)
        return tensor


class _Header(Struct):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def _read_index(path: Path) -> tuple[Mapping[str, str], list[Path]]:
    """The map from tensor name to file name in the index file, and the paths of the files."""
    index = path / INDEX
    section = Fields(read_json(index), str(index)).section("weight_map")
    for name, file in section.values.items():
        if not isinstance(file, str) or Path(file).name != file:
            section.fail(name, "this is not a plain file name")
        if not is_there(path / file):
            raise ModelError(f"{index}: {short(file)} is listed but not there; fetch it again")
    if not section.values:
        raise ModelError(f"{index}: weight_map lists no files")
    return section.values, [path / file for file in sorted(set(section.values.values()))]


def _read_headers(file: Path) -> Iterator[tuple[str, _Header]]:
    try:
        size = check_file(file)
    except FileError as error:
        raise ModelError(str(error)) from None
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
    _check_layout(file, headers, size - 8 - header_size)
    yield from headers.items()


def _check_layout(file: Path, headers: dict[str, _Header], num_bytes: int) -> None:
    """Raise `ModelError` unless the tensors fill the `num_bytes` of data without gap or overlap."""
    end = 0
    for name, header in sorted(headers.items(), key=lambda item: item[1].data_offsets):
        first, last = header.data_offsets
        expected = _num_bytes(header)
        if expected is None or first != end or last - first != expected:
            wanted = "" if expected is None else f"; expected {end} to {end + expected}"
            raise ModelError(
                f"{file}: {short(name)} {quoted(list(header.shape))} "
                f"{short(header.dtype)} lies at bytes {first} to {last}{wanted}; "
                f"the file is damaged"
            )
        end = last
    if end != num_bytes:
        raise ModelError(
            f"{file}: the tensors take {end} bytes but {num_bytes} follow the header; the file is "
            f"cut short or damaged; fetch it again"
        )


def _num_bytes(header: _Header) -> int | None:
    """The size of a tensor in bytes; None if its dtype or shape is invalid."""
    bits = _BITS.fullmatch(header.dtype)
    if bits is None or len(header.shape) > _MAX_DIMS or min(header.shape, default=0) < 0:
        return None
    return math.prod(header.shape) * int(bits.group(1) or 8) // 8
