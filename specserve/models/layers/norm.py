"""RMSNorm."""

import torch.nn.functional as F
from torch import Tensor


class RMSNorm:
    """RMSNorm (Zhang and Sennrich 2019), computed in float32 for rows of any dtype."""

    def __init__(self, weight: Tensor, eps: float) -> None:  # weight: [size] float32
        self.weight = weight
        self.eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        """[..., size], the result has the same shape and dtype."""
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps).to(x.dtype)
