"""Reads published Medusa checkpoints and checks that they are compatible with the target.

Owns the mapping of tensor and config names. The authors (Cai et al. 2024, arXiv 2401.10774;
github.com/FasterDecoding/Medusa) write {head}.{layer}.linear for the residual layers and
{head}.{num_layers} for the unembedding of a head. vLLM writes blocks.{head}.layers.{layer},
lm_heads.{head} and, for a reduced vocabulary, token_map; with original_lm_head in its config, all
heads use lm_heads.0. The authors' names are used internally. Safetensors only.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from specserve.files import is_there
from specserve.models.checkpoint import read_checkpoint
from specserve.models.fields import Fields, ModelError, read_json
from specserve.models.safetensors_checkpoint import (
    INDEX,
    INTEGERS,
    SINGLE_FILE,
    SafetensorsCheckpoint,
)
from specserve.models.shape import MAX_LAYERS, ModelShape
from specserve.speculation.drafter import DraftError

_TOKEN_MAP: Final = "token_map"
_MADE_FOR: Final = "use the draft that was made for this target"
_AGAIN: Final = "fetch the checkpoint again"


@dataclass(frozen=True, slots=True)
class MedusaCheckpoint:
    """A checkpoint that is compatible with its target. Weights are read on request."""

    num_heads: int
    num_layers: int  # residual layers of a head, before its unembedding
    # [draft_vocab_size] int64, target token id of each unembedding row; None: row i is token i.
    token_ids: Tensor | None
    logit_scale: float
    shared_unembedding: bool  # all heads use the unembedding of head 0
    _checkpoint: SafetensorsCheckpoint
    _names: Mapping[str, str]  # internal name -> name in the file

    def layer(self, head: int, layer: int) -> tuple[Tensor, Tensor | None]:
        """Weight [hidden_size, hidden_size] and bias [hidden_size] or None, in the stored dtype."""
        name = f"{head}.{layer}.linear"
        bias = self._tensor(f"{name}.bias") if f"{name}.bias" in self._names else None
        return self._tensor(f"{name}.weight"), bias

    def unembedding(self, head: int) -> Tensor:
        """[draft_vocab_size, hidden_size] in the stored dtype."""
        owner = 0 if self.shared_unembedding else head
        weight = self._tensor(f"{owner}.{self.num_layers}.weight")
        if self.token_ids is not None and len(weight) != len(self.token_ids):
            return weight[self.token_ids]  # the file has rows for the whole vocabulary
        return weight

    def _tensor(self, name: str) -> Tensor:
        return self._checkpoint.floats(self._names[name])


def read_medusa(path: Path, target: ModelShape) -> MedusaCheckpoint:
    """Open the checkpoint in the directory `path` and check it against the target.

    Raises DraftError naming the field, its value and the fix.
    """
    try:
        config = Fields(read_json(path / "config.json"), str(path / "config.json"))
        _check_config(config, target)
        if not (is_there(path / SINGLE_FILE) or is_there(path / INDEX)):
            read_checkpoint(path)  # raises a more specific error, e.g. for a missing file
            raise ModelError(f"{path}: the weights of Medusa heads must be safetensors")
        checkpoint = SafetensorsCheckpoint(path, INTEGERS)
        num_layers = config.integer(
            _present_name(config, "medusa_num_layers", "num_hidden_layers"),
            1,
            low=0,
            high=MAX_LAYERS,
        )
        names = {_internal_name(name, num_layers): name for name in checkpoint.entries}
        num_heads = _count_heads(config, names)
        file = MedusaCheckpoint(
            num_heads,
            num_layers,
            _token_ids(path, checkpoint, target.vocab_size),
            config.number("logit_scale", 1.0),
            config.flag("original_lm_head", False),
            checkpoint,
            names,
        )
        _check_tensors(path, file, target)
    except ModelError as error:
        raise DraftError(f"draft: {error}") from error
    return file


def _present_name(config: Fields, theirs: str, vllm: str) -> str:
    return theirs if config.has(theirs) else vllm


def _internal_name(name: str, num_layers: int) -> str:
    name = re.sub(r"^medusa_heads?\.", "", name)
    name = re.sub(r"^blocks\.(\d+)\.layers\.(\d+)\.", r"\1.\2.linear.", name)
    return re.sub(r"^lm_heads\.(\d+)\.", rf"\1.{num_layers}.", name)


def _check_config(config: Fields, target: ModelShape) -> None:
    """Check the sizes in config.json, if given. The authors' configs have neither field; there
    `_check_tensors` decides."""
    for name, wanted in (("hidden_size", target.hidden_size), ("vocab_size", target.vocab_size)):
        if (value := config.integer(name, wanted)) != wanted:
            raise DraftError(
                f"draft: {config.source}: {name} = {value}: the target has {wanted}; {_MADE_FOR}"
            )


def _count_heads(config: Fields, names: Mapping[str, str]) -> int:
    """The number of heads that have weights.

    Published configs give fewer heads than the file has; the authors' code corrects this as well
    (medusa_model.py, "fix the uploaded config"). Raises ModelError if the config gives more.
    """
    heads = {int(name.partition(".")[0]) for name in names if name[:1].isdigit()}
    num_heads = next(head for head in range(len(heads) + 1) if head not in heads)
    field = _present_name(config, "medusa_num_heads", "num_heads")
    claimed = config.integer(field, max(num_heads, 1))
    if claimed > num_heads or not num_heads:
        config.fail(field, f"the weights beside it have {num_heads} heads; {_AGAIN}")
    return num_heads


def _check_tensors(path: Path, file: MedusaCheckpoint, target: ModelShape) -> None:
    """Raises DraftError unless the tensors have the names and sizes of such heads."""
    hidden, vocab, num_layers = target.hidden_size, target.vocab_size, file.num_layers
    unembedding = [(vocab, hidden)]
    if file.token_ids is not None:
        unembedding.append((len(file.token_ids), hidden))
    required: dict[str, list[tuple[int, ...]]] = {}  # possible sizes by internal name
    optional: dict[str, list[tuple[int, ...]]] = {}
    for head in range(file.num_heads):
        for layer in range(num_layers):
            required[f"{head}.{layer}.linear.weight"] = [(hidden, hidden)]
            optional[f"{head}.{layer}.linear.bias"] = [(hidden,)]
        shared = file.shared_unembedding and head > 0
        (optional if shared else required)[f"{head}.{num_layers}.weight"] = [*unembedding]
    found = set(file._names) - {_TOKEN_MAP}
    missing, unexpected = required.keys() - found, found - required.keys() - optional.keys()
    lists = [
        f"{kind}: {', '.join(sorted(some)[:4])}{', ...' if len(some) > 4 else ''}"
        for kind, some in (("missing", missing), ("unexpected", unexpected))
        if some
    ]
    if lists:
        raise DraftError(
            f"draft: {path}: the weights are not {file.num_heads} Medusa heads of "
            f"{num_layers} layers; {'; '.join(lists)}; correct medusa_num_layers in "
            f"config.json, or {_AGAIN}"
        )
    for name, sizes in (required | optional).items():
        theirs = file._names.get(name)
        if theirs and (size := file._checkpoint.entries[theirs].shape) not in sizes:
            raise DraftError(
                f"draft: {path}: {theirs} has shape {list(size)}; for the target, of hidden size "
                f"{hidden} and {vocab} tokens, it is {' or '.join(str(list(s)) for s in sizes)}; "
                f"{_MADE_FOR}"
            )


def _token_ids(path: Path, checkpoint: SafetensorsCheckpoint, vocab_size: int) -> Tensor | None:
    if _TOKEN_MAP not in checkpoint.entries:
        return None
    ids = checkpoint.floats(_TOKEN_MAP)
    if ids.ndim != 1 or not len(ids) or ids.dtype not in (torch.int32, torch.int64):
        raise DraftError(
            f"draft: {path}: token_map has shape {list(ids.shape)} and dtype {ids.dtype}; expected "
            f"a list of token ids; {_AGAIN}"
        )
    ids = ids.long()
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    if len(outside):
        raise DraftError(
            f"draft: {path}: token_map names token {int(outside[0])}, outside the target's "
            f"vocabulary of {vocab_size}; {_MADE_FOR}"
        )
    if len(set(ids.tolist())) != len(ids):
        raise DraftError(f"draft: {path}: token_map names a token twice; {_AGAIN}")
    return ids
