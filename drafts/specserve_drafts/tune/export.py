"""Trained heads as a checkpoint: weights and config, each written whole or not at all."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from safetensors.torch import save_file
from torch import Tensor

from specserve_drafts.whole_file import whole_file, write_json

WEIGHTS: Final = "model.safetensors"
CONFIG: Final = "config.json"


def write_checkpoint(
    folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> None:
    """model.safetensors and config.json; a reader never sees half a file."""
    with whole_file(folder / WEIGHTS) as part:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part)
    write_json(folder / CONFIG, config)


def public_name(target: Path) -> str:
    """By which others find a target: the hub id of which the directory is a copy, else the
    directory's name. Never a path of this machine."""
    parts = target.absolute().parts
    if len(parts) > 3 and parts[-2] == "snapshots" and parts[-3].startswith("models--"):
        return parts[-3].removeprefix("models--").replace("--", "/")
    return parts[-1]
