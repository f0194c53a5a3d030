"""The weights in a model directory, whichever format they are in.

Owns the choice of the format and what every format offers. Knows no model. Invariant: a
`Checkpoint` that was built describes tensors that are all there and can be read.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor

from specserve.files import is_there
from specserve.hub.gguf_file import WEIGHTS_NAME
from specserve.models.fields import ModelError
from specserve.models.gguf_checkpoint import GgufCheckpoint
from specserve.models.safetensors_checkpoint import INDEX, SINGLE_FILE, SafetensorsCheckpoint
from specserve.models.tensor_entry import TensorEntry
from specserve_kernels.packing import PackedWeight

__all__ = ["Checkpoint", "Renamed", "TensorEntry", "read_checkpoint"]


class Checkpoint(Protocol):
    """Tensors by checkpoint name, such as model.layers.0.self_attn.q_proj.weight."""

    @property
    def entries(self) -> Mapping[str, TensorEntry]:
        """Every tensor there is."""

    @property
    def index(self) -> Mapping[str, str]:
        """Tensors and the files they are said to be in, where several files share an index."""

    @property
    def quantized(self) -> bool:
        """Whether any tensor is quantised."""

    def floats(self, name: str) -> Tensor:
        """The tensor as it is stored, or in float32 if it is quantised: [*shape]."""

    def packed(self, name: str) -> PackedWeight | None:
        """The quantised values as they are stored: a matrix in Q4_0, Q4_1 or Q8_0; else None."""


class Renamed:
    """A checkpoint under other names. `names`: ours, and what each is called in the file."""

    def __init__(self, checkpoint: Checkpoint, names: Mapping[str, str]) -> None:
        self._checkpoint = checkpoint
        self._names = names
        self.entries = {ours: checkpoint.entries[theirs] for ours, theirs in names.items()}
        self.index = {
            ours: checkpoint.index[theirs]
            for ours, theirs in names.items()
            if theirs in checkpoint.index
        }
        self.quantized = checkpoint.quantized

    def floats(self, name: str) -> Tensor:
        return self._checkpoint.floats(self._names[name])

    def packed(self, name: str) -> PackedWeight | None:
        return self._checkpoint.packed(self._names[name])


def read_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in the directory `path`; safetensors if there is GGUF too.

    Raises `ModelError` for files that are missing, damaged or cannot be read.
    """
    if is_there(path / SINGLE_FILE) or is_there(path / INDEX):
        return _with_prefix(SafetensorsCheckpoint(path))
    gguf = path / WEIGHTS_NAME
    if is_there(gguf):
        return GgufCheckpoint(gguf)
    pickled = sorted(p.name for kind in ("*.bin", "*.pt", "*.pth") for p in path.glob(kind))
    if pickled:
        raise ModelError(
            f"{path}: only pickled weights ({', '.join(pickled[:3])}), which can run code when "
            f"opened and are never loaded; convert them to safetensors with `specserve convert "
            f"{path} OUT`"
        )
    others = sorted(p.name for p in path.glob("*.safetensors"))
    hint = f"; if {others[0]} has all the weights, rename it" if others else ""
    raise ModelError(f"{path}: no {SINGLE_FILE}, no {INDEX} and no {WEIGHTS_NAME}{hint}")


def _with_prefix(checkpoint: Checkpoint) -> Checkpoint:
    """A model that was saved without its head has names that do not begin with `model.`."""
    if "embed_tokens.weight" not in checkpoint.entries:
        return checkpoint
    names = {
        name if name.startswith(("lm_head.", "model.")) else f"model.{name}": name
        for name in checkpoint.entries
    }
    return Renamed(checkpoint, names) if len(names) == len(checkpoint.entries) else checkpoint
