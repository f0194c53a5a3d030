"""Prompts that a target makes up itself, to train its drafts on where no others are at hand.

specserve tune prompts --target smollm2-135m --count 10000 --out prompts.jsonl

An instruct model that is given its chat template up to where the user speaks goes on with what
users ask (Magpie, Xu et al. 2024, arXiv 2406.08464).
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final, TextIO

import msgspec

from specserve.cli.flags import add_flags, given
from specserve.cli.parser import ENGINE_HELP, TARGET_HELP
from specserve.cli.progress import show_progress
from specserve.config import TargetConfig
from specserve.llm import LLM
from specserve.types import SamplingParams
from specserve_evals.progress import Advance, track
from specserve_evals.runs import at_least_one

_AT_ONCE: Final = 8  # times `batch`: the last of them run alone
_SHORTEST: Final = 3  # words


def template_around_user(llm: LLM) -> tuple[tuple[int, ...], int]:
    """The tokens before what a user says, and the first one after it. Raises ValueError."""
    one, other = (llm.encode([{"role": "user", "content": text}]) for text in ("a", "7"))
    start = _num_common(one, other)
    end = _num_common(one[::-1], other[::-1])
    if not start or not end or one == other:
        raise ValueError("target: its chat template has nothing around what a user says")
    return one[:start], one[-end]


def _num_common(one: Sequence[int], other: Sequence[int]) -> int:
    """How far two begin alike."""
    same = [a == b for a, b in zip(one, other, strict=False)]
    return same.index(False) if False in same else len(same)


def own_prompts(llm: LLM, numbers: range, sampling: SamplingParams) -> list[str]:
    """What came of attempt n, made with seed + n; those that do not end, or say nothing, fall out.
    `sampling` has a seed. Raises ValueError if the target does not take it."""
    prefix, end = template_around_user(llm)
    assert sampling.seed is not None
    params = [
        msgspec.structs.replace(sampling, seed=sampling.seed + n, stop_token_ids=(end,))
        for n in numbers
    ]
    generations = llm.generate([prefix] * len(numbers), params)
    if error := generations[0].error:
        raise ValueError(error)
    made = [each.text.strip() for each in generations if each.finish_reason == "stop"]
    return [text for text in made if len(text.split()) >= _SHORTEST]


def main(argv: Sequence[str] | None = None) -> int:
    """0: made; 2: wrong usage."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    args = build_parser().parse_args(arguments)
    try:
        run(args)
    except ValueError as error:
        print(f"tune prompts: error: {error}", file=sys.stderr)
        return 2
    return 0


def run(args: argparse.Namespace) -> None:
    """Raises ValueError."""
    try:
        file = args.out.open("x", encoding="utf-8")
    except OSError as error:
        raise ValueError(f"out: {args.out} cannot be made: {error.strerror}") from error
    with file:
        try:
            _make(args, file)
        finally:
            if not file.tell():
                args.out.unlink()  # so that the same command can be given again
    print(f"{args.out}: {args.count} prompts")


def _make(args: argparse.Namespace, file: TextIO) -> None:
    with show_progress() as progress:
        llm = LLM(
            draft="none",
            max_num_seqs=args.batch,
            prefix_caching=False,
            progress=progress,
            **given(args, TargetConfig),
        )
    with track(args.count) as advance:
        _write(llm, args, file, advance)


def _write(llm: LLM, args: argparse.Namespace, file: TextIO, advance: Advance) -> None:
    """Different ones, as they come."""
    sampling = SamplingParams(
        temperature=args.temperature, max_tokens=args.max_tokens, seed=args.seed
    )
    known: set[str] = set()
    first, step = 0, _AT_ONCE * args.batch
    while len(known) < args.count:
        made = own_prompts(llm, range(first, first + step), sampling)
        new = [text for text in dict.fromkeys(made) if text not in known]
        if not new:
            raise ValueError(
                f"temperature: {step} attempts at {args.temperature} made nothing new; raise it"
            )
        new = new[: args.count - len(known)]
        known.update(new)
        file.writelines(msgspec.json.encode({"prompt": t}).decode() + "\n" for t in new)
        first += step
        file.flush()
        advance(len(new), f"{first} attempts")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="specserve tune prompts",
        description="Let a target make up prompts, to train its drafts on.",
        allow_abbrev=False,
    )
    parser.add_argument("--target", default=TargetConfig().target, help=TARGET_HELP)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.jsonl")
    parser.add_argument("--count", type=at_least_one, required=True, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.9, metavar="T")
    parser.add_argument("--max-tokens", type=at_least_one, default=192, metavar="N")
    parser.add_argument("--batch", type=at_least_one, default=32, metavar="N", help="at once")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    add_flags(
        parser.add_argument_group("target"), TargetConfig, ENGINE_HELP, skip=frozenset({"target"})
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
