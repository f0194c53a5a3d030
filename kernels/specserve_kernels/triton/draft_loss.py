"""The loss of a draft's logits and its gradient on CUDA; the gradient overwrites the logits.

One program per row reads the row's logits three times and the probabilities twice; the repeated
reads come from the cache.
"""

import torch
import triton.language as tl
from torch import Tensor

from specserve_kernels.triton.compile import kernel

BLOCK = 2048


def draft_loss(
    logits: Tensor,  # [n, vocab_size]; becomes weights[i] * d loss[i] / d logits[i]
    p: Tensor,  # [m, vocab_size] float32, probabilities of the target
    mass: Tensor,  # [m] float32, sum_v p
    log_p: Tensor,  # [m] float32, sum_v p log p
    rows: Tensor,  # [n] int64, row of p, mass and log_p
    weights: Tensor,  # [n] float32
    hybrid: float | None,  # eta of lambda = exp(-eta * acceptance); None: KL alone
) -> tuple[Tensor, Tensor]:
    """Loss and acceptance sum_v min(p, q), each [n] float32, for q = softmax(logits).

    The loss is KL(p || q), or the hybrid lambda KL + (1 - lambda) (1 - acceptance), in which lambda
    counts as a constant in the gradient.
    """
    num_rows, vocab_size = logits.shape
    loss = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    accepted = torch.empty_like(loss)
    if num_rows:
        draft_loss_row[(num_rows,)](
            logits,
            p,
            mass,
            log_p,
            rows,
            weights,
            loss,
            accepted,
            vocab_size,
            hybrid or 0.0,
            HYBRID=hybrid is not None,
            SIZE=BLOCK,
            num_warps=8,
        )
    return loss, accepted


@kernel
def log_sum_exp(x: tl.tensor, size: int, SIZE: tl.constexpr) -> tl.tensor:
    """log sum_i exp x[i] over the first `size` elements, in float32, SIZE elements at a time."""
    column = tl.arange(0, SIZE)
    top = tl.full([SIZE], float("-inf"), tl.float32)
    total = tl.zeros([SIZE], tl.float32)
    for start in range(0, size, SIZE):
        inside = start + column < size
        part = tl.load(x + start + column, mask=inside, other=float("-inf")).to(tl.float32)
        new_top = tl.maximum(top, part)
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp(top - base) + tl.exp(part - base)
        top = new_top
    best = tl.max(top, 0)
    return best + tl.log(tl.sum(total * tl.exp(top - best), 0))


@kernel
def draft_loss_row(
    logits: tl.tensor,
    p: tl.tensor,
    mass: tl.tensor,
    log_p: tl.tensor,
    rows: tl.tensor,
    weights: tl.tensor,
    loss: tl.tensor,
    accepted: tl.tensor,
    vocab_size: int,
    eta: float,
    HYBRID: tl.constexpr,
    SIZE: tl.constexpr,
) -> None:
    """Grid (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    wanted = tl.load(rows + row)
    own = logits + row * vocab_size
    target = p + wanted * vocab_size
    column = tl.arange(0, SIZE)
    log_total = log_sum_exp(own, vocab_size, SIZE)

    cross = tl.zeros([SIZE], tl.float32)
    overlap = tl.zeros([SIZE], tl.float32)
    pulled = tl.zeros([SIZE], tl.float32)
    for start in range(0, vocab_size, SIZE):
        inside = start + column < vocab_size
        x = tl.load(own + start + column, mask=inside, other=0.0).to(tl.float32)
        want = tl.load(target + start + column, mask=inside, other=0.0)
        q = tl.where(inside, tl.exp(x - log_total), 0.0)
        cross += want * (x - log_total)
        overlap += tl.minimum(want, q)
        pulled += tl.where(q < want, q, 0.0)
    acceptance = tl.sum(overlap, 0)
    value = tl.load(log_p + wanted) - tl.sum(cross, 0)
    pull = tl.load(mass + wanted)
    kl_weight = 1.0
    if HYBRID:
        kl_weight = tl.exp(-eta * acceptance)
        value = kl_weight * value + (1 - kl_weight) * (1 - acceptance)
        pull = kl_weight * pull + (1 - kl_weight) * tl.sum(pulled, 0)
    tl.store(loss + row, value)
    tl.store(accepted + row, acceptance)

    weight = tl.load(weights + row)
    for start in range(0, vocab_size, SIZE):
        inside = start + column < vocab_size
        x = tl.load(own + start + column, mask=inside, other=0.0).to(tl.float32)
        want = tl.load(target + start + column, mask=inside, other=0.0)
        q = tl.exp(x - log_total)
        slope = q * pull - kl_weight * want
        if HYBRID:
            slope -= tl.where(q < want, (1 - kl_weight) * q, 0.0)
        slope *= weight
        tl.store(own + start + column, slope.to(logits.dtype.element_ty), mask=inside)
