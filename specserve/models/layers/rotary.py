"""Applies rotary position embedding. `models.rope` computes its table of angles."""

import torch
from torch import Tensor

from specserve.models.rope import RopeShape, rotary_table


class Rotary:
    """The table of rotary angles on one device; `rotate` applies them."""

    def __init__(
        self, rope: RopeShape, head_dim: int, num_positions: int, device: torch.device
    ) -> None:
        cos, sin = rotary_table(rope, head_dim, num_positions)
        self.cos, self.sin = cos.to(device), sin.to(device)  # [num_positions, head_dim / 2] float32

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin for `positions` [num_rows], each [num_rows, 1, head_dim / 2] float32."""
        return self.cos[positions, None], self.sin[positions, None]


def rotate(
    x: Tensor,  # [num_rows, num_heads, head_dim]
    angles: tuple[Tensor, Tensor],
) -> Tensor:  # same shape and dtype; computed in float32
    """Apply rotary position embedding. `angles` are the cos and sin from `Rotary.angles`."""
    cos, sin = angles
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x.dtype)
