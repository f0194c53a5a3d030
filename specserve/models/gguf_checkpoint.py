"""A GGUF file as a `Checkpoint`, read without converting it on disk.

Owns the conversion of quantised blocks to `PackedWeight`. Tensor names and row order come from
`hub.gguf_tensors`.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from specserve.files import FileError, is_there
from specserve.hub.errors import HubError
from specserve.hub.gguf_config import read_config
from specserve.hub.gguf_file import GgufFile
from specserve.hub.gguf_tensors import source_tensors
from specserve.models.fields import ModelError
from specserve.models.tensor_entry import TensorEntry, check_finite
from specserve_kernels.packed_weight import GROUP, PackedWeight, pack_int4, pack_int8

Bytes = npt.NDArray[np.uint8]

_UNQUANTISED: Final[Mapping[Kind, torch.dtype]] = {
    Kind.F32: torch.float32,
    Kind.F16: torch.float16,
    Kind.BF16: torch.bfloat16,
}
_SCALE_BYTES: Final[Mapping[Kind, int]] = {Kind.Q4_0: 2, Kind.Q4_1: 4, Kind.Q8_0: 2}
_LOW_NIBBLES: Final = np.uint64(0x0F0F0F0F0F0F0F0F)


class GgufCheckpoint:
    """A `Checkpoint` of one GGUF file. Raises `ModelError` if it is missing or damaged."""

    def __init__(self, path: Path) -> None:
        file = Path(os.path.realpath(path))  # messages name the target of a symbolic link
        try:
            if not is_there(file):
                raise FileError(
                    f"{path}: the weights are in {file}, which is not there; put it back, or give "
                    f"the .gguf file itself as the model"
                )
            self._file = GgufFile(file)
            self._sources = source_tensors(self._file, read_config(self._file))
        except OSError as error:
            raise ModelError(f"{file}: cannot be read ({error.strerror})") from None
        except (FileError, HubError) as error:
            raise ModelError(str(error)) from None
        self.index: Mapping[str, str] = {}
        self.entries = {
            name: TensorEntry(file, source.tensor.kind.name, source.tensor.shape)
            for name, source in self._sources.items()
        }
        self.quantized = any(
            source.tensor.kind not in _UNQUANTISED for source in self._sources.values()
        )

    def floats(self, name: str, rows: Tensor | None = None) -> Tensor:
        source = self._sources[name]
        tensor, order = source.tensor, source.row_order
        raw = self._file.rows(tensor)
        if rows is not None:  # few of many, so that the others are not read
            raw = raw[rows.numpy() if order is None else order[rows.numpy()]]
            order = None
        if tensor.kind in _UNQUANTISED:
            values = torch.from_numpy(raw.copy()).view(_UNQUANTISED[tensor.kind])
        else:
            values = torch.from_numpy(self._file.dequantized(raw, tensor.kind))
        if rows is None:
            values = values.view(tensor.shape)
        check_finite(self.entries[name], name, values)
        return values if order is None else values[torch.from_numpy(order)]

    def quantized_weight(self, name: str) -> PackedWeight | None:
        source = self._sources[name]
        tensor = source.tensor
        if tensor.kind not in _SCALE_BYTES or len(tensor.shape) != 2:
            return None
        rows = self._file.rows(tensor)
        if source.row_order is not None:
            rows = rows[source.row_order]
        blocks = rows.reshape(len(rows), tensor.shape[1] // GROUP, -1)
        check_finite(self.entries[name], name, _halves(blocks[..., : _SCALE_BYTES[tensor.kind]]))
        return _pack(tensor.kind, blocks)


def _pack(kind: Kind, blocks: Bytes) -> PackedWeight:
    scales = _halves(blocks[..., :2])
    if kind == Kind.Q4_0:  # float16 d, 32 nibbles q; (q - 8) * d
        return pack_int4(_nibbles(blocks[..., 2:]), scales, -8 * scales)
    if kind == Kind.Q4_1:  # float16 d and m, 32 nibbles q; q * d + m
        return pack_int4(_nibbles(blocks[..., 4:]), scales, _halves(blocks[..., 2:4]))
    values = blocks[..., 2:].copy().view(np.int8)  # float16 d, 32 int8 q; q * d
    return pack_int8(torch.from_numpy(values).flatten(1), scales)


def _nibbles(packed: Bytes) -> Tensor:  # [n, g, 16] -> [n, 32 * g] uint8; low nibbles first
    words = packed.copy().view(np.uint64)  # eight bytes at a time
    values = np.empty((*words.shape[:2], 2, 2), np.uint64)
    np.bitwise_and(words, _LOW_NIBBLES, out=values[:, :, 0])
    np.right_shift(words, 4, out=values[:, :, 1])
    values &= _LOW_NIBBLES
    return torch.from_numpy(values.view(np.uint8)).flatten(1)


def _halves(raw: Bytes) -> Tensor:  # [n, g, 2 * k] bytes -> [n, g, k] float16, [n, g] if k is 1
    return torch.from_numpy(raw.copy().view(np.float16)).squeeze(-1)
