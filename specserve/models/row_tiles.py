"""Matrix products in which the bits of a row do not depend on the number of rows.

A library chooses its kernel, and with it the order of summation, by the number of rows, so a row
computed alone often differs in the last bit from the same row among eight. So a product is split
into row tiles, of sizes that a probe at load time found safe for this machine and this weight.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from specserve.models.fields import ModelError

BASE_ROWS = 8
_LADDER = (16, 24, 32, 40, 48, 56, 64, 128, 256, 512)
_ALWAYS_PROBED_ROWS = 64  # tiles up to the size of a speculative step are always probed
_MAX_PROBE_MULTIPLY_ADDS = 2**31  # in one tile that is larger; bounds load time
# Values that are compared per size. The sums are float32: another order of summation changes nearly
# every sum, but once rounded to 16 bits only 1 in 15,000 to 30,000 (measured with AMX).
_PROBED_VALUES = {torch.float32: 2**12, torch.bfloat16: 2**19, torch.float16: 2**19}
_MAX_PROBED_ROWS = 4096  # so that a narrow product takes 0.2 s; it is probed with fewer values


@dataclass(frozen=True, slots=True)
class RowTiles:
    """The tile sizes that passed the probe for one weight, all multiples of `BASE_ROWS`."""

    sizes: tuple[int, ...] = (BASE_ROWS,)  # descending, ends with BASE_ROWS

    def split(self, num_rows: int) -> Iterator[int]:
        """Yield tile sizes that add up to `num_rows`, a multiple of `BASE_ROWS`; largest first."""
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
        """`F.linear`, with bits of each row that do not depend on the other rows."""
        tiles = list(self.split(x.shape[0]))
        if len(tiles) == 1:
            return F.linear(x, weight, bias)
        if not tiles:
            return x.new_empty(0, weight.shape[0])
        return torch.cat([F.linear(part, weight, bias) for part in torch.split(x, tiles)])


def probe_row_tiles(weight: Tensor, bias: Tensor | None) -> RowTiles:
    """Find the tile sizes that are safe for a loaded `weight`.

    A size is safe if the tiles of some random rows give each of them the same bits as tiles of
    `BASE_ROWS` do, with the current number of threads. Raises `ModelError` if even in a tile of
    `BASE_ROWS` the bits of a row depend on its place.
    """
    out_features, in_features = weight.shape
    limit = max(_ALWAYS_PROBED_ROWS, _MAX_PROBE_MULTIPLY_ADDS // (out_features * in_features))
    sizes = [size for size in reversed(_LADDER) if size <= limit]
    num_rows = min(_MAX_PROBED_ROWS, -(-_PROBED_VALUES[weight.dtype] // out_features))

    def probed(size: int) -> int:
        return -(-num_rows // size) * size

    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(max(map(probed, sizes)), in_features, generator=generator)
    rows = rows.to(weight.device, weight.dtype)

    def product(x: Tensor, size: int) -> Tensor:
        return torch.cat([F.linear(tile, weight, bias) for tile in torch.split(x, size)])

    base = product(rows, BASE_ROWS)
    # Rolled, so that every row is at another place in its tile.
    if not torch.equal(product(rows.roll(3, 0), BASE_ROWS), base.roll(3, 0)):
        raise ModelError(
            f"exactness 'exact' is not possible: the {out_features} x {in_features} "
            f"{weight.dtype} product of this library depends on a row's place even in a tile of "
            f"{BASE_ROWS}; start with exactness 'fast'"
        )
    safe = [n for n in sizes if torch.equal(product(rows[: probed(n)], n), base[: probed(n)])]
    return RowTiles((*safe, BASE_ROWS))


def pad_rows(x: Tensor, multiple: int) -> Tensor:  # [num_rows, ...] -> [padded_rows, ...]
    """Append zero rows up to a multiple of `multiple`."""
    missing = -x.shape[0] % multiple
    return torch.cat((x, x.new_zeros(missing, *x.shape[1:]))) if missing else x
