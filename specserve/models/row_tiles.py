"""Matrix products whose rows do not depend on how many rows there are.

A library picks another kernel, and so another order of summation, for another number of rows:
one row alone often comes out differently in the last bit than the same row among eight. Here a
product is cut into tiles of sizes that were seen, on this machine and for this weight, to give
every row the bits it has in a tile of `BASE_ROWS`. What the tests cannot promise for a machine
that is not there, the probe decides at load.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

BASE_ROWS = 8
_LADDER = (16, 24, 32, 40, 48, 56, 64, 128, 256, 512)
_FREE_ROWS = 64  # always worth probing: the size of a speculative step
_PROBE_PRODUCTS = 2**31  # multiply-adds one larger tile may cost at load


@dataclass(frozen=True, slots=True)
class RowTiles:
    """The tile sizes proven for one weight. Every size is a multiple of `BASE_ROWS`."""

    sizes: tuple[int, ...] = (BASE_ROWS,)  # descending, ends with BASE_ROWS

    def split(self, num_rows: int) -> Iterator[int]:
        """Tile sizes that add up to `num_rows`, a multiple of `BASE_ROWS`, largest first."""
        assert num_rows % BASE_ROWS == 0, f"{num_rows} rows are no multiple of {BASE_ROWS}"
        for size in self.sizes:
            count, num_rows = divmod(num_rows, size)
            yield from [size] * count

    def linear(
        self,
        x: Tensor,  # [num_rows, in_features]
        weight: Tensor,  # [out_features, in_features]
        bias: Tensor | None,  # [out_features]
    ) -> Tensor:  # [num_rows, out_features]
        """`F.linear`, each row with the bits it would have in any other company."""
        tiles = list(self.split(x.shape[0]))
        if len(tiles) == 1:
            return F.linear(x, weight, bias)
        if not tiles:
            return x.new_empty(0, weight.shape[0])
        return torch.cat([F.linear(part, weight, bias) for part in torch.split(x, tiles)])


def probe_row_tiles(weight: Tensor, bias: Tensor | None) -> RowTiles:
    """Find the tile sizes that are safe for a loaded `weight`, largest first.

    Holds for this thread count and this library. Raises `RuntimeError` if even a tile of
    `BASE_ROWS` gives a row other bits at another place.
    """
    out_features, in_features = weight.shape
    limit = max(_FREE_ROWS, _PROBE_PRODUCTS // (out_features * in_features))
    candidates = [size for size in reversed(_LADDER) if size <= limit]
    x = _random_rows(candidates[0], in_features, weight)
    if not _agrees(x[:BASE_ROWS], weight, bias):
        raise RuntimeError(
            f"exactness 'exact' is not possible: the {out_features} x {in_features} "
            f"{weight.dtype} product of this library depends on a row's place even in a tile of "
            f"{BASE_ROWS}; start with exactness 'fast'"
        )
    sizes = [size for size in candidates if _agrees(x[:size], weight, bias)]
    return RowTiles((*sizes, BASE_ROWS))


def _agrees(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether one tile of all rows equals tiles of `BASE_ROWS`, the rows standing elsewhere."""
    num_rows = x.shape[0]
    shift = 3
    tile = F.linear(x.roll(shift, 0), weight, bias).roll(-shift, 0)
    middle = num_rows // 2 // BASE_ROWS * BASE_ROWS
    for first in {0, middle, num_rows - BASE_ROWS}:
        rows = slice(first, first + BASE_ROWS)
        if not torch.equal(F.linear(x[rows], weight, bias), tile[rows]):
            return False
    return True


def _random_rows(num_rows: int, width: int, like: Tensor) -> Tensor:  # [num_rows, width]
    generator = torch.Generator().manual_seed(0)
    return torch.randn(num_rows, width, generator=generator).to(like.device, like.dtype)
