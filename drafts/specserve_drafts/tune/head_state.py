"""The progress of a training run of heads on disk: a state in JSON and a file of tensors."""

from pathlib import Path

import msgspec
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from specserve_drafts.atomic_write import atomic_write, write_json
from specserve_drafts.tune.head_card import HeadPoint
from specserve_drafts.tune.run_state import STATE, RunState


class State(RunState, frozen=True):
    """The progress of a run; together with the tensors, all that is needed to resume."""

    num_steps: int = 0
    num_tokens: int = 0  # answer tokens trained on, repeats counted
    num_answered: int = 0  # answer tokens in all shards
    passes: tuple[int, ...] = ()  # training passes over each shard, the current one included
    shard: int = -1  # the one being trained on; -1: none
    cursor: int = 0  # batches of that shard that are done
    seconds: float = 0.0  # of all commands of the run
    answering: float = 0.0  # seconds of these
    training: float = 0.0
    checking: float = 0.0
    curve: tuple[HeadPoint, ...] = ()
    tensors: str | None = None  # name of the tensors' file in the same directory


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

    The order ensures that the state on disk always names a complete file. Files of earlier saves
    are removed, also of one that was killed.
    """
    name = f"run-{state.num_steps}.safetensors"
    if name != state.tensors:
        with atomic_write(out / name) as part:
            save_file(tensors, part)
    state = msgspec.structs.replace(state, tensors=name)
    write_json(out / STATE, state)
    for file in (*out.glob("run-*.safetensors"), *out.glob(".*.part")):
        if file.name != name:
            file.unlink()
    return state
