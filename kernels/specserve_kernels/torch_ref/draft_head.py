"""Reference implementation of a quantized draft head. `specserve_drafts` expands its trees."""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from specserve_kernels.decoder import DecoderPass
from specserve_kernels.draft_head import DraftHeadWeights
from specserve_kernels.torch_ref.decoder import TorchDecoder, linear


class TorchDraftHead:
    """Implements `PackedDraftHead` except `grow`."""

    def __init__(self, weights: DraftHeadWeights) -> None:
        self._weights = weights
        self._decoder = TorchDecoder(weights.decoder)

    def fuse(self, taps: Tensor) -> Tensor:
        """See `PackedDraftHead.fuse`."""
        return linear(self._weights.fc, normed_taps(self._weights.tap_norms, taps, self._eps))

    def __call__(self, batch: DecoderPass) -> Tensor:
        """See `PackedDraftHead`."""
        weights = self._weights
        batch = replace(batch, taps=(len(weights.decoder.layers),))
        rows = self._decoder(batch).tapped[:, 0]
        return self._norm(rows) if weights.norm_output else rows

    def take_in(self, batch: DecoderPass) -> None:
        """See `PackedDraftHead.take_in`."""
        self._decoder(batch)

    def logits(self, rows: Tensor) -> Tensor:
        """See `PackedDraftHead.logits`."""
        weights = self._weights
        normed = rows if weights.norm_output else self._norm(rows)
        return self._decoder.unembed(normed) * weights.logit_scale

    @property
    def _eps(self) -> float:
        return self._weights.decoder.rms_norm_eps

    def _norm(self, x: Tensor) -> Tensor:
        weight = self._weights.decoder.norm
        return F.rms_norm(x, weight.shape, weight, self._eps)


def normed_taps(norms: Sequence[Tensor], taps: Tensor, eps: float) -> Tensor:
    """Normalize auxiliary hidden states [n, inputs of fc] one part per norm; same shape back."""
    if not norms:
        return taps
    parts = zip(norms, taps.chunk(len(norms), dim=-1), strict=True)
    return torch.cat([F.rms_norm(part, norm.shape, norm, eps) for norm, part in parts], dim=-1)
