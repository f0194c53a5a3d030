"""The loss over a frozen head, with its gradient by hand.

Logits of thousands of tokens would fill the memory if autograd kept them for every step of the
chain. The head does not learn, so the gradient of its input is all that is needed, and it is known
as soon as the logits are.
"""

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

_CHUNK: Final = {"cpu": 128, "cuda": 4096}  # rows whose logits exist at once: they stay in cache
_ETA: Final = 3.0  # how fast the hybrid turns to the acceptance itself


class HeadLoss(torch.autograd.Function):
    """sum_n weights[n] * loss[n], and the acceptance sum_v min(p, q) of each row.

    p is the target's distribution over the draft vocabulary (its mass elsewhere is missing, so
    sum_v p <= 1), q = softmax(head x). The loss is the forward KL sum_v p log(p / q); as a hybrid
    it is lambda KL + (1 - lambda) TV with lambda = exp(-3 acceptance) per row, the acceptance held
    fixed (LK losses, arXiv 2602.23881): total variation alone has no gradient to begin with.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [n, hidden_size]
        head: Tensor,  # [draft_vocab, hidden_size], in the dtype of the products
        p: Tensor,  # [m, draft_vocab] float32
        rows: Tensor,  # [n] int64, of p
        weights: Tensor,  # [n] float32
        hybrid: bool,
    ) -> tuple[Tensor, Tensor]:  # scalar, [n]
        grad = torch.empty_like(x)
        accepted = x.new_empty(len(x), dtype=torch.float32)
        total = x.new_zeros((), dtype=torch.float32)
        chunk = _CHUNK[x.device.type]
        for start in range(0, len(x), chunk):
            part = slice(start, start + chunk)
            loss, accepted[part], slope = _rows(x[part].to(head.dtype), head, p[rows[part]], hybrid)
            total += loss @ weights[part]
            grad[part] = (slope.mul_(weights[part, None]).to(head.dtype) @ head).to(x.dtype)
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(accepted)
        return total, accepted

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grad * grads[0], None, None, None, None, None


# (x, head, p, rows, weights, hybrid) -> (loss, acceptance [n]), see `HeadLoss`.
head_loss: Final[Callable[..., tuple[Tensor, Tensor]]] = HeadLoss.apply


def _rows(x: Tensor, head: Tensor, p: Tensor, hybrid: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Loss [n], acceptance [n] and d loss / d logits [n, draft_vocab]."""
    log_q = (x @ head.T).float().log_softmax(-1)
    q = log_q.exp()
    loss = torch.xlogy(p, p).sub_(log_q.mul_(p)).sum(-1)
    accepted = torch.minimum(p, q).sum(-1)
    mass = p.sum(-1)
    if not hybrid:
        return loss, accepted, q.mul_(mass[:, None]).sub_(p)
    share = torch.exp(-_ETA * accepted)
    loss = share * loss + (1 - share) * (1 - accepted)
    # Of TV = 1 - sum min(p, q): only tokens with q < p pull, against their own mean.
    below = torch.where(q < p, q, 0.0)
    pull = share * mass + (1 - share) * below.sum(-1)
    slope = q.mul_(pull[:, None]).addcmul_(p, share[:, None], value=-1)
    return loss, accepted, slope.addcmul_(below, (1 - share)[:, None], value=-1)
