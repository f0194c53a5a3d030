"""The offline benchmark: its figures, and a whole run."""

from pathlib import Path

import msgspec
import pytest
from tiny_chat import write_chat_prompts, write_tiny_chat

from specserve_benchmarks import offline
from specserve_benchmarks.demo import PROMPTS
from specserve_benchmarks.offline import plan
from specserve_benchmarks.offline_report import OVERALL, Ratio, Report, Sample, summarise
from specserve_evals.prompts import Prompt


def sample(draft: str, repeat: int, seconds: float, category: str = "a", **more: object) -> Sample:
    plain = Sample(
        category=category,
        batch=4,
        draft=draft,
        repeat=repeat,
        seconds=seconds,
        ids=((1, 2, 3), (4, 5, 6)),
        ttft_s=(0.1, 0.3),
        tpot_s=(seconds / 10,),
        num_passes=6 if draft == "none" else 3,
        num_drafted=0 if draft == "none" else 8,
        num_accepted=0 if draft == "none" else 2,
    )
    return msgspec.structs.replace(plain, **more)


def test_medians_ratios_and_spread() -> None:
    seconds = {"none": (2.0, 4.0, 3.0), "ngram": (1.0, 2.0, 3.0)}
    samples = [
        sample(draft, repeat, seconds[draft][repeat])
        for repeat in range(3)
        for draft in ("none", "ngram")
    ]
    plain, drafted = summarise(samples)[:2]
    assert (plain.draft, plain.tokens_per_s, plain.speedup, plain.same_ids) == (
        *("none", 2.0, None, None),
    )
    assert (drafted.num_requests, drafted.num_tokens, drafted.tokens_per_s) == (2, 6, 3.0)
    assert drafted.speedup == Ratio(1.5, 1.0, 2.0)
    assert drafted.tpot_ratio is not None
    assert drafted.tpot_ratio.of_medians == pytest.approx(1.5)
    assert drafted.ttft_s == pytest.approx(0.2)
    assert (drafted.tokens_per_pass, drafted.acceptance) == (2.0, 0.25)
    assert drafted.same_ids is True


def test_different_token_ids_are_reported() -> None:
    samples = [sample("none", 0, 1.0), sample("ngram", 0, 1.0, ids=((1, 2, 3), (4, 5, 7)))]
    assert [row.same_ids for row in summarise(samples)] == [None, False, None, False]


def test_overall_adds_up_the_categories_of_a_repeat() -> None:
    samples = [
        sample(draft, repeat, seconds, category)
        for repeat in range(2)
        for category, seconds in (("a", 1.0), ("b", 3.0))
        for draft in ("none", "ngram")
    ]
    rows = summarise(samples)
    assert [(row.category, row.draft) for row in rows[4:]] == [
        (OVERALL, "none"),
        (OVERALL, "ngram"),
    ]
    assert rows[4].tokens_per_s == 12 / 4.0
    assert rows[4].num_requests == 4


def test_one_token_per_request_has_no_tpot() -> None:
    samples = [sample(draft, 0, 1.0, ids=((1,), (2,)), tpot_s=()) for draft in ("none", "ngram")]
    _, drafted, *_ = summarise(samples)
    assert drafted.tpot_s is None
    assert drafted.tpot_ratio is None


def test_batches_are_whole_and_repeat_prompts_only_if_needed() -> None:
    prompts = [Prompt(name, name[0], []) for name in ("a0", "b0", "a1", "a2", "b1")]
    cells = {(cell.category, cell.batch): cell for cell in plan(prompts, [1, 2, 4], 3)}
    found = {key: [prompt.id for prompt in cell.prompts] for key, cell in cells.items()}
    assert found["a", 1] == ["a0", "a1", "a2"]
    assert found["a", 2] == ["a0", "a1", "a2", "a0"]
    assert found["b", 4] == ["b0", "b1", "b0", "b1"]


def measure(out: Path, *arguments: str) -> tuple[Report, str]:
    """JSON and Markdown of a run."""
    assert offline.main(["--out", str(out), *arguments]) == 0
    (data,), (text,) = out.glob("*-cpu-offline.json"), out.glob("*-cpu-offline.md")
    return msgspec.json.decode(data.read_bytes(), type=Report), text.read_text()


def test_a_run(tiny_model: Path, tmp_path: Path) -> None:
    model = write_tiny_chat(tiny_model, tmp_path / "tiny")
    prompts = write_chat_prompts(tmp_path / "prompts.jsonl")
    report, text = measure(
        tmp_path / "results",
        *("--prompts", str(prompts), "--target", str(model), "--device", "cpu"),
        *("--batch", "1", "3", "--max-tokens", "12", "--max-prompt", "64", "--repeats", "2"),
    )
    assert {row.draft for row in report.rows} == {"none", "auto"}
    assert len(report.rows) == 2 * 2 * (2 + 1)  # drafts x batch sizes x categories and overall
    assert all(row.same_ids for row in report.rows if row.draft != "none")
    assert all(row.ttft_s and row.tpot_s and row.speedup for row in report.rows[1::2])
    assert report.provenance.command in text
    assert text.count(f"| {OVERALL} |") == 4


def test_no_prompt_that_fits_is_an_error(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_tiny_chat(tiny_model, tmp_path / "tiny")
    prompts = write_chat_prompts(tmp_path / "prompts.jsonl")
    flags = ["--prompts", str(prompts), "--target", str(model), "--device", "cpu"]
    assert offline.main([*flags, "--max-prompt", "20", "--max-tokens", "20"]) == 2
    assert "none of 4 fits" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_of_smollm2(tmp_path: Path) -> None:
    """The demo's prompts, as without a prompt file."""
    report, _ = measure(
        tmp_path, *("--device", "cpu", "--batch", "1", "--max-tokens", "8", "--repeats", "1")
    )
    assert {row.category for row in report.rows} == {*PROMPTS, OVERALL}
    assert all(row.same_ids for row in report.rows if row.draft != "none")
