"""A bound EAGLE head, and its chains of draft steps with the tokens given: for comparing logits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specserve.cache.storage import KVStorage
from specserve.models.shape import ModelShape
from specserve.sampling import Sampler
from specserve.speculation.drafter import DraftContext, TargetLayers
from specserve.speculation.registry import create_drafter
from specserve_drafts.eagle.drafter import EagleDrafter
from specserve_drafts.eagle.head import HeadSegment, build_head_batch
from specserve_kernels.dispatch import select_kernels

CPU = torch.device("cpu")
_BLOCK_SIZE = 16


def bound_drafter(
    path: Path,
    target: Path,
    embed: Callable[[Tensor], Tensor],
    unembed: Callable[[Tensor], Tensor] | None = None,
) -> EagleDrafter:
    """As an engine in float32 makes it of `--draft path`, for a target that only embeds, and
    unembeds if it is said how."""

    def nothing(*_: Any) -> Any:
        raise AssertionError("the head asked its target for more than it has")

    drafter = create_drafter(str(path), {}, target, Path)
    assert isinstance(drafter, EagleDrafter)
    kernels, spec = select_kernels(CPU), drafter.kv_spec(torch.float32)
    assert spec is not None
    context = DraftContext(
        device=CPU,
        kernels=kernels,
        vocab_size=ModelShape.from_dir(target).vocab_size,
        block_size=_BLOCK_SIZE,
        sampler=Sampler(kernels, CPU),
        sampling_state=nothing,
        storage=KVStorage(spec, _BLOCK_SIZE, CPU),
        target=TargetLayers(embed, nothing, unembed or nothing, None),
        load_model=nothing,
        step_seconds=None,
    )
    drafter.bind(context)
    return drafter


def chain_logits(
    drafter: EagleDrafter,
    ids: Tensor,  # [n] int64
    states: Tensor,  # [n, num_aux_layers * target_hidden_size]
    num_steps: int,
) -> list[Tensor]:
    """The logits of each step [n - step, draft_vocab_size], computed as a drafter does.

    Draft input i is hidden state i and token i; step k of the chain that begins with it takes token
    i + k and the head's own output.
    """
    n, tokens = len(ids), ids.tolist()
    head, spec = drafter.head, drafter.kv_spec(torch.float32)
    assert spec is not None
    kv = KVStorage(spec, n * num_steps, CPU)
    ancestors = np.array([(2 << i) - 1 for i in range(max(n, num_steps))], np.uint64)
    slots = torch.arange(n * num_steps, dtype=torch.int32)
    own = slots[n:].reshape(n, -1)  # slots of each chain after its first draft input
    inputs = HeadSegment(slots[:n], 0, 0, tokens, np.arange(n), ancestors[:n])
    rows = head(build_head_batch([inputs], head.fuse(states), kv))
    logits = [head.logits(rows)]
    for step in range(1, num_steps):
        nodes = [
            HeadSegment(
                torch.cat((slots[: i + 1], own[i])),
                i,
                step,
                [tokens[i + step]],
                np.array([i + step]),
                ancestors[step : step + 1],
            )
            for i in range(n - step)
        ]
        rows = head(build_head_batch(nodes, rows[: n - step], kv))
        logits.append(head.logits(rows))
    return logits
