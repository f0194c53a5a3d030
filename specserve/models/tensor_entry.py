"""The description of one checkpoint tensor in its file's header, and a check of its values."""

from pathlib import Path

from msgspec import Struct
from torch import Tensor

from specserve.files import short
from specserve.models.fields import ModelError


class TensorEntry(Struct, frozen=True):
    """A tensor as the header of its file describes it."""

    file: Path
    dtype: str  # as the file format calls it: BF16, Q4_1
    shape: tuple[int, ...]
    readable: bool = True  # whether `Checkpoint.floats` supports the dtype


def check_finite(entry: TensorEntry, name: str, values: Tensor) -> None:
    """Raise `ModelError` naming the tensor if any of its values is NaN or infinite."""
    if not values.is_floating_point() or values.sum().isfinite():  # fast: reads once, no copy
        return
    bad = (~values.isfinite()).nonzero()
    if len(bad):
        at = bad[0].tolist()
        raise ModelError(
            f"{entry.file}: {short(name)} has {len(bad)} values that are NaN or infinite, "
            f"the first at {at}; fetch the file again"
        )
