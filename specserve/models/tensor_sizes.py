"""The tensors that a model of a given shape has: checkpoint names and sizes."""

from collections.abc import Iterator

from msgspec import Struct

from specserve.models.shape import ModelShape

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class TensorSize(Struct, frozen=True):
    size: tuple[int, ...]
    fields: str  # of config.json that determine the size


def tensor_sizes(shape: ModelShape) -> dict[str, TensorSize]:
    """Every tensor of a model with this shape, by checkpoint name."""
    vocab = TensorSize((shape.vocab_size, shape.hidden_size), "vocab_size, hidden_size")
    sizes = {EMBEDDING: vocab, "model.norm.weight": TensorSize((shape.hidden_size,), "hidden_size")}
    if not shape.tied_head:
        sizes[HEAD] = vocab
    layer = dict(_layer(shape))
    for index in range(shape.num_layers):
        sizes.update((f"model.layers.{index}.{name}", size) for name, size in layer.items())
    return sizes


def _layer(shape: ModelShape) -> Iterator[tuple[str, TensorSize]]:
    hidden = (shape.hidden_size, "hidden_size")
    inner = (shape.intermediate_size, "intermediate_size")
    head = (shape.head_dim, "head_dim")
    heads = (shape.num_heads * shape.head_dim, "num_attention_heads x head_dim")
    kv_heads = (shape.num_kv_heads * shape.head_dim, "num_key_value_heads x head_dim")
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    if shape.qk_norm:
        norms |= {"self_attn.q_norm": head, "self_attn.k_norm": head}
    for name, (size, field) in norms.items():
        yield f"{name}.weight", TensorSize((size,), field)
    for name, (rows, by), (columns, of), has_bias in (
        ("self_attn.q_proj", heads, hidden, shape.qkv_bias),
        ("self_attn.k_proj", kv_heads, hidden, shape.qkv_bias),
        ("self_attn.v_proj", kv_heads, hidden, shape.qkv_bias),
        ("self_attn.o_proj", hidden, heads, shape.o_bias),
        ("mlp.gate_proj", inner, hidden, shape.mlp_bias),
        ("mlp.up_proj", inner, hidden, shape.mlp_bias),
        ("mlp.down_proj", hidden, inner, shape.mlp_bias),
    ):
        yield f"{name}.weight", TensorSize((rows, columns), f"{by}, {of}")
        if has_bias:
            yield f"{name}.bias", TensorSize((rows,), by)
