"""The interface of a model for the runner and the drafters, independent of its weight format."""

from typing import Protocol

import torch
from torch import Tensor

from specserve.batch import ForwardBatch, ModelOutput
from specserve.cache.storage import KVSpec, KVStorage
from specserve.models.shape import ModelShape
from specserve_kernels.quantized_weight import QuantizedWeight


class Model(Protocol):
    """A target or draft model with its weights loaded.

    If `exact` is true, the result of a row does not depend on the other rows of its forward pass.
    The number of rows of a forward pass must be a multiple of `row_multiple`. `dtype` is that of K
    and V. `num_bytes` is the size of the weights that a forward pass with logits reads.
    """

    @property
    def shape(self) -> ModelShape: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def exact(self) -> bool: ...
    @property
    def row_multiple(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...
    @property
    def quantized_embedding(self) -> QuantizedWeight | None:
        """The embedding [vocab_size, hidden_size] of a model that runs in one native call, for a
        draft head that does too; None for a model that runs layer by layer."""
        ...

    @property
    def kv_spec(self) -> KVSpec: ...

    def __call__(
        self,
        batch: ForwardBatch,
        kv: KVStorage,
        *,
        aux_layers: tuple[int, ...] = (),
        num_top: int = 0,
    ) -> ModelOutput:
        """Run one forward pass; writes the K and V of its rows to `kv`.

        `aux_layers` selects auxiliary hidden states: i is the residual stream before layer i, and
        num_layers the one after the last layer, before the final norm. The output has them
        concatenated in this order. `num_top` requests the best tokens of each row of
        logits: `ModelOutput.topk` has at least that many, or is None for a model that cannot find
        them cheaply.
        """
        ...

    def logits(self, x: Tensor) -> Tensor:  # [n, hidden_size] -> [n, vocab_size] float32
        """Apply the final norm and the head to rows of the residual stream; n is arbitrary."""
        ...

    def embed(self, ids: Tensor) -> Tensor:  # [n] int64 -> [n, hidden_size]
        """The embeddings of token ids."""
        ...

    def final_norm(self, x: Tensor) -> Tensor:  # [n, hidden_size] -> the same shape
        """The norm in front of the head."""
        ...

    def unembed(self, x: Tensor) -> Tensor:  # [n, hidden_size] -> [n, vocab_size] float32
        """Apply the head without the final norm. A row may depend on the others even if `exact`."""
        ...
