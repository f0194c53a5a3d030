"""How far a training run is, on disk: a state in JSON and tensors beside it."""

import argparse
from pathlib import Path
from typing import Any, Final

import msgspec
from msgspec import Struct
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from specserve.config import TargetConfig
from specserve_drafts.tune.head_card import HeadPoint
from specserve_drafts.tune.head_settings import HeadSettings

STATE: Final = "state.json"


class State(Struct, frozen=True):
    """How far a run is; with the tensors, all that resuming takes."""

    settings: dict[str, Any]
    num_steps: int = 0
    num_tokens: int = 0  # of answers trained on, repeats counted
    num_answered: int = 0  # different ones
    passes: tuple[int, ...] = ()  # over each shard, the one at work included
    shard: int = -1  # at work; -1: none
    cursor: int = 0  # batches of it that are done
    answering: float = 0.0  # seconds
    training: float = 0.0  # seconds, checks included
    curve: tuple[HeadPoint, ...] = ()
    tensors: str | None = None  # file beside this one


def begun(out: Path, lasting: dict[str, Any]) -> State:
    if (out / STATE).exists():
        raise ValueError(f"out: {out} holds a run; add --resume, or give another directory")
    out.mkdir(parents=True, exist_ok=True)
    state = State(lasting)
    _write(out / STATE, state)
    return state


def resumed(out: Path, lasting: dict[str, Any]) -> State:
    path = out / STATE
    try:
        state = msgspec.json.decode(path.read_bytes(), type=State)
    except (OSError, msgspec.MsgspecError) as error:
        raise ValueError(f"resume: {path} cannot be read: {error}") from error
    for name, value in lasting.items():
        if (before := state.settings.get(name)) != value:
            raise ValueError(f"{name}: {value!r} goes on with a run that had {before!r}; leave it")
    return state


def lasting_settings(
    args: argparse.Namespace, settings: HeadSettings, target: dict[str, Any]
) -> dict[str, Any]:
    files = {"prompts": args.prompts.name, "exclude": [path.name for path in args.exclude]}
    name = Path(target.get("target", TargetConfig().target)).name
    return settings.lasting() | files | {"target": name}


def answer_settings(lasting: dict[str, Any]) -> dict[str, Any]:
    """Those of `lasting_settings` that answers depend on."""
    names = ("prompts", "exclude", "target", "max_tokens", "max_len", "temperature", "seed")
    return {name: lasting[name] for name in names}


def load_tensors(out: Path, state: State) -> dict[str, Tensor]:
    if state.tensors is None:
        return {}
    try:
        return load_file(out / state.tensors)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"resume: {out / state.tensors} cannot be read: {error}") from error


def save(out: Path, state: State, tensors: dict[str, Tensor]) -> State:
    """The tensors under a new name, then the state that names them: never one without the
    other. Gives the state as it was written."""
    before, name = state.tensors, f"run-{state.num_steps}.safetensors"
    if name != before:
        part = out / f"{name}.part"
        save_file(tensors, part)
        part.replace(out / name)
    state = msgspec.structs.replace(state, tensors=name)
    _write(out / STATE, state)
    if before is not None and before != name:
        (out / before).unlink(missing_ok=True)
    return state


def _write(path: Path, value: Struct) -> None:
    part = path.with_name(path.name + ".part")
    part.write_bytes(msgspec.json.format(msgspec.json.encode(value), indent=2))
    part.replace(path)
