"""Whole models as one kernel: an optional part of a backend, see `dispatch.fused_models`."""

from typing import Protocol

from specserve_kernels.decoder import DecoderWeights, FusedDecoder
from specserve_kernels.draft_head import DraftHeadWeights, QuantizedDraftHead


class FusedModels(Protocol):
    """Makes models whose forward pass is one kernel call."""

    def decoder(self, weights: DecoderWeights, /) -> FusedDecoder:
        """A decoder-only transformer with these weights."""
        ...

    def draft_head(self, weights: DraftHeadWeights, /) -> QuantizedDraftHead:
        """A draft head with these weights."""
        ...
