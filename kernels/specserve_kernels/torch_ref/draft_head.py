"""Reference implementation of a quantized draft head. `specserve_drafts` expands its trees."""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from specserve_kernels.decoder import DecoderPass, FusedDecoder
from specserve_kernels.draft_head import DraftHeadWeights
from specserve_kernels.torch_ref.decoder import TorchDecoder, linear


class TorchDraftHead:
    """Implements `QuantizedDraftHead` except `expand`."""

    def __init__(self, weights: DraftHeadWeights) -> None:
        self._weights = weights
        self._decoder: FusedDecoder = TorchDecoder(weights.decoder)

    def fuse(self, aux_hidden_states: Tensor) -> Tensor:
        """See `QuantizedDraftHead.fuse`."""
        normed = normalize_parts(aux_hidden_states, self._weights.aux_norms, self._eps)
        return linear(self._weights.fc, normed)

    def __call__(self, batch: DecoderPass) -> Tensor:
        """See `QuantizedDraftHead`."""
        weights = self._weights
        batch = replace(batch, aux_layers=(len(weights.decoder.layers),))
        out = self._decoder(batch).aux_hidden_states[:, 0]
        return self._norm(out) if weights.norm_output else out

    def write_kv(self, batch: DecoderPass) -> None:
        """See `QuantizedDraftHead.write_kv`."""
        self._decoder(batch)

    def logits(self, hidden_states: Tensor) -> Tensor:
        """See `QuantizedDraftHead.logits`."""
        weights = self._weights
        normed = hidden_states if weights.norm_output else self._norm(hidden_states)
        return self._decoder.unembed(normed) * weights.logit_scale

    @property
    def _eps(self) -> float:
        return self._weights.decoder.rms_norm_eps

    def _norm(self, x: Tensor) -> Tensor:
        weight = self._weights.decoder.norm
        return F.rms_norm(x, weight.shape, weight, self._eps)


def normalize_parts(x: Tensor, norms: Sequence[Tensor], eps: float) -> Tensor:
    """Normalize x [n, size] in equal parts, one per norm; without norms x itself."""
    if not norms:
        return x
    parts = zip(norms, x.chunk(len(norms), dim=-1), strict=True)
    return torch.cat([F.rms_norm(part, norm.shape, norm, eps) for norm, part in parts], dim=-1)
