"""The settings of a training run of heads, from flags or from an experiment file in TOML."""

import argparse
import tomllib
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar, Final, Literal, TypeVar

import msgspec
from msgspec import Struct

from specserve.cli.flags import add_flags, given
from specserve.cli.parser import ENGINE_HELP, TARGET_HELP
from specserve.config import TargetConfig

HELP: Final = {
    "minutes": "minutes of answering and training; 20 if neither this nor --tokens is given",
    "tokens": "answer tokens to train on, repeats counted; instead of --minutes",
    "draft_vocab": "tokens that the head can propose: those most often likely to the target",
    "batch": "prompts that the target answers at once",
    "max_tokens": "most tokens of an answer",
    "max_len": "most tokens of a prompt with its answer; the rest is not trained on",
    "temperature": "sampling temperatures of the answers, used in turn",
    "step_tokens": "answer tokens per optimizer step",
    "share": "with --minutes: least fraction of the time that the target answers prompts; "
    "0: train on the answers in DIR/data only",
    "repeats": "times that each answer is trained on before the target answers more prompts",
    "matrix_lr": "learning rate of matrices (Muon)",
    "other_lr": "learning rate of vectors (AdamW)",
    "weight_decay": "weight decay of matrices",
    "kl_first": "fraction of the run with KL divergence as the loss; then total variation is "
    "mixed in",
    "check_every": "optimizer steps between two evaluations on the held-out answers",
    "precision": "data type of the matrix products in training",
    "learn": "answers: train on the tokens of answers only; texts: on those of prompts too",
    "seed": "seed of the order of prompts, of sampling and of the initial weights",
}
RANGES: Final = {
    "minutes": (1, 10**6),
    "tokens": (1, 10**12),
    "draft_vocab": (2, 2**24),
    "batch": (1, 4096),
    "max_tokens": (2, 2**20),
    "max_len": (8, 2**20),
    "step_tokens": (1, 2**20),
    "share": (0.0, 0.95),
    "repeats": (1, 1000),
    "matrix_lr": (0.0, 1.0),
    "other_lr": (0.0, 1.0),
    "weight_decay": (0.0, 1.0),
    "kl_first": (0.0, 1.0),
    "check_every": (1, 10**6),
    "seed": (0, 2**31),
}
_LISTS: Final = {"temperature": float, "aux_layers": int}  # flags that take several values
_LIMITS: Final = frozenset({"minutes", "tokens"})


class HeadSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """Settings common to all methods; a method's subclass adds its own. The defaults are for a CPU;
    see drafts/experiments. Raises ValueError if a value is out of range."""

    HELP: ClassVar[Mapping[str, str]] = HELP
    RANGES: ClassVar[Mapping[str, tuple[float, float]]] = RANGES
    FREE: ClassVar[frozenset[str]] = _LIMITS | {"batch", "check_every"}  # may change on resuming

    minutes: int | None = None
    tokens: int | None = None
    draft_vocab: int = 8192
    batch: int = 32
    max_tokens: int = 256
    max_len: int = 512
    temperature: tuple[float, ...] = (0.0, 0.7, 0.0, 1.0)
    step_tokens: int = 1024
    share: float = 0.35
    repeats: int = 2
    matrix_lr: float = 6e-3
    other_lr: float = 1e-3
    weight_decay: float = 0.01
    kl_first: float = 0.3
    check_every: int = 25
    precision: Literal["float32", "bfloat16"] = "float32"
    learn: Literal["answers", "texts"] = "answers"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, (low, high) in self.RANGES.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ValueError(f"{name}: {value} is out of range; expected {low} to {high}")
        if self.minutes is not None and self.tokens is not None:
            raise ValueError("minutes: not together with tokens; give one of them")
        if not self.temperature or any(not 0 <= t <= 2 for t in self.temperature):
            raise ValueError(f"temperature: {list(self.temperature)}; expected some of 0 to 2")

    @property
    def seconds(self) -> int:
        """The time limit of a run without `tokens`."""
        return 60 * (self.minutes or 20)

    def lasting(self) -> dict[str, Any]:
        """The settings that must not change on resuming, as JSON types."""
        values: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(self))
        return {name: value for name, value in values.items() if name not in self.FREE}


Settings = TypeVar("Settings", bound=HeadSettings)


def add_settings(parser: argparse.ArgumentParser, kind: type[HeadSettings]) -> None:
    """Add the flags of `kind` and of the target to `parser`."""
    limit = parser.add_mutually_exclusive_group()
    for name in ("minutes", "tokens"):
        limit.add_argument(
            f"--{name}", type=int, default=argparse.SUPPRESS, metavar="N", help=kind.HELP[name]
        )
    lists = {name: each for name, each in _LISTS.items() if name in kind.__struct_fields__}
    for name, each in lists.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=each,
            nargs="+",
            default=argparse.SUPPRESS,
            metavar="N" if each is int else "T",
            help=kind.HELP[name],
        )
    group = parser.add_argument_group("recipe")
    add_flags(group, kind, kind.HELP, skip=_LIMITS | set(lists))
    add_flags(
        parser.add_argument_group("target"), TargetConfig, ENGINE_HELP | {"target": TARGET_HELP}
    )


def read_settings(
    args: argparse.Namespace, kind: type[Settings]
) -> tuple[Settings, dict[str, Any]]:
    """The settings of the experiment file, overridden by flags, and those of the target. Raises
    ValueError."""
    file: Path | None = args.experiment
    values = {} if file is None else _read_toml(file, kind)
    flags = given(args, kind)
    if _LIMITS & set(flags):
        values = {name: value for name, value in values.items() if name not in _LIMITS}
    values |= flags | given(args, TargetConfig)
    target = {name: values.pop(name) for name in TargetConfig.__struct_fields__ if name in values}
    try:
        msgspec.convert(target, TargetConfig)
        return msgspec.convert(values, kind), target
    except msgspec.ValidationError as error:
        reason = error.__cause__ or error  # the message of `__post_init__`, if that raised
        raise ValueError(f"{'' if file is None else f'{file}: '}{reason}") from error


def _read_toml(file: Path, kind: type[HeadSettings]) -> dict[str, Any]:
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"experiment: {file} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"experiment: {file} is not valid TOML: {error}") from error
    known = (*kind.__struct_fields__, *TargetConfig.__struct_fields__)
    for name in values:
        if name not in known:
            raise ValueError(f"{file}: {name}: unknown setting; {_hint(name, known)}")
    return values


def _hint(name: str, known: Iterable[str]) -> str:
    close = get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
