"""The interface of a model for the runner and the drafters, independent of its weight format."""

from typing import Protocol

import torch
from torch import Tensor

from specserve.batch import ForwardBatch, ModelOutput
from specserve.cache.storage import KVSpec, KVStorage
from specserve.models.shape import ModelShape
from specserve_kernels.packed_weight import PackedWeight


class Model(Protocol):
    """A target or draft model with its weights loaded."""

    shape: ModelShape
    dtype: torch.dtype  # of K and V
    kv_spec: KVSpec
    exact: bool  # the result of a row does not depend on the other rows of its forward pass
    row_multiple: int  # the number of rows of a forward pass must be a multiple of it
    weights: str  # what they are held as, such as bfloat16 or int8
    num_bytes: int  # of the weights that a forward pass with logits reads
    # The embedding [vocab_size, hidden_size] of a model that runs in one native call, for a draft
    # head that does too; None for a model that runs layer by layer.
    packed_embedding: PackedWeight | None

    def __call__(
        self,
        batch: ForwardBatch,
        kv: KVStorage,
        *,
        aux_layers: tuple[int, ...] = (),
        num_top: int = 0,
    ) -> ModelOutput:
        """Run one forward pass; writes the K and V of its rows to `kv`.

        `aux_layers` selects auxiliary hidden states, in the order of the output: i is the residual
        stream before layer i, and num_layers the one before the final norm. `num_top` is the number
        of best tokens wanted per row of logits: `ModelOutput.topk` has as many or more, or is None
        for a model that cannot find them cheaply.
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
        """Apply the head. A row may depend on the others even if `exact`."""
        ...
