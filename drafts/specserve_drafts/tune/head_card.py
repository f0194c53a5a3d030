"""The files beside the weights of trained heads: provenance, model card, learning curve."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msgspec import Struct

from specserve_drafts.atomic_write import atomic_write, write_json
from specserve_drafts.tune.card import CURVE, PROVENANCE
from specserve_evals import provenance


class HeadPoint(Struct, frozen=True):
    """One check of the averaged weights on the held-out answers.

    `loss`, `accepted` and `coverage` are means over the training steps since the previous point;
    None or empty: no step yet.
    """

    num_steps: int
    num_tokens: int  # answer tokens trained on, repeats counted
    num_answered: int  # answer tokens generated
    seconds: int  # of answering and training
    loss: float | None
    accepted: tuple[float, ...]  # acceptance probability per chain step, at temperature 1
    coverage: float | None  # the target's probability mass on the draft vocabulary
    tau: float  # tokens per forward pass, chains, greedy held-out answers
    conditional: tuple[float, ...]  # there: conditional acceptance c_1, c_2, ... by chain step


class HeadMade(Struct, frozen=True):
    """How heads were made; the contents of provenance.json."""

    method: str
    provenance: provenance.Provenance
    settings: dict[str, Any]
    num_prompts: int
    num_excluded: int
    best: HeadPoint  # the point of the exported weights
    curve: tuple[HeadPoint, ...]

    @property
    def coverage(self) -> float:
        """The target's probability mass on the draft vocabulary, from the last point that has it: a
        resumed run may end without another step."""
        known = [point.coverage for point in self.curve if point.coverage is not None]
        return known[-1] if known else 0.0


@dataclass(frozen=True, slots=True)
class Description:
    """A method's part of the model card."""

    kind: str  # of heads, for the title
    about: str  # inputs and weights of the heads, in sentences
    layout: str  # a sentence on the layout of the checkpoint


def write_card(folder: Path, description: Description, made: HeadMade) -> None:
    """Write provenance.json, README.md and the learning curve to `folder`, atomically per file."""
    write_json(folder / PROVENANCE, made)
    with atomic_write(folder / "README.md") as part:
        part.write_text(model_card(description, made), encoding="utf-8")
    draw_curve(made.curve, folder / CURVE)


def model_card(description: Description, made: HeadMade) -> str:
    settings, best, last = made.settings, made.best, made.curve[-1]
    rates = ", ".join(f"{rate:.2f}" for rate in best.conditional)
    return "\n".join(
        [
            f"# A draft for {settings['target']}: {description.kind}",
            "",
            description.about,
            "",
            f"- trained on {last.num_tokens} tokens{_origin(made)}, temperatures "
            f"{settings['temperature']}",
            f"- excluded: {made.num_excluded} prompts that share 13 words in a row with "
            f"{', '.join(settings['exclude']) or 'nothing'}",
            f"- {best.tau:.2f} tokens per forward pass on held-out prompts, greedy, with chains of "
            f"{len(best.conditional)} drafted tokens; the conditional acceptance rates by position "
            f"are {rates} ({CURVE}: over the course of training)",
            f"- weights: the running average after step {best.num_steps} of {last.num_steps}",
            f"- made in {last.seconds / 60:.0f} minutes",
            "",
            f"{description.layout} It affects only the speed, never the output.",
            "",
            provenance.markdown(made.provenance),
            "",
        ]
    )


def _origin(made: HeadMade) -> str:
    num_answered = made.curve[-1].num_answered
    if made.settings.get("learn") == "texts":
        return (
            f" of {made.num_prompts} prompts and the target's own answers to them ({num_answered} "
            "tokens)"
        )
    return (
        f" ({num_answered} different ones), the target's own answers to {made.num_prompts} prompts"
    )


def draw_curve(curve: Sequence[HeadPoint], path: Path) -> None:
    """Plot the acceptance on held-out answers over the course of training. Needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 6), layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    tokens = [point.num_tokens for point in curve]
    above.plot(tokens, [point.tau for point in curve], marker=".")
    above.set_ylabel("tokens per forward pass, greedy")
    for step, rates in enumerate(zip(*(point.conditional for point in curve), strict=True)):
        below.plot(tokens, rates, marker=".", label=f"$c_{step + 1}$")
    below.set_ylabel("conditional acceptance rate")
    below.set_xlabel("tokens trained on")
    below.legend()
    for axes in (above, below):
        axes.grid(alpha=0.3)
    with atomic_write(path) as part:
        figure.savefig(part, dpi=120, format="png")
