"""The tokens that heads propose, and the rows of the target's own head for them."""

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from specserve.models.checkpoint import Checkpoint
from specserve.models.shape import ModelShape
from specserve_drafts.tune.teacher import Teacher
from specserve_drafts.tune.texts import Text

_COUNTED_ROWS: Final = 4096
_PROMPT_SHARE: Final = 0.5  # what words of prompts count against likely words of answers


def draft_vocabulary(
    texts: Sequence[Text], prompt_counts: Tensor, teacher: Teacher, size: int
) -> Tensor:
    """[size] int64 ascending: the tokens with the most mass where the target answers; what is
    rare there goes by the prompts, then by rank: BPE merges what is frequent first."""
    if size >= len(prompt_counts):
        return torch.arange(len(prompt_counts))
    last = teacher.read(texts).last[:_COUNTED_ROWS]
    mass = torch.zeros_like(prompt_counts)
    for rows in torch.split(last, 256):
        mass += teacher.likely(rows, None).sum(0).cpu()
    mass = mass / len(last) + _PROMPT_SHARE * prompt_counts
    eos = list(teacher.model.shape.eos_token_ids)
    mass[eos] = torch.inf
    best = mass.argsort(descending=True, stable=True)[: min(size, len(mass))]
    return best.sort().values


def head_rows(checkpoint: Checkpoint, target: ModelShape, token_ids: Tensor) -> Tensor:
    """[len(token_ids), hidden_size] float32: the target's head, as far as it is drafted from."""
    name = "model.embed_tokens.weight" if target.tied_head else "lm_head.weight"
    return checkpoint.floats(name)[token_ids.cpu()].float()
