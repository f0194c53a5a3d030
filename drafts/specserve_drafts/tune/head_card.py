"""How trained heads were made: provenance, model card, learning curve."""

from collections.abc import Sequence
from pathlib import Path

from msgspec import Struct

from specserve_drafts.tune.card import CURVE, Made, draw_curve, write_card


class HeadPoint(Struct, frozen=True):
    """One check of the averaged weights on the held-out answers.

    `loss`, `accepted` and `coverage` are means over the training steps since the previous point;
    None or empty: no step yet.
    """

    num_steps: int
    num_tokens: int  # answer tokens trained on, repeats counted
    num_answered: int  # answer tokens generated
    seconds: int  # since the run began
    loss: float | None
    accepted: tuple[float, ...]  # acceptance probability per chain step, at temperature 1
    coverage: float | None  # the target's probability mass on the draft vocabulary
    tau: float  # tokens per forward pass, chains, greedy held-out answers
    conditional: tuple[float, ...]  # there: conditional acceptance c_1, c_2, ... by chain step


class HeadMade(Made, frozen=True):
    best: HeadPoint  # the point of the exported weights
    curve: tuple[HeadPoint, ...]

    @property
    def coverage(self) -> float:
        """The target's probability mass on the draft vocabulary, from the last point that has it: a
        resumed run may end without another step."""
        known = [point.coverage for point in self.curve if point.coverage is not None]
        return known[-1] if known else 0.0


def write_head_card(folder: Path, made: HeadMade, kind: str, about: str, layout: str) -> None:
    """Write provenance.json and README.md to `folder`.

    kind: of heads, for the title. about: their inputs and weights, in sentences. layout: a sentence
    on the layout of the checkpoint.
    """
    settings, best, last = made.settings, made.best, made.curve[-1]
    rates = ", ".join(f"{rate:.2f}" for rate in best.conditional)
    if settings["learn"] == "texts":
        origin = (
            f" of {made.num_prompts} prompts and the target's own answers to them "
            f"({last.num_answered} tokens)"
        )
    else:
        origin = (
            f" ({last.num_answered} different ones), the target's own answers to "
            f"{made.num_prompts} prompts"
        )
    facts = (
        f"trained on {last.num_tokens} tokens{origin}, temperatures {settings['temperature']}",
        f"{best.tau:.2f} tokens per forward pass on held-out prompts, greedy, with chains of "
        f"{len(best.conditional)} drafted tokens; the conditional acceptance rates by position "
        f"are {rates} ({CURVE}: over the course of training)",
        f"weights: the running average after step {best.num_steps} of {last.num_steps}",
        f"made in {last.seconds / 60:.0f} minutes",
    )
    note = f"{layout} It affects only the speed, never the output."
    write_card(folder, made, kind, about, facts, note)


def draw_head_curve(folder: Path, curve: Sequence[HeadPoint]) -> None:
    """Draw the acceptance on held-out answers over the course of training."""
    rates = zip(*(point.conditional for point in curve), strict=True)
    draw_curve(
        folder,
        ("tokens trained on", [point.num_tokens for point in curve]),
        {
            "tokens per forward pass, greedy": {"": [point.tau for point in curve]},
            "conditional acceptance rate": {f"$c_{n}$": row for n, row in enumerate(rates, 1)},
        },
    )
