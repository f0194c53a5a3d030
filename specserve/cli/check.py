"""One thing that `specserve doctor` looked at."""

from typing import Literal

from msgspec import Struct


class Check(Struct, frozen=True, omit_defaults=True):
    """`note`: worth knowing, all works without. `broken`: it will not work until fixed."""

    section: str
    name: str
    value: str
    status: Literal["ok", "note", "broken"] = "ok"
    fix: str | None = None
