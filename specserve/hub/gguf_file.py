"""Reads a GGUF file: its metadata and the location of each tensor.

Owns the file layout (GGUF versions 2 and 3, little-endian). Every length and offset is checked
against the file size before use, and every tensor has a type that can be dequantised to floats.
"""

import math
import mmap
import struct
from pathlib import Path
from typing import Any, Final, NoReturn

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from msgspec import Struct

from specserve.files import FileError, check_file, quoted, short
from specserve.hub.errors import HubError

WEIGHTS_NAME: Final = "model.gguf"  # file name in a model directory
# Value types; the letters are those of `struct`.
_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_STRING, _ARRAY = 8, 9
_LENGTH: Final = struct.Struct("<Q")
_DEFAULT_ALIGNMENT = 32
_MAX_DIMS = 4
_MAX_ITEMS = 2**24  # of one list; the longest lists are those of the vocabulary
_CHUNK_VALUES = 2**22  # values that are dequantised at a time; limits peak memory


class GgufTensor(Struct, frozen=True):
    """Type and location of one tensor. `shape` is row-major: [out_features, in_features]."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int  # bytes from the start of the file
    num_bytes: int


class GgufFile:
    """One memory-mapped GGUF file. Raises `HubError` if it is damaged or of an unknown version."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            size = check_file(path)
        except FileError as error:
            raise HubError(str(error)) from None
        if size < 24:
            self._fail(f"{size} bytes are too few")
        with path.open("rb") as stream:
            self._data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        self._at = 0
        if self._data[:4] != b"GGUF":
            self._fail("it does not start with GGUF")
        self._at = 4
        version, num_tensors, num_values = self._scalar("I"), self._scalar("Q"), self._scalar("Q")
        if version not in (2, 3):
            self._fail(f"GGUF version {version} is not supported (2 and 3 are, little-endian)")
        self.metadata = {
            self._string(): self._value(self._scalar("I")) for _ in self._count(num_values)
        }
        infos = [self._tensor_info() for _ in self._count(num_tensors)]
        self.tensors = self._place(infos)
        self._check_kinds()

    def rows(self, tensor: GgufTensor) -> npt.NDArray[np.uint8]:
        """The tensor's raw bytes as a view of the mapped file: [num_rows, row_bytes]."""
        raw = np.frombuffer(self._data, np.uint8, tensor.num_bytes, tensor.offset)
        return raw.reshape(math.prod(tensor.shape[:-1]), -1)

    @staticmethod
    def dequantized(
        rows: npt.NDArray[np.uint8], kind: GGMLQuantizationType
    ) -> npt.NDArray[np.float32]:
        """Raw rows [n, row_bytes] as floats: [n, values of a row]."""
        block, block_bytes = GGML_QUANT_SIZES[kind]
        values = np.empty((len(rows), rows.shape[1] // block_bytes * block), np.float32)
        step = max(1, _CHUNK_VALUES // values.shape[1])
        for first in range(0, len(rows), step):
            with np.errstate(over="ignore", invalid="ignore"):  # damaged scales may be infinite
                values[first : first + step] = dequantize(rows[first : first + step], kind)
        return values

    def _fail(self, reason: str) -> NoReturn:
        raise HubError(f"{self.path}: not a usable GGUF file: {reason}; fetch it again")

    def _count(self, count: int) -> range:
        if count > len(self._data):  # every item takes at least one byte
            self._fail(f"it claims {count} items in {len(self._data)} bytes")
        return range(count)

    def _scalar(self, code: str) -> Any:
        return self._scalars(code, 1)[0]

    def _scalars(self, code: str, count: int) -> tuple[Any, ...]:
        start, num_bytes = self._at, count * struct.calcsize(f"<{code}")
        if num_bytes > len(self._data) - start:
            self._fail(f"{num_bytes} bytes at {start} end past its {len(self._data)} bytes")
        self._at += num_bytes
        return struct.unpack_from(f"<{count}{code}", self._data, start)

    def _string(self) -> str:
        return self._strings(1)[0]

    def _strings(self, count: int) -> list[str]:
        """Read `count` strings in a single loop, because vocabulary lists have some 100,000."""
        data, at, end, texts = self._data, self._at, len(self._data), []
        for _ in self._count(count):
            length = _LENGTH.unpack_from(data, at)[0] if at + 8 <= end else 0
            if at + 8 + length > end:
                self._fail(f"the text at byte {at} ends past its {end} bytes")
            at += 8 + length
            try:
                texts.append(data[at - length : at].decode())
            except UnicodeDecodeError:
                self._fail(f"the text at byte {at - length} is not UTF-8")
        self._at = at
        return texts

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._scalar(self._code(kind))
        item, count = self._scalar("I"), self._scalar("Q")
        if count > _MAX_ITEMS:
            self._fail(f"a list of {count} items")
        if item == _STRING:
            return self._strings(count)
        return list(self._scalars(self._code(item), count))

    def _code(self, kind: int) -> str:
        if kind not in _SCALARS:
            self._fail(f"value type {kind} is unknown")
        return _SCALARS[kind]

    def _tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name, num_dims = self._string(), self._scalar("I")
        if not 1 <= num_dims <= _MAX_DIMS:
            self._fail(f"{short(name)} has {num_dims} dimensions")
        return name, self._scalars("Q", num_dims)[::-1], self._scalar("I"), self._scalar("Q")

    def _check_kinds(self) -> None:
        first_of = {tensor.kind: name for name, tensor in reversed(self.tensors.items())}
        for kind, name in first_of.items():
            try:
                dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
            except NotImplementedError:
                raise HubError(
                    f"{self.path}: {short(name)} is quantised as {kind.name}, which "
                    f"cannot be read; use a file of another quantisation, such as Q8_0 or Q4_K"
                ) from None

    def _place(self, infos: list[tuple[str, tuple[int, ...], int, int]]) -> dict[str, GgufTensor]:
        alignment = self.metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            self._fail(f"general.alignment = {quoted(alignment)}")
        start = -(-self._at // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        for name, shape, kind, offset in infos:
            if name in tensors:
                self._fail(f"{short(name)} is there twice")
            if kind not in GGML_QUANT_SIZES:
                self._fail(f"{short(name)} has the unknown type {kind}")
            kind = GGMLQuantizationType(kind)
            block, block_bytes = GGML_QUANT_SIZES[kind]
            if 0 in shape:
                self._fail(f"{short(name)} is empty: {list(shape)}")
            if shape[-1] % block:
                self._fail(f"{short(name)} has rows of {shape[-1]} values in blocks of {block}")
            num_bytes = math.prod(shape) // block * block_bytes
            first, last = start + offset, start + offset + num_bytes
            if last > len(self._data):
                self._fail(f"{short(name)} ends at byte {last} of {len(self._data)}")
            tensors[name] = GgufTensor(shape, kind, first, num_bytes)
        return tensors
