"""Shared by the programs that compare drafts: flags, variants, engines, generation in batches."""

import argparse
import time
from collections.abc import Sequence
from typing import Any, Final

from msgspec import Struct

from specserve.cli.flags import add_flags, given
from specserve.cli.parser import OPTIONAL_TARGET_HELP
from specserve.cli.progress import Report
from specserve.completion import Completion
from specserve.config import DraftConfig, ScheduleConfig, TargetConfig, load_config
from specserve.field_help import ENGINE_HELP
from specserve.hub import resolve
from specserve.llm import LLM
from specserve.speculation import registry
from specserve.types import SamplingParams
from specserve_evals.progress import Advance
from specserve_evals.prompts import Prompt


class Variant(Struct, frozen=True):
    """One choice of drafters to compare; the trees of several drafters are merged into one."""

    name: str
    draft: tuple[str, ...]
    options: dict[str, dict[str, Any]] = {}


PLAIN: Final = Variant("none", ("none",))
SELF: Final = "self"


def parse_variants(texts: Sequence[str]) -> list[Variant]:
    """What each --draft names, or else the default of `serve`.

    `none` is left out, because it is run beside every draft. Raises ValueError for an invalid one,
    and if two have the same name.
    """
    drafts = [load_config({"draft": text}).draft.draft for text in texts or DraftConfig().draft]
    variants = [Variant(",".join(registry.public_names(each)), each) for each in drafts]
    names = [variant.name for variant in variants]
    if len(set(names)) < len(names):
        raise ValueError(f"draft: {names} has a name twice; leave one out, or rename its directory")
    return [variant for variant in variants if variant != PLAIN]


def self_draft(target: str) -> Variant:
    """The target as its own draft model, proposing trees of a single path."""
    return Variant(SELF, (target,), {"draft_lm": {"branching": 1, "beam": 1}})


def add_run_flags(
    parser: argparse.ArgumentParser, *, max_tokens: int, skip: frozenset[str] = frozenset()
) -> None:
    """Add the flags of a comparing program: target, drafts, batch sizes, limits, engine settings.

    `skip` names settings that get no flag here, because the program sets them itself or has its own
    flag for them.
    """
    parser.add_argument("--target", default=TargetConfig().target, help=OPTIONAL_TARGET_HELP)
    parser.add_argument(
        "--draft",
        action="append",
        default=[],
        metavar="NAME[,NAME]",
        help="drafters, as of `specserve serve`; repeatable, each is measured by itself "
        f"(default: {','.join(DraftConfig().draft)})",
    )
    if "batch" not in skip:
        parser.add_argument(
            "--batch",
            nargs="+",
            type=at_least_one,
            default=[1, 4, 12],
            metavar="N",
            help="prompts generated at once; every number is measured (default: 1 4 12)",
        )
    parser.add_argument(
        "--max-tokens",
        type=at_least_one,
        default=max_tokens,
        metavar="N",
        help="most tokens of an answer (default: %(default)s)",
    )
    parser.add_argument(
        "--max-prompt",
        type=at_least_one,
        default=1024,
        metavar="N",
        help="skip prompts that have more tokens than this with their answer "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="seed of the first prompt; every further prompt has the next one (default: 0)",
    )
    engine = parser.add_argument_group("engine")
    skip |= {"target", "max_model_len", "draft"}
    for section in (TargetConfig, DraftConfig):
        add_flags(engine, section, ENGINE_HELP, skip=skip)


def check_options(args: argparse.Namespace, variants: Sequence[Variant]) -> None:
    """Raise DraftError for options of a drafter that no variant runs."""
    running = {name for variant in variants for name in _drafter_names(args.target, variant)}
    registry.check_options(given(args, DraftConfig).get("options", {}), running)


def _drafter_names(target: str, variant: Variant) -> set[str]:
    specs = registry.expanded(variant.draft, resolve(target))
    return {registry.find_drafter(spec, resolve)[0] for spec in specs}


def open_llm(args: argparse.Namespace, variant: Variant, report: Report, **settings: Any) -> LLM:
    """An engine for `variant`, with room for the largest batch of `args`.

    Drafter options in `args` count only for the drafters that `variant` runs. `settings` take
    precedence over the flags. Raises ValueError, whose message says how to fix it.
    """
    largest = max(args.batch)
    chosen = given(args, TargetConfig) | given(args, DraftConfig) | settings
    running = _drafter_names(args.target, variant)
    options = {name: own for name, own in chosen.get("options", {}).items() if name in running}
    chosen |= {
        "target": args.target,
        "draft": variant.draft,
        "options": options | variant.options,
        "max_model_len": args.max_prompt,
        "max_num_seqs": largest,
        "max_num_batched_tokens": max(largest, ScheduleConfig().max_num_batched_tokens),
    }
    return LLM(progress=report, **chosen)


def fits(llm: LLM, prompt: Prompt, max_tokens: int) -> bool:
    """Whether the prompt and an answer of `max_tokens` tokens fit into the engine's context."""
    return len(llm.encode(prompt.messages)) + max_tokens <= llm.engine.limits.max_model_len


def generate_in_batches(
    llm: LLM,
    prompts: Sequence[Prompt],
    sampling: Sequence[SamplingParams],
    batch: int,
    advance: Advance,
    label: str,
) -> tuple[list[Completion], float]:
    """Generate one completion per prompt, `batch` prompts at a time.

    Returns the completions and the wall seconds that generation took. Raises ValueError, naming the
    prompt, if one fails.
    """
    completions: list[Completion] = []
    seconds = 0.0
    for start in range(0, len(prompts), batch):
        group = prompts[start : start + batch]
        params = list(sampling[start : start + batch])
        started = time.perf_counter()
        generations = llm.generate([prompt.messages for prompt in group], params)
        seconds += time.perf_counter() - started
        for prompt, generation in zip(group, generations, strict=True):
            if generation.error is not None:
                raise ValueError(f"prompt {prompt.id}: {generation.error}")
            completions.append(generation.completions[0])
        advance(len(group), label)
    return completions, seconds


def at_least_one(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is out of range; expected 1 or more")
    return number
