"""From a model directory to a model with its weights in place.

Tensors are read one at a time, so memory peaks at one model plus one tensor, in float32 where the
file's format is not the one served. Everything wrong with a checkpoint is found before the first
weight is read and reported at once.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from specserve.models import quant
from specserve.models.checkpoint import Checkpoint, read_checkpoint
from specserve.models.fields import ModelError
from specserve.models.llama import LlamaModel
from specserve.models.model import Model
from specserve.models.packed_llama import PackedLlama
from specserve.models.registry import BUILDERS
from specserve.models.shape import ModelShape
from specserve.types import Quantization
from specserve_kernels.huge_pages import Arena
from specserve_kernels.ops import Kernels
from specserve_kernels.packing import PackedWeight, WeightFormat


def load_model(
    path: Path,
    *,
    kernels: Kernels,
    dtype: torch.dtype,
    device: torch.device,
    exact: bool,
    quantization: Quantization = "none",
    packed_dtype: torch.dtype | None = None,
) -> Model:
    """Read config.json and the weights in `path`, ready to run.

    `packed_dtype`, `dtype` if it is not given, is that of K and V beside quantised weights.
    Raises `ModelError` naming the file, field or tensors at fault.
    """
    shape = ModelShape.from_dir(path)
    checkpoint = read_checkpoint(path)
    kv_dtype = packed_dtype or dtype
    if quant.choose(quantization, shape, checkpoint, kernels, kv_dtype).packed:
        return _packed(shape, path, checkpoint, kernels, kv_dtype, quantization)
    return _llama(shape, path, checkpoint, kernels, dtype, device, exact)


def load_llama(
    path: Path, *, kernels: Kernels, dtype: torch.dtype, device: torch.device, exact: bool
) -> LlamaModel:
    """`load_model` with weights that are floats."""
    shape = ModelShape.from_dir(path)
    return _llama(shape, path, read_checkpoint(path), kernels, dtype, device, exact)


def _llama(
    shape: ModelShape,
    path: Path,
    checkpoint: Checkpoint,
    kernels: Kernels,
    dtype: torch.dtype,
    device: torch.device,
    exact: bool,
) -> LlamaModel:
    build = BUILDERS[shape.architecture]
    model = build(shape, kernels, dtype=dtype, device=device, exact=exact)
    fill_weights(model, path, checkpoint)
    model.freeze()
    return model


def fill_weights(model: LlamaModel, path: Path, checkpoint: Checkpoint) -> None:
    """Copy every tensor to its place, in place. Raises `ModelError` before copying anything."""
    slots = model.weight_slots()
    check_tensors(slots, model.shape, path, checkpoint)
    for name, slot in slots.items():
        slot.copy_(checkpoint.floats(name))


def check_tensors(
    slots: Mapping[str, Tensor], shape: ModelShape, path: Path, checkpoint: Checkpoint
) -> None:
    """Raises `ModelError` unless the checkpoint has what fits in `slots`, and nothing else."""
    wanted = {
        name: entry
        for name, entry in checkpoint.entries.items()
        if not _harmless(name, shape.tied_head)
    }
    _check_names(path, slots, wanted)
    for name, entry in wanted.items():
        if entry.shape != slots[name].shape:
            raise ModelError(
                f"{entry.file}: {name} has shape {list(entry.shape)}; config.json says "
                f"{list(slots[name].shape)}"
            )


def _packed(
    shape: ModelShape,
    path: Path,
    checkpoint: Checkpoint,
    kernels: Kernels,
    dtype: torch.dtype,
    quantization: Quantization,
) -> PackedLlama:
    # The model without memory knows the names and shapes.
    nowhere = torch.device("meta")
    bare = BUILDERS[shape.architecture](shape, kernels, dtype=dtype, device=nowhere, exact=False)
    check_tensors(bare.weight_slots(), shape, path, checkpoint)
    arena = Arena()

    def pack(wanted: WeightFormat | None, name: str) -> PackedWeight:
        weight = quant.pack_tensor(checkpoint, name, wanted)
        return replace(weight, panels=arena.copy(weight.panels))

    return PackedLlama(
        shape,
        checkpoint,
        kernels,
        pack=partial(pack, quant.layer_format(quantization)),
        pack_head=partial(pack, quant.head_format(quantization)),
        dtype=dtype,
    )


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
