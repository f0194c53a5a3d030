"""A linear map whose weight may be quantised."""

from dataclasses import dataclass

from torch import Tensor

from specserve.models.quantization.method import QuantMethod


@dataclass(frozen=True, slots=True)
class Linear:
    """x W^T + b. The `QuantMethod` holds W and computes the product; callers never ask which."""

    method: QuantMethod
    bias: Tensor | None = None  # [num_outputs], in the dtype that `method` expects

    def __call__(self, x: Tensor) -> Tensor:
        """[num_rows, num_inputs] -> [num_rows, num_outputs] in x's dtype."""
        return self.method.apply(x, self.bias)
