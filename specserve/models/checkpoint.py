"""The weights in a model directory, whichever format they are in.

Owns the choice of the format and what every format offers. Knows no model. Invariant: a
`Checkpoint` that was built describes tensors that are all there and can be read.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor

from specserve.hub.gguf_file import WEIGHTS_NAME
from specserve.models.fields import ModelError
from specserve.models.gguf_checkpoint import GgufCheckpoint
from specserve.models.safetensors_checkpoint import INDEX, SINGLE_FILE, SafetensorsCheckpoint
from specserve.models.tensor_entry import TensorEntry
from specserve_kernels.packing import PackedWeight

__all__ = ["Checkpoint", "TensorEntry", "read_checkpoint"]


class Checkpoint(Protocol):
    """Tensors by checkpoint name, such as model.layers.0.self_attn.q_proj.weight."""

    @property
    def entries(self) -> Mapping[str, TensorEntry]:
        """Every tensor there is."""

    @property
    def quantized(self) -> bool:
        """Whether any tensor is quantised."""

    def floats(self, name: str) -> Tensor:
        """The tensor as it is stored, or in float32 if it is quantised: [*shape]."""

    def packed(self, name: str) -> PackedWeight | None:
        """The quantised values as they are stored: a matrix in Q4_0, Q4_1 or Q8_0; else None."""


def read_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in the directory `path`; safetensors if there is GGUF too.

    Raises `ModelError` for files that are missing, damaged or cannot be read.
    """
    if (path / SINGLE_FILE).is_file() or (path / INDEX).is_file():
        return SafetensorsCheckpoint(path)
    gguf = path / WEIGHTS_NAME
    if gguf.is_file() or gguf.is_symlink():
        return GgufCheckpoint(gguf)
    pickled = sorted(p.name for kind in ("*.bin", "*.pt", "*.pth") for p in path.glob(kind))
    if pickled:
        raise ModelError(
            f"{path}: only pickled weights ({', '.join(pickled[:3])}), which can run code when "
            f"opened and are never loaded; convert them to safetensors with `specserve convert "
            f"{path} OUT`"
        )
    raise ModelError(f"{path}: no {SINGLE_FILE}, no {INDEX} and no {WEIGHTS_NAME}")
