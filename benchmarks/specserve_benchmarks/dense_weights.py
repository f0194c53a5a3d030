"""Writes a model directory with bfloat16 safetensors, for engines that read no other format."""

import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from specserve.models.checkpoint import read_checkpoint


def write_dense(model: Path, directory: Path) -> None:
    """Write the weights of `model`, rounded to bfloat16, and its JSON files to `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    for file in model.glob("*.json"):
        shutil.copyfile(file, directory / file.name)
    checkpoint = read_checkpoint(model)
    tensors = {name: checkpoint.floats(name).to(torch.bfloat16) for name in checkpoint.entries}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
