"""The forward pass of Medusa heads."""

import torch
import torch.nn.functional as F
from torch import Tensor

from specserve.models.layers.linear import Linear
from specserve.models.quantization.dense import DenseMethod
from specserve_drafts.medusa.checkpoint import MedusaCheckpoint


class MedusaHeads:
    """The first `num_heads` heads of `file`, with their weights converted to `dtype`."""

    def __init__(
        self, file: MedusaCheckpoint, num_heads: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._dtype, self._scale = dtype, file.logit_scale

        def linear(weight: Tensor, bias: Tensor | None = None) -> Linear:
            return Linear(DenseMethod(put(weight)), None if bias is None else put(bias))

        def put(tensor: Tensor) -> Tensor:
            return tensor.to(device, dtype).contiguous()

        self._layers: list[list[Linear]] = []  # by head
        for head in range(num_heads):
            parts = [file.layer(head, layer) for layer in range(file.num_layers)]
            self._layers.append([linear(weight, bias) for weight, bias in parts])
        num_unembeddings = 1 if file.shared_unembedding else num_heads
        self._unembed = [linear(file.unembedding(head)) for head in range(num_unembeddings)]

    def __call__(self, rows: Tensor, num_heads: int) -> Tensor:
        """Logits [n, num_heads, draft_vocab_size] float32 of the first `num_heads` heads.

        rows: [n, hidden_size], the target's last hidden states after its final norm.
        """
        rows = rows.to(self._dtype)
        outs = []
        for layers in self._layers[:num_heads]:
            x = rows
            for layer in layers:
                x = x + F.silu(layer(x))
            outs.append(x)
        if len(self._unembed) == 1:  # one matrix product, which reads a shared weight once
            (unembed,) = self._unembed
            logits = unembed(torch.stack(outs, dim=1).flatten(0, 1)).view(len(rows), num_heads, -1)
        else:
            parts = zip(outs, self._unembed[:num_heads], strict=True)
            logits = torch.stack([unembed(x) for x, unembed in parts], dim=1)
        return logits.float() * self._scale
