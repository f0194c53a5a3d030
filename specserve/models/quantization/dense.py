"""Float weights: no quantisation."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from specserve.models.checkpoint import Checkpoint
from specserve.models.layers.linear import Linear
from specserve.models.row_tiles import BASE_ROWS, RowTiles, probe_row_tiles


@dataclass(frozen=True, slots=True)
class DenseMethod:
    """A `QuantMethod` that holds the weight in floats."""

    weight: Tensor  # [num_outputs, num_inputs], any float dtype
    tiles: RowTiles | None = None  # exact if given

    @property
    def num_bytes(self) -> int:
        """See `QuantMethod`."""
        return self.weight.nbytes

    def apply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """See `QuantMethod.apply`; computed in the weight's dtype, which `bias` has too."""
        rows = x.to(self.weight.dtype)
        if self.tiles is None or len(rows) % BASE_ROWS:
            return F.linear(rows, self.weight, bias).to(x.dtype)
        return self.tiles.linear(rows, self.weight, bias).to(x.dtype)

    def rows(self, ids: Tensor) -> Tensor:
        """See `EmbeddingMethod.rows`; in the weight's dtype."""
        return F.embedding(ids, self.weight)


class DenseScheme:
    """A `QuantScheme` that converts every weight to floats of `dtype` on `device`."""

    def __init__(
        self, checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device, exact: bool
    ) -> None:
        self.activation_dtype = dtype
        self.exact = exact
        self.row_multiple = BASE_ROWS if exact else 1
        self._checkpoint = checkpoint
        self._device = device
        self._probed: dict[tuple[torch.Size, bool], RowTiles] = {}

    def linear(self, names: Sequence[str], *, with_bias: bool = False) -> Linear:
        """See `QuantScheme.linear`."""
        weight = self._read([f"{name}.weight" for name in names])
        bias = self._read([f"{name}.bias" for name in names]) if with_bias else None
        return Linear(DenseMethod(weight, self._tiles(weight, bias)), bias)

    def embedding(self, name: str) -> DenseMethod:
        """See `QuantScheme.embedding`."""
        weight = self._read([f"{name}.weight"])
        return DenseMethod(weight, self._tiles(weight, None))

    def _read(self, names: Sequence[str]) -> Tensor:
        """The tensors `names`, one below the other."""
        shapes = [self._checkpoint.entries[name].shape for name in names]
        heights = [shape[0] for shape in shapes]
        size = (sum(heights), *shapes[0][1:])
        whole = torch.empty(size, dtype=self.activation_dtype, device=self._device)
        for name, part in zip(names, torch.split(whole, heights), strict=True):
            part.copy_(self._checkpoint.floats(name))
        return whole

    def _tiles(self, weight: Tensor, bias: Tensor | None) -> RowTiles | None:
        if not self.exact:
            return None
        key = weight.shape, bias is not None
        if key not in self._probed:
            self._probed[key] = probe_row_tiles(weight, bias)
        return self._probed[key]
