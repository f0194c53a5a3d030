"""The decoder-only transformer of Llama, Mistral, SmolLM, Qwen2 and Qwen3, layer by layer.

Owns the order of operations of a forward pass, and which module of the checkpoint is which layer. A
forward pass gets all its inputs as arguments and leaves no state in the model.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from specserve.batch import ForwardBatch, ModelOutput
from specserve.cache.storage import KVSpec, KVStorage
from specserve.models.checkpoint import Checkpoint
from specserve.models.layers.attention import Attention, AttentionInputs
from specserve.models.layers.decoder_layer import DecoderLayer
from specserve.models.layers.linear import Linear
from specserve.models.layers.mlp import Mlp
from specserve.models.layers.norm import RMSNorm
from specserve.models.layers.rotary import Rotary
from specserve.models.quantization.scheme import QuantScheme
from specserve.models.row_tiles import pad_rows
from specserve.models.shape import ModelShape
from specserve_kernels.ops import Kernels
from specserve_kernels.packed_weight import PackedWeight


class LlamaModel:
    """A `Model` whose `scheme` reads the weights of `checkpoint`, on `device`.

    K and V have the dtype `kv_dtype`. Raises `ModelError` if a weight is NaN or infinite.
    """

    packed_embedding: PackedWeight | None = None
    weights = ""

    def __init__(
        self,
        shape: ModelShape,
        checkpoint: Checkpoint,
        scheme: QuantScheme,
        kernels: Kernels,
        *,
        kv_dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.shape = shape
        self.kernels = kernels
        self.dtype = kv_dtype
        self.exact = scheme.exact
        self.row_multiple = scheme.row_multiple
        layers = _LayerReader(shape, checkpoint, scheme, device)
        self.embedding = scheme.embedding("model.embed_tokens")
        self.head = Linear(self.embedding) if shape.tied_head else scheme.linear(["lm_head"])
        self.rotary = Rotary(shape.rope, shape.head_dim, shape.max_position_embeddings, device)
        self.layers = [layers.layer(index) for index in range(shape.num_layers)]
        self.norm = layers.norm("model.norm")
        self.embed, self.final_norm = self.embedding.rows, self.norm
        self.kv_spec = KVSpec(shape.num_layers, shape.num_kv_heads, shape.head_dim, kv_dtype)
        linears = [self.head]
        for layer in self.layers:
            linears += [layer.attention.qkv, layer.attention.out, layer.mlp.gate_up, layer.mlp.down]
        self.num_bytes = sum(linear.method.num_bytes for linear in linears)

    @torch.inference_mode()
    def __call__(
        self,
        batch: ForwardBatch,
        kv: KVStorage,
        *,
        aux_layers: tuple[int, ...] = (),
        num_top: int = 0,
    ) -> ModelOutput:
        """See `Model`. `num_top` is ignored: `ModelOutput.topk` is always None."""
        shape = self.shape
        assert batch.input_ids.shape[0] % self.row_multiple == 0, "rows must be padded"
        inputs = AttentionInputs(
            self.kernels,
            self.kernels.plan_attention(batch.segments, shape.num_kv_heads, shape.group_size),
            self.rotary.angles(batch.positions),
            batch.slots,
        )
        x = self.embedding.rows(batch.input_ids)
        states: dict[int, Tensor] = {}
        for index, layer in enumerate(self.layers):
            if index in aux_layers:
                states[index] = x
            x = layer(x, kv.layer(index), inputs)
        states[shape.num_layers] = x
        aux = torch.cat([states[index] for index in aux_layers], dim=-1) if aux_layers else None
        return ModelOutput(self.logits(x[batch.logit_rows]), aux_hidden_states=aux)

    @torch.inference_mode()
    def logits(self, x: Tensor) -> Tensor:  # [n, hidden_size] -> [n, vocab_size] float32
        """See `Model`."""
        padded = pad_rows(x, self.row_multiple)
        return self.head(self.norm(padded))[: x.shape[0]].float()

    @torch.inference_mode()
    def unembed(self, x: Tensor) -> Tensor:  # [n, hidden_size] -> [n, vocab_size] float32
        """See `Model`."""
        return self.head(x).float()


@dataclass(frozen=True, slots=True)
class _LayerReader:
    """Reads the modules of one layer from a checkpoint."""

    shape: ModelShape
    checkpoint: Checkpoint
    scheme: QuantScheme
    device: torch.device

    def layer(self, index: int) -> DecoderLayer:
        prefix, with_bias = f"model.layers.{index}", self.shape.mlp_bias
        mlp = Mlp(
            self._linear(f"{prefix}.mlp", ["gate_proj", "up_proj"], with_bias),
            self._linear(f"{prefix}.mlp", ["down_proj"], with_bias),
            exact=self.scheme.exact,
        )
        attention_norm = self.norm(f"{prefix}.input_layernorm")
        attention = self._attention(f"{prefix}.self_attn", self.shape.windows[index])
        mlp_norm = self.norm(f"{prefix}.post_attention_layernorm")
        return DecoderLayer(attention_norm, attention, mlp_norm, mlp)

    def norm(self, name: str) -> RMSNorm:
        stored = self.checkpoint.floats(f"{name}.weight")
        weight = stored.to(self.device, torch.float32, copy=True)  # never a view into the file
        return RMSNorm(weight, self.shape.rms_norm_eps)

    def _attention(self, name: str, window: int) -> Attention:
        shape = self.shape
        return Attention(
            self._linear(name, ["q_proj", "k_proj", "v_proj"], shape.qkv_bias),
            self._linear(name, ["o_proj"], shape.o_bias),
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            window=window,
            q_norm=self.norm(f"{name}.q_norm") if shape.qk_norm else None,
            k_norm=self.norm(f"{name}.k_norm") if shape.qk_norm else None,
        )

    def _linear(self, prefix: str, names: list[str], with_bias: bool) -> Linear:
        return self.scheme.linear([f"{prefix}.{name}" for name in names], with_bias=with_bias)
