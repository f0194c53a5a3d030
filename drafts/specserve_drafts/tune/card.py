"""What lies beside the weights of a draft: config, provenance, model card, learning curve."""

from pathlib import Path
from typing import Any, Final

import msgspec
from msgspec import Struct

from specserve_drafts.fit import DraftConfig
from specserve_evals import provenance

CURVE: Final = "curve.png"
PROVENANCE: Final = "provenance.json"


class Point(Struct, frozen=True):
    """A run after some of its answers."""

    num_tokens: int  # learned from so far
    seconds: int
    num_contexts: int  # in the table
    tau: float  # of the latest greedy answers, before they were learned


class Made(Struct, frozen=True):
    """How a draft was made."""

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
    """Everything but the weights."""
    for name, value in (("config.json", config), (PROVENANCE, made)):
        (folder / name).write_bytes(msgspec.json.format(msgspec.json.encode(value), indent=2))
    (folder / "README.md").write_text(model_card(config, made))
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
            f"- left out: {made.num_excluded} prompts that share 13 words in a row with "
            f"{', '.join(made.settings['exclude']) or 'nothing'}",
            f"- {made.held_out_tau:.2f} tokens per pass on prompts that were kept back, greedy, "
            f"at most {made.settings['max_nodes']} nodes ({CURVE}: while it learned)",
            f"- made in {made.seconds / 60:.0f} minutes",
            "",
            "It only guesses: whatever it proposes, the target decides. It holds token ids and how "
            "likely they were, and answers with what the target answered, the target's faults "
            "included.",
            "",
            provenance.markdown(made.provenance),
            "",
        ]
    )


def draw_curve(curve: tuple[Point, ...], path: Path) -> None:
    """Acceptance of new text while a draft learns. Needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([point.num_tokens for point in curve], [point.tau for point in curve], marker=".")
    axes.set_xlabel("tokens learned from")
    axes.set_ylabel("tokens per pass, greedy answers")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
