"""The configuration of an EAGLE draft head and the sizes of its tensors.

Knows no file format (see `formats`) and no computation (see `head`).
"""

from typing import Literal

from msgspec import Struct

from specserve.models.rope import RopeShape


class HeadShape(Struct, frozen=True):
    """Llama layers over the target's auxiliary hidden states and the next token's embedding.

    `eagle1`: `fc` projects the concatenated embedding and last hidden state to `hidden_size`; the
    first layer has no norm before attention. `eagle3`: `fc` projects the concatenated auxiliary
    hidden states; the first layer's attention reads the concatenated embedding and projection.
    """

    kind: Literal["eagle1", "eagle3"]
    # Target layers whose input hidden states it reads; num_layers: the output of the last layer.
    aux_layers: tuple[int, ...]
    hidden_size: int
    target_hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeShape
    max_position_embeddings: int
    vocab_size: int  # the target's
    draft_vocab_size: int  # rows of the LM head
    fc_bias: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    aux_norm: Literal["none", "each", "joint"] = "none"  # RMS norm of the `fc` inputs
    norm_before_residual: bool = False  # the first layer's residual is taken after `hidden_norm`
    norm_output: bool = False  # the output fed back is normed, as in EAGLE-3.1
    logit_scale: float = 1.0
    own_embedding: bool = False  # False: uses the target's embedding
    own_head: bool = True  # False: uses the target's LM head

    @property
    def first_width(self) -> int:
        """Input size of the first layer's q, k and v projections."""
        return 2 * self.hidden_size if self.kind == "eagle3" else self.hidden_size


def aux_norm_names(shape: HeadShape) -> list[str]:
    """The norms of the `fc` inputs, by internal name."""
    if shape.aux_norm == "each":
        return [f"fc_norm.{index}" for index in range(len(shape.aux_layers))]
    return ["input_norm"] if shape.aux_norm == "joint" else []


def tensor_sizes(shape: HeadShape) -> dict[str, tuple[int, ...]]:
    """The size of every tensor of such a head, by internal name."""
    hidden, num_aux = shape.hidden_size, len(shape.aux_layers)
    fc_inputs = 2 * hidden if shape.kind == "eagle1" else num_aux * shape.target_hidden_size
    sizes: dict[str, tuple[int, ...]] = {"fc.weight": (hidden, fc_inputs)}
    if shape.fc_bias:
        sizes["fc.bias"] = (hidden,)
    if shape.kind == "eagle3":
        sizes["norm.weight"] = (hidden,)
    for name in aux_norm_names(shape):
        each = shape.aux_norm == "each"
        sizes[f"{name}.weight"] = (shape.target_hidden_size if each else fc_inputs,)
    if shape.own_embedding:
        sizes["embed_tokens.weight"] = (shape.vocab_size, hidden)
    if shape.own_head:
        sizes["lm_head.weight"] = (shape.draft_vocab_size, hidden)
    for index in range(shape.num_layers):
        layer = _layer_sizes(shape, first=index == 0)
        sizes |= {f"layers.{index}.{name}": size for name, size in layer.items()}
    return sizes


def _layer_sizes(shape: HeadShape, *, first: bool) -> dict[str, tuple[int, ...]]:
    hidden, inner, dim = shape.hidden_size, shape.intermediate_size, shape.head_dim
    width = shape.first_width if first else hidden
    q_size, kv_size = shape.num_heads * dim, shape.num_kv_heads * dim
    linears = {
        "self_attn.q_proj": (q_size, width, shape.qkv_bias),
        "self_attn.k_proj": (kv_size, width, shape.qkv_bias),
        "self_attn.v_proj": (kv_size, width, shape.qkv_bias),
        "self_attn.o_proj": (hidden, q_size, shape.o_bias),
        "mlp.gate_proj": (inner, hidden, shape.mlp_bias),
        "mlp.up_proj": (inner, hidden, shape.mlp_bias),
        "mlp.down_proj": (hidden, inner, shape.mlp_bias),
    }
    sizes: dict[str, tuple[int, ...]] = {"post_attention_layernorm.weight": (hidden,)}
    for name, (outputs, inputs, bias) in linears.items():
        sizes[f"{name}.weight"] = (outputs, inputs)
        if bias:
            sizes[f"{name}.bias"] = (outputs,)
    if shape.qk_norm:
        sizes |= {"self_attn.q_norm.weight": (dim,), "self_attn.k_norm.weight": (dim,)}
    if shape.kind == "eagle3" or not first:
        sizes["input_layernorm.weight"] = (hidden,)
    if shape.kind == "eagle3" and first:
        sizes["hidden_norm.weight"] = (hidden,)
    return sizes
