"""Reads a model's shape from its directory: every number that the forward pass needs.

The forward pass depends on this shape, never on a model's name. The name of the architecture only
selects the defaults in `FAMILIES`; one that differs in shape alone needs no more than a line there.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal

from msgspec import Struct

from specserve.files import quoted
from specserve.models.fields import Fields, read_json
from specserve.models.generation_config import read_generation_config
from specserve.models.known_fields import NEUTRAL, is_harmless
from specserve.models.rope import MAX_POSITIONS, RopeShape, read_rope

MAX_LAYERS: Final = 10_000  # published models have up to 126


class Family(Struct, frozen=True):
    """What an architecture implies, and the defaults for fields missing from its config.json."""

    model_type: str
    attention_bias_field: bool = False  # the field `attention_bias` is read: q, k, v and o
    mlp_bias_field: bool = False  # the field `mlp_bias` is read
    qkv_bias: bool = False  # q, k and v always have a bias, o has none
    qk_norm: bool = False
    window: Literal["none", "every_layer", "by_layer"] = "none"  # sliding window; see `_windows`
    num_kv_heads: int | None = None  # None: as many as query heads
    head_dim: int | None = None  # None: hidden_size / num_attention_heads


FAMILIES: Final[Mapping[str, Family]] = {
    "LlamaForCausalLM": Family("llama", attention_bias_field=True, mlp_bias_field=True),
    "MistralForCausalLM": Family("mistral", window="every_layer", num_kv_heads=8),
    "Qwen2ForCausalLM": Family("qwen2", qkv_bias=True, window="by_layer", num_kv_heads=32),
    "Qwen3ForCausalLM": Family(
        "qwen3",
        attention_bias_field=True,
        qk_norm=True,
        window="by_layer",
        num_kv_heads=32,
        head_dim=128,
    ),
}


class ModelShape(Struct, frozen=True):
    """The shape of a decoder-only transformer with RMSNorm, RoPE and SwiGLU."""

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
    windows: tuple[int, ...]  # [num_layers], in tokens; 0: attention to all previous tokens
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied_head: bool = False
    eos_token_ids: tuple[int, ...] = ()

    @classmethod
    def from_dir(cls, path: Path) -> "ModelShape":
        """Read `config.json`, and further end tokens from `generation_config.json`.

        Raises `ModelError` naming the field, its value and the fix.
        """
        config = Fields(read_json(path / "config.json"), str(path / "config.json"))
        return read_shape(config, read_generation_config(path))

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.num_heads // self.num_kv_heads


def read_shape(config: Fields, generation: Fields) -> ModelShape:
    """The `ModelShape` that the contents of config.json and generation_config.json describe.

    Raises `ModelError` for fields that are missing, invalid, not supported or unknown.
    """
    architecture, family = _family(config)
    _refuse_unsupported(config)
    hidden_size = config.integer("hidden_size")
    num_layers = config.integer("num_hidden_layers", high=MAX_LAYERS)
    num_heads = config.integer("num_attention_heads")
    max_positions = config.integer("max_position_embeddings", low=2, high=MAX_POSITIONS)
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
        num_kv_heads=_num_kv_heads(config, family, num_heads),
        head_dim=_head_dim(config, family, hidden_size, num_heads),
        rms_norm_eps=config.number("rms_norm_eps", 1e-6, high=1.0),
        rope=rope,
        max_position_embeddings=max_positions,
        windows=_windows(config, family, num_layers),
        qkv_bias=family.qkv_bias or bias,
        o_bias=bias,
        mlp_bias=family.mlp_bias_field and config.flag("mlp_bias", False),
        qk_norm=family.qk_norm,
        tied_head=config.flag("tie_word_embeddings", False),
        eos_token_ids=_end_tokens(config, generation),
    )
    config.reject_unread(is_harmless)
    return shape


def _family(config: Fields) -> tuple[str, Family]:
    if config.has("auto_map"):
        config.fail("auto_map", "the model wants to run code of its own, which is never done")
    supported = f"supported: {', '.join(sorted(FAMILIES))}"
    model_type = config.get("model_type")
    names = config.get("architectures")
    if names is None:  # choose by model_type alone
        names = [name for name, family in FAMILIES.items() if family.model_type == model_type]
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        config.fail("architectures", f"expected a list of one name; {supported}")
    if names[0] not in FAMILIES:
        config.fail("architectures", f"this architecture is not supported; {supported}")
    family = FAMILIES[names[0]]
    if model_type not in (None, family.model_type):
        config.fail("model_type", f"{names[0]} is of type {family.model_type!r}; correct one")
    return names[0], family


def _refuse_unsupported(config: Fields) -> None:
    for name in ("quantization_config", "quantization", "compression_config"):
        if config.get(name):
            reason = "pre-quantised checkpoints are not supported; use the float16 or bfloat16 one"
            config.fail(name, reason)
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        config.fail("hidden_act", "only silu is supported")
    for name, neutral in NEUTRAL.items():
        if config.has(name) and config.get(name) != neutral:
            config.fail(name, f"only {quoted(neutral).lower()} is supported")


def _num_kv_heads(config: Fields, family: Family, num_heads: int) -> int:
    """Null means one KV head per query head; if the field is absent, the family decides."""
    absent = "num_key_value_heads" not in config.values
    default = family.num_kv_heads if absent and family.num_kv_heads else num_heads
    num_kv_heads = config.integer("num_key_value_heads", default)
    if num_heads % num_kv_heads:
        reason = f"{num_kv_heads} must divide num_attention_heads ({num_heads})"
        config.fail("num_key_value_heads", reason)
    return num_kv_heads


def _head_dim(config: Fields, family: Family, hidden_size: int, num_heads: int) -> int:
    if family.head_dim is None and not config.has("head_dim") and hidden_size % num_heads:
        config.fail("num_attention_heads", f"must divide hidden_size ({hidden_size})")
    head_dim = config.integer("head_dim", family.head_dim or hidden_size // num_heads)
    if head_dim % 2:
        config.fail("head_dim", f"rotary positions need an even head size, got {head_dim}")
    return head_dim


def _windows(config: Fields, family: Family, num_layers: int) -> tuple[int, ...]:
    """The sliding window of each layer in tokens; 0 for none.

    Without `layer_types`, families of window "by_layer" use it from layer `max_window_layers` on.
    """
    window = _window(config, family)
    first = config.integer("max_window_layers", 28, low=0) if family.window == "by_layer" else 0
    kinds = config.get("layer_types")
    if kinds is None:
        return tuple(window if layer >= first else 0 for layer in range(num_layers))
    known = {"full_attention": 0, "attention": 0, "sliding_attention": window}
    if (
        not isinstance(kinds, list)
        or len(kinds) != num_layers
        or any(not isinstance(kind, str) or kind not in known for kind in kinds)
    ):
        config.fail("layer_types", f"expected {num_layers} of full_attention, sliding_attention")
    if "sliding_attention" in kinds and not window:
        config.fail("layer_types", "sliding_attention, but no sliding window is in use")
    return tuple(known[kind] for kind in kinds)


def _window(config: Fields, family: Family) -> int:
    """The model's sliding window in tokens; 0 if it has none.

    Mistral: `sliding_window`, 4096 if absent, none if null. Qwen: only if `use_sliding_window` is
    true. Llama: none, even if the config has the field.
    """
    by_layer = family.window == "by_layer"
    used = config.flag("use_sliding_window", not by_layer)
    none = config.get("sliding_window", 0) is None
    size = 0 if none else config.integer("sliding_window", 4096)
    if family.window == "none" or (by_layer and not used):
        return 0
    if not used and size:
        config.fail("use_sliding_window", f"sliding_window = {size} says otherwise; remove one")
    return size


def _end_tokens(config: Fields, generation: Fields) -> tuple[int, ...]:
    vocab_size, ids = config.integer("vocab_size"), dict[int, None]()
    for fields in (generation, config):
        for token in fields.token_ids("eos_token_id"):
            if token >= vocab_size:
                fields.fail("eos_token_id", f"{token} is no token: vocab_size is {vocab_size}")
            ids[token] = None
    return tuple(ids)
