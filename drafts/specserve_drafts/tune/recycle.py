"""`specserve tune recycle`: fills a recycling table from the target's answers to training prompts.

The engine answers the prompts with the `recycle` drafter enabled. Every forward pass updates the
table, rejected nodes included, and the acceptance length of an answer is measured before the table
contains that answer.
"""

import argparse
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import count
from pathlib import Path
from typing import ClassVar, Final

import msgspec
from msgspec import Struct

from specserve.cli.prompts import Messages
from specserve.config import TargetConfig
from specserve.types import SamplingParams, SpecStats
from specserve_drafts.atomic_write import write_json
from specserve_drafts.compatibility import DraftConfig, Target
from specserve_drafts.recycle.drafter import RecycleDrafter
from specserve_drafts.recycle.topk_table import TABLE_FILE, TopKTable
from specserve_drafts.tune.answering import Answer, answer_all
from specserve_drafts.tune.card import CURVE, Made, check_curve, draw_curve, write_card
from specserve_drafts.tune.clock import SAVE_EVERY_S, Clock, Progress
from specserve_drafts.tune.command import (
    add_run_flags,
    fetch,
    new_parser,
    open_llm,
    run_command,
    served,
)
from specserve_drafts.tune.gain import measure_gain
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

CHUNK: Final = 96  # answers between two saves at most


class RecycleSettings(RunSettings, frozen=True, forbid_unknown_fields=True):
    HELP: ClassVar[dict[str, str]] = RunSettings.HELP | {
        "contexts": "rows of the table, a power of two",
        "max_nodes": "tree nodes per sequence and forward pass, root included",
    }

    contexts: int = 2**19
    max_nodes: int = 8


class Point(Struct, frozen=True):
    """The progress of a run at a save."""

    num_tokens: int  # answer tokens so far, those of unfinished answers included
    seconds: int
    num_contexts: int  # rows in use in the table
    tau: float  # tokens per forward pass of greedy answers since the last point, while answering


class State(RunState, frozen=True):
    """The progress of a run; together with the table, all that is needed to resume."""

    num_prompts: int = 0  # answered so far, repeats counted
    num_tokens: int = 0  # of the answers, unfinished ones included
    seconds: float = 0.0
    curve: tuple[Point, ...] = ()


class TableMade(Made, frozen=True):
    num_tokens: int
    seconds: int
    curve: tuple[Point, ...]


class Run:
    """One run, new or resumed. Raises ValueError."""

    def __init__(
        self,
        args: argparse.Namespace,
        settings: RecycleSettings,
        target: TargetConfig,
        clock: Clock,
        progress: Progress,
    ) -> None:
        self._out, self._settings = args.out, settings
        self._clock, self._progress = clock, progress
        check_curve()
        prompts = training_prompts(args.prompts, args.exclude, settings.seed)
        self._prompts, self.held_out, self.num_excluded = prompts
        lasting = lasting_settings(args, settings, target)
        self.state = open_state(State, args.out, lasting, resume=args.resume)
        clock.resume(self.state.seconds)
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
        self._emitted = self.state.num_tokens
        self._greedy: list[SpecStats] = []  # of the answers since the last point
        self._refused = 0  # prompts that were not answered
        self._saved_at, self._unsaved = time.monotonic(), 0  # answers since then

    def learn(self) -> None:
        """Answer prompts until the limit of time or tokens; saves meanwhile and at the end."""
        limit = self._settings.tokens or math.inf
        answers = answer_all(self.llm, self._jobs(), self._tick, self._clock.end_of_learning)
        with closing(answers):
            for answer in answers:
                if answer.finish_reason == "abort":  # out of time
                    break
                self._record(answer)
                if self._unsaved == CHUNK:
                    self._save()
                if self._emitted >= limit:
                    break
        self._save()

    def show(self, label: str) -> None:
        self._progress(self._emitted, label)

    @property
    def num_prompts(self) -> int:
        """Different prompts answered so far."""
        return min(self.state.num_prompts, len(self._prompts))

    def _jobs(self) -> Iterator[tuple[Messages, SamplingParams]]:
        for number in count(self.state.num_prompts):
            yield self._prompts[number % len(self._prompts)], self._settings.sampling(number)

    def _tick(self, num_tokens: int) -> None:
        self._emitted += num_tokens
        known = f", greedy answers: tau {self.state.curve[-1].tau:.2f}" if self.state.curve else ""
        self.show(f"{self._emitted} tokens{known}")
        if time.monotonic() - self._saved_at >= SAVE_EVERY_S:
            self._save()

    def _record(self, answer: Answer) -> None:
        number = self.state.num_prompts
        self._refused += answer.error is not None
        if self._refused == CHUNK and not self._emitted:
            raise ValueError(f"prompts: none of {CHUNK} was answered: {answer.error}")
        if self._settings.sampling(number).greedy and answer.error is None:
            self._greedy.append(answer.stats)
        self._unsaved += 1
        self.state = msgspec.structs.replace(self.state, num_prompts=number + 1)

    def _save(self) -> None:
        """Save table, state and curve, with a point for the answers since the last one."""
        seconds, num_contexts = self._clock.seconds, self.drafter.table.num_filled
        curve = self.state.curve
        if self._greedy:
            tau = _pooled_tau(self._greedy)
            point = Point(self._emitted, round(seconds), num_contexts, tau)
            curve, self._greedy = (*curve, point), []
        self.state = msgspec.structs.replace(
            self.state, num_tokens=self._emitted, seconds=seconds, curve=curve
        )
        self.drafter.table.save(self._out / TABLE_FILE)
        write_json(self._out / "config.json", DraftConfig("recycle", self.drafter.target))
        write_json(self._out / STATE, self.state)
        draw_curve(
            self._out,
            ("tokens learned from", [point.num_tokens for point in curve]),
            {"tokens per forward pass, greedy answers": {"": [point.tau for point in curve]}},
        )
        self._saved_at, self._unsaved = time.monotonic(), 0


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


def main(argv: Sequence[str], started: float | None = None) -> int:
    """started: when the command began, in `time.monotonic()` seconds; None: now."""

    def run(args: argparse.Namespace) -> str:
        settings, target = read_settings(args, RecycleSettings)
        fetch(target)
        clock = Clock(settings, started)
        with (
            claimed(args.out),
            track(settings.limit) as advance,
            Progress(settings, clock, advance) as progress,
        ):
            run = Run(args, settings, target, clock, progress)
            run.learn()
            command, platform = ["tune", "recycle", *argv], run.llm.engine.platform
            origin = provenance.collect("specserve.cli", command, platform, args.prompts)
            run.llm.close()  # its memory
            gain = measure_gain(
                target, args.out, run.held_out, clock.end, lambda: run.show("measuring")
            )
            made = TableMade(
                method="recycle",
                provenance=origin,
                settings=run.state.settings,
                num_prompts=run.num_prompts,
                num_excluded=run.num_excluded,
                gain=gain,
                num_tokens=run.state.num_tokens,
                seconds=round(clock.seconds),
                curve=run.state.curve,
            )
            write_table_card(args.out, run.drafter.target, made)
        return served(args.out, target, gain)

    return run_command(build_parser(), argv, run)


def write_table_card(folder: Path, target: Target, made: TableMade) -> None:
    settings = made.settings
    write_card(
        folder,
        made,
        kind="recycle",
        about=f"Made for a target of {target.num_layers} layers, hidden size {target.hidden_size} "
        f"and a vocabulary of {target.vocab_size} tokens.",
        facts=(
            f"learned from {made.num_tokens} tokens: the target's own answers to "
            f"{made.num_prompts} prompts, temperatures {settings['temperature']}, with at most "
            f"{settings['max_nodes']} nodes ({CURVE}: over the course of the run)",
            f"made in {made.seconds / 60:.0f} minutes",
        ),
        note="It affects only the speed, never the output. It holds token ids and their "
        "probabilities, taken from the target's answers.",
    )
