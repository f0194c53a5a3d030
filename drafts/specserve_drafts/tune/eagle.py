"""Train an EAGLE-3.1 head for a target on the target's own answers.

specserve tune eagle --prompts train.jsonl --exclude spec_bench.jsonl --out DIR --minutes 120

Generating answers and training alternate. A run can be killed at any time and continued with
--resume.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from specserve.models.checkpoint import Checkpoint, read_checkpoint
from specserve.models.shape import ModelShape
from specserve_drafts.tune.eagle_batch import build_chains
from specserve_drafts.tune.eagle_export import write_head, write_token_order
from specserve_drafts.tune.eagle_init import default_aux_layers, head_shape, start_from_target
from specserve_drafts.tune.eagle_model import EagleChains, EagleHead
from specserve_drafts.tune.eagle_settings import EagleSettings
from specserve_drafts.tune.head_card import Description, HeadMade
from specserve_drafts.tune.head_command import head_parser, train
from specserve_drafts.tune.head_training import Trainer
from specserve_drafts.tune.teacher import Lesson, Teacher
from specserve_drafts.tune.texts import Text


class EagleMethod:
    name = "eagle"

    def __init__(self, settings: EagleSettings) -> None:
        self._settings = settings

    def aux_layers(self, target: ModelShape) -> tuple[int, ...]:
        layers = self._settings.aux_layers or default_aux_layers(target.num_layers)
        if not all(0 <= x <= target.num_layers for x in layers) or len(set(layers)) < len(layers):
            raise ValueError(
                f"aux_layers: {list(layers)}; expected different layers of 0 to {target.num_layers}"
            )
        return layers

    def begin(
        self,
        checkpoint: Checkpoint,
        target: ModelShape,
        teacher: Teacher,
        last: Tensor,
        draft_vocab: int,
    ) -> EagleHead:
        settings = self._settings
        shape = head_shape(target, self.aux_layers(target), draft_vocab, settings.mlp_size)
        head = EagleHead(shape, teacher.device)
        start_from_target(head, checkpoint, target, last, settings.seed)
        return head

    def lay_out(self, texts: Sequence[Text], lesson: Lesson, teacher: Teacher) -> EagleChains:
        batch = build_chains(texts, teacher.device)
        return EagleChains(batch, lesson.aux_hidden_states, teacher.embed, self._settings.depth)

    def export(self, folder: Path, target: Path, trainer: Trainer, counts: Tensor) -> None:
        head, settings = trainer.average, self._settings
        assert isinstance(head, EagleHead)
        embedding = None
        if settings.embedding == "own":
            embedding = read_checkpoint(target).floats("model.embed_tokens.weight")
        write_head(
            folder,
            head.shape,
            head.state_dict(),
            trainer.rows,
            trainer.token_ids,
            target,
            settings.depth,
            embedding=embedding,
        )
        if head.shape.draft_vocab_size == head.shape.vocab_size:
            write_token_order(folder, counts)

    def describe(self, trainer: Trainer, made: HeadMade) -> Description:
        head = trainer.average
        assert isinstance(head, EagleHead)
        shape, target = head.shape, made.settings["target"]
        return Description(
            kind="EAGLE-3.1",
            about=f"A head of one layer of width {shape.hidden_size}. It reads the hidden states "
            f"that enter layers {', '.join(map(str, shape.aux_layers))} of {target}. It uses the "
            f"target's LM head for {shape.draft_vocab_size} of {shape.vocab_size} tokens, which "
            f"have {made.coverage:.1%} of the target's probability mass. Embedding and LM head are "
            "the target's and were not trained.",
            layout="The layout is that of vllm-project/speculators.",
        )


def main(argv: Sequence[str] | None = None) -> int:
    return train(build_parser(), EagleSettings, EagleMethod, argv)


def build_parser() -> argparse.ArgumentParser:
    return head_parser(
        "eagle", "Train an EAGLE-3.1 head for a target on the target's own answers.", EagleSettings
    )


if __name__ == "__main__":
    sys.exit(main())
