"""Writing trained heads as a checkpoint: weights and config, each written atomically."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from torch import Tensor

from specserve_drafts.atomic_write import atomic_write, write_json

WEIGHTS: Final = "model.safetensors"
CONFIG: Final = "config.json"


def write_checkpoint(
    folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], dtype: torch.dtype
) -> None:
    """Write model.safetensors, with float tensors in `dtype`, and config.json to `folder`. Raises
    ValueError."""
    stored = {
        name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in tensors.items()
    }
    with atomic_write(folder / WEIGHTS) as part:
        save_file({name: tensor.contiguous() for name, tensor in stored.items()}, part)
    write_json(folder / CONFIG, {**config, "torch_dtype": str(dtype).removeprefix("torch.")})


def public_name(target: Path) -> str:
    """A name under which others can find the target, without local paths: the hub id if the
    directory is in a hub cache, else the directory's name."""
    parts = target.absolute().parts
    if len(parts) > 3 and parts[-2] == "snapshots" and parts[-3].startswith("models--"):
        return parts[-3].removeprefix("models--").replace("--", "/")
    return parts[-1]
