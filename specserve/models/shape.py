"""What a model is, read from its directory: every number the forward pass needs.

The forward pass goes by this shape and never by a model's name; the names appear here once, in
the table of what each architecture leaves unsaid in its config.json.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal

from msgspec import Struct

from specserve.models.fields import Fields, read_json
from specserve.models.rope import RopeShape, read_rope


class Family(Struct, frozen=True):
    """What an architecture implies when its config.json does not say it."""

    attention_bias_field: bool = False  # `attention_bias` counts, for q, k, v and o
    mlp_bias_field: bool = False
    qkv_bias: bool = False  # always, on q, k and v only
    qk_norm: bool = False
    window: Literal["none", "every_layer", "by_layer"] = "none"  # which layers may have one
    num_kv_heads: int | None = None  # None: as many as query heads
    head_dim: int | None = None  # None: hidden_size / num_attention_heads


FAMILIES: Final[Mapping[str, Family]] = {
    "LlamaForCausalLM": Family(attention_bias_field=True, mlp_bias_field=True),
    "MistralForCausalLM": Family(window="every_layer", num_kv_heads=8),
    "Qwen2ForCausalLM": Family(qkv_bias=True, window="by_layer"),
    "Qwen3ForCausalLM": Family(
        attention_bias_field=True, qk_norm=True, window="by_layer", head_dim=128
    ),
}


class ModelShape(Struct, frozen=True):
    """One decoder-only transformer with RMSNorm, rotary positions and SwiGLU."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeShape
    max_position_embeddings: int
    windows: tuple[int, ...]  # [num_layers], 0: the layer sees everything before
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied_head: bool = False
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    pad_token_id: int | None = None

    @classmethod
    def from_dir(cls, path: Path) -> "ModelShape":
        """Read `config.json`, and `generation_config.json` for more end tokens.

        Raises `ModelError` naming the field, its value and the fix.
        """
        config = Fields(read_json(path / "config.json"), str(path / "config.json"))
        generation_path = path / "generation_config.json"
        generation = read_json(generation_path) if generation_path.is_file() else {}
        return read_shape(config, Fields(generation, str(generation_path)))

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.num_heads // self.num_kv_heads


def read_shape(config: Fields, generation: Fields) -> ModelShape:
    """A `ModelShape` from the two JSON objects. Raises `ModelError`."""
    architecture, family = _family(config)
    _refuse_unsupported(config)
    hidden_size = config.integer("hidden_size")
    num_layers = config.integer("num_hidden_layers")
    num_heads = config.integer("num_attention_heads")
    max_positions = config.integer("max_position_embeddings")
    rope = read_rope(config, max_positions)
    if rope.kind == "yarn":  # checkpoints may declare only the context before the extension
        max_positions = max(max_positions, round(rope.original_context * rope.factor))
    bias = family.attention_bias_field and config.flag("attention_bias", False)
    shape = ModelShape(
        architecture=architecture,
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=config.integer("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=config.integer("num_key_value_heads", family.num_kv_heads or num_heads),
        head_dim=_head_dim(config, family, hidden_size, num_heads),
        rms_norm_eps=config.number("rms_norm_eps", 1e-6),
        rope=rope,
        max_position_embeddings=max_positions,
        windows=_windows(config, family, num_layers),
        qkv_bias=family.qkv_bias or bias,
        o_bias=bias,
        mlp_bias=family.mlp_bias_field and config.flag("mlp_bias", False),
        qk_norm=family.qk_norm,
        tied_head=config.flag("tie_word_embeddings", False),
        eos_token_ids=_end_tokens(config, generation),
        bos_token_id=_one_token(config, "bos_token_id"),
        pad_token_id=_one_token(config, "pad_token_id"),
    )
    if shape.num_heads % shape.num_kv_heads:
        config.fail("num_key_value_heads", f"must divide num_attention_heads ({shape.num_heads})")
    return shape


def _family(config: Fields) -> tuple[str, Family]:
    if config.has("auto_map"):
        config.fail("auto_map", "the model wants to run code of its own, which is never done")
    supported = f"supported: {', '.join(sorted(FAMILIES))}"
    names = config.values.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        config.fail("architectures", f"expected a list of one name; {supported}")
    if names[0] not in FAMILIES:
        config.fail("architectures", f"this architecture is not supported; {supported}")
    return names[0], FAMILIES[names[0]]


def _refuse_unsupported(config: Fields) -> None:
    if config.has("quantization_config"):
        config.fail(
            "quantization_config",
            "pre-quantised checkpoints are not supported; use the float16 or bfloat16 one",
        )
    if config.values.get("hidden_act", "silu") not in ("silu", "swish"):
        config.fail("hidden_act", "only silu is supported")


def _head_dim(config: Fields, family: Family, hidden_size: int, num_heads: int) -> int:
    if family.head_dim is None and not config.has("head_dim") and hidden_size % num_heads:
        config.fail("num_attention_heads", f"must divide hidden_size ({hidden_size})")
    head_dim = config.integer("head_dim", family.head_dim or hidden_size // num_heads)
    if head_dim % 2:
        config.fail("head_dim", f"rotary positions need an even head size, got {head_dim}")
    return head_dim


def _windows(config: Fields, family: Family, num_layers: int) -> tuple[int, ...]:
    """The sliding window of each layer. A Mistral config that says nothing means 4096."""
    if family.window == "none":
        return (0,) * num_layers
    if family.window == "every_layer":
        unlimited = "sliding_window" in config.values and not config.has("sliding_window")
        return (0 if unlimited else config.integer("sliding_window", 4096),) * num_layers
    if not config.flag("use_sliding_window", False) or not config.has("sliding_window"):
        return (0,) * num_layers
    window = config.integer("sliding_window")
    kinds = config.values.get("layer_types")
    if kinds is None:
        first = config.integer("max_window_layers", 28, low=0)
        return tuple(window if layer >= first else 0 for layer in range(num_layers))
    known = {"full_attention": 0, "sliding_attention": window}
    if not isinstance(kinds, list) or len(kinds) != num_layers or not set(kinds) <= set(known):
        config.fail("layer_types", f"expected {num_layers} of {', '.join(known)}")
    return tuple(known[kind] for kind in kinds)


def _end_tokens(config: Fields, generation: Fields) -> tuple[int, ...]:
    ids = generation.token_ids("eos_token_id") + config.token_ids("eos_token_id")
    return tuple(dict.fromkeys(ids))


def _one_token(config: Fields, name: str) -> int | None:
    ids = config.token_ids(name)
    return ids[0] if ids else None
