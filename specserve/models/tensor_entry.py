"""One tensor of a checkpoint, as the header of its file describes it, and a look at its values."""

from pathlib import Path

from msgspec import Struct
from torch import Tensor

from specserve.files import short
from specserve.models.fields import ModelError


class TensorEntry(Struct, frozen=True):
    """Where a tensor is and what it is. `dtype` is the format's own word: BF16, Q4_1."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    readable: bool = True  # as floats


def check_finite(entry: TensorEntry, name: str, values: Tensor) -> None:
    """Raises `ModelError` naming the tensor if one of its values is NaN or infinite."""
    if not values.is_floating_point() or values.sum().isfinite():  # one pass, without a copy
        return
    bad = (~values.isfinite()).nonzero()
    if len(bad):
        at = bad[0].tolist()
        raise ModelError(
            f"{entry.file}: {short(name)} has {len(bad)} values that are NaN or infinite, "
            f"the first at {at}; fetch the file again"
        )
