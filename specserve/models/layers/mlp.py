"""The SwiGLU MLP of a transformer layer."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from specserve.models.layers.linear import Linear


@dataclass(frozen=True, slots=True)
class Mlp:
    """down(silu(gate(x)) * up(x)) (Shazeer 2020), with gate and up fused in one `Linear`."""

    gate_up: Linear  # hidden_size -> 2 * intermediate_size
    down: Linear  # intermediate_size -> hidden_size
    exact: bool  # a row's bits do not depend on the other rows if this holds for the products

    def __call__(self, x: Tensor) -> Tensor:
        """[num_rows, hidden_size], the result has the same shape and dtype."""
        gate_up = self.gate_up(x)
        return self.down(swiglu_exact(gate_up) if self.exact else swiglu(gate_up))


def swiglu(gate_up: Tensor) -> Tensor:  # [num_rows, 2 * size] -> [num_rows, size]
    """silu(gate) * up."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def swiglu_exact(gate_up: Tensor) -> Tensor:  # [num_rows, 2 * size] -> [num_rows, size]
    """`swiglu` whose bits for an element do not depend on the element's place in the tensor.

    On a CPU `F.silu` has another formula for elements left over after whole SIMD vectors; which
    these are depends on the shape and the number of threads. `exp` has one formula for all.
    """
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (gate / gate.neg().exp_().add_(1.0)).mul_(up).to(gate_up.dtype)
