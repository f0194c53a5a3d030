"""The settings of a command, from flags or from an experiment file in TOML."""

import argparse
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, TypeVar, get_type_hints

import msgspec
from msgspec import Meta, Struct

from specserve.cli.flags import add_flags, default_text, flag_type, given
from specserve.cli.parser import TARGET_HELP
from specserve.config import TargetConfig, read_toml, unknown_setting
from specserve.field_help import ENGINE_HELP
from specserve.speculation.registry import invalid_field
from specserve.types import SamplingParams
from specserve_evals.provenance import DataFile

_LIMITS: Final = frozenset({"minutes", "tokens"})


Count = Annotated[int, Meta(ge=1, le=2**20)]


class CommandSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """The settings of one command. Ranges are annotations, which `read_settings` checks."""

    HELP: ClassVar[dict[str, str]] = {}  # by field name


class RunSettings(CommandSettings, frozen=True, forbid_unknown_fields=True):
    """Settings common to all training runs."""

    HELP: ClassVar[dict[str, str]] = {
        "minutes": "minutes of the whole command, those of the commands that it resumes "
        "included; not given: 20, or the limit of --tokens",
        "tokens": "answer tokens to learn from, repeats counted; instead of --minutes",
        "batch": "prompts that the target answers at once",
        "max_tokens": "most tokens of an answer",
        "temperature": "sampling temperatures of the answers, used in turn",
        "seed": "seed of the order of prompts, of sampling and of initial weights, if any",
    }
    FREE: ClassVar[frozenset[str]] = _LIMITS | {"batch"}  # may change on resuming

    minutes: Annotated[int, Meta(ge=1, le=10**6)] | None = None
    tokens: Annotated[int, Meta(ge=1, le=10**12)] | None = None
    batch: Annotated[int, Meta(ge=1, le=4096)] = 32
    max_tokens: Count = 256
    temperature: tuple[float, ...] = (0.0, 0.7, 0.0, 1.0)
    seed: Annotated[int, Meta(ge=0, le=2**31)] = 0

    def __post_init__(self) -> None:
        if self.minutes is not None and self.tokens is not None:
            raise ValueError("minutes: not together with tokens; give one of them")
        if not self.temperature or any(not 0 <= t <= 2 for t in self.temperature):
            raise ValueError(f"temperature: {list(self.temperature)}; expected some of 0 to 2")

    @property
    def limit(self) -> int:
        """Of tokens, or else of seconds."""
        return self.tokens or self.seconds

    @property
    def seconds(self) -> int:
        """The time limit of a run without `tokens`."""
        return 60 * (self.minutes or 20)

    def sampling(self, number: int) -> SamplingParams:
        """How prompt `number` is answered."""
        temperature = self.temperature[number % len(self.temperature)]
        return SamplingParams(
            temperature=temperature, max_tokens=self.max_tokens, seed=self.seed + number
        )


Settings = TypeVar("Settings", bound=CommandSettings)


def add_settings(parser: argparse.ArgumentParser, kind: type[CommandSettings]) -> None:
    """Add the flags of `kind` and of the target to `parser`."""
    hints = get_type_hints(kind)
    rules = {name: flag_type(hints[name])[0] for name in kind.__struct_fields__}
    lists = [name for name, rule in rules.items() if rule.get("action") == "append"]
    defaults = {info.name: info.default for info in msgspec.structs.fields(kind)}
    for name in lists:  # a flag with several values instead of a repeatable one
        each = rules[name]["type"]
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=each,
            nargs="+",
            default=argparse.SUPPRESS,
            metavar="N" if each is int else "T",
            help=kind.HELP[name] + default_text(defaults[name]),
        )
    add_flags(parser.add_argument_group("recipe"), kind, kind.HELP, skip=frozenset(lists))
    target_help = ENGINE_HELP | {"target": TARGET_HELP}
    add_flags(parser.add_argument_group("target"), TargetConfig, target_help)


def read_settings(
    args: argparse.Namespace, kind: type[Settings], file: Path | None = None
) -> tuple[Settings, TargetConfig]:
    """The settings of the experiment file, overridden by flags, and those of the target. Raises
    ValueError."""
    values = {} if file is None else _read_experiment(file, kind)
    flags = given(args, kind)
    if _LIMITS & set(flags):
        values = {name: value for name, value in values.items() if name not in _LIMITS}
    values |= flags | given(args, TargetConfig)
    target = {name: values.pop(name) for name in TargetConfig.__struct_fields__ if name in values}
    try:
        return msgspec.convert(values, kind), msgspec.convert(target, TargetConfig)
    except msgspec.ValidationError as error:
        reason = invalid_field(error, values | target, kind)
        raise ValueError(f"{'' if file is None else f'{file}: '}{reason}") from error


def lasting_settings(
    args: argparse.Namespace, settings: RunSettings, target: TargetConfig
) -> dict[str, Any]:
    """What must not change on resuming, as JSON types: settings, prompts and target."""
    values: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(settings))
    lasting = {name: value for name, value in values.items() if name not in settings.FREE}
    return lasting | {
        "prompts": DataFile.of(args.prompts).label,
        "exclude": [DataFile.of(path).label for path in args.exclude],
        "target": Path(target.target).name,
        "quantization": target.quantization,
        "dtype": target.dtype,
    }


def _read_experiment(file: Path, kind: type[CommandSettings]) -> dict[str, Any]:
    values = read_toml("experiment", file)
    known = (*kind.__struct_fields__, *TargetConfig.__struct_fields__)
    for name in values:
        if name not in known:
            raise unknown_setting(f"{file}: {name}", name, known)
    return values
