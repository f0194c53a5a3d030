"""What the runner and the drafters need of a model, however its weights are kept."""

from typing import Protocol

import torch
from torch import Tensor

from specserve.batch import ForwardBatch, ModelOutput
from specserve.cache.storage import KVSpec, KVStorage
from specserve.models.shape import ModelShape
from specserve_kernels.packing import PackedWeight


class Model(Protocol):
    """A target or a draft, with its weights in place.

    If `exact`, a row's result does not depend on the rows it shares a pass with. Passes have a
    multiple of `row_multiple` rows. `num_bytes` of weights are read by a pass with logits.
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
    def packed_embedding(self) -> PackedWeight | None:
        """[vocab_size, hidden_size]; None: the weights are not packed."""
        ...

    @property
    def kv_spec(self) -> KVSpec: ...

    def __call__(
        self,
        batch: ForwardBatch,
        kv: KVStorage,
        *,
        taps: tuple[int, ...] = (),
        num_top: int = 0,
    ) -> ModelOutput:
        """One pass; writes the K and V of its rows to `kv`.

        Tap t is the residual stream entering layer t, and t = num_layers the one leaving the last
        layer, before the final norm; they are concatenated in the order asked for. `num_top`: at
        least that many best tokens of each logits row are found on the way, where that is cheap;
        `ModelOutput.topk` is None where it is not.
        """
        ...

    def logits(self, x: Tensor) -> Tensor:  # [n, hidden_size] -> [n, vocab_size] float32
        """Final norm and head over residual rows, any number of them."""
        ...

    def embed(self, ids: Tensor) -> Tensor:  # [n] int64 -> [n, hidden_size]
        ...

    def final_norm(self, x: Tensor) -> Tensor:  # [n, hidden_size], same shape back
        ...

    def unembed(self, x: Tensor) -> Tensor:  # [n, hidden_size] -> [n, vocab_size] float32
        """The head alone, over rows that are normed already or need not be; never exact."""
        ...
