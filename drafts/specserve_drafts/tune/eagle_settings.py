"""The settings that training an EAGLE head has in addition to `HeadSettings`."""

from collections.abc import Mapping
from typing import ClassVar, Final, Literal

from specserve_drafts.tune.head_settings import HELP, RANGES, HeadSettings

MAX_DEPTH: Final = 16  # steps of a chain


class EagleSettings(HeadSettings, frozen=True, forbid_unknown_fields=True):
    HELP: ClassVar[Mapping[str, str]] = HELP | {
        "aux_layers": "target layers whose input hidden states the head reads; default: 2, the "
        "middle layer, and the third from the end",
        "mlp_size": "intermediate size of the head's MLP; default: the target's",
        "depth": "steps of the training-time test: tokens that the head learns to draft ahead",
        "embedding": "own: the checkpoint holds a copy of the target's embedding, which the "
        "speculators package needs and engines do not",
    }
    RANGES: ClassVar[Mapping[str, tuple[float, float]]] = RANGES | {
        "mlp_size": (1, 2**20),
        "depth": (1, MAX_DEPTH),
    }
    FREE: ClassVar[frozenset[str]] = HeadSettings.FREE | {"embedding"}

    aux_layers: tuple[int, ...] | None = None
    mlp_size: int | None = None
    depth: int = 4
    embedding: Literal["target", "own"] = "target"
