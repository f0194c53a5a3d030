"""Opens the checkpoint of an EAGLE head and checks that it is compatible with the target.

`formats` reads the config.json and the tensor names of each format. Safetensors only.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from msgspec.structs import replace
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from specserve.files import is_there, listed, quoted
from specserve.models.checkpoint import read_checkpoint
from specserve.models.fields import Fields, ModelError
from specserve.models.safetensors_checkpoint import (
    INDEX,
    INTEGERS,
    SINGLE_FILE,
    SafetensorsCheckpoint,
)
from specserve.models.shape import ModelShape
from specserve.speculation.drafter import DraftError
from specserve_drafts.eagle.formats import internal_name, read_config, read_shape
from specserve_drafts.eagle.head_shape import HeadShape, tensor_sizes
from specserve_drafts.vocabulary_map import token_ids_of

# Tokens by frequency, beside a head over the whole vocabulary; written by `tune.eagle_export`.
TOKEN_ORDER: Final = "token_order.safetensors"
_EMBEDDING: Final = "model.embed_tokens.weight"  # of a target; also its LM head if that is tied
# Tensors that are no weights of the head: vocabulary maps, and copies of the target's weights.
_IGNORED: Final = {"d2t", "t2d", "verifier_norm.weight", "verifier_lm_head.weight"}
_MADE_FOR: Final = "use the draft that was made for this target"


@dataclass(frozen=True, slots=True)
class HeadCheckpoint:
    """A checkpoint that is compatible with its target. Weights are read on request."""

    shape: HeadShape
    # [draft_vocab_size] int64, target token id of each LM head row; None: row i is token i.
    token_ids: Tensor | None
    _checkpoint: SafetensorsCheckpoint
    _names: Mapping[str, str]  # internal name -> name in the file
    _target: Path | None = None  # directory of the target whose LM head rows are used

    def tensor(self, name: str) -> Tensor:
        """The tensor of an internal name in its stored dtype; of `lm_head.weight` the rows of the
        draft vocabulary."""
        if name != "lm_head.weight":
            return self._checkpoint.floats(self._names[name])
        if self._target is None:
            return self._checkpoint.floats(self._names[name])[: self.shape.draft_vocab_size]
        assert self.token_ids is not None
        target = read_checkpoint(self._target)
        own = "lm_head.weight" if "lm_head.weight" in target.entries else _EMBEDDING
        return target.floats(own, self.token_ids)

    def with_draft_vocab(self, draft_vocab: int, target: Path) -> "HeadCheckpoint":
        """The same with an LM head of `draft_vocab` rows.

        A checkpoint with its own LM head keeps the first rows. Otherwise the rows come from the
        target's LM head: those of the first tokens in TOKEN_ORDER beside the checkpoint, or without
        that file of the lowest ids, as a BPE vocabulary begins with the tokens merged first.
        target: the target's directory. Raises DraftError.
        """
        shape = self.shape
        if not 1 <= draft_vocab <= shape.draft_vocab_size:
            raise DraftError(
                f"draft.options.eagle.draft_vocab: {draft_vocab}; expected 1 to "
                f"{shape.draft_vocab_size}, the rows of the head"
            )
        if shape.own_head:
            ids = None if self.token_ids is None else self.token_ids[:draft_vocab]
            shape = replace(shape, draft_vocab_size=draft_vocab)
            return dataclasses.replace(self, shape=shape, token_ids=ids)
        ids = self._frequent(draft_vocab)
        shape = replace(shape, draft_vocab_size=draft_vocab, own_head=True)
        return dataclasses.replace(self, shape=shape, token_ids=ids, _target=target)

    def _frequent(self, count: int) -> Tensor:
        """The `count` most frequent tokens: [count] int64, ascending."""
        path = self._checkpoint.path / TOKEN_ORDER
        if not is_there(path):
            return torch.arange(count)
        try:
            order = load_file(path)["token_ids"].long()
        except (OSError, SafetensorError, KeyError) as error:
            raise DraftError(f"draft: {path} cannot be read: {error!r}") from error
        vocab_size = self.shape.vocab_size
        if order.sort().values.tolist() != list(range(vocab_size)):
            raise DraftError(
                f"draft: {path}: token_ids must hold each of {vocab_size} tokens once; fetch the "
                "draft again"
            )
        return order[:count].sort().values


def read_head(
    path: Path, target: ModelShape, *, aux_layers: tuple[int, ...] | None = None
) -> HeadCheckpoint:
    """Open the head in the directory `path` and check it against the target.

    `aux_layers` overrides those named in the checkpoint. Raises DraftError naming the field, its
    value and the fix.
    """
    try:
        config = read_config(path / "config.json")
        if not (is_there(path / SINGLE_FILE) or is_there(path / INDEX)):
            read_checkpoint(path)  # raises a more specific error, e.g. for a missing file
            raise ModelError(f"{path}: the weights of a draft head must be safetensors")
        checkpoint = SafetensorsCheckpoint(path, (*INTEGERS, "U8"))
        names = {internal_name(name): name for name in checkpoint.entries}
        sizes = {name: checkpoint.entries[theirs].shape for name, theirs in names.items()}
        shape = read_shape(config, sizes, target, aux_layers)
        _check_compatible(config, shape, target, sizes["fc.weight"][1])
        _check_tensors(path, shape, sizes)
        token_ids = _token_ids(path, shape, checkpoint, names)
    except ModelError as error:
        raise DraftError(f"draft: {error}") from error
    return HeadCheckpoint(shape, token_ids, checkpoint, names)


def _check_compatible(config: Fields, shape: HeadShape, target: ModelShape, fc_inputs: int) -> None:
    """Raises DraftError unless the head's sizes and layers are compatible with the target's."""

    def fail(field: str, value: object, reason: str, fix: str = _MADE_FOR) -> None:
        raise DraftError(f"draft: {config.source}: {field} = {quoted(value)}: {reason}; {fix}")

    hidden = "target_hidden_size" if config.has("target_hidden_size") else "hidden_size"
    if shape.target_hidden_size != target.hidden_size:
        fail(hidden, shape.target_hidden_size, f"the target has {target.hidden_size}")
    num_aux_layers = 1 if shape.kind == "eagle1" else fc_inputs // shape.target_hidden_size
    if len(shape.aux_layers) != num_aux_layers:
        fail(
            "aux_layers",
            list(shape.aux_layers),
            f"fc.weight takes {num_aux_layers}",
            f"set draft.options.eagle.aux_layers to {num_aux_layers} layers",
        )
    if shape.vocab_size != target.vocab_size:
        fail("vocab_size", shape.vocab_size, f"the target has {target.vocab_size}")
    if not 1 <= shape.draft_vocab_size <= shape.vocab_size:
        fail("draft_vocab_size", shape.draft_vocab_size, f"expected 1 to {shape.vocab_size}")
    if not all(0 <= layer <= target.num_layers for layer in shape.aux_layers):
        fail(
            "aux_layers",
            list(shape.aux_layers),
            f"the target has layers 0 to {target.num_layers}",
            f"{_MADE_FOR}, or set draft.options.eagle.aux_layers",
        )
    if shape.hidden_size != target.hidden_size and not (shape.own_embedding and shape.own_head):
        fail(
            "hidden_size",
            shape.hidden_size,
            f"embedding and head of the target have {target.hidden_size}, and the weights lack "
            "embed_tokens.weight or lm_head.weight of their own",
        )
    if not shape.own_head and shape.draft_vocab_size != shape.vocab_size:
        fail("draft_vocab_size", shape.draft_vocab_size, "the weights have no lm_head.weight")


def _check_tensors(path: Path, shape: HeadShape, sizes: Mapping[str, tuple[int, ...]]) -> None:
    wanted = tensor_sizes(shape)
    found = {n for n in sizes if n not in _IGNORED and not n.endswith("rotary_emb.inv_freq")}
    missing, unexpected = sorted(set(wanted) - found), sorted(found - set(wanted))
    if missing or unexpected:
        lists = [
            f"{kind}: {listed(names)}"
            for kind, names in (("missing", missing), ("unexpected", unexpected))
            if names
        ]
        raise DraftError(
            f"draft: {path}: the weights do not fit config.json; {'; '.join(lists)}; fetch the "
            "checkpoint again, or use one of a supported format (EAGLE-1, 2, 3, 3.1)"
        )
    for name, size in wanted.items():
        if sizes[name] != size:
            raise DraftError(
                f"draft: {path}: {name} has shape {quoted(list(sizes[name]))}; config.json and the "
                f"target say {list(size)}; {_MADE_FOR}"
            )


def _token_ids(
    path: Path, shape: HeadShape, checkpoint: SafetensorsCheckpoint, names: Mapping[str, str]
) -> Tensor | None:
    if "d2t" not in names:
        if shape.draft_vocab_size != shape.vocab_size:
            raise DraftError(
                f"draft: {path}: draft_vocab_size = {shape.draft_vocab_size}: the weights have no "
                "d2t, which says what tokens these are; fetch the checkpoint again"
            )
        return None
    offsets, t2d = (checkpoint.floats(names[n]) if n in names else None for n in ("d2t", "t2d"))
    assert offsets is not None
    try:
        return token_ids_of(offsets, t2d, shape.draft_vocab_size, shape.vocab_size)
    except ValueError as error:
        raise DraftError(f"draft: {path}: {error}") from error
