"""The files beside a recycling table: config, provenance, model card, learning curve."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from msgspec import Struct

from specserve_drafts.atomic_write import atomic_write, write_json
from specserve_drafts.compatibility import DraftConfig
from specserve_evals import provenance

CURVE: Final = "curve.png"
PROVENANCE: Final = "provenance.json"


class Point(Struct, frozen=True):
    """The progress of a run after a chunk of answers."""

    num_tokens: int  # answer tokens so far
    seconds: int
    num_contexts: int  # rows in use in the table
    tau: float  # tokens per forward pass of the chunk's greedy answers, measured while answering


class Made(Struct, frozen=True):
    """How a draft was made; the contents of provenance.json."""

    method: str
    provenance: provenance.Provenance
    settings: dict[str, Any]
    num_prompts: int
    num_excluded: int
    num_tokens: int
    seconds: int
    held_out_tau: float
    curve: tuple[Point, ...]


def write_draft(folder: Path, config: DraftConfig, made: Made) -> None:
    """Write config.json, provenance.json, README.md and the learning curve to `folder`."""
    write_json(folder / "config.json", config)
    write_json(folder / PROVENANCE, made)
    with atomic_write(folder / "README.md") as part:
        part.write_text(model_card(config, made), encoding="utf-8")
    draw_curve(made.curve, folder / CURVE)


def model_card(config: DraftConfig, made: Made) -> str:
    target = config.target
    return "\n".join(
        [
            f"# A draft for {made.settings['target']}: {config.specserve_method}",
            "",
            f"Made for a target of {target.num_layers} layers, hidden size {target.hidden_size} "
            f"and a vocabulary of {target.vocab_size} tokens.",
            "",
            f"- learned from {made.num_tokens} tokens: the target's own answers to "
            f"{made.num_prompts} prompts, temperatures {made.settings['temperature']}",
            f"- excluded: {made.num_excluded} prompts that share 13 words in a row with "
            f"{', '.join(made.settings['exclude']) or 'nothing'}",
            f"- {made.held_out_tau:.2f} tokens per forward pass on held-out prompts, greedy, with "
            f"at most {made.settings['max_nodes']} nodes ({CURVE}: over the course of the run)",
            f"- made in {made.seconds / 60:.0f} minutes",
            "",
            "It affects only the speed, never the output. It holds token ids and their "
            "probabilities, taken from the target's answers.",
            "",
            provenance.markdown(made.provenance),
            "",
        ]
    )


def check_curve() -> None:
    """Raises ValueError if matplotlib is missing; called before a run starts."""
    if find_spec("matplotlib") is None:
        raise ValueError(
            "out: its curve needs matplotlib, which is not installed; "
            "pip install 'specserve[evals]'"
        )


def draw_curve(curve: tuple[Point, ...], path: Path) -> None:
    """Plot the acceptance on new answers over the course of a run. Needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([point.num_tokens for point in curve], [point.tau for point in curve], marker=".")
    axes.set_xlabel("tokens learned from")
    axes.set_ylabel("tokens per forward pass, greedy answers")
    axes.grid(alpha=0.3)
    with atomic_write(path) as part:
        figure.savefig(part, dpi=150, format="png")
