"""One layer of a decoder-only transformer."""

from dataclasses import dataclass

from torch import Tensor

from specserve.models.layers.attention import Attention, AttentionInputs
from specserve.models.layers.mlp import Mlp
from specserve.models.layers.norm import RMSNorm


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """Attention and an MLP, each behind a norm and added to the residual stream."""

    attention_norm: RMSNorm
    attention: Attention
    mlp_norm: RMSNorm
    mlp: Mlp

    def __call__(
        self,
        x: Tensor,  # [num_rows, hidden_size], the residual stream
        cache: tuple[Tensor, Tensor],  # this layer's K and V: see `Attention`
        inputs: AttentionInputs,
    ) -> Tensor:  # [num_rows, hidden_size] in x's dtype
        """The residual stream after this layer; writes K and V of the rows to `cache`."""
        x = x + self.attention(self.attention_norm(x), cache, inputs)
        return x + self.mlp(self.mlp_norm(x))
