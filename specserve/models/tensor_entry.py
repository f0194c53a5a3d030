"""One tensor of a checkpoint, as the header of its file describes it."""

from pathlib import Path

from msgspec import Struct


class TensorEntry(Struct, frozen=True):
    """Where a tensor is and what it is. `dtype` is the format's own word: BF16, Q4_1."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
