"""Reference implementation of a forward pass with quantized weights, in plain torch."""

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
from specserve_kernels.packing import unpack
from specserve_kernels.torch_ref import TorchKernels
from specserve_kernels.torch_ref.linear import packed_linear


class TorchDecoder:
    """Implements `PackedDecoder`."""

    def __init__(self, weights: DecoderWeights) -> None:
        self._weights = weights
        self._kernels = TorchKernels()

    def __call__(self, batch: DecoderPass) -> DecoderOutput:
        weights = self._weights
        group_size = weights.num_heads // weights.num_kv_heads
        plan = self._kernels.plan_attention(batch.segments, weights.num_kv_heads, group_size)
        angles = weights.cos[batch.positions, None], weights.sin[batch.positions, None]
        x, wide = self._enter(batch)
        entering = []
        for layer, (k_cache, v_cache) in zip(weights.layers, batch.kv, strict=True):
            entering.append(x)
            if wide is None:
                wide = self._norm(x, layer.attention_norm)
            q, k, v = self._heads(layer, wide, angles)
            wide = None
            dtype = k_cache.dtype
            self._kernels.kv_write(k.to(dtype), v.to(dtype), k_cache, v_cache, batch.slots)
            mixed = self._kernels.paged_tree_attention(
                q, k_cache, v_cache, plan, scale=weights.head_dim**-0.5, window=layer.window
            )
            x = x + linear(layer.o, mixed.flatten(1))
            normed = self._norm(x, layer.mlp_norm)
            gated = F.silu(linear(layer.gate, normed)) * linear(layer.up, normed)
            x = x + linear(layer.down, gated)
        entering.append(x)
        logits = self.head(x[batch.logit_rows])
        tapped = [entering[tap] for tap in batch.taps] or [x[:, :0]]
        order = torch.sort(logits, dim=-1, descending=True, stable=True).indices
        top = torch.where(logits.isfinite().all(-1)[:, None], order[:, : batch.num_top], -1)
        return DecoderOutput(logits, top, torch.stack(tapped, dim=1))

    def _enter(self, batch: DecoderPass) -> tuple[Tensor, Tensor | None]:
        """The initial residual stream; for a draft head also the input of the first q, k and v."""
        weights = self._weights
        x = unpack(weights.embed)[batch.input_ids]
        if weights.row_norm is None:
            return x, None
        assert batch.rows is not None, "a draft head goes on from rows"
        normed = self._norm(batch.rows, weights.row_norm)
        wide = torch.cat((self._norm(x, weights.layers[0].attention_norm), normed), dim=-1)
        return normed if weights.normed_residual else batch.rows, wide

    def head(self, x: Tensor) -> Tensor:
        """See `PackedDecoder.head`."""
        return self.unembed(self._norm(x, self._weights.norm))

    def unembed(self, x: Tensor) -> Tensor:
        """See `PackedDecoder.unembed`."""
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
