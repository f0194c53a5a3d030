"""The building blocks of a transformer layer: linear maps, RMSNorm, rotary embedding, SwiGLU.

Each maps every row independently of the other rows. Knows nothing about attention, caches or
checkpoints.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from specserve.models.rope import RopeShape, rotary_table
from specserve.models.row_tiles import BASE_ROWS, RowTiles, probe_row_tiles


class Linear:
    """x W^T + b. With `tiles` set, a row's bits do not depend on the other rows: `row_tiles`."""

    def __init__(
        self,
        weight: Tensor,  # [out_features, in_features]
        bias: Tensor | None = None,  # [out_features]
        tiles: RowTiles | None = None,
    ) -> None:
        self.weight = weight
        self.bias = bias
        self.tiles = tiles

    def __call__(self, x: Tensor) -> Tensor:  # [num_rows, in] -> [num_rows, out]
        if self.tiles is None:
            return F.linear(x, self.weight, self.bias)
        return self.tiles.linear(x, self.weight, self.bias)


class RMSNorm:
    """RMSNorm (Zhang and Sennrich 2019), computed in float32 for rows of any dtype."""

    def __init__(self, size: int, eps: float, device: torch.device) -> None:
        self.weight = torch.ones(size, dtype=torch.float32, device=device)
        self._eps = eps

    def __call__(self, x: Tensor) -> Tensor:  # [..., size], result has the same shape and dtype
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self._eps).to(x.dtype)


class Rotary:
    """The table of rotary angles on one device; `rotate` applies them."""

    def __init__(
        self, rope: RopeShape, head_dim: int, num_positions: int, device: torch.device
    ) -> None:
        cos, sin = rotary_table(rope, head_dim, num_positions)
        self._cos, self._sin = cos.to(device), sin.to(device)

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin for `positions` [num_rows], each [num_rows, 1, head_dim / 2] float32."""
        return self._cos[positions, None], self._sin[positions, None]


def rotate(
    x: Tensor,  # [num_rows, num_heads, head_dim]
    angles: tuple[Tensor, Tensor],
) -> Tensor:  # same shape and dtype; computed in float32
    """Apply rotary position embedding. `angles` are the cos and sin from `Rotary.angles`."""
    cos, sin = angles
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x.dtype)


def swiglu(gate_up: Tensor) -> Tensor:  # [num_rows, 2 * size] -> [num_rows, size]
    """silu(gate) * up (Shazeer 2020)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def swiglu_exact(gate_up: Tensor) -> Tensor:  # [num_rows, 2 * size] -> [num_rows, size]
    """`swiglu` whose bits for an element do not depend on the element's place in the tensor.

    On a CPU `F.silu` uses a different formula for the elements left over after whole SIMD vectors,
    and which elements those are depends on the shape and the number of threads. `exp` uses the
    same formula for all elements.
    """
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (gate / gate.neg().exp_().add_(1.0)).mul_(up).to(gate_up.dtype)


def probe_linears(linears: list[Linear]) -> None:
    """Set `tiles` of every linear. Probes once per distinct shape, dtype and presence of a bias."""
    known: dict[tuple[torch.Size, torch.dtype, bool], RowTiles] = {}
    for linear in linears:
        key = (linear.weight.shape, linear.weight.dtype, linear.bias is not None)
        if key not in known:
            known[key] = probe_row_tiles(linear.weight, linear.bias)
        linear.tiles = known[key]


def pad_rows(x: Tensor, multiple: int) -> Tensor:  # [num_rows, ...] -> [padded_rows, ...]
    """Append zero rows up to a multiple of `multiple`."""
    missing = -x.shape[0] % multiple
    return torch.cat((x, x.new_zeros(missing, *x.shape[1:]))) if missing else x


__all__ = [
    "BASE_ROWS",
    "Linear",
    "RMSNorm",
    "Rotary",
    "pad_rows",
    "probe_linears",
    "rotate",
    "swiglu",
    "swiglu_exact",
]
