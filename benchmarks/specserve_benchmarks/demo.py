"""`make demo`: SmolLM2 answers the same prompts with and without speculation, for comparison.

python -m specserve_benchmarks.demo
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Final

from rich.console import Console
from rich.table import Table

from specserve.cli.progress import show_progress
from specserve.completion import Generation
from specserve.llm import LLM
from specserve.types import SamplingParams

TARGET: Final = "smollm2-135m"
PROMPTS: Final = {
    "explain": "Explain in a few sentences why the sky is blue.",
    "repeat": "Repeat this text word for word: The quick brown fox jumps over the lazy dog. "
    "Pack my box with five dozen liquor jugs. How vexingly quick daft zebras jump!",
    "edit": "Rename the variable `total` to `result` and give back the whole function:\n"
    "def mean(values):\n    total = 0\n    for value in values:\n        total += value\n"
    "    return total / len(values)\n",
}
SAMPLING: Final = SamplingParams(temperature=0.0, max_tokens=80)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the texts and a table. Exit code 1 if any token differs, else 0."""
    build_parser().parse_args(argv)
    console = Console(highlight=False)
    table = Table(
        "prompt", "draft", "tokens", "forward passes", "tokens per pass", "tokens/s", "TTFT", "TPOT"
    )
    plain_llm, draft_llm = load("none"), load("auto")
    identical = True
    for name, prompt in PROMPTS.items():
        # In turn, so that a change of the machine's load affects both.
        plain, drafted = generate(plain_llm, prompt), generate(draft_llm, prompt)
        identical &= plain.token_ids == drafted.token_ids
        table.add_row(name, "none", *cells(plain))
        table.add_row("", "auto", *cells(drafted))
        console.print(f"{name}: ", style="bold", end="")
        console.print(drafted.text.strip(), markup=False)
    console.print(table)
    result = "identical" if identical else "NOT identical: this is a bug"
    console.print(f"token ids with and without speculation: {result}")
    return 0 if identical else 1


def build_parser() -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog="python -m specserve_benchmarks.demo",
        description="SmolLM2 with and without speculation.",
    )


def load(draft: str) -> LLM:
    """SmolLM2 with one drafter, warmed up."""
    with show_progress() as report:
        llm = LLM(TARGET, draft=draft, kv_memory="128MiB", progress=report)
    llm.generate("Warm up.", SamplingParams(temperature=0.0, max_tokens=4))
    return llm


def generate(llm: LLM, prompt: str) -> Generation:
    return llm.generate([{"role": "user", "content": prompt}], SAMPLING)[0]


def cells(generation: Generation) -> list[str]:
    """Table cells: tokens, forward passes, tokens per forward pass, tokens/s, TTFT, TPOT."""
    completion = generation.completions[0]
    stats, timing = completion.stats, completion.timing
    num_tokens = len(completion.token_ids)
    return [
        str(num_tokens),
        str(stats.num_spec_steps),
        f"{stats.mean_acceptance_length:.2f}",
        f"{num_tokens / timing.total_s:.1f}",
        _milliseconds(timing.ttft_s),
        _milliseconds(timing.tpot_s),
    ]


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:.0f} ms"


if __name__ == "__main__":
    sys.exit(main())
