"""The settings that training Medusa heads has in addition to `HeadSettings`."""

from collections.abc import Mapping
from typing import ClassVar

from specserve_drafts.tune.head_settings import HELP, RANGES, HeadSettings


class MedusaSettings(HeadSettings, frozen=True, forbid_unknown_fields=True):
    HELP: ClassVar[Mapping[str, str]] = HELP | {
        "heads": "number of heads; head i (from 0) predicts the token i + 1 positions after the "
        "target's next token",
    }
    RANGES: ClassVar[Mapping[str, tuple[float, float]]] = RANGES | {"heads": (1, 16)}

    heads: int = 3
