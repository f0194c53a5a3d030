"""`specserve tune eagle`: trains an EAGLE-3.1 head on the target's own answers."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from msgspec import Meta
from torch import Tensor

from specserve.models.checkpoint import Checkpoint, read_checkpoint
from specserve.models.shape import ModelShape
from specserve_drafts.tune.eagle_batch import ChainBatch, build_chains
from specserve_drafts.tune.eagle_export import write_head, write_token_order
from specserve_drafts.tune.eagle_init import default_aux_layers, head_shape, start_from_target
from specserve_drafts.tune.eagle_model import EagleHead
from specserve_drafts.tune.head_command import head_parser, train
from specserve_drafts.tune.head_settings import HeadSettings
from specserve_drafts.tune.head_training import Trainer
from specserve_drafts.tune.settings import Count
from specserve_drafts.tune.teacher import Lesson, Teacher
from specserve_drafts.tune.texts import Text


class EagleSettings(HeadSettings, frozen=True, forbid_unknown_fields=True):
    HELP: ClassVar[dict[str, str]] = HeadSettings.HELP | {
        "aux_layers": "target layers whose input hidden states the head reads; not given: 2, the "
        "middle layer, and the third from the end",
        "mlp_size": "intermediate size of the head's MLP; not given: the target's",
        "depth": "steps of the training-time test: tokens that the head learns to draft ahead",
        "embedding": "own: the checkpoint holds a copy of the target's embedding, which the "
        "speculators package needs and engines do not",
    }
    FREE: ClassVar[frozenset[str]] = HeadSettings.FREE | {"embedding"}

    aux_layers: tuple[int, ...] | None = None
    mlp_size: Count | None = None
    depth: Annotated[int, Meta(ge=1, le=16)] = 4
    embedding: Literal["target", "own"] = "target"


class EagleMethod:
    Settings: ClassVar[type[HeadSettings]] = EagleSettings
    name = "eagle"
    kind = "EAGLE-3.1"
    layout = "The layout is that of vllm-project/speculators."

    def __init__(self, settings: HeadSettings) -> None:
        assert isinstance(settings, EagleSettings)
        self._settings = settings

    def aux_layers(self, target: ModelShape) -> tuple[int, ...]:
        layers = self._settings.aux_layers or default_aux_layers(target.num_layers)
        if not all(0 <= x <= target.num_layers for x in layers) or len(set(layers)) < len(layers):
            raise ValueError(
                f"aux_layers: {list(layers)}; expected different layers of 0 to {target.num_layers}"
            )
        return layers

    def begin(
        self, checkpoint: Checkpoint, teacher: Teacher, last: Tensor, draft_vocab: int
    ) -> EagleHead:
        settings, target = self._settings, teacher.model.shape
        shape = head_shape(target, self.aux_layers(target), draft_vocab, settings.mlp_size)
        head = EagleHead(shape, settings.depth, teacher.device)
        start_from_target(head, checkpoint, target, last, settings.seed)
        return head

    def lay_out(self, texts: Sequence[Text], lesson: Lesson, teacher: Teacher) -> ChainBatch:
        return build_chains(texts, lesson.aux_hidden_states, teacher.embed)

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

    def about(self, trainer: Trainer, target: str, coverage: float) -> str:
        head = trainer.average
        assert isinstance(head, EagleHead)
        shape, layers = head.shape, ", ".join(map(str, head.shape.aux_layers))
        return (
            f"A head of one layer of width {shape.hidden_size}. It reads the hidden states that "
            f"enter layers {layers} of {target}. It uses the target's LM head for "
            f"{shape.draft_vocab_size} of {shape.vocab_size} tokens, which have {coverage:.1%} of "
            "the target's probability mass. Embedding and LM head are the target's and were not "
            "trained."
        )


build_parser = partial(head_parser, EagleMethod)
main = partial(train, EagleMethod)
