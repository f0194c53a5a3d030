"""The progress of a run on disk, from which it is resumed."""

from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec
from msgspec import Struct

STATE: Final = "state.json"


class RunState(Struct, frozen=True):
    settings: dict[str, Any]  # those that must not change on resuming


State = TypeVar("State", bound=RunState)


def open_state(kind: type[State], out: Path, settings: dict[str, Any], *, resume: bool) -> State:
    """The state of the run in `out`, or of a new run, which is not written yet.

    Raises ValueError if the state cannot be read or was made with other settings, or if a new run
    finds another one in `out`.
    """
    path = out / STATE
    if not resume:
        if path.exists():
            raise ValueError(f"out: {out} holds a run; add --resume, or give another directory")
        return kind(settings)
    try:
        state = msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, msgspec.MsgspecError) as error:
        raise ValueError(f"resume: {path} cannot be read: {error}") from error
    for name, value in settings.items():
        if (before := state.settings.get(name)) != value:
            raise ValueError(f"{name}: {value!r} goes on with a run that had {before!r}; leave it")
    return state
