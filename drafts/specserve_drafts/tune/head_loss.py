"""The loss of hidden states under a frozen LM head, with an explicit gradient.

Autograd would keep the logits of every step of the chain, which for thousands of tokens exceeds the
memory. As the LM head is not trained, only the gradient with respect to its input is needed; it is
computed together with the loss from a chunk of logits at a time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

# Rows whose logits exist at once; on a CPU so few that they stay in its cache.
_CHUNK: Final = {"cpu": 128, "cuda": 4096}
_ETA: Final = 3.0  # rate at which the hybrid loss turns from KL to TV as acceptance rises


@dataclass(frozen=True, slots=True)
class Wanted:
    """The target's distributions at m tokens, and sums of them that every chain step needs."""

    p: Tensor  # [m, draft_vocab] float32
    mass: Tensor  # [m], sum_v p; below 1 by the probability of tokens outside the draft vocabulary
    log_p: Tensor  # [m], sum_v p log p

    @classmethod
    def of(cls, p: Tensor) -> "Wanted":
        tiny = torch.finfo(p.dtype).tiny
        parts = torch.split(p, _CHUNK[p.device.type])
        log_p = [torch.linalg.vecdot(part, part.clamp_min(tiny).log_()) for part in parts]
        return cls(p, p.sum(-1), torch.cat(log_p))


class HeadLoss(torch.autograd.Function):
    """sum_n weights[n] * loss[n], and the acceptance sum_v min(p, q) of each row.

    p is the target's distribution over the draft vocabulary, q = softmax(head x). The loss is the
    forward KL sum_v p log(p / q). The hybrid loss is lambda KL + (1 - lambda) TV with lambda =
    exp(-_ETA acceptance) per row, treated as a constant (LK losses, arXiv 2602.23881): total
    variation alone has almost no gradient at the start of training.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [n, hidden_size]
        head: Tensor,  # [draft_vocab, hidden_size], in the dtype of the products
        wanted: Wanted,
        rows: Tensor,  # [n] int64, of `wanted`
        weights: Tensor,  # [n] float32
        hybrid: bool,
    ) -> tuple[Tensor, Tensor]:  # scalar, [n]
        grad = torch.empty_like(x)
        accepted = x.new_empty(len(x), dtype=torch.float32)
        total = x.new_zeros((), dtype=torch.float32)
        chunk = _CHUNK[x.device.type]
        # Only products with the head have its lower precision; sums over rows are in float32.
        with torch.autocast(x.device.type, enabled=False):
            for start in range(0, len(x), chunk):
                part = slice(start, start + chunk)
                logits = x[part].to(head.dtype) @ head.T
                loss, accepted[part], slope = _RULES[x.device.type](
                    logits, wanted, rows[part], weights[part], hybrid
                )
                total += loss @ weights[part]
                grad[part] = slope @ head
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(accepted)
        return total, accepted

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grad * grads[0], None, None, None, None, None


# (x, head, wanted, rows, weights, hybrid) -> (loss, acceptance [n]), see `HeadLoss`.
head_loss: Final[Callable[..., tuple[Tensor, Tensor]]] = HeadLoss.apply


def loss_by_torch(
    logits: Tensor, wanted: Wanted, rows: Tensor, weights: Tensor, hybrid: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss [n], acceptance [n], and weights * d loss / d logits in the shape and dtype of
    `logits` [n, draft_vocab]. rows: [n] int64, indices into `wanted`; weights: [n]."""
    p, mass = wanted.p.index_select(0, rows), wanted.mass[rows]
    log_q = logits.float().log_softmax(-1)
    loss = wanted.log_p[rows] - torch.linalg.vecdot(p, log_q)
    q = log_q.exp_()
    accepted = torch.minimum(p, q).sum(-1)
    if hybrid:
        kl_weight = torch.exp(-_ETA * accepted)
        loss = kl_weight * loss + (1 - kl_weight) * (1 - accepted)
        # With b_v = q_v where q_v < p_v, else 0: d TV / d logit_v = q_v * sum(b) - b_v.
        below = (p - q).sign_().relu_().mul_(q)
        pull = kl_weight * mass + (1 - kl_weight) * below.sum(-1)
        slope = q.mul_(pull[:, None]).addcmul_(p, kl_weight[:, None], value=-1)
        slope.addcmul_(below, (1 - kl_weight)[:, None], value=-1)
    else:
        slope = q.mul_(mass[:, None]).sub_(p)
    return loss, accepted, slope.mul_(weights[:, None]).to(logits.dtype)


def loss_by_triton(
    logits: Tensor, wanted: Wanted, rows: Tensor, weights: Tensor, hybrid: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As `loss_by_torch`, with the gradient written to `logits`."""
    from specserve_kernels.triton.draft_loss import draft_loss

    loss, accepted = draft_loss(
        logits, wanted.p, wanted.mass, wanted.log_p, rows, weights, _ETA if hybrid else None
    )
    return loss, accepted, logits


_RULES: Final = {"cpu": loss_by_torch, "cuda": loss_by_triton}
