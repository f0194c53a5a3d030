"""The progress of a training run on disk: a state in JSON and a file of tensors."""

import argparse
from pathlib import Path
from typing import Any, Final

import msgspec
from msgspec import Struct
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from specserve_drafts.atomic_write import atomic_write, write_json
from specserve_drafts.tune.head_card import HeadPoint
from specserve_drafts.tune.head_settings import HeadSettings
from specserve_drafts.tune.prompt_file import DATA_SETTINGS, data_settings

STATE: Final = "state.json"


class State(Struct, frozen=True):
    """The progress of a run; together with the tensors, all that is needed to resume."""

    settings: dict[str, Any]
    num_steps: int = 0
    num_tokens: int = 0  # answer tokens trained on, repeats counted
    num_answered: int = 0  # answer tokens in all shards
    passes: tuple[int, ...] = ()  # training passes over each shard, the current one included
    shard: int = -1  # the one being trained on; -1: none
    cursor: int = 0  # batches of that shard that are done
    answering: float = 0.0  # seconds
    training: float = 0.0  # seconds, checks included
    curve: tuple[HeadPoint, ...] = ()
    tensors: str | None = None  # name of the tensors' file in the same directory


def begun(out: Path, lasting: dict[str, Any]) -> State:
    """The state of a new run, not written yet. Raises ValueError if `out` holds a run.

    lasting: the settings that must not change on resuming.
    """
    if (out / STATE).exists():
        raise ValueError(f"out: {out} holds a run; add --resume, or give another directory")
    return State(lasting)


def resumed(out: Path, lasting: dict[str, Any]) -> State:
    """The state of the run in `out`; removes files left by a killed save. Raises ValueError if it
    cannot be read or was made with other settings."""
    path = out / STATE
    try:
        state = msgspec.json.decode(path.read_bytes(), type=State)
    except (OSError, msgspec.MsgspecError) as error:
        raise ValueError(f"resume: {path} cannot be read: {error}") from error
    for name, value in lasting.items():
        if (before := state.settings.get(name)) != value:
            raise ValueError(f"{name}: {value!r} goes on with a run that had {before!r}; leave it")
    for left in (*out.glob("run-*.safetensors"), *out.glob(".*.part")):
        if left.name != state.tensors:
            left.unlink()
    return state


def lasting_settings(
    args: argparse.Namespace, settings: HeadSettings, target: dict[str, Any]
) -> dict[str, Any]:
    """The settings that must not change on resuming, those of the data included."""
    return settings.lasting() | data_settings(args, target)


def answer_settings(lasting: dict[str, Any]) -> dict[str, Any]:
    """The part of `lasting_settings` that the answers depend on."""
    names = ("max_tokens", "max_len", "temperature", "seed", *DATA_SETTINGS)
    return {name: lasting[name] for name in names}


def load_tensors(out: Path, state: State) -> dict[str, Tensor]:
    """The tensors saved with `state`; empty if none were saved yet. Raises ValueError."""
    if state.tensors is None:
        return {}
    try:
        return load_file(out / state.tensors)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"resume: {out / state.tensors} cannot be read: {error}") from error


def save(out: Path, state: State, tensors: dict[str, Tensor]) -> State:
    """Write the tensors to a file of a new name, then the state with that name, and return it.

    The order ensures that the state on disk always names a complete file.
    """
    before, name = state.tensors, f"run-{state.num_steps}.safetensors"
    if name != before:
        with atomic_write(out / name) as part:
            save_file(tensors, part)
    state = msgspec.structs.replace(state, tensors=name)
    write_json(out / STATE, state)
    if before is not None and before != name:
        (out / before).unlink(missing_ok=True)
    return state
