"""From a model directory to a model with its weights in place.

Safetensors only. Tensors are mapped and copied one at a time into the fused weights, so memory
peaks at one model plus one tensor. Everything wrong with a checkpoint is found before the first
copy and reported at once.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open

from specserve.models.checkpoint import TensorEntry, read_checkpoint
from specserve.models.fields import ModelError
from specserve.models.llama import LlamaModel
from specserve.models.registry import BUILDERS
from specserve.models.shape import ModelShape
from specserve_kernels.ops import Kernels


def load_model(
    path: Path, *, kernels: Kernels, dtype: torch.dtype, device: torch.device, exact: bool
) -> LlamaModel:
    """Read config.json and the weights in `path`, ready to run.

    Raises `ModelError` naming the file, field or tensors at fault.
    """
    shape = ModelShape.from_dir(path)
    entries = read_checkpoint(path)
    model = BUILDERS[shape.architecture](shape, kernels, dtype=dtype, device=device, exact=exact)
    fill_weights(model, path, entries)
    model.freeze()
    return model


def fill_weights(model: LlamaModel, path: Path, entries: dict[str, TensorEntry]) -> None:
    """Copy every tensor to its place, in place. Raises `ModelError` before copying anything."""
    slots = model.weight_slots()
    wanted = {
        name: entry for name, entry in entries.items() if not _harmless(name, model.shape.tied_head)
    }
    _check_names(path, slots, wanted)
    for name, entry in wanted.items():
        if entry.shape != slots[name].shape:
            raise ModelError(
                f"{entry.file}: {name} has shape {list(entry.shape)}; config.json says "
                f"{list(slots[name].shape)}"
            )
    for file in sorted({entry.file for entry in wanted.values()}):
        with safe_open(file, framework="pt") as tensors:
            for name, entry in wanted.items():
                if entry.file == file:
                    slots[name].copy_(tensors.get_tensor(name))


def _check_names(path: Path, slots: Iterable[str], found: Iterable[str]) -> None:
    missing = sorted(set(slots) - set(found))
    unexpected = sorted(set(found) - set(slots))
    if missing or unexpected:
        lists = [
            f"{len(names)} {kind}: {', '.join(names)}"
            for kind, names in (("missing", missing), ("unexpected", unexpected))
            if names
        ]
        raise ModelError(f"{path}: the weights do not fit config.json; {'; '.join(lists)}")


def _harmless(name: str, tied_head: bool) -> bool:
    """Tensors that old exporters wrote and that are computed here or equal another one."""
    return name.endswith(".rotary_emb.inv_freq") or (tied_head and name == "lm_head.weight")
