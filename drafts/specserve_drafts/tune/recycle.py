"""`specserve tune recycle`: fills a recycling table from the target's answers to training prompts.

The engine answers the prompts with the `recycle` drafter enabled. Every forward pass updates the
table, rejected nodes included, and the acceptance length of an answer is measured before the table
contains that answer.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Final

from msgspec import Struct

from specserve.config import TargetConfig
from specserve.types import SamplingParams, SpecStats
from specserve_drafts.atomic_write import write_json
from specserve_drafts.compatibility import DraftConfig
from specserve_drafts.recycle.drafter import RecycleDrafter
from specserve_drafts.recycle.topk_table import TABLE_FILE, TopKTable
from specserve_drafts.tune.card import CURVE, Made, check_curve, draw_curve, write_card
from specserve_drafts.tune.command import add_run_flags, new_parser, open_llm, run_command
from specserve_drafts.tune.prompt_file import training_prompts
from specserve_drafts.tune.run_state import STATE, RunState, claimed, open_state
from specserve_drafts.tune.settings import (
    RunSettings,
    add_settings,
    lasting_settings,
    read_settings,
)
from specserve_evals import provenance
from specserve_evals.progress import track

CHUNK: Final = 96  # prompts answered between two saves, which takes less than a minute


class RecycleSettings(RunSettings, frozen=True, forbid_unknown_fields=True):
    HELP: ClassVar[dict[str, str]] = RunSettings.HELP | {
        "contexts": "rows of the table, a power of two",
        "max_nodes": "tree nodes per sequence and forward pass, root included",
    }

    contexts: int = 2**19
    max_nodes: int = 8


class Point(Struct, frozen=True):
    """The progress of a run after a chunk of answers."""

    num_tokens: int  # answer tokens so far
    seconds: int
    num_contexts: int  # rows in use in the table
    tau: float  # tokens per forward pass of the chunk's greedy answers, measured while answering


class State(RunState, frozen=True):
    """The progress of a run; together with the table, all that is needed to resume."""

    num_prompts: int = 0  # submitted so far, repeats counted
    num_tokens: int = 0  # of the answers
    seconds: float = 0.0  # of answering
    curve: tuple[Point, ...] = ()


class TableMade(Made, frozen=True):
    num_tokens: int
    seconds: int
    held_out_tau: float
    curve: tuple[Point, ...]


class Run:
    """One run, new or resumed. Raises ValueError."""

    def __init__(
        self, args: argparse.Namespace, settings: RecycleSettings, target: TargetConfig
    ) -> None:
        self._out, self._settings = args.out, settings
        check_curve()
        prompts = training_prompts(args.prompts, args.exclude, settings.seed)
        self._prompts, self._held_out, self.num_excluded = prompts
        lasting = lasting_settings(args, settings, target)
        self.state = open_state(State, args.out, lasting, resume=args.resume)
        self.llm = open_llm(
            target,
            settings.batch,
            settings.max_nodes,
            draft="recycle",
            options={"recycle": {"contexts": settings.contexts, "pretrained": False}},
            cost_aware=False,
            max_nodes=settings.max_nodes,
        )
        drafter = self.llm.engine.drafter.drafters["recycle"]
        assert isinstance(drafter, RecycleDrafter)
        self.drafter = drafter
        if args.resume:
            drafter.table = TopKTable.load(args.out / TABLE_FILE, drafter.target.vocab_size)

    def learn(self) -> None:
        """Answer prompts until the limit of time or tokens; saves after every chunk."""
        limit = self._settings.tokens or self._settings.seconds
        with track(limit) as advance:
            advance(min(self._done, limit), "learning")
            while (before := self._done) < limit:
                self._answer_chunk()
                self.drafter.table.save(self._out / TABLE_FILE)
                write_json(self._out / STATE, self.state)
                tau = f"greedy answers: tau {self.state.curve[-1].tau:.2f}"
                advance(min(self._done, limit) - before, tau)

    def held_out_tau(self) -> float:
        """Tokens per forward pass of greedy answers to the held-out prompts."""
        greedy = SamplingParams(temperature=0.0, max_tokens=self._settings.max_tokens)
        answers = self.llm.generate(self._held_out, greedy)
        return _pooled_tau([answer.stats for answer in answers if answer.error is None])

    @property
    def num_prompts(self) -> int:
        """Different prompts answered so far."""
        return min(self.state.num_prompts, len(self._prompts))

    @property
    def _done(self) -> int:
        """Progress in the unit of the limit: tokens, else seconds."""
        return self.state.num_tokens if self._settings.tokens else round(self.state.seconds)

    def _answer_chunk(self) -> None:
        state = self.state
        numbers = range(state.num_prompts, state.num_prompts + CHUNK)
        sampling = [self._settings.sampling(number) for number in numbers]
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


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser(
        "recycle", "Fill a top-k table for `recycle` from the target's answers to prompts."
    )
    add_run_flags(parser)
    add_settings(parser, RecycleSettings)
    return parser


def main(argv: Sequence[str]) -> int:
    def run(args: argparse.Namespace) -> str:
        settings, target = read_settings(args, RecycleSettings)
        with claimed(args.out):
            run = Run(args, settings, target)
            run.learn()
            command = ["tune", "recycle", *argv]
            platform = run.llm.engine.platform
            made = TableMade(
                method="recycle",
                provenance=provenance.collect("specserve.cli", command, platform, args.prompts),
                settings=run.state.settings,
                num_prompts=run.num_prompts,
                num_excluded=run.num_excluded,
                num_tokens=run.state.num_tokens,
                seconds=round(run.state.seconds),
                held_out_tau=run.held_out_tau(),
                curve=run.state.curve,
            )
            write_draft(args.out, DraftConfig("recycle", run.drafter.target), made)
        return f"{args.out}: {made.held_out_tau:.2f} tokens per forward pass on held-out prompts"

    return run_command(build_parser(), argv, run)


def write_draft(folder: Path, config: DraftConfig, made: TableMade) -> None:
    """Write config.json, model card and learning curve to `folder`, beside the table."""
    target, settings = config.target, made.settings
    write_json(folder / "config.json", config)
    write_card(
        folder,
        made,
        kind=config.specserve_method,
        about=f"Made for a target of {target.num_layers} layers, hidden size {target.hidden_size} "
        f"and a vocabulary of {target.vocab_size} tokens.",
        facts=(
            f"learned from {made.num_tokens} tokens: the target's own answers to "
            f"{made.num_prompts} prompts, temperatures {settings['temperature']}",
            f"{made.held_out_tau:.2f} tokens per forward pass on held-out prompts, greedy, with at "
            f"most {settings['max_nodes']} nodes ({CURVE}: over the course of the run)",
            f"made in {made.seconds / 60:.0f} minutes",
        ),
        note="It affects only the speed, never the output. It holds token ids and their "
        "probabilities, taken from the target's answers.",
    )
    tau = [point.tau for point in made.curve]
    draw_curve(
        folder,
        ("tokens learned from", [point.num_tokens for point in made.curve]),
        {"tokens per forward pass, greedy answers": {"": tau}},
    )
