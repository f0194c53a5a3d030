"""The decoder-only transformer of Llama, Mistral, SmolLM, Qwen2 and Qwen3, with float weights.

Owns the weights and the order of operations of a forward pass. A forward pass gets all its inputs
as arguments and leaves no state in the model. Knows nothing about sequences, trees or block tables.
Invariant: in exact mode the result of a row does not depend on the other rows.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from specserve.batch import ForwardBatch, ModelOutput
from specserve.cache.storage import KVSpec, KVStorage
from specserve.models.layers import (
    BASE_ROWS,
    Linear,
    RMSNorm,
    Rotary,
    pad_rows,
    probe_linears,
    rotate,
    swiglu,
    swiglu_exact,
)
from specserve.models.row_tiles import RowTiles
from specserve.models.shape import ModelShape
from specserve_kernels.ops import Kernels, Plan

MakeLinear = Callable[[int, int, bool], Linear]  # in_features, out_features, with bias


class Attention:
    """Grouped-query attention (Ainslie et al. 2023) with a fused q, k and v projection."""

    def __init__(
        self, shape: ModelShape, window: int, make: MakeLinear, device: torch.device
    ) -> None:
        self._shape = shape
        self._window = window
        self._num_kv = shape.num_kv_heads
        self.q_size, self.kv_size = (
            heads * shape.head_dim for heads in (shape.num_heads, shape.num_kv_heads)
        )
        self.qkv = make(shape.hidden_size, self.q_size + 2 * self.kv_size, shape.qkv_bias)
        self.out = make(self.q_size, shape.hidden_size, shape.o_bias)
        self.q_norm = self.k_norm = None
        if shape.qk_norm:
            self.q_norm = RMSNorm(shape.head_dim, shape.rms_norm_eps, device)
            self.k_norm = RMSNorm(shape.head_dim, shape.rms_norm_eps, device)

    def __call__(
        self,
        x: Tensor,  # [num_rows, hidden_size]
        angles: tuple[Tensor, Tensor],
        cache: tuple[Tensor, Tensor],  # K and V, each [num_slots, num_kv_heads, head_dim]
        slots: Tensor,  # [num_rows] int64
        kernels: Kernels,
        plan: Plan,
    ) -> Tensor:  # [num_rows, hidden_size]; also writes K and V of the rows to `cache`
        heads = self.qkv(x).view(x.shape[0], -1, self._shape.head_dim)
        q, k, v = torch.split(heads, [self._shape.num_heads, self._num_kv, self._num_kv], dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = rotate(self.q_norm(q), angles), rotate(self.k_norm(k), angles)
        else:
            rotated = rotate(heads[:, : -self._num_kv], angles)
            q, k = torch.split(rotated, [self._shape.num_heads, self._num_kv], dim=1)
        kernels.kv_write(k, v, *cache, slots)
        scale = self._shape.head_dim**-0.5
        mixed = kernels.paged_tree_attention(
            q.contiguous(), *cache, plan, scale=scale, window=self._window
        )
        return self.out(mixed.view(x.shape[0], -1))


class DecoderLayer:
    """The weights of attention and SwiGLU, and of the norm in front of each."""

    def __init__(
        self, shape: ModelShape, window: int, make: MakeLinear, device: torch.device
    ) -> None:
        self.attention_norm = RMSNorm(shape.hidden_size, shape.rms_norm_eps, device)
        self.attention = Attention(shape, window, make, device)
        self.mlp_norm = RMSNorm(shape.hidden_size, shape.rms_norm_eps, device)
        self.gate_up = make(shape.hidden_size, 2 * shape.intermediate_size, shape.mlp_bias)
        self.down = make(shape.intermediate_size, shape.hidden_size, shape.mlp_bias)


class LlamaModel:
    """A `Model` with float weights.

    The projections are zero and the norms one until a loader fills the tensors of `weight_slots`
    and calls `freeze`. With `exact`, the result of a row does not depend on the other rows of the
    forward pass; the number of rows must then be a multiple of `row_multiple`.
    """

    quantized_embedding: None = None

    def __init__(
        self,
        shape: ModelShape,
        kernels: Kernels,
        *,
        dtype: torch.dtype,
        device: torch.device,
        exact: bool,
    ) -> None:
        self.shape = shape
        self.kernels = kernels
        self.dtype = dtype
        self.device = device
        self.exact = exact
        self.row_multiple = BASE_ROWS if exact else 1
        self._swiglu = swiglu_exact if exact else swiglu
        self._linears: list[Linear] = []

        self.embed_tokens = self._zeros(shape.vocab_size, shape.hidden_size)
        self.rotary = Rotary(shape.rope, shape.head_dim, shape.max_position_embeddings, device)
        self.layers = [
            DecoderLayer(shape, window, self._make_linear, device) for window in shape.windows
        ]
        self.norm = RMSNorm(shape.hidden_size, shape.rms_norm_eps, device)
        head = self.embed_tokens if shape.tied_head else self._zeros(*self.embed_tokens.shape)
        self.head = self._add_linear(head, None)

    @property
    def num_bytes(self) -> int:
        """See `Model`."""
        return sum(linear.weight.nbytes for linear in self._linears)

    @property
    def kv_spec(self) -> KVSpec:
        return KVSpec(
            num_layers=self.shape.num_layers,
            num_kv_heads=self.shape.num_kv_heads,
            head_dim=self.shape.head_dim,
            dtype=self.dtype,
        )

    @torch.inference_mode()
    def forward(
        self,
        batch: ForwardBatch,
        kv: KVStorage,
        *,
        aux_layers: tuple[int, ...] = (),
        num_top: int = 0,
    ) -> ModelOutput:
        """See `Model.__call__`. `num_top` is ignored: `ModelOutput.topk` is always None."""
        shape = self.shape
        assert batch.input_ids.shape[0] % self.row_multiple == 0, "rows must be padded"
        plan = self.kernels.plan_attention(batch.segments, shape.num_kv_heads, shape.group_size)
        angles = self.rotary.angles(batch.positions)
        x = F.embedding(batch.input_ids, self.embed_tokens)
        states: dict[int, Tensor] = {}
        for index, layer in enumerate(self.layers):
            if index in aux_layers:
                states[index] = x
            x = x + layer.attention(
                layer.attention_norm(x), angles, kv.layer(index), batch.slots, self.kernels, plan
            )
            x = x + layer.down(self._swiglu(layer.gate_up(layer.mlp_norm(x))))
        states[shape.num_layers] = x
        return ModelOutput(
            logits=self.logits(x[batch.logit_rows]),
            aux_hidden_states=torch.cat([states[index] for index in aux_layers], dim=-1)
            if aux_layers
            else None,
        )

    __call__ = forward

    @torch.inference_mode()
    def logits(self, x: Tensor) -> Tensor:  # [n, hidden_size] -> [n, vocab_size] float32
        """See `Model`."""
        padded = pad_rows(x, self.row_multiple)
        return self.head(self.norm(padded))[: x.shape[0]].float()

    @torch.inference_mode()
    def embed(self, ids: Tensor) -> Tensor:  # [n] int64 -> [n, hidden_size]
        """See `Model`."""
        return F.embedding(ids, self.embed_tokens)

    @torch.inference_mode()
    def final_norm(self, x: Tensor) -> Tensor:  # [n, hidden_size] -> the same shape
        """See `Model`."""
        return self.norm(x)

    @torch.inference_mode()
    def unembed(self, x: Tensor) -> Tensor:  # [n, hidden_size] -> [n, vocab_size] float32
        """See `Model`."""
        return F.linear(x, self.head.weight).float()

    def freeze(self) -> None:
        """Call once after the weights are loaded. In exact mode it probes for larger row tiles."""
        if self.exact:
            probe_linears(self._linears)

    def weight_slots(self) -> dict[str, Tensor]:
        """The destination of each checkpoint tensor, by its name: views into the weights."""
        slots = {"model.embed_tokens.weight": self.embed_tokens}
        slots["model.norm.weight"] = self.norm.weight
        if not self.shape.tied_head:
            slots["lm_head.weight"] = self.head.weight
        for index, layer in enumerate(self.layers):
            slots.update((f"model.layers.{index}.{name}", slot) for name, slot in _slots(layer))
        return slots

    def _make_linear(self, in_features: int, out_features: int, with_bias: bool) -> Linear:
        bias = self._zeros(out_features) if with_bias else None
        return self._add_linear(self._zeros(out_features, in_features), bias)

    def _add_linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        linear = Linear(weight, bias, RowTiles() if self.exact else None)
        self._linears.append(linear)
        return linear

    def _zeros(self, *size: int) -> Tensor:
        return torch.zeros(size, dtype=self.dtype, device=self.device)


def _slots(layer: DecoderLayer) -> Iterator[tuple[str, Tensor]]:
    """Yield each checkpoint name of one layer with the view of a weight that it is copied to."""
    attention = layer.attention
    yield "input_layernorm.weight", layer.attention_norm.weight
    yield "post_attention_layernorm.weight", layer.mlp_norm.weight
    if attention.q_norm is not None and attention.k_norm is not None:
        yield "self_attn.q_norm.weight", attention.q_norm.weight
        yield "self_attn.k_norm.weight", attention.k_norm.weight
    size = layer.down.weight.shape[1]
    qkv_sizes = [attention.q_size, attention.kv_size, attention.kv_size]
    yield from _parts("self_attn", ["q_proj", "k_proj", "v_proj"], attention.qkv, qkv_sizes)
    yield from _parts("self_attn", ["o_proj"], attention.out, [attention.out.weight.shape[0]])
    yield from _parts("mlp", ["gate_proj", "up_proj"], layer.gate_up, [size, size])
    yield from _parts("mlp", ["down_proj"], layer.down, [layer.down.weight.shape[0]])


def _parts(
    prefix: str, names: list[str], linear: Linear, sizes: list[int]
) -> Iterator[tuple[str, Tensor]]:
    for kind, fused in (("weight", linear.weight), ("bias", linear.bias)):
        if fused is not None:
            for name, part in zip(names, torch.split(fused, sizes), strict=True):
                yield f"{prefix}.{name}.{kind}", part
