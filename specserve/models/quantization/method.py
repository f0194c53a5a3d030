"""What a quantisation scheme implements for one weight; knows no model and no checkpoint."""

from typing import Protocol

from torch import Tensor


class QuantMethod(Protocol):
    """The weight [num_outputs, num_inputs] of one `Linear`, in the format of one scheme."""

    @property
    def num_bytes(self) -> int:
        """The bytes that a product reads, scales included."""
        ...

    def apply(
        self,
        x: Tensor,  # [num_rows, num_inputs]
        bias: Tensor | None,  # [num_outputs], as `QuantScheme.linear` made it
    ) -> Tensor:  # [num_rows, num_outputs] in x's dtype
        """x W^T + bias, exact as `QuantScheme` says."""
        ...


class EmbeddingMethod(QuantMethod, Protocol):
    """A weight [vocab_size, hidden_size] that can be the embedding too, and a tied head."""

    def rows(self, ids: Tensor) -> Tensor:
        """The rows `ids` [n] int64: [n, hidden_size] in the activations' dtype."""
        ...
