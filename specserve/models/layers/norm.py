"""RMSNorm."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RMSNorm:
    """RMSNorm (Zhang and Sennrich 2019), computed in float32 for rows of any dtype."""

    weight: Tensor  # [size] float32
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """[..., size], the result has the same shape and dtype."""
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps).to(x.dtype)
