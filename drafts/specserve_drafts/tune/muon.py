"""The optimiser: Muon for matrices, AdamW for all other parameters.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) orthogonalises the momentum of a
matrix, so that the update has about the same size in all directions. Its step is scaled to the RMS
of an AdamW step (Liu et al. 2025, arXiv 2502.16982, section 2.2). The state is saved as named
tensors, without pickle.
"""

import math
from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

NS_STEPS: Final = 5  # Newton-Schulz iterations
# Coefficients a, b, c of Jordan et al.: singular values converge fast, but only to about 1.
_NS: Final = (3.4445, -4.7750, 2.0315)
_MOMENTUM: Final = 0.95
_BETAS: Final = (0.9, 0.95)  # of AdamW
_EPS: Final = 1e-8
_RMS: Final = 0.2  # RMS of an AdamW step at learning rate 1


def orthogonalised(matrix: Tensor) -> Tensor:
    """An approximation of U V^T, where `matrix` [m, n] = U S V^T: the singular values of the result
    are about 0.7 to 1.2.

    Newton-Schulz iteration in bfloat16, which is precise enough for an update direction.
    """
    a, b, c = _NS
    x: Tensor = matrix.bfloat16()
    if tall := x.shape[0] > x.shape[1]:
        x = x.T
    x = x / (x.norm() + 1e-7)
    for _ in range(NS_STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    x = x.T if tall else x
    return x.to(matrix.dtype)


class MuonAdamW:
    """Updates `parameters`, given by name, in place. Learning rates are passed to each step."""

    def __init__(self, parameters: Mapping[str, Tensor], *, weight_decay: float) -> None:
        self._parameters = parameters
        self._weight_decay = weight_decay
        self._num_steps = 0
        self._first = {name: torch.zeros_like(p) for name, p in parameters.items()}
        self._second = {n: torch.zeros_like(p) for n, p in parameters.items() if p.ndim != 2}

    @torch.no_grad()
    def step(self, *, matrix_lr: float, other_lr: float) -> None:
        """Take one step with the parameters' gradients; those without a gradient stay."""
        self._num_steps += 1
        for name, parameter in self._parameters.items():
            if parameter.grad is None:
                continue
            if parameter.ndim == 2:
                self._muon(name, parameter, parameter.grad, matrix_lr)
            else:
                self._adamw(name, parameter, parameter.grad, other_lr)

    def tensors(self) -> dict[str, Tensor]:
        """The complete state, for `load`."""
        state = {f"first.{name}": tensor for name, tensor in self._first.items()}
        state |= {f"second.{name}": tensor for name, tensor in self._second.items()}
        return state | {"num_steps": torch.tensor([self._num_steps])}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore the state that `tensors` returned."""
        self._num_steps = int(tensors["num_steps"])
        for kind, own in (("first", self._first), ("second", self._second)):
            for name, tensor in own.items():
                tensor.copy_(tensors[f"{kind}.{name}"])

    def _muon(self, name: str, parameter: Tensor, grad: Tensor, lr: float) -> None:
        momentum = self._first[name].lerp_(grad, 1 - _MOMENTUM)
        update = orthogonalised(grad.lerp(momentum, _MOMENTUM))  # Nesterov's
        parameter.mul_(1 - lr * self._weight_decay)
        parameter.sub_(update, alpha=lr * _RMS * math.sqrt(max(parameter.shape)))

    def _adamw(self, name: str, parameter: Tensor, grad: Tensor, lr: float) -> None:
        """AdamW (Loshchilov and Hutter 2019), without weight decay, as it updates only norm weights
        and biases."""
        first = self._first[name].lerp_(grad, 1 - _BETAS[0])
        second = self._second[name].lerp_(grad.square(), 1 - _BETAS[1])
        steps = self._num_steps
        size = (second / (1 - _BETAS[1] ** steps)).sqrt_().add_(_EPS)
        parameter.addcdiv_(first, size, value=-lr / (1 - _BETAS[0] ** steps))
