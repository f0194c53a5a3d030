"""Checks that a checkpoint holds the weights that config.json describes.

One error names all missing and unexpected tensors; otherwise, the first one with an unsupported
dtype or a wrong shape. The only values read are those of embedding and head, if they may be equal.
"""

import logging
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

import torch
from msgspec.structs import replace

from specserve.files import listed, quoted
from specserve.models.checkpoint import Checkpoint, Renamed
from specserve.models.fields import ModelError
from specserve.models.memory import check_memory
from specserve.models.shape import ModelShape
from specserve.models.tensor_entry import TensorEntry
from specserve.models.tensor_sizes import EMBEDDING, HEAD, TensorSize, tensor_sizes

logger = logging.getLogger(__name__)

# Tensors that old exporters wrote but that are computed at load: angles, masks, positions.
_COMPUTED: Final = re.compile(
    r"(^|\.)(rotary_emb\.(inv_freq|cos_cached|sin_cached)|masked_bias|position_ids)$"
)
_LAYER: Final = re.compile(r"model\.layers\.(\d{1,9})\.")
_BUFFER: Final = re.compile(r"[IU]\d+|BOOL")  # integer dtypes: the tensor is a buffer, not a weight
_QUANTISED: Final = re.compile(
    r"\.(qweight|qzeros|g_idx|weight_packed|weight_scale(_inv)?|scales)$"
)


def check_weights(
    path: Path, shape: ModelShape, checkpoint: Checkpoint
) -> tuple[ModelShape, Checkpoint]:
    """Check `checkpoint` against `shape`; returns both, adjusted to the actual head.

    If the head should be the embedding, but the file has a different head, the returned shape has
    `tied_head` False; if it has the head alone, that is renamed to the embedding. Raises
    `ModelError` if tensors are missing, unexpected or do not fit `shape`.
    """
    if shape.tied_head:
        shape, checkpoint = _read_head(shape, checkpoint)
    _check_layers(path, shape, checkpoint.entries)
    sizes = tensor_sizes(shape)
    _check_names(path, sizes, shape, checkpoint)
    for name, size in sizes.items():
        _check_entry(name, checkpoint.entries[name], size)
    return shape, checkpoint


def check_room(shape: ModelShape, bytes_per_weight: float, device: torch.device) -> None:
    """Raise `ModelError` if the weights do not fit in the free memory of `device`."""
    num_weights = sum(math.prod(size.size) for size in tensor_sizes(shape).values())
    check_memory(
        int(num_weights * bytes_per_weight),
        device,
        f"the model, of {num_weights} weights,",
        "set dtype to bfloat16 or quantization to int8, or use a smaller model",
    )


def _read_head(shape: ModelShape, checkpoint: Checkpoint) -> tuple[ModelShape, Checkpoint]:
    """For a head that should be the embedding: the file may have either or both."""
    entries = checkpoint.entries
    if HEAD not in entries:
        return shape, checkpoint
    if EMBEDDING not in entries:
        names = {name: name for name in entries if name != HEAD}
        return shape, Renamed(checkpoint, {**names, EMBEDDING: HEAD})
    if entries[HEAD].shape == entries[EMBEDDING].shape:
        head, embedding = checkpoint.floats(HEAD), checkpoint.floats(EMBEDDING)
        if torch.equal(head, embedding.to(head.dtype)):
            return shape, checkpoint
    text = "%s: tie_word_embeddings is true, but %s differs from %s; both are used"
    logger.warning(text, entries[HEAD].file, HEAD, EMBEDDING)
    return replace(shape, tied_head=False), checkpoint


def _check_layers(path: Path, shape: ModelShape, names: Iterable[str]) -> None:
    numbers = [int(match.group(1)) for match in map(_LAYER.match, names) if match]
    num_layers = max(numbers, default=-1) + 1
    if 0 < num_layers < shape.num_layers:
        raise ModelError(
            f"{path / 'config.json'}: num_hidden_layers = {shape.num_layers}: the weights have "
            f"{num_layers} layers; fetch what is missing, or correct it"
        )
    if num_layers > shape.num_layers:
        text = "%s: the weights have %d layers, num_hidden_layers is %d: the last ones are not used"
        logger.warning(text, path, num_layers, shape.num_layers)


def _check_names(
    path: Path, sizes: Mapping[str, TensorSize], shape: ModelShape, checkpoint: Checkpoint
) -> None:
    entries, index = checkpoint.entries, checkpoint.index
    missing = sorted(name for name in sizes if name not in entries)
    extra = sorted(name for name in entries if name not in sizes)
    unexpected = [name for name in extra if not _is_unused(name, entries[name], shape)]
    if index:  # tensors that the index leaves out are ignored
        unexpected = [name for name in unexpected if name in index]
    if unused := sorted(name for name in extra if name not in unexpected and name != HEAD):
        logger.info("%s: tensors that are not used: %s", path, listed(unused))
    both = (("missing", missing), ("unexpected", unexpected))
    if problems := [f"{len(names)} {kind}: {listed(names)}" for kind, names in both if names]:
        raise ModelError(
            f"{path}: the weights do not fit config.json; {'; '.join(problems)}"
            f"{_fix(missing, unexpected, checkpoint)}"
        )


def _fix(missing: list[str], unexpected: list[str], checkpoint: Checkpoint) -> str:
    if any(_QUANTISED.search(name) for name in unexpected):
        return "; they are quantised: use the float16 or bfloat16 checkpoint"
    prefixes = {name.removesuffix(EMBEDDING) for name in unexpected if name.endswith(EMBEDDING)}
    if prefixes - {""}:
        prefix = quoted(prefixes.pop())
        return f"; names begin with {prefix}: save the model again without it"
    if missing == [HEAD]:
        return "; set tie_word_embeddings to true if the head is the embedding"
    shards = {checkpoint.index[name] for name in missing if name in checkpoint.index}
    if shards:
        return f"; the index says that {listed(sorted(shards))} has what is missing: fetch it again"
    return "" if unexpected else "; fetch the checkpoint again"


def _is_unused(name: str, entry: TensorEntry, shape: ModelShape) -> bool:
    """Whether a tensor that the model does not use can be ignored safely."""
    layer = _LAYER.match(name)
    return (
        _COMPUTED.search(name) is not None
        or _BUFFER.fullmatch(entry.dtype) is not None
        or (layer is not None and int(layer.group(1)) >= shape.num_layers)
        or (shape.tied_head and name == HEAD)
    )


def _check_entry(name: str, entry: TensorEntry, size: TensorSize) -> None:
    if not entry.readable:
        raise ModelError(
            f"{entry.file}: {name} has dtype {entry.dtype}, which is not supported; use the "
            f"float16 or bfloat16 checkpoint"
        )
    if entry.shape != size.size:
        raise ModelError(
            f"{entry.file}: {name} has shape {quoted(list(entry.shape))}; config.json says "
            f"{list(size.size)} ({size.fields}); fetch both again, or correct config.json"
        )
