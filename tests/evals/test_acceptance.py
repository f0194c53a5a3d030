"""The acceptance eval: its figures, computed by hand, and whole runs on a tiny model."""

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace
from tiny_chat import write_chat_prompts, write_tiny_chat

from specserve import cli
from specserve.config import DraftConfig
from specserve.sequence import SequenceView
from specserve.tree import DraftTree
from specserve.types import SpecStats
from specserve_drafts.ngram import NgramDrafter
from specserve_evals import acceptance, acceptance_plots
from specserve_evals.acceptance_figures import OVERALL, Outcome, Report, Run, by_category, pool
from specserve_evals.runs import parse_variants

PNG = b"\x89PNG\r\n\x1a\n"
PLOTS = ["acceptance-categories.png", "acceptance-depth.png", "acceptance-tau.png"]
FLAGS = ["--dtype", "float32", "--device", "cpu", "--max-prompt", "128", "--max-tokens", "24"]


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    """A directory with a model and prompts; runs write their results to it."""
    write_tiny_chat(tiny_model, tmp_path / "tiny")
    write_chat_prompts(tmp_path / "prompts.jsonl")
    return tmp_path


def command(folder: Path, *arguments: str) -> list[str]:
    prompts, target = str(folder / "prompts.jsonl"), str(folder / "tiny")
    line = ["--prompts", prompts, "--target", target, "--out", str(folder / "out"), *FLAGS]
    return [*line, *arguments]


def read(folder: Path) -> Report:
    return msgspec.json.decode((folder / "out" / "acceptance.json").read_bytes(), type=Report)


def outcome(category: str, stats: SpecStats, seconds: float = 2.0, **more: int) -> Outcome:
    tokens = stats.num_emitted_tokens
    drafted = Run(tokens, seconds, 4, 8, 1.0, 0.1, 0.7)
    plain = Run(tokens, 4.0, 8, 8, 2.0, 0.0, 1.9)
    return Outcome("q", category, stats, (more.get("accepted", 0), 1), drafted, plain, True)


LONG = SpecStats(
    num_spec_steps=8,
    num_draft_tokens=24,
    num_accepted_draft_tokens=10,
    num_emitted_tokens=18,
    acceptance_histogram=(3, 2, 1, 2),
    drafted_by_depth=(8, 8, 8),
    accepted_by_depth=(5, 3, 2),
)
SHORT = SpecStats(
    num_spec_steps=4,
    num_draft_tokens=2,
    num_accepted_draft_tokens=1,
    num_emitted_tokens=5,
    acceptance_histogram=(3, 1),
    drafted_by_depth=(2,),
    accepted_by_depth=(1,),
)


def test_figures_are_pooled_over_passes() -> None:
    figures = pool([outcome("a", LONG, accepted=9), outcome("b", SHORT)])
    assert figures.tau == (18 + 5) / (8 + 4)  # not the mean of 18 / 8 and 5 / 4
    assert figures.accepted == 11 / 26
    assert figures.reached == (6 / 10, 3 / 10, 2 / 10)  # of the trees with any drafted node
    assert figures.followed == (6 / 10, 3 / 6, 2 / 3)
    assert figures.accepted_by_drafter == (9, 2)
    assert figures.draft_ms == pytest.approx(1000 * 0.2 / 8)
    assert figures.verify_ms == pytest.approx(1000 * 1.4 / 8)
    assert figures.host_ms == pytest.approx(1000 * 0.4 / 8)
    assert figures.tokens_per_s == 23 / 4
    assert (figures.speedup, figures.decode_speedup) == (2.0, 2.0)


def test_speed_is_all_tokens_divided_by_all_seconds() -> None:
    figures = pool([outcome("a", LONG, seconds=1.0), outcome("a", SHORT, seconds=9.0)])
    assert figures.tokens_per_s == 23 / 10
    assert figures.speedup == pytest.approx((23 / 10) / (23 / 8))


def test_figures_by_category_and_overall() -> None:
    figures = by_category([outcome("a", LONG), outcome("b", SHORT), outcome("a", LONG)])
    assert list(figures) == ["a", "b", OVERALL]
    assert [each.num_prompts for each in figures.values()] == [2, 1, 3]
    assert [each.tau for each in figures.values()] == [18 / 8, 5 / 4, 41 / 20]


def test_figures_without_drafted_trees() -> None:
    nothing = Run(1, 0.5, 0, 0, 0.0, 0.0, 0.0)
    stats = SpecStats(num_spec_steps=1, num_emitted_tokens=1, acceptance_histogram=(1,))
    figures = pool([Outcome("q", "a", stats, (0,), nothing, nothing, True)])
    assert (figures.tau, figures.tokens_per_s, figures.speedup) == (1.0, 2.0, 1.0)
    assert (figures.accepted, figures.draft_ms, figures.decode_speedup) == (None, None, None)
    assert figures.reached == figures.followed == ()


def test_a_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = command(folder, "--draft", "ngram", "--budget", "4", "8", "--temperature", "0", "1")
    assert cli.main(["eval", "acceptance", *line]) == 0
    report = read(folder)
    assert [cell.key for cell in report.cells] == [
        ("ngram", temperature, budget) for temperature in (0.0, 1.0) for budget in (4, 8)
    ]
    assert report.prompts == ("10", "11", "12", "13")
    for cell in report.cells:
        assert list(cell.figures) == ["first", "second", OVERALL]
        assert cell.figures[OVERALL].tau >= 1.0
        assert tuple(each.prompt for each in cell.outcomes) == report.prompts
        for each in cell.outcomes:
            check(each, cell.budget)
    assert report.cells[1].figures[OVERALL].tau > 1.0  # greedy answers of this model repeat
    out = folder / "out"
    assert sorted(file.name for file in out.glob("*.png")) == PLOTS
    assert all((out / name).read_bytes().startswith(PNG) for name in PLOTS)
    text, shown = (out / "acceptance.md").read_text(), capsys.readouterr().out
    assert report.provenance.command in text
    assert "tau by category: temperature 1, budget 8" in text
    assert "tau by category: temperature 1, budget 8" in shown
    assert str(folder) not in text + (out / "acceptance.json").read_text()


def check(outcome: Outcome, budget: int) -> None:
    """The sums of one prompt."""
    stats, run, plain = outcome.stats, outcome.drafted, outcome.plain
    cut = stats.num_spec_steps + stats.num_accepted_draft_tokens - stats.num_emitted_tokens
    assert cut in (0, 1)  # where the answer ends with a drafted token, nothing comes on top
    assert stats.num_draft_tokens <= (budget - 1) * stats.num_spec_steps
    assert sum(outcome.accepted_by_drafter) == stats.num_accepted_draft_tokens
    assert sum(stats.accepted_by_depth) == stats.num_accepted_draft_tokens
    assert run.num_tokens == plain.num_tokens == stats.num_emitted_tokens <= 24
    assert outcome.same_ids
    assert run.decode_passes < stats.num_spec_steps
    assert plain.decode_passes == plain.decode_tokens < plain.num_tokens
    assert 0 < run.draft_seconds + run.verify_seconds < run.decode_seconds


def test_an_interrupted_run_is_resumed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The drafter fails in the second of two cells; the first one is not measured again."""
    few = ["--budget", "4", "8", "--limit", "2", "--no-plots"]
    line = command(folder, "--draft", "ngram", *few)
    propose = NgramDrafter.propose

    def fail_late(
        self: NgramDrafter, seqs: Sequence[SequenceView], budgets: Sequence[int]
    ) -> list[DraftTree]:
        if max(budgets) > 4:
            raise RuntimeError("not today")
        return propose(self, seqs, budgets)

    with monkeypatch.context() as patch:
        patch.setattr(NgramDrafter, "propose", fail_late)
        assert acceptance.main(line) == 2
    assert "draft: ['ngram'] failed; see the log" in capsys.readouterr().err
    left = read(folder)
    assert [cell.budget for cell in left.cells] == [4]
    marked = replace(left, cells=(replace(left.cells[0], revision="marked"),))
    acceptance.write(folder / "out" / "acceptance.json", marked)
    for _ in range(2):
        assert acceptance.main(line) == 0
        report = read(folder)
        assert [cell.budget for cell in report.cells] == [4, 8]
        assert report.cells[0] == marked.cells[0]
    assert not list((folder / "out").glob("*.p*"))  # neither pictures nor half a file
    assert acceptance_plots.main([str(folder / "out")]) == 0
    assert sorted(file.name for file in (folder / "out").glob("*.png")) == PLOTS


def test_a_run_with_other_settings_in_the_same_directory_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--limit", "1", "--budget", "4", "--no-plots"]
    assert acceptance.main(command(folder, *few)) == 0
    before = (folder / "out" / "acceptance.json").read_bytes()
    assert acceptance.main(command(folder, *few, "--max-tokens", "12", "--seed", "1")) == 2
    error = capsys.readouterr().err
    assert "max_tokens 24 instead of 12; seed 0 instead of 1; repeat its command" in error
    with (folder / "prompts.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"prompt": "w5 w6"}))
    assert acceptance.main(command(folder, *few)) == 2
    assert "prompts.jsonl (sha256" in capsys.readouterr().err
    assert (folder / "out" / "acceptance.json").read_bytes() == before


def test_a_draft_that_has_changed_since_is_refused(
    folder: Path, tiny_model: Path, tiny_draft: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, model in (("a", tiny_draft), ("b", tiny_model)):
        shutil.copytree(model, folder / name / "draft")
    few = ["--limit", "1", "--budget", "4", "--no-plots"]
    assert acceptance.main(command(folder, *few, "--draft", str(folder / "a" / "draft"))) == 0
    assert acceptance.main(command(folder, *few, "--draft", str(folder / "a" / "draft"))) == 0
    assert acceptance.main(command(folder, *few, "--draft", str(folder / "b" / "draft"))) == 2
    assert "holds a run with checkpoints {'draft': " in capsys.readouterr().err


def test_acceptance_is_counted_by_drafter(folder: Path, tiny_draft: Path) -> None:
    variant = f"ngram,{tiny_draft}"
    line = command(folder, "--draft", variant, "--budget", "4", "--per-category", "1", "--no-plots")
    assert acceptance.main(line) == 0
    (cell,) = read(folder).cells
    assert cell.draft == f"ngram,{tiny_draft.name}"
    assert cell.drafters == ("ngram", tiny_draft.name)
    assert len(cell.figures[OVERALL].accepted_by_drafter) == 2
    text = (folder / "out" / "acceptance.md").read_text()
    assert f"Accepted by drafter: {cell.draft}" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--draft", "ngran"], "did you mean 'ngram'"),
        (["--draft", "none"], "'none' is measured beside every draft"),
        (["--draft", "ngram,none"], "'none' cannot be combined"),
        (["--draft", "ngram", "--draft", "ngram"], "has a name twice"),
        (["--budget", "4", "65"], "65 is out of range; expected 2 to 64"),
        (["--budget", "1"], "1 is out of range"),
        (["--temperature", "-1"], "-1.0 is out of range"),
        (["--temperature", "0.001"], "too small to divide by"),
        (["--draft", "recycle", "--options", "recycle.file=x"], "from one cell to the next"),
        (["--limit", "2", "--per-category", "1"], "not allowed with"),
        (["--max-tokens", "200"], "none of 4 fits"),
        (["--prompts", "/nowhere.jsonl"], "/nowhere.jsonl cannot be read"),
        (["--out", "/dev/null/there"], "/dev/null/there cannot be used"),
    ],
)
def test_wrong_usage_has_exit_code_2(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    try:
        status = acceptance.main(command(folder, "--no-plots", *arguments))
    except SystemExit as exit_:  # argparse
        status = int(str(exit_.code))
    assert status == 2
    assert words in capsys.readouterr().err
    assert not (folder / "out").exists()


def test_the_error_without_matplotlib_names_the_extra(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert acceptance.main(command(folder)) == 2
    assert "pip install 'specserve[evals]'" in capsys.readouterr().err


def test_each_draft_flag_is_a_variant() -> None:
    variants = parse_variants(["none", "ngram", "ngram,some/where/draft"])
    assert [variant.name for variant in variants] == ["ngram", "ngram,draft"]
    assert [variant.draft for variant in parse_variants([])] == [DraftConfig().draft]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["eval", "--help"], "lossless"),
        (["eval", "acceptance", "--help"], "--per-category N"),
        (["eval", "perplexity", "--help"], "usage: specserve eval perplexity"),
    ],
)
def test_the_command_group_has_help(
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    assert exit_.value.code == 0
    assert words in capsys.readouterr().out


def test_an_unknown_eval_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["eval", "acceptence"])
    assert exit_.value.code == 2
    assert "invalid choice: 'acceptence'" in capsys.readouterr().err


def test_each_eval_is_a_module_with_main() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "specserve_evals.acceptance", "--limit", "0"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "0 is out of range" in done.stderr
