"""The result of one check of `specserve doctor`."""

from typing import Literal

from msgspec import Struct


class Check(Struct, frozen=True, omit_defaults=True):
    """A finding and its `fix`, if one is known.

    `status` "note": something optional is missing. "broken": specserve fails until this is fixed.
    """

    section: str
    name: str
    value: str
    status: Literal["ok", "note", "broken"] = "ok"
    fix: str | None = None
