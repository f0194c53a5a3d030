"""Train Medusa-1 heads for a target on the target's own answers.

specserve tune medusa --prompts train.jsonl --exclude spec_bench.jsonl --out DIR --minutes 60

Generating answers and training alternate. A run can be killed at any time and continued with
--resume.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from specserve.models.checkpoint import Checkpoint
from specserve.models.shape import ModelShape
from specserve_drafts.tune.head_card import Description, HeadMade
from specserve_drafts.tune.head_command import head_parser, train
from specserve_drafts.tune.head_training import Trainer
from specserve_drafts.tune.medusa_export import write_heads
from specserve_drafts.tune.medusa_model import MedusaChains, MedusaHeads, lay_out
from specserve_drafts.tune.medusa_settings import MedusaSettings
from specserve_drafts.tune.teacher import Lesson, Teacher
from specserve_drafts.tune.texts import Text


class MedusaMethod:
    name = "medusa"

    def __init__(self, settings: MedusaSettings) -> None:
        self._settings = settings

    def aux_layers(self, target: ModelShape) -> tuple[int, ...]:
        return (target.num_layers,)

    def begin(
        self,
        checkpoint: Checkpoint,
        target: ModelShape,
        teacher: Teacher,
        last: Tensor,
        draft_vocab: int,
    ) -> MedusaHeads:
        return MedusaHeads(target.hidden_size, self._settings.heads, teacher.device)

    def lay_out(self, texts: Sequence[Text], lesson: Lesson, teacher: Teacher) -> MedusaChains:
        return lay_out(texts, teacher.normed(lesson.last))

    def export(self, folder: Path, target: Path, trainer: Trainer, counts: Tensor) -> None:
        heads, vocab_size = trainer.average, ModelShape.from_dir(target).vocab_size
        assert isinstance(heads, MedusaHeads)
        write_heads(folder, heads.tensors(trainer.rows), trainer.token_ids, vocab_size, target)

    def describe(self, trainer: Trainer, made: HeadMade) -> Description:
        num_tokens, width = trainer.rows.shape
        return Description(
            kind="Medusa-1",
            about=f"{self._settings.heads} heads over the last hidden state of "
            f"{made.settings['target']}. Each is a residual block of width {width} and an "
            "unembedding, which is the target's times a trained square matrix. It has "
            f"{num_tokens} tokens, which have {made.coverage:.1%} of the target's probability "
            "mass.",
            layout="The layout is vLLM's.",
        )


def main(argv: Sequence[str] | None = None) -> int:
    return train(build_parser(), MedusaSettings, MedusaMethod, argv)


def build_parser() -> argparse.ArgumentParser:
    return head_parser(
        "medusa",
        "Train Medusa-1 heads for a target on the target's own answers.",
        MedusaSettings,
    )


if __name__ == "__main__":
    sys.exit(main())
