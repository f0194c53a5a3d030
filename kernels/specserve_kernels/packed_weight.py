"""Weights as every backend reads them: groups of 32 inputs, tiles of 16 outputs.

Defines the formats. Knows no files and no instruction sets. The two quantized ones can hold GGUF's
Q4_0, Q4_1 and Q8_0 without requantization: a weight is value * scale + minimum (no minimum in
int8). Scale and minimum are float16, one of each per group:

    int4    320 bytes a tile: scale[16], minimum[16], then nibbles [4][16][4]; byte [c][n][i] holds
            output n's inputs 8c + i (low) and 8c + 4 + i (high), 0..15
    int8    544 bytes a tile: scale[16], then [8][16][4] int8; byte [c][n][i] is input 4c + i
    floats  [32][16] bfloat16, float16 or float32; element [c][n] is output n's input c

A panel is all tiles of the same 16 outputs, in the order of their inputs; one core reads it
sequentially. The last panel is padded with zeros.
"""

from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from typing import Final

import torch
from torch import Tensor

GROUP: Final = 32  # inputs that share a scale
PANEL: Final = 16  # outputs of a tile
_BLOCK_VALUES: Final = 2**18  # weights that are quantized at a time: they stay in the CPU cache


class WeightFormat(IntEnum):
    """The values are those of the native kernels."""

    INT4 = 4
    INT8 = 8
    BFLOAT16 = 16
    FLOAT16 = 17
    FLOAT32 = 32

    @property
    def quantized(self) -> bool:
        return self in (WeightFormat.INT4, WeightFormat.INT8)

    @property
    def dtype(self) -> torch.dtype:
        """Of float weights."""
        return _DTYPES[self]

    @property
    def tile_bytes(self) -> int:
        return _TILE_BYTES[self]


_TILE_BYTES: Final = {
    WeightFormat.INT4: 320,
    WeightFormat.INT8: 544,
    WeightFormat.BFLOAT16: 1024,
    WeightFormat.FLOAT16: 1024,
    WeightFormat.FLOAT32: 2048,
}
_DTYPES: Final = {
    WeightFormat.BFLOAT16: torch.bfloat16,
    WeightFormat.FLOAT16: torch.float16,
    WeightFormat.FLOAT32: torch.float32,
}


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight [num_outputs, num_inputs], quantized or not; the module describes the layout."""

    format: WeightFormat
    num_outputs: int
    num_inputs: int  # a multiple of 32
    panels: Tensor  # [num_panels, num_inputs / 32, tile_bytes] uint8, contiguous

    @property
    def num_bytes(self) -> int:
        return self.panels.numel()


def pack_int4(
    values: Tensor,  # [num_outputs, num_inputs] uint8, 0..15
    scales: Tensor,  # [num_outputs, num_inputs / 32] float16
    minimums: Tensor,  # [num_outputs, num_inputs / 32] float16
) -> PackedWeight:
    """Pack int4 values: Q4_1 as stored, Q4_0 with `minimums` = -8 * scales.

    Raises ValueError for other shapes, and if num_inputs is not a multiple of 32.
    """
    low, high = torch.unflatten(_words(values), -1, (4, 2)).unbind(-1)  # [panel, n, group, c]
    return _packed(WeightFormat.INT4, values, low | high << 4, [scales, minimums])


def pack_int8(
    values: Tensor,  # [num_outputs, num_inputs] int8
    scales: Tensor,  # [num_outputs, num_inputs / 32] float16
) -> PackedWeight:
    """Pack int8 values: Q8_0 as stored.

    Raises ValueError for other shapes, and if num_inputs is not a multiple of 32.
    """
    return _packed(WeightFormat.INT8, values, _words(values), [scales])


def pack_floats(weight: Tensor) -> PackedWeight:  # [num_outputs, num_inputs]
    """Pack bfloat16, float16 or float32 weights as they are.

    Raises ValueError for other dtypes, and if num_inputs is not a multiple of 32.
    """
    formats = {dtype: weight_format for weight_format, dtype in _DTYPES.items()}
    if weight.dtype not in formats:
        raise ValueError(f"weights of {weight.dtype} cannot be packed; convert them to float32")
    tiles = _padded(_checked(weight)).view(-1, PANEL, weight.shape[1] // GROUP, GROUP)
    panels = tiles.permute(0, 2, 3, 1).contiguous().view(torch.uint8).flatten(2)
    return PackedWeight(formats[weight.dtype], weight.shape[0], weight.shape[1], panels)


def quantize_int8(weight: Tensor) -> PackedWeight:  # [num_outputs, num_inputs], any float dtype
    """Round to the nearest int8 weights, symmetric per group of 32.

    Raises ValueError if num_inputs is not a multiple of 32.
    """
    groups = torch.unflatten(_checked(weight).float(), 1, (-1, GROUP))
    scales = (groups.abs().amax(-1) / 127).half()
    # A scale that is too small for float16 becomes zero, and so do the weights of its group.
    inverse = torch.where(scales > 0, 1 / scales.float(), 0.0)
    values = (groups * inverse[..., None]).round().clamp(-127, 127).to(torch.int8)
    return pack_int8(values.flatten(1), scales)


def quantize_int4(weight: Tensor) -> PackedWeight:  # [num_outputs, num_inputs], any float dtype
    """Quantize to int4 with a scale and a minimum per group of 32.

    Per group, tries value ranges of 100 % to 80 % of the group's own range around its middle and
    uses the one with the smallest squared error: clipping outliers gives smaller steps. Raises
    ValueError if num_inputs is not a multiple of 32.
    """
    rows = max(1, _BLOCK_VALUES // _checked(weight).shape[1])
    blocks = [_quantized_int4(block.float()) for block in torch.split(weight, rows)]
    values, scales, minimums = (torch.cat(parts) for parts in zip(*blocks, strict=True))
    return pack_int4(values, scales, minimums)


def _quantized_int4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The arguments of `pack_int4` for a float32 weight."""
    groups = torch.unflatten(weight, 1, (-1, GROUP))
    low, high = groups.amin(-1), groups.amax(-1)
    best = torch.full_like(low, torch.inf)
    values = torch.zeros(groups.shape, dtype=torch.uint8)
    scales, minimums = torch.zeros_like(low).half(), torch.zeros_like(low).half()
    for share in (1.0, 0.95, 0.9, 0.85, 0.8):
        middle, half = (low + high) / 2, (high - low) / 2 * share
        scale, minimum = (half * 2 / 15).half(), (middle - half).half()
        inverse = torch.where(scale > 0, 1 / scale.float(), 0.0)
        offset = minimum.float()[..., None]
        tried = (groups - offset).mul_(inverse[..., None]).round_().clamp_(0, 15)
        restored = (tried * scale.float()[..., None]).add_(offset)
        error = restored.sub_(groups).square_().sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        values = torch.where(better[..., None], tried.to(torch.uint8), values)
        scales = torch.where(better, scale, scales)
        minimums = torch.where(better, minimum, minimums)
    return values.flatten(1), scales, minimums


def unpack(weight: PackedWeight) -> Tensor:  # [num_outputs, num_inputs] float32
    """All weights as floats."""
    floats = _floats(weight.format, weight.panels, PANEL)
    return floats.transpose(1, 2).flatten(2).flatten(0, 1)[: weight.num_outputs]


def unpack_rows(weight: PackedWeight, rows: Tensor) -> Tensor:
    """The weights of the outputs `rows` [n] int64 only: [n, num_inputs] float32."""
    groups = torch.arange(weight.panels.shape[1])
    places = _row_bytes(weight.format)[rows % PANEL]
    tiles = weight.panels[(rows // PANEL)[:, None, None], groups[:, None], places[:, None]]
    return _floats(weight.format, tiles, 1).flatten(1)


def _floats(weight_format: WeightFormat, tiles: Tensor, width: int) -> Tensor:
    """Tiles [n, num_groups, bytes] of `width` outputs -> [n, num_groups, width, GROUP] float32."""
    if not weight_format.quantized:
        values = tiles.contiguous().view(weight_format.dtype)
        return torch.unflatten(values, -1, (GROUP, width)).transpose(2, 3).float()
    if weight_format is WeightFormat.INT4:
        sizes = [2 * width, 2 * width, 16 * width]
        scale, minimum, packed = (part.contiguous() for part in torch.split(tiles, sizes, -1))
        chunks = torch.unflatten(packed, -1, (4, width, 4))
        halves = torch.stack([chunks & 15, chunks >> 4], 3)  # [..., c, half, n, i]
        values = halves.permute(0, 1, 4, 2, 3, 5).flatten(3)
        offset = minimum.view(torch.float16).float()[..., None]
    else:
        sizes = [2 * width, 32 * width]
        scale, packed = (part.contiguous() for part in torch.split(tiles, sizes, -1))
        chunks = torch.unflatten(packed.view(torch.int8), -1, (8, width, 4))
        values, offset = chunks.transpose(2, 3).flatten(3), torch.zeros(())
    return values.float() * scale.view(torch.float16).float()[..., None] + offset


@cache
def _row_bytes(weight_format: WeightFormat) -> Tensor:
    """[PANEL, n] int64: each output's byte offsets in a tile, ordered as in a one-output tile."""
    places = torch.arange(weight_format.tile_bytes)
    if not weight_format.quantized:
        return places.view(GROUP, PANEL, -1).transpose(0, 1).flatten(1)
    num_heads = 2 if weight_format is WeightFormat.INT4 else 1
    heads, chunks = places[: 2 * PANEL * num_heads], places[2 * PANEL * num_heads :]
    by_output = (heads.view(num_heads, PANEL, 2), chunks.view(-1, PANEL, 4))
    return torch.cat([part.transpose(0, 1).flatten(1) for part in by_output], 1)


def _checked(values: Tensor) -> Tensor:
    if values.dim() != 2 or values.shape[1] % GROUP or not values.numel():
        raise ValueError(
            f"a weight of shape {list(values.shape)} cannot be packed: "
            f"the number of inputs must be a multiple of {GROUP}"
        )
    return values


def _words(values: Tensor) -> Tensor:  # -> [num_panels, PANEL, num_groups, 8] int32
    """Bytes i = 0..3 of each chunk c as one number: fewer and larger items are moved faster."""
    padded = _padded(_checked(values)).contiguous()
    return padded.view(torch.int32).view(-1, PANEL, values.shape[1] // GROUP, GROUP // 4)


def _padded(x: Tensor) -> Tensor:  # with zero rows up to a whole panel
    missing = -x.shape[0] % PANEL
    return torch.cat([x, x.new_zeros(missing, x.shape[1])]) if missing else x


def _packed(
    weight_format: WeightFormat, values: Tensor, words: Tensor, halves: list[Tensor]
) -> PackedWeight:
    """words: [num_panels, PANEL, num_groups, chunks of a tile], halves: the scales and so on."""
    num_outputs, num_inputs = values.shape
    for half in halves:
        if half.shape != (num_outputs, num_inputs // GROUP) or half.dtype != torch.float16:
            raise ValueError(
                f"{list(half.shape)} {half.dtype} is not one float16 per group of {GROUP} of a "
                f"weight of shape {list(values.shape)}"
            )
    heads = [torch.unflatten(_padded(half), 0, (-1, PANEL)).transpose(1, 2) for half in halves]
    chunks = words.permute(0, 2, 3, 1).flatten(2)  # [panel, group, c * n]
    parts = [part.contiguous().view(torch.uint8) for part in (*heads, chunks)]
    panels = torch.cat(parts, -1)
    return PackedWeight(weight_format, num_outputs, num_inputs, panels)
