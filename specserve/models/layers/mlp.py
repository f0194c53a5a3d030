"""The SwiGLU MLP of a transformer layer."""

import torch.nn.functional as F
from torch import Tensor

from specserve.models.layers.linear import Linear


class Mlp:
    """down(silu(gate(x)) * up(x)) (Shazeer 2020), with gate and up fused in one `Linear`.

    If `exact`, a row's bits do not depend on the other rows, provided that the products are exact.
    """

    def __init__(self, gate_up: Linear, down: Linear, *, exact: bool) -> None:
        self.gate_up = gate_up  # hidden_size -> 2 * intermediate_size
        self.down = down  # intermediate_size -> hidden_size
        self._swiglu = swiglu_exact if exact else swiglu

    def __call__(self, x: Tensor) -> Tensor:
        """[num_rows, hidden_size], the result has the same shape and dtype."""
        return self.down(self._swiglu(self.gate_up(x)))


def swiglu(gate_up: Tensor) -> Tensor:  # [num_rows, 2 * size] -> [num_rows, size]
    """silu(gate) * up."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def swiglu_exact(gate_up: Tensor) -> Tensor:  # [num_rows, 2 * size] -> [num_rows, size]
    """`swiglu` whose bits for an element do not depend on the element's place in the tensor.

    On a CPU `F.silu` uses a different formula for the elements left over after whole SIMD vectors,
    and which elements those are depends on the shape and the number of threads. `exp` uses the
    same formula for all elements.
    """
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (gate / gate.neg().exp_().add_(1.0)).mul_(up).to(gate_up.dtype)
