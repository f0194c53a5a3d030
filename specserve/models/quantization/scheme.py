"""What a quantisation scheme implements for one model: it reads each `Linear` of a checkpoint.

A new scheme is one file: a `QuantMethod`, which holds a weight in the scheme's format, and a
`QuantScheme`, which reads it. A scheme may hold some layers in another format, such as floats.
"""

from collections.abc import Sequence
from typing import Protocol

import torch

from specserve.models.layers.linear import Linear
from specserve.models.quantization.method import EmbeddingMethod


class QuantScheme(Protocol):
    """Reads the weights of one checkpoint, ready for use, on the model's device.

    Beside the weights themselves, at most one tensor is in memory.
    """

    activation_dtype: torch.dtype  # of the activations between the layers
    # If exact, the bits of a row of a product do not depend on the other rows, as long as their
    # number is a multiple of `row_multiple`.
    exact: bool
    row_multiple: int

    def linear(self, names: Sequence[str], *, with_bias: bool = False) -> Linear:
        """Read linear maps of the same input, such as gate and up, as one.

        `names` are those of the modules, such as model.layers.0.mlp.gate_proj; their outputs follow
        one another. Raises `ModelError` if a value is NaN or infinite.
        """
        ...

    def embedding(self, name: str) -> EmbeddingMethod:
        """Read the embedding, the module `name`. Raises `ModelError` as `linear` does."""
        ...
