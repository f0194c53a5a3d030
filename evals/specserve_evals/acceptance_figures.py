"""The measurements of an acceptance run, and the figures that are computed from them.

tau is emitted tokens / target forward passes that verified a tree, the target's own token included;
plain decoding has tau = 1. All ratios are pooled: sums over all prompts are divided, so that long
answers weigh more than short ones. Forward passes that only prefill a prompt do not count in tau.
"""

from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import Any, Final

from msgspec import Struct
from msgspec.structs import astuple

from specserve.types import SpecStats
from specserve_evals.provenance import Provenance

OVERALL: Final = "(all)"


class Run(Struct, frozen=True):
    """Counts and times of one answer, or their sums over several answers.

    The `decode_...` fields count from the first text delta of an answer on.
    """

    num_tokens: int
    seconds: float  # from submission to the last token
    decode_passes: int  # forward passes of the target
    decode_tokens: int
    decode_seconds: float
    draft_seconds: float  # of the decode seconds
    verify_seconds: float  # of the decode seconds: the target's forward passes and the sampling

    @property
    def host_seconds(self) -> float:
        """The remaining decode seconds: planning, committing, text."""
        return self.decode_seconds - self.draft_seconds - self.verify_seconds


class Outcome(Struct, frozen=True):
    """One prompt, answered with a draft and without."""

    prompt: str
    category: str
    stats: SpecStats
    accepted_by_drafter: tuple[int, ...]
    drafted: Run
    plain: Run
    same_ids: bool


class Figures(Struct, frozen=True):
    """The figures of several prompts, pooled. A figure is None if there was nothing to measure.

    `reached[d]` is the fraction of drafted trees of which at least d + 1 tokens were accepted,
    `followed[d]` the same fraction of the trees of which at least d tokens were accepted. Trees
    without a node at depth d + 1 count in both denominators.
    """

    num_prompts: int
    num_same_ids: int  # answers with the token ids of plain decoding
    stats: SpecStats  # sums
    tau: float
    accepted: float | None  # accepted tokens / drafted nodes that were verified
    reached: tuple[float, ...]
    followed: tuple[float, ...]
    accepted_by_drafter: tuple[int, ...]
    draft_ms: float | None  # per forward pass, see `Run.decode_passes`; so are the next two
    verify_ms: float | None
    host_ms: float | None
    tokens_per_s: float
    speedup: float  # tokens/s, relative to plain decoding
    decode_tokens_per_s: float | None
    decode_speedup: float | None  # decode tokens/s, relative to plain decoding


class CellResult(Struct, frozen=True):
    """One draft at one temperature and budget."""

    draft: str
    temperature: float
    budget: int  # nodes per tree, root included
    drafters: tuple[str, ...]  # merged into one tree
    figures: dict[str, Figures]  # by category; OVERALL: all prompts
    outcomes: tuple[Outcome, ...]
    revision: str | None = None  # of the source that measured it

    @property
    def key(self) -> tuple[str, float, int]:
        return self.draft, self.temperature, self.budget


class Report(Struct, frozen=True):
    """A whole run. `settings` are the arguments that the figures depend on."""

    provenance: Provenance
    settings: dict[str, Any]
    prompts: tuple[str, ...]
    passed_over: tuple[str, ...]
    cells: tuple[CellResult, ...] = ()


def by_category(outcomes: Sequence[Outcome]) -> dict[str, Figures]:
    """The figures of each category, and of all outcomes under `OVERALL`."""
    categories = dict.fromkeys(outcome.category for outcome in outcomes)
    groups = {name: [o for o in outcomes if o.category == name] for name in categories}
    return {name: pool(group) for name, group in (groups | {OVERALL: list(outcomes)}).items()}


def pool(outcomes: Sequence[Outcome]) -> Figures:
    """Sum over the outcomes, then compute the ratios of the sums."""
    stats = add_stats([outcome.stats for outcome in outcomes])
    run = add_runs([outcome.drafted for outcome in outcomes])
    plain = add_runs([outcome.plain for outcome in outcomes])
    trees = stats.drafted_by_depth[0] if stats.drafted_by_depth else 0
    at_least = (trees, *stats.accepted_by_depth)
    return Figures(
        num_prompts=len(outcomes),
        num_same_ids=sum(outcome.same_ids for outcome in outcomes),
        stats=stats,
        tau=stats.mean_acceptance_length,
        accepted=_ratio(stats.num_accepted_draft_tokens, stats.num_draft_tokens),
        reached=tuple(count / trees for count in at_least[1:]),
        followed=tuple(count / at_least[d] for d, count in enumerate(at_least[1:])),
        accepted_by_drafter=_add(outcome.accepted_by_drafter for outcome in outcomes),
        draft_ms=_ratio(1000 * run.draft_seconds, run.decode_passes),
        verify_ms=_ratio(1000 * run.verify_seconds, run.decode_passes),
        host_ms=_ratio(1000 * run.host_seconds, run.decode_passes),
        tokens_per_s=run.num_tokens / run.seconds,
        speedup=(run.num_tokens / run.seconds) / (plain.num_tokens / plain.seconds),
        decode_tokens_per_s=_ratio(run.decode_tokens, run.decode_seconds),
        decode_speedup=_ratio(
            run.decode_tokens * plain.decode_seconds, run.decode_seconds * plain.decode_tokens
        ),
    )


def add_stats(stats: Sequence[SpecStats]) -> SpecStats:
    return SpecStats(
        num_spec_steps=sum(each.num_spec_steps for each in stats),
        num_draft_tokens=sum(each.num_draft_tokens for each in stats),
        num_accepted_draft_tokens=sum(each.num_accepted_draft_tokens for each in stats),
        num_emitted_tokens=sum(each.num_emitted_tokens for each in stats),
        acceptance_histogram=_add(each.acceptance_histogram for each in stats),
        drafted_by_depth=_add(each.drafted_by_depth for each in stats),
        accepted_by_depth=_add(each.accepted_by_depth for each in stats),
    )


def add_runs(runs: Sequence[Run]) -> Run:
    return Run(*map(sum, zip(*map(astuple, runs), strict=True)))


def _add(tuples: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    """Element-wise sum; shorter tuples are padded with zeros."""
    return tuple(map(sum, zip_longest(*tuples, fillvalue=0)))


def _ratio(value: float, divisor: float) -> float | None:
    return value / divisor if divisor else None
