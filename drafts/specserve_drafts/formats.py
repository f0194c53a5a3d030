"""Reads published EAGLE checkpoints into one `HeadShape` and one set of tensor names.

Owns the mapping of names: EAGLE-1 and 2 (Li et al. 2024, arXiv 2401.15077 and 2406.16858), EAGLE-3
(Li et al. 2025, arXiv 2503.01840) as its authors, SpecForge and vllm-project/speculators write it,
and EAGLE-3.1 (arXiv 2605.09992). Auxiliary hidden state i is always the residual stream entering
layer i, whatever the numbering of the file. Safetensors only.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import torch
from msgspec.structs import replace
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from specserve.files import is_there, listed, quoted
from specserve.models.checkpoint import read_checkpoint
from specserve.models.fields import Fields, ModelError, read_json
from specserve.models.rope import MAX_POSITIONS, read_rope
from specserve.models.safetensors_checkpoint import (
    INDEX,
    INTEGERS,
    SINGLE_FILE,
    SafetensorsCheckpoint,
)
from specserve.models.shape import MAX_LAYERS, ModelShape
from specserve.speculation.drafter import DraftError
from specserve_drafts.head_shape import HeadShape, tensor_sizes
from specserve_drafts.vocabulary_map import token_ids_of

# Tokens by frequency, beside a head over the whole vocabulary; written by `tune.eagle_export`.
TOKEN_ORDER: Final = "token_order.safetensors"
_EMBEDDING: Final = "model.embed_tokens.weight"  # of a target; also its LM head if that is tied
_DEFAULT_CONTEXT: Final = 2048  # tokens
# Tensors that are no weights of the head: vocabulary maps, and copies of the target's weights.
_IGNORED: Final = {"d2t", "t2d", "verifier_norm.weight", "verifier_lm_head.weight"}
_MADE_FOR: Final = "use the draft that was made for this target"


@dataclass(frozen=True, slots=True)
class HeadFile:
    """A checkpoint that is compatible with its target. Weights are read on request."""

    shape: HeadShape
    # [draft_vocab_size] int64, target token id of each LM head row; None: row i is token i.
    token_ids: Tensor | None
    _checkpoint: SafetensorsCheckpoint
    _names: Mapping[str, str]  # internal name -> name in the file
    _target: Path | None = None  # directory of the target whose LM head rows are used; see `cut`

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
        return target.floats(own)[self.token_ids]

    def cut(self, draft_vocab: int, target: Path) -> "HeadFile":
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
            return dataclasses.replace(
                self, shape=replace(shape, draft_vocab_size=draft_vocab), token_ids=ids
            )
        return dataclasses.replace(
            self,
            shape=replace(shape, draft_vocab_size=draft_vocab, own_head=True),
            token_ids=self._frequent(draft_vocab),
            _target=target,
        )

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
    path: Path,
    target: ModelShape,
    *,
    aux_layers: tuple[int, ...] | None = None,
) -> HeadFile:
    """Open the head in the directory `path` and check it against the target.

    `aux_layers` overrides those named in the checkpoint. Raises DraftError naming the field, its
    value and the fix.
    """
    try:
        config = _read_config(path / "config.json")
        if not (is_there(path / SINGLE_FILE) or is_there(path / INDEX)):
            read_checkpoint(path)  # raises a more specific error, e.g. for a missing file
            raise ModelError(f"{path}: the weights of a draft head must be safetensors")
        checkpoint = SafetensorsCheckpoint(path, (*INTEGERS, "U8"))
        names = {_our_name(name): name for name in checkpoint.entries}
        sizes = {name: checkpoint.entries[theirs].shape for name, theirs in names.items()}
        shape = _read_shape(config, sizes, target, aux_layers)
        _check_fit(config, shape, target, sizes["fc.weight"][1])
        _check_tensors(path, shape, sizes)
        token_ids = _token_ids(path, shape, checkpoint, names)
    except ModelError as error:
        raise DraftError(f"draft: {error}") from error
    return HeadFile(shape, token_ids, checkpoint, names)


def _read_config(path: Path) -> Fields:
    """config.json with the fields of its `model` section moved to the top.

    vLLM writes the configuration of the head's layers in `model`, and the size of a reduced
    vocabulary beside it as `truncated_vocab_size`.
    """
    config = Fields(read_json(path), str(path))
    nested, own = config.section("model").values, dict(config.values)
    if own.pop("model", None) is not None and own.get("truncated_vocab_size") is not None:
        own["draft_vocab_size"] = own.pop("truncated_vocab_size")
    known = {name: value for name, value in own.items() if value is not None}
    return Fields(nested | known, config.source)


def _our_name(name: str) -> str:
    return name.removeprefix("model.").replace("midlayer.", "layers.0.")


def _read_shape(
    config: Fields,
    sizes: Mapping[str, tuple[int, ...]],
    target: ModelShape,
    aux_layers: tuple[int, ...] | None,
) -> HeadShape:
    speculators = config.has("speculators_model_type")
    if speculators and config.values["speculators_model_type"] != "eagle3":
        config.fail("speculators_model_type", "this is no EAGLE head; supported: eagle3")
    layer = config.section("transformer_layer_config") if speculators else config
    if layer.values.get("hidden_act", "silu") not in ("silu", "swish"):
        layer.fail("hidden_act", "only silu is supported")
    kind = _kind(config, sizes)
    hidden_size = layer.integer("hidden_size")
    target_size = config.integer("target_hidden_size", hidden_size)
    num_heads = layer.integer("num_attention_heads")
    attention = "layers.0.self_attn"
    q_size = (sizes.get(f"{attention}.q_proj.weight") or (hidden_size,))[0]
    max_positions = layer.integer("max_position_embeddings", _DEFAULT_CONTEXT, high=MAX_POSITIONS)
    vocab_size = layer.integer("vocab_size")
    eagle = config.section("eagle_config")
    shape = HeadShape(
        kind=kind,
        aux_layers=aux_layers or _aux_layers(config, eagle, kind, target.num_layers),
        hidden_size=hidden_size,
        target_hidden_size=target_size,
        intermediate_size=layer.integer("intermediate_size"),
        num_layers=layer.integer("num_hidden_layers", 1, high=MAX_LAYERS),
        num_heads=num_heads,
        num_kv_heads=layer.integer("num_key_value_heads", num_heads),
        head_dim=layer.integer("head_dim", max(1, q_size // num_heads)),
        rms_norm_eps=layer.number("rms_norm_eps", 1e-6),
        rope=read_rope(layer, max_positions),
        max_position_embeddings=max_positions,
        vocab_size=vocab_size,
        draft_vocab_size=config.integer("draft_vocab_size", vocab_size),
        fc_bias="fc.bias" in sizes,
        qkv_bias=f"{attention}.q_proj.bias" in sizes,
        o_bias=f"{attention}.o_proj.bias" in sizes,
        mlp_bias="layers.0.mlp.gate_proj.bias" in sizes,
        # By the tensors, not by model_type, which may be that of the target.
        qk_norm=not sizes.keys().isdisjoint({f"{attention}.{x}_norm.weight" for x in "qk"}),
        aux_norm=_aux_norm(config, eagle, sizes),
        # The default of speculators is True.
        norm_before_residual=_flag(config, eagle, "norm_before_residual", speculators),
        norm_output=_flag(config, eagle, "norm_output", False),
        logit_scale=layer.number("logit_scale", 1.0),
        own_embedding="embed_tokens.weight" in sizes,
        own_head="lm_head.weight" in sizes,
    )
    if shape.head_dim % 2:
        layer.fail("head_dim", f"rotary positions need an even head size, got {shape.head_dim}")
    if shape.num_heads % shape.num_kv_heads:
        layer.fail("num_key_value_heads", f"must divide num_attention_heads ({shape.num_heads})")
    return shape


def _kind(config: Fields, sizes: Mapping[str, tuple[int, ...]]) -> Literal["eagle1", "eagle3"]:
    if len(sizes.get("fc.weight", ())) != 2:
        raise DraftError(
            f"draft: {config.source}: the weights beside it have no fc.weight; this is no EAGLE "
            "head that reads layers of its target; give the directory of one"
        )
    return "eagle3" if "layers.0.hidden_norm.weight" in sizes else "eagle1"


def _aux_layers(config: Fields, eagle: Fields, kind: str, num_layers: int) -> tuple[int, ...]:
    """The layers whose input hidden states the head reads.

    Ids at the top of config.json (vLLM, speculators) mean exactly these. Ids in `eagle_config`
    (SGLang, SpecForge) name the layers whose output is read, one less.
    """
    name = "eagle_aux_hidden_state_layer_ids"
    if kind == "eagle1":
        return (num_layers,)
    if not _flag(config, eagle, "use_aux_hidden_state", True):
        eagle.fail("use_aux_hidden_state", "only heads over several layers are supported")
    if config.has(name):
        return _layer_ids(config, name)
    if eagle.has(name):
        return tuple(layer + 1 for layer in _layer_ids(eagle, name))
    return (2, num_layers // 2, num_layers - 3)


def _layer_ids(fields: Fields, name: str) -> tuple[int, ...]:
    ids = fields.values[name]
    if not isinstance(ids, list) or not ids or any(type(layer) is not int for layer in ids):
        fields.fail(name, "expected a list of layers")
    return tuple(ids)


def _aux_norm(
    config: Fields, eagle: Fields, sizes: Mapping[str, tuple[int, ...]]
) -> Literal["none", "each", "joint"]:
    each = _flag(config, eagle, "fc_norm", "fc_norm.0.weight" in sizes)
    joint = _flag(config, eagle, "norm_before_fc", "input_norm.weight" in sizes)
    if each and joint:
        config.fail("fc_norm", "and norm_before_fc exclude each other; the checkpoint has one")
    return "each" if each else "joint" if joint else "none"


def _flag(config: Fields, eagle: Fields, name: str, default: bool) -> bool:
    """A flag of `eagle_config`, where some publishers put it, else of the top of config.json."""
    return (eagle if eagle.has(name) else config).flag(name, default)


def _check_fit(config: Fields, shape: HeadShape, target: ModelShape, fc_inputs: int) -> None:
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
