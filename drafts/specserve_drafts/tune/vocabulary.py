"""The draft vocabulary of trained heads, and the rows of the target's LM head for it."""

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from specserve.models.checkpoint import Checkpoint
from specserve.models.shape import ModelShape
from specserve_drafts.tune.teacher import Teacher
from specserve_drafts.tune.texts import Text

_COUNTED_ROWS: Final = 4096  # answer tokens whose distributions are averaged
_PROMPT_SHARE: Final = 0.5  # weight of token frequencies in prompts; answer probabilities have 1


def draft_vocabulary(
    texts: Sequence[Text], prompt_counts: Tensor, teacher: Teacher, size: int
) -> Tensor:
    """The `size` tokens of the draft vocabulary, int64 ascending.

    Tokens are ranked by the target's mean probability at answer tokens of `texts` plus their
    frequency in prompts (`prompt_counts`: [vocab_size], of sum 1); equal ones by id, as BPE merges
    frequent tokens first. End tokens are always included.
    """
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
    """The rows of the target's LM head for `token_ids`: [len(token_ids), hidden_size] float32."""
    name = "model.embed_tokens.weight" if target.tied_head else "lm_head.weight"
    return checkpoint.floats(name)[token_ids.cpu()].float()
