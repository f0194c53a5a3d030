"""The lossless eval on real engines: it reports differences, and none if there are none."""

from pathlib import Path

import msgspec
import pytest
from eagle_heads import write_eagle
from rich.console import Console
from tiny import write_tiny_llama
from tiny_chat import write_chat_prompts, write_tiny_chat

from specserve.completion import Completion, Timing
from specserve.step import FinishInfo, VerifyResult
from specserve.tree import chain_tree
from specserve.types import SpecStats
from specserve.verify.walk import Walk
from specserve_evals import lossless
from specserve_evals.audit import Acceptance
from specserve_evals.identity import Mismatch, compare, first_difference
from specserve_evals.lossless import Report
from specserve_evals.prompts import Prompt, load_prompts
from specserve_evals.runs import PLAIN, open_llm, parse_variants

TINY = ["--dtype", "float32", "--device", "cpu", "--max-prompt", "128"]
OUT = "report.json"


@pytest.fixture
def tiny_chat(tiny_model: Path, tmp_path: Path) -> Path:
    return write_tiny_chat(tiny_model, tmp_path / "tiny")


@pytest.fixture
def prompt_file(tmp_path: Path) -> Path:
    return write_chat_prompts(tmp_path / "prompts.jsonl")


def examine(folder: Path, *arguments: str) -> tuple[int, Report]:
    """Exit code and report of the command."""
    out = folder / OUT
    prompts = str(folder / "prompts.jsonl")
    status = lossless.main(["--prompts", prompts, "--out", str(out), *arguments])
    return status, msgspec.json.decode(out.read_bytes(), type=Report)


def completion(*token_ids: int) -> Completion:
    stats = SpecStats(num_spec_steps=1, num_emitted_tokens=len(token_ids))
    return Completion("", token_ids, "length", stats, Timing(0.1, 0.1, 0.2))


@pytest.mark.parametrize(
    ("found", "mismatch"),
    [
        ((1, 2, 3), None),
        ((1, 9, 3), Mismatch("q", 1, 2, 9)),
        ((1, 2), Mismatch("q", 2, 3, None)),
        ((1, 2, 3, 4), Mismatch("q", 3, None, 4)),
        ((), Mismatch("q", 0, 1, None)),
    ],
)
def test_the_first_difference(found: tuple[int, ...], mismatch: Mismatch | None) -> None:
    assert first_difference("q", (1, 2, 3), found) == mismatch


def test_a_difference_is_counted() -> None:
    prompts = [Prompt(name, "all", []) for name in ("p", "q")]
    row = compare(
        ("ngram", "greedy", 2),
        prompts,
        [(1, 2, 3), (4, 5, 6)],
        [completion(1, 2, 3), completion(4, 7, 6)],
        2.0,
        Acceptance(),
    )
    assert row.mismatches == (Mismatch("q", 1, 5, 7),)
    assert (row.num_prompts, row.num_tokens, row.tokens_per_pass) == (2, 6, 3.0)
    assert row.tokens_per_s == 3.0


def test_the_answers_of_another_model_fail_the_command(
    tiny_chat: Path, prompt_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Reference and answers are of different models: every prompt is reported."""
    other = write_tiny_chat(write_tiny_llama(tmp_path / "other", seed=5), tmp_path / "other-chat")
    flags = ["--target", str(tiny_chat), "--settings", "greedy", "--batch", "1", *TINY]
    flags += ["--max-tokens", "8"]
    _, good = examine(tmp_path, *flags)
    assert good.num_mismatches == 0
    args = lossless.build_parser().parse_args(["--prompts", str(prompt_file), *flags])
    prompts = load_prompts(prompt_file)
    examination = lossless.Examination(args, parse_variants(["ngram"]))
    llm = open_llm(args, PLAIN, lambda stage, fraction: None)
    args.target = str(other)
    examination.run(llm, prompts)
    report = lossless.Report(good.provenance, (), (), 0, 4, tuple(examination.comparisons))
    assert [len(row.mismatches) for row in report.comparisons] == [0, 4]
    assert lossless.show(report, Console(highlight=False, width=200)) == 1
    assert "prompt 10 differs at output position" in capsys.readouterr().out


def test_no_token_differs(tiny_chat: Path, prompt_file: Path, tmp_path: Path) -> None:
    head = write_eagle(tmp_path / "head", "specforge").path  # which has the target's hidden states
    status, report = examine(
        tmp_path,
        *("--target", str(tiny_chat), "--draft", "ngram", "--draft", f"recycle,{head}", *TINY),
        *("--limit", "3", "--batch", "1", "3", "--max-tokens", "24"),
    )
    assert status == 0
    assert report.num_mismatches == 0
    assert report.prompts == ("10", "11", "12")
    assert len(report.comparisons) == 3 * 3 * 2  # drafts x settings x batch sizes
    assert sum(row.is_reference for row in report.comparisons) == 3
    assert any(row.accepted_by_depth for row in report.comparisons if row.draft == "ngram")
    assert report.provenance.data is not None
    assert report.provenance.data.name == "prompts.jsonl"
    assert str(tmp_path) not in report.provenance.command


def test_a_target_accepts_what_it_drafts(
    tiny_chat: Path, prompt_file: Path, tmp_path: Path
) -> None:
    status, report = examine(
        tmp_path,
        *("--target", str(tiny_chat), "--self-draft", *TINY, "--batch", "4"),
        *("--settings", "greedy", "temp-1", "--max-tokens", "20"),
        "--no-cost-aware",  # a draft as large as its target is not worth its time
    )
    rows = [row for row in report.comparisons if row.draft == "self"]
    assert status == 0
    assert [row.acceptance for row in rows] == [1.0, 1.0]
    assert all(row.tokens_per_pass > 3 for row in rows)


def test_a_wrong_file_is_a_usage_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lossless.main(["--prompts", str(tmp_path / "none.jsonl")]) == 2
    assert "none.jsonl" in capsys.readouterr().err


def walk(draws: list[int], finish: FinishInfo | None) -> VerifyResult:
    """The result if the target draws `draws` along the path 5, 6, 7."""
    walked = Walk(chain_tree(4, [5, 6, 7], [0.9, 0.8, 0.7], 1))
    for index, token in enumerate(draws):
        walked.emit(token, finish if index == len(draws) - 1 else None)
    return walked.result()


@pytest.mark.parametrize(
    ("draws", "finish", "accepted", "rejected"),
    [
        ([5, 6, 7, 8], None, [1, 1, 1], []),  # all accepted, and one more
        ([5, 9], None, [1], [0, 1]),  # rejected at the second
        ([9], None, [], [1]),
        ([5, 6], FinishInfo("length"), [1, 1], []),  # cut: the third was not looked at
        ([5, 6], FinishInfo("stop", 6), [1, 1], []),
        ([9], FinishInfo("stop", 9), [], [1]),  # the target ended, the draft had not
    ],
)
def test_tokens_cut_at_the_end_are_not_rejected(
    draws: list[int], finish: FinishInfo | None, accepted: list[int], rejected: list[int]
) -> None:
    acceptance = Acceptance()
    acceptance.record(chain_tree(4, [5, 6, 7], [0.9, 0.8, 0.7], 1), walk(draws, finish))
    assert (acceptance.accepted, acceptance.rejected) == (accepted, rejected)


def test_acceptance_without_drafts_is_none() -> None:
    acceptance = Acceptance()
    acceptance.record(chain_tree(4, [], [], 1), VerifyResult((0,), (9,), (0,), 0))
    assert acceptance.share is None


@pytest.mark.slow
def test_no_token_of_smollm2_differs(prompt_file: Path, tmp_path: Path) -> None:
    status, report = examine(
        tmp_path,
        *("--limit", "2", "--max-tokens", "8", "--batch", "1", "2", "--settings", "greedy"),
    )
    assert status == 0
    assert report.num_mismatches == 0
    assert report.num_compared_tokens > 0
