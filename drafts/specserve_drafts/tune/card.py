"""The files beside the weights of a draft: provenance, model card, learning curve."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from msgspec import Struct

from specserve_drafts.atomic_write import atomic_write, write_json
from specserve_drafts.tune.gain import Gain
from specserve_evals import provenance

CURVE: Final = "curve.png"


class Made(Struct, frozen=True):
    """How a draft was made; a method's subclass is the contents of provenance.json."""

    method: str
    provenance: provenance.Provenance
    settings: dict[str, Any]
    num_prompts: int
    num_excluded: int
    gain: Gain


def write_card(
    folder: Path, made: Made, kind: str, about: str, facts: Sequence[str], note: str
) -> None:
    """Write provenance.json and README.md to `folder`, atomically per file.

    kind: of draft, for the title. about and note: sentences above and below the list of `facts`.
    """
    settings = made.settings
    excluded = (
        f"excluded: {made.num_excluded} prompts that share 13 words in a row with "
        f"{', '.join(settings['exclude']) or 'nothing'}"
    )
    lines = [
        f"# A draft for {settings['target']}: {kind}",
        "",
        about,
        "",
        *(f"- {fact}" for fact in (*facts, f"{made.gain}, greedy", excluded)),
        "",
        note,
        "",
        provenance.markdown(made.provenance),
        "",
    ]
    write_json(folder / "provenance.json", made)
    with atomic_write(folder / "README.md") as part:
        part.write_text("\n".join(lines), encoding="utf-8")


def check_curve() -> None:
    """Raises ValueError if matplotlib is missing; called before a run starts."""
    if find_spec("matplotlib") is None:
        raise ValueError(
            "out: its curve needs matplotlib, which is not installed; "
            "pip install 'specserve[evals]'"
        )


def draw_curve(
    folder: Path,
    x: tuple[str, Sequence[float]],
    panels: Mapping[str, Mapping[str, Sequence[float]]],
) -> None:
    """Draw the learning curve of a run so far, atomically.

    x: the label and the values of the x axis. panels: by the label of a y axis, lines by name; a
    line of the name "" is not in the legend.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 1 + 2.5 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    for each, (label, lines) in zip(axes, panels.items(), strict=True):
        for name, values in lines.items():
            each.plot(x[1], values, marker=".", label=name or None)
        each.set_ylabel(label)
        each.grid(alpha=0.3)
        if any(lines):
            each.legend()
    axes[-1].set_xlabel(x[0])
    with atomic_write(folder / CURVE) as part:
        figure.savefig(part, dpi=120, format="png")
