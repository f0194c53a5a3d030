"""Fill a recycling table from the target's answers to training prompts.

specserve tune recycle --prompts train.jsonl --exclude spec_bench.jsonl --out DIR --minutes 20

The engine answers the prompts with the `recycle` drafter enabled. Every forward pass updates the
table, rejected nodes included, and the acceptance length of an answer is measured before the table
contains that answer.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any, Final

import msgspec
from msgspec import Struct

from specserve.cli.flags import add_flags, given
from specserve.cli.parser import ENGINE_HELP, TARGET_HELP
from specserve.cli.progress import show_progress
from specserve.config import ScheduleConfig, TargetConfig
from specserve.llm import LLM
from specserve.types import SamplingParams, SpecStats
from specserve_drafts.atomic_write import write_json
from specserve_drafts.compatibility import DraftConfig
from specserve_drafts.recycle.drafter import RecycleDrafter
from specserve_drafts.recycle.topk_table import TABLE_FILE, TopKTable
from specserve_drafts.tune.card import Made, Point, check_curve, write_draft
from specserve_drafts.tune.claim import claimed
from specserve_drafts.tune.prompt_file import add_run_flags, data_settings, training_prompts
from specserve_evals import provenance
from specserve_evals.progress import track
from specserve_evals.runs import at_least_one

STATE: Final = "state.json"
CHUNK: Final = 96  # prompts answered between two saves, which takes less than a minute


class State(Struct, frozen=True):
    """The progress of a run; together with the table, all that is needed to resume."""

    settings: dict[str, Any]
    num_prompts: int = 0  # submitted so far, repeats counted
    num_tokens: int = 0  # of the answers
    seconds: float = 0.0  # of answering
    curve: tuple[Point, ...] = ()


class Run:
    """One run, new or resumed. Raises ValueError."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        check_curve()
        prompts = training_prompts(args.prompts, args.exclude, args.seed)
        self._prompts, self._held_out, self.num_excluded = prompts
        self.state = _resumed(args) if args.resume else _begun(args)
        self.llm = _open(args)
        drafter = self.llm.engine.drafter.drafters["recycle"]
        assert isinstance(drafter, RecycleDrafter)
        self.drafter = drafter
        if args.resume:
            drafter.table = TopKTable.load(args.out / TABLE_FILE, drafter.target.vocab_size)

    def learn(self) -> None:
        """Answer prompts until the limit of time or tokens; saves after every chunk."""
        limit = self._args.tokens or round(60 * self._args.minutes)
        with track(limit) as advance:
            advance(min(self._done, limit), "learning")
            while (before := self._done) < limit:
                self._answer_chunk()
                self.drafter.table.save(self._args.out / TABLE_FILE)
                write_json(self._args.out / STATE, self.state)
                tau = f"greedy answers: tau {self.state.curve[-1].tau:.2f}"
                advance(min(self._done, limit) - before, tau)

    def held_out_tau(self) -> float:
        """Tokens per forward pass of greedy answers to the held-out prompts."""
        greedy = SamplingParams(temperature=0.0, max_tokens=self._args.max_tokens)
        answers = self.llm.generate(self._held_out, greedy)
        return _pooled_tau([answer.stats for answer in answers if answer.error is None])

    @property
    def num_prompts(self) -> int:
        """Different prompts answered so far."""
        return min(self.state.num_prompts, len(self._prompts))

    @property
    def _done(self) -> int:
        return self.state.num_tokens if self._args.tokens else round(self.state.seconds)

    def _answer_chunk(self) -> None:
        args, state = self._args, self.state
        numbers = range(state.num_prompts, state.num_prompts + CHUNK)
        sampling = [
            SamplingParams(
                temperature=args.temperature[number % len(args.temperature)],
                max_tokens=args.max_tokens,
                seed=args.seed + number,
            )
            for number in numbers
        ]
        started = time.perf_counter()
        prompts = [self._prompts[number % len(self._prompts)] for number in numbers]
        answers = list(zip(self.llm.generate(prompts, sampling), sampling, strict=True))
        seconds = state.seconds + time.perf_counter() - started
        served = [(answer, params) for answer, params in answers if answer.error is None]
        if not served:
            raise ValueError(f"prompts: none of {CHUNK} was answered: {answers[0][0].error}")
        num_tokens = state.num_tokens + sum(len(answer.token_ids) for answer, _ in served)
        tau = _pooled_tau([answer.stats for answer, params in served if params.greedy])
        point = Point(num_tokens, round(seconds), self.drafter.table.num_filled, tau)
        curve = (*state.curve, point)
        self.state = State(state.settings, numbers.stop, num_tokens, seconds, curve)


def _pooled_tau(stats: Sequence[SpecStats]) -> float:
    """Emitted tokens per forward pass that verified a tree, pooled over requests; the target's own
    token is included."""
    return sum(s.num_emitted_tokens for s in stats) / max(sum(s.num_spec_steps for s in stats), 1)


def _begun(args: argparse.Namespace) -> State:
    if (args.out / STATE).exists():
        raise ValueError(f"out: {args.out} holds a run; add --resume, or give another directory")
    args.out.mkdir(parents=True, exist_ok=True)
    return State(_settings(args))


def _resumed(args: argparse.Namespace) -> State:
    path = args.out / STATE
    try:
        state = msgspec.json.decode(path.read_bytes(), type=State)
    except (OSError, msgspec.MsgspecError) as error:
        raise ValueError(f"resume: {path} cannot be read: {error}") from error
    for name, value in _settings(args).items():
        if (before := state.settings.get(name)) != value:
            raise ValueError(f"{name}: {value!r} goes on with a run that had {before!r}; leave it")
    return state


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that must not change on resuming, as JSON types."""
    names = ("temperature", "max_tokens", "max_nodes", "contexts", "seed")
    chosen = {name: getattr(args, name) for name in names}
    return chosen | data_settings(args, given(args, TargetConfig))


def _open(args: argparse.Namespace) -> LLM:
    with show_progress() as progress:
        return LLM(
            draft=("recycle",),
            options={"recycle": {"contexts": args.contexts, "pretrained": False}},
            cost_aware=False,
            max_nodes=args.max_nodes,
            max_num_seqs=args.batch,
            max_num_batched_tokens=max(
                args.batch * args.max_nodes, ScheduleConfig().max_num_batched_tokens
            ),
            prefix_caching=False,
            progress=progress,
            **given(args, TargetConfig),
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 0, or 2 for wrong usage."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    args = build_parser().parse_args(arguments)
    try:
        with claimed(args.out):
            run = Run(args)
            run.learn()
            made = Made(
                method="recycle",
                provenance=provenance.collect(
                    "specserve.cli",
                    ["tune", "recycle", *arguments],
                    run.llm.engine.platform,
                    args.prompts,
                ),
                settings=run.state.settings,
                num_prompts=run.num_prompts,
                num_excluded=run.num_excluded,
                num_tokens=run.state.num_tokens,
                seconds=round(run.state.seconds),
                held_out_tau=run.held_out_tau(),
                curve=run.state.curve,
            )
            write_draft(args.out, DraftConfig("recycle", run.drafter.target), made)
    except ValueError as error:
        print(f"tune recycle: error: {error}", file=sys.stderr)
        return 2
    print(f"{args.out}: {made.held_out_tau:.2f} tokens per forward pass on held-out prompts")
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="specserve tune recycle",
        description="Fill a top-k table for `recycle` from the target's answers to prompts.",
        allow_abbrev=False,
    )
    add_run_flags(parser)
    _add_amounts(parser)
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="seed of the order of prompts and of sampling (default: 0)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        nargs="+",
        default=[0.0, 0.7, 0.0, 1.0],
        metavar="T",
        help="sampling temperatures of the answers, used in turn (default: 0 0.7 0 1)",
    )
    add_flags(
        parser.add_argument_group("target"), TargetConfig, ENGINE_HELP | {"target": TARGET_HELP}
    )
    return parser


def _add_amounts(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say how much is learned, and in how large parts."""
    limit = parser.add_mutually_exclusive_group()
    limit.add_argument(
        "--minutes",
        type=at_least_one,
        default=20,
        metavar="N",
        help="minutes that the target answers prompts (default: 20)",
    )
    limit.add_argument(
        "--tokens",
        type=at_least_one,
        metavar="N",
        help="tokens of answers to learn from, instead of --minutes",
    )
    parser.add_argument(
        "--contexts",
        type=at_least_one,
        default=2**19,
        metavar="N",
        help="rows of the table, a power of two (default: %(default)s)",
    )
    parser.add_argument(
        "--max-nodes",
        type=at_least_one,
        default=8,
        metavar="N",
        help="tree nodes per sequence and forward pass, root included (default: %(default)s)",
    )
    parser.add_argument(
        "--batch",
        type=at_least_one,
        default=32,
        metavar="N",
        help="prompts that the target answers at once (default: %(default)s)",
    )
    parser.add_argument(
        "--max-tokens",
        type=at_least_one,
        default=256,
        metavar="N",
        help="most tokens of an answer (default: %(default)s)",
    )


if __name__ == "__main__":
    sys.exit(main())
