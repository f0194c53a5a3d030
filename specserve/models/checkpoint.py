"""Access to the weights in a model directory, whether they are safetensors or GGUF files."""

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
from specserve_kernels.packed_weight import PackedWeight

__all__ = ["Checkpoint", "Renamed", "TensorEntry", "read_checkpoint"]


class Checkpoint(Protocol):
    """Tensors by checkpoint name, such as model.layers.0.self_attn.q_proj.weight.

    The headers have been checked: the data of every tensor is in its file. Reading a tensor raises
    `ModelError` if it has values that are NaN or infinite.
    """

    index: Mapping[str, str]  # tensor name -> file name, as the index file says, if there is one
    quantized: bool  # whether any tensor is quantised

    @property
    def entries(self) -> Mapping[str, TensorEntry]: ...

    def floats(self, name: str, rows: Tensor | None = None) -> Tensor:
        """The tensor [*shape] in its stored dtype, or dequantised to float32.

        `rows` [n] int64 selects rows: [n, *shape[1:]].
        """

    def quantized_weight(self, name: str) -> PackedWeight | None:
        """The stored quantised values of a Q4_0, Q4_1 or Q8_0 matrix; None for other tensors."""


class Renamed:
    """A `Checkpoint` with other tensor names. `names` maps each new name to the original one."""

    def __init__(self, checkpoint: Checkpoint, names: Mapping[str, str]) -> None:
        self._checkpoint = checkpoint
        self._names = names
        self.entries = {ours: checkpoint.entries[theirs] for ours, theirs in names.items()}
        files = checkpoint.index
        self.index: Mapping[str, str] = {
            ours: files[theirs] for ours, theirs in names.items() if theirs in files
        }
        self.quantized = checkpoint.quantized

    def floats(self, name: str, rows: Tensor | None = None) -> Tensor:
        return self._checkpoint.floats(self._names[name], rows)

    def quantized_weight(self, name: str) -> PackedWeight | None:
        return self._checkpoint.quantized_weight(self._names[name])


def read_checkpoint(path: Path) -> Checkpoint:
    """Open the checkpoint in the directory `path`. Safetensors files take precedence over GGUF.

    Raises `ModelError` for files that are missing, damaged, unreadable or of another format.
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
    """Add the prefix `model.` to tensor names; a model saved without its head lacks it."""
    if "embed_tokens.weight" not in checkpoint.entries:
        return checkpoint
    names = {
        name if name.startswith(("lm_head.", "model.")) else f"model.{name}": name
        for name in checkpoint.entries
    }
    return Renamed(checkpoint, names) if len(names) == len(checkpoint.entries) else checkpoint
