"""Reference implementation of a forward pass with packed weights, in plain torch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from specserve_kernels.decoder import (
    DecoderOutput,
    DecoderPass,
    DecoderWeights,
    LayerWeights,
    PackedLinear,
)
from specserve_kernels.packed_weight import unpack
from specserve_kernels.torch_ref import TorchKernels
from specserve_kernels.torch_ref.linear import packed_linear


class TorchDecoder:
    """Implements `FusedDecoder`."""

    def __init__(self, weights: DecoderWeights) -> None:
        self._weights = weights
        self._kernels = TorchKernels()

    def __call__(self, batch: DecoderPass) -> DecoderOutput:
        weights = self._weights
        group_size = weights.num_heads // weights.num_kv_heads
        plan = self._kernels.plan_attention(batch.segments, weights.num_kv_heads, group_size)
        angles = weights.cos[batch.positions, None], weights.sin[batch.positions, None]
        x, qkv_in = self._embed(batch)
        layer_inputs = []
        for layer, (k_cache, v_cache) in zip(weights.layers, batch.kv, strict=True):
            layer_inputs.append(x)
            if qkv_in is None:
                qkv_in = self._norm(x, layer.attention_norm)
            q, k, v = self._heads(layer, qkv_in, angles)
            qkv_in = None
            dtype = k_cache.dtype
            self._kernels.kv_write(k.to(dtype), v.to(dtype), k_cache, v_cache, batch.slots)
            attention_out = self._kernels.paged_tree_attention(
                q, k_cache, v_cache, plan, scale=weights.head_dim**-0.5, window=layer.window
            )
            x = x + linear(layer.o, attention_out.flatten(1))
            normed = self._norm(x, layer.mlp_norm)
            gated = F.silu(linear(layer.gate, normed)) * linear(layer.up, normed)
            x = x + linear(layer.down, gated)
        layer_inputs.append(x)
        logits = self.head(x[batch.logit_rows])
        states = [layer_inputs[layer] for layer in batch.aux_layers] or [x[:, :0]]
        order = torch.sort(logits, dim=-1, descending=True, stable=True).indices
        top = torch.where(logits.isfinite().all(-1)[:, None], order[:, : batch.num_top], -1)
        return DecoderOutput(logits, top, torch.stack(states, dim=1))

    def _embed(self, batch: DecoderPass) -> tuple[Tensor, Tensor | None]:
        """The initial residual stream; for a draft head also the input of the first q, k and v."""
        weights = self._weights
        x = unpack(weights.embed)[batch.input_ids]
        if weights.hidden_norm is None:
            return x, None
        assert batch.hidden_in is not None, "a draft head needs `hidden_in`"
        normed = self._norm(batch.hidden_in, weights.hidden_norm)
        qkv_in = torch.cat((self._norm(x, weights.layers[0].attention_norm), normed), dim=-1)
        return normed if weights.normed_residual else batch.hidden_in, qkv_in

    def head(self, x: Tensor) -> Tensor:
        """See `FusedDecoder.head`."""
        return self.unembed(self._norm(x, self._weights.norm))

    def unembed(self, x: Tensor) -> Tensor:
        """See `FusedDecoder.unembed`."""
        return linear(self._weights.head, x)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self._weights.rms_norm_eps)

    def _heads(
        self, layer: LayerWeights, x: Tensor, angles: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:  # q, k, v: [num_rows, heads, head_dim]
        dim = self._weights.head_dim
        q, k, v = (
            torch.unflatten(linear(part, x), -1, (-1, dim)) for part in (layer.q, layer.k, layer.v)
        )
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = self._norm(q, layer.q_norm), self._norm(k, layer.k_norm)
        return _rotate(q, *angles), _rotate(k, *angles), v


def linear(linear: PackedLinear, x: Tensor) -> Tensor:
    y = packed_linear(x, linear.weight)
    return y if linear.bias is None else y + linear.bias


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
