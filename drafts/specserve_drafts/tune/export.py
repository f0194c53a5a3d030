"""Trained heads as a checkpoint: weights and config, each written whole or not at all."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec
from safetensors.torch import save_file
from torch import Tensor

WEIGHTS: Final = "model.safetensors"
CONFIG: Final = "config.json"


def write_checkpoint(
    folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> None:
    """model.safetensors and config.json; a reader never sees half a file."""
    part = folder / f"{WEIGHTS}.part"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part)
    part.replace(folder / WEIGHTS)
    part = folder / f"{CONFIG}.part"
    part.write_bytes(msgspec.json.format(msgspec.json.encode(config), indent=2))
    part.replace(folder / CONFIG)


def public_name(target: Path) -> str:
    """By which others find a target: the hub id of which the directory is a copy, else the
    directory's name. Never a path of this machine."""
    parts = target.absolute().parts
    if len(parts) > 3 and parts[-2] == "snapshots" and parts[-3].startswith("models--"):
        return parts[-3].removeprefix("models--").replace("--", "/")
    return parts[-1]
