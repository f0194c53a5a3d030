"""`--help` of every command and benchmark: its name, and a text and the default for every flag."""

import argparse
from collections.abc import Iterator
from importlib import import_module
from typing import Any, Final

import msgspec
import pytest

from specserve.cli.flags import default_text
from specserve.cli.parser import EVALS, SPECULATION_PREFIX, TUNES, build_parser
from specserve.config import SECTION_TYPES
from specserve.types import SamplingParams, SpeculationParams
from specserve_drafts.tune.eagle import EagleSettings
from specserve_drafts.tune.medusa import MedusaSettings
from specserve_drafts.tune.prompts import PromptSettings
from specserve_drafts.tune.recycle import RecycleSettings

BENCHMARKS: Final = ("demo", "kernels", "offline", "passes", "peers", "serving", "startup")
MODULES: Final = {
    **{f"specserve eval {name}": f"specserve_evals.{name}" for name in EVALS},
    **{f"specserve tune {name}": f"specserve_drafts.tune.{name}" for name in TUNES},
    **{f"python -m specserve_benchmarks.{n}": f"specserve_benchmarks.{n}" for n in BENCHMARKS},
}
STRUCTS: Final[dict[type[msgspec.Struct], str]] = {  # and the prefix of their flags
    **dict.fromkeys((SamplingParams, *SECTION_TYPES.values()), ""),
    **dict.fromkeys((EagleSettings, MedusaSettings, PromptSettings, RecycleSettings), ""),
    SpeculationParams: SPECULATION_PREFIX,
}


def walk(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for choice in action.choices.values():
                yield from walk(choice)


PARSERS: Final = {parser.prog: parser for parser in walk(build_parser())} | {
    name: import_module(module).build_parser() for name, module in MODULES.items()
}


@pytest.mark.parametrize("name", PARSERS)
def test_help_has_the_name_of_the_command_and_every_flag(name: str) -> None:
    parser = PARSERS[name]
    assert parser.prog == name
    assert parser.format_usage().startswith(f"usage: {name}")
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction | argparse._SubParsersAction):
            continue
        flag = (action.option_strings or [action.dest])[0]
        text = parser._get_formatter()._expand_help(action) if action.help else ""
        assert len(text) > 5, f"{flag} has no help"
        shown = "not given: " in text or any(default in text for default in defaults(action))
        assert shown, f"{flag}: {text}"


def defaults(action: argparse.Action) -> set[str]:
    """What the help may say about the default; an empty text if there is none."""
    if action.default is not argparse.SUPPRESS:
        return {default_text(plain(action)), f" (default: {action.default})"}
    return {
        default_text(info.default)
        for struct, prefix in STRUCTS.items()
        for info in msgspec.structs.fields(struct)
        if prefix + info.name == action.dest
    } or {""}


def plain(action: argparse.Action) -> Any:
    """The default as a value that `default_text` knows; None for switches that are off."""
    if action.default is None or isinstance(action, argparse._StoreTrueAction):
        return None
    if isinstance(action.default, list | tuple):
        return tuple(action.default)
    return action.default if isinstance(action.default, bool | int | float) else str(action.default)


def test_all_commands_are_walked() -> None:
    commands = {"generate", "serve", "chat", "pull", "convert", "doctor", "eval", "tune"}
    assert {f"specserve {name}" for name in commands} <= set(PARSERS)


@pytest.mark.parametrize("words", [["tune", "prompts"], ["eval", "two_keys"]])
def test_a_command_of_a_group_is_called_by_its_whole_name(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    from specserve.cli import main

    for more in (["--help"], ["--no-such-flag"]):
        with pytest.raises(SystemExit):
            main([*words, *more])
        captured = capsys.readouterr()
        assert (captured.out or captured.err).startswith(f"usage: specserve {' '.join(words)} ")
