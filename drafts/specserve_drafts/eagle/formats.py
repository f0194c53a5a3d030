"""The published formats of EAGLE heads: their config.json and tensor names, read as a `HeadShape`.

Owns the mapping of names: EAGLE-1 and 2 (Li et al. 2024, arXiv 2401.15077 and 2406.16858), EAGLE-3
(Li et al. 2025, arXiv 2503.01840) as its authors, SpecForge and vllm-project/speculators write it,
and EAGLE-3.1 (arXiv 2605.09992). Auxiliary hidden state i is always the residual stream entering
layer i, whatever the numbering of the file.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal

from specserve.models.fields import Fields, read_json
from specserve.models.rope import MAX_POSITIONS, read_rope
from specserve.models.shape import MAX_LAYERS, ModelShape
from specserve.speculation.drafter import DraftError
from specserve_drafts.eagle.head_shape import HeadShape

_DEFAULT_CONTEXT: Final = 2048  # tokens


def read_config(path: Path) -> Fields:
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


def internal_name(name: str) -> str:
    """The name that `HeadShape` has for a tensor of a file."""
    return name.removeprefix("model.").replace("midlayer.", "layers.0.")


def read_shape(
    config: Fields,
    sizes: Mapping[str, tuple[int, ...]],
    target: ModelShape,
    aux_layers: tuple[int, ...] | None,
) -> HeadShape:
    """The shape of a head, by its config and the sizes of its tensors (internal names).

    `aux_layers` overrides those of the config. Raises ModelError or DraftError.
    """
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
