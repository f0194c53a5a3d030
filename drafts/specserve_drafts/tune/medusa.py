"""`specserve tune medusa`: trains Medusa-1 heads on the target's own answers.

The file has vLLM's layout (see `medusa.checkpoint`): the authors' layout has no reduced vocabulary.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar

import torch
from msgspec import Meta
from torch import Tensor

from specserve.models.checkpoint import Checkpoint
from specserve.models.shape import ModelShape
from specserve_drafts.tune.export import public_name, write_checkpoint
from specserve_drafts.tune.head_command import head_parser, train
from specserve_drafts.tune.head_settings import HeadSettings
from specserve_drafts.tune.head_training import Trainer
from specserve_drafts.tune.medusa_model import MedusaChains, MedusaHeads, lay_out
from specserve_drafts.tune.teacher import Lesson, Teacher
from specserve_drafts.tune.texts import Text


class MedusaSettings(HeadSettings, frozen=True, forbid_unknown_fields=True):
    HELP: ClassVar[dict[str, str]] = HeadSettings.HELP | {
        "heads": "number of heads; head i (from 0) predicts the token i + 1 positions after the "
        "target's next token",
    }

    heads: Annotated[int, Meta(ge=1, le=16)] = 3


class MedusaMethod:
    Settings: ClassVar[type[HeadSettings]] = MedusaSettings
    name = "medusa"
    kind = "Medusa-1"
    layout = "The layout is vLLM's."

    def __init__(self, settings: HeadSettings) -> None:
        assert isinstance(settings, MedusaSettings)
        self._num_heads = settings.heads

    def aux_layers(self, target: ModelShape) -> tuple[int, ...]:
        return (target.num_layers,)

    def begin(
        self, checkpoint: Checkpoint, teacher: Teacher, last: Tensor, draft_vocab: int
    ) -> MedusaHeads:
        return MedusaHeads(teacher.model.shape.hidden_size, self._num_heads, teacher.device)

    def lay_out(self, texts: Sequence[Text], lesson: Lesson, teacher: Teacher) -> MedusaChains:
        return lay_out(texts, teacher.normed(lesson.last))

    def export(self, folder: Path, target: Path, trainer: Trainer, counts: Tensor) -> None:
        heads = trainer.average
        assert isinstance(heads, MedusaHeads)
        write_heads(folder, heads.tensors(trainer.rows), trainer.token_ids, len(counts), target)

    def about(self, trainer: Trainer, target: str, coverage: float) -> str:
        num_tokens, width = trainer.rows.shape
        return (
            f"{self._num_heads} heads over the last hidden state of {target}. Each is a residual "
            f"block of width {width} and an unembedding, which is the target's times a trained "
            f"square matrix. It has {num_tokens} tokens, which have {coverage:.1%} of the target's "
            "probability mass."
        )


def write_heads(
    folder: Path,
    weights: Mapping[str, Tensor],  # blocks.{head}.layers.0.{weight,bias}, lm_heads.{head}.weight
    token_ids: Tensor,  # [draft_vocab] int64, ascending
    vocab_size: int,
    target: Path,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Write the checkpoint to `folder`, atomically per file. target: the target's directory."""
    tensors = {**weights, "token_map": token_ids} if len(token_ids) < vocab_size else weights
    unembeddings = [tensor for name, tensor in tensors.items() if name.startswith("lm_heads.")]
    config = {
        "architectures": ["MedusaModel"],
        "model_type": "medusa",
        "hidden_size": unembeddings[0].shape[1],
        "vocab_size": vocab_size,
        "truncated_vocab_size": len(token_ids),
        "num_heads": len(unembeddings),
        "num_hidden_layers": 1,
        "medusa_fc_bias": True,
        "base_model_name_or_path": public_name(target),
    }
    write_checkpoint(folder, tensors, config, dtype)


build_parser = partial(head_parser, MedusaMethod)
main = partial(train, MedusaMethod)
