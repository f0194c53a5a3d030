"""The transformer of `llama.py` with quantised weights; a forward pass is one kernel call.

Owns the mapping from checkpoint tensors to the kernel's weights. Activations are float32; only K
and V have the model's dtype. Invariant: the result of a row never depends on the other rows.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from specserve.batch import ForwardBatch, ModelOutput
from specserve.cache.storage import KVSpec, KVStorage
from specserve.models.checkpoint import Checkpoint
from specserve.models.rope import rotary_table
from specserve.models.shape import ModelShape
from specserve_kernels.decoder import DecoderPass, DecoderWeights, LayerWeights, QuantizedLinear
from specserve_kernels.dispatch import fused_models
from specserve_kernels.ops import Kernels
from specserve_kernels.quantized_weight import QuantizedWeight, dequantize_rows

Read = Callable[[str], QuantizedWeight]  # takes the tensor's name in the checkpoint


class QuantizedLlama:
    """A `Model` with quantised weights, ready to run.

    `read_head` reads the embedding and the head, `read` the linear weights of the layers.
    """

    exact = True
    row_multiple = 1

    def __init__(
        self,
        shape: ModelShape,
        checkpoint: Checkpoint,
        kernels: Kernels,
        *,
        read: Read,
        read_head: Read,
        dtype: torch.dtype,
    ) -> None:
        self.shape = shape
        self.dtype = dtype
        layers = _LayerReader(shape, checkpoint, read)
        cos, sin = rotary_table(shape.rope, shape.head_dim, shape.max_position_embeddings)
        embed = read_head("model.embed_tokens.weight")
        head = embed if shape.tied_head else read_head("lm_head.weight")
        weights = DecoderWeights(
            shape.num_heads,
            shape.num_kv_heads,
            shape.head_dim,
            shape.rms_norm_eps,
            cos,
            sin,
            embed,
            [layers.layer(index) for index in range(shape.num_layers)],
            checkpoint.floats("model.norm.weight").float(),
            QuantizedLinear(head),
        )
        self.num_bytes = weights.num_bytes
        fused = fused_models(kernels)
        assert fused is not None, f"{kernels.name} has no quantised decoder"
        self.quantized_embedding, self._norm = embed, weights.norm
        self._decoder = fused.decoder(weights)

    @property
    def kv_spec(self) -> KVSpec:
        shape = self.shape
        return KVSpec(shape.num_layers, shape.num_kv_heads, shape.head_dim, self.dtype)

    def forward(
        self,
        batch: ForwardBatch,
        kv: KVStorage,
        *,
        aux_layers: tuple[int, ...] = (),
        num_top: int = 0,
    ) -> ModelOutput:
        """See `Model.__call__`."""
        out = self._decoder(
            DecoderPass(
                batch.input_ids,
                batch.positions,
                batch.slots,
                batch.segments,
                kv.data,
                batch.logit_rows,
                num_top,
                aux_layers,
            )
        )
        return ModelOutput(
            out.logits,
            topk=out.top if num_top else None,
            aux_hidden_states=out.aux_hidden_states.flatten(1) if aux_layers else None,
        )

    __call__ = forward

    def logits(self, x: Tensor) -> Tensor:  # [n, hidden_size] -> [n, vocab_size] float32
        """See `Model`."""
        return self._decoder.head(x)

    def embed(self, ids: Tensor) -> Tensor:  # [n] int64 -> [n, hidden_size] float32
        """See `Model`."""
        return dequantize_rows(self.quantized_embedding, ids)

    def final_norm(self, x: Tensor) -> Tensor:  # [n, hidden_size] float32 -> the same shape
        """See `Model`."""
        return F.rms_norm(x, self._norm.shape, self._norm, self.shape.rms_norm_eps)

    def unembed(self, x: Tensor) -> Tensor:  # [n, hidden_size] float32 -> [n, vocab_size] float32
        """See `Model`."""
        return self._decoder.unembed(x)


class _LayerReader:
    """Reads the tensors of one layer from a checkpoint."""

    def __init__(self, shape: ModelShape, checkpoint: Checkpoint, read: Read) -> None:
        self._shape = shape
        self._checkpoint = checkpoint
        self._read = read

    def layer(self, index: int) -> LayerWeights:
        shape, prefix = self._shape, f"model.layers.{index}"
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        return LayerWeights(
            self._norm(f"{prefix}.input_layernorm"),
            self._norm(f"{prefix}.post_attention_layernorm"),
            self._linear(f"{attention}.q_proj", shape.qkv_bias),
            self._linear(f"{attention}.k_proj", shape.qkv_bias),
            self._linear(f"{attention}.v_proj", shape.qkv_bias),
            self._linear(f"{attention}.o_proj", shape.o_bias),
            self._linear(f"{mlp}.gate_proj", shape.mlp_bias),
            self._linear(f"{mlp}.up_proj", shape.mlp_bias),
            self._linear(f"{mlp}.down_proj", shape.mlp_bias),
            self._norm(f"{attention}.q_norm") if shape.qk_norm else None,
            self._norm(f"{attention}.k_norm") if shape.qk_norm else None,
            shape.windows[index],
        )

    def _norm(self, name: str) -> Tensor:
        return self._checkpoint.floats(f"{name}.weight").float()

    def _linear(self, name: str, with_bias: bool) -> QuantizedLinear:
        bias = self._checkpoint.floats(f"{name}.bias").float() if with_bias else None
        return QuantizedLinear(self._read(f"{name}.weight"), bias)
